"""How a fusion is scored in training: every task, by generation, on the validation split."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from zipper_lm.data.document import Document, Segment
from zipper_lm.data.tasks import parse_task
from zipper_lm.evaluation.best_of import sampled
from zipper_lm.evaluation.judges import Judge, can_be_judged, judge_told, suits
from zipper_lm.evaluation.scoring import counts_tokens, scorable, score_task, told_unscored
from zipper_lm.evaluation.word_error_rate import PLAIN
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.failures import losses_on, some_batches
from zipper_lm.jobs.recipes.schema import DataRecipe
from zipper_lm.utils.processes import made_by_main
from zipper_lm.utils.progress import warn
from zipper_lm.utils.randomness import randomness_kept


class Scorer:
    """Scores tasks on validation rows; ``wer`` is their mean. Without a task that can be scored, the mean ``loss`` on
    the validation documents stands in.

    Args:
        model: that will be scored. rows: encoded. trained: templates of the tasks that have a weight.
        scored: those that are scored; `None` is all. settings: of generation, by modality.
        batch_size: documents that are read together, for the loss. best_of, best_by,
            normaliser: as of `score_task`.
    """

    def __init__(
        self,
        model: Writer,
        rows: Sequence[Any],
        trained: Sequence[str],
        scored: Collection[str] | None = None,
        *,
        settings: Mapping[str, Any],
        batch_size: int,
        best_of: int = 1,
        best_by: str = "score",
        normaliser: str = PLAIN,
    ) -> None:
        assert model.processor is not None
        self.trained, self.settings, self.batch_size, self.all_rows = trained, settings, batch_size, rows
        self.best: dict[str, Any] = {"best_of": best_of, "best_by": best_by, "normaliser": normaliser}
        self.rows = [r for r in rows if not isinstance(r, Document)]
        self.wordless = 0
        tasks = {t: parse_task(t) for t in trained if scored is None or t in scored}
        ends = {t: task.targets[-1] for t, task in tasks.items() if task.given}
        codecs = model.processor.codecs
        by_token = {end for end in ends.values() if counts_tokens(end, codecs.get(end))}
        by_text = {end for end in ends.values() if end == "text" or (end in codecs and can_be_judged(codecs[end]))}
        if not all("text" in row for row in self.rows):
            by_text = set()
        worded = self.rows  # an error rate is of words: one row without any would end the run after its last step
        for end in sorted(by_token | by_text):
            worded = scorable(worded, end, codecs.get(end), normaliser)
        self.wordless, self.rows = len(self.rows) - len(worded), worded
        self.tasks = [t for t, end in ends.items() if end in by_token | by_text] if self.rows else []
        self.judged = sorted({ends[t] for t in self.tasks} - by_token - {"text"})
        self.judges: dict[str, Judge] = {}
        self.ends = ends

    def find_judges(
        self, model: Writer, given: Judge | None, fit: Callable[[str, Console], Judge], console: Console
    ) -> None:
        """Take or fit what the tasks need; a task without its judge is not scored.

        Args:
            model: what will be scored. given: the recipe's own judge. fit: makes one of a modality, or raises
                `ValueError` if that cannot be. console: where it is told.
        """
        assert model.processor is not None
        if self.wordless:
            console.print(told_unscored(self.wordless, "validation rows"), style="yellow")
        for modality in self.judged:
            try:
                if given is not None and suits(given, model.processor.codecs[modality]):
                    self.judges[modality] = given
                else:
                    self.judges[modality] = made_by_main(partial(fit, modality, console))
            except ValueError as error:
                warn(console, f"no judge of {modality}, so it is not scored", error)
                self.tasks = [t for t in self.tasks if self.ends[t] != modality]

    def __call__(self, model: Writer) -> dict[str, float]:
        if not self.tasks:
            losses = losses_on(model, some_batches(model, self.trained, self.batch_size, self.all_rows))
            return {"loss": float(np.mean(list(losses.values())))} | {f"loss/{n}": v for n, v in losses.items()}
        metrics: dict[str, float] = {}
        for template in self.tasks:
            judge = self.judges.get(self.ends[template])
            score = score_task(model, self.rows, template, judge=judge, settings=self.settings, **self.best)
            metrics[f"wer/{template}"], metrics[f"cer/{template}"] = score.wer, score.cer
        metrics["wer"] = float(np.mean([v for k, v in metrics.items() if k.startswith("wer/")]))
        return metrics


_TRIED_TOKENS = 4
_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")


def try_settings(
    model: Writer, rows: Sequence[Any], settings: Mapping[str, Mapping[str, Any]], scorer: Scorer | None = None
) -> None:
    """Write a few tokens with each modality's settings, and with those of the samples that are scored: what only
    `generate()` finds wrong would be met in the first evaluation, by default after the last step. No generator's state
    changes.

    Args:
        model: where it will be scored. rows: encoded; the beginnings of the first two are read. settings: by modality.
        scorer: that will score, if any.

    Raises:
        ValueError: naming the modality.
    """
    tries = [(f"generation.{name}", name, given) for name, given in settings.items()]
    if scorer is not None and (samples := scorer.best["best_of"]) > 1:
        ends = sorted({scorer.ends[task] for task in scorer.tasks})
        by = scorer.best["best_by"]
        several = sampled(settings, ends, samples, None if by == "judge" else by)
        tries += [(f"generation.{name} with best_of={samples}", name, several[name]) for name in ends]
    training = model.training
    model.eval()
    try:
        for where, name, given in tries:
            short = {key: value for key, value in given.items() if key not in _LENGTHS}
            documents = [_beginning(row, name, model.names) for row in rows[:2]]
            try:
                with randomness_kept():
                    short_of = {name: short | {"max_new_tokens": _TRIED_TOKENS}}
                    model.generate(documents, [name], settings=short_of, decode=False)
            except Exception as error:  # generate() raises whatever its parts do
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise ValueError(f"{where}: tried before training: {kind}{error}") from error
    finally:
        model.train(training)


def _beginning(row: Any, name: str, towers: Sequence[str]) -> Document:
    """A few tokens of each other tower's segments in a row."""
    segments = row if isinstance(row, Document) else row.values()
    given = [s for s in segments if isinstance(s, Segment) and s.modality in towers and s.modality != name]
    return Document([Segment(s.modality, ids=s.ids[:32]) for s in given if s.ids])


def judge_of(data: DataRecipe, modality: str, console: Console) -> Judge:
    """The judge of a recipe's data, fitted on it or from the cache.

    Args:
        data: the originals: what is prepared holds ids (`DataSource.originals`). modality: it is to judge.
        console: where a bar is.

    Raises:
        ValueError: as `judge_for`, or for a stream.
    """
    if data.streaming:
        raise ValueError("a stream is not fetched as a whole to fit one on; name one (judge)")
    with randomness_kept():
        return judge_told(
            console,
            data.source,
            data.columns,
            split=data.train,
            modality=modality,
            revision=data.revision,
            broken_limit=data.broken_limit,
        )
