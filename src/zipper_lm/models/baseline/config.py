"""The config of a single decoder: its modalities, and where the decoder came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zipper_lm.fusion.config import Followed
from zipper_lm.fusion.fields import typed
from zipper_lm.fusion.tower_spec import TowerSpec, config_hash
from zipper_lm.models.baseline.vocabulary import Modality
from zipper_lm.utils.hub import CONFIG_FILE
from zipper_lm.utils.json_files import read_mapping

_MODEL_TYPE = "zipper_single_decoder"


class SingleDecoderConfig(Followed):
    """Config of a `SingleDecoder`.

    Args:
        modalities: fields of a `Modality` each; the first is the base, the backbone's own.
        decoder: fields of a `TowerSpec`: where the backbone came from, its config once expanded, how it is trained.
        loss_weights: weight of each modality's loss; missing ones count 1.
    """

    model_type = _MODEL_TYPE

    def __init__(
        self,
        modalities: Sequence[Mapping[str, Any]] = (),
        decoder: Mapping[str, Any] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.modalities = [dict(m) for m in modalities]
        self.decoder = dict(decoder or {})
        self.loss_weights = dict(loss_weights or {})
        super().__init__(**kwargs)

    @property
    def vocabulary(self) -> list[Modality]:
        """The modalities, typed."""
        return [typed(Modality, "a modality", fields) for fields in self.modalities]

    @property
    def spec(self) -> TowerSpec:
        """The decoder, typed."""
        return typed(TowerSpec, "the decoder", self.decoder)

    @property
    def tower_specs(self) -> dict[str, TowerSpec]:
        """The decoder under the modality that it had before it was expanded."""
        return {self.vocabulary[0].name: self.spec}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what the weights mean."""
        return config_hash({"modalities": self.modalities, "backbone": self.spec.config_hash, "lora": self.spec.lora})


def is_single_decoder(source: str | Path) -> bool:
    """Whether a folder holds a checkpoint of a `SingleDecoder`."""
    file = Path(source) / CONFIG_FILE
    return file.is_file() and read_mapping(file).get("model_type") == _MODEL_TYPE
