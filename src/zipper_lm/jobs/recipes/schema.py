"""What a recipe file may say: `zipper fuse` reads a `FuseRecipe`, `zipper pretrain` a `PretrainRecipe`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zipper_lm.codecs.codec import CODECS, SPELLING_KINDS, Codec, make_codec
from zipper_lm.data.tasks import parse_task
from zipper_lm.fusion.fields import Stream
from zipper_lm.fusion.tower_spec import (
    FirstZip,
    InputProjectionForm,
    Training,
    check_lora,
    check_projection_layer,
    check_projection_scale,
)
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.training.recipe import TrainingRecipe, at_least


@dataclass(kw_only=True)
class ClipsRecipe:
    """Single recordings to join into further training utterances (`zipper_lm.data.clips`).

    Args:
        source: where the clips are; only their training split is read.
        count: utterances to make. words: the most clips in one.
    """

    source: str
    count: int = 3000
    words: int = 5

    def __post_init__(self) -> None:
        at_least("clips.count", self.count, 1)
        at_least("clips.words", self.words, 1)


@dataclass(kw_only=True)
class DataRecipe:
    """Where the data is (`zipper_lm.data.sources.readers`). A plain string is the source.

    Args:
        source: folder, JSONL file, WebDataset tars, Hub id, or what `zipper prepare` wrote.
        revision: of a Hub id: commit, tag or branch.
        streaming: a data set on the Hub is not fetched as a whole: its rows come over the network one after the other.
        columns: modality to column, where the names are not the usual ones.
        train, validation: split names; `validation` may be null.
        limit: use only the first rows of the training split.
        fraction: use only this share of the training split, drawn with the recipe's seed.
        validation_limit: rows of the validation split that are scored during training.
        exclude: column to values; rows with one of them are left out of training and validation, such as
            ``{speaker: [theo]}``.
        clips: further training utterances from single recordings.
        broken_limit: how many items that cannot be read are left out (and listed) before that is an error.
        buffer: rows that are shuffled together and encoded while training goes on, for data that need not fit into
            memory, nor end; null encodes all rows before it.
    """

    source: str
    revision: str | None = None
    streaming: bool = False
    columns: dict[str, str] | None = None
    train: str = "train"
    validation: str | None = "validation"
    limit: int | None = None
    fraction: float = 1.0
    validation_limit: int = 100
    exclude: dict[str, list[str]] = field(default_factory=dict)
    clips: ClipsRecipe | None = None
    broken_limit: int = 0
    buffer: int | None = None

    @classmethod
    def from_string(cls, text: str) -> dict[str, Any]:
        """``data=PATH`` on the command line."""
        return {"source": text}

    def __post_init__(self) -> None:
        at_least("data.broken_limit", self.broken_limit, 0)
        if self.limit is not None:
            at_least("data.limit", self.limit, 1)
        if self.streaming and self.fraction < 1.0:
            raise ValueError(
                f"data.fraction={self.fraction} cannot be drawn from a stream: it has no length; set limit"
            )
        at_least("data.validation_limit", self.validation_limit, 1)
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"data.fraction must be in (0, 1], got {self.fraction}")
        if self.streaming and self.clips is not None:
            raise ValueError("data.clips cannot follow a stream, which may not end; leave out clips or streaming")
        if self.buffer is None:
            return
        at_least("data.buffer", self.buffer, 1)
        plain = {"fraction": 1.0, "clips": None, "broken_limit": 0}
        if asked := [name for name, value in plain.items() if getattr(self, name) != value]:
            raise ValueError(f"data.buffer cannot be had with data.{asked[0]}: rows are not read before training")


_OF_FUSION = (
    *("tower_learning_rate", "history_dropout", "interleave", "join"),
    *("guided_attention", "aligned_attention", "forward_sum", "packing", "prefix_cache"),
)


def _check_pretraining(training: TrainingRecipe) -> None:
    """Raise `ValueError` for a setting that pre-training would not heed."""
    plain = TrainingRecipe()
    for name in _OF_FUSION:
        if (value := getattr(training, name)) != getattr(plain, name):
            raise ValueError(f"training.{name}={value} has no effect in pre-training; leave it out")
    if isinstance(training.corrupt, dict):
        raise ValueError(f"training.corrupt={training.corrupt}: in pre-training there is one modality; give one number")


def _check_pretraining_ctc(modality: str, training: TrainingRecipe, codec: CodecRecipe) -> None:
    """Raise `ValueError` unless joint CTC, if it is asked for, goes from the tower's modality to one other."""
    if not training.ctc:
        if codec.kind in SPELLING_KINDS and (steps := codec.options.get("spelling_steps")):
            raise ValueError(
                f"codec.options: spelling_steps={steps} needs training.ctc, which names the task whose texts are "
                f"spelled, such as '{modality}->text'"
            )
        return
    task, *others = [parse_task(template) for template in training.ctc]
    if others or task.given != (modality,) or len(task.targets) > 1 or task.repeats:
        raise ValueError(
            f"training.ctc={training.ctc}: in pre-training it names one task, from {modality!r} to the column that is "
            f"spelled, such as '{modality}->text'"
        )


def _check_ctc_limit(limit: int | None, training: TrainingRecipe) -> None:
    """Raise `ValueError` for a limit of texts that nothing spells, or none of them."""
    if limit is None:
        return
    at_least("ctc_limit", limit, 1)
    if not training.ctc:
        raise ValueError(f"ctc_limit={limit} has no effect without training.ctc; leave it out")


def _check_buffer(recipe: FuseRecipe) -> None:
    """Raise `ValueError` for what asks for other rows than the one at hand, which are not there with `data.buffer`."""
    if recipe.data.buffer is None:
        return
    training = recipe.training
    asked: dict[str, Any] = {f"training.{n}": getattr(training, n) for n in ("interleave", "join", "prefix_cache")}
    asked["pseudo_labels"] = recipe.pseudo_labels
    if isinstance(named := training.history_dropout, dict):
        frozen = {name for name, tower in recipe.towers.items() if tower.train == "frozen"}
        asked["training.history_dropout of a frozen tower"] = [name for name in named if named[name] and name in frozen]
    if found := [name for name, value in asked.items() if value]:
        raise ValueError(f"data.buffer cannot be had with {found[0]}: rows come one by one; zipper prepare them")


def _check_patience(training: TrainingRecipe, data: DataRecipe) -> None:
    if training.patience is not None and data.validation is None:
        raise ValueError("training.patience needs a validation split: data.validation is null")


@dataclass(kw_only=True)
class CodecRecipe:
    """A codec to fit on the user's data, to build around a pre-trained model, or to take from a folder
    (docs/codecs.md). A plain string is its source.

    Args:
        kind: of `zipper_lm.codecs.codec.CODECS`, such as ``"text"`` (a tokenizer), ``"speech"`` (k-means units of
            cepstra, of any sound) or ``"pixels"`` (of small grey pictures).
        source: folder of a codec that is made (nothing is fitted then), or folder or Hub id of what the kind is built
            around.
        revision: on the Hub.
        options: what the kind takes.
    """

    kind: str = "text"
    source: str | None = None
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_string(cls, text: str) -> dict[str, Any]:
        """``towers.speech.codec=PATH`` on the command line."""
        return {"source": text}

    def __post_init__(self) -> None:
        if self.kind not in CODECS:
            raise ValueError(f"codec.kind must be one of {sorted(CODECS)}, got {self.kind!r}")
        if taken := sorted(set(self.options) & {"values", "texts", "source", "revision", "seed"}):
            raise ValueError(f"codec.options: {taken} are no options")

    def make(self, values: Sequence[Any] = (), seed: int = 0, texts: Sequence[str | None] | None = None) -> Codec:
        """The codec.

        Args:
            values: raw values to fit on. seed: of the fit. texts: what each value says, if that is known.

        Raises:
            ValueError: as `zipper_lm.codecs.codec.make_codec`.
        """
        return make_codec(
            self.kind,
            values,
            texts=texts,
            source=self.source,
            revision=self.revision,
            seed=seed,
            **self.options,
        )


@dataclass(kw_only=True)
class PretrainRecipe:
    """A small tower from scratch, for those who have none.

    Args:
        data: unaligned data; only the modality's own column is read, and what joint CTC spells.
        modality: the column.
        codec: the codec to fit or take.
        backbone: `model_type` and further fields of that family's config; vocabulary and special ids are set from
            the codec.
        training: how to train.
        context: tokens in one training stream; it holds as many rows as fit.
        embeddings: what the tower's begin at: ``"random"``, or ``"codebook"``, the vectors of the codec's units.
        ctc_limit: joint CTC, and a codec that learns to spell, are told the texts of this many rows, the first; of all
            others only the modality is used. `None` is all.
        output: folder for the tower and its codec.
        seed: of everything.
    """

    data: DataRecipe
    modality: str
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    backbone: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    context: int = 256
    embeddings: Literal["random", "codebook"] = "random"
    ctc_limit: int | None = None
    output: str
    seed: int = 0

    def __post_init__(self) -> None:
        _check_pretraining(self.training)
        _check_pretraining_ctc(self.modality, self.training, self.codec)
        _check_ctc_limit(self.ctc_limit, self.training)
        _check_patience(self.training, self.data)
        if self.data.buffer is not None:
            raise ValueError(f"data.buffer={self.data.buffer} has no effect in pre-training; leave it out")


@dataclass(kw_only=True)
class PretrainHere:
    """A tower to be made on the way, from its own side of the data alone.

    Args:
        data: unaligned data; null is the fusion's own.
        codec, backbone, training, context, embeddings, ctc_limit: as of a `PretrainRecipe`.
    """

    data: DataRecipe | None = None
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    backbone: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    context: int = 256
    embeddings: Literal["random", "codebook"] = "random"
    ctc_limit: int | None = None

    def __post_init__(self) -> None:
        _check_pretraining(self.training)
        _check_ctc_limit(self.ctc_limit, self.training)


@dataclass(kw_only=True)
class TowerRecipe:
    """One tower. A plain string is its source.

    Args:
        source: Hub id or folder; only beside a `start` it may be left out. revision: on the Hub.
        codec: the codec, if it is not beside the tower.
        train: ``"frozen"``, ``"full"`` or ``"lora"``. lora: arguments of `peft.LoraConfig`.
        input_projection: ``"residual"``, ``"paper"`` or ``"none"``.
        input_projection_layer: the layer before which it stands, 0 for the embeddings, or ``"first_zip"``.
        input_projection_scale: what it adds is multiplied by this number; ``"stream"`` measures it.
        layers: dotted name of the layer list, where it is not found.
        trust_remote_code: let code from the Hub run.
        architecture: class of the tower in transformers, where the checkpoint does not say.
        prefix: what stands before the names of the tower's tensors in a checkpoint of a larger model, such as ``lm.``.
        config_key: where in the checkpoint's ``config.json`` the tower's own config is.
        config: fields of the tower's config to set otherwise than the checkpoint does.
        quantization: ``quant_method`` and arguments of transformers' quantization config (frozen towers, LoRA).
        device: where the tower and what is new for it are, such as ``cuda:1``, apart from the others; null is where the
            run is.
        pretrain: make the tower first, unless `source` is there already.
    """

    source: str = ""
    revision: str | None = None
    codec: CodecRecipe | None = None
    train: Training = "frozen"
    lora: dict[str, Any] | None = None
    input_projection: InputProjectionForm = "residual"
    input_projection_layer: int | FirstZip = 0
    input_projection_scale: float | Stream = 1.0
    layers: str | None = None
    trust_remote_code: bool = False
    architecture: str = ""
    prefix: str | None = None
    config_key: str | None = None
    config: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    device: str | None = None
    pretrain: PretrainHere | None = None

    def __post_init__(self) -> None:
        check_lora(self.lora)
        check_projection_layer(self.input_projection_layer)
        check_projection_scale(self.input_projection, self.input_projection_scale)

    @classmethod
    def from_string(cls, text: str) -> dict[str, Any]:
        """``towers.text=PATH`` on the command line."""
        return {"source": text}


@dataclass(kw_only=True)
class PseudoLabelsRecipe:
    """Further training rows of which one side is known: a model that was fused on the pairs writes the other.

    Args:
        task: what is known and what is written, such as ``"speech->text"`` where there is sound without text. The rows
            serve in all of the recipe's tasks.
        source: where the rows are; null is the recipe's own data, as a whole, whatever `data.limit` and `data.fraction`
            say. Only what the task gives is read.
        revision, columns: as in data, of a source of its own. train: the split; null is ``"train"``, or the data's own.
        limit: use only the first rows.
        model: folder of the model that writes. If nothing is there, it is made first: by the same recipe, without
            pseudo-labels. Experiments always make it, at a place of their own.
        steps: optimizer steps of the model that writes, where it is made; null is as many as the recipe's. It has fewer
            rows to learn from.
        rounds: how often; from the second on, the model that writes has itself learned from pseudo-labels.
        share: of training rows that are pseudo-labelled: whichever are too few for it are repeated. null: each once.
        keep: share of the pseudo-labelled rows that are used, those of which the model that wrote them is surest.
    """

    task: str
    source: str | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None
    train: str | None = None
    limit: int | None = None
    model: str = ""
    steps: int | None = None
    rounds: int = 1
    share: float | None = 0.8
    keep: float = 1.0

    def __post_init__(self) -> None:
        at_least("pseudo_labels.rounds", self.rounds, 1)
        for name in ("revision", "columns"):
            if self.source is None and getattr(self, name) is not None:
                raise ValueError(
                    f"pseudo_labels.{name}={getattr(self, name)!r} has no effect without pseudo_labels.source: the "
                    "rows are the recipe's own data"
                )
        for name in ("limit", "steps"):
            if (value := getattr(self, name)) is not None:
                at_least(f"pseudo_labels.{name}", value, 1)
        if self.share is not None and not 0.0 < self.share < 1.0:
            raise ValueError(f"pseudo_labels.share must be in (0, 1), got {self.share}")
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"pseudo_labels.keep must be in (0, 1], got {self.keep}")


@dataclass(kw_only=True)
class FuseRecipe:
    """The main job.

    Args:
        towers: by modality.
        start: folder or Hub id of a model that was fused before, to be trained further; its towers, codecs and zips are
            the recipe's then, and of towers the recipe may say where and in what they are. null begins with zips that
            add nothing.
        architecture: ``"zipper"``, or ``"single-decoder"``: the baseline. Then the first tower is the decoder,
            trained in full (or by LoRA, if it says so), and the others lend their codecs only. If its source is a saved
            single decoder, that one is trained further.
        data: aligned data. tasks: template to weight, such as ``{"speech->text": 1}``.
        scored: tasks that are scored on the validation split, and so choose the checkpoint that is kept; null is all.
        pseudo_labels: further rows that lack a side, which a model writes first.
        zips: who reads whom, and how; default all pairs.
        loss_weights: per modality.
        training: how to train.
        generation: per modality, arguments of `transformers.GenerationConfig` for evaluation, kept with the model.
        best_of: samples of what a task ends in, when it is scored; one of them counts. best_by: ``"score"``, the one
            that the model gives the highest probability; ``"judge"``, the one that the judge hears best; or
            ``"reading"``, the one that the model itself reads best.
        judge: folder of a recogniser or picture classifier, to score what is generated, or folder or Hub id of a public
            speech recogniser; null fits one on the data set's split ``judge``, else on the training split, once.
        normaliser: how texts are written before words are compared: ``"plain"`` (small letters, no punctuation) or
            ``"whisper-english"``.
        output: folder for the model.
        overwrite: replace what is at `output`.
        seed: of everything.
    """

    towers: dict[str, TowerRecipe] = field(default_factory=dict)
    start: str | None = None
    architecture: Literal["zipper", "single-decoder"] = "zipper"
    data: DataRecipe
    tasks: dict[str, float]
    scored: list[str] | None = None
    pseudo_labels: PseudoLabelsRecipe | None = None
    zips: list[ZipSpec] = field(default_factory=lambda: [ZipSpec()])
    loss_weights: dict[str, float] = field(default_factory=dict)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    generation: dict[str, dict[str, Any]] = field(default_factory=dict)
    best_of: int = 1
    best_by: Literal["score", "judge", "reading"] = "score"
    judge: str | None = None
    normaliser: Literal["plain", "whisper-english"] = "plain"
    output: str
    overwrite: bool = False
    seed: int = 0

    @property
    def trust_remote_code(self) -> bool:
        """Whether the recipe lets a tower or a tokenizer run code of its own: then the model that it made may, too."""
        codecs = [tower.codec for tower in self.towers.values() if tower.codec is not None]
        named = any(codec.options.get("trust_remote_code") for codec in codecs)
        return named or any(tower.trust_remote_code for tower in self.towers.values())

    def __post_init__(self) -> None:
        at_least("best_of", self.best_of, 1)
        if not self.towers and self.start is None:
            raise ValueError("missing towers (or start, a model that was fused before)")
        if self.start is None and (lacking := [name for name, tower in self.towers.items() if not tower.source]):
            raise ValueError(f"missing towers.{lacking[0]}.source, a Hub id or folder")
        if self.start is not None and self.architecture != "zipper":
            raise ValueError(f"start={self.start!r} is for towers; architecture {self.architecture!r} has none")
        _check_patience(self.training, self.data)
        _check_buffer(self)
        for tower in self.towers.values():
            if (here := tower.pretrain) is not None:
                _check_patience(here.training, here.data or self.data)
