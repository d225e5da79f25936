"""Unit vocoder: speech units to sound by a HiFi-GAN, with the durations of units that were de-duplicated.

The network is transformers' `SeamlessM4TCodeHifiGan`. Two kinds of folder hold one: what `UnitVocoder.save` (that is,
transformers' `save_pretrained`) writes, and the published unit HiFi-GANs (Polyak et al. 2021, arXiv 2104.00355; with
durations: Lee et al. 2022, arXiv 2107.05604), which are a `config.json` and a checkpoint of the same network under
other names. Those are renamed here, their weight norm folded in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import SeamlessM4TCodeHifiGan, SeamlessM4TConfig

from zipper_lm.codecs.audio import SAMPLING_RATE, check_rate, read_audio
from zipper_lm.utils.hub import CONFIG_FILE, local_folder, reaching
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.weights import on_meta

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_DURATIONS = "dur_predictor."
MAY_LACK = 16  # tensors that a checkpoint need not have: the duration predictor's, and empty embeddings
_SIZES = (  # settings of the same name on both sides
    "upsample_rates",
    "upsample_kernel_sizes",
    "upsample_initial_channel",
    "resblock_kernel_sizes",
    "resblock_dilation_sizes",
)


class UnitVocoder:
    """Units to sound at 16 kHz. Make one with `load`.

    Args:
        model: the network; its language embedding must be empty or of one language.
        durations: whether its duration predictor was trained. speaker: which of its voices speaks.

    Raises:
        ValueError: if `speaker` is none of its voices, or it is made for several languages.
    """

    def __init__(self, model: SeamlessM4TCodeHifiGan, *, durations: bool = True, speaker: int = 0) -> None:
        config = model.config
        if not 0 <= speaker < config.vocoder_num_spkrs:
            raise ValueError(f"unit vocoder: speaker={speaker} must be in [0, {config.vocoder_num_spkrs})")
        if config.lang_embed_dim and config.vocoder_num_langs > 1:
            raise ValueError(f"unit vocoder: is made for {config.vocoder_num_langs} languages, must be for one")
        self.model = model.eval().requires_grad_(False)
        self.durations = durations
        self.speaker = speaker

    @property
    def units(self) -> int:
        """Number of units that it knows."""
        return int(self.model.config.unit_hifi_gan_vocab_size)

    @property
    def rate(self) -> float:
        """Units per second of sound, where no durations are predicted."""
        return float(self.model.config.sampling_rate / np.prod(self.model.config.upsample_rates))

    @torch.inference_mode()
    def __call__(self, units: Sequence[int], *, deduplicated: bool) -> np.ndarray:
        """Units, at least one, to sound: float32 [time] at 16 kHz.

        Args:
            units: each in ``[0, self.units)``. deduplicated: whether each stands for a run, whose length is predicted.
        """
        at = self.model.device
        embedded = self.model.unit_embedding(torch.tensor([list(units)], device=at))  # [1, units, width]
        if deduplicated:
            assert self.durations
            counts = torch.expm1(self.model.dur_predictor(embedded)).round().long().clamp_min(1)
            embedded = embedded.repeat_interleave(counts[0], dim=1)
        constant = [
            table(torch.tensor([[number]], device=at)).expand(-1, embedded.shape[1], -1)
            for table, number in ((self.model.language_embedding, 0), (self.model.speaker_embedding, self.speaker))
        ]
        wave = self.model.hifi_gan(torch.cat([constant[0], embedded, constant[1]], dim=2).transpose(1, 2))
        return read_audio((wave[0].cpu().numpy(), self.model.config.sampling_rate), max_seconds=math.inf)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`; a duration predictor that was not trained is left out."""
        state = self.model.state_dict()
        if not self.durations:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(_DURATIONS)}
        self.model.save_pretrained(folder, state_dict=state)

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None, speaker: int = 0, **hub: Any) -> UnitVocoder:
        """Load a vocoder of either kind.

        Args:
            source: folder or Hub id with `config.json` and one file of weights (`.safetensors`, `.pt`, `.pth`, `.bin`,
                or `g_00000000` as trainers name it), or the path of that file, with `config.json` beside it.
            revision: on the Hub. speaker: which of its voices speaks. hub: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: if it is not there, its weights do not fit its config, or it needs more than units to speak.
        """
        file = _weights_file(source, revision, **hub)
        with reaching("unit vocoder", file.parent):
            settings = read_mapping(file.parent / CONFIG_FILE)
            state = _read(file)
        if settings.get("model_type") == SeamlessM4TConfig.model_type:
            config = SeamlessM4TConfig.from_dict(settings)
        else:
            config = _config(settings, state, source)
            state = _renamed(state)
        model = _built(config, state, source)
        return cls(model, durations=any(name.startswith(_DURATIONS) for name in state), speaker=speaker)


def _weights_file(source: str | Path, revision: str | None, **hub: Any) -> Path:
    if Path(source).is_file():
        return Path(source)
    folder = local_folder(source, revision, **hub)
    found = sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES or f.name.startswith("g_"))
    if len(found) != 1:
        names = [f.name for f in found]
        raise ValueError(
            f"unit vocoder {str(source)!r}: one file of weights is needed, there are {names}; give its path"
        )
    return found[0]


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    content = torch.load(file, map_location="cpu", weights_only=True)
    return dict(content.get("generator", content))  # the trainers keep it under this name


def _config(settings: Mapping[str, Any], state: Mapping[str, Tensor], source: str | Path) -> SeamlessM4TConfig:
    """The published settings in transformers' words; sizes are read off the weights, which cannot be wrong."""
    for key, why in (("f0", "pitch"), ("embedder_params", "a vector of the voice"), ("multistyle", "a style")):
        if settings.get(key):
            raise ValueError(f"unit vocoder {str(source)!r}: needs {why} beside the units ({key} in its config)")
    if missing := sorted({*_SIZES} - set(settings)) or sorted({"dict.weight"} - set(state)):
        raise ValueError(f"unit vocoder {str(source)!r}: is no unit HiFi-GAN, it lacks {missing}")
    if str(settings.get("resblock", "1")) != "1":
        raise ValueError(f"unit vocoder {str(source)!r}: resblock must be 1, got {settings['resblock']}")
    units, width = state["dict.weight"].shape
    speakers, voice = state["spkr.weight"].shape if "spkr.weight" in state else (1, 0)
    kernel = state["dur_predictor.conv1.0.weight"].shape[-1] if "dur_predictor.conv1.0.weight" in state else 3
    return SeamlessM4TConfig(
        unit_hifi_gan_vocab_size=units,
        unit_embed_dim=width,
        vocoder_num_spkrs=speakers,
        spkr_embed_dim=voice,
        vocoder_num_langs=1,
        lang_embed_dim=0,
        variance_predictor_kernel_size=kernel,
        sampling_rate=settings.get("sampling_rate", SAMPLING_RATE),
        **{name: settings[name] for name in _SIZES},
    )


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names to transformers'; weight norm (Salimans and Kingma 2016, arXiv 1602.07868) is folded in."""
    known = {"dict.weight": "unit_embedding.weight", "spkr.weight": "speaker_embedding.weight"}
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(".weight_g"):
            continue
        if name.endswith(".weight_v"):
            name = name.removesuffix("_v")
            tensor = state[f"{name}_g"] * tensor / tensor.norm(dim=(1, 2), keepdim=True)
        if name in known:
            goal = known[name]
        elif name.startswith(_DURATIONS):
            goal = name.replace("conv1.0.", "conv1.").replace("conv2.0.", "conv2.")
        else:
            goal = "hifi_gan." + name.replace("ups.", "upsampler.")
        renamed[goal] = tensor
    return renamed


def _built(config: SeamlessM4TConfig, state: Mapping[str, Tensor], source: str | Path) -> SeamlessM4TCodeHifiGan:
    """The network with these weights; they may lack the duration predictor, and embeddings of width 0."""
    what = f"unit vocoder {str(source)!r}"
    check_rate(config.sampling_rate, what)
    own = on_meta(what, lambda: SeamlessM4TCodeHifiGan(config), 2 * len(state) + MAY_LACK).state_dict()
    optional = {n for n, t in own.items() if t.numel() == 0}
    if not any(name.startswith(_DURATIONS) for name in state):
        optional |= {n for n in own if n.startswith(_DURATIONS)}
    wrong = {n for n in own if n not in state} - optional
    wrong |= {n for n, t in state.items() if n not in own or own[n].shape != t.shape}
    if wrong:
        raise ValueError(f"{what}: missing, extra or misshapen tensors {sorted(wrong)[:5]}")
    with reaching("unit vocoder", source):
        model = SeamlessM4TCodeHifiGan(config)
    model.load_state_dict(state, strict=False)
    return model
