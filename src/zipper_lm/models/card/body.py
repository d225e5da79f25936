"""The body of a card, which people read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from zipper_lm.codecs.codec import CODEC_FILE, can_decode
from zipper_lm.codecs.pretrained import MODEL_FOLDER
from zipper_lm.data.processor import CODEC_FOLDERS
from zipper_lm.data.tasks import Task
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.fusion.zip_spec import EMBEDDINGS
from zipper_lm.models.card.metadata import common_license
from zipper_lm.models.card.records import (
    PICTURE_FILE,
    Records,
    elsewhere,
    is_bundled,
    mapping_if_whole,
    on_hub,
)
from zipper_lm.utils.places import public_name

if TYPE_CHECKING:
    from zipper_lm.generation.writer import Writer

UNKNOWN = "unknown"
EXAMPLE_TEXT = "one two"
_CITATION = """```bibtex
@misc{zayats2024zipper,
  title  = {Zipper: A Multi-Tower Decoder Architecture for Fusing Modalities},
  author = {Zayats, Vicky and Chen, Peter and Ferrari, Melissa and Padfield, Dirk},
  year   = {2024},
  eprint = {2405.18669},
  archivePrefix = {arXiv}
}
```"""


def parts(model: Writer, name: str, records: Records) -> Iterator[str]:
    """Sections in Markdown, from title to citation."""
    yield f"# {' + '.join(model.names)}"
    yield _what_it_is(model, records)
    yield f"![Architecture]({PICTURE_FILE})"
    yield f"## Use\n\n{_usage(model, name, records)}"
    yield f"## Towers\n\n{_towers(model, records)}"
    if zips := model.layer_pairs:
        yield f"## Zips\n\n{_zip_table(model, zips)}"
    yield f"## Codecs\n\n{_codecs(model, records.folder)}"
    yield f"## Data and training\n\n{_training(records)}"
    yield f"## Results\n\n{_results(records)}"
    yield f"## Limits\n\n{_limits(model, records)}"
    yield f"## Licences\n\n{_licences(records)}"
    versions = f"zipper-lm {version('zipper-lm')}, transformers {transformers.__version__}, torch {torch.__version__}"
    yield f"## Citation\n\nThe architecture is that of the paper:\n\n{_CITATION}"
    yield f"This card was written with {versions}."


def _what_it_is(model: Writer, records: Records) -> str:
    specs = records.specs
    zipper = "[Zipper](https://arxiv.org/abs/2405.18669)"
    if len(specs) == 1:
        (spec,) = specs.values()
        return (
            f"One pre-trained decoder ({spec.architecture}) whose vocabulary was expanded for {_and(model.names)}: the "
            f"baseline that {zipper} is compared with. All its weights are here."
        )
    readers: dict[str, list[str]] = {}
    for reader, source in model.layer_pairs:
        readers.setdefault(reader, []).append(f"`{source}`")
    kinds = {"frozen": "frozen", "full": "trained", "lora": "frozen under LoRA adapters"}
    towers = _and([f"`{n}` ({s.architecture}, {kinds[s.train]})" for n, s in specs.items()])
    reads = "; ".join(f"`{reader}` reads {_and(sources)}" for reader, sources in readers.items())
    named = [f"`{name}`" for name in elsewhere(records)]
    where = (
        f"The weights of {_and(named)} are not here: they are fetched from where they are, and refused if they are not "
        "the same."
    )
    return (
        f"Pre-trained decoders (towers), fused by {zipper}: {towers}. They advance together, layer by layer, and read "
        f"each other through gated cross-attention (zips): {reads}. " + (where if named else "All weights are here.")
    )


def _usage(model: Writer, name: str, records: Records) -> str:
    owner = type(model).__name__
    task = _example_task(model, records)
    given = ", ".join(_example_segment(model, modality) for modality in task.given)
    target = task.targets[-1]
    settings = {t: records.generation.get(t) or {"max_new_tokens": 32} for t in dict.fromkeys(task.targets)}
    trust = ", trust_remote_code=True" if any(s.trust_remote_code for s in records.specs.values()) else ""
    codec = model.processor.codecs.get(target) if model.processor is not None else None
    has_value = codec is not None and can_decode(codec)
    lines = [
        "```python",
        f"from zipper_lm import Document, Segment, {owner}",
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
    away = {n: s for n, s in elsewhere(records).items() if not on_hub(s)}
    here = [f"`{n}` (a folder named `{public_name(s.source)}`)" for n, s in away.items()]
    if here:
        notes.append(f"On another machine, say where {_and(here)} is: `from_pretrained(..., towers={{NAME: PATH}})`.")
    return "\n".join(lines) + "\n\n" + "\n".join(note.strip() for note in notes)


def _example_task(model: Writer, records: Records) -> Task:
    if records.tasks:
        return records.tasks[0]
    reader, source = next(iter(model.layer_pairs), (model.names[1], model.names[0]))
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


def _towers(model: Writer, records: Records) -> str:
    rows = []
    origins = model.config.tower_specs  # what is bundled came from somewhere
    for name, spec in records.specs.items():
        rows.append(
            (
                f"`{name}`",
                f"{spec.architecture}, {spec.train}",
                _origin(name, origins[name]) + (" (its weights are here)" if name not in elsewhere(records) else ""),
                f"`{origins[name].revision}`" if origins[name].revision else "-",
                f"{model.backbones()[name].num_parameters():,}",
                f"`{spec.weights_hash}`" if spec.weights_hash else UNKNOWN,
            )
        )
    heads = ("Tower", "Decoder", "From", "Revision", "Parameters", "SHA-256 of its weights before fusing")
    return _table(heads, rows)


def _origin(name: str, spec: TowerSpec) -> str:
    if on_hub(spec):
        return f"[{spec.source}](https://huggingface.co/{spec.source})"
    if not spec.source or is_bundled(name, spec):
        return "not recorded"
    return f"a folder, `{public_name(spec.source)}`"


def _zip_table(model: Any, zips: Mapping[tuple[str, str], Sequence[tuple[int, int]]]) -> str:
    rows = []
    for (reader, source), pairs in zips.items():
        layers = ", ".join(f"{layer} <- {'embeddings' if m == EMBEDDINGS else m}" for layer, m in pairs)
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
        described = mapping_if_whole(folder / CODEC_FOLDERS / name / CODEC_FILE)
        around = [_model_inside(v) for v in described.values() if isinstance(v, dict) and "source" in v]
        rate = "-" if codec.rate is None else f"{codec.rate:g}"
        rows.append((f"`{name}`", codec.kind, f"{codec.vocab_size:,}", rate, _and(around) or "-"))
    return _table(("Modality", "Codec", "Ids", "Tokens per second", "Around"), rows)


def _model_inside(at: Mapping[str, Any]) -> str:
    """A `zipper_lm.codecs.pretrained.ModelSource` of a codec's `codec.json`, in words."""
    if at["source"] == MODEL_FOLDER:
        return "one kept beside it"
    return f"`{public_name(str(at['source']))}`" + (f" at `{at['revision']}`" if at.get("revision") else "")


def _pseudo_labels(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    wanted = recipe.get("pseudo_labels") or {}
    return f"{data['pseudo_labels']:,} further rows of `{wanted.get('task')}`, of which a model wrote the last part"


def _start(origin: Mapping[str, Any]) -> str:
    """What a model was started from, and that from what, as far as records tell."""
    of = [f"{origin['steps']} steps"] if origin.get("steps") else []
    of += [f"on `{public_name(str(origin['data']))}`"] if origin.get("data") else []
    told = ", of ".join([f"`{public_name(str(origin.get('source', UNKNOWN)))}`", *([" ".join(of)] if of else [])])
    before = origin.get("started_from")
    return f"{told}; that from {_start(before)}" if isinstance(before, dict) else told


def _training(records: Records) -> str:
    recipe, run = records.recipe, records.run
    if not recipe:
        return "No record of the training lies beside these weights: data, steps and rates are unknown."
    data, training = run.get("data", {}), recipe.get("training", {})
    splits = [f"{count:,} rows of split `{split}`" for split, count in data.get("rows", {}).items()]
    tasks = ", ".join(f"`{task}` ({weight:g})" for task, weight in recipe.get("tasks", {}).items())
    started = run.get("started_from")
    rows = [
        ("Data", f"`{public_name(str(data.get('source', UNKNOWN)))}`: {_and(splits) or UNKNOWN}"),
        *([("Started from", _start(started))] if isinstance(started, dict) else []),
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


def _results(records: Records) -> str:
    if not (results := records.results):
        return "No evaluation of these weights is recorded (`zipper evaluate` records one)."
    rows = []
    for entry in (scored := [entry for entry in results if "wer" in entry]):
        low, high = entry.get("wer_95", (None, None))
        part = [*entry.get("where", []), *([f"first {entry['limit']}"] if entry.get("limit") else [])]
        part += [f"in {dtype}"] if (dtype := records.other_dtype(entry)) else []
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
    told = [_table(heads, rows)] if scored else []
    forgotten = [_forgetting(entry, records.other_dtype(entry)) for entry in results if "same_answers" in entry]
    return "\n\n".join([*told, *forgotten])


def _forgetting(entry: Mapping[str, Any], dtype: str | None) -> str:
    """What its text decoder has forgotten, as `zipper_lm.evaluation.forgetting` has it, in which dtype."""
    before, after = (entry[when]["perplexity"] for when in ("before", "after"))
    where = f" (in {dtype})" if dtype else ""
    return (
        f"Asked as itself{where}, the text decoder gives {entry['same_answers']} of {entry['questions']} plain "
        "questions the answer that it gave before fusion, to the letter; its perplexity on "
        f"`{public_name(entry['data'])}`, split `{entry['split']}`, is {after} a token, and was {before}."
    )


def _yardsticks(entry: Mapping[str, Any]) -> str:
    if "judge" not in entry:
        return "as it is"
    names = {"judge_wer_on_originals": "originals", "oracle_wer": "codec alone", "look_up_wer": "codec by look-up"}
    found = [f"{words}: WER {entry[key]} %" for key, words in names.items() if key in entry]
    return "by an independent judge" + (f" ({', '.join(found)})" if found else "")


def _limits(model: Writer, records: Records) -> str:
    lines = []
    if records.tasks:
        lines.append(f"Trained for {_and([f'`{t}`' for t in records.tasks])} only; other directions are untested.")
    for name in records.specs:
        limit = getattr(model.backbones()[name].config, "max_position_embeddings", None)
        if limit:
            lines.append(f"`{name}`: at most {limit:,} tokens of its own in a document.")
    lines += [f"Found after training: {message}" for message in records.run.get("signatures", [])]
    lines.append("What the towers' own cards say of bias, languages and misuse holds here too.")
    return "\n".join(f"- {line}" for line in lines)


def _licences(records: Records) -> str:
    common = common_license(records)
    told = f"; the head of this card names the towers' own, {common}, until they do" if common else ""
    rows = [("New weights", f"{UNKNOWN}: whoever shares them is to say{told}")]
    for name, spec in records.specs.items():
        where = "see its page" if on_hub(spec) else "no model card beside it states one"
        rows.append((f"Tower `{name}`", spec.license or f"{UNKNOWN}: {where}"))
    rows.append(("Codecs and data", f"{UNKNOWN}: see their pages"))
    return _table(("Part", "Licence"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _and(words: Sequence[str]) -> str:
    *first, last = words or [""]
    return f"{', '.join(first)} and {last}" if first else last
