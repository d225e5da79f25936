"""What a text decoder writes as itself: its bare backbone, without zips, by its own chat template where it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from zipper_lm.codecs.text import TextCodec


def has_chat_template(codec: TextCodec) -> bool:
    """Whether its tokenizer knows how a conversation is written."""
    return bool(getattr(codec.tokenizer, "chat_template", None))


def chat_prompt(codec: TextCodec, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation, up to where the assistant speaks.

    Args:
        codec: of a tokenizer with a chat template. messages: each with ``role`` and ``content``.

    Raises:
        ValueError: if the template does not take them, or there is none.
    """
    if not has_chat_template(codec):
        raise ValueError("the tokenizer has no chat template")
    try:
        told = codec.tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise ValueError(f"the tokenizer's chat template: {error}") from error
    return list(codec.tokenizer(str(told), add_special_tokens=False)["input_ids"])


@torch.no_grad()
def write_greedily(
    decoder: PreTrainedModel, codec: TextCodec, prompts: Sequence[Sequence[int]], tokens: int, size: int | None = None
) -> list[str]:
    """The likeliest continuation of each prompt, up to where the decoder ends it.

    Args:
        decoder: a backbone, in evaluation mode. codec: its tokenizer. prompts: ids; read together, padded on the left.
        tokens: at most so many. size: ids from here on are not written; `None` is all.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[codec.pad_id] * (longest - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    own: Any = getattr(decoder.generation_config, "eos_token_id", None)
    ends = {codec.eos_id, *(own if isinstance(own, list) else [] if own is None else [own])}
    model: Any = decoder  # transformers has its parts as optional
    total = int(model.get_output_embeddings().weight.shape[0])
    closed = None if size is None or size >= total else list(range(size, total))
    # Each said outright: what is not said here is taken from the checkpoint's own settings.
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=tokens,
        eos_token_id=sorted(ends),
        pad_token_id=codec.pad_id,
        bos_token_id=codec.bos_id,
        suppress_tokens=closed,
    )
    out: Any = model.generate(
        input_ids=ids.to(decoder.device), attention_mask=mask.to(decoder.device), generation_config=greedy
    )
    written = []
    for row in out[:, longest:].tolist():
        end = next((i for i, each in enumerate(row) if each in ends), len(row))
        written.append(row[:end])
    return [text.strip() for text in codec.decode(written)]
