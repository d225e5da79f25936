"""Write the result blocks of README.md and docs/ from the raw JSON under docs/runs and results, and draw
docs/comparison.png; no number there is typed by hand.

python benchmarks/fill_docs.py          # rewrite
python benchmarks/fill_docs.py --check  # exit 1 if a page says anything else than its JSON
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zipper_lm.experiments.comparison import Comparison, compare
from zipper_lm.experiments.records import Cell, read_results
from zipper_lm.experiments.report import spread
from zipper_lm.files import new_file

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "docs" / "runs"
SOUNDS = ROOT / "docs" / "sounds"
PAGES = ("README.md", "docs/recipes.md", "docs/spoken-digits.md", "docs/cost.md")
BLOCK = re.compile(r"<!-- results:([\w-]+) -->\n.*?<!-- end of results -->", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """A raw record under docs/runs."""
    return json.loads((RUNS / name).read_text(encoding="utf-8"))


def rate(record: dict[str, Any], key: str = "wer") -> str:
    """Per cent with its 95 % interval."""
    low, high = record[f"{key}_95"]
    return f"{record[key]:.1f} ({low:.1f} to {high:.1f})"


def table(heading: str, rows: list[tuple[str, str, str]], third: str = "aim") -> str:
    """A table with a column of rates and a remark."""
    lines = [f"| {heading} | WER % | {third} |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {figure} | {remark} |" for what, figure, remark in rows])


def demo() -> str:
    """What `zipper demo` measured."""
    record = read("demo.json")
    sizes, machine = record["sizes"], record["machine"]

    def aim(key: str) -> str:
        target = record["targets"][key]
        return f"{target['at_most']:.0f}: {'reached' if target['reached'] else 'not reached'}"

    rows = [
        ("speech to text", rate(record, "asr_wer"), aim("asr_wer")),
        ("text to speech, as the judge hears it", rate(record, "tts_wer"), aim("tts_wer")),
        ("speech codec alone, as the judge hears it", rate(record, "oracle_wer"), ""),
        ("original recordings, as the judge hears them", rate(record, "judge_wer_on_originals"), ""),
        ("spoken in, spoken out (one document): the text", rate(record, "chain_text_wer"), ""),
        ("spoken in, spoken out (one document): the sound", rate(record, "chain_wer"), ""),
    ]
    same = "is bit-identical before and after" if record["text_tower_identical"] else "CHANGED"
    minutes, steps, count = record["seconds"] / 60, sizes["fusion"]["steps"], record["test_utterances"]
    return (
        f"`zipper demo`, seed {record['seed']}, {steps} steps, {minutes:.1f} minutes on {machine['cores']} cores ([raw "
        f"numbers](docs/runs/demo.json)). One run;\n{count} held-out sentences in held-out voices; word error rate in "
        "per cent, 95 % bootstrap interval in brackets.\n\n"
        f"{table('', rows)}\n\nThe frozen text tower {same}."
    )


def _digits_table() -> str:
    asr, tts, plain = (read(f"spoken-digits/{n}.json") for n in ("asr", "tts", "tts-plain"))
    rows = [
        ("speech to text", rate(asr), "at most 10, better 5"),
        ("text to speech, as the judge hears it", rate(tts), "at most 25, better 15"),
        ("text to speech, plain greedy search", rate(plain), ""),
        ("speech codec alone, as the judge hears it", f"{tts['oracle_wer']:.1f}", ""),
        ("original recordings, as the judge hears them", f"{tts['judge_wer_on_originals']:.1f}", ""),
    ]
    return table(f"{asr['utterances']} test utterances, recordings that were not in training", rows)


def digits() -> str:
    """Human digits, in short."""
    run = read("spoken-digits/run.json")
    seed, minutes = run["recipe"]["seed"], run["seconds"] / 60
    return (
        f"One run, seed {seed}, {minutes:.0f} minutes on one of 2 cores for codec, both towers, {run['steps']} steps "
        "of fusion and their scores. Five\nspeakers; 95 % bootstrap intervals in brackets. Details, curves and sounds: "
        f"[docs/spoken-digits.md](docs/spoken-digits.md).\n\n{_digits_table()}"
    )


def digits_in_full() -> str:
    """Human digits: the table, and what it cost."""
    run = read("spoken-digits/run.json")
    before, after = (run[f"perplexity_{when}"]["speech"] for when in ("before", "after"))
    frozen = ", ".join(f"{n}: {'bit-identical' if same else 'CHANGED'}" for n, same in run["frozen_unchanged"].items())
    seed, minutes = run["recipe"]["seed"], run["seconds"] / 60
    return (
        f"{_digits_table()}\n\n- One run, seed {seed}, {run['steps']} steps, {minutes:.0f} minutes, pre-training "
        "included (the judge had been fitted before), with one thread on a\n  machine of 2 cores that did other work "
        "too. No GPU.\n"
        "- What it cost: perplexity of the trained speech tower on sound alone went from "
        f"{before:.2f} to {after:.2f} (validation).\n- Frozen towers: {frozen}."
    )


def without_theo() -> str:
    """One speaker left out of everything."""
    asr, tts = (read(f"spoken-digits-without-theo/{n}.json") for n in ("asr", "tts"))
    rows = [
        ("speech to text", rate(asr), ""),
        ("text to speech (of his sentences, in the voices that are known)", rate(tts), ""),
        ("speech codec alone on his recordings, as the judge hears it", f"{tts['oracle_wer']:.1f}", ""),
        (
            "his original recordings, as the judge hears them",
            f"{tts['judge_wer_on_originals']:.1f}",
            "the judge knows him",
        ),
    ]
    return table(f"theo's {asr['utterances']} test utterances", rows, "")


def sounds() -> str:
    """The sounds in docs/sounds."""
    with (SOUNDS / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            f"| [{r['file_name']}](sounds/{r['file_name']}) | {r['transcription']} | {r['heard']} |"
            for r in csv.DictReader(file)
        ]
    return "\n".join(["| Sound | Text given | What the judge heard |", "|---|---|---|", *rows])


def combination() -> str:
    """What two models do together that were trained apart."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in (RUNS / "combination").glob("*-*.json")}

    def right(name: str) -> tuple[str, str, str]:
        score = found[name]
        low, high = (100 - x for x in reversed(score["wer_95"]))
        return f"{score['exact']:.1f}", f"{low:.1f} to {high:.1f}", str(score["utterances"])

    rows = [
        ("say a digit, get a picture of it: speech -> text -> image", "speech-text-image"),
        ("show a digit, hear it: image -> text -> speech", "image-text-speech"),
        ("speech -> text alone", "speech-text"),
        ("image -> text alone", "image-text"),
        ("text -> image alone", "text-image"),
    ]
    lines = ["| | right, % | of | 100 - WER, 95 % interval |", "|---|---|---|---|"]
    for what, name in rows:
        exact, interval, count = right(name)
        lines.append(f"| {what} | {exact} | {count} | {interval} |")
    return "\n".join(lines)


SINGLE = "single-decoder-as-large-seen-unaligned"


def _pairs(point: str) -> int:
    """Of the 3000, by the name of a share."""
    return round(30 * float(point.removesuffix("-percent")))


FEW = "10-percent"

TASKS = {"asr": "speech to text", "tts": "text to speech"}


KINDS = {"zipper": "Zipper", SINGLE: "single decoder"}

TRIED = (
    *("data-curve-long", "more-steps", "augmentation", "pseudo-labels"),
    *("few-pairs", "early-stopped-tower", "equal-exposure"),
)


def _error(cell: Cell) -> float:
    """On the validation split, mean over seeds."""
    return sum(record["validation_score"] for record in cell) / len(cell)


def _most_of(kind: str, share: str) -> Cell:
    """Of all that was tried with so many pairs, the lowest validation error; empty if only the plain one was.

    Where an experiment has some of another's runs, the one with all of them counts."""
    start = kind.partition("-")[0]
    tried = [
        cell
        for name in TRIED
        for (point, arm), cell in read_results(ROOT / "results" / name).cells.items()
        if point == share and arm.startswith(start)
    ]
    runs = [{record["run_hash"] for record in cell} for cell in tried]
    whole = [cell for cell, hashes in zip(tried, runs) if not any(hashes < others for others in runs)]
    return min(whole, key=_error) if len(tried) > 1 else []


def _curve() -> dict[tuple[str, str], list[Cell]]:
    """By (share, kind), from the smallest share that both were run with: as it is with 2000 steps, and made the most
    of."""
    cells = read_results(ROOT / "results" / "data-curve-long").cells
    shares = [p for p in sorted({p for p, _ in cells}, key=_pairs) if all((p, kind) in cells for kind in KINDS)]
    return {(p, kind): [cells[p, kind], _most_of(kind, p)] for p in shares for kind in KINDS}


def comparison() -> str:
    """Zipper against a single decoder of its size that has seen as much, by share of the aligned data."""
    curve = _curve()
    heads = [f"{name}{how}" for name in KINDS.values() for how in ("", ", made the most of")]
    lines = [f"| test WER, % | pairs | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for task, name in TASKS.items():
        for share in dict.fromkeys(share for share, _ in curve):
            cells = [cell for kind in KINDS for cell in curve[share, kind]]
            rates = " | ".join(spread([r["scores"][task]["wer"] for r in x]) if x else "not tried" for x in cells)
            heard = ", as the judge hears it" if task == "tts" else ""
            lines.append(f"| {name}{heard} | {_pairs(share)} | {rates} |")
    return "\n".join(lines)


def draw_comparison(picture: Path) -> None:
    """The table of `comparison` as curves over the number of pairs, least to most as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curve = _curve()
    shares = list(dict.fromkeys(share for share, _ in curve))
    floor = curve[shares[-1], "zipper"][0][0]["scores"]["tts"]["oracle_wer"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True, sharey=True)
    for axes, (task, name) in zip(panels, TASKS.items()):
        for (kind, told), color in zip(KINDS.items(), ("C0", "C3")):
            for most, (how, line) in enumerate((("", "--"), (", made the most of", "-"))):
                run = [share for share in shares if curve[share, kind][most]]
                rates = [[r["scores"][task]["wer"] for r in curve[share, kind][most]] for share in run]
                means = [sum(x) / len(x) for x in rates]
                bars = [[m - min(x) for m, x in zip(means, rates)], [max(x) - m for m, x in zip(means, rates)]]
                axes.errorbar(
                    [_pairs(share) for share in run],
                    means,
                    yerr=bars,
                    linestyle=line,
                    color=color,
                    marker="o" if most else ".",
                    capsize=3,
                    alpha=1.0 if most else 0.6,
                    label=told + how,
                )
        if task == "tts":
            axes.axhline(floor, color="black", linewidth=1, linestyle=":", label="codec alone")
        axes.set_xscale("log")
        axes.set_xticks([_pairs(share) for share in shares], [str(_pairs(share)) for share in shares])
        axes.minorticks_off()
        axes.set_ylim(0, None)
        axes.set_xlabel("aligned pairs")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test WER (%)")
    panels[1].legend()
    with new_file(picture, overwrite=True) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)


def few_pairs() -> str:
    """What was tried with 300 pairs, with 30 and with all."""
    curve, noise, labels = (
        read_results(ROOT / "results" / n) for n in ("data-curve-long", "augmentation", "pseudo-labels")
    )
    rows = [
        ("Zipper", curve, FEW, "zipper"),
        ("a fifth of the sound that is read left out", noise, FEW, "zipper-corrupt"),
        ("that, and half of the rows to read joined", noise, FEW, "zipper-joined-to-read"),
        ("that, and pseudo-labels", labels, FEW, "zipper-joined-pseudo-labels"),
        ("that, and guided attention to speak", labels, FEW, "zipper-joined-guided-pseudo-labels"),
        ("a fifth left out, and guided attention in both tasks", noise, FEW, "zipper-corrupt-guided"),
        ("a fifth left out, and guided attention to speak", noise, FEW, "zipper-corrupt-guided-to-speak"),
        ("half of all rows joined, and a fifth left out", noise, FEW, "zipper-joined-and-corrupt"),
        ("pseudo-labels", labels, FEW, "zipper-pseudo-labels"),
        ("pseudo-labels: the surest, twice", labels, FEW, "zipper-surest-twice"),
        ("pseudo-labels, and a fifth left out", labels, FEW, "zipper-corrupt-pseudo-labels"),
        ("single decoder", curve, FEW, SINGLE),
        ("single decoder, a fifth left out", noise, FEW, "single-decoder-corrupt"),
        ("single decoder, that and pseudo-labels", labels, FEW, "single-decoder-corrupt-pseudo-labels"),
        ("single decoder, that and joined rows", labels, FEW, "single-decoder-joined-pseudo-labels"),
        ("Zipper with 30 pairs", curve, "1-percent", "zipper"),
        (
            "... and all of the above, the surest half, three times",
            labels,
            "1-percent",
            "zipper-joined-guided-surest-thrice",
        ),
        ("single decoder with 30 pairs", curve, "1-percent", SINGLE),
        ("... joined rows and pseudo-labels", labels, "1-percent", "single-decoder-joined-pseudo-labels"),
        ("Zipper with all 3000 pairs", curve, "100-percent", "zipper"),
        ("... the speech tower frozen, too: zips alone are trained", curve, "100-percent", "zipper-all-frozen"),
        ("... a fifth left out, and guided attention to speak", curve, "100-percent", "zipper-corrupt-guided-to-speak"),
        ("... that, and half of the rows to read joined", curve, "100-percent", "zipper-joined-guided"),
        ("single decoder with all 3000 pairs", curve, "100-percent", SINGLE),
        ("... a fifth left out, and half of the rows to read joined", curve, "100-percent", "single-decoder-joined"),
    ]
    lines = ["| test WER, % | speech to text | text to speech | seeds |", "|---|---|---|---|"]
    for name, results, point, arm in rows:
        if cell := results.cells.get((point, arm)):
            rates = " | ".join(spread([r["scores"][task]["wer"] for r in cell]) for task in TASKS)
            lines.append(f"| {name} | {rates} | {len(cell)} |")
    return "\n".join(lines)


def _points(found: Comparison) -> str:
    seeds = f"{found.seeds} seed{'s' * (found.seeds != 1)}"
    return f"{found.difference:+.1f} points ({found.low:+.1f} to {found.high:+.1f}), {seeds}"


def _rates(found: Comparison) -> str:
    return f"{found.ours:.1f} against {found.theirs:.1f} % WER"


def claims() -> str:
    """The paper's claims, and what came of them on human digits, plain and made the most of."""
    curve, all_pairs = _curve(), "100-percent"
    shares = list(dict.fromkeys(share for share, _ in curve))

    def against(task: str, share: str, most: bool, theirs: str | None = None) -> Comparison:
        """Zipper with a share of the pairs minus the single decoder with as many, or with another share."""
        found = compare(curve[share, "zipper"][most], curve[theirs or share, SINGLE][most], task)
        assert found is not None
        return found

    hows = {"": False, ", each made the most of": True}
    tts = against("tts", all_pairs, True)
    few = {
        f"{_pairs(share)} pairs{how}": against("asr", share, most)
        for share in ("1-percent", FEW)
        for how, most in hows.items()
    }
    less = {
        (f"{_pairs(share)} pairs{how}", task): against(task, share, most, all_pairs)
        for share, how, task in [(FEW, how, task) for how in hows for task in TASKS]
        + [("1-percent", list(hows)[1], "tts")]
        for most in [hows[how]]
    }
    each = {(task, share): against(task, share, False) for task in TASKS for share in shares}
    (task, point), worst = max(each.items(), key=lambda item: item[1].difference)
    cells = [cell for share in shares for cell in curve[share, "zipper"]]
    frozen = [same for cell in cells for record in cell for same in record["frozen_unchanged"].values()]
    single = curve[all_pairs, SINGLE][0]
    forgot = [r["perplexity_after"]["text"] / r["perplexity_before"]["text"] for r in single]
    rows: list[tuple[str, str, bool]] = [
        (
            "text to speech with all pairs, each made the most of: at least 40 % fewer errors than the single decoder",
            f"{_rates(tts)}, {tts.relative:+.0f} %: {_points(tts)}",
            tts.relative <= -40 and tts.high < 0,
        )
    ]
    rows += [
        (
            f"speech to text with {pairs}: at most a quarter of its errors",
            f"{_rates(found)}, {found.ours / found.theirs:.2f} of them: {_points(found)}",
            found.ours / found.theirs <= 0.25,
        )
        for pairs, found in few.items()
    ]
    rows += [
        (
            f"{TASKS[task]} with {pairs}: no worse than the single decoder with 3000",
            f"{_rates(found)}: {_points(found)}",
            found.high <= 0,
        )
        for (pairs, task), found in less.items()
    ]
    rows += [
        (
            f"at least as good, on average, at each of {len({p for _, p in each})} shares",
            f"worst: {TASKS[task]} with {_pairs(point)} pairs, {_rates(worst)}: {_points(worst)}",
            worst.difference <= 0,
        ),
        (
            "nothing is forgotten where a tower is frozen",
            f"bit-identical in {sum(frozen)} of {len(frozen)} runs; the single decoder's perplexity of text grows "
            f"{min(forgot):.1f} to {max(forgot):.1f} times",
            all(frozen),
        ),
    ]
    lines = ["| claim | measured | |", "|---|---|---|"]
    return "\n".join(lines + [f"| {c} | {found} | {'shown' if held else '**not shown**'} |" for c, found, held in rows])


def notes_and_captions() -> str:
    """Zipper against the single decoder on sounds that are no speech."""
    results = read_results(ROOT / "results" / "sounds-cpu")
    heads = ["captioned sounds", "Zipper", "single decoder", "codec alone"]
    lines = [f"| test WER, % | {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for task, name in (("sound->text", "sound to caption"), ("text->sound", "caption to sound, as the judge hears it")):
        for point in results.experiment.points:
            cells = [results.cells.get((point, kind), []) for kind in KINDS]
            rates = [spread([r["scores"][task]["wer"] for r in cell]) for cell in cells]
            floors = [r["scores"][task]["oracle_wer"] for r in cells[0] if task == "text->sound"]
            floor = f"{floors[0]:.1f}" if floors else ""
            lines.append(f"| {name} | {_pairs(point)} | {' | '.join(rates)} | {floor} |")
    return "\n".join(lines)


def three_towers() -> str:
    """Three towers fused at once, beside two pairs that were trained apart and combined."""
    record = read("three-towers.json")
    seeds = record["seeds"]
    first = next(iter(seeds.values()))
    lines = ["| right, % | fused at once | trained apart, combined |", "|---|---|---|"]
    for task in first["joint"]["scores"]:
        cells = [_exact([s[way]["scores"].get(task) for s in seeds.values()]) for way in ("joint", "combined")]
        lines.append(f"| {task.replace('->', ' -> ')} | {' | '.join(cells)} |")
    steps = f"{first['joint']['steps']} steps at once; {' and '.join(map(str, first['combined']['steps']))} apart"
    count = first["joint"]["scores"]["speech->text"]["utterances"]
    told = f"{count} test rows, seeds {', '.join(seeds)}; {steps} (as many documents in each direction)."
    return f"{told}\n\n" + "\n".join(lines)


def _exact(scores: list[dict[str, Any] | None]) -> str:
    """Rows without error over seeds: mean, and from least to most."""
    rates = [score["exact"] for score in scores if score is not None]
    if not rates:
        return "not trained on it"
    mean = f"{sum(rates) / len(rates):.1f}"
    return mean if len(rates) == 1 else f"{mean} ({min(rates):.1f} to {max(rates):.1f})"


def cost() -> str:
    """What the baselines cost, as a multiple of Zipper."""
    record = read("cost-cpu.json")
    others = list(record["rows"][0]["ratio_to_zipper"])
    size = ", ".join(f"{name} {count / 1e6:.1f} million" for name, count in record["parameters"].items())
    lines = [
        f"{record['device']}; median of {record['repeats']} turns. Parameters: {size}.",
        "",
        f"| batch | units of speech | what | {' | '.join(others)} |",
        "|---|---|---|" + "---|" * len(others),
    ]
    for row in record["rows"]:
        where = f"| {row['batch']} | {row['units']} |"
        for what in row["ratio_to_zipper"][others[0]]:
            ratios = " | ".join(f"{row['ratio_to_zipper'][o][what]:.2f}" for o in others)
            lines.append(f"{where} {what} | {ratios} |")
        kept = row["kept_for_backward_mib"]
        ratios = " | ".join(f"{kept[o] / kept['zipper']:.2f}" for o in others)
        lines.append(f"{where} memory kept for the backward pass | {ratios} |")
    return "\n".join(lines)


def time_to() -> str:
    """Steps to a given validation error, and what they cost in Zipper's steps (results/more-steps, cost-cpu.json)."""
    cells = read_results(ROOT / "results" / "more-steps").cells
    rows = [row for row in read("cost-cpu.json")["rows"] if (row["batch"], row["units"]) == (32, 64)]
    factor = rows[0]["ratio_to_zipper"]["single-decoder-as-large"]["training step"]
    zipper, single = (cells["100-percent", arm] for arm in ("zipper", SINGLE))
    lines = [
        "| | validation WER at most | zipper: steps | single decoder: steps | ... in steps of Zipper |",
        "|---|---|---|---|---|",
    ]
    for task, name in (("speech->text", "speech to text"), ("text->speech", "text to speech")):
        for most in (80, 50, 30, 15):
            ours, theirs = (_first_step(cell, f"eval_wer/{task}", most) for cell in (zipper, single))
            longest = max(record["steps"] for record in single)
            told = f"{theirs} | {theirs * factor:.0f}" if theirs else f"not in {longest} | over {longest * factor:.0f}"
            lines.append(f"| {name} | {most} | {ours or 'not reached'} | {told} |")
    return "\n".join(lines)


def _first_step(cell: Cell, key: str, most: float) -> int | None:
    """The first step at which the mean over seeds is that low."""
    courses = [{e["step"]: e[key] for e in record["validation"] if key in e} for record in cell]
    steps = sorted(set.intersection(*map(set, courses)))
    return next((n for n in steps if sum(c[n] for c in courses) / len(courses) <= most), None)


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "digits": digits,
    "digits-in-full": digits_in_full,
    "without-theo": without_theo,
    "sounds": sounds,
    "combination": combination,
    "three-towers": three_towers,
    "notes-and-captions": notes_and_captions,
    "claims": claims,
    "comparison": comparison,
    "few-pairs": few_pairs,
    "cost": cost,
    "time-to": time_to,
}


def filled(page: str) -> str:
    """A page with every block anew.

    Raises:
        ValueError: for a block that nothing here makes.
    """

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in BLOCKS:
            raise ValueError(f"no block {name!r}; there are {sorted(BLOCKS)}")
        return f"<!-- results:{name} -->\n\n{BLOCKS[name]()}\n\n<!-- end of results -->"

    return BLOCK.sub(block, page)


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    stale = []
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        if (new := filled(page)) != page:
            stale.append(name)
            if not arguments.check:
                (ROOT / name).write_text(new, encoding="utf-8")
    if not arguments.check:
        draw_comparison(ROOT / "docs" / "comparison.png")
    print("differ from docs/runs:" if arguments.check else "rewritten:", ", ".join(stale) or "none")
    if arguments.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
