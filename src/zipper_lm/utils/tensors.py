"""Tensors by name: which are the same, which are lacking, and a hash that tells others from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def lacking_tensors(found: Mapping[str, Any]) -> list[str]:
    """Names of a model's tensors that transformers drew at random, because the checkpoint lacks them or has them in
    another shape; `found` is its loading info."""
    return sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})


def weights_hash(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """`tensors_hash` of a module's tensors."""
    return tensors_hash(module.state_dict(), dtype)


def tensors_hash(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, as hex. A tied tensor counts once.

    Args:
        tensors: of a backbone. dtype: to see the floating-point ones in; `None` takes them as they are.
    """
    digest = hashlib.sha256()
    for name, tensor in without_aliases(tensors).items():
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in stored(tensor.detach()):
            digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: itself, the codes and scales of a quantized one, or the shard that is
    here of one that is spread over processes."""
    if isinstance(tensor, DTensor):
        yield tensor.to_local()
    elif is_traceable_wrapper_subclass(tensor):
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, attribute))
    else:
        yield tensor


def without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sorted by name; of tensors that share their memory (tied embeddings) only the first."""
    seen: set[tuple[tuple[int, int], ...]] = set()
    kept = {}
    for name in sorted(tensors):
        # A quantized tensor's memory is that of its parts; address 0 is that of no memory, so it says nothing.
        key = tuple((part.data_ptr(), part.numel()) for part in stored(tensors[name]))
        if key not in seen or not all(address for address, _ in key):
            kept[name] = tensors[name]
        seen.add(key)
    return kept
