"""Unit vocoder: the published files and transformers' own give the same sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import SeamlessM4TCodeHifiGan, SeamlessM4TConfig

from zipper_lm.codecs.unit_vocoder import UnitVocoder

SIZES = {
    "upsample_rates": [5, 8, 8],
    "upsample_kernel_sizes": [11, 16, 16],
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
}


def network(units: int = 12, speakers: int = 1, voice: int = 0) -> Any:
    """A random vocoder loud enough to compare, with durations of several frames."""
    torch.manual_seed(0)
    config = SeamlessM4TConfig(
        unit_hifi_gan_vocab_size=units,
        unit_embed_dim=8,
        lang_embed_dim=0,
        vocoder_num_langs=1,
        spkr_embed_dim=voice,
        vocoder_num_spkrs=speakers,
        **SIZES,
    )
    model = SeamlessM4TCodeHifiGan(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.numel():
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(model.dur_predictor.proj.bias, 1.2)  # exp(1.2) - 1 = 2.3 frames
    return model


def published(model: Any, folder: Path, *, durations: bool = True, name: str = "g_00500000", **settings: Any) -> Path:
    """The same weights as the trainers of unit HiFi-GANs write them: other names, with weight norm."""
    state: dict[str, Tensor] = {"dict.weight": model.unit_embedding.weight.detach()}
    if model.speaker_embedding.weight.numel():
        state["spkr.weight"] = model.speaker_embedding.weight.detach()
    for key, tensor in model.hifi_gan.state_dict().items():
        key = key.replace("upsampler.", "ups.")
        if key.endswith(".weight"):
            length = tensor.norm(dim=(1, 2), keepdim=True)
            state |= {f"{key}_g": length, f"{key}_v": 3 * tensor / length}
        else:
            state[key] = tensor
    if durations:
        for key, tensor in model.dur_predictor.state_dict().items():
            convolution, _, kind = key.rpartition(".")
            state[f"dur_predictor.{convolution}{'.0' if 'conv' in convolution else ''}.{kind}"] = tensor
    folder.mkdir()
    config = {"resblock": "1", "num_embeddings": 12, "embedding_dim": 8, "sampling_rate": 16_000, **SIZES, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        save_file({k: v.contiguous() for k, v in state.items()}, folder / name)
    else:
        torch.save({"generator": state}, folder / name)
    return folder


UNITS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("name", ["g_00500000", "model.pt", "vocoder.safetensors"])
def test_published_files_speak_as_the_network_does(tmp_path: Path, name: str) -> None:
    model = network()
    vocoder = UnitVocoder.load(published(model, tmp_path / "published", name=name))
    assert (vocoder.units, vocoder.rate, vocoder.durations) == (12, 50, True)
    spoken = vocoder(UNITS, deduplicated=True)
    zero = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        wanted = model(torch.tensor([UNITS]), zero, zero)[0][0].numpy()
    assert len(wanted) > 1.5 * 320 * len(UNITS)
    assert wanted.std() > 1e-3
    assert np.allclose(spoken, wanted, atol=1e-5)
    assert len(vocoder(UNITS, deduplicated=False)) == 320 * len(UNITS)


def test_voices(tmp_path: Path) -> None:
    model = network(speakers=3, voice=8)
    folder = published(model, tmp_path / "published")
    first, last = UnitVocoder.load(folder), UnitVocoder.load(folder, speaker=2)
    assert not np.allclose(first(UNITS, deduplicated=False), last(UNITS, deduplicated=False), atol=1e-3)
    with torch.no_grad():
        wanted = model(torch.tensor([UNITS]), torch.tensor([[2]]), torch.zeros(1, 1, dtype=torch.long))[0][0].numpy()
    assert np.allclose(last(UNITS, deduplicated=True), wanted, atol=1e-5)
    with pytest.raises(ValueError, match=r"speaker=3 must be in \[0, 3\)"):
        UnitVocoder.load(folder, speaker=3)


@pytest.mark.parametrize("durations", [True, False])
def test_saved_and_loaded(tmp_path: Path, durations: bool) -> None:
    vocoder = UnitVocoder.load(published(network(), tmp_path / "published", durations=durations))
    vocoder.save(tmp_path / "saved")
    loaded = UnitVocoder.load(tmp_path / "saved")
    assert vocoder.durations == loaded.durations == durations
    assert np.array_equal(loaded(UNITS, deduplicated=durations), vocoder(UNITS, deduplicated=durations))


def test_other_sampling_rates_come_out_at_16_khz(tmp_path: Path) -> None:
    vocoder = UnitVocoder.load(published(network(), tmp_path / "published", sampling_rate=8_000))
    assert vocoder.rate == 25
    assert len(vocoder(UNITS, deduplicated=False)) == 2 * 320 * len(UNITS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"f0": True}, "needs pitch beside the units"),
        ({"embedder_params": {"a": 1}}, "needs a vector of the voice"),
        ({"resblock": "2"}, "resblock must be 1"),
        ({"upsample_initial_channel": 32}, "misshapen tensors .*hifi_gan"),
        ({"upsample_rates": [5]}, "extra .*tensors"),
    ],
)
def test_published_files_that_do_not_do(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UnitVocoder.load(published(network(), tmp_path / "published", **settings))


def test_folders_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one file of weights is needed, there are \[\]"):
        UnitVocoder.load(tmp_path)
    folder = published(network(), tmp_path / "published")
    (folder / "g_00000001").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"there are \['g_00000001', 'g_00500000'\]; give its path"):
        UnitVocoder.load(folder)
    assert UnitVocoder.load(folder / "g_00500000").units == 12
    with pytest.raises(ValueError, match="cannot be loaded from that folder"):
        UnitVocoder.load(folder / "g_00000001")
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*cache does not have it"):
        UnitVocoder.load("nobody/nothing")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        UnitVocoder.load(folder / "g_00500000")


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    folder = published(network(), tmp_path / "published")
    torch.save({"generator": Path("x")}, folder / "g_00500000")
    with pytest.raises(ValueError, match=r"(?i)weights"):
        UnitVocoder.load(folder)


def test_several_languages_are_refused() -> None:
    model = network()
    model.config.lang_embed_dim, model.config.vocoder_num_langs = 4, 2
    with pytest.raises(ValueError, match="made for 2 languages"):
        UnitVocoder(model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("upsample_initial_channel", 10**12),
        ("sampling_rate", 10**12),
        ("resblock_kernel_sizes", [3] * 5000),
        ("upsample_kernel_sizes", [10**15, 16, 16]),
    ],
)
def test_sizes_are_held_against_the_weights_before_memory_is_taken(field: str, value: Any, tmp_path: Path) -> None:
    """The network was made in the sizes that its config.json claims, and compared with the weights only then."""
    UnitVocoder(network()).save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(ValueError, match="unit vocoder"):
        UnitVocoder.load(tmp_path)
