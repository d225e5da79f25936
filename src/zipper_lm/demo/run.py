"""`zipper demo`: two small towers that never saw an aligned pair are fused, scored and heard, on two cores, in minutes.

- The text tower stays frozen, and is compared with what is shipped, bit for bit, when all is done.
- Scores are on sentences and speakers that nothing here was trained on; sound is judged by a recogniser that shares
  nothing with the model and was fitted on yet other sentences and speakers.
- What is done is what any user does: a folder of sound and text, a recipe, the job of `zipper fuse`, then `verify` and
  `generate`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rich.console import Console
from rich.table import Table

from zipper_lm.codecs.codec import Codec, looked_up
from zipper_lm.data.collation import collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.tasks import build_document
from zipper_lm.demo.build import ASSETS, PARTS, build, encode_sounds, fingerprint
from zipper_lm.demo.corpus import DemoCorpus, Utterance, render
from zipper_lm.demo.report import Example, ReportData, write_report
from zipper_lm.demo.sizes import DemoSizes
from zipper_lm.evaluation.attention import attention_maps
from zipper_lm.evaluation.preservation import TowerReport, verify
from zipper_lm.evaluation.recogniser import Recogniser
from zipper_lm.evaluation.scoring import Score, score_task, transcribe
from zipper_lm.evaluation.word_error_rate import bootstrap_interval, word_error_rate
from zipper_lm.experiments.corpora.writing import write_corpus
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.schema import DataRecipe, FuseRecipe, TowerRecipe
from zipper_lm.jobs.resume import latest_checkpoint
from zipper_lm.models.card import refresh_card
from zipper_lm.models.records import GENERATION_FILE, RUN_FILE
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.parameters import describe_parameters
from zipper_lm.utils.files import as_json, check_output, new_folder, write_json
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.places import working_folder
from zipper_lm.utils.progress import bar, plain_console

SAMPLE_RATE = 16_000
CHAIN = "speech->text->speech"
TARGETS = {"asr_wer": 5.0, "tts_wer": 10.0, "tts_best_wer": 10.0, "oracle_wer": 5.0}
"""Per cent that the demo is meant to reach."""
WIDTH = 80
"""Columns that what it prints fits in."""
BATCH = 16
"""Documents that are written together: few, so that progress is told often."""


@dataclass
class Spoken:
    """A split, spoken and encoded.

    Attributes:
        utterances: who says what. waves: float32 ``[samples]`` at 16 kHz. rows: segments with ids, for tasks.
    """

    utterances: list[Utterance]
    waves: list[np.ndarray]
    rows: list[dict[str, Segment]]

    @property
    def texts(self) -> list[str]:
        """What is said."""
        return [u.text for u in self.utterances]


def demo(
    output: str | Path = "zipper-demo",
    *,
    from_scratch: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    sizes: DemoSizes | None = None,
) -> dict[str, Any]:
    """Fuse, score, and write ``report.html``, ``results.json``, ``model/`` and ``audio/``.

    Args:
        output: folder to write; appears whole or not at all. What is made on the way is in ``OUTPUT.work`` until then:
            a demo that was interrupted goes on from there.
        from_scratch: instead of using the shipped codec, towers and judge, make them first, in ``OUTPUT.towers``.
            What is whole there, made with the same sizes, is used again.
        overwrite: replace `output`.
        console: where progress and the table go; default standard error.
        sizes: default those that the shipped parts were made with.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: if `output` exists, or cannot be written, or the shipped parts are missing.
        ImportError: without `espeakng-loader` (the extra ``zipper-lm[demo]``).
    """
    console = narrow(console or plain_console(stderr=True))
    sizes = sizes or DemoSizes()
    _check(Path(output), overwrite)
    started = time.monotonic()
    parts = _parts(Path(output), sizes, from_scratch, console)
    built = time.monotonic()
    judge = Recogniser.from_pretrained(parts / "judge")
    work = _work(Path(output), sizes, parts)
    corpus, recipe = sizes.corpus(), demo_recipe(work, parts, sizes)
    if not (work / "data").is_dir():
        write_data(work / "data", corpus, sizes, console)
    written = time.monotonic()
    if not Path(recipe.output).is_dir():
        fuse(recipe, resume=latest_checkpoint(working_folder(recipe.output)) is not None, console=console)
    trained = time.monotonic()
    model, record = ZipperModel.from_pretrained(recipe.output), read_mapping(Path(recipe.output) / RUN_FILE)
    test = _speak(model, "test", corpus.test, console)
    scores = _score(model, sizes, test, judge, console)
    reports = verify(model)
    scored = time.monotonic()
    seconds = {
        "seconds": round(scored - started, 1),
        "seconds_by_stage": {
            "building": round(built - started, 1),
            "speaking": round(written - built, 1),
            "fusing": round(trained - written, 1),
            "scoring": round(scored - trained, 1),
        },
    }
    results = _results(sizes, scores, reports, describe_parameters(model), parts) | seconds
    best, worst = _examples(model, sizes, test, scores)
    with new_folder(output, overwrite) as folder:
        model.save_pretrained(folder / "model", bundle_towers=True, card=False)
        for name in (RUN_FILE, GENERATION_FILE):
            shutil.copyfile(Path(recipe.output) / name, folder / "model" / name)
        refresh_card(folder / "model", model)
        for example in (*best, *worst):
            for name, wave in example.sounds.items():
                _write_wave(folder / "audio" / f"{example.number:02d}-{name}.wav", wave)
        results["seconds"] = round(time.monotonic() - started, 1)
        write_json(folder / "results.json", results)
        write_report(
            folder / "report.html",
            ReportData(results, _table(results), best, worst, record["history"], _maps(model, test.rows[best[0].row])),
        )
    shutil.rmtree(work.parent, ignore_errors=True)
    _print(console, results, Path(output))
    return results


def narrow(console: Console) -> Console:
    """Let a console be at most `WIDTH` wide."""
    console.width = min(console.width, WIDTH)
    return console


def _check(output: Path, overwrite: bool) -> None:
    if os.path.lexists(output) and not overwrite:
        raise ValueError(
            f"output: {output} exists; add --overwrite to replace it (make demo ARGS=--overwrite), "
            "or name another folder (zipper demo --output FOLDER)"
        )
    check_output(output, overwrite)


def _parts(output: Path, sizes: DemoSizes, from_scratch: bool, console: Console) -> Path:
    """The folder that holds judge, towers and codecs."""
    if from_scratch:
        folder = output.resolve().with_name(f"{output.name}.towers")
        build(folder, sizes, console)
        return folder
    if missing := [p for p in ("judge", "text", "speech") if not (ASSETS / p).is_dir()]:
        raise ValueError(f"demo: the package lacks {missing}; run zipper demo --from-scratch")
    return ASSETS


def _work(output: Path, sizes: DemoSizes, parts: Path) -> Path:
    """Where a demo of these sizes, with these towers and this judge, keeps its data and its unfinished model."""
    made_of = [asdict(sizes), str(parts.resolve()), [fingerprint(parts / part) for part in PARTS]]
    digest = hashlib.sha256(as_json(made_of).encode()).hexdigest()
    return output.resolve().with_name(f"{output.name}.work") / digest[:8]


def demo_recipe(work: Path, parts: Path, sizes: DemoSizes) -> FuseRecipe:
    """What `zipper fuse` is told."""
    return FuseRecipe(
        towers={
            "text": TowerRecipe(source=str(parts / "text"), train="frozen"),
            "speech": TowerRecipe(source=str(parts / "speech"), train="full"),
        },
        data=DataRecipe(source=str(work / "data"), validation="validation" if sizes.fusion.evaluate_every else None),
        tasks=dict(sizes.tasks),
        scored=["speech->text"],
        zips=list(sizes.zips),
        training=sizes.fusion,
        generation={name: dict(settings) for name, settings in sizes.generation.items()},
        judge=str(parts / "judge"),
        output=str(work / "model"),
        seed=sizes.fusion_seed,
    )


def write_data(folder: Path, corpus: DemoCorpus, sizes: DemoSizes, console: Console) -> None:
    """The aligned pairs as any user has them: a folder with a JSONL file and sounds for each split."""
    names = ["train", *(["validation"] if sizes.fusion.evaluate_every else [])]
    splits = {name: [(utterance, {"text": utterance.text}) for utterance in getattr(corpus, name)] for name in names}

    def speak(file: Path, utterance: Utterance) -> None:
        soundfile.write(file, utterance.render(), SAMPLE_RATE)

    write_corpus(folder, splits, "speech", ".wav", speak, console=console)


def _speak(model: ZipperModel, name: str, utterances: list[Utterance], console: Console) -> Spoken:
    """Render and encode a split."""
    assert model.processor is not None
    codecs = model.processor.codecs
    with bar(console, f"{name}: speaking") as advance:
        waves = list(render(utterances, advance))
    sound = encode_sounds(codecs["speech"], waves, console, f"{name}: encoding")
    text = codecs["text"].encode([u.text for u in utterances])
    rows = [
        {"speech": Segment("speech", ids=s), "text": Segment("text", value=u.text, ids=t)}
        for u, s, t in zip(utterances, sound, text)
    ]
    return Spoken(utterances, waves, rows)


def _score(model: ZipperModel, sizes: DemoSizes, test: Spoken, judge: Recogniser, console: Console) -> dict[str, Score]:
    """Every figure of the table, on the test split."""
    texts, settings = test.texts, sizes.generation
    scores = {"judge": _heard("originals", texts, _transcribe(judge, test.waves, console, "originals"), test.waves)}
    assert model.processor is not None
    codec = model.processor.codecs["speech"]
    for name, way, what in (
        ("oracle", codec, "codec copies"),
        ("look_up", looked_up(codec) or codec, "codec copies by look-up"),
    ):
        with bar(console, f"{what}: decoding") as advance:
            copies = _in_batches(test.rows, partial(_copies, way), advance)
        scores[name] = _heard(what, texts, _transcribe(judge, copies, console, what), copies)
    best = {**settings, "speech": {**settings["speech"], **sizes.candidates}}
    for name, task, other, how in (
        ("asr", "speech->text", None, settings),
        ("tts", "text->speech", judge, settings),
        ("tts_best", "text->speech", judge, best),
    ):
        with bar(console, f"{task}{', best of several' * (how is best)}: scoring") as advance:
            scores[name] = score_task(
                model, test.rows, task, judge=other, settings=how, batch_size=BATCH, progress=advance
            )
    with bar(console, "in and out: scoring") as advance:
        said = _in_batches(test.rows, lambda rows: _chain(model, sizes, rows), advance)
    scores["chain_text"] = _heard(CHAIN, texts, [d[1].value for d in said], [None] * len(said))
    waves = [d[2].value for d in said]
    scores["chain"] = _heard(CHAIN, texts, _transcribe(judge, waves, console, "in and out"), waves)
    return scores


def _in_batches(
    rows: Sequence[Any], make: Callable[[Sequence[Any]], list[Any]], advance: Callable[..., None]
) -> list[Any]:
    """What is made of rows, some at a time, as progress is told."""
    made: list[Any] = []
    for start in range(0, len(rows), BATCH):
        made += make(rows[start : start + BATCH])
        advance(len(made), len(rows))
    return made


def _transcribe(judge: Recogniser, waves: Sequence[np.ndarray], console: Console, what: str) -> list[str]:
    with bar(console, f"{what}: listening") as advance:
        return _in_batches(waves, lambda some: transcribe(judge, some), advance)


def _copies(codec: Codec, rows: Sequence[Mapping[str, Segment]]) -> list[np.ndarray]:
    """What the codec alone makes of sounds."""
    return codec.decode([row["speech"].ids or [] for row in rows])


def _chain(model: ZipperModel, sizes: DemoSizes, rows: Sequence[Mapping[str, Segment]]) -> list[Document]:
    """Speech in; text, then speech, written into the same document."""
    documents = [Document([row["speech"]]) for row in rows]
    return list(model.generate(documents, ["text", "speech"], settings=sizes.generation))


def _heard(task: str, references: list[str], hypotheses: list[str], values: list[Any]) -> Score:
    rates = word_error_rate(references, hypotheses)
    return Score(task, rates.wer, rates.cer, bootstrap_interval(references, hypotheses), references, hypotheses, values)


def _results(
    sizes: DemoSizes, scores: Mapping[str, Score], reports: Sequence[TowerReport], parameters: str, parts: Path
) -> dict[str, Any]:
    """What ``results.json`` says, without the seconds."""
    names = {
        "asr": "asr",
        "tts": "tts",
        "tts_best": "tts_best",
        "oracle": "oracle",
        "look_up": "look_up",
        "judge": "judge_{}_on_originals",
        "chain_text": "chain_text",
        "chain": "chain",
    }
    figures: dict[str, Any] = {}
    for key, name in names.items():
        name = name if "{}" in name else f"{name}_{{}}"
        score = scores[key]
        figures[name.format("wer")] = round(score.wer, 2)
        figures[name.format("wer") + "_95"] = [round(x, 2) for x in score.interval]
        figures[name.format("cer")] = round(score.cer, 2)
    text = next(r for r in reports if r.name == "text")
    return {
        **figures,
        "text_tower_identical": text.identical,
        "text_tower_tensors": text.tensors,
        "test_utterances": len(scores["asr"].references),
        "test_words": sum(len(t.split()) for t in scores["asr"].references),
        "targets": {name: {"at_most": most, "reached": figures[name] <= most} for name, most in TARGETS.items()},
        "parameters": parameters,
        "parts_sha256": {part: fingerprint(parts / part) for part in ("judge", "text", "speech")},
        "seed": sizes.fusion_seed,
        "sizes": json.loads(json.dumps(asdict(sizes))),
        "versions": {
            **{p: version(p) for p in ("zipper-lm", "torch", "transformers", "espeakng-loader")},
            "python": platform.python_version(),
        },
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
    }


def _examples(
    model: ZipperModel, sizes: DemoSizes, test: Spoken, scores: Mapping[str, Score]
) -> tuple[list[Example], list[Example]]:
    """The best test utterances and the worst ones, half as many as are shown each."""
    order = _from_best(test.texts, scores["asr"].hypotheses, scores["tts"].hypotheses)
    half = max(1, min(sizes.examples, len(order)) // 2)

    def example(row: int) -> Example:
        return Example(
            number=row + 1,
            row=row,
            text=test.texts[row],
            voice=test.utterances[row].voice.name,
            read=scores["asr"].hypotheses[row],
            heard={k: scores[k].hypotheses[row] for k in ("judge", "oracle", "look_up", "tts", "chain")},
            chain_text=scores["chain_text"].hypotheses[row],
            sounds={
                "input": test.waves[row],
                "codec": scores["oracle"].values[row],
                "look_up": scores["look_up"].values[row],
                "generated": scores["tts"].values[row],
                "chain": scores["chain"].values[row],
            },
        )

    return [example(row) for row in order[:half]], [example(row) for row in order[: -half - 1 : -1]]


def _from_best(texts: Sequence[str], read: Sequence[str], spoken: Sequence[str]) -> list[int]:
    """Rows by the errors of both directions together: those of words in per cent of the row's, then of characters."""

    def errors(row: int) -> tuple[float, float]:
        rates = [word_error_rate([texts[row]], [found[row]]) for found in (read, spoken)]
        return sum(rate.wer for rate in rates), sum(rate.cer for rate in rates)

    return sorted(range(len(texts)), key=errors)


def _maps(model: ZipperModel, row: Mapping[str, Segment]) -> dict[str, tuple[np.ndarray, list[str], str]]:
    """Attention of the sharpest zip layer of each direction on one test utterance.

    Returns:
        By task: map ``[queries, memory]`` averaged over heads, the text's tokens with BOS and EOS, the zip's name.
    """
    assert model.processor is not None
    found = {}
    pieces = [model.processor.decode("text", [[i]])[0] for i in row["text"].ids or []]
    labels = ["start", *pieces, "end"]
    for task, direction in (("speech->text", "text<-speech"), ("text->speech", "speech<-text")):
        batch = collate([build_document(task, dict(row))], model.specials)
        maps = {n: m[0].mean(0).float().cpu().numpy() for n, m in attention_maps(model, batch).items()}
        name, best = max(
            ((n, m) for n, m in maps.items() if n.startswith(direction)), key=lambda item: float(item[1].max(1).mean())
        )
        found[task] = (best, labels, name)
    return found


def _table(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the one table: what, WER with interval, CER, remark."""

    def row(what: str, name: str, remark: str) -> tuple[str, str, str, str]:
        wer, cer = (f"{name}_{x}" if name != "judge" else f"judge_{x}_on_originals" for x in ("wer", "cer"))
        low, high = results[f"{wer}_95"]
        return what, f"{results[wer]:.1f} ({low:.1f} to {high:.1f})", f"{results[cer]:.1f}", remark

    def goal(name: str) -> str:
        target = results["targets"][name]
        return f"aim {target['at_most']:.0f}: {'reached' if target['reached'] else 'not reached'}"

    return [
        row("speech to text", "asr", goal("asr_wer")),
        row("text to speech", "tts", goal("tts_wer")),
        row(f"  best of {results['sizes']['candidates']['num_return_sequences']}*", "tts_best", goal("tts_best_wer")),
        row("codec copies", "oracle", goal("oracle_wer")),
        row("  by look-up", "look_up", "no learned decoder"),
        row("original sounds", "judge", "the judge's own"),
        row("in and out: text", "chain_text", "one document"),
        row("in and out: sound", "chain", "one document"),
    ]


def _print(console: Console, results: Mapping[str, Any], output: Path) -> None:
    caption = (
        f"{results['test_utterances']} held-out sentences, held-out voices; 95 % intervals in brackets\n"
        "* of samples the model keeps the one that it reads best itself (best_by)"
    )
    table = Table(title="Zipper demo: errors in per cent, of sound as the judge hears it", caption=caption)
    for heading in ("task", "words", "letters", ""):
        table.add_column(heading)
    for line in _table(results):
        table.add_row(*line)
    console.print(table)
    same = "bit-identical to what was shipped" if results["text_tower_identical"] else "CHANGED"
    console.print(f"frozen text tower: {same} ({results['text_tower_tensors']} tensors and its logits)")
    console.print(f"{results['seconds']:.0f} s; open {output / 'report.html'}", soft_wrap=True)
    console.print(f"talk to it: {_command()} serve {output / 'model'}", soft_wrap=True)


def _command() -> str:
    """How this program is called: `make demo` has it in a folder where no shell looks."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "zipper" and shutil.which("zipper") is None else "zipper"


def _write_wave(file: Path, wave: np.ndarray) -> None:
    file.parent.mkdir(exist_ok=True)
    soundfile.write(file, wave, SAMPLE_RATE)
