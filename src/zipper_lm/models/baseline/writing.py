"""How a single decoder writes: the backbone's own `generate()`, held to the ids of the modality whose turn it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.limits import keep_within, position_limit
from zipper_lm.generation.ending import StopThreshold
from zipper_lm.generation.generate import Schedule, Settings, checked_schedule, decode_written, encode_given
from zipper_lm.generation.segment import STOP_THRESHOLD, generation_config
from zipper_lm.models.baseline.vocabulary import Modality, prompts

if TYPE_CHECKING:
    from zipper_lm.models.baseline.single_decoder import SingleDecoder


class OnlyIds(LogitsProcessor):
    """Minus infinity for every id that the modality cannot write.

    Args:
        modality: whose ids may be written: its content and EOS. size: of the whole vocabulary.
    """

    def __init__(self, modality: Modality, size: int) -> None:
        self.forbidden = torch.ones(size, dtype=torch.bool)
        self.forbidden[modality.offset : modality.offset + modality.size] = False
        for special in {modality.bos, modality.pad} - {modality.eos}:
            self.forbidden[modality.offset + special] = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` ``[batch, vocab]``."""
        return scores.masked_fill(self.forbidden.to(scores.device), float("-inf"))


def generate(
    model: SingleDecoder,
    documents: Sequence[Document],
    schedule: Schedule,
    *,
    settings: Settings | None = None,
    decode: bool = True,
) -> list[Document]:
    """Write the next segments of documents; as `zipper_lm.generation.generate.generate`, with the same settings.

    Raises:
        ValueError: for an unknown modality in documents, schedule or settings, or ``schedule="auto"``: nothing here
            learned who speaks next.
    """
    chosen = {name: generation_config(name, given) for name, given in (settings or {}).items()}
    entries = checked_schedule(model, schedule, chosen)
    if entries is None:
        raise ValueError('schedule "auto": a single decoder does not say who speaks next; name the modalities')
    if not documents:
        return []
    written = encode_given(model, documents)
    for entry in entries:
        if isinstance(entry, Segment):
            for document in written:
                document.segments.append(Segment(entry.modality, entry.value, list(entry.ids or [])))
        else:
            for document, ids in zip(written, write(model, written, entry, chosen.get(entry))):
                document.segments.append(Segment(entry, ids=ids))
    if decode and model.processor is not None:
        decode_written(model, documents, written)
    return written


@torch.no_grad()
def write(model: SingleDecoder, documents: Sequence[Document], name: str, settings: Any) -> list[list[int]]:
    """One segment in every row: content ids of `name`, counted within the modality.

    ``guidance_scale`` compares with the decoder that has read nothing but BOS (Zipper's: with the tower alone).
    """
    modality, backbone = model.modality(name), model.backbone
    ids, mask = (x.to(backbone.device) for x in prompts(documents, name, model.modalities))
    given = generation_config(name, settings)
    if (limit := position_limit(backbone)) is not None:
        keep_within("the single decoder", limit, mask, given)
    last = model.modalities[-1]
    only = OnlyIds(modality, last.offset + last.size)
    eos = modality.offset + modality.eos
    processors: list[LogitsProcessor] = [only]
    if (threshold := getattr(given, STOP_THRESHOLD, None)) is not None:
        processors.append(StopThreshold(threshold, eos))
    if (scale := given.guidance_scale) not in (None, 1):
        given.guidance_scale = None
        processors += [UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, backbone), only]
    given.suppress_tokens = [modality.offset + i for i in given.suppress_tokens or ()] or None
    given.use_cache = True if given.use_cache is None else given.use_cache  # Trainer leaves False in the config
    given.bos_token_id, given.eos_token_id = modality.offset + modality.bos, eos
    given.pad_token_id = modality.offset + modality.pad
    output = backbone.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, generation_config=given, logits_processor=LogitsProcessorList(processors)
    )
    rows = (output if isinstance(output, Tensor) else output.sequences)[:, ids.shape[1] :].tolist()
    return [[i - modality.offset for i in (row[: row.index(eos)] if eos in row else row)] for row in rows]
