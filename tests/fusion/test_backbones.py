"""Loading backbones from checkpoints of all shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_backbone
from transformers import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    LlamaForCausalLM,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)
from transformers.models.encodec import EncodecConfig

from zipper_lm import Document, Segment, ZipperModel, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.fusion import backbones
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.utils.tensors import weights_hash

# Checkpoints in which the backbone is a part of something larger


def wrapped(folder: Path, vocab: int = 31) -> Path:
    """A checkpoint as SlamKit writes it: a class that transformers does not know, around a decoder called ``lm``."""
    inner = tiny_backbone("qwen3", vocab)
    inner.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    whole = {"model_type": "speech_language_model", "architectures": ["UnitLM"], "base_config": config}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"lm.{k}": v for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_backbone_under_a_prefix_is_loaded_whole(tmp_path: Path) -> None:
    spec = TowerSpec(source=str(wrapped(tmp_path)), prefix="lm.", config_key="base_config")
    loaded = backbones.load_backbone(spec)
    assert type(loaded).__name__ == "Qwen3ForCausalLM"
    assert weights_hash(loaded) == weights_hash(tiny_backbone("qwen3", 31))


def test_tensors_that_a_checkpoint_lacks_are_no_random_numbers(tmp_path: Path) -> None:
    """transformers fills what it does not find with random numbers and a warning: a frozen tower of noise."""
    spec = TowerSpec(source=str(wrapped(tmp_path)), prefix="model.", config_key="base_config")
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of Qwen3ForCausalLM.*'lm\..*prefix"):
        backbones.load_backbone(spec)


def test_what_is_not_in_the_config_is_named(tmp_path: Path) -> None:
    source = str(wrapped(tmp_path))
    with pytest.raises(ValueError, match=r"no part 'lm_config'; it has \['base_config'\]"):
        backbones.load_backbone(TowerSpec(source=source, config_key="lm_config"))
    with pytest.raises(ValueError, match=r"config names \['no_such_field'\], which Qwen3Config does not have"):
        backbones.load_backbone(TowerSpec(source=source, config_key="base_config", config={"no_such_field": 1}))


def test_a_zipped_model_finds_such_a_backbone_again(tmp_path: Path) -> None:
    source = wrapped(tmp_path / "slam")
    spec = TowerSpec(source=str(source), prefix="lm.", config_key="base_config")
    tiny_backbone("llama", 31).save_pretrained(tmp_path / "text")
    model = ZipperModel.fuse({"text": tmp_path / "text", "speech": spec})
    model.save_pretrained(tmp_path / "model")
    again = ZipperModel.from_pretrained(tmp_path / "model")
    documents = [Document([Segment("text", ids=[5, 6]), Segment("speech", ids=[7, 8, 9], target=True)])]
    batch = collate(documents, model.specials)
    assert torch.equal(model(batch).logits["speech"], again(batch).logits["speech"])
    model.save_pretrained(tmp_path / "bundle", bundle_towers=True)  # a bundled tower stands alone: no prefix there
    alone = ZipperModel.from_pretrained(tmp_path / "bundle")
    assert torch.equal(model(batch).logits["speech"], alone(batch).logits["speech"])


def test_the_decoder_of_musicgen_with_its_first_codebook(tmp_path: Path) -> None:
    """MusicGen's decoder reads four codebooks at once; as a tower it is loaded with the first one's weights alone."""
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 24, "vocab_size": 20}
    decoder = MusicgenDecoderConfig(**size, num_codebooks=4, pad_token_id=20, bos_token_id=20)
    text = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=11)
    sound = EncodecConfig(num_filters=4, hidden_size=8, codebook_size=16, codebook_dim=8, upsampling_ratios=[2])
    torch.manual_seed(0)
    config = MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=sound.to_dict(), decoder=decoder.to_dict())
    whole = MusicgenForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    part = {"prefix": "decoder.", "config_key": "decoder", "architecture": "MusicgenForCausalLM"}
    spec = TowerSpec(source=str(tmp_path), config={"num_codebooks": 1}, **part)
    tower = backbones.load_backbone(spec)
    assert torch.equal(tower.lm_heads[0].weight, whole.decoder.lm_heads[0].weight)
    assert tower(input_ids=torch.tensor([[20, 3, 4]])).logits.shape == (1, 3, 20)


# A tower whose head lacks the one special id


def with_imagegpt(tmp_path: Path) -> ZipperModel:
    """ImageGPT reads one id more (the start of a picture) than it writes."""
    torch.manual_seed(0)
    size = {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 64, "vocab_size": 17, "initializer_range": 0.3}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 16)
    image = ImageGPTForCausalImageModeling(ImageGPTConfig(**size, **special))
    image.save_pretrained(tmp_path / "image")
    tiny_backbone("llama", 31).save_pretrained(tmp_path / "text")
    zips = ZipSpec(layers=2, gate_start=0.5)
    return ZipperModel.fuse(
        {"text": tmp_path / "text", "image": tmp_path / "image"}, zips=zips, train={"image": "full"}
    )


def test_an_end_that_cannot_be_written_is_no_target(tmp_path: Path) -> None:
    model = with_imagegpt(tmp_path)
    assert (model.tower("image").vocab_size, model.tower("image").head_size) == (17, 16)
    documents = [Document([Segment("text", ids=[5, 6]), Segment("image", ids=[7, 8, 9], target=True)])]
    output = model(collate(documents, model.specials))
    output.loss.backward()
    # Three targets, the pixels: the end is none. So says the same sum by hand.
    by_hand = torch.log_softmax(output.logits["image"][0, :3], -1)[torch.arange(3), torch.tensor([7, 8, 9])]
    assert torch.allclose(output.losses["image"], -by_hand.mean())
    assert model.eval().requires_grad_(False).unimodal_loss("image", [[7, 8, 9]])[1] == 3


def test_a_picture_ends_after_its_last_pixel(tmp_path: Path) -> None:
    """Nothing says that a picture ends, so ``max_new_tokens`` does. The next segment goes on from it."""
    model = with_imagegpt(tmp_path)
    settings = {"image": {"max_new_tokens": 9}, "text": {"max_new_tokens": 4}}
    said = model.generate([Document([Segment("text", ids=[5, 6])])], ["image", "text"], settings=settings)[0]
    assert len(said[1].ids) == 9
    assert max(said[1].ids) < 16
    assert said[2].modality == "text"


def test_a_threshold_for_an_end_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    settings = {"image": {"max_new_tokens": 9, "stop_threshold": 0.5}}
    with pytest.raises(ValueError, match=r"stop_threshold.*id 16.*0 to 15"):
        with_imagegpt(tmp_path).generate([Document([Segment("text", ids=[5])])], ["image"], settings=settings)


# Blank ones, for tensors that are put in next


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2-tied", "qwen3", "gemma2", "mamba", "lfm2"])
def test_a_blank_backbone_is_the_other_without_its_weights(kind: str, dtype: torch.dtype) -> None:
    """Names, dtypes, ties, modes, tables of rotary positions: all but the numbers that are stored."""
    config = tiny_backbone(kind, 31).config
    config.name_or_path = "org/somewhere"
    spec = TowerSpec(source="", backbone=config.to_dict())
    blank, drawn = backbones.blank_backbone(config, spec, dtype), backbones.from_config(config, spec, dtype).eval()
    assert not any(tensor.any() for tensor in blank.state_dict().values())
    blank.load_state_dict(drawn.state_dict())
    ours, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (blank, drawn))
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(blank(input_ids=ids).logits, drawn(input_ids=ids).logits)
    assert not blank.training
    assert blank.name_or_path == blank.config.name_or_path == "org/somewhere"


@pytest.mark.parametrize("fault", ["hidden from its state dict", "left on meta", "cannot be made there"])
def test_a_family_that_cannot_be_blank_is_drawn(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_backbone("llama", 31).config
    spec = TowerSpec(source="", backbone=config.to_dict())
    family = LlamaForCausalLM
    from_pretrained, init, state_dict = family.from_pretrained, family.__init__, family.state_dict

    def left(*args: Any, **kwargs: Any) -> Any:
        made, found = from_pretrained(*args, **kwargs)
        made.model.rotary_emb.to("meta")
        return made, found

    def hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
        return {name: each for name, each in state_dict(self, *args, **kwargs).items() if name != "model.norm.weight"}

    def asking(self: Any, *args: Any, **kwargs: Any) -> None:
        torch.zeros(1).item()
        init(self, *args, **kwargs)

    ways: dict[str, tuple[str, Any]] = {
        "hidden from its state dict": ("state_dict", hidden),
        "left on meta": ("from_pretrained", left),
        "cannot be made there": ("__init__", asking),
    }
    monkeypatch.setattr(family, *ways[fault])
    made = backbones.blank_backbone(config, spec)
    assert made.get_parameter("model.norm.weight").all()
    assert made.get_parameter("lm_head.weight").any()
    assert not any(each.is_meta for each in made.buffers())
    assert not made.training
