"""What writes documents, and whatever trains, scores or shares one needs of it: two models have this face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from zipper_lm.data.collation import Batch, Specials
from zipper_lm.data.document import Document

if TYPE_CHECKING:
    from zipper_lm.data.processor import ZipperProcessor


class Modalities(Protocol):
    """What has several modalities, each with ids of its own.

    Attributes:
        config: the model's. processor: the codecs, where there are any. generation_settings: by modality, those kept
            beside the model.
    """

    config: Any
    processor: ZipperProcessor | None
    generation_settings: dict[str, dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """The modalities."""

    @property
    def specials(self) -> dict[str, Specials]:
        """Each modality's special ids."""

    def check_ids(self, name: str, low: int, high: int) -> None:
        """Raise `ValueError` if ids from `low` to `high` are not all ids of a modality."""


class Writer(Modalities, Protocol):
    """Towers and zips (`ZipperModel`), or the single decoder that they are compared with (`SingleDecoder`).

    Attributes:
        config: with `tower_specs`: by name, what is known of each pre-trained decoder.
        layer_pairs: by (reader, source), the pairs (reader's layer, source's layer); none in a single decoder.
        training: as of any module.
    """

    layer_pairs: dict[tuple[str, str], list[tuple[int, int]]]
    training: bool

    def backbones(self) -> dict[str, PreTrainedModel]:
        """The pre-trained decoders, by the names of `config.tower_specs`."""

    def depths(self) -> dict[str, int]:
        """How many layers each of them has."""

    def check_packing(self) -> None:
        """Raise `ValueError` if it does not read documents that share a row as each alone."""

    def target_counts(self, batch: Batch) -> dict[str, Tensor]:
        """How many targets a batch has for each part of the loss, int64 scalars."""

    def unimodal_loss(self, name: str, rows: Sequence[Sequence[int]]) -> tuple[float, int]:
        """Summed next-token loss in nats over rows of one modality alone, and how many tokens that is."""

    def generate(self, documents: Sequence[Document], schedule: Any, **how: Any) -> list[Document]:
        """Write the next segments; see `zipper_lm.generation.generate.generate`."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        bundle_towers: Any = False,
        card: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint, whole or not at all."""

    def load_own(self, file: Path) -> None:
        """Copy a checkpoint's tensors into the model."""

    def gates(self) -> dict[str, float]:
        """tanh of every gate, by ``reader<-source.k``."""

    def step_flops(self, batch: Batch) -> int:
        """An estimate of what a training step on a batch takes."""

    def trained_vocabularies(self) -> dict[str, int]:
        """Number of ids of every modality whose decoder is trained."""

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """Those that have a learning rate of their own."""

    def stream(self, document: Any, schedule: Any, **how: Any) -> Iterator[Any]:
        """Write one document, token by token; see `zipper_lm.generation.generate.stream`."""

    def describe_training(self) -> str:
        """In words, how it is trained."""

    # As of any module:

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def eval(self) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    @property
    def to(self) -> Callable[..., Any]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
