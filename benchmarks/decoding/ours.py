"""Writers that are this library's: the plain path, the single decoder, and the loop that one would write by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from decoding.sizes import BOS, EOS, PAD, Size
from torch import nn

from zipper_lm import Document, Engine, Segment, ZipperModel, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.models.baseline.expand import expand

Write = Callable[[int], list[list[int]]]
"""Reads what is given and writes so many ids in every row, no more and no less; returns them."""


class Ids:
    """A codec that only says how many ids there are."""

    kind, rate = "units", 25.0
    bos_id, eos_id, pad_id = BOS, EOS, PAD

    def __init__(self, count: int) -> None:
        self.vocab_size = count

    def decode(self, ids: Any) -> list[Any]:
        """Nothing is heard here."""
        return [None for _ in ids]


def fused(size: Size, feed_forward: bool = False) -> ZipperModel:
    """Two towers; what starts at zero is random, so that what is read counts."""
    backbones = {"text": size.text.make(size.dtype), "speech": size.speech.make(size.dtype)}
    model = ZipperModel.fuse(
        backbones,
        codecs={name: Ids(tower.ids) for name, tower in (("text", size.text), ("speech", size.speech))},
        zips=ZipSpec(layers=size.zips, feed_forward=feed_forward),
    )
    torch.manual_seed(1)
    for module in (model.zips, model.input_projections):
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model.to(device=backbones["text"].device, dtype=size.dtype).eval()


def exactly(tokens: int, **more: Any) -> dict[str, Any]:
    """Settings for so many tokens of text."""
    return {"text": {"max_new_tokens": tokens, "min_new_tokens": tokens, **more}}


def plain(model: ZipperModel, given: list[Document], **more: Any) -> Write:
    """`model.generate`; `more`: settings."""
    return lambda tokens: _written(model.generate(given, ["text"], settings=exactly(tokens, **more), decode=False))


def engine(model: ZipperModel, given: list[Document], *, compiled: bool, weights: Any = None, **more: Any) -> Write:
    """The same by an engine with a row for each document (two with guidance); `more`: settings."""
    rows = len(given) * (2 if "guidance_scale" in more else 1)
    made = Engine(model, slots=rows, compile=compiled, weights=weights)
    return lambda tokens: _written(
        model.generate(given, ["text"], settings=exactly(tokens, **more), decode=False, engine=made)
    )


def single_decoder(size: Size, given: list[Document]) -> Write:
    """One decoder with an expanded vocabulary and the same text backbone, which reads the speech as a prefix."""
    codecs: Any = {"text": Ids(size.text.ids), "speech": Ids(size.speech.ids)}
    model = expand("text", size.text.make(size.dtype), codecs).eval()
    return lambda tokens: _written(model.generate(given, ["text"], settings=exactly(tokens), decode=False))


def two_towers(model: ZipperModel, given: list[Document]) -> Write:
    """Both towers read all of it for each token, and nothing is kept: greedy, without an end."""

    @torch.no_grad()
    def write(tokens: int) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in given]
        unwritten = [BOS, EOS, PAD]
        for _ in range(tokens):
            documents = [Document([*d, Segment("text", ids=row)]) for d, row in zip(given, rows)]
            batch = collate(documents, model.specials, open_last=True)
            logits = model(batch, return_loss=False).logits["text"][:, -1]  # all rows are of one length
            logits[:, unwritten] = -torch.inf
            for row, token in zip(rows, logits.argmax(-1).tolist()):
                row.append(token)
        return rows

    return write


def _written(documents: Any) -> list[list[int]]:
    return [document[-1].ids for document in documents]
