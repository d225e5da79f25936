"""The curves of an experiment as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zipper_lm.experiments.plan import points_of
from zipper_lm.experiments.records import Results


def draw(results: Results, picture: Path) -> None:
    """One panel a task: WER over points, the mean a line, least to most a band; the codec alone is dashed.

    Args:
        results: the records. picture: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks, points = results.experiment.tasks, points_of(results.experiment)
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(6.5 * len(tasks), 5.2), constrained_layout=True, squeeze=False
    )
    for axes, task in zip(panels[0], tasks):
        for number, arm in enumerate(results.experiment.arms):
            at = [i for i, p in enumerate(points) if results.cells.get((p, arm))]
            rates = [[r["scores"][task]["wer"] for r in results.cells[points[i], arm]] for i in at]
            if not at:
                continue
            (line,) = axes.plot(at, [np.mean(r) for r in rates], marker="o", label=arm, color=f"C{number % 10}")
            axes.fill_between(at, [min(r) for r in rates], [max(r) for r in rates], color=line.get_color(), alpha=0.2)
        floors = [r["scores"][task].get("oracle_wer") for cell in results.cells.values() for r in cell]
        if known := [floor for floor in floors if floor is not None]:
            axes.axhline(float(np.mean(known)), color="black", linestyle="--", linewidth=1, label="codec alone")
        axes.set_xticks(range(len(points)), points, rotation=30, ha="right")
        axes.set_xlim(-0.3, len(points) - 0.7)
        axes.set_xlabel(results.experiment.axis)
        axes.set_ylabel("test WER (%)")
        axes.set_title(task)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # where all points are alike, they are not cut in half
        axes.grid(alpha=0.3)
    lines = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
