"""The demo's report: one HTML file with its sounds and pictures inside, that needs nothing but a browser."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from zipper_lm.demo import figures

SAMPLE_RATE = 16_000


@dataclass(frozen=True, kw_only=True)
class Example:
    """One test utterance.

    Attributes:
        number: from 1. row: its place in the test split. text: what is said. voice: by whom.
        read: what the model wrote on hearing it. chain_text: the same, within the chain.
        heard: what the judge hears in ``judge`` (the original), ``oracle``, ``look_up``, ``tts`` and ``chain``.
        sounds: ``input``, ``codec``, ``look_up`` (without its learned decoder), ``generated`` and ``chain``; float
            ``[samples]`` at 16 kHz.
    """

    number: int
    row: int
    text: str
    voice: str
    read: str
    heard: Mapping[str, str]
    chain_text: str
    sounds: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ReportData:
    """What the report shows.

    Attributes:
        results: as in ``results.json``. table: rows of what, word errors, character errors, remark.
        best, worst: examples to play, from the best and from the worst one. history: the Trainer's log.
        maps: by task, attention ``[queries, memory]``, the text's tokens, the zip layer's name.
    """

    results: Mapping[str, Any]
    table: Sequence[tuple[str, str, str, str]]
    best: Sequence[Example]
    worst: Sequence[Example]
    history: Sequence[Mapping[str, Any]]
    maps: Mapping[str, tuple[np.ndarray, list[str], str]]


def write_report(file: Path, data: ReportData) -> None:
    """Write the page."""
    file.write_text(page(data), encoding="utf-8")


def page(data: ReportData) -> str:
    """The page as HTML that is also well-formed XML after its first line."""
    r = data.results
    same = "bit-identical to the shipped one" if r["text_tower_identical"] else "CHANGED"
    shown = [(f"The best {len(data.best)}", data.best), (f"The worst {len(data.worst)}", data.worst)]
    body = "".join(
        [
            "<header><h1>Zipper demo</h1>",
            "<p>A text model and a speech model, each trained alone, fused by small gated cross-attention layers: "
            "the fused model reads speech, speaks text, and does both in one document.</p></header>",
            _cards(r),
            "<section><h2>Errors, in per cent</h2>",
            _table(data.table),
            f"<p class='note'>{r['test_utterances']} test sentences ({r['test_words']} words) by speakers that no part "
            "was trained on; neither sentences nor speakers are in any training data. 95 % bootstrap intervals in "
            "brackets. The judge is a separate recogniser fitted on other sentences and other speakers; its own errors "
            f"count in every figure that it hears. Frozen text tower: {same} ({r['text_tower_tensors']} tensors, and "
            "its logits on sample input).</p></section>",
            "<section><h2>Listen</h2><p class='note'>Of the test sentences those with the fewest errors, and those "
            "with the most, in reading and speaking together.</p>",
            *(part for name, examples in shown for part in (f"<h3>{name}</h3>", *map(_example, examples))),
            "</section>",
            "<section><h2>Spoken in, spoken out</h2><p>One document: the model hears the first sound, writes down what "
            "it heard, and says it again in a voice of its own.</p>",
            *(part for name, examples in shown for part in (f"<h3>{name}</h3>", *map(_chain, examples))),
            "</section>",
            "<section><h2>Where the zips look</h2>",
            "<div class='figures'>",
            *(_map(task, r, *found) for task, found in data.maps.items()),
            "</div></section>",
            "<section><h2>Learning</h2><div class='figures'>",
            *_curves(data.history),
            "</div></section>",
            _details(r),
        ]
    )
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'/>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'/>"
        f"<title>Zipper demo</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _cards(r: Mapping[str, Any]) -> str:
    cards = [
        (f"{r['asr_wer']:.1f} %", "word errors, speech to text"),
        (f"{r['tts_wer']:.1f} %", f"word errors, text to speech (codec alone: {r['oracle_wer']:.1f} %)"),
        (f"{r['tts_best_wer']:.1f} %", "the same, of samples the one that the model reads best itself"),
        ("identical" if r["text_tower_identical"] else "changed", "frozen text tower, before and after"),
        (f"{r['seconds'] / 60:.1f} min", f"on {r['machine']['cores']} cores"),
    ]
    return (
        "<div class='cards'>"
        + "".join(f"<div class='card'><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in cards)
        + "</div>"
    )


def _table(rows: Sequence[tuple[str, str, str, str]]) -> str:
    head = "".join(f"<th>{h}</th>" for h in ("task", "word errors", "character errors", ""))
    lines = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def _example(e: Example) -> str:
    return (
        f"<article><h3>{escape(e.text)}</h3><p class='note'>{escape(e.voice)}</p>"
        f"<p>The model heard: {_marked(e.read, e.text)}</p><div class='players'>"
        + _player("input", e.sounds["input"], e.heard["judge"], e.text)
        + _player("input, codec only", e.sounds["codec"], e.heard["oracle"], e.text)
        + _player("input, codec by look-up", e.sounds["look_up"], e.heard["look_up"], e.text)
        + _player("generated from the text", e.sounds["generated"], e.heard["tts"], e.text)
        + "</div></article>"
    )


def _chain(e: Example) -> str:
    return (
        "<article class='chain'><div class='players'>"
        + _player("given", e.sounds["input"], None, e.text)
        + f"<figure class='written'><figcaption>written</figcaption><p>{_marked(e.chain_text, e.text)}</p></figure>"
        + _player("spoken", e.sounds["chain"], e.heard["chain"], e.text)
        + "</div></article>"
    )


def _marked(said: str, wanted: str) -> str:
    kind = "right" if said.split() == wanted.split() else "wrong"
    return f"<q class='{kind}'>{escape(said) or '(nothing)'}</q>"


def _player(label: str, wave: np.ndarray, heard: str | None, wanted: str) -> str:
    told = "" if heard is None else f"<p class='note'>judge: {_marked(heard, wanted)}</p>"
    source = f"data:audio/flac;base64,{_flac(wave)}"
    return (
        f"<figure><figcaption>{escape(label)}</figcaption>"
        f"<audio controls='controls' preload='metadata' src='{source}'></audio>{told}</figure>"
    )


def _flac(wave: np.ndarray) -> str:
    """Base64 of a sound; one that is empty (the model said nothing) becomes a tenth of a second of silence."""
    file = io.BytesIO()
    audible = wave if len(wave) else np.zeros(SAMPLE_RATE // 10, dtype=np.float32)
    soundfile.write(file, audible, SAMPLE_RATE, format="FLAC")
    return base64.b64encode(file.getvalue()).decode()


def _map(task: str, r: Mapping[str, Any], weights: np.ndarray, tokens: list[str], name: str) -> str:
    rate = 100 / r["sizes"]["frames_per_token"]
    svg = figures.attention(weights, tokens, rate, reads_sound=task == "speech->text")
    what = "hearing: each text token looks for its sound" if task == "speech->text" else "speaking: each sound looks"
    what += "" if task == "speech->text" else " for its text"
    return f"<figure class='figure'><figcaption>{what} ({escape(name)})</figcaption>{svg}</figure>"


def _curves(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Losses by modality, gates, and validation errors, as far as the log has them."""
    panels = []
    losses = {n.removeprefix("loss_"): _points(history, n) for n in _names(history, "loss_")}
    gates = {n.removeprefix("gate/"): _points(history, n) for n in _names(history, "gate/")}
    errors = {"speech to text": points} if (points := _points(history, "eval_wer")) else {}
    for caption, series, label in (
        ("training loss", losses, "nats per token"),
        ("gates: how far each zip is open", gates, "tanh(gate)"),
        ("word errors on validation sentences", errors, "per cent"),
    ):
        if series:
            picture = figures.curves(series, label, log=series is losses)
            panels.append(f"<figure class='figure'><figcaption>{caption}</figcaption>{picture}</figure>")
    return panels


def _names(history: Sequence[Mapping[str, Any]], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for entry in history for name in entry if name.startswith(prefix)))


def _points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(float(e["step"]), float(e[name])) for e in history if name in e and "step" in e]


def _details(r: Mapping[str, Any]) -> str:
    rows = {
        "parameters": r["parameters"].removeprefix("parameters: "),
        "seconds": ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in r["seconds_by_stage"].items()),
        "seed": r["seed"],
        "versions": ", ".join(f"{k} {v}" for k, v in r["versions"].items()),
    }
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in rows.items())
    return f"<section><h2>Details</h2><dl>{lines}</dl><p class='note'>All numbers: results.json.</p></section>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6575; --page: #f7f8fa; --card: #fff; --line: #dfe3ea;
  --accent: #2f7ed8; --good: #1d8a4b; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa5b5; --page: #14171c; --card: #1d2128;
  --line: #313844; --accent: #6aa9f0; --good: #57c785; --bad: #f08a7e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 2rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 1rem 0 0; } article h3 { margin: 0; }
header p { max-width: 44rem; color: var(--soft); margin: .25rem 0 1.5rem; }
.note { color: var(--soft); font-size: .875rem; margin: .25rem 0; max-width: 56rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem; }
.card, article, .figure, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.card { padding: .9rem 1rem; display: flex; flex-direction: column; }
.card b { font-size: 1.6rem; color: var(--accent); } .card span { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .5rem .9rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; font-size: .875rem; }
td:nth-child(2), td:nth-child(3) { font-variant-numeric: tabular-nums; }
article { padding: 1rem; margin: .75rem 0; } article p { margin: .25rem 0; }
.players { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; margin-top: .5rem; }
figure { margin: 0; } figcaption { font-size: .875rem; color: var(--soft); margin-bottom: .25rem; }
audio { width: 100%; height: 2.4rem; } .written { align-self: center; }
q.right { color: var(--good); } q.wrong { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .75rem; }
.figure { padding: 1rem; color: var(--ink); } .figure svg { width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
