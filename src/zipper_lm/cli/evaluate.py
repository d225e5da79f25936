"""`zipper evaluate`."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zipper_lm.cli.common import (
    DType,
    Json,
    Model,
    Overwrite,
    Trust,
    console,
    emit,
    is_first,
    load_model,
    say,
    settings_of,
    tell_slow,
)

if TYPE_CHECKING:
    from zipper_lm.evaluation.judges import Judge
    from zipper_lm.evaluation.scoring import Score
    from zipper_lm.generation.writer import Writer

HEADS = ["file_name", "transcription", "heard"]


def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder, JSONL file or Hub id.")],
    task: Annotated[
        str, typer.Option(help="asr, tts, a template such as speech->text->speech, or forgetting.")
    ] = "asr",
    split: Annotated[str, typer.Option(help="Which split.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Only the first rows, of those that --where keeps.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only rows with this, such as speaker=theo.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="MODALITY=NAME", help="A column of DATA with no usual name, such as text=words."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="A judge, a recogniser on the Hub, or data to fit one on; default: DATA."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="MODALITY.NAME=VALUE", help="A generation setting, as in transformers."),
    ] = None,
    best_of: Annotated[int, typer.Option(help="Samples of what is written, of which one counts.")] = 1,
    best_by: Annotated[
        str, typer.Option(help="Which one: score (likeliest), judge (heard best) or reading (read best by the model).")
    ] = "score",
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of the task forgetting: JSONL of text and answers.")
    ] = None,
    normaliser: Annotated[
        str, typer.Option(help="How texts are written before words are compared: plain or whisper-english.")
    ] = "plain",
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what was generated: sounds or pictures, metadata.csv.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: DType = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Score a model by word error rate, of what it wrote, or of what an independent judge heard or saw.

    A sequence of symbols, such as a protein, is compared token by token: its words are its tokens.
    The task forgetting asks the text decoder, as itself, and the checkpoint that it came from the same: perplexity on
    the text of DATA, and 200 questions.
    Started by torchrun, several processes share the rows.

    Example: [bold]zipper evaluate outputs/spoken-digits/model my/recordings --task tts --output heard/[/bold]
    """
    started = time.monotonic()
    from zipper_lm.data.document import Document
    from zipper_lm.data.sources.readers import read_rows
    from zipper_lm.data.tasks import parse_task
    from zipper_lm.evaluation.forgetting import FORGETTING
    from zipper_lm.evaluation.scoring import SHORT_NAMES, counts_tokens, scorable, score_task, told_unscored, yardsticks
    from zipper_lm.evaluation.word_error_rate import normaliser_of
    from zipper_lm.models.records import read_results
    from zipper_lm.utils.files import check_apart, check_output
    from zipper_lm.utils.places import place_of
    from zipper_lm.utils.processes import several
    from zipper_lm.utils.progress import bar

    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    normaliser_of(normaliser)
    if task == FORGETTING:
        given: dict[str, Any] = {"--judge": judge, "--output": output, "--set": changes, "--best-of": best_of > 1}
        given["--normaliser"] = normaliser != "plain"
        if refused := [option for option, value in given.items() if value]:
            raise ValueError(
                f"{refused[0]} has no effect on the task {FORGETTING}: nothing is judged, answers are greedy"
            )
        chosen: dict[str, Any] = {"split": split, "column": column, "where": where, "limit": limit}
        told = _forgetting(model, data, chosen, questions, trust_remote_code, dtype)
        told["seconds"] = round(time.monotonic() - started, 1)
        if json:
            emit(told)
        elif is_first():
            _say_forgetting(told)
        return
    if questions is not None:
        raise ValueError(f"--questions has no effect on task {task!r}, but on {FORGETTING}")
    ends_in = parse_task(SHORT_NAMES.get(task, task)).targets[-1]
    if output is not None:
        check_output(output, overwrite)
        read = {"the model": model, "the data": data, "the judge": judge}
        check_apart(output, read, _wrote)
    if Path(model).is_dir():
        read_results(model)  # one that cannot be added to is said now
    settings = settings_of(model, changes or [])
    columns = _columns(column or [])
    found = read_rows(data, columns, split=split, limit=None if where else limit)
    rows = _chosen([row for row in found if not isinstance(row, Document)], where or [])[:limit]
    several()  # each of several processes has a device of its own
    loaded = load_model(model, trust_remote_code, dtype)
    tell_slow(loaded)
    parse_task(SHORT_NAMES.get(task, task), loaded.names)  # before a judge is fitted
    codec = loaded.processor.codecs.get(ends_in) if loaded.processor is not None else None
    judged = ends_in != "text" and not counts_tokens(ends_in, codec)
    for option, named in (("--output", output), ("--judge", judge)):
        if named is not None and not judged:
            raise ValueError(f"{option}: task {task!r} writes {ends_in} only, nothing to be judged")
    worded = scorable(rows, ends_in, codec, normaliser)
    if wordless := len(rows) - len(worded):
        if not worded:
            raise ValueError(f"{data}: none of {len(rows)} rows has anything to compare with")
        console().print(told_unscored(wordless, "rows"), style="yellow")
    rows = worded
    import torch

    torch.manual_seed(seed)
    listener = _judge(judge, data, columns, ends_in) if judged else None
    with bar(console(), "generating", transient=True) as advance:
        advance(0, len(rows))
        best: dict[str, Any] = {"best_of": best_of, "best_by": best_by}
        how: dict[str, Any] = best | {"settings": settings, "normaliser": normaliser}
        score = score_task(loaded, rows, task, judge=listener, progress=advance, **how)
    result = {**score.summary(), "task": task, "template": score.task, "split": split}
    result |= {k: v for k, v in {"column": column, "where": where, "not_scored": wordless}.items() if v}
    if listener is not None:
        result |= yardsticks(loaded, rows, listener, ends_in, score.normaliser)
    asked = {"data": place_of(data), "limit": limit, "set": changes, "seed": seed or None, "dtype": dtype}
    if best_of > 1:
        asked |= best
    if judged:
        asked["judge"] = place_of(judge or data)
    if Path(model).is_dir() and is_first():
        _keep(Path(model), loaded, result | {k: v for k, v in asked.items() if v})
    if output is not None:
        if is_first():
            write_values(output, score, overwrite)
        result["output"] = str(output)
    result["seconds"] = round(time.monotonic() - started, 1)
    if json:
        emit(result)
    elif is_first():
        low, high = result["wer_95"]
        say(f"{task}: WER {result['wer']} % ({low} to {high}), CER {result['cer']} %, {len(rows)} utterances")
        for name in ("judge_wer_on_originals", "oracle_wer", "look_up_wer"):
            if name in result:
                say(f"{name.replace('_', ' ')}: {result[name]} %")


def _forgetting(
    model: str,
    data: str,
    chosen: Mapping[str, Any],
    questions: Path | None,
    trust_remote_code: bool,
    dtype: str | None,
) -> dict[str, Any]:
    """What the text decoder of a model has forgotten, kept beside the model."""
    from zipper_lm.evaluation.forgetting import FORGETTING, measure_forgetting, read_questions
    from zipper_lm.models.records import read_results
    from zipper_lm.utils.hub import local_folder
    from zipper_lm.utils.places import place_of
    from zipper_lm.utils.processes import several

    if Path(model).is_dir():
        read_results(model)
    texts, asked = _texts(data, **chosen), read_questions(questions) if questions else read_questions()
    several()
    loaded = load_model(model, trust_remote_code, dtype)
    tell_slow(loaded)
    found = measure_forgetting(loaded, texts, asked, folder=local_folder(model))
    told = {"task": FORGETTING, "template": FORGETTING, "data": place_of(data)}
    result = told | {k: v for k, v in {**chosen, "dtype": dtype}.items() if v} | found.summary()
    if Path(model).is_dir() and is_first():
        _keep(Path(model), loaded, result)
    return result


def _texts(data: str, split: str, column: list[str] | None, where: list[str] | None, limit: int | None) -> list[str]:
    """The texts of a data set's rows."""
    from zipper_lm.data.document import Document
    from zipper_lm.data.sources.readers import read_rows

    found = read_rows(data, _columns(column or []), split=split, limit=None if where else limit)
    rows = _chosen([row for row in found if not isinstance(row, Document)], where or [])[:limit]
    texts = [row["text"] for row in rows if isinstance(row.get("text"), str)]
    if not texts:
        raise ValueError(f"{data}: no row of split {split!r} has a text")
    return texts


def _say_forgetting(told: Mapping[str, Any]) -> None:
    for when in ("before", "after"):
        known = told[when]
        say(
            f"{when}: perplexity {known['perplexity']} a token, {known['bits_per_character']} bits a character, "
            f"{known['right']} of {told['questions']} answers right"
        )
    say(f"answers that stay the same: {told['same_answers']} of {told['questions']}")


def _keep(folder: Path, model: Writer, result: dict[str, Any]) -> None:
    """Add a result to those kept beside the model, and to its card."""
    from zipper_lm.models.card import refresh_card
    from zipper_lm.models.records import add_result, weights_digest

    try:
        add_result(folder, result | {"weights": weights_digest(folder)})
        refresh_card(folder, model)
    except (OSError, ValueError) as error:  # the figures are there: they shall be seen
        from zipper_lm.utils.progress import warn

        warn(console(), "not kept beside the model", error)


def _chosen(rows: list[Any], conditions: list[str]) -> list[Any]:
    """Rows that meet every condition ``COLUMN=VALUE``."""
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals or not any(column in row for row in rows):
            there = sorted({name for row in rows for name in row})
            raise ValueError(f"--where {condition!r}: expected COLUMN=VALUE; the columns are {there}")
        values = sorted({str(row.get(column)) for row in rows})
        rows = [row for row in rows if str(row.get(column)) == value]
        if not rows:
            raise ValueError(f"--where {condition!r}: no row has it; {column} is one of {values[:20]}")
    return rows


def _wrote(folder: Path) -> bool:
    """Whether `write_values` made it: a part of a data set or of a model is something else."""
    table = folder / "metadata.csv"
    if not table.is_file():
        return False
    with table.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), None) == HEADS


def _columns(given: list[str]) -> dict[str, str]:
    """Modality to column, of ``MODALITY=NAME`` each."""
    columns = {}
    for each in given:
        modality, _, name = each.partition("=")
        if not modality or not name:
            raise ValueError(f"--column {each!r}: expected MODALITY=NAME")
        columns[modality] = name
    return columns


def _judge(given: str | None, data: str, columns: dict[str, str], modality: str) -> Judge:
    from zipper_lm.evaluation.judges import judge_told, load_judge
    from zipper_lm.evaluation.recogniser import CONFIG_FILE

    if given is not None and ((Path(given) / CONFIG_FILE).is_file() or _is_model(given)):
        return load_judge(given)
    return judge_told(console(), given or data, None if given else columns, modality=modality)


def _is_model(source: str) -> bool:
    """Whether the Hub, or what was fetched from it, has a model of that name; a data set is what else it can be."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    if Path(source).exists():
        return False
    try:
        fetched = huggingface_hub.try_to_load_from_cache(source, "config.json")
        return isinstance(fetched, str) or huggingface_hub.repo_exists(source, repo_type="model")
    except HFValidationError:  # no name for one
        return False
    except Exception as error:  # no Hub: of huggingface-hub and httpx, each has its own kinds
        from zipper_lm.utils.progress import warn

        warn(console(), f"whether {source} is a model cannot be known, so it is read as data", error)
        return False


def write_values(folder: Path, score: Score, overwrite: bool) -> None:
    """What was generated, as an audiofolder or imagefolder: ``metadata.csv`` with file_name, transcription (what it
    should say), heard (by the judge)."""
    from zipper_lm.cli.values import suffix_of, write_value
    from zipper_lm.utils.files import new_folder

    with new_folder(folder, overwrite) as new, (new / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(HEADS)
        for number, (value, text, heard) in enumerate(zip(score.values, score.references, score.hypotheses)):
            name = f"{number:05d}{suffix_of(value)}"
            write_value(new / name, value)
            table.writerow([name, text, heard])
