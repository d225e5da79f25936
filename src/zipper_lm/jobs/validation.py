"""How a fusion is scored in training: every task, by generation, on the validation split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from zipper_lm.data.document import Document
from zipper_lm.data.prepared import is_prepared, open_prepared
from zipper_lm.data.tasks import parse_task
from zipper_lm.evaluation.judges import Judge, can_be_judged, judge_told, suits
from zipper_lm.evaluation.scoring import counts_tokens, has_words, score_task
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.failures import some_batches
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import DataRecipe, FuseRecipe
from zipper_lm.jobs.signatures import losses_on
from zipper_lm.training.trainer import randomness_kept
from zipper_lm.utils.processes import made_by_main


class Scorer:
    """Scores a recipe's tasks, or those that it names, on validation rows; ``wer`` is their mean. Without a task that
    can be scored, the mean ``loss`` on the validation documents stands in."""

    def __init__(self, recipe: FuseRecipe, model: Writer, rows: Sequence[Any]) -> None:
        assert model.processor is not None
        self.recipe, self.all_rows = recipe, rows
        self.rows = [r for r in rows if not isinstance(r, Document)]
        self.wordless = 0
        wanted = recipe.tasks if recipe.scored is None else recipe.scored
        tasks = {t: parse_task(t) for t, weight in recipe.tasks.items() if weight > 0 and t in wanted}
        ends = {t: task.targets[-1] for t, task in tasks.items() if task.given}
        codecs = model.processor.codecs
        by_token = {end for end in ends.values() if counts_tokens(end, codecs.get(end))}
        by_text = {end for end in ends.values() if end == "text" or (end in codecs and can_be_judged(codecs[end]))}
        if not all("text" in row for row in self.rows):
            by_text = set()
        if by_text:  # an error rate is of words: one row without any would end the run after its last step
            worded = [row for row in self.rows if has_words(row)]
            self.wordless, self.rows = len(self.rows) - len(worded), worded
        self.tasks = [t for t, end in ends.items() if end in by_token | by_text] if self.rows else []
        self.judged = sorted({ends[t] for t in self.tasks} - by_token - {"text"})
        self.judges: dict[str, Judge] = {}
        self.ends = ends

    def find_judges(self, model: Writer, given: Judge | None, console: Console) -> None:
        """Take or fit what the tasks need; a task without its judge is not scored.

        Args:
            model: what will be scored. given: the recipe's own judge. console: where it is told.
        """
        if self.wordless:
            told = f"{self.wordless} validation rows have no words in their text, so they are not scored"
            console.print(f"[yellow]{told}[/yellow]")
        for modality in self.judged:
            try:
                self.judges[modality] = _judge_of(self.recipe, modality, model, given, console)
            except ValueError as error:
                console.print(f"[yellow]no judge of {modality}, so it is not scored:[/yellow] {error}")
                self.tasks = [t for t in self.tasks if self.ends[t] != modality]

    def __call__(self, model: Writer) -> dict[str, float]:
        if not self.tasks:
            losses = losses_on(model, some_batches(self.recipe, model, self.all_rows))
            return {"loss": float(np.mean(list(losses.values())))} | {f"loss/{n}": v for n, v in losses.items()}
        metrics: dict[str, float] = {}
        for template in self.tasks:
            judge = self.judges.get(self.ends[template])
            score = score_task(model, self.rows, template, judge=judge, settings=self.recipe.generation)
            metrics[f"wer/{template}"], metrics[f"cer/{template}"] = score.wer, score.cer
        metrics["wer"] = float(np.mean([v for k, v in metrics.items() if k.startswith("wer/")]))
        return metrics


def _judge_of(recipe: FuseRecipe, modality: str, model: Writer, given: Judge | None, console: Console) -> Judge:
    assert model.processor is not None
    if given is not None and suits(given, model.processor.codecs[modality]):
        return given
    return made_by_main(partial(judge_of, recipe.data, modality, console))


def judge_of(data: DataRecipe, modality: str, console: Console) -> Judge:
    """The judge of a recipe's data, fitted on its originals or from the cache.

    Args:
        data: raw, or prepared from raw data that is still there. modality: it is to judge. console: where a bar is.

    Raises:
        ValueError: as `judge_for`, or for a stream.
    """
    if is_prepared(data.source):  # it holds ids, a judge hears the originals
        data = build(DataRecipe, open_prepared(data.source).description["data"])
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
