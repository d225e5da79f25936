"""Whatever model a folder or Hub id holds: towers and zips, or the single decoder they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipper_lm.models.baseline.config import is_single_decoder
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.utils.hub import local_folder

if TYPE_CHECKING:
    from zipper_lm.generation.writer import Writer


def load(source: str | Path, *, dtype: Any = None, trust_remote_code: bool = False) -> Writer:
    """Load a model with its processor, onto the GPU if there is one.

    Args:
        source: folder or Hub id.
        dtype: of the decoders, such as `torch.bfloat16` or its name; `None` is that in which they were saved.
        trust_remote_code: let towers that have code of their own run it.

    Raises:
        ValueError: as `ZipperModel.from_pretrained`.
    """
    owner = SingleDecoder if is_single_decoder(local_folder(source)) else ZipperModel
    return owner.from_pretrained(source, device_map="auto", dtype=dtype, trust_remote_code=trust_remote_code)
