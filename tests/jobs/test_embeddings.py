"""Embeddings that begin at the codebook: like units are alike, and kinds without vectors are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zipper_lm.codecs.color_clusters import ColorClusters
from zipper_lm.codecs.layout import IdLayout
from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.jobs.embeddings import SIZE, begin_at_codebook
from zipper_lm.jobs.pretrain import make_backbone, pretrain
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import PretrainRecipe


def noise(count: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.normal(0, 0.1, 16000).astype(np.float32) for _ in range(count)]


def backbone(codec: Any, width: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return make_backbone(sizes, codec)


def test_distances_are_those_of_the_codebook() -> None:
    """Sixteen centroids span fifteen dimensions at most: nothing of them is lost in as many embeddings' numbers."""
    codec = SpeechCodec.fit(noise(2), units=16)
    tower = backbone(codec, 16)
    was = tower.get_input_embeddings().weight.clone()
    begin_at_codebook(tower, codec)
    table = tower.get_input_embeddings().weight.detach()
    wanted, found = torch.pdist(codec.centroids), torch.pdist(table[:16])
    torch.testing.assert_close(found / found.mean(), wanted / wanted.mean(), rtol=1e-4, atol=1e-4)
    assert float(table[:16].square().mean().sqrt()) == pytest.approx(SIZE, rel=1e-4)
    assert torch.equal(table[16:], was[16:]), "BOS, EOS and PAD stand for no sound"


def test_units_lie_where_the_layout_says_and_narrow_vectors_leave_the_rest() -> None:
    colors = np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)
    codec = ColorClusters(colors, layout=IdLayout(units=8, offset=2, bos=0, eos=1, pad=1))
    tower = backbone(codec, 16)
    was = tower.get_input_embeddings().weight.clone()
    begin_at_codebook(tower, codec)
    table = tower.get_input_embeddings().weight.detach()
    changed = table != was
    assert changed[2:10, :3].all()
    assert not changed[:2].any()
    assert not changed[:, 3:].any()
    centred = torch.from_numpy(colors - colors.mean(0))
    ratio = torch.pdist(table[2:10, :3]) / torch.pdist(centred)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=1e-4)


def test_a_head_that_is_the_same_table_keeps_its_size() -> None:
    """A GPT-2's logits had a spread of eight at its start, and a loss to match."""
    codec = SpeechCodec.fit(noise(2), units=16)
    tower = make_backbone({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, codec)
    embeddings: Any = tower.get_input_embeddings()
    size = embeddings.weight[:16].square().mean().sqrt().item()
    begin_at_codebook(tower, codec)
    assert embeddings.weight[:16].square().mean().sqrt().item() == pytest.approx(size, rel=1e-3)
    wanted, found = torch.pdist(codec.centroids), torch.pdist(embeddings.weight[:16].detach())
    torch.testing.assert_close(found / found.mean(), wanted / wanted.mean(), rtol=1e-3, atol=1e-3)


def test_ids_that_stand_for_no_vector_are_refused_before_anything_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = TextCodec.train(["one two"], vocab_size=16)
    with pytest.raises(ValueError, match="'text' stand for no vectors"):
        begin_at_codebook(backbone(codec, 8), codec)
    monkeypatch.setattr(TextCodec, "make", lambda *_: pytest.fail("it was fitted"))
    fields = {"data": str(tmp_path / "none"), "modality": "text", "output": str(tmp_path / "t")}
    with pytest.raises(ValueError, match=r"embeddings='codebook': .* 'text'"):
        pretrain(build(PretrainRecipe, fields | {"embeddings": "codebook"}))
    with pytest.raises(ValueError, match="embeddings"):
        build(PretrainRecipe, fields | {"embeddings": "codebooks"})
