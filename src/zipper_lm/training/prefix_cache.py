"""`training.prefix_cache`: what a frozen tower computes of a document below its first zip is computed once.

Before training, the streams that the tower will read are gone through, and their states computed and kept
(`prefix_store.py`). In training a batch brings those of its rows along, and the layers below answer without computing
(`zipper_lm.fusion.prefix`). A batch with a stream of which nothing is kept is computed as ever: it gives the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import psutil
import torch
from rich.console import Console
from torch import Tensor

from zipper_lm.data.collation import ABSENT, Batch, Specials, tokens_of
from zipper_lm.data.document import Document
from zipper_lm.fusion.fields import plain
from zipper_lm.fusion.interface import FINE
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.prefix import check_prefix, prefix_depths, prefix_states
from zipper_lm.fusion.tower_spec import config_hash
from zipper_lm.training.corruption import share_of
from zipper_lm.training.prefix_store import PrefixStore, files_limit, key_of, make_room, mark_used, write_states
from zipper_lm.utils.files import sweep
from zipper_lm.utils.processes import any_of, on_this_machine, rank_of
from zipper_lm.utils.progress import bar, barred, plain_console
from zipper_lm.utils.tensors import weights_hash

T = TypeVar("T")
PrefixMode = Literal["memory", "disk"]
Streams = dict[bytes, np.ndarray]
"""Distinct streams of one tower: key to ids, int32 ``[time]``."""

TOGETHER = 8192
"""Tokens that are computed at once, at most; a longer stream alone."""

PART_BYTES = 256 << 20
"""Of states in one file or tensor, at most; those of a longer stream alone."""

SPARE = 0.1
"""Share of the free memory or disk that is left free."""


class _Settings(Protocol):
    """Of a tower, in a recipe or in a model's config."""

    @property
    def train(self) -> str: ...
    @property
    def input_projection(self) -> str: ...
    @property
    def input_projection_layer(self) -> int | str: ...


def modes_of(
    wanted: PrefixMode | Mapping[str, PrefixMode],
    towers: Mapping[str, _Settings],
    corrupt: float | Mapping[str, float] = 0.0,
) -> dict[str, PrefixMode]:
    """The towers whose states are to be kept, and where, as far as settings say.

    Args:
        wanted: of all frozen towers, or by name.
        towers: all of them.
        corrupt: as of `CorruptedDocuments`.

    Raises:
        ValueError: naming the field that keeps a tower from it: if it is not frozen, has its input projection at its
            embeddings, or reads noise; if there is no frozen tower.
    """
    if isinstance(wanted, str):
        kept = {name: wanted for name, tower in towers.items() if tower.train == "frozen"}
        if not kept:
            trained = {name: tower.train for name, tower in towers.items()}
            raise ValueError(
                f"training.prefix_cache is for frozen towers; all are trained (towers.NAME.train): {trained}"
            )
    else:
        kept = dict(wanted)
    for name, mode in kept.items():
        if name not in towers:
            raise ValueError(f"training.prefix_cache names {name!r}, but the towers are {list(towers)}")
        if mode not in get_args(PrefixMode):
            raise ValueError(f"training.prefix_cache must be 'memory' or 'disk', got {mode!r} for {name!r}")
        where, tower = f"training.prefix_cache: tower {name!r}", towers[name]
        if tower.train != "frozen":
            raise ValueError(f"{where} is trained (towers.{name}.train is {tower.train!r}): its states change")
        if lost := share_of(corrupt, name):
            raise ValueError(
                f"{where} reads noise, drawn anew in each epoch (training.corrupt is {lost} for it); set that to 0 for "
                f"{name!r}, or name other towers"
            )
        if tower.input_projection != "none" and tower.input_projection_layer == 0:
            raise ValueError(
                f"{where} has its input projection before its first layer (towers.{name}.input_projection is "
                f"{tower.input_projection!r}), so nothing above that stays the same; set "
                f"towers.{name}.input_projection_layer to first_zip (above layer 0) or input_projection to none, or "
                "name other towers"
            )
    return kept


def towers_kept(
    model: Any,
    wanted: PrefixMode | Mapping[str, PrefixMode] | None,
    corrupt: float | Mapping[str, float] = 0.0,
) -> dict[str, PrefixMode]:
    """The towers of a model whose states are kept, and where.

    Args:
        model: that is trained. wanted, corrupt: as of `modes_of`; `None`: nothing is kept.

    Raises:
        ValueError: as `modes_of`; for a single decoder; if a tower's family does not go on from states.
    """
    if wanted is None:
        return {}
    if not isinstance(model, ZippedTowers):
        raise ValueError("training.prefix_cache is for zipped towers; a single decoder is trained")
    kept = modes_of(wanted, model.config.tower_specs, corrupt)
    for name in kept:
        check_prefix(model.tower(name), prefix_depths(model, name))
    return kept


class PrefixCache:
    """What is kept of all towers, and how it gets into a batch.

    Args:
        stores: by tower.
    """

    def __init__(self, stores: Mapping[str, PrefixStore] | None = None) -> None:
        self.stores = dict(stores or {})

    def fill(self, batch: Batch) -> Batch:
        """The batch with the states of its rows, of each tower of which they are there for all rows."""
        for name, store in self.stores.items():
            if name in batch and (known := _known(batch[name], store)) is not None:
                batch[name]["known"] = known
        return batch


def _known(stream: Mapping[str, Tensor], store: PrefixStore) -> Tensor | None:
    ids, here = stream["input_ids"].numpy(), (stream["segments"] != ABSENT).numpy()
    documents = stream["documents"].numpy() if "documents" in stream else np.broadcast_to(0, ids.shape)
    known = torch.zeros(*ids.shape, store.kept, store.width, dtype=store.dtype)
    for row in range(len(ids)):
        tokens = here[row].nonzero()[0]
        ends = np.diff(documents[row][tokens]).nonzero()[0] + 1  # of documents but the last
        for part in np.split(tokens, ends):
            if not len(part):
                continue
            if (states := store.of(key_of(ids[row][part]))) is None:
                return None
            known[row, part[0] : part[-1] + 1] = states
    return known


def keep_prefixes(
    model: ZippedTowers,
    kept: Mapping[str, PrefixMode],
    documents: Any,
    folder: Path | None = None,
    console: Console | None = None,
    precision: AbstractContextManager[Any] | None = None,
) -> PrefixCache:
    """Compute the states that are not there yet, in all processes.

    Args:
        model: where it is trained. kept: from `towers_kept`.
        documents: map-style, encoded; if it has `forms(index)`, these are all documents that a row may become.
        folder: of the files of states; for the disk.
        console: where progress is told; `None`: nowhere.
        precision: autocast, as training computes in.

    Raises:
        ValueError: if states do not fit, with the numbers; naming a file of states that is not right; without a folder,
            or a limit that is one (`prefix_store.files_limit`).
    """
    limit = 0.0
    if "disk" in kept.values():
        if folder is None:
            raise ValueError("training.prefix_cache: disk needs a folder for the files of states (prefix_folder)")
        limit = files_limit()
    console = console or plain_console(quiet=True)
    stores = {}
    streams = _streams(documents, list(kept), model.specials, console) if kept else {}
    with precision or nullcontext():
        for name, mode in kept.items():
            keeper = _Keeper(model, name, console)
            if mode == "memory":
                keeper.into_memory(streams[name])
            else:
                assert folder is not None
                keeper.onto_disk(streams[name], folder, limit)
            stores[name] = keeper.store
    return PrefixCache(stores)


def _streams(
    documents: Any, names: Sequence[str], specials: Mapping[str, Specials], console: Console
) -> dict[str, Streams]:
    """The distinct streams of each tower in all documents."""
    found: dict[str, Streams] = {name: {} for name in names}
    forms = getattr(documents, "forms", None) or (lambda index: [documents[index]])
    for index in barred(range(len(documents)), console, "documents to keep states of"):
        for name, ids in (pair for document in forms(index) for pair in _read_by(document, names, specials)):
            found[name].setdefault(key_of(ids), ids)
    return found


def _read_by(
    document: Document, names: Sequence[str], specials: Mapping[str, Specials]
) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        parts = [tokens_of(segment, specials[name]) for segment in document if segment.modality == name]
        if parts:
            yield name, np.concatenate([np.asarray(part, np.int32) for part in parts])


class _Keeper:
    """Fills the store of one tower."""

    def __init__(self, model: ZippedTowers, name: str, console: Console) -> None:
        self.tower, self.name, self.console = model.tower(name), name, console
        self.depths = prefix_depths(model, name)
        probe = prefix_states(self.tower, self.depths, torch.full((1, 1), model.specials[name].bos))
        self.store = PrefixStore(len(self.depths), probe.shape[-1], probe.dtype)
        self.token_bytes = probe.element_size() * probe[0, 0].numel()

    def into_memory(self, streams: Streams) -> None:
        """All of the streams; several processes keep all of them each."""
        self._announce(streams, 0, on_this_machine(), psutil.virtual_memory().available, "memory")
        for keys, lengths, states in self._parts(streams):
            self.store.add(keys, lengths, states)

    def onto_disk(self, streams: Streams, folder: Path, limit: float) -> None:
        """Those that no file has yet; several processes compute a share each, of what all of them found lacking.

        Args:
            streams: all of them. folder: of the files of all towers. limit: bytes that these may take.
        """
        fingerprint = self._fingerprint()
        place = folder / f"{self.name}-{fingerprint[:16]}"
        files: set[Path] = set()

        def read(check: bool = False) -> Streams:
            """Read files that are new here; the streams that none has."""
            for file in sorted({*place.glob("*.safetensors")} - files):
                files.add(file)
                try:
                    keys = self.store.read(file, fingerprint)
                except FileNotFoundError:  # another run has made room
                    continue
                if check:
                    self._check(file, keys, streams)
                if not streams.keys().isdisjoint(keys):
                    mark_used(file)
            return {key: ids for key, ids in streams.items() if key not in self.store}

        def write(share: Streams) -> None:
            for part in self._parts(share):
                write_states(place, fingerprint, *part)

        def begin() -> Streams:
            if place.is_dir():
                sweep(place)
            lacking = read(check=True)
            coming = sum(len(ids) for ids in lacking.values()) * self.token_bytes
            if deleted := make_room(folder, coming, limit):
                self.console.print(f"states that were used the longest ago: {_gib(deleted)} deleted in {folder}")
            free = shutil.disk_usage(next(p for p in (place, *place.absolute().parents) if p.exists())).free
            self._announce(lacking, len(streams) - len(lacking), 1, free, f"files in {place}")
            return lacking

        rank, processes = rank_of()
        lacking = self._in_all(begin)  # in all of them, before one writes a file that another would find
        self._in_all(lambda: write(dict(_by_length(lacking)[rank::processes])))
        if processes > 1 and (elsewhere := read()):  # shares of processes whose disk this one does not see
            write(elsewhere)
        read()

    def _in_all(self, work: Callable[[], T]) -> T:
        """Do it in all processes; when all are done, go on, or raise where one failed: others would wait for it."""
        problem: Exception | None = None
        try:
            done = work()
        except Exception as error:
            problem = error
        if any_of(problem is not None):
            raise problem or ValueError(f"training.prefix_cache: {self.name!r} failed in another process")
        return done

    def _announce(self, streams: Streams, there: int, times: int, free: int, where: str) -> None:
        """Say how large it will be. Raises `ValueError` if it does not fit."""
        tokens = sum(len(ids) for ids in streams.values())
        size = tokens * self.token_bytes * times
        told = f"{len(streams)} streams, {tokens} tokens, {len(self.depths)} states of {self.store.width} each"
        told += f", {_gib(size)}" + (f" in {times} processes" if times > 1 else "")
        if size > (1 - SPARE) * free:
            raise ValueError(
                f"training.prefix_cache: the states of {self.name!r} ({told}) do not fit into {where}, which has "
                f"{_gib(free)} free"
            )
        if there:
            self.console.print(f"states of {self.name!r} below its first zip: {there} streams are there")
        if streams:
            self.console.print(f"states of {self.name!r} below its first zip: {told}, {where}", soft_wrap=True)

    def _parts(self, streams: Streams) -> Iterator[tuple[list[bytes], list[int], Tensor]]:
        """Computed part by part: keys, lengths, and states ``[tokens, kept, hidden]`` on the CPU."""
        most = max(1, PART_BYTES // self.token_bytes)
        done, total = 0, sum(len(ids) for ids in streams.values())
        with bar(self.console, f"states of {self.name}") as advance:
            advance(0, total)
            for part in _cut(_by_length(streams), most):
                keys, lengths = [key for key, _ in part], [len(ids) for _, ids in part]
                states = torch.empty(sum(lengths), self.store.kept, self.store.width, dtype=self.store.dtype)
                start = 0
                for rows in _alike(part):
                    made = self._compute([ids for _, ids in rows])
                    states[start : start + len(made)] = made
                    start += len(made)
                    advance(done + start, total)
                done += start
                yield keys, lengths, states

    def _compute(self, rows: Sequence[np.ndarray]) -> Tensor:
        """States of streams of one length, one behind the other: no padding, so it does not matter with whom."""
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return prefix_states(self.tower, self.depths, ids).flatten(0, 1).cpu()

    def _fingerprint(self) -> str:
        """Of all that decides what the states are: weights, config, layers, dtype; not of the ids, which are keys."""
        kind, backbone = self.tower.device.type, self.tower.backbone
        half = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        config = config_hash(plain(backbone.config.to_dict()))
        told = [weights_hash(backbone), config, self.depths, str(self.store.dtype), half]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _check(self, file: Path, keys: Sequence[bytes], streams: Streams) -> None:
        """Compute one stream of a file that was there again. Raises `ValueError` if it gives something else."""
        if (key := next((key for key in reversed(keys) if key in streams), None)) is None:
            return
        kept, made = self.store.of(key), self._compute([streams[key]]).float()
        if kept is None or not (kept.float() - made).abs().max() <= FINE * made.abs().max():
            raise ValueError(f"{file}: its states are not what tower {self.name!r} computes; delete it")


def _by_length(streams: Streams) -> list[tuple[bytes, np.ndarray]]:
    """From the longest to the shortest: what does not fit into memory is seen at once. In an order of their own."""
    return sorted(streams.items(), key=lambda item: (-len(item[1]), item[0]))


def _cut(streams: Iterable[tuple[bytes, np.ndarray]], most: int) -> Iterator[list[tuple[bytes, np.ndarray]]]:
    """Parts of at most so many tokens; a longer stream alone."""
    part: list[tuple[bytes, np.ndarray]] = []
    tokens = 0
    for key, ids in streams:
        if part and tokens + len(ids) > most:
            yield part
            part, tokens = [], 0
        part.append((key, ids))
        tokens += len(ids)
    if part:
        yield part


def _alike(part: Sequence[tuple[bytes, np.ndarray]]) -> Iterator[list[tuple[bytes, np.ndarray]]]:
    """Neighbours of one length, as many as are computed together."""
    begin = 0
    for end in range(1, len(part) + 1):
        length = len(part[begin][1])
        if end == len(part) or len(part[end][1]) != length or (end - begin + 1) * length > TOGETHER:
            yield list(part[begin:end])
            begin = end


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.3g} MiB"
