"""A picture of a model: its towers side by side, and an arrow for every zip layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from zipper_lm.fusion.zip_spec import EMBEDDINGS

COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700")
"""One for each tower, in turn; a zip has its reader's."""
BELOW = -0.3
"""Where embeddings are read: beneath the first layer."""


def draw(
    file: Path, towers: Mapping[str, tuple[str, int]], zips: Mapping[tuple[str, str], Sequence[tuple[int, int]]]
) -> None:
    """Draw towers and zips as PNG: layers from the bottom up, those with a zip in their tower's colour. The same model
    gives the same bytes.

    Args:
        file: to write. towers: by name, in words what it is, and its number of layers.
        zips: by (reader, source), the pairs (reader's layer, source's layer).
    """
    # Figure without pyplot: no window system, no state that other figures would share.
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, Rectangle

    gap, width, height = 4.0, 2.0, 10.0
    names = list(towers)
    left = {name: k * gap for k, name in enumerate(names)}
    colour = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}
    figure = Figure(figsize=(0.4 + 2.0 * len(names), 5.0), dpi=120)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(-1.0, left[names[-1]] + width + 1.0)
    axes.set_ylim(-1.0, height + 1.8)
    for name, (words, depth) in towers.items():
        reads = {layer for (reader, _), pairs in zips.items() if reader == name for layer, _ in pairs}
        read = {layer for (_, source), pairs in zips.items() if source == name for _, layer in pairs}
        middle, step = left[name] + width / 2, height / depth
        for layer in range(depth):
            face = colour[name] if layer in reads else "#818b98"
            box = Rectangle((left[name], layer * step), width, step * 0.86, facecolor=face, alpha=0.3, zorder=2)
            axes.add_patch(box)
            if layer in reads | read:
                at = (layer + 0.43) * step
                axes.text(middle, at, str(layer), ha="center", va="center", fontsize=min(9.0, 20 * step), zorder=4)
        axes.text(middle, height + 1.0, name, ha="center", weight="bold", color=colour[name])
        axes.text(middle, height + 0.4, words, ha="center", fontsize=6.5, color="#59636e")
        axes.text(middle, -0.8, f"{depth} layers", ha="center", fontsize=6.5, color="#59636e")
    for (reader, source), pairs in zips.items():
        to_right = left[source] < left[reader]
        start = left[source] + (width if to_right else 0.0)
        end = left[reader] + (0.0 if to_right else width)
        nudge = 0.12 if to_right else -0.12  # where two towers read each other at the same layers, both arrows show
        neighbours = abs(left[source] - left[reader]) == gap
        for layer, source_layer in pairs:
            heights = [(m + 0.43) * height / towers[n][1] + nudge for m, n in ((source_layer, source), (layer, reader))]
            if source_layer == EMBEDDINGS:
                heights[0] = BELOW + nudge
            arrow = FancyArrowPatch(
                (start, heights[0]),
                (end, heights[1]),
                arrowstyle="-|>",
                mutation_scale=9,
                color=colour[reader],
                connectionstyle=f"arc3,rad={0.0 if neighbours else 0.12}",
                shrinkA=1,
                shrinkB=1,
                zorder=1 if neighbours else 3,
            )
            axes.add_patch(arrow)
    figure.savefig(file, format="png", metadata={"Software": None})
