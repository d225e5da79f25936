"""Arguments that transformers' own loaders and savers take: each is followed, or refused by name with the way on."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from zipper_lm.utils.hub import HUB_ARGUMENTS

ONE_FILE = "a checkpoint's weights are one model.safetensors"
ONE_DEVICE = "a model is loaded onto one device, or each tower onto one, by device_map"
PER_TOWER = "it is a tower's own: see model.tower(NAME).backbone, or TowerSpec"
WHEN_PUSHED = "it goes with push_to_hub=True"

LOADING = {
    "_from_pipeline": "transformers' pipelines write no documents; use generate",
    "adapter_kwargs": "adapters are in the checkpoint",
    "allow_all_kernels": PER_TOWER,
    "device_mesh": ONE_DEVICE,
    "disable_mmap": ONE_FILE,
    "distributed_config": ONE_DEVICE,
    "experts_implementation": PER_TOWER,
    "from_flax": ONE_FILE,
    "from_tf": ONE_FILE,
    "fusion_config": PER_TOWER,
    "generation_config": "settings are by modality: generate(..., settings={NAME: ...})",
    "gguf_file": ONE_FILE,
    "ignore_mismatched_sizes": "every tensor must be there in its shape",
    "kernel_config": PER_TOWER,
    "key_mapping": "a tower's checkpoint may have a prefix: TowerSpec.prefix",
    "load_in_4bit": "towers are quantized when they are fused: TowerSpec.quantization",
    "load_in_8bit": "towers are quantized when they are fused: TowerSpec.quantization",
    "max_memory": ONE_DEVICE,
    "offload_buffers": ONE_DEVICE,
    "offload_folder": ONE_DEVICE,
    "output_loading_info": "nothing is ever missing or left over: that raises",
    "proxies": "set HTTPS_PROXY",
    "quantization_config": "towers are quantized when they are fused: TowerSpec.quantization",
    "state_dict": "load, then model.load_state_dict",
    "subfolder": "name the folder itself; of a repository, fetch it with snapshot_download first",
    "tp_plan": ONE_DEVICE,
    "tp_size": ONE_DEVICE,
    "use_kernels": PER_TOWER,
    "use_safetensors": ONE_FILE,
    "variant": ONE_FILE,
    "weights_only": ONE_FILE,
}
SAVING = {
    "commit_description": WHEN_PUSHED,
    "commit_message": WHEN_PUSHED,
    "create_pr": WHEN_PUSHED,
    "distributed_checkpoint": ONE_FILE,
    "private": WHEN_PUSHED,
    "repo_id": WHEN_PUSHED,
    "revision": WHEN_PUSHED,
    "safe_serialization": ONE_FILE,
    "save_function": "every process may call this; is_main_process says which one writes",
    "save_original_format": "names of tensors are the model's own",
    "save_peft_format": "adapters are stored with the model's own tensors",
    "tags": "write them into the model card",
    "token": WHEN_PUSHED,
    "variant": ONE_FILE,
}
PUSHING = {
    "max_shard_size": ONE_FILE,
    "safe_serialization": ONE_FILE,
    "tags": "write them into the model card",
    "use_temp_dir": "a copy is always made ready in a temporary folder",
    "variant": ONE_FILE,
}
ASKING_NOTHING: dict[str, tuple[Any, ...]] = {
    "distributed_checkpoint": (False,),
    "ignore_mismatched_sizes": (False,),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
    "max_shard_size": ("50GB",),
    "push_to_hub": (False,),
    "return_tensors": ("pt",),
    "padding": (True,),
    "output_loading_info": (False,),
    "safe_serialization": (True,),
    "save_original_format": (True,),
    "save_peft_format": (True,),
    "subfolder": ("",),
    "use_kernels": (False,),
    "use_safetensors": (True,),
    "weights_only": (True,),
}
"""Values, beside `None`, that ask for what is done anyway."""


def refuse(where: str, given: Mapping[str, Any], ways: Mapping[str, str]) -> None:
    """Raise `ValueError` for arguments that are not followed.

    Args:
        where: what was called, for the message. given: arguments that nothing here follows.
        ways: by name, how to go on, of those that users of transformers know.
    """
    for name, value in given.items():
        if name not in ways:
            raise ValueError(f"{where}: unknown argument {name}={value!r}"[:200])
        if value is not None and not any(value is nothing or value == nothing for nothing in _nothing(name)):
            raise ValueError(f"{where}: {name}={_short(value)} is not followed: {ways[name]}")


def _nothing(name: str) -> tuple[Any, ...]:
    return ASKING_NOTHING.get(name, ())


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"<{type(value).__name__}>"


@dataclass(frozen=True)
class Loading:
    """What a call of `from_pretrained` asks for.

    Attributes:
        dtype: of the backbones; `None` is that in which they were saved.
        dtypes: by tower, in place of one for all.
        device: where the model shall be; `None` is where it is loaded.
        apart: devices by tower, in place of one for all.
        attn_implementation: of every tower and of the zips; `None` leaves each as it is.
        config: to take in place of the checkpoint's, as transformers' auto classes hand it on.
        trust_remote_code: whether code of towers and tokenizers may run.
        hub: arguments for the Hub.
    """

    dtype: torch.dtype | None = None
    dtypes: Mapping[str, torch.dtype | None] | None = None
    device: torch.device | None = None
    apart: Mapping[str, Any] | None = None
    attn_implementation: str | None = None
    config: Any = None
    trust_remote_code: bool = False
    hub: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, where: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, towers: bool = False) -> Loading:
        """Typed and checked, before anything is loaded.

        Args:
            where: what was called, for messages. args, kwargs: all that it was given beside its own arguments.
            towers: whether the model has towers, which may be on devices of their own; their names are checked later.

        Raises:
            ValueError: for a name that is not followed, or a value that cannot be.
        """
        if args:
            raise ValueError(f"{where}: takes one argument without a name, the folder or id; got also {args!r}"[:200])
        rest = dict(kwargs)
        hub = {name: rest.pop(name) for name in HUB_ARGUMENTS if name in rest}
        for name in ("_from_auto", "_commit_hash", "low_cpu_mem_usage", "_fast_init"):  # transformers drops them, too
            rest.pop(name, None)
        added = rest.get("adapter_kwargs")
        if isinstance(added, Mapping) and set(added) <= {"revision", "token"}:  # by its auto classes
            del rest["adapter_kwargs"]
        asked, old = rest.pop("dtype", None), rest.pop("torch_dtype", None)
        asked = old if asked is None else asked
        each = asked if towers and isinstance(asked, Mapping) else None
        devices = rest.pop("device_map", None)
        by_name = towers and isinstance(devices, Mapping) and set(devices) != {""}
        how = cls(
            dtype=dtype_of(where, asked) if each is None else None,
            dtypes=each and {name: dtype_of(f"{where}: tower {name!r}", given) for name, given in each.items()},
            device=None if by_name else device_of(where, devices),
            apart=check_devices(where, devices) if by_name else None,
            attn_implementation=rest.pop("attn_implementation", None),
            config=rest.pop("config", None),
            trust_remote_code=bool(rest.pop("trust_remote_code", False)),
            hub=hub,
        )
        refuse(where, rest, LOADING)
        return how

    def dtype_for(self, name: str) -> torch.dtype | None:
        """The dtype of a tower."""
        return (self.dtypes or {}).get(name, self.dtype)

    def place(self, backbone: Any, name: str | None = None) -> Any:
        """A backbone, where the model, or the tower `name`, shall be: what is tried when the model is made is then
        tried there. On meta nothing could be, so it stays where it is until the model is settled."""
        device = self.device if self.apart is None or name is None else self.apart.get(name)
        if device is not None and device.type != "meta":
            torch.nn.Module.to(backbone, device)  # transformers' own refuses what is quantized, wherever it is
        return backbone

    def settle(self, model: Any, stored: Any) -> Any:
        """A model that was loaded, in evaluation mode, with the attention and on the device that were asked for.

        Args:
            model: with its processor. stored: the config as the checkpoint has it.
        """
        asked = self.attn_implementation
        if asked is None and self.config is not None:  # transformers' auto classes put it there; a file's word is none
            said = self.config._attn_implementation
            asked = said if said != stored._attn_implementation else None
        if asked is not None:
            model.set_attn_implementation(asked)
        if self.apart is not None:
            model.place(self.apart)
            for name, device in self.apart.items():
                if model.processor is not None and device.type != "meta":
                    model.processor.to(device, only=name)
        if self.device is not None:
            model.to(self.device)
            if model.processor is not None and self.device.type != "meta":
                model.processor.to(self.device)
        return model.eval()

    def merge(self, where: str, stored: Any, fields: tuple[str, ...]) -> Any:
        """The checkpoint's config, or of the one that was given what a model of ours is made by.

        Args:
            where: what was called, for messages. stored: the checkpoint's config. fields: that it is made by.

        Raises:
            ValueError: for a config of another class, or one that was changed elsewhere, which would have no effect.
        """
        if self.config is None:
            return stored
        if type(self.config) is not type(stored):
            kind = type(stored).__name__
            raise ValueError(f"{where}: config is a {type(self.config).__name__}, here it must be a {kind}")
        ours, theirs = (json.loads(json.dumps(c.to_dict(), default=str)) for c in (stored, self.config))
        free = {*fields, "dtype", "transformers_version", "architectures", "_name_or_path"}
        if changed := sorted(k for k in {*ours, *theirs} - free if ours.get(k) != theirs.get(k)):
            raise ValueError(f"{where}: config changes {changed}, which has no effect; what counts is {sorted(fields)}")
        made = {name: deepcopy(getattr(self.config, name)) for name in fields}
        return type(stored)(**made, architectures=stored.architectures)


def dtype_of(where: str, asked: Any) -> torch.dtype | None:
    """A floating-point dtype of 16 bits or more, by itself or by name; `None` for ``"auto"`` and `None`.

    Raises:
        ValueError: for anything else.
    """
    if asked is None or asked == "auto":
        return None
    found = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype) or not found.is_floating_point or torch.finfo(found).bits < 16:
        raise ValueError(
            f"{where}: dtype={asked!r} is no floating-point dtype of 16 bits or more, such as "
            "torch.bfloat16, nor 'auto'"
        )
    return found


def device_of(where: str, device_map: Any) -> torch.device | None:
    """The one device of a `device_map`: a device, its name or number, ``{"": device}``, or ``"auto"``, which is the
    GPU if there is one.

    Raises:
        ValueError: for several devices, or one that is not there.
    """
    asked = device_map
    if isinstance(asked, Mapping) and set(asked) == {""}:
        asked = asked[""]
    if asked is None:
        return None
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(asked, bool) or not isinstance(asked, (int, str, torch.device)):
        raise ValueError(f"{where}: device_map={device_map!r} is not one device; {_APART}")
    try:
        device = torch.device("cuda", asked) if isinstance(asked, int) else torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"{where}: device_map={device_map!r} names no device; {_APART}") from error
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ValueError(f"{where}: device_map={device_map!r}: there are {torch.cuda.device_count()} CUDA devices here")
    return device


_APART = "to have towers apart, name them: device_map={NAME: DEVICE}"


def check_devices(where: str, devices: Mapping[str, Any], towers: Collection[str] | None = None) -> dict[str, Any]:
    """Devices by tower.

    Args:
        where: what was called, for messages. devices: each as of `device_of`. towers: that there are, if that is known.

    Raises:
        ValueError: for an unknown tower, or a device that is not there.
    """
    if towers is not None and (unknown := sorted(set(devices) - set(towers))):
        raise ValueError(f"{where}: device_map names {unknown}, but the towers are {list(towers)}")
    found = {name: device_of(f"{where}: tower {name!r}", device) for name, device in devices.items()}
    return {name: device for name, device in found.items() if device is not None}


@dataclass(frozen=True)
class Saving:
    """What a call of `save_pretrained` asks for.

    Attributes:
        is_main_process: whether this process writes at all.
        state_dict: the model's tensors, all of them, where a trainer has gathered them.
        max_shard_size: the largest file of weights that may be.
        push: whether the checkpoint is uploaded afterwards, and `upload`: how.
    """

    is_main_process: bool = True
    state_dict: Mapping[str, torch.Tensor] | None = None
    max_shard_size: int | str | None = None
    push: bool = False
    upload: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, where: str, kwargs: Mapping[str, Any]) -> Saving:
        """Typed and checked, before anything is written.

        Raises:
            ValueError: for a name that is not followed.
        """
        rest = dict(kwargs)
        main, state = rest.pop("is_main_process", True), rest.pop("state_dict", None)
        size, push = rest.pop("max_shard_size", None), bool(rest.pop("push_to_hub", False))
        upload = {name: rest.pop(name) for name in UPLOADING if push and name in rest}
        if push and state is not None:
            raise ValueError(f"{where}: state_dict with push_to_hub=True is not followed: save, load, then push_to_hub")
        refuse(where, rest, SAVING)
        return cls(bool(main), state, size, push, {k: v for k, v in upload.items() if v is not None})


UPLOADING = ("repo_id", "private", "token", "revision", "create_pr", "commit_message", "commit_description")
"""What `save_pretrained` hands on when it pushes."""
