"""Write the result blocks of README.md and docs/ from the raw JSON under docs/runs and results, a page of tables beside
each experiment's records, and the pictures; no number in them is typed by hand.

Each file of records is first given what its experiment file says now (notes, finding).

python tools/fill_docs.py          # rewrite
python tools/fill_docs.py --check  # exit 1 if a page says anything else than its JSON
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from human_digits import (
    KINDS,
    SINGLE,
    claims,
    comparison,
    draw_comparison,
    few_pairs,
    in_short,
    longer,
    what_is_read,
    with_all_pairs,
)
from speed import aims, decoders

from zipper_lm.experiments.comparison import compare
from zipper_lm.experiments.plan import read_experiment
from zipper_lm.experiments.records import Cell, keep, read_records, read_results
from zipper_lm.experiments.report import overview, spread, write_report
from zipper_lm.jobs.recipes.reader import to_mapping

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "docs" / "runs"
SOUNDS = ROOT / "docs" / "sounds"
PAGES = (
    *("README.md", "docs/comparison.md", "docs/concepts.md", "docs/combining.md", "docs/demo.md"),
    *("docs/recipes.md", "docs/spoken-digits.md", "docs/cost.md", "docs/results.md", "docs/reliability.md"),
    *("docs/scaling.md", "docs/security.md"),
)
EXPERIMENTS = (
    *("data-curve-long", "more-seeds", "converged", "augmentation", "pseudo-labels", "positions"),
    *("early-stopped-tower", "equal-exposure", "strong-tower", "more-steps", "data-curve-cpu", "main-cpu"),
    *("few-pairs", "digit-images", "window", "window-digits", "ablations-cpu", "digit-images-long"),
    *("sounds-cpu", "sounds-variants", "projection-place"),
)
"""In the order in which docs/results.md tells them."""
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


DEMO = ("demo.json", "demo-seed-1.json", "demo-seed-2.json")


def demo_llm() -> str:
    """What `zipper demo --llm` measured."""
    record = read("demo-llm.json")
    threads = f"{record['threads']} threads" if record["threads"] > 1 else "one thread"
    rows = [
        ("words wrong in what it hears", f"{record['asr_wer']:.1f} %"),
        ("sentences heard without a fault", f"{record['asr_exact']:.0f} %"),
        ("words wrong in what it speaks, as the judge hears it", f"{record['tts_wer']:.1f} %"),
        (f"the same, of {record['candidates']} samples the one that it reads best", f"{record['tts_best_wer']:.1f} %"),
        ("codec copies, as the judge hears them", f"{record['oracle_wer']:.1f} %"),
        ("original recordings, as the judge hears them", f"{record['judge_wer_on_originals']:.1f} %"),
        ("spoken questions whose answer holds the capital", f"{record['right']} of {record['questions']}"),
        ("spoken questions whose answer is that to the typed one", f"{record['as_typed']} of {record['questions']}"),
        ("the LLM afterwards", "bit-identical" if record["frozen_unchanged"] else "CHANGED"),
        (f"minutes, {threads}", f"{record['seconds'] / 60:.0f}"),
    ]
    told = (
        f"SmolLM2-135M-Instruct, {record['steps']} steps of 16, seed {record['seed']} ([record](runs/demo-llm.json)):"
    )
    return "\n".join([told, "", "|  |  |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)])


def demo() -> str:
    """What `zipper demo` measured: the mean of its seeds, and each."""
    records = [read(name) for name in DEMO]
    first, steps = records[0], {record["sizes"]["fusion"]["steps"] for record in records}
    for record in records:
        assert record["parts_sha256"] == first["parts_sha256"], "one figure, of one demo"

    def row(what: str, key: str) -> tuple[str, str, str]:
        rates = [record[key] for record in records]
        mean = statistics.mean(rates)
        aim = first["targets"][key]["at_most"] if key in first["targets"] else None
        remark = "" if aim is None else f"{aim:.0f}: {'reached' if mean <= aim else 'not reached'}"
        each = " / ".join(f"{rate:.1f}" for rate in rates) if len(set(rates)) > 1 else "the same"
        return what, f"{mean:.1f} | {each}", remark

    samples = first["sizes"]["candidates"]["num_return_sequences"]
    rows = [
        row("speech to text", "asr_wer"),
        row("text to speech, as the judge hears it", "tts_wer"),
        row(f"text to speech, of {samples} samples the one that the model reads best", "tts_best_wer"),
        row("speech codec alone, as the judge hears it", "oracle_wer"),
        row("original recordings, as the judge hears them", "judge_wer_on_originals"),
        row("spoken in, spoken out (one document): the text", "chain_text_wer"),
        row("spoken in, spoken out (one document): the sound", "chain_wer"),
    ]
    same = "is bit-identical before and after" if all(r["text_tower_identical"] for r in records) else "CHANGED"
    minutes = " / ".join(f"{record['seconds'] / 60:.1f}" for record in records)
    threads = " / ".join(str(record["machine"]["threads"]) for record in records)
    links = ", ".join(f"[{record['seed']}](runs/{name})" for record, name in zip(records, DEMO))
    lines = ["|  | WER %, mean | each seed | aim |", "|---|---|---|---|"]
    lines += [f"| {what} | {figures} | {remark} |" for what, figures, remark in rows]
    table = "\n".join(lines)
    return (
        f"`zipper demo --seed N`, seeds {links}, {steps.pop()} steps, {minutes} minutes with {threads} threads.\n"
        f"{first['test_utterances']} held-out sentences in held-out voices; word error rate in per cent.\n\n"
        f"{table}\n\nThe frozen text tower {same}."
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


def read_sentences() -> str:
    """What examples/sentences-cpu.yaml measured."""
    asr, tts, run = (read(f"sentences-cpu/{n}.json") for n in ("asr", "tts", "run"))
    rows = [
        ("speech to text", rate(asr), f"{asr['cer']:.1f}"),
        ("text to speech, as the judge hears it", rate(tts), f"{tts['cer']:.1f}"),
        ("speech codec alone, as the judge hears it", f"{tts['oracle_wer']:.1f}", ""),
        ("original recordings, as the judge hears them", f"{tts['judge_wer_on_originals']:.1f}", ""),
    ]
    pairs, seed = run["data"]["rows"]["train"], run["recipe"]["seed"]
    return (
        f"{asr['utterances']} test phrases in held-out voices; {pairs} pairs, {run['steps']} steps, seed {seed}, "
        f"one run.\n\n{table('', rows, 'characters wrong, %')}"
    )


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


def notes_and_captions() -> str:
    """Zipper against the single decoder on sounds that are no speech: at both shares, with a tenth of the pairs against
    all of them, and with more steps."""
    cells = read_results(ROOT / "results" / "sounds-cpu").cells
    more = read_results(ROOT / "results" / "sounds-variants").cells
    (few, single_few), (whole, single_whole) = (
        [cells[point, kind] for kind in KINDS] for point in ("10-percent", "100-percent")
    )
    longer = [more["100-percent", f"{kind}-thrice-the-steps"] for kind in ("zipper", "single-decoder")]
    rows = {
        "300": (few, single_few),
        "3000": (whole, single_whole),
        "300, single decoder 3000": (few, single_whole),
        "3000, three times the steps": (longer[0], longer[1]),
    }
    tasks = {"sound->text": "sound to caption", "text->sound": "caption to sound, as the judge hears it"}
    return _against("captioned sounds", tasks, rows)


def pictures_and_names() -> str:
    """Zipper against a single decoder of its size on handwritten digits."""
    cells = read_results(ROOT / "results" / "digit-images-long").cells
    counts = {"1-percent": "10", "100-percent": "1000"}
    rows = {told: (cells[point, "zipper"], cells[point, SINGLE]) for point, told in counts.items()}
    tasks = {"image->text": "picture to name", "text->image": "name to picture, as the judge sees it"}
    return _against("named pictures", tasks, rows)


def experiments() -> str:
    """What each experiment asked and found."""
    return overview({f"../results/{name}.md": read_results(ROOT / "results" / name) for name in EXPERIMENTS})


def write_page(name: str, root: Path) -> Path:
    """The tables of an experiment, as results/NAME.md, and its curves in docs/curves.

    Args:
        name: of the experiment. root: of this repository, or a folder to compare with it.

    Returns:
        The page.
    """
    page, pictures = root / "results" / f"{name}.md", root / "docs" / "curves"
    write_report([ROOT / "results" / f"{name}.jsonl"], page, pictures=pictures, overwrite=True)
    return page


def _refresh_plans() -> None:
    """Notes and findings as the experiment files have them."""
    for name in EXPERIMENTS:
        plan = to_mapping(read_experiment(Path("experiments") / f"{name}.yaml"))
        file = ROOT / "results" / f"{name}.jsonl"
        if read_records(file)[0] != plan:
            keep(file, plan=plan)


def _against(pairs: str, tasks: Mapping[str, str], rows: Mapping[str, tuple[Cell, Cell]]) -> str:
    """Zipper's runs and the single decoder's, by how many pairs."""
    lines = [
        f"| test WER, % | {pairs} | Zipper | single decoder | difference, points | codec alone | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, what in tasks.items():
        for told, (ours, theirs) in rows.items():
            found = compare(ours, theirs, task)
            assert found is not None
            rates = " | ".join(spread([r["scores"][task]["wer"] for r in cell]) for cell in (ours, theirs))
            floor = ours[0]["scores"][task].get("oracle_wer")
            difference = f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
            codec = "" if floor is None else f"{floor:.1f}"
            lines.append(f"| {what} | {told} | {rates} | {difference} | {codec} | {found.seeds} |")
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
    """What the baselines cost on a CPU, as a multiple of Zipper."""
    record = read("cost-cpu.json")
    others = list(record["rows"][0]["ratio_to_zipper"])
    told = f"{record['device']}; median of {record['repeats']} turns. Parameters: {_millions(record['parameters'])}."
    lines = _headed(told, others)
    for row in record["rows"]:
        where = f"| {row['batch']} | {row['units']} |"
        for what in row["ratio_to_zipper"][others[0]]:
            ratios = " | ".join(f"{row['ratio_to_zipper'][o][what]:.2f}" for o in others)
            lines.append(f"{where} {what} | {ratios} |")
        kept = row["kept_for_backward_mib"]
        ratios = " | ".join(f"{kept[o] / kept['zipper']:.2f}" for o in others)
        lines.append(f"{where} memory kept for the backward pass | {ratios} |")
    return "\n".join(lines)


def reliability() -> str:
    """What was done to runs (`make test-faults`), to files (`make fuzz`), and by several processes, as far as there are
    records: faults.json, fuzz.json, processes.json under docs/runs."""
    rows: list[tuple[str, int, int]] = []
    if (faults := _recorded("faults.json")) is not None:
        rows += [(kind, found["injected"], found["lost"]) for kind, found in faults["kinds"].items()]
        rows.append(("**faults put into runs, in all**", faults["injected"], faults["lost"]))
    if (fuzz := _recorded("fuzz.json")) is not None:
        rows.append(("**inputs tried**", fuzz["inputs"], fuzz["bugs"]))
    if (equal := _recorded("processes.json")) is not None:
        told = "**processes x configurations, compared with one process**"
        rows.append((told, equal["compared"], equal["compared"] - equal["equal"]))
    if not rows:
        return "Not recorded yet."
    lines = ["| | in all | as promised | not |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {number} | {number - bad} | {bad} |" for what, number, bad in rows])


def security() -> str:
    """What `make fuzz` came to, by target."""
    if (record := _recorded("fuzz.json")) is None:
        return "Not recorded yet."
    led = {"atheris": "bytes led by coverage", "none": "bytes changed blindly"}[record["coverage"]]
    lines = ["| what | inputs | accepted | refused | most seconds | most MiB | bugs |", "|---|---|---|---|---|---|---|"]
    whole = {key: sum(each[key] for each in record["targets"].values()) for key in ("inputs", "accepted", "refused")}
    worst = {key: record[key] for key in ("worst_seconds", "worst_mebibytes")}
    for name, each in [*record["targets"].items(), ("**all**", {**whole, **worst, "bugs": [0] * record["bugs"]})]:
        counts = " | ".join(f"{each[key]}" for key in ("inputs", "accepted", "refused"))
        most = f"{each['worst_seconds']:.2f} | {each['worst_mebibytes']:.0f}"
        lines.append(f"| {name} | {counts} | {most} | {len(each['bugs'])} |")
    return f"`make fuzz`, seed {record['seed']}, {led} ([record](runs/fuzz.json)):\n\n" + "\n".join(lines)


def _recorded(name: str) -> dict[str, Any] | None:
    return read(name) if (RUNS / name).is_file() else None


_ITSELF = "one_process_from_itself"


def processes() -> str:
    """Trainings in several processes beside the same ones in one."""
    record = _recorded("processes.json")
    if record is None:
        return "Not recorded yet."
    told = (
        f"**{record['equal']} of {record['compared']}** ways are equal within their limits, "
        f"{record['same bits']} to the last bit, after {record['steps']} steps."
    )
    lines = [told, "", "| model | laid out by | batches a step | processes | loss | gradients | weights |"]
    lines.append("|---|---|---|---|---|---|---|")
    for way in record["ways"]:
        apart = "same bits | same bits | same bits"
        if not way["same_bits"]:
            apart = " | ".join(f"{way[name]:.0e}" for name in ("loss", "gradients", "weights"))
        model = f"{way['model']}, step by step" if _ITSELF in way else way["model"]
        lines.append(f"| {model} | {way['wrap']} | {way['accumulated']} | {way['processes']} | {apart} |")
    for parted in [way[_ITSELF] for way in record["ways"] if _ITSELF in way][:1]:
        apart = " | ".join(f"{parted[name]:.0e}" for name in ("loss", "gradients", "weights"))
        lines.append(f"| frozen, from itself in another order | none | 2 | 1 | {apart} |")
    return "\n".join(lines)


def steps_to_click(name: str = "steps-to-click") -> str:
    """How many steps each candidate takes until a task is being done (benchmarks/steps_to_click.py)."""
    record = read(f"{name}.json")
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for run in record["runs"]:
        click = math.inf if run["click"] is None else run["click"]
        found.setdefault((run["task"], run["tower"], run["candidate"]), []).append((run["seed"], click))
    cap = record["settings"]["cap"]

    def told(steps: float) -> str:
        return f"{steps:.0f}" if steps < math.inf else f"> {cap}"

    lines = ["| task | text tower | what is changed | median | worst | each seed |", "|---|---|---|---|---|---|"]
    for (task, tower, candidate), runs in sorted(found.items()):
        change = " ".join(f"`{each}`" for each in record["candidates"][candidate]) or candidate
        clicks = [click for _, click in sorted(runs)]
        figures = f"{told(statistics.median(clicks))} | {told(max(clicks))} | {', '.join(map(told, clicks))}"
        lines.append(f"| {task} | {tower} | {change} | {figures} |")
    return "\n".join(lines)


def stream_scale() -> str:
    """Steps until a loss is half of what it was, by how large the stream is (benchmarks/stream_scale.py)."""
    record = read("stream-scale.json")
    lines = ["| stream, times as large | in its scale | median | worst | each seed |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        steps = [f"> {record['cap']}" if n == record["cap"] else f"{n:.0f}" for n in (row["median"], row["worst"])]
        each = ", ".join(f"> {record['cap']}" if n == record["cap"] else f"{n}" for n in row["steps"])
        lines.append(f"| {row['factor']} | {row['scale']} | {' | '.join(steps)} | {each} |")
    return "\n".join(lines)


def _headed(told: str, models: list[str]) -> list[str]:
    heads = f"| batch | units of speech | what | {' | '.join(models)} |"
    return [told, "", heads, "|---|---|---|" + "---|" * len(models)]


def _millions(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count / 1e6:.1f} million" for name, count in counts.items())


def cost_on_gpu(name: str) -> str:
    """Milliseconds and GiB of all three, from a record that was made on a GPU."""
    record = read(name)
    models = list(record["parameters"])
    told = (
        f"{record['device']}, {record['dtype']}, torch {record['versions']['torch']}; median of {record['repeats']} "
        f"turns. Parameters: {_millions(record['parameters'])}; trained: {_millions(record['trained'])}."
    )
    lines = _headed(told, models)
    for row in record["rows"]:
        where = f"| {row['batch']} | {row['units']} |"
        for what in row["milliseconds"]["zipper"]:
            times = " | ".join(f"{row['milliseconds'][m][what]:.1f}" for m in models)
            lines.append(f"{where} {what}, ms | {times} |")
        for what in row["peak_mib"]["zipper"]:
            peaks = " | ".join(f"{row['peak_mib'][m][what] / 1024:.2f}" for m in models)
            lines.append(f"{where} {what}: peak of memory, GiB | {peaks} |")
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


def planned() -> str:
    """A projection to many processes (`benchmarks/plan.py`)."""
    lines = [
        "| GPUs | | memory of each, GB | sent, GB | step, s | busy, % | documents/s | 20 000 steps' documents, h |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in read("plan.json")["plan"]["processes"]:
        if row["processes"] == 1 and row["kind"] == "fsdp":
            continue
        kind = {"ddp": "DDP", "fsdp": "FSDP2"}[row["kind"]] if row["processes"] > 1 else ""
        lines.append(
            f"| {row['processes']} | {kind} | {row['memory'] / 1e9:.0f} | {row['sent'] / 1e9:.1f} "
            f"| {row['step_seconds'][1]:.2f} | {100 * row['efficiency']:.0f} | {row['documents_per_second']:,.0f} "
            f"| {row['hours']:.3g} |"
        )
    return "\n".join(lines)


def planned_and_measured() -> str:
    """Steps that were measured on a GPU, and what the plan says of them."""
    columns = ("documents, units each", "TFLOP", "operations", "measured, ms", "of the peak, %")
    columns = (*columns, "microseconds an operation", "said, ms")
    rows = [
        (
            f"{row['batch']}, {row['units']}",
            f"{row['flops'] / 1e12:.1f}",
            f"{row['calls']:.0f}",
            f"{1e3 * row['seconds']['measured']:.0f}",
            f"{100 * row['share_of_peak']:.1f}",
            f"{row['microseconds_a_call']:.0f}",
            f"{1e3 * row['seconds']['said']:.0f}",
        )
        for row in read("plan.json")["measured"]
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "demo-llm": demo_llm,
    "digits-in-full": digits_in_full,
    "experiments": experiments,
    "without-theo": without_theo,
    "sounds": sounds,
    "combination": combination,
    "three-towers": three_towers,
    "notes-and-captions": notes_and_captions,
    "pictures-and-names": pictures_and_names,
    "plan": planned,
    "plan-measured": planned_and_measured,
    "read-sentences": read_sentences,
    "reliability": reliability,
    "security": security,
    "claims": claims,
    "comparison": comparison,
    "few-pairs": few_pairs,
    "in-short": in_short,
    "longer": longer,
    "aims": aims,
    "cost": cost,
    "processes": processes,
    "steps-to-click": steps_to_click,
    "steps-to-click-spelled": partial(steps_to_click, "steps-to-click-spelled"),
    "stream-scale": stream_scale,
    "decode-small": partial(decoders, "decode-small.json"),
    "decode-135m": partial(decoders, "decode-135m.json"),
    "cost-gpu": partial(cost_on_gpu, "cost-gpu.json"),
    "cost-large-gpu": partial(cost_on_gpu, "cost-large-gpu.json"),
    "time-to": time_to,
    "what-is-read": what_is_read,
    "with-all-pairs": with_all_pairs,
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
    os.chdir(ROOT)  # experiment files are named as in the command that runs them
    if not arguments.check:
        _refresh_plans()
    stale = []
    with TemporaryDirectory() as there:
        for name in EXPERIMENTS:
            page = write_page(name, Path(there) if arguments.check else ROOT)
            if page.read_bytes() != (ROOT / "results" / page.name).read_bytes():
                stale.append(f"results/{page.name}")
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        if (new := filled(page)) != page:
            stale.append(name)
            if not arguments.check:
                (ROOT / name).write_text(new, encoding="utf-8")
    if not arguments.check:
        draw_comparison(ROOT / "docs" / "comparison.png")
    print("differ from the records:" if arguments.check else "rewritten:", ", ".join(stale) or "none")
    if arguments.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
