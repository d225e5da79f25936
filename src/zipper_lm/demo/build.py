"""What the demo ships, made from nothing: speech codec, both towers, judge. Each sees its own unaligned split only.

Maintainers: ``python -m zipper_lm.demo.build [FOLDER]`` writes the package's own assets, part by part; a part that is
there already, made with the same sizes, is kept, so that an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import set_seed

from zipper_lm.codecs.codec import Codec, unit_vectors
from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.demo.corpus import DemoCorpus, Utterance, render
from zipper_lm.demo.sizes import DemoSizes
from zipper_lm.evaluation.recogniser import Recogniser
from zipper_lm.jobs.embeddings import begin_at_codebook
from zipper_lm.jobs.pretrain import make_backbone
from zipper_lm.training.arguments import training_arguments
from zipper_lm.training.callbacks import train_with_bar
from zipper_lm.training.recipe import TrainingRecipe
from zipper_lm.training.tower import PadStreams, Streams, TowerTrainer
from zipper_lm.utils.files import new_folder, write_json
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.progress import bar, plain_console

ASSETS = Path(__file__).parent / "assets"
PARTS = ("judge", "text", "speech")
RECORD = "built.json"
CODEC_SECONDS = 2400.0
"""Sound that the codec's units are fitted on; more of it does not move them."""


def build(
    folder: str | Path,
    sizes: DemoSizes | None = None,
    console: Console | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """Make every part under `folder`: ``judge/``, ``text/`` and ``speech/`` (towers with their codecs beside them).

    Args:
        folder: made if missing. sizes: default those of the demo. console: for the bars. parts: which.

    Returns:
        By part, what it was made with and its last loss.

    Raises:
        ValueError: if the folder cannot be written. ImportError: without espeak-ng.
    """
    sizes, console = sizes or DemoSizes(), console or plain_console(stderr=True)
    makers: dict[str, Callable[[Path, DemoSizes, DemoCorpus, Console], float]] = {
        "judge": _judge,
        "text": _text,
        "speech": _speech,
    }
    corpus = sizes.corpus()
    records = {}
    for part in parts:
        wanted = _wanted(part, sizes)
        target = Path(folder) / part
        if (record := _record(target)) is None or record["made_with"] != wanted:
            with new_folder(target, overwrite=True) as new:
                loss = makers[part](new, sizes, corpus, console)
                record = {"made_with": wanted, "loss": None if math.isnan(loss) else round(loss, 4)}
                write_json(new / RECORD, record)
        records[part] = record
    return records


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over every file of a built folder, as hex: which towers a report speaks of."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _wanted(part: str, sizes: DemoSizes) -> dict[str, Any]:
    """The settings that a part depends on, as JSON gives them back."""
    names = {
        "judge": ("seed", "judge", "judge_epochs"),
        "text": ("seed", "unaligned_text", "text_vocabulary", "text_tower", "text_training", "context"),
        "speech": (
            *("seed", "unaligned_speech", "units", "frames_per_token", "whitening", "refine_steps"),
            *("speech_tower", "speech_training", "context"),
        ),
    }[part]
    values = asdict(sizes)
    return json.loads(json.dumps({name: values[name] for name in names}))


def _record(target: Path) -> dict[str, Any] | None:
    file = target / RECORD
    return read_mapping(file) if file.is_file() else None


def _judge(folder: Path, sizes: DemoSizes, corpus: DemoCorpus, console: Console) -> float:
    waves = _sounds(corpus.judge, console, "judge: speaking")
    losses: list[float] = []
    with bar(console, "judge: fitting a recogniser") as advance:

        def progress(step: int, steps: int, loss: float) -> None:
            losses.append(loss)
            advance(step, steps, loss)

        texts = [u.text for u in corpus.judge]
        judge = Recogniser.fit(waves, texts, epochs=sizes.judge_epochs, seed=sizes.seed, progress=progress)
    judge.save_pretrained(folder)
    return float(np.mean(losses[-100:]))


def _text(folder: Path, sizes: DemoSizes, corpus: DemoCorpus, console: Console) -> float:
    codec = TextCodec.train(corpus.unaligned_text, vocab_size=sizes.text_vocabulary)
    rows = codec.encode(corpus.unaligned_text)
    return _tower(folder, codec, rows, dict(sizes.text_tower), sizes.text_training, sizes, console, "text")


def _speech(folder: Path, sizes: DemoSizes, corpus: DemoCorpus, console: Console) -> float:
    waves = _sounds(corpus.unaligned_speech, console, "speech tower: speaking")
    enough = int(np.searchsorted(np.cumsum([len(w) for w in waves]), CODEC_SECONDS * 16_000)) + 1
    with console.status("speech codec: k-means"):
        codec = SpeechCodec.fit(
            waves[:enough],
            units=sizes.units,
            frames_per_token=sizes.frames_per_token,
            whitening=sizes.whitening,
            seed=sizes.seed,
        )
    rows = encode_sounds(codec, waves, console, "speech tower: encoding")
    loss = _tower(folder, codec, rows, dict(sizes.speech_tower), sizes.speech_training, sizes, console, "speech")
    with bar(console, "speech codec: its way back") as advance:
        codec.fit_decoder(waves, sizes.refine_steps, seed=sizes.seed, progress=advance)
    codec.save_pretrained(folder)
    return loss


def encode_sounds(codec: Codec, waves: Sequence[np.ndarray], console: Console, what: str) -> list[list[int]]:
    """Sounds to ids, with a bar."""
    ids = []
    with bar(console, what) as advance:
        for done, wave in enumerate(waves, start=1):
            ids += codec.encode([wave])
            advance(done, len(waves))
    return ids


def _sounds(utterances: Sequence[Utterance], console: Console, what: str) -> list[np.ndarray]:
    with bar(console, what) as advance:
        return list(render(utterances, advance))


def _tower(
    folder: Path,
    codec: Codec,
    rows: list[list[int]],
    fields: dict[str, Any],
    training: TrainingRecipe,
    sizes: DemoSizes,
    console: Console,
    name: str,
) -> float:
    """Train a tower on token streams and write it, in half precision, with its codec beside it."""
    set_seed(sizes.seed)
    lost = training.corrupt
    assert isinstance(lost, float | int)
    backbone = make_backbone(fields, codec)
    if unit_vectors(codec) is not None:
        begin_at_codebook(backbone, codec)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TowerTrainer(
            model=backbone,
            args=training_arguments(training, scratch, sizes.seed, save_strategy="no", report_to=[]),
            train_dataset=Streams(rows, codec, sizes.context, sizes.seed, corrupt=lost),
            data_collator=PadStreams(codec.pad_id),
        )
        train_with_bar(trainer, console, f"{name} tower: pre-training")
    backbone.config.use_cache = True  # Trainer turned it off
    backbone.save_pretrained(folder)
    codec.save_pretrained(folder)
    _halve(folder / "model.safetensors")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[-1]) if losses else float("nan")


def _halve(file: Path) -> None:
    """Store float32 tensors as float16: the config still says float32, which is what a tower is loaded as."""
    tensors = {k: v.half() if v.dtype == torch.float32 else v for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def main() -> None:
    """Rebuild the package's own assets."""
    parser = argparse.ArgumentParser(prog="python -m zipper_lm.demo.build", description=build.__doc__)
    parser.add_argument("folder", nargs="?", default=str(ASSETS))
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part (may be given again)")
    given = parser.parse_args()
    Console().print(build(given.folder, parts=given.part or PARTS))


if __name__ == "__main__":
    main()
