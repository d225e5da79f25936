"""The model card: what a checkpoint is, what it is made of, how it was trained and what it scored, from its records.

Nothing here is guessed: what no file says is said to be unknown. No path of the machine that wrote it gets in. Runs and
scores count only if they are of the very weights that lie beside them.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.constants import REPOCARD_NAME

from zipper_lm.models.card.body import parts
from zipper_lm.models.card.metadata import metadata
from zipper_lm.models.card.picture import draw
from zipper_lm.models.card.records import PICTURE_FILE, Records
from zipper_lm.utils.files import new_file

if TYPE_CHECKING:
    from zipper_lm.generation.writer import Writer

__all__ = ["PICTURE_FILE", "is_edited", "refresh_card"]

_SEAL = re.compile(r"\n<!-- written by zipper-lm, sha256 ([0-9a-f]{64}) -->\n\Z")


def refresh_card(folder: str | Path, model: Writer, *, kept: str | Path | None = None, name: str | None = None) -> bool:
    """Write a checkpoint's `README.md` and picture, unless somebody edited the card that is there.

    Args:
        folder: with `config.json`, `model.safetensors` and codecs. model: what they hold.
        kept: folder with the present card, `run.json`, `results.json` and `generation.json`; `None` is `folder`.
        name: what the model shall be loaded by, such as its Hub id; `None` is the name of the folder `kept`.

    Returns:
        Whether a card was written.
    """
    folder, kept = Path(folder), Path(kept or folder)
    if is_edited(kept / REPOCARD_NAME):
        return False
    records = Records(folder, kept, type(model.config))
    name = name or kept.resolve().name
    text = "\n\n".join(parts(model, name, records)) + "\n"
    card = f"---\n{metadata(model, name, records).to_yaml()}\n---\n{text}"
    seal = hashlib.sha256(card.encode()).hexdigest()
    with new_file(folder / PICTURE_FILE, overwrite=True) as picture:
        _draw(model, picture)
    with new_file(folder / REPOCARD_NAME, overwrite=True) as file:
        file.write_text(f"{card}\n<!-- written by zipper-lm, sha256 {seal} -->\n", encoding="utf-8")
    return True


def is_edited(file: Path) -> bool:
    """Whether a card is there that is not, to the letter, one that `refresh_card` wrote."""
    if not file.is_file():
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    seal = _SEAL.search(text)
    return seal is None or hashlib.sha256(text[: seal.start()].encode()).hexdigest() != seal[1]


def _draw(model: Writer, file: Path) -> None:
    towers = {}
    for name, spec in model.config.tower_specs.items():
        towers[name] = (f"{spec.architecture}, {spec.train}", model.depths()[name])
    if len(towers) == 1:  # one decoder has all modalities
        towers = {" + ".join(model.names): next(iter(towers.values()))}
    draw(file, towers, model.layer_pairs)
