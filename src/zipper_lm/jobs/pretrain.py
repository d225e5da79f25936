"""`zipper pretrain`: a small tower from scratch on unaligned data, with `transformers.Trainer`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from rich.console import Console
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, set_seed

from zipper_lm.codecs.codec import CODEC_FILE, Codec
from zipper_lm.codecs.pretrained import RunsModel
from zipper_lm.data.broken import Broken
from zipper_lm.data.collation import IGNORED
from zipper_lm.data.encoding import column, encode_column
from zipper_lm.data.prepared import TRAIN
from zipper_lm.data.sources.readers import PREPARED_FILE
from zipper_lm.evaluation.preservation import from_loss
from zipper_lm.fusion.limits import check_length
from zipper_lm.jobs.failures import overfitted
from zipper_lm.jobs.recipes.reader import to_mapping
from zipper_lm.jobs.recipes.schema import DataRecipe, PretrainRecipe
from zipper_lm.jobs.resume import begin, check_data, check_working, clear_done, is_done, keep_logs, working_folder
from zipper_lm.jobs.rows import DataSource, Opened
from zipper_lm.training.arguments import evaluation_arguments, training_arguments
from zipper_lm.training.base import IDLE, BaseTrainer, check_step_size, evened, step_size
from zipper_lm.training.callbacks import StopOnInterrupt, callbacks_of, train_with_bar
from zipper_lm.training.parameters import check_precision
from zipper_lm.utils.files import check_apart, check_output, holding, new_folder, remove_folder
from zipper_lm.utils.processes import is_main, made_by_main, main_console, naming_lost_peers, wait
from zipper_lm.utils.progress import show_on, warn
from zipper_lm.utils.randomness import randomness_kept


class Streams(Dataset[dict[str, Any]]):
    """Rows as the tower will read them, ``BOS ids EOS``, several in a stream of at most `context` tokens.

    Rows are drawn together in an order from `seed`; none is cut, so a longer row makes a longer stream of its own.
    """

    def __init__(self, rows: Sequence[Sequence[int]], codec: Codec, context: int, seed: int) -> None:
        self.streams: list[list[int]] = []
        for index in np.random.default_rng(seed).permutation(len(rows)):
            ids = [codec.bos_id, *rows[index], codec.eos_id]
            if self.streams and len(self.streams[-1]) + len(ids) <= context:
                self.streams[-1] += ids
            else:
                self.streams.append(ids)

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A stream by its number; ``~number`` is the same one, read again for nothing (`training.order.Evened`)."""
        return {"input_ids": self.streams[~index if index < 0 else index], IDLE: index < 0}


class PadStreams:
    """Right padding; padding is no target."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        idle = all(i[IDLE] for i in items)
        items = items[:1] if idle else [i for i in items if not i[IDLE]]
        width = max(len(i["input_ids"]) for i in items)
        rows = [i["input_ids"] for i in items]
        ids = torch.tensor([r + [self.pad] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        labels = ids.masked_fill((mask == 0) | idle, IGNORED)  # which Trainer counts
        return {"input_ids": ids, "attention_mask": mask, "labels": labels} | ({IDLE: True} if idle else {})


class TowerTrainer(BaseTrainer):
    """Trainer reads a checkpoint's file as it lies there, leniently. But `save_pretrained` writes tensors of some
    families under other names than their modules have (the head of GPT-NeoX, the experts of mixtures), and those would
    silently stay as they were: here `from_pretrained` reads it. Looking at the held-out rows draws no random numbers.
    Several processes see the streams that one would see.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Raises `ValueError` for an order that each process would draw for itself."""
        strategy, order = self.args.train_sampling_strategy, super()._get_train_sampler(train_dataset)
        if isinstance(order, RandomSampler):  # as accelerate draws it: from the seed and the epoch
            order = SeedableRandomSampler(self.train_dataset, data_seed=self.args.data_seed)
        elif not isinstance(order, SequentialSampler):
            if self.args.world_size > 1:
                raise ValueError(f"training.arguments: train_sampling_strategy={strategy!r} is for one process")
            return order  # type: ignore[return-value]
        return evened(order, self.args)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; nothing of a batch that is there because the process has no stream left in this step."""
        if not inputs.pop(IDLE, False):
            return super().compute_loss(model, inputs, *args, **kwargs)
        loss: Any = super().compute_loss(model, inputs | {"labels": inputs["input_ids"]})
        return 0.0 * loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's own; training goes on as if it had not happened."""
        with randomness_kept():
            return super().evaluate(*args, **kwargs)

    def describe_step(self) -> str:
        """What streams the step at hand is of, in this process."""
        lengths = [int(n) for batch in self.batches for n in batch["attention_mask"].sum(1)]
        return f"{len(lengths)} streams of {min(lengths)} to {max(lengths)} tokens"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tower = self.accelerator.unwrap_model(self.model)
        saved = type(tower).from_pretrained(resume_from_checkpoint, dtype=tower.dtype)
        tower.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def make_backbone(fields: dict[str, Any], codec: Codec) -> PreTrainedModel:
    """A random decoder of any family for a codec's vocabulary.

    Raises:
        ValueError: for an unknown `model_type`, or fields that its config lacks or refuses.
    """
    fields = {"model_type": "llama", **fields}
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"backbone.model_type {kind!r} is unknown to transformers")
    config: Any = CONFIG_MAPPING[kind]
    # transformers keeps whatever it is given as an attribute, so a field with a typing mistake would have no effect.
    known = {name for name in (*vars(config()), *config.attribute_map) if not name.startswith("_")}
    if unknown := sorted(set(fields) - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(f"backbone: {kind} has no {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    special = {f"{k}_token_id": getattr(codec, f"{k}_id") for k in ("bos", "eos", "pad")}
    try:
        return AutoModelForCausalLM.from_config(config(vocab_size=codec.vocab_size, **special, **fields))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"backbone {kind!r}: {error}") from error


@naming_lost_peers()
def pretrain(
    recipe: PretrainRecipe, *, overwrite: bool = False, resume: bool = False, console: Console | None = None
) -> dict[str, float]:
    """Fit the codec, train the tower, and write both to `recipe.output`.

    Args:
        recipe: what to do.
        overwrite: replace what is at `recipe.output`, and throw an interrupted run away.
        resume: go on from the newest checkpoint of an interrupted run with the same recipe. If it was interrupted
            after its output was whole, what it left beside that is removed.
        console: where progress is told; `None` is standard error.

    Returns:
        ``train_loss`` and, with a validation split, ``perplexity`` on it (per token) at ``best_step``, whose weights
        are the tower's. Nothing, if it was done already.

    Raises:
        ValueError: if the output exists or would replace what is read, the data cannot be read, or a setting is wrong.
        Diverged: before a step whose loss or gradient is not finite; checkpoints stay.
        Interrupted: after Ctrl-C or SIGTERM; a checkpoint has been written.
        PeerLost: if another process died or hung.
    """
    if resume and not overwrite and clear_trained(recipe):
        return {}
    check_output(recipe.output, overwrite)
    clips = recipe.data.clips and recipe.data.clips.source
    read = {"data.source": recipe.data.source, "data.clips.source": clips, "codec.source": recipe.codec.source}
    check_apart(recipe.output, read, holding(PREPARED_FILE, CODEC_FILE))
    if recipe.codec.source is None and (recipe.modality, recipe.codec.kind) in (("text", "speech"), ("speech", "text")):
        raise ValueError(f"codec.kind is {recipe.codec.kind!r}, but modality is {recipe.modality!r}")
    working, plain = working_folder(recipe.output), to_mapping(recipe)
    checkpoint = check_working(working, recipe, resume=resume, overwrite=overwrite)
    evaluation = evaluation_arguments(recipe.training, recipe.data.validation, "eval_loss")
    arguments = training_arguments(recipe.training, working, recipe.seed, alone=True, **evaluation)
    if checkpoint is not None:
        check_step_size(step_size(checkpoint), arguments)
    console = console or main_console()  # after the arguments, which say how to connect
    set_seed(recipe.seed)
    broken = Broken(recipe.data.broken_limit)
    source, opened, held_out = open_unaligned(recipe.data)
    identity = source.identity(opened, held_out)
    if checkpoint is not None:
        check_data(working, identity)
    held_values = column(held_out, recipe.modality, broken) if held_out else []
    values = column(source.training_rows(recipe.seed, opened, broken), recipe.modality, broken)
    with show_on(console):
        codec = made_by_main(partial(recipe.codec.make, values, recipe.seed))
    if isinstance(codec, RunsModel) and arguments.device.type == "cuda":
        codec.to(arguments.device)
    backbone = make_backbone(recipe.backbone, codec)
    check_precision(backbone)
    streams = Streams(encode_column(codec, values, broken), codec, recipe.context, recipe.seed)
    held_streams = None
    if held_out:
        held_streams = Streams(encode_column(codec, held_values, broken), codec, 1, recipe.seed)
        if not len(held_streams):
            raise ValueError(
                f"data.validation: nothing in split {recipe.data.validation!r} could be read "
                f"(data.broken_limit={recipe.data.broken_limit}): {broken.told()}"
            )
    if broken.items:
        console.print(broken.told(), style="yellow")
    check_length(backbone, [len(s) for part in (streams, held_streams) if part for s in part.streams], recipe.modality)
    del values, held_values, opened, held_out  # raw sound is large
    if checkpoint is None and is_main():
        begin(working, plain, identity)
    wait()
    stop = StopOnInterrupt()
    trainer = TowerTrainer(
        model=backbone,
        args=arguments,
        train_dataset=streams,
        eval_dataset=held_streams,
        data_collator=PadStreams(codec.pad_id),
        callbacks=[stop, *callbacks_of(recipe.training)],
    )
    try:
        result = train_with_bar(trainer, console, "pre-training", str(checkpoint) if checkpoint else None)
    finally:
        stop.release()
    stop.check(trainer.state.global_step)
    metrics = {"train_loss": float(result.training_loss)}
    if held_streams is not None:
        held_out_loss = trainer.evaluate()["eval_loss"]
        metrics["perplexity"] = from_loss(recipe.modality, held_out_loss)
        best = trainer.state.best_global_step or trainer.state.global_step  # no loss was a number
        metrics["best_step"] = best
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] <= best]
        for failure in overfitted(recipe.modality, logged[-1], held_out_loss) if logged else ():
            warn(console, failure.name, failure.message)
    if is_main():
        with new_folder(recipe.output, overwrite) as folder:
            backbone.config.use_cache = True  # Trainer turned it off
            backbone.save_pretrained(folder)
            codec.save_pretrained(folder)
            keep_logs(working, folder / "logs")
        remove_folder(working)
    wait()
    return metrics


def clear_trained(recipe: PretrainRecipe) -> bool:
    """Remove what a run by this recipe left beside a tower that is whole; whether there was anything."""
    working = working_folder(recipe.output)
    there = Path(recipe.output).is_dir() and is_done(working, recipe, recipe.training.steps)
    if there:
        clear_done(recipe.output)
    return there


def open_unaligned(data: DataRecipe) -> tuple[DataSource, Opened, Sequence[Any]]:
    """A source, its training and validation rows of unaligned data, open; of each only one
    modality will be read, others may lack.

    Raises:
        ValueError: as `DataSource.open`, and for prepared data.
    """
    source = DataSource(data)
    if source.prepared is not None:
        raise ValueError(f"data: {data.source} holds prepared ids; a tower is pre-trained on the raw data")
    return source, source.open(TRAIN, check=False), source.validation_rows(check=False)
