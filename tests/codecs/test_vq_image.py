"""The VQ image codec: the model's own codes, alone or out of a whole model, and back to pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Emu3VQVAE,
    Emu3VQVAEConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusVQVAE,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from zipper_lm.codecs import vq_image
from zipper_lm.codecs.codec import Codec, load_codec, make_codec
from zipper_lm.codecs.vq_image import VqImageCodec

JANUS = {
    "embed_dim": 4,
    "num_embeddings": 9,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "num_patches": 3,
    "projection_dim": 8,
    "image_token_embed_dim": 8,
}
EMU = {
    "embed_dim": 4,
    "codebook_size": 9,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def save_janus(folder: Path) -> Path:
    """A whole Janus, whose pictures are 6 x 6 pixels and 9 codes."""
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 6, "patch_size": 2}
    text = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = JanusConfig(text_config=text, vision_config={**vision, "projection_dim": 8}, vq_config=JANUS)
    JanusForConditionalGeneration(config).save_pretrained(folder)
    JanusImageProcessor(**HALF).save_pretrained(folder)
    return folder


def save_emu(folder: Path) -> Path:
    torch.manual_seed(0)
    Emu3VQVAE(Emu3VQVAEConfig(**EMU)).save_pretrained(folder)
    JanusImageProcessor(**HALF).save_pretrained(folder)  # any processor: its mean and deviation are read
    return folder


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def emu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_emu(tmp_path_factory.mktemp("emu"))


def pictures(height: int, width: int, count: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(256, size=(count, height, width, 3), dtype=np.uint8))


def test_codes_are_those_of_the_autoencoder_inside_a_whole_model(janus: Path) -> None:
    codec = make_codec("vq-image", source=str(janus))
    assert isinstance(codec, Codec)
    assert (codec.bos_id, codec.eos_id, codec.pad_id, codec.vocab_size, codec.rate) == (9, 10, 11, 12, None)
    whole = JanusForConditionalGeneration.from_pretrained(janus).model.vqmodel.eval()
    given = pictures(6, 6, 10)  # more than one batch
    seen = torch.tensor(np.stack(given)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        codes = whole.encode(seen).image_tokens.view(10, 9)
        back = whole.decode(codes).permute(0, 2, 3, 1)
    assert codec.encode(given) == codes.tolist()
    shown = np.stack([np.asarray(p) for p in codec.decode(codes.tolist())])
    assert np.abs(shown - ((back.clamp(-1, 1) + 1) * 127.5).numpy()).max() <= 0.51


def test_emu3_takes_any_multiple_of_its_step(emu: Path) -> None:
    codec = make_codec("vq-image", source=str(emu), height=4, width=6)
    given = pictures(4, 6)
    model = Emu3VQVAE.from_pretrained(emu).eval()
    seen = torch.tensor(np.stack(given)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        codes = torch.stack(model.encode(seen, image_sizes=torch.tensor([[4, 6]] * 3)).image_tokens)
        back = model.decode(codes).permute(0, 2, 3, 1)
    assert codes.shape == (3, 2, 3)
    assert codec.encode(given) == codes.flatten(1).tolist()
    shown = np.stack([np.asarray(p) for p in codec.decode(codes.flatten(1).tolist())])
    assert np.abs(shown - ((back.clamp(-1, 1) + 1) * 127.5).numpy()).max() <= 0.51


def test_pictures_of_other_sizes_and_modes(janus: Path) -> None:
    codec = make_codec("vq-image", source=str(janus))
    grey = Image.new("L", (6, 6), 180)
    same = codec.encode([grey])
    assert codec.encode([Image.new("L", (40, 13), 180), grey.convert("RGBA"), grey.convert("P")]) == same * 3
    white = codec.encode([Image.new("RGB", (6, 6), "white")])
    assert codec.encode([Image.new("RGBA", (6, 6), (0, 0, 0, 0))]) == white


def test_a_row_too_short_is_filled_and_one_too_long_is_cut(janus: Path) -> None:
    codec = make_codec("vq-image", source=str(janus))
    row = [3, 1, 4, 1, 5, 2, 6, 5, 3]
    full, long, short, filled = codec.decode([row, [*row, 8], row[:4], row[:4] + [0] * 5])
    assert full.size == (6, 6)
    assert full == long
    assert short == filled
    with pytest.raises(ValueError, match="image ids, row 1: id 9 is no unit's: those are 0 to 8"):
        codec.decode([row, [9]])


def test_saved_with_its_model_and_loaded_without_the_source(janus: Path, tmp_path: Path) -> None:
    codec = make_codec("vq-image", source=str(janus), offset=2, bos=0, eos=1, pad=1)
    codec.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "codec.json").read_text())
    assert said["model"]["source"] == "model"
    assert str(janus) not in (tmp_path / "codec.json").read_text()
    again = load_codec(tmp_path)
    assert isinstance(again, VqImageCodec)
    given = pictures(6, 6)
    assert again.encode(given) == codec.encode(given)
    assert (again.layout, again.form) == (codec.layout, codec.form)  # type: ignore[attr-defined]
    again.save_pretrained(tmp_path / "again")
    assert load_codec(tmp_path / "again").encode(given) == codec.encode(given)


def test_other_weights_than_when_it_was_saved_are_refused(janus: Path, tmp_path: Path) -> None:
    make_codec("vq-image", source=str(janus)).save_pretrained(tmp_path)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    weights = load_file(file)
    weights[next(iter(weights))] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="other weights than when the codec was saved"):
        load_codec(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(janus: Path, tmp_path: Path) -> None:
    """transformers would fill them in at random, with a note in its log."""
    JanusVQVAE(JanusVQVAEConfig(**JANUS)).save_pretrained(tmp_path)
    JanusImageProcessor(**HALF).save_pretrained(tmp_path)
    assert make_codec("vq-image", source=str(tmp_path)).vocab_size == 12
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["quantize.embedding.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of JanusVQVAE, such as \['quantize\.embedding"):
        make_codec("vq-image", source=str(tmp_path))


@pytest.mark.parametrize(
    ("which", "options", "says"),
    [
        ("janus", {"height": 8}, "height must be 6 pixels, this model takes no other; got 8"),
        ("janus", {"bos": 3}, "bos=3 must lie outside of the units"),
        ("janus", {"depth": 3}, "depth"),
        ("emu", {}, "takes pictures of many sizes; give height and width"),
        ("emu", {"height": 5, "width": 4}, "height must be a multiple of 2 pixels, got 5"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    which: str, options: dict[str, Any], says: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match=says):
        make_codec("vq-image", source=str(request.getfixturevalue(which)), **options)


def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="it needs a source"):
        make_codec("vq-image")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its VQ image model is 'llama'; known are"):
        make_codec("vq-image", source=str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="offline mode is on"):
        make_codec("vq-image", source="none-such/janus-here")
    alone = tmp_path / "alone"
    JanusVQVAE(JanusVQVAEConfig(**JANUS)).save_pretrained(alone)
    with pytest.raises(ValueError, match=r"image processor .* cannot be loaded from that folder"):
        make_codec("vq-image", source=str(alone))


def test_what_the_file_leaves_out_is_the_processors_own(
    janus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torchvision transformers 5.17 makes no image processor at all; its file alone is enough where it says
    mean, deviation and filter."""
    shutil.copytree(janus, tmp_path / "janus")
    file = tmp_path / "janus" / "preprocessor_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "resample"}))
    own = SimpleNamespace(image_mean=[0.1] * 3, image_std=[0.2] * 3, resample=2)
    monkeypatch.setattr(vq_image, "AutoImageProcessor", SimpleNamespace(from_pretrained=lambda *_, **__: own))
    lacking, whole = (make_codec("vq-image", source=str(at)) for at in (tmp_path / "janus", janus))
    assert (lacking.form.mean[0], lacking.form.std[0], lacking.form.resample) == (0.1, 0.2, 2)
    assert whole.form.mean[0] == 0.5


@pytest.mark.parametrize(("owner", "config", "size"), [(JanusVQVAE, JANUS, 6), (Emu3VQVAE, EMU, 8)], ids=str)
def test_pictures_go_where_the_model_is(owner: Any, config: dict[str, Any], size: int) -> None:
    """They stayed on the CPU, so that a codec whose model was on a GPU could not read one. Here the model is on the
    device without data, which shows the same."""
    model = owner(owner.config_class(**config)).to("meta").eval()
    assert vq_image._encoded(model, torch.zeros(2, 3, size, size)).device == torch.device("meta")
    assert vq_image._decoded(model, torch.zeros(2, 3, 3, dtype=torch.long)).device == torch.device("meta")
