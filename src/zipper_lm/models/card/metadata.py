"""The head of a card, which the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCardData

from zipper_lm.models.card.records import Records, on_hub
from zipper_lm.utils.places import is_hub_id, public_name

if TYPE_CHECKING:
    from zipper_lm.generation.writer import Writer

_PIPELINES = {
    "speech->text": "automatic-speech-recognition",
    "text->speech": "text-to-speech",
    "image->text": "image-to-text",
    "text->image": "text-to-image",
}
"""The Hub's names of tasks (https://huggingface.co/tasks)."""


def metadata(model: Writer, name: str, records: Records) -> ModelCardData:
    """What the Hub reads: base models, data, licence, task, scores."""
    scores = list(_eval_results(records))
    data = str(records.run.get("data", {}).get("source", "")).partition(":")[0]
    license = common_license(records)
    other = re.fullmatch(r"other \((.+)\)", license or "")
    return ModelCardData(
        base_model=[s.source for s in model.config.tower_specs.values() if on_hub(s)] or None,
        datasets=[data] if is_hub_id(data) else None,
        library_name="zipper-lm",
        license="other" if other else license,
        license_name=other[1] if other else None,
        pipeline_tag=_pipeline(model, records),
        tags=["zipper", *model.names],
        model_name=name.rpartition("/")[2] if scores else None,
        eval_results=scores or None,
    )


def common_license(records: Records) -> str | None:
    """The one licence of all towers, if they have the same; transformers' Trainer names a base model's in that way."""
    license, *others = {spec.license for spec in records.specs.values()}
    several = license is not None and "," in license and not license.startswith("other (")
    return None if others or several else license


def _pipeline(model: Writer, records: Records) -> str | None:
    """The Hub's name of the one thing it does, or of doing several; `None` for what the Hub has no name for."""
    done = {str(t) for t in records.tasks} or {f"{source}->{reader}" for reader, source in model.layer_pairs}
    return _PIPELINES.get(*done) if len(done) == 1 else "any-to-any"


def _eval_results(records: Records) -> Iterator[EvalResult]:
    """Scores on whole splits, as the model is stored; those on a part of one, or in another dtype, are in the table
    only."""
    for entry in records.results:
        if entry.get("where") or entry.get("limit") or records.other_dtype(entry) or "wer" not in entry:
            continue
        data = public_name(entry["data"])
        for metric in ("wer", "cer"):
            yield EvalResult(
                task_type=_PIPELINES.get(entry["template"], "other"),
                task_name=entry["template"],
                dataset_type=data,
                dataset_name=data,
                dataset_split=entry["split"],
                metric_type=metric,
                metric_name=f"{metric.upper()} (%)" + (", by an independent judge" if "judge" in entry else ""),
                metric_value=entry[metric],
            )
