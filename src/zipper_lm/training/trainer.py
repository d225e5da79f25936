"""ZipperTrainer: `transformers.Trainer` for zipped models.

Accelerate, mixed precision, accumulation, checkpointing, logging integrations and resuming come from Trainer. Ours are
the parameter groups, the documents' collation, losses over a whole step's targets, saving, evaluation by generation,
and what is logged of the gates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import save_fsdp_optimizer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput

from zipper_lm.data.buffered import BufferedDocuments, Placed
from zipper_lm.data.collation import Specials, collate
from zipper_lm.data.document import Document
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.writer import Writer
from zipper_lm.training.aligned_attention import AlignedAttention
from zipper_lm.training.arguments import autocast_dtype
from zipper_lm.training.base import IDLE, PLACE, BaseTrainer, documents_of_a_step, evened
from zipper_lm.training.beside import BesideLoss, Pair, check_pairs, faded
from zipper_lm.training.compilation import compile_layers
from zipper_lm.training.corruption import Again, CorruptedDocuments
from zipper_lm.training.ctc import HEADS_FILE, TRIED, Ctc, HeadsCallback
from zipper_lm.training.forward_sum import ForwardSum
from zipper_lm.training.guided_attention import GuidedAttention
from zipper_lm.training.order import LikeLengths
from zipper_lm.training.parameters import check_precision, parameter_groups
from zipper_lm.training.prefix_cache import PrefixCache, PrefixMode, keep_prefixes, towers_kept
from zipper_lm.training.sharding import check_launch, join_in, prepared, spread
from zipper_lm.utils.host import send
from zipper_lm.utils.hub import WEIGHTS_FILE
from zipper_lm.utils.processes import from_main, several
from zipper_lm.utils.randomness import randomness_kept
from zipper_lm.utils.shards import gathered, is_sharded


class DocumentCollator:
    """Encoded documents to the one argument of `ZipperModel.forward`."""

    def __init__(
        self, specials: dict[str, Specials], packing: bool = False, prefixes: PrefixCache | None = None
    ) -> None:
        self.specials, self.packing, self.prefixes = specials, packing, prefixes or PrefixCache()

    def __call__(self, documents: Sequence[Document]) -> dict[str, Any]:
        found = [document for document in documents if not isinstance(document, Again)]
        batch = collate(found or documents[:1], self.specials, packing=self.packing)
        made: dict[str, Any] = {"batch": self.prefixes.fill(batch)} | ({} if found else {IDLE: True})
        places = [document.place for document in found if isinstance(document, Placed)]
        return made | ({PLACE: places[-1]} if places else {})


@dataclass(frozen=True)
class StepCounts:
    """What an optimizer step's losses are divided by, in all its batches and processes; int64 scalars on the CPU.

    Attributes:
        targets: by part of the loss. beside: what the losses beside the model's own count, by their name and pair.
    """

    targets: dict[str, Tensor]
    beside: dict[str, dict[Pair, Tensor]]


class ZipperTrainer(BaseTrainer):
    """Trainer for a `ZipperModel`, or a baseline with its face, on encoded documents.

    An optimizer step's gradient is that of one large batch: each part of the loss is a sum over the targets of all
    batches and processes, divided by their number.

    Args:
        model: the model. args: as in transformers.
        train_dataset: map-style, of encoded `Document`s.
        corrupt, history_dropout: see `CorruptedDocuments`.
        tower_learning_rate: for towers that are trained.
        guided: weights of pairs of towers whose attention is held to the diagonal.
        ctc: weights of pairs of which the reader's text is spelled by what its zips remember of the source.
        aligned: weights of pairs, of those of `ctc`, of which attention is held to where that hears what comes next.
        forward_sum: weights of pairs of which attention is held to be monotonic.
        fade_out: share of the steps in which the weights of these four fall to nothing; `None`: they stay.
        packing: let documents of a batch share rows; losses and gradients are as without.
        prefix_cache: where the states of frozen towers below their first zips are kept, ``"memory"`` or ``"disk"``, of
            all of them or by name; `None` computes them in every step. prefix_folder: of their files.
        score: called with the model at each evaluation; returns metrics without the ``eval_`` prefix.

    Raises:
        ValueError: for a model with float16 weights that are trained, or other than its config says; for DeepSpeed; for
            what cannot be had with FSDP2 (`zipper_lm.training.sharding`); for pairs that read nothing, are in a model
            of several trainings, or write what joint CTC cannot spell; for packing of what runs on from one document
            into the next; as `towers_kept`.
    """

    def __init__(
        self,
        model: Writer,
        args: TrainingArguments,
        train_dataset: Dataset[Document],
        *,
        corrupt: float | Mapping[str, float] = 0.0,
        history_dropout: float | Mapping[str, float] = 0.0,
        tower_learning_rate: float = 5e-4,
        guided: Mapping[Pair, float] | None = None,
        ctc: Mapping[Pair, float] | None = None,
        aligned: Mapping[Pair, float] | None = None,
        forward_sum: Mapping[Pair, float] | None = None,
        fade_out: float | None = None,
        packing: bool = False,
        prefix_cache: PrefixMode | Mapping[str, PrefixMode] | None = None,
        prefix_folder: Path | None = None,
        score: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        module = cast(nn.Module, model)
        self.tower_learning_rate, self.score, self.fade_out = tower_learning_rate, score, fade_out
        weighted = {"guided_attention": guided or {}, "ctc": ctc or {}, "aligned_attention": aligned or {}}
        weighted["forward_sum"] = forward_sum or {}
        for field, pairs in weighted.items():
            check_pairs(field, model, pairs)
        check_launch(args)
        check_precision(module, args.device, autocast_dtype(args))
        self.spelling: Ctc | None = None
        if ctc:
            first = (train_dataset[n] for n in range(min(TRIED, len(train_dataset))))  # type: ignore[arg-type]
            self.spelling = Ctc(cast(ZippedTowers, model), ctc, first).to(args.device)
        self.beside: list[BesideLoss] = [GuidedAttention(guided)] if guided else []
        self.beside += [self.spelling] if self.spelling is not None else []
        self.beside += [AlignedAttention(aligned, self.spelling)] if aligned else []
        self.beside += [ForwardSum(forward_sum)] if forward_sum else []
        if packing:
            model.check_packing()
        self.kept = towers_kept(model, prefix_cache, corrupt)
        self.prefixes, self.prefix_folder, self._hits = PrefixCache(), prefix_folder, dict[str, list[bool]]()
        documents = CorruptedDocuments(
            train_dataset,
            model.specials,
            corrupt=corrupt,
            history_dropout=history_dropout,
            sizes=model.trained_vocabularies(),
            seed=args.seed,
        )
        if compiled := args.torch_compile:
            how = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            compile_layers(model, {pair for field in weighted if field != "ctc" for pair in weighted[field]}, **how)
            args = copy.copy(args)  # else Trainer would compile the whole
            args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        heads = [] if self.spelling is None else [HeadsCallback(self.spelling, self.mean_of_processes)]
        super().__init__(
            model=module,
            args=args,
            train_dataset=documents,
            eval_dataset=documents,  # evaluation is by `score`; Trainer wants to see one
            data_collator=DocumentCollator(model.specials, packing, self.prefixes),
            callbacks=[*(callbacks or []), *heads],
        )
        if isinstance(model, ZippedTowers):
            model.check_freeze_state()
        if spread(model, args, self.accelerator.state, compiled=bool(compiled)):
            module.to(args.device)  # what comes before the training is computed there
            self.accelerator.prepare = partial(prepared, module, self.accelerator.prepare)
        self.model_accepts_loss_kwargs = True  # so that Trainer does not divide by the number of batches once more

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's own; models are spread on CPUs, too."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = join_in(self.args, self.accelerator.state)

    def keep_prefixes(self, console: Console | None = None) -> None:
        """Compute the states that are kept, if that is not done; training begins with it.

        Args:
            console: where progress is told.

        Raises:
            ValueError: as `prefix_cache.keep_prefixes`.
        """
        if set(self.kept) <= set(self.prefixes.stores):
            return
        model = self.accelerator.unwrap_model(self.model)
        how: dict[str, Any] = {"folder": self.prefix_folder, "console": console}
        how["precision"] = self.accelerator.autocast()
        with self.products():  # states round as in a step
            self.prefixes.stores |= keep_prefixes(model, self.kept, self.train_dataset, **how).stores

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As of its base, once what is kept of frozen towers is there."""
        self.keep_prefixes()
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer class, on our groups."""
        if self.optimizer is None:
            owner, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(
                self.accelerator.unwrap_model(self.model),
                tower_learning_rate=self.tower_learning_rate,
                weight_decay=self.args.weight_decay,
            )
            if self.spelling is not None:
                groups.append({"params": list(self.spelling.parameters()), "weight_decay": 0.0})
            self.optimizer = owner(groups, **kwargs)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Documents of like length share a batch: less padding, the order still drawn anew."""
        dataset = self.train_dataset
        assert isinstance(dataset, CorruptedDocuments)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order: Sampler[int] = SequentialSampler(dataset)
        if not isinstance(dataset.documents, BufferedDocuments):  # whose lengths are not known, and which are shuffled
            order = LikeLengths(dataset, documents_of_a_step(self.args), seed)
        self._order = evened(order, self.args)
        return self._order

    def go_on(self, place: Any) -> None:
        """Read a stream from there on."""
        cast(BufferedDocuments, cast(CorruptedDocuments, self.train_dataset).documents).go_on(place)

    def describe_step(self) -> str:
        """The numbers of the documents of the step at hand, in all processes."""
        alone = self.args.train_batch_size * self.args.world_size  # documents of a batch in each process
        accumulated = self.args.gradient_accumulation_steps
        batches: Any = self.callback_handler.train_dataloader  # of this process
        epoch, step = divmod(self.state.global_step, -(-len(batches) // accumulated))
        self._order.set_epoch(epoch)
        begin = step * alone * accumulated
        numbers = sorted(n for n in list(self._order)[begin : begin + alone * accumulated] if n >= 0)
        return f"documents {numbers} of {len(self.train_dataset)}"  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of an optimizer step, and its `StepCounts`: what they hold in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        for name in self.kept:
            sides = [inputs["batch"][name] for inputs in batches if name in inputs["batch"]]
            self._hits.setdefault(name, []).extend("known" in side for side in sides)
        counts = self._counts(batches)
        parts = [name for name, number in counts.targets.items() if number]
        parts += [name for name, numbers in counts.beside.items() if any(numbers.values())]
        for name in parts:
            self.part_losses.setdefault(name, []).append(torch.zeros((), device=device))
        return batches, counts

    def _counts(self, inputs: Sequence[Mapping[str, Any]]) -> StepCounts:
        model = self.accelerator.unwrap_model(self.model)
        batches = [each["batch"] for each in inputs]
        targets = [model.target_counts(batch) for batch in batches]
        beside = {loss.name: [loss.counts(batch) for batch in batches] for loss in self.beside}
        kinds = [targets, *beside.values()]
        found = torch.stack([torch.stack([n for kind in kinds for n in kind[b].values()]) for b in range(len(batches))])
        total = found[[IDLE not in each for each in inputs]].sum(0)
        if several():  # the one time that it has to be waited for
            total = self.accelerator.reduce(*send([total], self.args.device), "sum").cpu()
        numbers = iter(total)
        of_kinds = [{key: next(numbers) for key in kind[0]} for kind in kinds]
        return StepCounts(of_kinds[0], dict(zip(beside, of_kinds[1:])))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, and those beside it; the parts are kept for the next log line.

        Args:
            num_items_in_batch: `StepCounts` of the step that these inputs are part of; `None`: they are all of it.
        """
        if IDLE in inputs:  # by the way of any other batch, which processes may wait for each other on
            output = model(inputs["batch"], return_logits=return_outputs)
            total = 0.0 * _loss(output)
            return (total, output) if return_outputs else total
        counts = self._counts([inputs]) if num_items_in_batch is None else num_items_in_batch
        share = faded(self.state.global_step, self.state.max_steps, self.fade_out)
        with ExitStack() as watches:
            towers, costs = self.accelerator.unwrap_model(model), dict[str, list[Tensor]]()
            for loss in self.beside if share else ():
                costs[loss.name] = watches.enter_context(loss.watch(towers, inputs["batch"], counts.beside[loss.name]))
            output = model(**inputs, target_counts=counts.targets, return_logits=return_outputs)
        total, parts = _loss(output), dict(output.losses)
        for name, found in costs.items():
            if found:
                parts[name] = share * torch.stack([cost.to(total.device) for cost in found]).sum()
                total = total + parts[name]
        for name, loss in parts.items() if num_items_in_batch is not None else ():
            self.part_losses[name][-1] += loss.detach().to(self.args.device)
        total = total.to(self.args.device)  # of a model whose towers are apart it may be elsewhere
        total = total * self.accelerator.num_processes  # over which gradients, and Trainer's logs, are averaged
        return (total, output) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the gates to training's log lines, and the share of batches whose states were kept."""
        if "loss" in logs:
            for name, hits in self._hits.items():
                logs[f"prefix_cache/{name}"] = round(sum(hits) / max(1, len(hits)), 4)
            self._hits = {}
            for name, value in self.accelerator.unwrap_model(self.model).gates().items():
                logs[f"gate/{name}"] = round(value, 5)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Generate and score, always with the same draws; training goes on as if it had not happened. If it cannot be
        done, there is a checkpoint: Trainer scores before it saves, by default after the last step."""
        if self.score is None:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with torch.no_grad(), gathered(model), randomness_kept():
            torch.manual_seed(self.args.seed)
            try:
                scores = self.score(model)
            except Exception:
                if self.args.world_size == 1 and not self.is_fsdp_enabled:  # others would wait for one that failed
                    self._save_checkpoint(model, trial=None)
                raise
            metrics = from_main({f"{metric_key_prefix}_{k}": v for k, v in scores.items()})
        model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def streams(self, inputs: Any) -> dict[str, Tensor]:
        """See `BaseTrainer`."""
        return {name: side["input_ids"] for name, side in inputs["batch"].items()}

    def floating_point_ops(self, inputs: Any) -> int:
        """The model's own estimate."""
        return self.accelerator.unwrap_model(self.model).step_flops(inputs["batch"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's own; of a model that is spread over processes its own way to save gathers what is new, and that
        alone."""
        if self.is_fsdp_enabled:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        plugin.state_dict_config.offload_to_cpu = plugin.state_dict_config.rank0_only = several()
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self._learners(), output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)  # type: ignore[union-attr]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        model = self.model
        self.model = self._learners()  # FSDP looks the optimizer's tensors up in it
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.model = model

    def _learners(self) -> Any:
        """What has all tensors that the optimizer steps, under the names that FSDP saves their states by."""
        model = cast(nn.Module, self.model)
        return model if self.spelling is None else nn.ModuleDict({"model": model, "ctc": self.spelling})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The checkpoint is the model's own: new weights only, no pickled arguments."""
        folder, writes = output_dir or self.args.output_dir, self.args.should_save
        model = self.accelerator.unwrap_model(self.model)
        if writes or is_sharded(model):  # of which all processes gather
            model.save_pretrained(folder, overwrite=True, card=False, is_main_process=writes)
        if self.spelling is not None and writes:  # as of the optimizer: a resumed run goes on with it, no model has it
            save_file(self.spelling.state_dict(), Path(str(folder)) / HEADS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.accelerator.unwrap_model(self.model).load_own(Path(resume_from_checkpoint) / WEIGHTS_FILE)
        if self.spelling is not None:
            self.spelling.load_state_dict(load_file(Path(resume_from_checkpoint) / HEADS_FILE))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _loss(output: Any) -> Tensor:
    """Raises `ValueError` if there is none."""
    if output.loss is None:
        raise ValueError("training: a batch without a single target; every document needs one")
    return output.loss
