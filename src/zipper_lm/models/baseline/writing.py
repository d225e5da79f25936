"""How a single decoder writes: the backbone's own `generate()`, held to the ids of the modality whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from zipper_lm.codecs.codec import Codec
from zipper_lm.data.collation import collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.limits import keep_within, position_limit
from zipper_lm.generation.candidates import Written, logprobs_at, samples_of
from zipper_lm.generation.logits import StopStrings, StopThreshold
from zipper_lm.generation.segment import Stop, StreamedToken, TokenStreamer
from zipper_lm.generation.settings import STOP_THRESHOLD, generation_config
from zipper_lm.models.baseline.vocabulary import Modality, join, prompts


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


@torch.no_grad()
def write(
    backbone: PreTrainedModel,
    vocabulary: Sequence[Modality],
    documents: Sequence[Document],
    name: str,
    settings: Mapping[str, Any] | GenerationConfig | None,
    codec: Codec | None = None,
    on_token: Callable[[StreamedToken], bool] | None = None,
    stop: Stop | None = None,
    cached: bool = True,
) -> list[list[Written]]:
    """One segment in every row, or several candidates for it.

    ``guidance_scale`` compares with the decoder that has read nothing but BOS (Zipper's: with the tower alone).

    Args:
        backbone: the decoder. vocabulary: the modalities in its order. documents: encoded; not changed. name: of the
            modality that is written. settings: as in `zipper_lm.generation.generate.generate`. codec: of the modality,
            which finds `stop_strings`. on_token: told of every token of a single document. stop: ends the segment as
            soon as it is set. cached: whether the backbone goes on rightly from a cache of its own.

    Returns:
        per row, as many candidates as settings ask for, their ids counted within the modality.
    """
    (modality,) = (m for m in vocabulary if m.name == name)
    ids, mask = (x.to(backbone.device) for x in prompts(documents, name, vocabulary))
    given = generation_config(name, settings, modality.specials)
    samples, stop = samples_of(given), stop or Stop()
    stops = StopStrings.taken_from(given, name, codec, ids.shape[1], modality.offset)
    if (limit := position_limit(backbone)) is not None:
        keep_within("the single decoder", limit, mask, given)
    last = vocabulary[-1]
    only = OnlyIds(modality, last.offset + last.size)
    eos = modality.offset + modality.eos
    processors: list[LogitsProcessor] = [only]
    if (threshold := getattr(given, STOP_THRESHOLD, None)) is not None:
        processors.append(StopThreshold(threshold, eos))
    if (scale := given.guidance_scale) not in (None, 1):
        given.guidance_scale = None
        processors += [UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, backbone), only]
    _move_ids(given, modality.offset)
    # `None` is not as the config says: Trainer leaves False there.
    given.use_cache = cached and given.use_cache is not False
    given.bos_token_id, given.eos_token_id = modality.offset + modality.bos, eos
    given.pad_token_id = modality.offset + modality.pad
    given.output_scores = None  # log-probabilities are worked out afterwards, by the model's own distribution
    streamer = None
    if on_token is not None:
        streamer = TokenStreamer(name, len(documents[0]), eos, on_token, stop, modality.offset)
    output = backbone.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=given,
        synced_gpus=False,  # as in `write_segment`
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=[stop, *stops],
        streamer=streamer,
    )
    rows = (output if isinstance(output, Tensor) else output.sequences)[:, ids.shape[1] :].tolist()
    written = [Written.until(eos, row, modality.offset) for row in rows]
    return [written[i : i + samples] for i in range(0, len(written), samples)]


@torch.no_grad()
def score(
    backbone: PreTrainedModel,
    vocabulary: Sequence[Modality],
    documents: Sequence[Document],
    name: str,
    samples: Sequence[Written],
) -> list[list[float]]:
    """Log-probabilities of one sample of every row, token by token, over the whole vocabulary.

    Args:
        backbone, vocabulary, documents, name: as of `write`. samples: what it wrote.
    """
    given = [[replace(s, target=False) for s in d] for d in documents]
    new = [Segment(name, ids=sample.ids, target=True) for sample in samples]
    specials = {m.name: m.specials for m in vocabulary}
    joined = join(collate([Document([*d, s]) for d, s in zip(given, new)], specials), vocabulary)
    ids, mask, labels = (x.to(backbone.device) for x in (joined.input_ids, joined.attention_mask, joined.labels))
    logits = backbone(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [row[: len(s.ids) + s.ended] for row, s in zip(logprobs_at(logits, labels[:, 1:]), samples)]


def _move_ids(given: GenerationConfig, offset: int) -> None:
    """Settings name ids within the modality, the decoder knows them by their place in the whole vocabulary."""
    for field in ("suppress_tokens", "begin_suppress_tokens"):
        if (ids := getattr(given, field)) is not None:
            setattr(given, field, [offset + i for i in ids])
    if given.bad_words_ids is not None:
        given.bad_words_ids = [[offset + i for i in word] for word in given.bad_words_ids]
    if (last := given.forced_eos_token_id) is not None:
        given.forced_eos_token_id = offset + last if isinstance(last, int) else [offset + i for i in last]
    if (bias := given.sequence_bias) is not None:
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        given.sequence_bias = {tuple(offset + i for i in ids): value for ids, value in pairs}
