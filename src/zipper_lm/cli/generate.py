"""`zipper generate`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from zipper_lm.cli.common import (
    DType,
    Json,
    Model,
    Overwrite,
    Trust,
    console,
    emit,
    load_model,
    say,
    settings_of,
    tell_slow,
)
from zipper_lm.cli.screen import Screen, follow

if TYPE_CHECKING:
    from zipper_lm.data.document import Document, Segment
    from zipper_lm.generation.writer import Writer

ORDER = "zipper.order"
PARTS = ("inputs", "outputs")


class InOrder(TyperCommand):
    """Remembers in which order ``--input`` and ``--output`` came: together they are one document."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[ORDER] = [p.name for p in order if p.name in PARTS]
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class Goal:
    """What is to be written: a modality, and the file it goes to; text without a file is printed."""

    modality: str
    file: Path | None

    @classmethod
    def read(cls, text: str, overwrite: bool) -> Goal:
        """From ``MODALITY`` or ``MODALITY:FILE``."""
        from zipper_lm.utils.files import check_output

        modality, colon, file = text.partition(":")
        if not modality or (colon and not file):
            raise ValueError(f"--output {text!r}: write a modality, or modality:file, such as speech:out.wav")
        if not file:
            return cls(modality, None)
        check_output(file, overwrite, folder=False)
        return cls(modality, Path(file))


def generate(
    context: typer.Context,
    model: Model,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="MODALITY:VALUE", help="Given: a text, or a file.")
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option("--output", metavar="MODALITY[:FILE]", help="To be written; text without a file is printed."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(metavar="auto", help="auto: the model says itself what comes next, and when it is done."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="MODALITY.NAME=VALUE", help="A generation setting, as in transformers."),
    ] = None,
    best_of: Annotated[
        int,
        typer.Option(metavar="N", help="Samples of each segment; the likeliest goes on, or --judge chooses."),
    ] = 1,
    judge: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="With --best-of: a judge that hears samples of what is said.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Write by an engine's compiled step: a long first token, then faster.")
    ] = False,
    dtype: DType = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the next segments of a document; several --input and --output, in order, make one document.

    Example: [bold]zipper generate MODEL --input text:"three one four" --output speech:out.wav[/bold]

    Spoken question, spoken answer:
    [bold]zipper generate MODEL --input speech:in.wav --output text --output speech:answer.wav[/bold]
    """
    started = time.monotonic()
    order = iter_parts(context.meta.get(ORDER, []), inputs or [], outputs or [], overwrite)
    given, plan = split_plan(order)
    goals = [part for part in plan if isinstance(part, Goal)]
    if schedule not in (None, "auto"):
        raise ValueError(f"--schedule {schedule!r}: the only one is auto; otherwise the --output options say it")
    if schedule is None and not goals:
        raise ValueError('nothing to write: give --output, such as --output text, or "--schedule auto"')
    if schedule == "auto" and len(goals) < len(plan):
        raise ValueError("--schedule auto: every --input must come before every --output")
    if doubled := [str(f) for f, n in Counter(g.file for g in goals if g.file).items() if n > 1]:
        raise ValueError(f"--output names {doubled[0]!r} twice")
    if judge is not None and best_of < 2:
        raise ValueError("--judge chooses among samples: give --best-of")
    if stream and best_of > 1:
        raise ValueError("--stream: the tokens of several samples cannot be streamed")
    if compile_ and stream:
        raise ValueError("--stream shows what the plain path writes: leave out --compile")
    settings = settings_of(model, changes or [])
    loaded = load_model(model, trust_remote_code, dtype)
    tell_slow(loaded)
    import torch

    from zipper_lm.cli.values import kind_of
    from zipper_lm.data.document import Document, check_modalities
    from zipper_lm.evaluation.best_of import Heard, sampled
    from zipper_lm.evaluation.judges import load_judge

    document = Document(given)
    check_modalities([document], loaded.names)
    if unknown := sorted({part.modality for part in plan} - set(loaded.names)):
        raise ValueError(f"unknown modality {unknown[0]!r}; this model has {loaded.names}")
    if loaded.processor is not None:
        for goal in goals:
            _check_suffix(goal, loaded.processor.codecs.get(goal.modality))
    torch.manual_seed(seed)
    settings = sampled(settings, {g.modality for g in goals} if schedule is None else loaded.names, best_of)
    choose = Heard(loaded, load_judge(judge)) if judge is not None else None
    wanted: Any = "auto" if schedule else [p.modality if isinstance(p, Goal) else p for p in plan]
    if stream:
        expected = {len(given) + n: part.modality for n, part in enumerate(plan) if isinstance(part, Goal)}
        screen = Screen(sys.stderr if json else sys.stdout)
        tokens: Any = loaded.stream(document, wanted, settings=settings)
        written = follow(tokens, screen, partial(_line, loaded), {} if schedule else expected)
    elif compile_:
        written = _compiled(loaded, document, wanted, settings, choose)
    else:
        written = loaded.generate([document], wanted, settings=settings, choose=choose)[0]
    new = written.segments[len(given) :]
    if schedule is None:
        pairs = [(part, segment) for part, segment in zip(plan, new) if isinstance(part, Goal)]
    else:
        pairs = _matched(goals, new)
    if stream:
        screen.end("".join(f"{_value(s)}\n" for _, s in pairs if kind_of(_value(s)) == "text"))
    files = {id(s): str(g.file) for g, s in pairs if g.file is not None}
    for goal, segment in pairs:
        _write(goal, segment, overwrite, show=not (json or stream))
    if json:
        was_given = [True] * len(given) + [schedule is None and not isinstance(part, Goal) for part in plan]
        was_given += [False] * (len(written) - len(was_given))
        segments = [_plain(s, known, files) for s, known in zip(written, was_given)]
        emit({"document": segments, "seconds": round(time.monotonic() - started, 2)})


def _compiled(model: Writer, document: Document, schedule: Any, settings: Any, choose: Any) -> Document:
    """As `generate`, by an engine with as many rows as the document's samples take."""
    from zipper_lm.fusion.network import ZippedTowers
    from zipper_lm.generation.arguments import checked_settings
    from zipper_lm.generation.candidates import samples_of
    from zipper_lm.generation.engine.engine import Engine

    if not isinstance(model, ZippedTowers):
        raise ValueError("--compile: an engine writes with towers and zips, and this model is a single decoder")
    given = checked_settings(model, settings).values()
    rows = [samples_of(g) * (1 if g.guidance_scale in (None, 1) else 2) for g in given]
    with Engine(model.eval(), slots=max(rows, default=1)) as engine:
        return model.generate([document], schedule, settings=settings, choose=choose, engine=engine)[0]


def iter_parts(order: list[str], inputs: list[str], outputs: list[str], overwrite: bool) -> list[Any]:
    """Segments and goals in the order of the command line.

    Raises:
        ValueError: for a malformed option, an input file that is missing, or an output that exists.
    """
    given, goals = iter(inputs), iter(outputs)
    kinds = order or ["inputs"] * len(inputs) + ["outputs"] * len(outputs)
    return [_given(next(given)) if kind == "inputs" else Goal.read(next(goals), overwrite) for kind in kinds]


def _given(text: str) -> Segment:
    from zipper_lm.data.document import Segment

    modality, colon, value = text.partition(":")
    if not colon or not modality or not value:
        raise ValueError(f'--input {text!r}: write modality:value, such as text:"three one four" or speech:in.wav')
    if modality != "text" and value.startswith("~"):  # of no word of its own, a shell leaves it
        value = str(Path(value).expanduser())
    if modality == "speech" and not Path(value).is_file():
        raise ValueError(f"--input {text!r}: no file {value!r}")
    return Segment(modality, value)


def split_plan(parts: list[Any]) -> tuple[list[Any], list[Any]]:
    """The leading inputs, and everything from the first output on."""
    first = next((i for i, part in enumerate(parts) if isinstance(part, Goal)), len(parts))
    return parts[:first], parts[first:]


def _line(model: Writer, modality: str, ids: list[int]) -> str:
    """What is shown of ids while they are written."""
    from zipper_lm.codecs.codec import can_decode
    from zipper_lm.data.document import Segment

    codec = model.processor.codecs.get(modality) if model.processor is not None else None
    if codec is None or not can_decode(codec):
        return f"{_value(Segment(modality, ids=ids))}\n"
    return f"{codec.decode([ids])[0]}\n" if _is_text(codec) else ""


def _value(segment: Segment) -> Any:
    """What was written: its ids, as words, if nothing can decode them."""
    return " ".join(str(i) for i in segment.ids or []) if segment.value is None else segment.value


def _is_text(codec: Any) -> bool:
    from zipper_lm.codecs.codec import PICTURE_KINDS

    return codec.rate is None and codec.kind not in PICTURE_KINDS


def _matched(goals: list[Goal], segments: list[Segment]) -> list[tuple[Goal, Segment]]:
    """What an automatic schedule wrote, with the goals of the same modality in turn; further text is printed."""
    waiting = list(goals)
    pairs = []
    for segment in segments:
        goal = next((g for g in waiting if g.modality == segment.modality), None)
        if goal is not None:
            waiting.remove(goal)
        elif segment.modality == "text":
            goal = Goal("text", None)
        else:
            console().print(f"{segment.modality}: {len(segment.ids or [])} tokens written, but no --output for them")
            continue
        pairs.append((goal, segment))
    for goal in waiting:
        console().print(f"nothing written for --output {goal.modality}: the model did not choose it")
    return pairs


def _check_suffix(goal: Goal, codec: Any) -> None:
    """Raise `ValueError` if the file cannot hold what the codec makes; text may go into any file."""
    from zipper_lm.cli.values import SUFFIXES
    from zipper_lm.codecs.codec import PICTURE_KINDS, can_decode

    suffix = goal.file.suffix.lower() if goal.file is not None else ""
    if codec is None or not can_decode(codec):
        if suffix in SUFFIXES["sound"] + SUFFIXES["picture"]:
            raise ValueError(
                f"--output {goal.modality}: this model writes ids, which {suffix!r} is no file for; use .txt"
            )
        return
    if _is_text(codec):
        return
    made = "picture" if codec.kind in PICTURE_KINDS else "sound"
    if suffix not in SUFFIXES[made]:
        expected = " or ".join(SUFFIXES[made])
        raise ValueError(f"--output {goal.modality}: a {made} needs a file ending in {expected}, got {suffix!r}")


def _write(goal: Goal, segment: Segment, overwrite: bool, *, show: bool) -> None:
    from zipper_lm.cli.values import kind_of, write_value
    from zipper_lm.utils.files import new_file

    value = _value(segment)
    if kind_of(value) == "sound" and not len(value):
        raise ValueError(f"--output {goal.modality}:{goal.file}: the model wrote no sound")
    if goal.file is not None:
        with new_file(goal.file, overwrite) as file:  # it may have appeared meanwhile
            write_value(file, value)
    elif show and kind_of(value) == "text":
        say(value)


def _plain(segment: Segment, given: bool, files: dict[int, str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"modality": segment.modality, "given": given, "tokens": len(segment.ids or [])}
    if isinstance(segment.value, str | list):
        fields["value"] = segment.value
    if segment.logprobs is not None:
        fields["log_probability"] = round(segment.score, 3)
    if segment.candidates:
        fields["candidates"] = [_plain(candidate, given, {}) for candidate in segment.candidates]
    if id(segment) in files:
        fields["file"] = files[id(segment)]
    return fields
