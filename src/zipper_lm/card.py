"""The model card: what a checkpoint is, what it is made of, how it was trained and what it scored, from its records.

Nothing here is guessed: what no file says is said to be unknown. No path of the machine that wrote it gets in. Runs and
scores count only if they are of the very weights that lie beside them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME

from zipper_lm import __version__
from zipper_lm.architecture import draw
from zipper_lm.config import TowerSpec, ZipperConfig
from zipper_lm.data.tasks import Task, parse_task
from zipper_lm.evaluation.results import RESULTS_FILE, read_results, weights_digest
from zipper_lm.files import new_file
from zipper_lm.hub import is_hub_id, public, public_name
from zipper_lm.modality.codec import CODEC_FILE, can_decode
from zipper_lm.modality.pretrained import MODEL_FOLDER

if TYPE_CHECKING:
    from zipper_lm.generation import Writer

PICTURE_FILE = "architecture.png"
RUN_FILE = "run.json"
GENERATION_FILE = "generation.json"
UNKNOWN = "unknown"
EXAMPLE_TEXT = "one two"
_SEAL = re.compile(r"\n<!-- written by zipper-lm, sha256 ([0-9a-f]{64}) -->\n\Z")
_PIPELINES = {
    "speech->text": "automatic-speech-recognition",
    "text->speech": "text-to-speech",
    "image->text": "image-to-text",
    "text->image": "text-to-image",
}
"""The Hub's names of tasks (https://huggingface.co/tasks)."""
_CITATION = """```bibtex
@misc{zayats2024zipper,
  title  = {Zipper: A Multi-Tower Decoder Architecture for Fusing Modalities},
  author = {Zayats, Vicky and Chen, Peter and Ferrari, Melissa and Padfield, Dirk},
  year   = {2024},
  eprint = {2405.18669},
  archivePrefix = {arXiv}
}
```"""


def refresh_card(folder: str | Path, model: Writer, *, kept: str | Path | None = None, name: str | None = None) -> bool:
    """Write a checkpoint's `README.md` and picture, unless somebody edited the card that is there.

    Args:
        folder: with `config.json`, `model.safetensors` and codecs. model: what they hold.
        kept: folder with the present card, `run.json`, `results.json` and `generation.json`; `None` is `folder`.
        name: what the model shall be loaded by, such as its Hub id; `None` is the name of the folder `kept`.

    Returns:
        Whether a card was written.
    """
    folder, kept = Path(folder), Path(kept or folder)
    if is_edited(kept / REPOCARD_NAME):
        return False
    records = _Records(folder, kept, type(model.config))
    name = name or kept.resolve().name
    text = "\n\n".join(_parts(model, name, records)) + "\n"
    card = f"---\n{_metadata(model, name, records).to_yaml()}\n---\n{text}"
    seal = hashlib.sha256(card.encode()).hexdigest()
    with new_file(folder / PICTURE_FILE, overwrite=True) as picture:
        _draw(model, picture)
    with new_file(folder / REPOCARD_NAME, overwrite=True) as file:
        file.write_text(f"{card}\n<!-- written by zipper-lm, sha256 {seal} -->\n", encoding="utf-8")
    return True


def is_edited(file: Path) -> bool:
    """Whether a card is there that is not, to the letter, one that `refresh_card` wrote."""
    if not file.is_file():
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    seal = _SEAL.search(text)
    return seal is None or hashlib.sha256(text[: seal.start()].encode()).hexdigest() != seal[1]


class _Records:
    """What the files beside a model say of it, without the places of this machine.

    Args:
        folder: with config and weights. kept: with the records; those of other weights are left out.
        config: class of the config.
    """

    def __init__(self, folder: Path, kept: Path, config: Any) -> None:
        self.folder = folder
        self.specs: dict[str, TowerSpec] = _specs(config.from_pretrained(folder))
        """As saved: where the weights are now."""
        run = _read_mapping(kept / RUN_FILE)
        weights = weights_digest(folder) if run or (kept / RESULTS_FILE).is_file() else None
        self.run = public(run) if run.get("weights") == weights else {}
        self.results: list[dict[str, Any]] = []
        with suppress(ValueError):  # as in `_read_mapping`
            self.results = [public(entry) for entry in read_results(kept) if entry.get("weights") == weights]
        self.generation = _read_mapping(kept / GENERATION_FILE)

    @property
    def recipe(self) -> dict[str, Any]:
        return self.run.get("recipe", {})

    @property
    def tasks(self) -> list[Task]:
        """Those that were trained and are given something, the weightiest first."""
        weights = self.recipe.get("tasks", {})
        found = [parse_task(t) for t in sorted(weights, key=lambda t: -weights[t]) if weights[t] > 0]
        return [task for task in found if task.given]


def _read_mapping(file: Path) -> dict[str, Any]:
    """Nothing from what cannot be read: a file of another origin is no reason not to save a model."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


# What the model is made of


def _specs(config: Any) -> dict[str, TowerSpec]:
    """The pre-trained decoders: towers by name, or the single decoder under the modality it had."""
    return config.tower_specs if isinstance(config, ZipperConfig) else {config.vocabulary[0].name: config.spec}


def _backbone(model: Any, name: str) -> Any:
    return model.tower(name).backbone if isinstance(model.config, ZipperConfig) else model.backbone


def _zips(model: Writer) -> Mapping[tuple[str, str], Sequence[tuple[int, int]]]:
    """By (reader, source), the pairs (reader's layer, source's layer); none in a single decoder."""
    return getattr(model, "layer_pairs", {})


def _is_bundled(name: str, spec: TowerSpec) -> bool:
    return spec.source == f"towers/{name}"


def _on_hub(spec: TowerSpec) -> bool:
    """What was read from the Hub has its commit recorded; a relative path that is gone only looks like an id."""
    return spec.revision is not None and is_hub_id(spec.source)


def _elsewhere(records: _Records) -> dict[str, TowerSpec]:
    """Towers whose weights are not in the folder."""
    return {n: s for n, s in records.specs.items() if s.train != "full" and s.source and not _is_bundled(n, s)}


def _draw(model: Any, file: Path) -> None:
    towers = {}
    for name, spec in _specs(model.config).items():
        if isinstance(model.config, ZipperConfig):
            shown, depth = name, model.tower(name).depth
        else:
            shown, depth = " + ".join(model.names), model.backbone.config.num_hidden_layers
        towers[shown] = (f"{spec.architecture}, {spec.train}", depth)
    draw(file, towers, _zips(model))


# The head


def _metadata(model: Writer, name: str, records: _Records) -> ModelCardData:
    scores = list(_eval_results(records.results))
    data = str(records.run.get("data", {}).get("source", "")).partition(":")[0]
    license = _common_license(records)
    other = re.fullmatch(r"other \((.+)\)", license or "")
    return ModelCardData(
        base_model=[s.source for s in _specs(model.config).values() if _on_hub(s)] or None,
        datasets=[data] if is_hub_id(data) else None,
        library_name="zipper-lm",
        license="other" if other else license,
        license_name=other[1] if other else None,
        pipeline_tag=_pipeline(model, records),
        tags=["zipper", *model.names],
        model_name=name.rpartition("/")[2] if scores else None,
        eval_results=scores or None,
    )


def _common_license(records: _Records) -> str | None:
    """The one licence of all towers, if they have the same; transformers' Trainer names a base model's in that way."""
    license, *others = {spec.license for spec in records.specs.values()}
    several = license is not None and "," in license and not license.startswith("other (")
    return None if others or several else license


def _pipeline(model: Writer, records: _Records) -> str | None:
    """The Hub's name of the one thing it does, or of doing several; `None` for what the Hub has no name for."""
    done = {str(t) for t in records.tasks} or {f"{source}->{reader}" for reader, source in _zips(model)}
    return _PIPELINES.get(*done) if len(done) == 1 else "any-to-any"


def _eval_results(results: Sequence[Mapping[str, Any]]) -> Iterator[EvalResult]:
    """Scores on whole splits; those on a part of one are in the table only."""
    for entry in results:
        if entry.get("where") or entry.get("limit"):
            continue
        data = public_name(entry["data"])
        for metric in ("wer", "cer"):
            yield EvalResult(
                task_type=_PIPELINES.get(entry["template"], "other"),
                task_name=entry["template"],
                dataset_type=data,
                dataset_name=data,
                dataset_split=entry["split"],
                metric_type=metric,
                metric_name=f"{metric.upper()} (%)" + (", by an independent judge" if "judge" in entry else ""),
                metric_value=entry[metric],
            )


# The body


def _parts(model: Writer, name: str, records: _Records) -> Iterator[str]:
    yield f"# {' + '.join(model.names)}"
    yield _what_it_is(model, records)
    yield f"![Architecture]({PICTURE_FILE})"
    yield f"## Use\n\n{_usage(model, name, records)}"
    yield f"## Towers\n\n{_towers(model, records)}"
    if zips := _zips(model):
        yield f"## Zips\n\n{_zip_table(model, zips)}"
    yield f"## Codecs\n\n{_codecs(model, records.folder)}"
    yield f"## Data and training\n\n{_training(records)}"
    yield f"## Results\n\n{_results(records.results)}"
    yield f"## Limits\n\n{_limits(model, records)}"
    yield f"## Licences\n\n{_licences(records)}"
    versions = f"zipper-lm {__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    yield f"## Citation\n\nThe architecture is that of the paper:\n\n{_CITATION}"
    yield f"This card was written with {versions}."


def _what_it_is(model: Writer, records: _Records) -> str:
    specs = records.specs
    zipper = "[Zipper](https://arxiv.org/abs/2405.18669)"
    if not isinstance(model.config, ZipperConfig):
        (spec,) = specs.values()
        return (
            f"One pre-trained decoder ({spec.architecture}) whose vocabulary was expanded for {_and(model.names)}: the "
            f"baseline that {zipper} is compared with. All its weights are here."
        )
    readers: dict[str, list[str]] = {}
    for reader, source in _zips(model):
        readers.setdefault(reader, []).append(f"`{source}`")
    kinds = {"frozen": "frozen", "full": "trained", "lora": "frozen under LoRA adapters"}
    towers = _and([f"`{n}` ({s.architecture}, {kinds[s.train]})" for n, s in specs.items()])
    reads = "; ".join(f"`{reader}` reads {_and(sources)}" for reader, sources in readers.items())
    named = [f"`{name}`" for name in _elsewhere(records)]
    where = (
        f"The weights of {_and(named)} are not here: they are fetched from where they are, and refused if they are not "
        "the same."
    )
    return (
        f"Pre-trained decoders (towers), fused by {zipper}: {towers}. They advance together, layer by layer, and read "
        f"each other through gated cross-attention (zips): {reads}. " + (where if named else "All weights are here.")
    )


def _usage(model: Writer, name: str, records: _Records) -> str:
    zipper = isinstance(model.config, ZipperConfig)
    owner, home = ("ZipperModel", "zipper_lm") if zipper else ("SingleDecoder", "zipper_lm.baselines.single_decoder")
    task = _example_task(model, records)
    given = ", ".join(_example_segment(model, modality) for modality in task.given)
    target = task.targets[-1]
    settings = {t: records.generation.get(t) or {"max_new_tokens": 32} for t in dict.fromkeys(task.targets)}
    trust = ", trust_remote_code=True" if any(s.trust_remote_code for s in records.specs.values()) else ""
    codec = model.processor.codecs.get(target) if model.processor is not None else None
    has_value = codec is not None and can_decode(codec)
    lines = [
        "```python",
        f"from zipper_lm import Document, Segment{', ZipperModel' if zipper else ''}",
        *([] if zipper else [f"from {home} import {owner}"]),
        "",
        f'model = {owner}.from_pretrained("{name}"{trust})',
        f"document = Document([{given}])",
        f"settings = {settings!r}",
        f"written = model.generate([document], {list(task.targets)!r}, settings=settings)[0]",
        f"print(written[-1].{'value' if has_value else 'ids'})",
        "```",
    ]
    notes = [
        "The package: `zipper-lm`. " + ("Its command `zipper generate` does the same." if codec is not None else "")
    ]
    away = {n: s for n, s in _elsewhere(records).items() if not _on_hub(s)}
    here = [f"`{n}` (a folder named `{public_name(s.source)}`)" for n, s in away.items()]
    if here:
        notes.append(f"On another machine, say where {_and(here)} is: `from_pretrained(..., towers={{NAME: PATH}})`.")
    return "\n".join(lines) + "\n\n" + "\n".join(note.strip() for note in notes)


def _example_task(model: Writer, records: _Records) -> Task:
    if records.tasks:
        return records.tasks[0]
    reader, source = next(iter(_zips(model)), (model.names[1], model.names[0]))
    return Task((source,), (reader,))


def _example_segment(model: Writer, modality: str) -> str:
    """Code for something to give: a text that its tokenizer knows, a sound file, or else ids."""
    codec = model.processor.codecs.get(modality) if model.processor is not None else None
    if codec is not None and codec.kind == "text":
        with suppress(ValueError):  # a small tokenizer may lack a letter
            codec.encode([EXAMPLE_TEXT])
            return f'("{modality}", "{EXAMPLE_TEXT}")'
    elif codec is not None and codec.rate is not None:
        return f'("{modality}", "input.wav")'
    content = next(i for i in range(4) if i not in model.specials[modality])
    return f'Segment("{modality}", ids=[{content}])'


def _towers(model: Writer, records: _Records) -> str:
    rows = []
    origins = _specs(model.config)  # what is bundled came from somewhere
    for name, spec in records.specs.items():
        rows.append(
            (
                f"`{name}`",
                f"{spec.architecture}, {spec.train}",
                _origin(name, origins[name]) + (" (its weights are here)" if name not in _elsewhere(records) else ""),
                f"`{origins[name].revision}`" if origins[name].revision else "-",
                f"{_backbone(model, name).num_parameters():,}",
                f"`{spec.weights_hash}`" if spec.weights_hash else UNKNOWN,
            )
        )
    heads = ("Tower", "Decoder", "From", "Revision", "Parameters", "SHA-256 of its weights before fusing")
    return _table(heads, rows)


def _origin(name: str, spec: TowerSpec) -> str:
    if _on_hub(spec):
        return f"[{spec.source}](https://huggingface.co/{spec.source})"
    if not spec.source or _is_bundled(name, spec):
        return "not recorded"
    return f"a folder, `{public_name(spec.source)}`"


def _zip_table(model: Any, zips: Mapping[tuple[str, str], Sequence[tuple[int, int]]]) -> str:
    rows = []
    for (reader, source), pairs in zips.items():
        layers = ", ".join(f"{layer} <- {source_layer}" for layer, source_layer in pairs)
        count = sum(p.numel() for p in model.zips[reader][source].parameters())
        rows.append((f"`{reader}`", f"`{source}`", layers, f"{count:,}"))
    return _table(("Reader", "reads", "Layer <- layer", "Parameters"), rows)


def _codecs(model: Writer, folder: Path) -> str:
    codecs = model.processor.codecs if model.processor is not None else {}
    rows = []
    for name in model.names:
        if (codec := codecs.get(name)) is None:
            rows.append((f"`{name}`", "none: takes and gives ids", "", "", ""))
            continue
        described = _read_mapping(folder / "codecs" / name / CODEC_FILE)
        around = [_model_inside(v) for v in described.values() if isinstance(v, dict) and "source" in v]
        rate = "-" if codec.rate is None else f"{codec.rate:g}"
        rows.append((f"`{name}`", codec.kind, f"{codec.vocab_size:,}", rate, _and(around) or "-"))
    return _table(("Modality", "Codec", "Ids", "Tokens per second", "Around"), rows)


def _model_inside(at: Mapping[str, Any]) -> str:
    """A `zipper_lm.modality.pretrained.ModelSource` of a codec's `codec.json`, in words."""
    if at["source"] == MODEL_FOLDER:
        return "one kept beside it"
    return f"`{public_name(str(at['source']))}`" + (f" at `{at['revision']}`" if at.get("revision") else "")


def _pseudo_labels(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    wanted = recipe.get("pseudo_labels") or {}
    return f"{data['pseudo_labels']:,} further rows of `{wanted.get('task')}`, of which a model wrote the last part"


def _training(records: _Records) -> str:
    recipe, run = records.recipe, records.run
    if not recipe:
        return "No record of the training lies beside these weights: data, steps and rates are unknown."
    data, training = run.get("data", {}), recipe.get("training", {})
    splits = [f"{count:,} rows of split `{split}`" for split, count in data.get("rows", {}).items()]
    tasks = ", ".join(f"`{task}` ({weight:g})" for task, weight in recipe.get("tasks", {}).items())
    rows = [
        ("Data", f"`{public_name(str(data.get('source', UNKNOWN)))}`: {_and(splits) or UNKNOWN}"),
        *([("Pseudo-labels", _pseudo_labels(recipe, data))] if data.get("pseudo_labels") else []),
        ("Tasks (weight)", tasks),
        ("Steps", f"{run.get('steps', UNKNOWN)}, kept: {run.get('best_step') or 'the last'}"),
        ("Documents per step and device", training.get("batch_size", UNKNOWN)),
        ("Learning rate, of towers", f"{training.get('learning_rate')}, {training.get('tower_learning_rate')}"),
        ("Parameters trained, of all", "{trained:,}, {all:,}".format(**run["parameters"])),
        ("Seed", recipe.get("seed", UNKNOWN)),
        ("SHA-256 of the recipe", f"`{run.get('recipe_hash', UNKNOWN)}`"),
    ]
    unchanged = run.get("frozen_unchanged", {})
    kept = [f"`{n}`" for n, same in unchanged.items() if same]
    told = f"\n\nAfter training, all tensors of {_and(kept)} were still bit-identical." if kept else ""
    return _table(("What", "Value"), rows) + told


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "No evaluation of these weights is recorded (`zipper evaluate` records one)."
    rows = []
    for entry in results:
        low, high = entry.get("wer_95", (None, None))
        part = [*entry.get("where", []), *([f"first {entry['limit']}"] if entry.get("limit") else [])]
        rows.append(
            (
                f"`{entry['template']}`",
                f"`{public_name(entry['data'])}`, split `{entry['split']}`" + "".join(f", {p}" for p in part),
                f"{entry['utterances']:,}",
                f"{entry['wer']} ({low} to {high})",
                entry["cer"],
                ", ".join(entry.get("set", [])) or "as stored",
                _yardsticks(entry),
            )
        )
    heads = ("Task", "Data", "Rows", "WER % (95 % interval)", "CER %", "Generation", "What is written is read")
    return _table(heads, rows)


def _yardsticks(entry: Mapping[str, Any]) -> str:
    if "judge" not in entry:
        return "as it is"
    names = {"judge_wer_on_originals": "originals", "oracle_wer": "codec alone"}
    found = [f"{words}: WER {entry[key]} %" for key, words in names.items() if key in entry]
    return "by an independent judge" + (f" ({', '.join(found)})" if found else "")


def _limits(model: Writer, records: _Records) -> str:
    lines = []
    if records.tasks:
        lines.append(f"Trained for {_and([f'`{t}`' for t in records.tasks])} only; other directions are untested.")
    for name in records.specs:
        limit = getattr(_backbone(model, name).config, "max_position_embeddings", None)
        if limit:
            lines.append(f"`{name}`: at most {limit:,} tokens of its own in a document.")
    lines += [f"Found after training: {message}" for message in records.run.get("signatures", [])]
    lines.append("What the towers' own cards say of bias, languages and misuse holds here too.")
    return "\n".join(f"- {line}" for line in lines)


def _licences(records: _Records) -> str:
    common = _common_license(records)
    told = f"; the head of this card names the towers' own, {common}, until they do" if common else ""
    rows = [("New weights", f"{UNKNOWN}: whoever shares them is to say{told}")]
    for name, spec in records.specs.items():
        where = "see its page" if _on_hub(spec) else "no model card beside it states one"
        rows.append((f"Tower `{name}`", spec.license or f"{UNKNOWN}: {where}"))
    rows.append(("Codecs and data", f"{UNKNOWN}: see their pages"))
    return _table(("Part", "Licence"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _and(words: Sequence[str]) -> str:
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last
