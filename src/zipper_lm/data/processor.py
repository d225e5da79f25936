"""ZipperProcessor: the codecs beside a model. Raw documents in, batches out, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from zipper_lm.codecs.codec import Codec, load_codec
from zipper_lm.codecs.layout import LaidOut
from zipper_lm.codecs.pretrained import RunsModel
from zipper_lm.data.collation import Batch, Specials, collate
from zipper_lm.data.document import Document, Segment, check_modalities
from zipper_lm.utils.arguments import LOADING, SAVING, refuse
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.hub import HUB_ARGUMENTS, local_folder
from zipper_lm.utils.json_files import read_mapping

PROCESSOR_FILE = "processor_config.json"
CODEC_FOLDERS = "codecs"
"""Folder beside a model that holds one folder for each codec."""


_NOT_PUSHED = {"push_to_hub": "a processor goes along with its model: model.push_to_hub(...)"}
_CALLING = dict.fromkeys(
    ("text", "images", "audio", "videos", "return_tensors", "padding", "truncation", "max_length", "sampling_rate"),
    'a processor takes documents, as in processor([Document([("speech", "a.wav"), ("text", "a")])]), and pads them',
)


class ZipperProcessor:
    """One codec per tower, and collation.

    Args:
        codecs: by tower name. Towers without a codec can still be fed with ids.
        specials: special ids of every tower; `None` takes them from the codecs.
        lacking: by tower without a codec, why it has none, for whoever gives it a value.
    """

    def __init__(
        self,
        codecs: Mapping[str, Codec],
        specials: Mapping[str, Specials] | None = None,
        lacking: Mapping[str, str] | None = None,
    ) -> None:
        self.codecs, self.lacking = dict(codecs), dict(lacking or {})
        given = specials or {n: Specials(c.bos_id, c.eos_id, c.pad_id) for n, c in self.codecs.items()}
        self.specials = {name: Specials(*given[name]) for name in sorted(given)}
        if unknown := sorted(set(self.codecs) - set(self.specials)):
            raise ValueError(f"processor: codecs for {unknown}, but the towers are {list(self.specials)}")

    def __call__(
        self, documents: Sequence[Document], *, side: Literal["left", "right"] = "right", **kwargs: Any
    ) -> Batch:
        """Encode and collate.

        Raises:
            ValueError: as `encode`; for an argument of other processors, such as `text` or `return_tensors`.
        """
        refuse("processor", kwargs, _CALLING)
        return collate(self.encode(documents), self.specials, side=side)

    def encode(self, documents: Sequence[Document]) -> list[Document]:
        """Documents with ids in every segment; given ids are kept. The input is not changed.

        Raises:
            ValueError: for an unknown modality, a value its codec cannot read, a modality without a codec, or an id
                outside the codec's vocabulary; the message says which document.
        """
        check_modalities(documents, list(self.specials))
        waiting: dict[str, list[tuple[int, Segment]]] = defaultdict(list)
        encoded = []
        for number, document in enumerate(documents):
            copies = [replace(s) for s in document]
            encoded.append(Document(copies))
            for segment in copies:
                if segment.ids is None:
                    waiting[segment.modality].append((number, segment))
                elif (codec := self.codecs.get(segment.modality)) and segment.ids:
                    wrong = [i for i in segment.ids if not 0 <= i < codec.vocab_size]
                    if wrong:
                        raise ValueError(
                            f"document {number}: {segment.modality} id {wrong[0]} out of range, "
                            f"the codec has ids 0 to {codec.vocab_size - 1}"
                        )
        for name, entries in waiting.items():
            codec = self._codec(name)
            try:
                rows = codec.encode([segment.value for _, segment in entries])
            except ValueError:
                rows = [self._encode_one(codec, number, segment) for number, segment in entries]
            for (_, segment), ids in zip(entries, rows):
                segment.ids = list(ids)
        return encoded

    def _encode_one(self, codec: Codec, number: int, segment: Segment) -> list[int]:
        """Again one by one, to say which document is at fault."""
        try:
            return codec.encode([segment.value])[0]
        except ValueError as error:
            raise ValueError(f"document {number}: {segment.modality}: {error}") from error

    def decode(self, modality: str, ids: Sequence[Sequence[int]]) -> list[Any]:
        """Content ids of one modality back to raw values. Ids outside the content are left out."""
        codec = self._codec(modality)
        special = {codec.bos_id, codec.eos_id, codec.pad_id}
        # A tower may write ids that it has between its special ones and the codec's units.
        known = codec.layout.content if isinstance(codec, LaidOut) else range(codec.vocab_size)
        return codec.decode([[i for i in row if i in known and i not in special] for row in ids])

    def to(self, device: torch.device | str, only: str | None = None) -> Self:
        """Run the pre-trained models inside codecs (speech encoders, neural audio codecs, autoencoders) on a device; of
        all modalities, or of one."""
        for name, codec in self.codecs.items():
            if isinstance(codec, RunsModel) and only in (None, name):
                codec.to(device)
        return self

    def _codec(self, modality: str) -> Codec:
        if modality not in self.codecs:
            why = f": {self.lacking[modality]}" if modality in self.lacking else ""
            raise ValueError(f"no codec for modality {modality!r}{why}; the processor has {sorted(self.codecs)}")
        return self.codecs[modality]

    def push_to_hub(self, repo_id: str, **_: Any) -> None:
        """Not alone.

        Raises:
            ValueError: always: what is uploaded is a model, and its processor goes along.
        """
        raise ValueError(f"push_to_hub({repo_id!r}): a processor goes along with its model: model.push_to_hub(...)")

    def save_pretrained(self, save_directory: str | Path, *, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write `processor_config.json` and one folder per codec under ``codecs/``.

        Args:
            save_directory: made if missing. is_main_process: false: this process writes nothing.

        Raises:
            ValueError: for another argument of transformers' `save_pretrained`, or if the folder cannot be written.
        """
        refuse(f"{type(self).__name__}.save_pretrained", kwargs, SAVING | _NOT_PUSHED)
        if not is_main_process:
            return
        description = {"processor_class": type(self).__name__, "codecs": sorted(self.codecs), "specials": self.specials}
        with files_into(save_directory, last=PROCESSOR_FILE) as folder:
            for name, codec in self.codecs.items():
                codec.save_pretrained(folder / CODEC_FOLDERS / name)
            write_json(folder / PROCESSOR_FILE, description)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, codecs: Mapping[str, Codec] | None = None, **kwargs: Any
    ) -> ZipperProcessor:
        """Load from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            codecs: by tower, to take in place of those stored there, such as those of a class that only you have.
            kwargs: `revision`, `cache_dir`, `token`, `local_files_only`; `trust_remote_code`, for tokenizers.

        Raises:
            ValueError: if there is no processor there, or a codec of unknown kind.
        """
        hub = {k: kwargs.pop(k) for k in HUB_ARGUMENTS if k in kwargs}
        revision = kwargs.pop("revision", None)
        trust_remote_code = bool(kwargs.pop("trust_remote_code", False))
        for name in ("_from_auto", "_commit_hash"):  # of transformers' auto classes
            kwargs.pop(name, None)
        refuse(f"{cls.__name__}.from_pretrained", kwargs, LOADING)
        folder = local_folder(pretrained_model_name_or_path, revision, **hub)
        file = folder / PROCESSOR_FILE
        if not file.is_file():
            raise ValueError(f"no {PROCESSOR_FILE} in {pretrained_model_name_or_path}")
        description = read_mapping(file)
        names, specials = _described(description, file)
        given = dict(codecs or {})
        hub["trust_remote_code"] = trust_remote_code
        stored = {n: load_codec(folder / CODEC_FOLDERS / n, **hub) for n in names if n not in given}
        return cls(stored | given, specials)


def _described(description: Mapping[str, Any], file: Path) -> tuple[list[str], dict[str, Specials]]:
    """Whose codecs are stored beside a `processor_config.json`, and every tower's special ids.

    Raises:
        ValueError: if it does not say, or names a codec that is no tower's: of a name a folder is made on saving.
    """
    names, specials = description.get("codecs"), description.get("specials")
    if not isinstance(specials, dict) or not isinstance(names, list):
        raise ValueError(f"{file}: must hold codecs, a list of towers, and specials, a mapping of towers to ids")
    for name, ids in specials.items():
        if not name.isidentifier():  # as `fuse` asks for
            raise ValueError(f"{file}: {name!r} is no tower's name: it must be a plain word")
        if not (isinstance(ids, list) and len(ids) == len(Specials._fields) and all(type(i) is int for i in ids)):
            raise ValueError(f"{file}: specials of {name!r} must be {list(Specials._fields)} as ids, got {ids!r}")
    if unknown := [name for name in names if not isinstance(name, str) or name not in specials]:
        raise ValueError(f"{file}: codecs for {unknown}, but the towers are {sorted(specials)}")
    return names, {name: Specials(*ids) for name, ids in specials.items()}
