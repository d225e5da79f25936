"""The codec protocol: raw values of one modality <-> token ids. One file per codec implements it."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from zipper_lm.utils.hub import HUB_ARGUMENTS
from zipper_lm.utils.json_files import read_mapping

if TYPE_CHECKING:
    from torch import Tensor

CODEC_FILE = "codec.json"
ENTRY_POINTS = "zipper_lm.codecs"
"""Entry point group in which other packages name their codecs: kind = "module:Class"."""
_CIRCUMSTANCES = ("is_local", "local_files_only", "name_or_path", "_name_or_path", "transformers_version")
"""Keys of transformers' files that say how something was loaded, not what it is."""
_DECODING = ("vocoder", "speaker", "decoder")
"""Folders of a codec, and keys of its `codec.json`, that no id depends on."""


@runtime_checkable
class Codec(Protocol):
    """What a modality needs beside its tower.

    Ids returned by `encode` and taken by `decode` are content only: no BOS, no EOS, no padding. Every id,
    the special ones included, lies in ``[0, vocab_size)``.
    """

    kind: ClassVar[str]
    """Name of the codec's class in its `codec.json`, such as ``"text"``."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ids included: what the tower's vocabulary must hold at least."""

    @property
    def bos_id(self) -> int:
        """Id that opens every segment."""

    @property
    def eos_id(self) -> int:
        """Id that ends every segment."""

    @property
    def pad_id(self) -> int:
        """Id that fills batches; masked everywhere, so it may equal another special id."""

    @property
    def rate(self) -> float | None:
        """Tokens per second of the raw value, or `None` where there is no time."""

    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Raw values to content ids, one list per value. Raises `ValueError` on a value it cannot read."""

    def decode(self, ids: Sequence[Sequence[int]]) -> list[Any]:
        """Content ids to raw values, one per row."""

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` and whatever else (safetensors, tokenizer.json) into the folder `path`."""

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Codec:
        """Read what `save_pretrained` wrote."""


CODECS = {
    "text": "zipper_lm.codecs.text:TextCodec",
    "speech": "zipper_lm.codecs.speech:SpeechCodec",
    "hubert-units": "zipper_lm.codecs.hubert_units:HubertUnits",
    "speech-units": "zipper_lm.codecs.hubert_units:HubertUnits",
    "neural-audio": "zipper_lm.codecs.neural_audio:NeuralAudioCodec",
    "pixels": "zipper_lm.codecs.pixels:PixelCodec",
    "color-clusters": "zipper_lm.codecs.color_clusters:ColorClusters",
    "vq-image": "zipper_lm.codecs.vq_image:VqImageCodec",
    "sequence": "zipper_lm.codecs.sequence:SequenceCodec",
}
"""This package's own codecs: kind to class; a codec with two names is saved by its class's. Beside the protocol each
has a class method for recipes, ``make(values, *, source, revision, seed, **options)``: values to fit on (may be empty),
a folder or Hub id, what else the kind takes; one that loads from the Hub also takes
`zipper_lm.utils.hub.HUB_ARGUMENTS`."""

PICTURE_KINDS = frozenset(("pixels", "color-clusters", "vq-image"))
"""Kinds of codecs that decode to pictures."""

SPELLING_KINDS = frozenset(("hubert-units", "speech-units"))
"""Kinds that may be fitted on what the values say, too: their `make` takes ``texts``."""


def load_codec(path: str | Path, *, trust_remote_code: bool = False, **hub: Any) -> Codec:
    """Load any codec from its folder: one of this package, or one that an installed package names as an entry point.

    Args:
        path: the folder. trust_remote_code: let a tokenizer that has code of its own run it.
        hub: `cache_dir`, `token`, `local_files_only`, for a codec whose model is on the Hub.

    Raises:
        ValueError: if the folder has no `codec.json`, or its `kind` is unknown.
    """
    file = Path(path) / CODEC_FILE
    if not file.is_file():
        raise ValueError(f"codec: no {CODEC_FILE} in {path}")
    kind = read_mapping(file).get("kind")
    others = entry_points(group=ENTRY_POINTS)
    if not isinstance(kind, str) or kind not in {*CODECS, *others.names}:
        raise ValueError(
            f"codec: {file} has kind {kind!r}; known kinds are {sorted({*CODECS, *others.names})}; "
            "if its class is at hand, pass codecs={name: codec}"
        )
    if kind in CODECS:
        owner = own_codec(kind)
        wanted = inspect.signature(owner.from_pretrained).parameters
        known = {"trust_remote_code": trust_remote_code} if "trust_remote_code" in wanted else {}
        return owner.from_pretrained(path, **known, **(hub if "hub" in wanted else {}))
    return others[kind].load().from_pretrained(path)


def read_codec_file(path: str | Path, kind: str) -> dict[str, Any]:
    """What the `codec.json` in the folder `path` says beside its kind.

    Raises:
        ValueError: if there is none, or it is of another kind.
    """
    file = Path(path) / CODEC_FILE
    if not file.is_file():
        raise ValueError(f"{kind} codec: no {CODEC_FILE} in {path}")
    fields = read_mapping(file)
    if fields.pop("kind", None) != kind:
        raise ValueError(f"{file}: kind is not {kind!r}")
    return fields


def can_decode(codec: Codec) -> bool:
    """Whether a codec has a way back to raw values. One that may have none says so by a property of this name."""
    return bool(getattr(codec, "can_decode", True))


def unit_vectors(codec: Codec) -> tuple[range, Tensor] | None:
    """Ids of a codec's units, and the vectors, float32 [units, width], of whose codebook they are; `None` where there
    are none. A codec that has some says so by a property of this name."""
    found: tuple[range, Tensor] | None = getattr(codec, "unit_vectors", None)
    return found


def looked_up(codec: Codec) -> Codec | None:
    """The codec without its trained way back: what it would decode to by look-up alone. `None` where it has none to put
    aside. A codec that has one says so by a property of this name."""
    found: Codec | None = getattr(codec, "looked_up", None)
    return found


def own_codec(kind: str) -> Any:
    """One of this package's codec classes; its module is imported only now."""
    module, _, name = CODECS[kind].partition(":")
    return getattr(import_module(module), name)


def make_codec(
    kind: str,
    values: Sequence[Any] = (),
    *,
    texts: Sequence[str | None] | None = None,
    source: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Codec:
    """A codec as a recipe describes it: one that was saved, one around a pre-trained model, or one fitted on values.

    Args:
        kind: of `CODECS`; not needed where `source` holds a `codec.json`.
        values: raw values to fit on, where the kind is fitted and no `source` is given.
        texts: what each value says, `None` for one that is not known; only `SPELLING_KINDS` heed it.
        source: folder of a saved codec, or folder or Hub id of the model or tokenizer inside it.
        revision: on the Hub. seed: of the fit. options: what the kind takes (docs/codecs.md), `cache_dir`, `token` and
            `local_files_only` among them if it loads from the Hub.

    Raises:
        ValueError: on an unknown kind or option, a source that cannot be loaded, or too little data.
    """
    if source is not None and (Path(source) / CODEC_FILE).is_file():
        if unused := sorted(set(options) - {"trust_remote_code", *HUB_ARGUMENTS}):
            raise ValueError(f"codec.options {unused} have no effect: {source} holds a codec that is made")
        return load_codec(source, **options)
    if kind not in CODECS:
        raise ValueError(f"codec.kind {kind!r} is unknown; it is one of {sorted(CODECS)}")
    if texts is not None and len(texts) != len(values):
        raise ValueError(f"codec: {len(texts)} texts for {len(values)} values")
    known = {"texts": texts} if texts is not None and kind in SPELLING_KINDS else {}
    try:
        return own_codec(kind).make(values, **known, source=source, revision=revision, seed=seed, **options)
    except TypeError as error:
        raise ValueError(f"codec.options: {error}") from error


def codec_hash(codec: Codec) -> str:
    """SHA-256 (64 hex digits) over what a codec's `save_pretrained` writes: names and contents of its files, without
    what only says how or from where a tokenizer or model was loaded, and without voices."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        codec.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = file.read_bytes()
            if file.relative_to(folder).parts[0] in _DECODING:
                continue
            if file.suffix == ".json" and isinstance(fields := json.loads(content), dict):
                left_out = (*_CIRCUMSTANCES, *(_DECODING if file.name == CODEC_FILE else ()))
                kept = {key: value for key, value in fields.items() if key not in left_out}
                model = kept.get("model")
                if file.name == CODEC_FILE and isinstance(model, dict) and model.get("weights_hash"):
                    kept["model"] = model["weights_hash"]  # wherever it came from
                content = json.dumps(kept, sort_keys=True).encode()
            for part in (file.relative_to(folder).as_posix().encode(), content):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
