"""`zipper pretrain`: a small tower from scratch on unaligned data, with `transformers.Trainer`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, set_seed

from zipper_lm.codecs.codec import CODEC_FILE, Codec
from zipper_lm.codecs.pretrained import RunsModel
from zipper_lm.data.broken import Broken
from zipper_lm.data.encoding import column_with, encode_each
from zipper_lm.data.prepared import TRAIN
from zipper_lm.data.sources.readers import PREPARED_FILE
from zipper_lm.data.tasks import parse_task
from zipper_lm.evaluation.preservation import from_loss
from zipper_lm.evaluation.word_error_rate import word_error_rate
from zipper_lm.fusion.limits import check_length
from zipper_lm.fusion.zip_spec import evenly_spaced
from zipper_lm.jobs.embeddings import begin_at_codebook, check_codebook
from zipper_lm.jobs.failures import overfitted
from zipper_lm.jobs.recipes.reader import to_mapping
from zipper_lm.jobs.recipes.schema import DataRecipe, PretrainRecipe
from zipper_lm.jobs.resume import begin, check_data, check_working, clear_done, is_done, keep_logs
from zipper_lm.jobs.rows import DataSource, Opened
from zipper_lm.training.arguments import autocast_dtype, evaluation_arguments, training_arguments
from zipper_lm.training.base import check_step_size, step_size
from zipper_lm.training.callbacks import StopOnInterrupt, callbacks_of, train_with_bar
from zipper_lm.training.ctc import MOST_PLACES, TowerCtc, places_for
from zipper_lm.training.parameters import check_precision
from zipper_lm.training.recipe import TrainingRecipe
from zipper_lm.training.tower import PadStreams, Spelling, Streams, TowerTrainer
from zipper_lm.utils.files import check_apart, check_output, holding, new_folder, remove_folder
from zipper_lm.utils.places import working_folder
from zipper_lm.utils.processes import is_main, made_by_main, main_console, naming_lost_peers, wait
from zipper_lm.utils.progress import show_on, warn

SPELLED_LAYERS = 4
"""Evenly spaced, as zips read them where a recipe does not say otherwise."""


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
        are the tower's, and with joint CTC ``letters_wrong``, per cent of those of the validation split's texts, as the
        tower spells them. Nothing, if it was done already.

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
    check_apart(working_folder(recipe.output), read)  # which is emptied before the run, and goes away after it
    if recipe.codec.source is None and (recipe.modality, recipe.codec.kind) in (("text", "speech"), ("speech", "text")):
        raise ValueError(f"codec.kind is {recipe.codec.kind!r}, but modality is {recipe.modality!r}")
    if recipe.embeddings == "codebook" and recipe.codec.source is None:
        check_codebook(recipe.codec.kind)
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
    spells = parse_task(next(iter(recipe.training.ctc))).targets[-1] if recipe.training.ctc else None
    held_values, held_texts = column_with(held_out, recipe.modality, spells, broken) if held_out else ([], [])
    rows = source.training_rows(recipe.seed, opened, broken)
    values, texts = column_with(rows, recipe.modality, spells, broken, recipe.ctc_limit)
    if spells is not None:
        _check_texts(texts, spells, recipe.ctc_limit)
    with show_on(console):
        codec = made_by_main(partial(recipe.codec.make, values, recipe.seed, texts if spells else None))
    if isinstance(codec, RunsModel) and arguments.device.type == "cuda":
        codec.to(arguments.device)
    backbone = make_backbone(recipe.backbone, codec)
    if recipe.embeddings == "codebook":
        begin_at_codebook(backbone, codec)
    check_precision(backbone, arguments.device, autocast_dtype(arguments))
    lost = recipe.training.corrupt
    assert isinstance(lost, float | int)  # `_check_pretraining`
    streams = _streams(codec, values, texts if spells else None, broken, recipe.context, recipe.seed, lost)
    spelling = None if spells is None else _spelling(recipe.training, backbone, streams)
    held_streams = None
    if held_out:
        held_streams = _streams(codec, held_values, held_texts if spells else None, broken, 1, recipe.seed)
        if not len(held_streams):
            raise ValueError(
                f"data.validation: nothing in split {recipe.data.validation!r} could be read "
                f"(data.broken_limit={recipe.data.broken_limit}): {broken.told()}"
            )
    if broken.items:
        console.print(broken.told(), style="yellow")
    check_length(backbone, [len(s) for part in (streams, held_streams) if part for s in part.streams], recipe.modality)
    del values, texts, held_values, held_texts, opened, held_out  # raw sound is large
    if checkpoint is None and is_main():
        begin(working, plain, identity)
    wait()
    stop = StopOnInterrupt()
    trainer = TowerTrainer(
        model=backbone,
        args=arguments,
        train_dataset=streams,
        eval_dataset=held_streams,
        data_collator=PadStreams(codec.pad_id, 1 if spelling is None else spelling.heads.places),
        spelling=spelling,
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
        if spelling is not None and (spelled := [pair for pair in trainer.spell(held_streams) if pair[0].strip()]):
            said, heard = zip(*spelled)
            metrics["letters_wrong"] = word_error_rate(said, heard, str).cer
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


def _streams(
    codec: Codec,
    values: Sequence[Any],
    texts: Sequence[Any] | None,
    broken: Broken,
    context: int,
    seed: int,
    lost: float = 0.0,
) -> Streams:
    """Of the values that can be read; what is no text is none that is known."""
    rows = list(enumerate(encode_each(codec, values, broken)))
    said = None
    if texts is not None:
        said = [text if isinstance(text := texts[n], str) else None for n, ids in rows if ids is not None]
    return Streams([ids for _, ids in rows if ids is not None], codec, context, seed, said, lost)


def _check_texts(texts: Sequence[Any], name: str, limit: int | None) -> None:
    """Raise `ValueError` unless some of them are texts, and all others `None`."""
    if all(text is None for text in texts):
        rows = "no row" if limit is None else f"none of the first {limit} rows (ctc_limit)"
        raise ValueError(f"training.ctc: {rows} has {name!r} beside it; name the column in data.columns")
    if (other := next((text for text in texts if not isinstance(text, str | None)), None)) is not None:
        raise ValueError(f"training.ctc: {name!r} must be texts, which are spelled, got {str(other)!r:.80}")


def _spelling(training: TrainingRecipe, backbone: PreTrainedModel, streams: Streams) -> Spelling:
    """Raises `ValueError` where most texts have far more letters than their rows have tokens."""
    (template, weight), texts = next(iter(training.ctc.items())), [each for each in streams.spelled() if each.letters]
    if (places := places_for(texts)) is None:
        raise ValueError(
            f"training.ctc: {template!r}: most of {len(texts)} texts have more than {MOST_PLACES} letters for each "
            "token of their rows, so that they cannot be spelled; take a codec with more tokens a second"
        )
    depth = int(backbone.config.num_hidden_layers)
    layers = evenly_spaced(min(SPELLED_LAYERS, depth), depth)
    heads = TowerCtc(int(backbone.config.hidden_size), layers, places)
    return Spelling(heads=heads, weight=weight, fade_out=training.fade_out)


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
