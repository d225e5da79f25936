"""Draw the learning curves of a `zipper fuse` run: losses, scores on the validation split, gates.

python tools/learning_curves.py MODEL/run.json docs/spoken-digits.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def series(history: list[Mapping[str, Any]], prefix: str) -> dict[str, tuple[list[int], list[float]]]:
    """Step and value of everything logged under a prefix, by the rest of its name."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith(prefix):
                steps, values = found.setdefault(key.removeprefix(prefix), ([], []))
                steps.append(entry["step"])
                values.append(float(value))
    return found


def draw(axes: Axes, title: str, curves: Mapping[str, tuple[list[int], list[float]]], marker: str = "") -> None:
    """One panel."""
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, marker=marker, label=name, linewidth=1.4)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main() -> None:
    """Read a run record, write a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    history = json.loads(arguments.run.read_text(encoding="utf-8"))["history"]
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    draw(panels[0], "training loss (nats per token)", series(history, "loss_"))
    draw(panels[1], "validation WER (%)", series(history, "eval_wer/"), marker="o")
    draw(panels[2], "tanh of the gates", series(history, "gate/"))
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
