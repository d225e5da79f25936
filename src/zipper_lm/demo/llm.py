"""`zipper demo --llm`: a real LLM, frozen, hears a question and speaks its own answer, from the shipped speech parts.

- Thirty questions, of the capitals of countries, and the sentences that answer them, in synthetic voices. Sentences are
  those of training, voices are not: those of test, and of what the judge is fitted on, are in no other split.
- The shipped codec keeps its units, and learns here what they sound like in these words.
- What is heard is given to the LLM as itself, by its chat template. What it says to it is its own, right or wrong, and
  is spoken as it is; a speech tower of this size speaks well only what it has heard in training.
"""

from __future__ import annotations

import html
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rich.console import Console
from transformers import AutoConfig

from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.demo.build import ASSETS
from zipper_lm.demo.corpus import Utterance
from zipper_lm.demo.run import SAMPLE_RATE, narrow
from zipper_lm.evaluation.preservation import verify
from zipper_lm.evaluation.recogniser import Recogniser
from zipper_lm.evaluation.scoring import score_task, yardsticks
from zipper_lm.evaluation.word_error_rate import normalise
from zipper_lm.experiments.corpora.voices import VARIANTS, voices
from zipper_lm.experiments.corpora.writing import write_corpus
from zipper_lm.fusion.zip_spec import ZipSpec, evenly_spaced
from zipper_lm.generation.bare import chat_prompt, has_chat_template, write_greedily
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.reader import recipe_hash
from zipper_lm.jobs.recipes.schema import DataRecipe, FuseRecipe, TowerRecipe
from zipper_lm.jobs.resume import latest_checkpoint
from zipper_lm.models.conversation import Turn, answer_aloud
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.recipe import TrainingRecipe
from zipper_lm.utils.files import check_output, new_folder, remove_folder, write_json
from zipper_lm.utils.places import public_name, working_folder
from zipper_lm.utils.products import is_multiplied_here
from zipper_lm.utils.progress import bar, plain_console

CAPITALS = {
    **{"france": "paris", "italy": "rome", "spain": "madrid", "germany": "berlin", "portugal": "lisbon"},
    **{"greece": "athens", "austria": "vienna", "poland": "warsaw", "hungary": "budapest", "norway": "oslo"},
    **{
        "sweden": "stockholm",
        "denmark": "copenhagen",
        "finland": "helsinki",
        "ireland": "dublin",
        "belgium": "brussels",
    },
    **{"russia": "moscow", "egypt": "cairo", "kenya": "nairobi", "japan": "tokyo", "china": "beijing"},
    **{"thailand": "bangkok", "vietnam": "hanoi", "cuba": "havana", "peru": "lima", "canada": "ottawa"},
    **{"australia": "canberra", "iran": "tehran", "iraq": "baghdad", "argentina": "buenos aires", "india": "new delhi"},
}
ANSWER_TOKENS = 24
SPLITS = ("train", "judge", "test")


@dataclass(frozen=True, kw_only=True)
class LlmSizes:
    """Sizes of the demo with an LLM.

    Args:
        seed: of voices, sentences and the fusion. train, judge, test: utterances. speakers: voices of training.
        judge_epochs: passes over the judge's own utterances. decoder_steps: of the codec's way back to sound.
        zips: layers of each tower that read the other. fusion: as of a recipe.
        candidates: settings of speech where the model chooses among several samples, as it does for its answers.
        answered: questions of the test split that are answered aloud, for the page. units: of speech, at most in one
            sentence.
    """

    seed: int = 0
    train: int = 3000
    judge: int = 3000
    test: int = 60
    speakers: int = 300
    judge_epochs: int = 6
    decoder_steps: int = 1500
    zips: int = 4
    fusion: TrainingRecipe = field(
        default_factory=lambda: TrainingRecipe(
            steps=1500,
            batch_size=16,
            learning_rate=1e-3,
            tower_learning_rate=5e-4,
            ctc={"speech->text": 1.0},
            guided_attention={"speech->text": 0.5, "text->speech": 1.0},
            fade_out=0.6,
            prefix_cache="memory",
        )
    )
    candidates: Mapping[str, Any] = field(
        default_factory=lambda: {
            "do_sample": True,
            "num_return_sequences": 8,
            "best_by": "reading",
            "temperature": 0.5,
            "top_k": 0,
            "seed": 0,
        }
    )
    answered: int = 12
    units: int = 120

    @classmethod
    def toy(cls) -> LlmSizes:
        """All as small as it can be: runs in seconds, and learns nothing."""
        return cls(
            train=8,
            judge=8,
            test=4,
            speakers=4,
            judge_epochs=1,
            decoder_steps=2,
            zips=2,
            fusion=TrainingRecipe(steps=2, batch_size=4, prefix_cache="memory"),
            answered=1,
            units=12,
            candidates={"do_sample": True, "num_return_sequences": 2, "best_by": "reading", "seed": 0},
        )


def sentences() -> list[str]:
    """Questions, then the sentences that answer them."""
    asked = [f"what is the capital of {land}" for land in CAPITALS]
    return asked + [f"the capital of {land} is {city}" for land, city in CAPITALS.items()]


def utterances(sizes: LlmSizes) -> dict[str, list[Utterance]]:
    """Who says what, by split. Speakers (espeak-ng's variants) of one split are in no other."""
    rng = np.random.default_rng(sizes.seed)
    variants = list(rng.permutation(VARIANTS))
    cuts = {"test": variants[:8], "judge": variants[8:30], "train": variants[30:]}
    told = sentences()
    found = {}
    for number, split in enumerate(SPLITS):
        people = voices(sizes.speakers, seed=sizes.seed + number, variants=tuple(map(str, cuts[split])))
        drawn = rng.permutation(np.arange(getattr(sizes, split)) % len(told))
        found[split] = [
            Utterance(told[i], people[int(rng.integers(len(people)))], int(rng.integers(2**31))) for i in drawn
        ]
    return found


def check_llm(source: str) -> tuple[TextCodec, int, bool]:
    """The tokenizer of an LLM that can be asked something, how many layers it has, and whether it is to be float32: a
    processor may have nothing for the dtype that it is published in, and would take hours in place of minutes.

    Raises:
        ValueError: if there is no tokenizer, or it has no chat template; if there is no model's configuration.
    """
    codec = TextCodec.from_pretrained(source)
    if not has_chat_template(codec):
        raise ValueError(f"--llm {source}: its tokenizer has no chat template; an instruct model is needed")
    try:
        whole = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config = whole.get_text_config()
    except (OSError, ValueError) as error:
        said = str(error).strip() or type(error).__name__
        raise ValueError(f"--llm {source}: {said.splitlines()[0]}") from error
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise ValueError(f"--llm {source}: its config.json does not say how many layers it has (num_hidden_layers)")
    published = config.dtype or whole.dtype or torch.bfloat16  # a config may not say it
    return codec, depth, not torch.accelerator.is_available() and not is_multiplied_here(published)


def upper_layers(depth: int, count: int) -> list[int]:
    """Every other layer of the last ``2 * count``, but for the very last; evenly spaced where there are fewer.

    What lies below is computed once for all steps, and no gradient goes down there.
    """
    return [*range(depth - 2 * count, depth, 2)] if depth > 2 * count else evenly_spaced(count, depth)


def zips_of(sizes: LlmSizes, depth: int) -> list[ZipSpec]:
    """The LLM hears in its upper layers; what is spoken is read off its embeddings, where words stand plain.

    Args:
        depth: of the LLM.
    """
    layers = upper_layers(depth, min(sizes.zips, depth))
    return [
        ZipSpec(reader="text", source="speech", layers=layers, scale="stream"),
        ZipSpec(reader="speech", source="text", layers=sizes.zips, source_layers="embeddings"),
    ]


def llm_recipe(llm: str, depth: int, wide: bool, work: Path, sizes: LlmSizes) -> FuseRecipe:
    """What `zipper fuse` is told.

    Args:
        llm, depth, wide: as of `check_llm`. work: folder of what is made on the way. sizes: of the demo.
    """
    return FuseRecipe(
        towers={
            # What is below the projection is the same in every step, and kept.
            "text": TowerRecipe(
                source=llm,
                train="frozen",
                config={"dtype": "float32"} if wide else None,
                input_projection_layer="first_zip",
                input_projection_scale="stream",
            ),
            "speech": TowerRecipe(source=str(work / "speech"), train="full"),
        },
        data=DataRecipe(source=str(work / "data"), validation=None),
        tasks={"speech->text": 1.0, "text->speech": 1.0},
        zips=zips_of(sizes, depth),
        training=sizes.fusion,
        generation={
            "text": {"max_new_tokens": 24},
            "speech": {"max_new_tokens": sizes.units, "guidance_scale": 1.5, "stop_threshold": 0.5},
        },
        judge=str(work / "judge"),
        output=str(work / "model"),
        seed=sizes.seed,
    )


def demo_llm(
    llm: str,
    output: str | Path = "zipper-demo-llm",
    *,
    overwrite: bool = False,
    console: Console | None = None,
    sizes: LlmSizes | None = None,
) -> dict[str, Any]:
    """Fuse an LLM with the shipped speech tower, ask it aloud, and write ``report.html``, ``results.json``, ``model/``
    and ``audio/``.

    Args:
        llm: folder or Hub id of an instruct model. output: folder to write; appears whole or not at all. What is made
            on the way is in ``OUTPUT.work`` until then: a demo that was interrupted goes on from there.
        overwrite: replace `output`. console: where progress goes; default standard error. sizes: default those of the
            demo.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: if `output` exists or cannot be written, the shipped parts are missing, or `llm` is no instruct
            model.
        ImportError: without `espeakng-loader` (the extra ``zipper-lm[demo]``).
    """
    console, sizes, output = narrow(console or plain_console(stderr=True)), sizes or LlmSizes(), Path(output)
    check_output(output, overwrite)
    if not (ASSETS / "speech").is_dir():
        raise ValueError("demo: the package lacks its speech tower; run zipper demo --from-scratch")
    codec, depth, wide = check_llm(llm)
    started = time.monotonic()
    zips = [asdict(spec) for spec in zips_of(sizes, depth)]
    made_of = recipe_hash({"sizes": asdict(sizes), "llm": llm, "zips": zips} | ({"wide": True} if wide else {}))[:8]
    work = output.resolve().with_name(f"{output.name}.work") / made_of
    _prepare(work, sizes, console)
    recipe = llm_recipe(llm, depth, wide, work, sizes)
    if not Path(recipe.output).is_dir():
        fuse(recipe, resume=latest_checkpoint(working_folder(recipe.output)) is not None, console=console)
    fused = time.monotonic()
    model = ZipperModel.from_pretrained(recipe.output).eval()
    model.generation_settings = recipe.generation
    results, turns = _asked(model, codec, work, sizes, console)
    results |= {
        "llm": public_name(llm),
        "seed": sizes.seed,
        "zips": zips,
        "steps": sizes.fusion.steps,
        "candidates": sizes.candidates["num_return_sequences"],
        "frozen_unchanged": all(report.identical for report in verify(model) if report.train == "frozen"),
        "seconds_fusing": round(fused - started, 1),
        "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
    }
    with new_folder(output, overwrite) as folder:
        model.save_pretrained(folder / "model")
        (folder / "audio").mkdir()
        for number, (row, turn) in enumerate(turns):
            for name, wave in (("question", soundfile.read(row["speech"])[0]), ("answer", turn.sound)):
                soundfile.write(folder / "audio" / f"{number:02d}-{name}.wav", wave, SAMPLE_RATE)
        write_json(folder / "results.json", results)
        (folder / "report.html").write_text(_page(results, turns), encoding="utf-8")
    remove_folder(work.parent)
    for line in _told(results):
        console.print(line)
    return results


def _prepare(work: Path, sizes: LlmSizes, console: Console) -> None:
    """Sounds, a judge fitted on some of them, and the shipped speech tower, whose codec learns what they sound like."""
    if not (work / "data").is_dir():
        splits = {name: [(u, {"text": u.text}) for u in said] for name, said in utterances(sizes).items()}

        def speak(file: Path, utterance: Utterance) -> None:
            soundfile.write(file, utterance.render(), SAMPLE_RATE)

        write_corpus(work / "data", splits, "speech", ".wav", speak, console=console)
    if not (work / "judge").is_dir():
        rows = list(read_rows(str(work / "data"), split="judge"))
        waves = [soundfile.read(row["speech"], dtype="float32")[0] for row in rows]
        with bar(console, "fitting a judge") as advance:
            judge = Recogniser.fit(waves, [row["text"] for row in rows], epochs=sizes.judge_epochs, progress=advance)
        with new_folder(work / "judge") as folder:
            judge.save_pretrained(folder)
    if not (work / "speech").is_dir():
        codec = SpeechCodec.from_pretrained(ASSETS / "speech")
        said = (row["speech"] for row in read_rows(str(work / "data"), split="train"))
        with bar(console, "speech codec: its way back") as advance:
            codec.fit_decoder(said, sizes.decoder_steps, seed=sizes.seed, progress=advance)
        with new_folder(work / "speech") as folder:
            shutil.copytree(ASSETS / "speech", folder, dirs_exist_ok=True)
            codec.save_pretrained(folder)


def _asked(
    model: ZipperModel, codec: TextCodec, work: Path, sizes: LlmSizes, console: Console
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], Turn]]]:
    """Figures of the test split, and some of its questions answered aloud."""
    rows: list[Any] = list(read_rows(str(work / "data"), split="test"))
    judge = Recogniser.from_pretrained(work / "judge")
    with bar(console, "hearing") as advance:
        heard = score_task(model, rows, "asr", progress=advance)
    with bar(console, "speaking") as advance:
        spoken = score_task(model, rows, "tts", judge=judge, progress=advance)
    settings: dict[str, Any] = {**model.generation_settings}
    chosen = {**settings, "speech": {**settings["speech"], **sizes.candidates}}
    with bar(console, "speaking, best of several") as advance:
        best = score_task(model, rows, "tts", judge=judge, settings=chosen, progress=advance)
    questions = [row for row in rows if row["text"].startswith("what is")][: sizes.answered]
    turns = []
    with bar(console, "asking") as advance:
        for number, row in enumerate(questions):
            turns.append(
                (row, answer_aloud(model, row["speech"], tokens=ANSWER_TOKENS, written_as=normalise, settings=chosen))
            )
            advance(number + 1, len(questions))
    typed = [[{"role": "user", "content": row["text"]}] for row in questions]
    prompts = [chat_prompt(codec, messages) for messages in typed]
    bare = [write_greedily(model.backbones()["text"], codec, [prompt], ANSWER_TOKENS)[0] for prompt in prompts]
    right = [CAPITALS[row["text"].split(" of ")[1]] in normalise(turn.answer) for row, turn in turns]
    return {
        "asr_wer": round(heard.wer, 2),
        "asr_exact": round(heard.exact, 2),
        "tts_wer": round(spoken.wer, 2),
        "tts_best_wer": round(best.wer, 2),
        **yardsticks(model, rows, judge),
        "utterances": len(rows),
        "questions": len(questions),
        "right": sum(right),
        "as_typed": sum(turn.answer == answer for (_, turn), answer in zip(turns, bare)),
    }, turns


def _told(results: dict[str, Any]) -> list[str]:
    """The figures in lines of at most 80 columns."""
    return [
        f"hears {results['asr_wer']} % of words wrong, {results['asr_exact']} % of sentences right",
        f"speaks {results['tts_wer']} % wrong, as a small judge hears it,",
        f"  of {results['candidates']} samples the one that it reads best itself {results['tts_best_wer']} %",
        f"  (codec copies {results['oracle_wer']} %, originals {results['judge_wer_on_originals']} %)",
        f"answers of {results['questions']} spoken questions: {results['right']} hold the capital,",
        f"  {results['as_typed']} are what it says to the same question typed",
        f"the LLM is {'bit-identical' if results['frozen_unchanged'] else 'CHANGED'}; "
        f"{results['seconds'] / 60:.1f} minutes",
    ]


def _page(results: dict[str, Any], turns: Sequence[tuple[dict[str, Any], Turn]]) -> str:
    rows = []
    for number, (row, turn) in enumerate(turns):
        sounds = [
            f'<audio controls preload="none" src="audio/{number:02d}-{name}.wav"></audio>'
            for name in ("question", "answer")
        ]
        said, heard, answer = (html.escape(text) for text in (row["text"], turn.heard, turn.answer))
        rows.append(
            f"<section><p>{sounds[0]}</p><p>Asked: {said}</p><p>Heard: {heard}</p><p>Answered: <b>{answer}</b></p>"
            f"<p>{sounds[1]}</p></section>"
        )
    figures = "".join(f"<li>{html.escape(line.strip())}</li>" for line in _told(results))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Zipper: ask an LLM</title>'
        "<style>body{font:16px/1.5 sans-serif;max-width:44em;margin:2em auto;padding:0 1em}"
        "section{border-top:1px solid #aaa;padding:1em 0}audio{width:100%}</style>"
        f"<h1>Ask {html.escape(str(results['llm']))}</h1><p>Zips hear the question and speak the answer, which "
        "is the frozen LLM's own, by its chat template. Sentences are those of training, voices are not.</p>"
        f"<ul>{figures}</ul>{''.join(rows)}</html>"
    )
