"""What a zipped model is made of: the `ZipperConfig` that holds its towers and zips."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from zipper_lm.fusion.fields import config_fingerprint, typed
from zipper_lm.fusion.tower_spec import InputProjectionForm, TowerSpec, backbone_config
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.utils.arguments import refuse


class Followed(PreTrainedConfig):
    """A config whose `from_pretrained` drops no argument."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:  # type: ignore[override]
        """As of `PreTrainedConfig`.

        Raises:
            ValueError: for an argument that is neither a field nor for the Hub, unless ``return_unused_kwargs=True``.
        """
        found: Any = super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "return_unused_kwargs": True})
        config, unused = found
        if kwargs.get("return_unused_kwargs"):
            return config, unused
        refuse(f"{cls.__name__}.from_pretrained", unused, {})
        return config


class ZipperConfig(Followed):
    """Config of a `ZipperModel`: `towers` by name and directed `zips`, both also as typed specs.

    Args:
        towers: name to the fields of a `TowerSpec`.
        zips: fields of resolved `ZipSpec`s.
        loss_weights: weight of each modality's loss; missing ones count 1.
        handover_weight: weight of the loss that learns which modality speaks next (`schedule="auto"`); 0 where nobody
            has learned it.
        groups: where zips were trained apart (`zipper_lm.models.combine`): for each training, its towers and the form
            of their input projections. Empty: all were trained together, in the towers' own form.
    """

    model_type = "zipper"

    def __init__(
        self,
        towers: dict[str, Any] | None = None,
        zips: list[Any] | None = None,
        loss_weights: dict[str, float] | None = None,
        handover_weight: float = 0.1,
        groups: Sequence[dict[str, InputProjectionForm]] = (),
        **kwargs: Any,
    ) -> None:
        if not isinstance(towers or {}, Mapping) or not isinstance(zips or [], Sequence):
            raise ValueError("config: towers must be a mapping, zips a list")
        for name, value in (towers or {}).items():
            if not name.isidentifier():  # a folder is made of it on saving
                raise ValueError(f"config: {name!r} is no tower's name: it must be a plain word")
            if not isinstance(value, (TowerSpec, Mapping)):
                raise ValueError(f"config: tower {name!r} must be a mapping, got {value!r:.60}")
        if not isinstance(loss_weights or {}, Mapping) or not isinstance(groups or [], Sequence):
            raise ValueError("config: loss_weights must be a mapping, groups a list")
        if wrong := [group for group in groups or () if not isinstance(group, Mapping)]:
            raise ValueError(f"config: a group must be a mapping, got {wrong[0]!r:.60}")
        for weight in [*(loss_weights or {}).values(), handover_weight]:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise ValueError(f"config: a weight of a loss must be a number, got {weight!r:.60}")
        if wrong := [z for z in zips or [] if not isinstance(z, (ZipSpec, Mapping))]:
            raise ValueError(f"config: a zip must be a mapping, got {wrong[0]!r:.60}")
        # Sorted, as in the JSON file: the order of towers is the order of the handover's classes.
        named = sorted((towers or {}).items())
        self.towers = {n: asdict(t) if isinstance(t, TowerSpec) else dict(t) for n, t in named}
        self.zips = [asdict(z) if isinstance(z, ZipSpec) else dict(z) for z in zips or []]
        self.loss_weights = dict(loss_weights or {})
        self.handover_weight = handover_weight
        self.groups = [dict(group) for group in groups or ()]
        for group in self.groups:
            if unknown := sorted(set(group) - set(self.towers)):
                raise ValueError(f"config: a group names towers {unknown}; the towers are {list(self.towers)}")
        check_loss_weights(self.loss_weights, self.towers)
        super().__init__(**kwargs)

    @property
    def tower_specs(self) -> dict[str, TowerSpec]:
        """The towers, typed."""
        return {name: typed(TowerSpec, f"tower {name!r}", fields) for name, fields in self.towers.items()}

    @property
    def zip_specs(self) -> list[ZipSpec]:
        """The directed zips, typed."""
        return [typed(ZipSpec, "zip", fields) for fields in self.zips]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what the weights mean: not where towers come from, nor losses and dropout."""
        free = (
            *("source", "revision", "backbone", "trust_remote_code", "license"),
            *("prefix", "config_key", "config", "quantization"),
        )
        towers = {n: {k: v for k, v in asdict(s).items() if k not in free} for n, s in self.tower_specs.items()}
        for fields in towers.values():
            for field, plain_value in (("input_projection_layer", 0), ("input_projection_scale", 1)):
                if fields[field] == plain_value:  # as of what was made before there was a choice
                    del fields[field]
        hashes = {n: s.config_hash for n, s in self.tower_specs.items()}
        zips = [{k: v for k, v in asdict(z).items() if k not in ("dropout", "attention")} for z in self.zip_specs]
        for fields in zips:
            if fields["scale"] == 1:
                del fields["scale"]
        return config_fingerprint([towers, hashes, zips, *([self.groups] if self.groups else [])])

    @property
    def projection_groups(self) -> list[dict[str, InputProjectionForm]]:
        """Form of each tower's input projection, for each training that the zips come from."""
        return self.groups or [{name: spec.input_projection for name, spec in self.tower_specs.items()}]

    def backbone_config(self, name: str) -> PreTrainedConfig:
        """The config of one tower's backbone, as its own class (remote-code families excepted: see `checkpoint`)."""
        return backbone_config(f"tower {name!r}", self.towers[name]["backbone"])


def check_loss_weights(weights: Mapping[str, float], towers: Collection[str]) -> None:
    """Raise `ValueError` for a weight of no tower, or one that is no number from 0 on."""
    for name, weight in weights.items():
        if name not in towers or not 0 <= weight < math.inf:
            raise ValueError(f"loss_weights[{name!r}]={weight}: needs a tower of {list(towers)} and a number >= 0")
