"""What units of a speech encoder tell of letters, at several rates: a small network spells their text, by CTC.

python benchmarks/unit_spelling.py RECORD --data FOLDER --source ENCODER --layer 3 [--rates 25 12.5 8.3] [--units 500]

CTC needs a place for each letter, and at low rates there are fewer units than letters. So all rates have the places of
the highest one: a unit is laid out over as many as it lasts, each place told which of them it is, and one and the same
network of convolutions over places, and as many steps, spell what there is. Texts with more letters than places are
left out. Units are of means of the same features, fitted on the same sounds; embeddings begin at their centroids. With
--spelling-steps they are made once more, of a projection that was learned on the training split first. One thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common.record import begun, finish, keep
from torch import Tensor, nn

from zipper_lm.codecs.audio import read_sound
from zipper_lm.codecs.kmeans import fit_centroids, nearest
from zipper_lm.codecs.pretrained import ModelSource, open_model
from zipper_lm.codecs.speech_encoder import EncoderModel, SpeechEncoder, features, pool_of, pooled, speech_encoder
from zipper_lm.codecs.spelling_projection import fit_spelling_projection
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.evaluation.word_error_rate import word_error_rate

BATCH = 32
WIDTH = 192
RATE = 4e-3
LETTERS = " abcdefghijklmnopqrstuvwxyz'"

Spoken = tuple[list[Tensor], list[str]]


class Speller(nn.Module):
    """Units, long [rows, time], to log-probabilities of blank and letters, [rows, time * each, letters + 1]."""

    def __init__(self, centroids: Tensor, each: int) -> None:
        super().__init__()
        spread = (centroids - centroids.mean(0)) / centroids.std(0).clamp_min(1e-3)
        self.embedding = nn.Embedding.from_pretrained(spread, freeze=False)
        self.enter = nn.Linear(spread.shape[1], WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(each, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.convolutions = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 5, padding=2) for _ in range(3))
        self.head = nn.Linear(WIDTH, len(LETTERS) + 1)

    def forward(self, units: Tensor) -> Tensor:
        """See there."""
        h = (self.enter(self.embedding(units))[:, :, None] + self.place).flatten(1, 2)
        for norm, convolution in zip(self.norms, self.convolutions):
            h = h + F.gelu(convolution(norm(h).transpose(1, 2)).transpose(1, 2))
        return self.head(self.norms[-1](h)).log_softmax(-1)


def heard(
    data: str, split: str, most: int, encoder: SpeechEncoder, layer: int, whole: int, least: int
) -> tuple[list[Tensor], list[str]]:
    """Features [time, width] of a split's sounds, cut to a multiple of `whole`, and texts that have room in them."""
    rows: list[Any] = list(read_rows(data, {"speech": "speech", "text": "text"}, split, most))
    found, texts = [], []
    for start in range(0, len(rows), encoder.batch):
        part = rows[start : start + encoder.batch]
        for row, x in zip(part, features([read_sound(r["speech"]) for r in part], encoder, layer)):
            text = "".join(letter for letter in row["text"].lower() if letter in LETTERS)
            repeats = sum(a == b for a, b in pairwise(text))
            count = len(x) // whole * whole
            if text and len(text) + repeats <= count // least:
                found.append(x[:count].half())
                texts.append(text)
    return found, texts


def means_of(splits: Sequence[Spoken], pool: int) -> list[list[Tensor]]:
    """Of every split's features the means that units are made of."""
    return [[pooled(x.float(), pool) for x in found] for found, _ in splits]


def projected(splits: Sequence[Spoken], pool: int, rate: float, steps: int) -> list[list[Tensor]]:
    """The same by a projection that has learned to spell on the first split."""
    train, texts = splits[0]
    learned = fit_spelling_projection([x.float() for x in train], texts, pool, rate, steps=steps)
    return [[learned.units(x.float()) for x in found] for found, _ in splits]


def spell(train: Spoken, heldout: Spoken, centroids: Tensor, each: int, steps: int, seed: int) -> dict[str, Any]:
    """Train a speller on units of each sound, and score it on others."""
    torch.manual_seed(seed)
    network = Speller(centroids, each)
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    order = sorted(range(len(train[0])), key=lambda i: len(train[0][i]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    losses: list[float] = []
    while len(losses) < steps:
        for number in torch.randperm(len(batches)).tolist()[: steps - len(losses)]:
            rows = batches[number]
            loss, _ = _loss(network, [train[0][i] for i in rows], [train[1][i] for i in rows], each)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        loss, written = _loss(network, *heldout, each)
    found = word_error_rate(heldout[1], written)
    nats = {"nats_a_letter": round(loss.item(), 3), "nats_a_letter_in_training": round(sum(losses[-20:]) / 20, 3)}
    return {**nats, "letters_wrong": round(found.cer, 1), "words_wrong": round(found.wer, 1)}


def _loss(network: Speller, rows: Sequence[Tensor], texts: Sequence[str], each: int) -> tuple[Tensor, list[str]]:
    """Nats a letter, and what is written."""
    spelled = [torch.tensor([1 + LETTERS.index(letter) for letter in text]) for text in texts]
    places = torch.tensor([len(row) * each for row in rows])
    said = network(nn.utils.rnn.pad_sequence(list(rows), batch_first=True))
    lengths = torch.tensor([len(s) for s in spelled])
    total = F.ctc_loss(said.transpose(0, 1), torch.cat(spelled), places, lengths, reduction="sum")
    best = [row[:count].unique_consecutive().tolist() for row, count in zip(said.argmax(-1), places)]
    return total / lengths.sum(), ["".join(LETTERS[i - 1] for i in row if i) for row in best]


def main() -> None:
    """Fit and spell at each rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--data", required=True, help="data set with speech and text")
    parser.add_argument("--source", required=True, help="folder or Hub id of an encoder")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--window", type=float, help="seconds that it reads at once")
    parser.add_argument("--rates", type=float, nargs="+", default=[25, 12.5, 8.3])
    parser.add_argument("--units", type=int, default=500)
    parser.add_argument("--spelling-steps", type=int, default=0, help="of a projection that is learned first, too")
    parser.add_argument("--rows", type=int, nargs=2, default=[1200, 100], help="of train and validation")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = open_model(EncoderModel, ModelSource(source=given.source))
    encoder = speech_encoder(model, window=given.window)
    pools = [pool_of(rate, encoder) for rate in given.rates]
    least = min(pools)
    if any(pool % least for pool in pools):
        parser.error(f"--rates {given.rates}: each must divide the highest one")
    names = ("layer", "window", "units", "rows", "steps", "seeds", "spelling_steps")
    settings = {name: getattr(given, name) for name in names}
    record = begun(source=Path(given.source).name, **settings, rates={})
    splits = [
        heard(given.data, split, most, encoder, given.layer, math.lcm(*pools), least)
        for split, most in zip(("train", "validation"), given.rows)
    ]
    record["texts"] = [len(texts) for _, texts in splits]
    for rate, pool in zip(given.rates, pools):
        for learned in (0, given.spelling_steps) if given.spelling_steps else (0,):
            begin = time.process_time()
            vectors = projected(splits, pool, rate, learned) if learned else means_of(splits, pool)
            centroids = fit_centroids(torch.cat(vectors[0]), given.units, 0)
            train, heldout = [([nearest(x, centroids) for x in xs], texts) for xs, (_, texts) in zip(vectors, splits)]
            results = [spell(train, heldout, centroids, pool // least, given.steps, seed) for seed in given.seeds]
            spent = {"cpu_seconds": round(time.process_time() - begin)}
            name = f"{rate:g}" + (", of a projection" if learned else "")
            record["rates"][name] = {"seeds": results, **spent}
            keep(record, given.output)
            print(name, results, flush=True)
    finish(record, given.output)


if __name__ == "__main__":
    main()
