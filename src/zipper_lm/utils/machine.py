"""What a run was made with: a record without it cannot be compared with another's."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("zipper-lm", "torch", "transformers", "accelerate", "peft", "datasets", "numpy")


def made_with() -> dict[str, Any]:
    """Versions of the packages that figures depend on, cores, threads, processor, and, if there is one, the GPU."""
    device: Mapping[str, Any] = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **{package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        **device,
    }
