"""What training spoils on purpose: ids in what is read, never in what the loss expects."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import Dataset

from zipper_lm.data.buffered import Placed
from zipper_lm.data.collation import Specials, longest_stream
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.token_ids import TokenIds

SHORT = 8
"""A given segment of fewer tokens is not corrupted: a short text has no redundancy to lose."""
TRIED = 8
"""Documents that are looked at for one in which a frozen tower writes, of tasks that may be others."""


def share_of(shares: float | Mapping[str, float], name: str) -> float:
    """One's, of one share for all or of shares by name, which are 0 where they are missing."""
    return shares.get(name, 0.0) if isinstance(shares, Mapping) else shares


class Again(Document):
    """A document that is read again by a process that has none left, and that nothing is learned from."""


class CorruptedDocuments(Dataset[Document]):
    """Documents with noise in what is read, never in what the loss expects.

    - Given segments lose a share of their tokens (padding in their place), against overfitting.
    - Target segments of towers that are trained have a share of their own history replaced by random ids (word
      dropout, Bowman et al. 2016, arXiv 1511.06349, section 3.1). A tower that can go on from its own last tokens alone
      has little reason to look through its zips; one that cannot trust them has. A frozen tower cannot learn to cope,
      and is spared, unless it is named: then its zips learn to go on after a slip. What it reads wrongly are ids that
      stand in another document, as it has sense for what is written alone; the same in each epoch, so that what it
      computes of them need be computed once (`prefix_cache`).

    What is hit depends on nothing but seed, epoch and index: a resumed run goes on as if it had never stopped.

    Args:
        documents: map-style, encoded; told the epoch too, if it wants to know.
        specials: each tower's special ids.
        corrupt: share of given segments' ids that is lost; of all, or by modality, 0 where it is missing.
        history_dropout: share of target segments' ids that their tower reads wrongly; of all that are trained, or by
            modality, frozen ones too, 0 where it is missing.
        sizes: number of ids, to draw wrong ones from, of the towers that are trained.
        seed: of what is hit.
    """

    def __init__(
        self,
        documents: Dataset[Document],
        specials: dict[str, Specials],
        *,
        corrupt: float | Mapping[str, float],
        history_dropout: float | Mapping[str, float],
        sizes: dict[str, int],
        seed: int,
    ) -> None:
        self.documents, self.specials, self.seed = documents, specials, seed
        self.corrupt, self.history_dropout, self.sizes = corrupt, history_dropout, sizes
        # In shared memory: workers that outlive an epoch (persistent_workers) see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw as in this epoch from now on. Accelerate's loaders call it."""
        self._epoch.fill_(epoch)
        if hasattr(self.documents, "set_epoch"):
            self.documents.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.documents)  # type: ignore[arg-type]

    def lengths(self) -> np.ndarray:
        """Tokens of the longest stream of each document in this epoch, int64 [documents]; noise changes none."""
        if hasattr(self.documents, "lengths"):
            return self.documents.lengths()
        return np.array([longest_stream(self.documents[index]) for index in range(len(self))], np.int64)

    def forms(self, index: int) -> list[Document]:
        """The documents that one may be, as far as that is known, with no noise but what frozen towers misread."""
        return [
            Document(self._noisy(s, once) if self._is_read_by_a_frozen_one(s) else s for s in document)
            for document, once in ((document, self._once(index)) for document in self._plain_forms(index))
        ]

    def _plain_forms(self, index: int) -> list[Document]:
        return self.documents.forms(index) if hasattr(self.documents, "forms") else [self.documents[index]]

    def _once(self, index: int) -> np.random.Generator:
        """What is drawn of a document once for all epochs."""
        return np.random.default_rng((self.seed, index, 2))

    def _is_read_by_a_frozen_one(self, segment: Segment) -> bool:
        return segment.target and segment.modality not in self.sizes

    def __getitem__(self, index: int) -> Document:
        """A document by its number; ``~number`` is the same one, read again for nothing (`order.Evened`)."""
        if index < 0:
            return Again(self[~index])
        document = self.documents[index]
        if not (self.corrupt or self.history_dropout):
            return document
        draw, once = np.random.default_rng((self.seed, int(self._epoch), index, 1)), self._once(index)
        noisy = Document(self._noisy(s, once if self._is_read_by_a_frozen_one(s) else draw) for s in document)
        return Placed(noisy, document.place) if isinstance(document, Placed) else noisy

    def _noisy(self, segment: Segment, draw: np.random.Generator) -> Segment:
        ids, name = np.asarray(segment.ids or [], np.int32), segment.modality
        share = self._misread(name) if segment.target else share_of(self.corrupt, name)
        if not share or not (segment.target or len(ids) >= SHORT):
            return segment
        hit = draw.random(len(ids)) < share
        if not segment.target:
            return Segment(name, ids=TokenIds(np.where(hit, np.int32(self.specials[name].pad), ids)))
        wrong = self._wrong(name, ids, draw)
        keep = ~hit | (wrong[:, None] == self.specials[name]).any(1)  # a special id means something else
        return Segment(name, ids=TokenIds(np.where(keep, ids, wrong)), labels=TokenIds(ids), target=True)

    def _misread(self, name: str) -> float:
        """The share of its own history that a tower reads wrongly."""
        spared = not isinstance(self.history_dropout, Mapping) and name not in self.sizes
        return 0.0 if spared else share_of(self.history_dropout, name)

    def _wrong(self, name: str, ids: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """As many ids, int64, that a tower may read in place of its own."""
        if name in self.sizes:
            return draw.integers(self.sizes[name], size=len(ids))
        return draw.choice(self._written_elsewhere(name, draw) or ids.tolist(), size=len(ids))

    def _written_elsewhere(self, name: str, draw: np.random.Generator) -> list[int]:
        """The ids that a tower writes in another document; none, if it writes in none of those that were tried."""
        for index in draw.integers(len(self), size=TRIED).tolist():
            for other in self._plain_forms(index):  # whatever an epoch makes of it
                if written := [i for s in other if s.modality == name and s.target for i in (s.ids or [])]:
                    return written
        return []
