"""How well a judge understands a codec's copies: by look-up, and by a decoder trained on the sound that units are of.

python benchmarks/codec_copies.py docs/runs/codec-copies-demo.json --demo
python benchmarks/codec_copies.py RECORD --data FOLDER --judge FOLDER [--kind speech] [--source ENCODER] \
    [--options '{"units": 512}'] [--codec FOLDER] [--steps 4000]

The codec is that of `--codec`, or fitted on `--sounds` of the split `train`; the decoder is trained on the same, by one
thread. Copies are of the split `--split`. `--demo` takes the demo's own sentences, voices and judge, and, unless a
`--source` is named, its codec. Errors are words in per cent, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.record import begun, finish

from zipper_lm.codecs.audio import read_audio
from zipper_lm.codecs.codec import load_codec, make_codec
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.demo.build import ASSETS
from zipper_lm.demo.corpus import demo_corpus, render
from zipper_lm.evaluation.judges import Judge, load_judge
from zipper_lm.evaluation.scoring import transcribe
from zipper_lm.evaluation.word_error_rate import bootstrap_interval, word_error_rate

Spoken = tuple[list[np.ndarray], list[str]]


def of_the_demo(split: str, most: int | None, sounds: int) -> tuple[Spoken, Spoken]:
    """Sounds to train on, and sounds to copy, with their texts."""
    corpus = demo_corpus(unaligned_speech=sounds, judge=2, train=2, validation=300)
    parts = corpus.unaligned_speech, getattr(corpus, split)[:most]
    train, copied = [(list(render(part)), [u.text for u in part]) for part in parts]
    return train, copied


def of_a_folder(data: str, split: str, most: int | None, sounds: int, columns: dict[str, str]) -> tuple[Spoken, Spoken]:
    """The same of a data set."""
    parts: list[list[Any]] = [
        list(read_rows(data, columns, s, count)) for s, count in (("train", sounds), (split, most))
    ]
    train, copied = [([read_audio(row["speech"]) for row in part], [row.get("text") for row in part]) for part in parts]
    return train, copied


def rates(judge: Judge, waves: Sequence[np.ndarray], texts: list[str]) -> dict[str, Any]:
    """Word errors, and their interval."""
    heard = transcribe(judge, waves)
    found = word_error_rate(texts, heard)
    return {"wer": round(found.wer, 2), "wer_95": [round(x, 2) for x in bootstrap_interval(texts, heard)]}


def main() -> None:
    """Score originals, copies by look-up, and copies by a decoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--demo", action="store_true")
    for name in ("data", "judge", "codec", "source"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--save", help="folder for the codec with its decoder")
    parser.add_argument("--kind", default="speech")
    parser.add_argument("--options", type=json.loads, default={}, help="of the codec, as JSON")
    parser.add_argument("--columns", type=json.loads, default={"speech": "audio", "text": "transcription"}, help="JSON")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, help="of that split")
    parser.add_argument("--sounds", type=int, default=4000, help="to fit and train on")
    parser.add_argument("--steps", type=int, default=4000, help="of the decoder")
    parser.add_argument("--width", type=int, default=160, help="of the decoder")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.demo and not (given.data and given.judge):
        parser.error("--demo, or both --data and --judge are needed")
    torch.set_num_threads(1)
    judge = load_judge(given.judge or ASSETS / "judge")
    rows = given.split, given.rows, given.sounds
    (train, said), (waves, texts) = of_the_demo(*rows) if given.demo else of_a_folder(given.data, *rows, given.columns)
    folder = given.codec or (ASSETS / "speech" if given.demo and not given.source else None)
    losses: list[float] = []
    begin, worked = time.perf_counter(), time.process_time()
    if folder is not None:
        codec: Any = load_codec(folder)
        codec.fit_decoder(train, given.steps, given.width, given.seed, lambda step, steps, loss: losses.append(loss))
    else:
        wanted = given.options | {"refine_steps": given.steps, "width": given.width}
        codec = make_codec(given.kind, train, texts=said, source=given.source, seed=given.seed, **wanted)
    taken = {"seconds": round(time.perf_counter() - begin), "cpu_seconds": round(time.process_time() - worked)}
    decoder, codec.decoder = codec.decoder, None
    names = ("kind", "options", "columns", "split", "steps", "width", "seed")
    settings = {name: getattr(given, name) for name in names}
    settings["source"] = Path(given.source).name if given.source else None
    record = begun(
        **settings,
        rows=len(texts),
        tokens_a_second=round(codec.rate, 2),
        seconds_trained_on=round(sum(map(len, train)) / 16_000),
        seconds_a_row=round(sum(map(len, waves)) / 16_000 / len(waves), 2),
        originals=rates(judge, waves, texts),
    )
    worked = time.process_time()
    ids = codec.encode(waves)
    record["seconds_encoded_a_cpu_second"] = round(sum(map(len, waves)) / 16_000 / (time.process_time() - worked), 1)
    record["looked_up"] = rates(judge, codec.decode(ids), texts)
    codec.decoder = decoder
    record |= {"decoded": rates(judge, codec.decode(ids), texts), "fitted": taken}
    if losses:
        record["last_loss"] = round(float(np.mean(losses[-100:])), 4)
    if given.save:
        codec.save_pretrained(given.save)
    finish(record, given.output)


if __name__ == "__main__":
    main()
