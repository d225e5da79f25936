"""Zipper against the single decoder on human digits, from the records in results/: tables, picture, claims."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from scipy.stats import wilcoxon

from zipper_lm.evaluation.word_error_rate import word_error_rate
from zipper_lm.experiments.comparison import Comparison, compare
from zipper_lm.experiments.records import Cell, read_results
from zipper_lm.experiments.report import spread
from zipper_lm.utils.files import new_file

ROOT = Path(__file__).parent.parent
SINGLE = "single-decoder-as-large-seen-unaligned"


def pairs_of(point: str) -> int:
    """Of the 3000, by the name of a share."""
    return round(30 * float(point.removesuffix("-percent")))


FEW = "10-percent"
SHARES = ("1-percent", FEW, "100-percent")
"""At which more than the plain one was tried."""

STEPS = 2000
"""Of what is compared as one curve; what had more is told apart."""
LONGER = {
    "4000 steps, what was best with 2000": (
        "data-curve-long",
        "zipper-joined-guided-twice-the-steps",
        "single-decoder-twice-the-steps",
    ),
    "8000 steps, tuned alike": ("converged", "zipper", SINGLE),
}
"""With all the pairs: how long, and the experiment and its two arms."""
LONGER_FEW = {
    "4000 steps, joined rows, no pseudo-labels": (
        "data-curve-long",
        "zipper-joined-guided-twice-the-steps",
        "single-decoder-joined-twice-the-steps",
    )
}
"""The same with 300."""

TASKS = {"asr": "speech to text", "tts": "text to speech"}


KINDS = {"zipper": "Zipper", SINGLE: "single decoder"}

TRIED = (
    *("data-curve-long", "more-steps", "augmentation", "pseudo-labels"),
    *("few-pairs", "window-digits", "early-stopped-tower", "equal-exposure"),
    *("positions", "strong-tower", "data-curve-cpu", "more-seeds"),
)


@cache
def cells_of(name: str) -> Mapping[tuple[str, str], Cell]:
    """The records of an experiment by (share, arm): a page of claims asks for the same ones forty times."""
    return read_results(ROOT / "results" / name).cells


def _error(cell: Cell) -> float:
    """On the validation split, mean over seeds."""
    return sum(record["validation_score"] for record in cell) / len(cell)


def _tried(kind: str, share: str) -> list[Cell]:
    """All that was tried with so many pairs in no more than 2000 steps. Where an experiment has some of another's runs,
    the one with all of them counts."""
    start = kind.partition("-")[0]
    tried = [
        cell
        for name in TRIED
        for (point, arm), cell in cells_of(name).items()
        if point == share and arm.startswith(start) and cell[0]["recipe"]["training"]["steps"] <= STEPS
    ]
    runs = [{record["run_hash"] for record in cell} for cell in tried]
    whole = {frozenset(hashes): cell for cell, hashes in zip(tried, runs) if not any(hashes < o for o in runs)}
    return list(whole.values())


def _most_of(kind: str, share: str) -> Cell:
    """Of all that was tried with so many pairs, the lowest validation error; empty if only the plain one was."""
    tried = _tried(kind, share)
    return min(tried, key=_error) if len(tried) > 1 else []


def _curve() -> dict[tuple[str, str], list[Cell]]:
    """By (share, kind), from the smallest share that both were run with: as it is with 2000 steps, and made the most
    of."""
    cells = cells_of("data-curve-long")
    shares = [p for p in sorted({p for p, _ in cells}, key=pairs_of) if all((p, kind) in cells for kind in KINDS)]
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
            lines.append(f"| {name}{heard} | {pairs_of(share)} | {rates} |")
    counts = {share: [len(_tried(kind, share)) for kind in KINDS] for share in dict.fromkeys(p for p, _ in curve)}
    told = [f"{ours} and {theirs} with {pairs_of(p)}" for p, (ours, theirs) in counts.items() if ours + theirs > 2]
    return "\n".join([*lines, "", f"Ways tried, of Zipper and of the single decoder: {'; '.join(told)} pairs."])


def _long_runs() -> dict[tuple[str, str], Cell]:
    """By (share, arm), with every seed that there is."""
    return {
        **cells_of("data-curve-long"),
        **cells_of("more-seeds"),
    }


def with_all_pairs() -> str:
    """With all the pairs and 2000 steps: Zipper and each baseline, what is trained of it, what it forgets, and its
    difference from Zipper as it comes."""
    cells = _long_runs()
    arms = {
        "zipper": "Zipper, its speech tower trained along",
        "zipper-all-frozen": "Zipper, both towers frozen",
        "zipper-joined-guided": "Zipper, made the most of",
        SINGLE: "single decoder, as large as Zipper",
        "single-decoder-joined": "... joined rows, and a fifth left out",
        "single-decoder-seen-unaligned": "... as small as Zipper's text tower",
        "single-decoder-as-large-lora-seen-unaligned": "... as large, LoRA",
        "single-decoder-as-large-lora": "... as large, LoRA, without the unaligned sound",
    }
    beside = [f"{task}, beside the first row" for task in TASKS.values()]
    heads = ["test WER, %", "million parameters: all, trained", *TASKS.values(), *beside, "text's perplexity", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    first = cells[SHARES[-1], "zipper"]
    for arm, told in arms.items():
        cell = cells[SHARES[-1], arm]
        counts = ", ".join(f"{cell[0]['parameters'][which] / 1e6:.1f}" for which in ("all", "trained"))
        rates = [spread([r["scores"][task]["wer"] for r in cell]) for task in TASKS]
        found = [compare(cell, first, task) if cell is not first else None for task in TASKS]
        points = [f"{c.difference:+.1f} ({c.low:+.1f} to {c.high:+.1f})" if c else "" for c in found]
        lines.append(f"| {' | '.join([told, counts, *rates, *points, _forgot(cell), str(len(cell))])} |")
    return "\n".join(lines)


def _forgot(cell: Cell) -> str:
    """How many times as high the perplexity of the text is after fusion."""
    if all(record["frozen_unchanged"].get("text") for record in cell):
        return "bit-identical"
    grown = [r["perplexity_after"]["text"] / r["perplexity_before"]["text"] for r in cell]
    return f"{spread(grown)} times"


def what_is_read() -> str:
    """With the fewest pairs: errors of what was written, and of the same when it is held against other rows' references
    of the same length, as if nothing but the length had been read. Who writes less makes fewer errors, read or not."""
    curve = _curve()
    heads = ["test WER, %", "pairs", "", "as written", "against other texts as long", "words written, of those said"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task, name in TASKS.items():
        for share in list(dict.fromkeys(share for share, _ in curve))[:3]:
            for kind, model in KINDS.items():
                scores = [record["scores"][task] for record in curve[share, kind][0]]
                others = [_against_others(score["references"], score["hypotheses"]) for score in scores]
                words = [_words(score["hypotheses"]) / _words(score["references"]) for score in scores]
                rates = f"{spread([score['wer'] for score in scores])} | {spread(others)}"
                lines.append(f"| {name} | {pairs_of(share)} | {model} | {rates} | {sum(words) / len(words):.2f} |")
    return "\n".join(lines)


def _words(texts: list[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _against_others(references: list[str], hypotheses: list[str]) -> float:
    """Against the references of the next five rows whose own has as many words: how much is said is no reading."""
    alike: dict[int, list[int]] = {}
    for row, reference in enumerate(references):
        alike.setdefault(len(reference.split()), []).append(row)
    rates = []
    for shift in range(1, 6):
        moved = list(references)
        for rows in alike.values():
            for place, row in enumerate(rows):
                moved[row] = references[rows[(place + shift) % len(rows)]]
        rates.append(word_error_rate(moved, hypotheses).wer)
    return sum(rates) / len(rates)


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
                    [pairs_of(share) for share in run],
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
        axes.set_xticks([pairs_of(share) for share in shares], [str(pairs_of(share)) for share in shares])
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
    curve = _long_runs()
    noise, labels = map(cells_of, ("augmentation", "pseudo-labels"))
    rows = [
        ("Zipper", curve, FEW, "zipper"),
        ("a fifth of the sound that is read left out", noise, FEW, "zipper-corrupt"),
        ("that, and half of the rows to read joined", noise, FEW, "zipper-joined-to-read"),
        ("that, and pseudo-labels", labels, FEW, "zipper-joined-pseudo-labels"),
        ("that, and guided attention to speak", labels, FEW, "zipper-joined-guided-pseudo-labels"),
        ("a fifth left out, and guided attention in both tasks", noise, FEW, "zipper-corrupt-guided"),
        ("a fifth left out, and guided attention to speak", noise, FEW, "zipper-corrupt-guided-to-speak"),
        (
            "that, half of the rows to read joined, and twice the steps",
            curve,
            FEW,
            "zipper-joined-guided-twice-the-steps",
        ),
        ("half of all rows joined, and a fifth left out", noise, FEW, "zipper-joined-and-corrupt"),
        ("pseudo-labels", labels, FEW, "zipper-pseudo-labels"),
        ("pseudo-labels: the surest, twice", labels, FEW, "zipper-surest-twice"),
        ("pseudo-labels, and a fifth left out", labels, FEW, "zipper-corrupt-pseudo-labels"),
        ("single decoder", curve, FEW, SINGLE),
        ("single decoder, a fifth left out", noise, FEW, "single-decoder-corrupt"),
        ("single decoder, that and pseudo-labels", labels, FEW, "single-decoder-corrupt-pseudo-labels"),
        ("single decoder, that and joined rows", labels, FEW, "single-decoder-joined-pseudo-labels"),
        ("... joined rows and no pseudo-labels, twice the steps", curve, FEW, "single-decoder-joined-twice-the-steps"),
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
        ("... all of that, twice the steps", curve, "100-percent", "zipper-joined-guided-twice-the-steps"),
        ("single decoder with all 3000 pairs", curve, "100-percent", SINGLE),
        ("... without history dropout", curve, "100-percent", "single-decoder-plain-history"),
        ("... twice the steps", curve, "100-percent", "single-decoder-twice-the-steps"),
        ("... a fifth left out, and half of the rows to read joined", curve, "100-percent", "single-decoder-joined"),
        ("... as small as Zipper's text tower", curve, "100-percent", "single-decoder-seen-unaligned"),
        ("... LoRA", curve, "100-percent", "single-decoder-as-large-lora-seen-unaligned"),
        ("... LoRA, without the unaligned sound", curve, "100-percent", "single-decoder-as-large-lora"),
    ]
    lines = ["| test WER, % | speech to text | text to speech | seeds |", "|---|---|---|---|"]
    for name, cells, point, arm in rows:
        if cell := cells.get((point, arm)):
            rates = " | ".join(spread([r["scores"][task]["wer"] for r in cell]) for task in TASKS)
            lines.append(f"| {name} | {rates} | {len(cell)} |")
    return "\n".join(lines)


def longer() -> str:
    """With all the pairs, what more steps give both."""
    most = [_curve()[SHARES[-1], kind][True] for kind in KINDS]
    return _both({f"{STEPS} steps, each made the most of": most} | _longer(LONGER, SHARES[-1]))


def in_short() -> str:
    """Each made the most of, by the number of pairs, and with all of them what more steps give both."""
    curve = _curve()
    told = f"pairs, {STEPS} steps, each made the most of"
    rows = {}
    for share in SHARES:
        rows[f"{pairs_of(share)} {told}"] = [curve[share, kind][True] for kind in KINDS]
        arms = {FEW: LONGER_FEW, SHARES[-1]: LONGER}.get(share, {})
        rows |= {f"{pairs_of(share)} pairs, {how}": cells for how, cells in _longer(arms, share).items()}
    return _both(rows)


def _both(rows: dict[str, list[Cell]]) -> str:
    heads = [f"{name}: {task}" for name in KINDS.values() for task in TASKS.values()]
    lines = [f"| test WER, % | {' | '.join(heads)} | seeds of each |", "|---|" + "---|" * (len(heads) + 1)]
    for told, cells in rows.items():
        rates = [spread([r["scores"][t]["wer"] for r in cell]) if cell else "not run" for cell in cells for t in TASKS]
        lines.append(f"| {told} | {' | '.join(rates)} | {', '.join(str(len(cell)) for cell in cells)} |")
    return "\n".join(lines)


def _longer(longer: dict[str, tuple[str, str, str]], share: str) -> dict[str, list[Cell]]:
    """Zipper's runs and the single decoder's, by how long."""
    return {told: [cells_of(name).get((share, arm), []) for arm in arms] for told, (name, *arms) in longer.items()}


def _points(found: Comparison) -> str:
    seeds = f"{found.seeds} seed{'s' * (found.seeds != 1)}"
    return f"{found.difference:+.1f} points ({found.low:+.1f} to {found.high:+.1f}), {seeds}"


def _rates(found: Comparison) -> str:
    return f"{found.ours:.1f} against {found.theirs:.1f} % WER"


def _over_all_shares(curve: dict[tuple[str, str], list[Cell]], task: str) -> tuple[str, str, bool]:
    """A row of the claims: both as they come, run against run of the same share and seed, over all shares together."""
    differences = []
    for share in dict.fromkeys(share for share, _ in curve):
        ours, theirs = (
            {r["run"]["seed"]: r["scores"][task]["wer"] for r in curve[share, kind][False]} for kind in KINDS
        )
        differences += [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    chance = float(wilcoxon(differences).pvalue)
    mean = sum(differences) / len(differences)
    told = f"p = {chance:.1g}" if chance >= 0.001 else "p < 0.001"
    return (
        f"{TASKS[task]}: fewer errors over all shares together",
        f"{mean:+.1f} points on average of {len(differences)} pairs of runs of one share and seed; Wilcoxon's signed "
        f"ranks: {told}",
        mean < 0 and chance < 0.05,
    )


def _at_every_share(each: dict[tuple[str, str], Comparison], how: str) -> tuple[str, str, bool]:
    """A row of the claims: the task and share at which Zipper is worst beside the single decoder."""
    (task, share), worst = max(each.items(), key=lambda item: item[1].difference)
    return (
        f"at least as good, on average, at each of {len({p for _, p in each})} shares{how}",
        f"worst: {TASKS[task]} with {pairs_of(share)} pairs, {_rates(worst)}: {_points(worst)}; of both tasks and "
        f"all shares, better beyond chance at {sum(found.high < 0 for found in each.values())} of {len(each)}, "
        f"worse at {sum(found.low > 0 for found in each.values())}",
        worst.difference <= 0,
    )


def claims() -> str:
    """The paper's claims, and what came of them on human digits, plain and made the most of; one seed shows none."""
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
        f"{pairs_of(share)} pairs{how}": against("asr", share, most)
        for share in ("1-percent", FEW)
        for how, most in hows.items()
    }
    less = {
        (f"{pairs_of(share)} pairs{how}", task): against(task, share, most, all_pairs)
        for share, how, task in [(FEW, how, task) for how in hows for task in TASKS]
        + [("1-percent", list(hows)[1], "tts")]
        for most in [hows[how]]
    }
    for how, cells in _longer(LONGER_FEW, FEW).items():
        if (found := compare(*cells, "asr")) is not None:
            few[f"{pairs_of(FEW)} pairs, {how}"] = found
    more = _longer(LONGER, all_pairs)
    each = {(task, share): against(task, share, False) for task in TASKS for share in shares}
    zippers = {record["run_hash"]: record for share in shares for cell in curve[share, "zipper"] for record in cell}
    frozen = [same for record in zippers.values() for same in record["frozen_unchanged"].values()]
    forgot = _forgot(_long_runs()[all_pairs, SINGLE])
    rows: list[tuple[str, str, bool]] = [
        (
            f"text to speech with all pairs, {how}: at least 40 % fewer errors than the single decoder",
            f"{_rates(found)}, {found.relative:+.0f} %: {_points(found)}",
            found.relative <= -40 and found.high < 0 and found.seeds > 1,
        )
        for how, found in [
            (f"{STEPS} steps, each made the most of", tts),
            *((how, compare(ours, theirs, "tts")) for how, (ours, theirs) in more.items()),
        ]
        if found is not None
    ]
    rows += [
        (
            f"speech to text with {pairs}: at most a quarter of its errors",
            f"{_rates(found)}, {found.ours / found.theirs:.2f} of them: {_points(found)}",
            found.ours / found.theirs <= 0.25 and found.seeds > 1,
        )
        for pairs, found in few.items()
    ]
    rows += [
        (
            f"{TASKS[task]} with {pairs}: no worse than the single decoder with 3000",
            f"{_rates(found)}: {_points(found)}",
            found.high <= 0 and found.seeds > 1,
        )
        for (pairs, task), found in less.items()
    ]
    rows += [
        (
            f"{TASKS[task]} with 300 pairs, made the most of: no worse than the single decoder with 3000; {how}",
            f"{_rates(found)}: {_points(found)}",
            found.high <= 0 and found.seeds > 1,
        )
        for how, (_, theirs) in more.items()
        for task in TASKS
        for found in [compare(curve[FEW, "zipper"][True], theirs, task)]
        if found is not None
    ]
    rows += [_over_all_shares(curve, task) for task in TASKS]
    rows += [_at_every_share(each, "")]
    most = [share for share in shares if all(curve[share, kind][True] for kind in KINDS)]
    rows += [
        _at_every_share({(t, p): against(t, p, True) for t in TASKS for p in most}, ", each made the most of"),
        (
            "nothing is forgotten where a tower is frozen",
            f"bit-identical in {sum(frozen)} of {len(frozen)} runs; the single decoder's perplexity of text is "
            f"{forgot} as high as before",
            all(frozen),
        ),
    ]
    lines = ["| claim | measured | |", "|---|---|---|"]
    return "\n".join(lines + [f"| {c} | {found} | {'shown' if held else '**not shown**'} |" for c, found, held in rows])
