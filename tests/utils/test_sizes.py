"""The config of a pre-trained model may come from anywhere: it is held against the files of weights beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_backbone
from transformers import AutoModel, HubertConfig, HubertModel

from zipper_lm.codecs.pretrained import ModelSource, open_model
from zipper_lm.fusion.backbones import load_backbone
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.utils.sizes import weight_files


@pytest.mark.parametrize("form", ["whole", "shards", "pickled"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 10**9}, "its config asks for [0-9]+ weights, the files beside it hold [0-9]+"),
        ({"intermediate_size": 10**9}, "its config asks for [0-9]+ weights, the files beside it hold [0-9]+"),
        ({"num_hidden_layers": 10**6}, "asks for more than [0-9]+ tensors"),
    ],
)
def test_sizes_that_are_not_there_are_refused(fields: dict[str, Any], message: str, form: str, tmp_path: Path) -> None:
    """What the files lack was made in random numbers before the lack was told: 10^9 ids took all memory, 10^6 layers
    took hours."""
    backbone = tiny_backbone("llama", 31, 2)
    if form == "pickled":
        backbone.config.save_pretrained(tmp_path)
        torch.save(backbone.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        backbone.save_pretrained(tmp_path, max_shard_size="5KB" if form == "shards" else "1GB")
    spec = TowerSpec(source=str(tmp_path))
    assert (len(weight_files(spec.source)) > 1) == (form == "shards")
    state = torch.get_rng_state()
    loaded = load_backbone(spec)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), backbone.parameters(), strict=True))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=f"tower .*: {message}"):
        load_backbone(spec)


def test_an_index_that_is_none_is_named(tmp_path: Path) -> None:
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path, max_shard_size="5KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match=r"weight_map must be a mapping"):
        load_backbone(TowerSpec(source=str(tmp_path)))


def test_a_model_inside_a_codec_is_held_against_its_files(tmp_path: Path) -> None:
    HubertModel(
        HubertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8],
            conv_kernel=[4], conv_stride=[2], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    open_model(AutoModel, ModelSource(source=str(tmp_path)))
    file = tmp_path / "config.json"
    for fields in ({"intermediate_size": 10**10}, {"num_hidden_layers": 10**6}):
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        with pytest.raises(ValueError, match=r"codec model \(AutoModel\) .*asks for"):
            open_model(AutoModel, ModelSource(source=str(tmp_path)))
