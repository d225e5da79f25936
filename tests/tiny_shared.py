"""Work that several processes share: all of its kinds, what came of them, and how much of it this process did.

A module of its own: processes that are spawned import it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from zipper_lm.data import encoding
from zipper_lm.data.broken import Broken
from zipper_lm.data.document import Document
from zipper_lm.data.encoding import encode_column, encode_rows
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.data.tasks import parse_task
from zipper_lm.evaluation import preservation, scoring
from zipper_lm.evaluation.judges import load_judge
from zipper_lm.evaluation.preservation import perplexity
from zipper_lm.evaluation.scoring import Score, score_task, yardsticks
from zipper_lm.jobs import failures, pseudo_labels
from zipper_lm.jobs.failures import _activity, losses_on, some_batches
from zipper_lm.jobs.recipes.schema import PseudoLabelsRecipe
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.utils.processes import shared

AT_ONCE = 2
SETTINGS: dict[str, Any] = {"text": {"max_new_tokens": 4}, "speech": {"max_new_tokens": 8}}
DRAWN: dict[str, Any] = {name: given | {"do_sample": True} for name, given in SETTINGS.items()}


def work_together(workshop: Path) -> tuple[dict[str, Any], dict[str, list[tuple[int, int]]]]:
    """By kind of work, what it comes to; and which pieces this process did of it: numbers, and how many values each
    has."""
    torch.manual_seed(0)
    model = ZipperModel.fuse({name: str(workshop / name) for name in ("text", "speech")}).eval()
    assert model.processor is not None
    rows, judge = read_rows(str(workshop / "data"), split="train"), load_judge(workshop / "judge")
    texts = [row["text"] for row in rows]
    spoiled = [row if n != 5 else {"text": "six"} for n, row in enumerate(rows)]
    done: dict[str, Counter[int]] = {}
    at = 0

    def numbered(pieces: Iterable[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
        def one(piece: tuple[int, Any]) -> Any:
            nonlocal at
            at = piece[0]
            return work(piece[1])

        return shared(enumerate(pieces), one)

    def noted(kind: str, owner: Any, name: str, size: Callable[..., int]) -> Any:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            done.setdefault(kind, Counter())[at] += size(*args)
            return real(*args, **kwargs)

        return mock.patch.object(owner, name, counted)

    def first(values: Sequence[Any], *_: Any) -> int:
        return len(values)

    found: dict[str, Any] = {}
    speech = model.processor.codecs["speech"]
    with ExitStack() as small:
        for owner, name in ((encoding, "CHUNK"), (pseudo_labels, "BATCH"), (scoring, "BATCH")):
            small.enter_context(mock.patch.object(owner, name, AT_ONCE))
        for owner in (encoding, failures, preservation, pseudo_labels, scoring):
            small.enter_context(mock.patch.object(owner, "shared", numbered))
        with noted("read", model, "generate", first):
            found["read"] = _plain(score_task(model, rows, "asr", settings=SETTINGS, batch_size=AT_ONCE))
        how: dict[str, Any] = {"settings": DRAWN, "batch_size": AT_ONCE, "best_of": 2, "best_by": "judge"}
        with noted("spoken", model, "generate", first), noted("heard", judge, "transcribe", first):
            found["spoken"] = _plain(score_task(model, rows, "tts", judge=judge, **how))
        with noted("yardsticks", speech, "decode", first):
            found["yardsticks"] = yardsticks(model, rows, judge)
        broken = Broken(1)
        with noted("encoded", speech, "encode", first):
            encoded = encode_rows(model.processor, spoiled, ["speech", "text"], broken)
        found["encoded"] = [_ids(row) for row in encoded], broken.items
        broken = Broken(1)
        with noted("column", model.processor.codecs["text"], "encode", first):
            found["column"] = encode_column(model.processor.codecs["text"], [*texts, "ω"], broken), broken.items
        wanted = PseudoLabelsRecipe(task="speech->text", model="first", keep=0.6)
        with noted("labelled", model, "generate", first):
            task = parse_task("speech->text")
            labels = pseudo_labels.label(model, model, task, rows, wanted, DRAWN, Broken())  # type: ignore[arg-type]
        found["labelled"] = [_ids(row) for row in labels]
        batches = some_batches(model, ["speech->text", "text->speech"], AT_ONCE, encoded)
        with noted("losses", model, "forward", lambda *_: 1):
            found["losses"] = losses_on(model, batches)
        found["activity"] = _activity(model, batches)
        with noted("perplexity", model, "unimodal_loss", lambda _, rows: len(rows)):
            found["perplexity"] = perplexity(model, "speech", [row["speech"].ids for row in encoded], AT_ONCE)
    found["drawn after it"] = float(torch.rand(()))
    return found, {kind: sorted(pieces.items()) for kind, pieces in done.items()}


def fail_together() -> list[str]:
    """What a process hears of errors that only one of two meets."""
    heard = []
    for error in (ValueError("piece 1"), OSError("piece 1")):

        def work(number: int, error: Exception = error) -> int:
            if number == 1:
                raise error
            return number

        try:
            list(shared(range(4), work))
        except Exception as raised:
            heard.append(f"{type(raised).__name__}: {raised}")
    return heard


def _plain(score: Score) -> dict[str, Any]:
    values = [v if isinstance(v, str) else [round(float(x), 9) for x in v] for v in score.values]
    return {**score.summary(), "heard": score.hypotheses, "values": values}


def _ids(row: Any) -> dict[str, Any]:
    segments = row if isinstance(row, Document) else row.values()
    return {s.modality: [list(s.ids), s.value if isinstance(s.value, str) else None] for s in segments}
