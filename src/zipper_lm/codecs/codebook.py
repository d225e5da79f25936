"""A published codebook: the centroids of a k-means, from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor

from zipper_lm.utils.hub import reaching


def read_codebook(codebook: str, source: str, revision: str | None = None, **hub: Any) -> Tensor:
    """Centroids, float32 [K, width].

    Args:
        codebook: path, or the name of a file inside `source`: `.npy`, `.safetensors`, or `.pt` and `.bin`, which hold
            one matrix. Nothing is unpickled that could run code.
        source: folder or Hub id. revision: on the Hub. hub: `cache_dir`, `token`, `local_files_only`.

    Raises:
        ValueError: if it is not there, cannot be read, or does not hold exactly one matrix.
    """
    file = next((f for f in (Path(codebook), Path(source) / codebook) if f.is_file()), None)
    if file is None and Path(source).is_dir():
        raise ValueError(f"codebook {codebook!r}: no such file here nor in {source}")
    if file is None:
        with reaching(f"codebook {codebook!r} of", source, revision):
            file = Path(hf_hub_download(source, codebook, revision=revision, **hub))
    try:
        content: Any
        if file.suffix == ".npy":
            content = torch.from_numpy(np.load(file, allow_pickle=False))
        elif file.suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # numpy, safetensors, zip files and the restricted unpickler each have their own kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"codebook {file}: cannot be read as .npy, .safetensors or plain tensors ({first}); docs/codecs.md says "
            "how to convert one that scikit-learn pickled"
        ) from error
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    matrices = [t for t in tensors if isinstance(t, Tensor) and t.ndim == 2]
    if len(matrices) != 1:
        raise ValueError(f"codebook {file}: must hold one matrix [units, width], holds {len(matrices)}")
    return matrices[0].float()
