"""What is decoded: the same text tower, as many layers of cross-attention and as many tokens of memory for everyone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from common.turns import device
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm import Document, Segment

BOS, EOS, PAD = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A Llama: ids, width, inner width, layers, heads, heads of keys and values."""

    ids: int
    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    tied: bool = False

    def settings(self) -> dict[str, Any]:
        """As transformers calls them."""
        return {
            "vocab_size": self.ids,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tied,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }

    def make(self, dtype: torch.dtype) -> LlamaForCausalLM:
        """One with random weights, the same every time."""
        torch.manual_seed(0)
        with torch.device(device()):
            made = LlamaForCausalLM(LlamaConfig(num_hidden_layers=self.layers, **self.settings()))
        return made.to(dtype).eval()


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Args:
        text, speech: the tower that writes, and the one that is read. zips: layers of cross-attention.
        memory: tokens that are read. tokens: written in a turn. dtype: of all weights.
    """

    text: Tower
    speech: Tower
    zips: int
    memory: int
    tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def every(self) -> int:
        """A layer of cross-attention for so many layers of the text tower."""
        return self.text.layers // self.zips

    def documents(self, batch: int) -> list[Document]:
        """Random speech, `memory` tokens each."""
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(3, self.speech.ids, (batch, self.memory), generator=generator).tolist()
        return [Document([Segment("speech", ids=row)]) for row in rows]


_SPEECH = Tower(ids=517, width=192, inner=384, layers=6, heads=4, key_heads=4)
SIZES = {
    "tiny": Size(
        text=Tower(ids=60, width=32, inner=64, layers=4, heads=4, key_heads=2),
        speech=Tower(ids=40, width=32, inner=64, layers=2, heads=4, key_heads=4),
        zips=2,
        memory=12,
        tokens=4,
    ),
    "digits": Size(  # the towers of examples/spoken-digits.yaml, and the lengths of its sounds
        text=Tower(ids=64, width=128, inner=384, layers=4, heads=4, key_heads=4),
        speech=Tower(ids=517, width=192, inner=576, layers=6, heads=4, key_heads=4),
        zips=4,
        memory=100,
        tokens=32,
    ),
    "small": Size(
        text=Tower(ids=2000, width=256, inner=512, layers=8, heads=4, key_heads=2),
        speech=_SPEECH,
        zips=4,
        memory=250,
        tokens=64,
    ),
    "135m": Size(  # the shape of SmolLM2-135M
        text=Tower(ids=49152, width=576, inner=1536, layers=30, heads=9, key_heads=3, tied=True),
        speech=_SPEECH,
        zips=5,
        memory=250,
        tokens=17,
    ),
    "1b": Size(
        text=Tower(ids=32000, width=2048, inner=6144, layers=16, heads=16, key_heads=16),
        speech=Tower(ids=515, width=1024, inner=3072, layers=24, heads=8, key_heads=8),
        zips=4,
        memory=250,
        tokens=65,
        dtype=torch.bfloat16,
    ),
}
