"""The baseline: one decoder whose vocabulary is expanded by the other modalities' ids, and one stream of tokens.

It is the paper's single decoder (arXiv 2405.18669, section 3): the same backbone as Zipper's tower of the base
modality, with embeddings and head enlarged, trained on the same documents with the same losses. It has Zipper's face
(`names`, `specials`, `processor`, `forward(batch)`, `generate(documents, schedule)`), so the same trainer, scores and
commands serve both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, GenerationConfig, PreTrainedModel

from zipper_lm.data.batch_check import check_batch
from zipper_lm.data.collation import IGNORED, Batch, Specials, batch_on_host, collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.packing import places
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.fusion.backbones import (
    add_adapters,
    blank_backbone,
    check_no_kernels,
    from_config,
)
from zipper_lm.fusion.document_model import DocumentModel
from zipper_lm.fusion.head import Last, are_many, head_of, tokens_at_once
from zipper_lm.fusion.interface import FEW, learn
from zipper_lm.fusion.loss import Targets, ZipperOutput, share
from zipper_lm.fusion.packing import check_packing
from zipper_lm.fusion.tower import listening
from zipper_lm.fusion.tower_spec import backbone_config
from zipper_lm.generation import generate
from zipper_lm.generation.arguments import (
    Given,
    Schedule,
    Settings,
    check_streamed,
    checked_schedule,
    checked_settings,
    documents_in,
    encode_given,
)
from zipper_lm.generation.candidates import Choose, candidates_of, decode_written, pick, wants_scores
from zipper_lm.generation.read_back import reads_back
from zipper_lm.generation.segment import Stop, StreamedToken
from zipper_lm.models import export, sharing
from zipper_lm.models.baseline.config import SingleDecoderConfig, is_single_decoder
from zipper_lm.models.baseline.vocabulary import Joined, Modality, join
from zipper_lm.models.baseline.writing import score, write
from zipper_lm.models.card import refresh_card
from zipper_lm.models.checkpoint import copy_tensors, given_tensors, is_of, write_checkpoint
from zipper_lm.models.claims import check_whole
from zipper_lm.models.records import generation_settings, write_settings
from zipper_lm.utils.arguments import Loading, Saving
from zipper_lm.utils.host import on_host, send
from zipper_lm.utils.hub import CONFIG_FILE, WEIGHTS_FILE, local_folder
from zipper_lm.utils.known import answering
from zipper_lm.utils.tensors import dtype_name, without_aliases

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


class SingleDecoder(DocumentModel):
    """One decoder for all modalities.

    Args:
        config: vocabulary and decoder.
        backbone: the decoder, already expanded; `None` builds it from the config with random weights.

    Attributes:
        interface: how its backbone is called, learned by trying it, as of a `Tower`.
    """

    config_class = SingleDecoderConfig
    config: SingleDecoderConfig

    def __init__(self, config: SingleDecoderConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        spec = config.spec
        if backbone is None:
            backbone = from_config(backbone_config("the single decoder", spec.backbone), spec)
        self.backbone = backbone
        self.interface = learn(backbone)
        for fault in self.interface.faults:
            logger.warning("the single decoder: %s: %s", type(backbone).__name__, fault)
        self.modalities = config.vocabulary
        if spec.train == "lora":
            add_adapters(backbone, spec.lora)
            for part in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
                part.requires_grad_(True)  # new ids have to be learned
        else:
            backbone.requires_grad_(True)
        self.layer_pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}  # no zips
        self.processor: ZipperProcessor | None = None
        self.generation_settings: dict[str, dict[str, Any]] = {}
        self.all_tied_weights_keys: dict[str, str] = {}

    @classmethod
    def with_random_weights(cls, config: SingleDecoderConfig, dtype: torch.dtype | None, trust: bool = False) -> Self:
        """See `DocumentModel`."""
        spec = config.spec
        return cls(config, from_config(backbone_config("the single decoder", spec.backbone), spec, dtype))

    def get_input_embeddings(self) -> Any:
        """Those of all modalities."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The head, over all modalities."""
        return self.backbone.get_output_embeddings()

    @property
    def names(self) -> list[str]:
        """The modalities."""
        return [m.name for m in self.modalities]

    @property
    def specials(self) -> dict[str, Specials]:
        """Each modality's special ids, counted within it."""
        return {m.name: m.specials for m in self.modalities}

    def modality(self, name: str) -> Modality:
        """One modality. Raises `ValueError` for an unknown name."""
        for modality in self.modalities:
            if modality.name == name:
                return modality
        raise ValueError(f"unknown modality {name!r}; this model has {self.names}")

    def check_ids(self, name: str, low: int, high: int) -> None:
        """Raise `ValueError` if ids from `low` to `high` are not all ids of a modality."""
        size = self.modality(name).size
        if low < 0 or high >= size:
            raise ValueError(f"{name}: token id {low if low < 0 else high} out of range, it has ids 0 to {size - 1}")

    def forward(
        self,
        batch: Batch,
        target_counts: Mapping[str, Tensor] | None = None,
        return_loss: bool = True,
        return_logits: bool = True,
    ) -> ZipperOutput:
        """Run whole documents and score their targets.

        Args:
            batch: from `collate` or the processor, one stream per modality; joined here.
            target_counts, return_loss, return_logits: as of `ZipperModel.forward`.

        Returns:
            As `ZipperModel.forward`, with the losses over the whole vocabulary; logits under ``"decoder"``, ``[batch,
            time, vocab]`` of the joined stream.

        Raises:
            ValueError: for an unknown modality, an id outside its modality, or a batch that is not as of `collate`.
        """
        check_batch(batch, self.names, self.check_ids)
        joined = join(batch_on_host(batch), self.modalities)
        size = self.get_input_embeddings().weight.shape[0]
        few = return_loss and not return_logits and are_many(joined.input_ids.numel(), size)
        if (head := head_of(self.backbone, self.interface) if few else None) is None:
            logits = self._read(joined, logits=True)
            loss_of: Callable[[Targets], Tensor] = partial(Targets.loss, logits=logits)
        else:
            with listening(head.layers, last := Last(head.depth)):
                logits = self._read(joined, logits=False)
            loss_of = partial(Targets.loss_by_parts, head=head, states=last.state, number=tokens_at_once(size))
        if not return_loss:
            return ZipperOutput(logits={"decoder": logits})
        numbers = self.target_counts(batch) if target_counts is None else target_counts
        losses: dict[str, Tensor] = {}
        for index, modality in enumerate(self.modalities):
            labels = joined.labels.where(joined.owners == index, IGNORED)
            if len(wanted := Targets.of(labels[:, 1:])):
                losses[modality.name] = share(loss_of(wanted), numbers[modality.name])
        total = [self.config.loss_weights.get(n, 1.0) * loss for n, loss in losses.items()]
        loss = torch.stack(total).sum() if total else None
        return ZipperOutput(loss=loss, losses=losses, logits={"decoder": logits} if return_logits else None)

    def _read(self, joined: Joined, logits: bool) -> Tensor:
        """Logits of a joined stream; false: those of the last token are enough."""
        device, keep = self.backbone.device, {} if logits else {FEW: 1}
        if joined.documents is None:
            ids, mask = send((joined.input_ids, joined.attention_mask), device)
            output = self.backbone(input_ids=ids, attention_mask=answering(mask), use_cache=False, **keep)
        else:
            ids, positions = send((joined.input_ids, places(joined.documents)), device)
            output = self.interface.output(self.backbone, ids, None, None, False, positions, logits)
        return output.logits

    def check_packing(self) -> None:
        """Raise `ValueError` if the decoder does not read documents that share a row as each alone. It is tried."""
        check_packing("the single decoder", self.backbone, self.interface)

    def target_counts(self, batch: Batch) -> dict[str, Tensor]:
        """How many targets a batch has of each modality, int64 scalars on the CPU."""
        counts = {name: (on_host(stream["labels"]) != IGNORED).sum() for name, stream in batch.items()}
        return dict.fromkeys(self.names, torch.tensor(0)) | counts

    @torch.no_grad()
    def unimodal_loss(self, name: str, rows: Sequence[Sequence[int]]) -> tuple[float, int]:
        """Summed next-token loss in nats over rows of one modality alone, and how many tokens that is."""
        document = [Document([Segment(name, ids=list(row), target=True)]) for row in rows]
        batch = collate(document, self.specials)
        count = int((batch[name]["labels"] != IGNORED).sum())
        losses = self(batch).losses
        return float(losses[name]) * count, count

    def backbones(self) -> dict[str, PreTrainedModel]:
        """The decoder under the modality that it had before it was expanded."""
        return {self.names[0]: self.backbone}

    def depths(self) -> dict[str, int]:
        """Number of layers, under the same name."""
        return {self.names[0]: self.backbone.config.num_hidden_layers}

    # --- what the trainer asks -----------------------------------------------------------------------------------

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """None has a rate of its own: all of it is the model."""
        return []

    def trained_vocabularies(self) -> dict[str, int]:
        """Number of ids of every modality: all are trained."""
        return {m.name: m.size for m in self.modalities}

    def gates(self) -> dict[str, float]:
        """There are none."""
        return {}

    def describe_training(self) -> str:
        """In words, how it is trained."""
        return f"single decoder {self.config.spec.train}"

    def step_flops(self, batch: Batch) -> int:
        """About 6 per parameter and token (Kaplan et al. 2020, section 2.1)."""
        tokens = sum(stream["input_ids"].numel() for stream in batch.values())
        return 6 * tokens * self.backbone.num_parameters(exclude_embeddings=True)

    # --- making, saving, writing ---------------------------------------------------------------------------------

    def with_adapters(self, lora: Mapping[str, Any] | None = None) -> SingleDecoder:
        """This model, of which only adapters, embeddings and head are trained from now on.

        Args:
            lora: arguments of `peft.LoraConfig`.

        Raises:
            ValueError: if it has adapters already.
        """
        if self.config.spec.train == "lora":
            raise ValueError("this single decoder has adapters already")
        decoder = asdict(replace(self.config.spec, train="lora", lora=dict(lora) if lora is not None else None))
        config = SingleDecoderConfig(self.config.modalities, decoder, self.config.loss_weights)
        model = SingleDecoder(config, self.backbone)
        model.processor, model.generation_settings = self.processor, self.generation_settings
        return model.eval()

    @overload
    def generate(self, documents: Sequence[Document], schedule: Schedule, **how: Any) -> list[Document]: ...

    @overload
    def generate(self, documents: Given, schedule: Schedule, **how: Any) -> Document: ...

    @overload
    def generate(self, documents: Any, schedule: Schedule, **how: Any) -> Any: ...

    def generate(
        self,
        documents: Any,
        schedule: Schedule,
        *,
        settings: Settings | None = None,
        decode: bool = True,
        choose: Choose | None = None,
        on_token: Callable[[StreamedToken], bool] | None = None,
        **flat: Any,
    ) -> Any:
        """Write the next segments; as `zipper_lm.generation.generate.generate`, with the same arguments.

        Raises:
            ValueError: as there, and for ``schedule="auto"``: nothing here learned who speaks next.
        """
        given, alone = documents_in(documents)
        chosen = checked_settings(self, settings, flat)
        entries = checked_schedule(self, schedule)
        if entries is None:
            raise ValueError('schedule "auto": a single decoder does not say who speaks next; name the modalities')
        if by_reading := [name for name, own in chosen.items() if reads_back(own)]:
            raise ValueError(f"settings for {by_reading[0]!r}: best_by='reading' is for zips; here it is by score")
        if not given:
            return []
        if on_token is not None:
            check_streamed(given, chosen)
        written, stop = encode_given(self, given), Stop()
        for entry in entries:
            if isinstance(entry, Segment):
                for document in written:
                    document.segments.append(Segment(entry.modality, entry.value, list(entry.ids or [])))
            else:
                self._write(written, entry, chosen.get(entry), choose, on_token, stop)
            if stop.now:
                break
        if decode:
            decode_written(self.processor, given, written)
        return written[0] if alone else written

    def _write(
        self,
        documents: list[Document],
        name: str,
        settings: GenerationConfig | None,
        choose: Choose | None,
        on_token: Callable[[StreamedToken], bool] | None,
        stop: Stop,
    ) -> None:
        """Append a segment of `name` to every document."""
        codec = self.processor.codecs.get(name) if self.processor is not None else None
        how = self.interface.writing
        if how == "wrong":
            fault = self.interface.faults[-1]
            raise ValueError(f"this single decoder can be read, but not written with: {fault}")
        cached = how != "uncached"
        rows = write(self.backbone, self.modalities, documents, name, settings, codec, on_token, stop, cached)
        candidates = candidates_of(name, rows)
        if wants_scores(settings):
            for number, column in enumerate(zip(*rows)):
                for row, logprobs in zip(candidates, score(self.backbone, self.modalities, documents, name, column)):
                    row[number].logprobs = logprobs
        for document, segment in zip(documents, pick(documents, candidates, choose, self.processor)):
            document.segments.append(segment)

    def stream(self, document: Given, schedule: Schedule, **how: Any) -> Iterator[StreamedToken]:
        """As `generate` for one document, token by token; see `zipper_lm.generation.generate.stream`."""
        return generate.stream(self, document, schedule, **how)

    def own_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores: everything, a tied tensor once."""
        return without_aliases(self.state_dict())

    def load_own(self, file: Path) -> None:
        """Copy a checkpoint's tensors into the model, after checking that they are exactly the ones it needs."""
        copy_tensors(self.own_tensors(), self.config.fingerprint, file)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        bundle_towers: Any = False,
        card: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write config, weights, codecs and model card, whole or not at all.

        Args:
            save_directory, overwrite: see `zipper_lm.models.checkpoint.save`.
            bundle_towers: whether or not, all weights are stored.
            card: write a model card and its picture too. A card that somebody edited is left alone.
            kwargs: as of `ZipperModel.save_pretrained`.

        Raises:
            ValueError: if a checkpoint is there already, or the folder cannot be written; for an argument that is not
                followed.
        """
        how = Saving.of(f"{type(self).__name__}.save_pretrained", kwargs)
        if not how.is_main_process:
            return
        own = given_tensors(self.own_tensors(), how.state_dict, how.max_shard_size)

        def fill(folder: Path) -> None:
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(folder)
            if self.processor is not None:
                self.processor.save_pretrained(folder)
            write_settings(folder, self.generation_settings)
            if card:
                refresh_card(folder, self, kept=Path(save_directory))

        overwrite = overwrite or ("state_dict" in kwargs and is_of(Path(save_directory), self.config.fingerprint))
        write_checkpoint(Path(save_directory), own, self.config.fingerprint, fill, overwrite)
        sharing.push_saved(self, Path(save_directory), how, bundle_towers)

    def export_tower(self, name: str, save_directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the decoder, with all its ids, as a plain Hugging Face checkpoint; see
        `zipper_lm.models.export.export_tower`."""
        export.export_tower(self, name, save_directory, overwrite=overwrite)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload a checkpoint; see `zipper_lm.models.sharing.push`."""
        return sharing.push(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            args, kwargs: `revision`; `trust_remote_code`, for its tokenizer; and what
                `zipper_lm.models.checkpoint.load` takes besides.

        Raises:
            ValueError: for an argument that is not followed; if there is nothing or another model, or tensors are
                missing, unknown or of the wrong shape.
        """
        where, revision = f"{cls.__name__}.from_pretrained", kwargs.pop("revision", None)
        how = Loading.of(where, args, kwargs)
        hub = dict(how.hub or {})
        folder = local_folder(pretrained_model_name_or_path, revision, **hub)
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{pretrained_model_name_or_path}: no {CONFIG_FILE} there")
        if not is_single_decoder(folder):
            raise ValueError(f"{folder / CONFIG_FILE}: holds no single decoder: its model_type is another")
        written = SingleDecoderConfig.from_pretrained(folder)
        check_no_kernels(str(pretrained_model_name_or_path), written, False)
        config = how.merge(where, written, ("modalities", "decoder", "loss_weights"))
        if config.spec.trust_remote_code:
            raise ValueError(
                f"{pretrained_model_name_or_path}: its config.json says trust_remote_code: true, which nothing here "
                "follows: a single decoder has no code of its own"
            )
        own = backbone_config("the single decoder", config.spec.backbone)
        check_whole(f"{folder / WEIGHTS_FILE}: the single decoder", own, config.spec, folder / WEIGHTS_FILE)
        whole = config.spec.train == "full"  # else its tensors have their names only once it has adapters
        backbone = (blank_backbone if whole else from_config)(own, config.spec, how.dtype)
        config.decoder["backbone"] = {**(config.spec.backbone or {}), "dtype": dtype_name(backbone.dtype)}
        if whole:  # at once, because it is tried when the model is made of it
            stored = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
            copy_tensors(without_aliases(stored), config.fingerprint, folder / WEIGHTS_FILE)
        model = cls(config, how.place(backbone))
        if not whole:
            model.load_own(folder / WEIGHTS_FILE)
        if (folder / "processor_config.json").is_file():
            model.processor = ZipperProcessor.from_pretrained(folder, trust_remote_code=how.trust_remote_code, **hub)
        model.generation_settings = generation_settings(folder)
        return how.settle(model, written)


AutoConfig.register(SingleDecoderConfig.model_type, SingleDecoderConfig)
AutoModel.register(SingleDecoderConfig, SingleDecoder)
AutoProcessor.register(SingleDecoderConfig, ZipperProcessor)
