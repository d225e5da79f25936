"""The report's pictures, as inline SVG that takes its ink from the page, so that they suit light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

_INK = "#010203"  # stands for the page's text colour; no other colour may be this one
_COLOURS = ("#2f7ed8", "#e0782c", "#2ca35c", "#b052c9", "#c9a227", "#17a2b8", "#d6456f", "#7a7f87")
_MAP = LinearSegmentedColormap.from_list("ink", [(0.18, 0.49, 0.85, 0.0), (0.18, 0.49, 0.85, 1.0)])
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zipper",  # the same picture has the same bytes
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), _INK),
}

Curve = Sequence[tuple[float, float]]


def curves(series: Mapping[str, Curve], y_label: str, *, log: bool = False) -> str:
    """Lines over training steps.

    Args:
        series: by name, points ``(step, value)``.
        y_label: of the vertical axis. log: whether it is logarithmic.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.4, 3.1)
        for number, (name, points) in enumerate(series.items()):
            marker = "o" if len(points) < 12 else None
            axes.plot(*zip(*points), label=name, color=_COLOURS[number % len(_COLOURS)], marker=marker, linewidth=1.8)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.15, color=_INK)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=2 if len(series) > 4 else 1)
        return _svg(figure)


def attention(weights: np.ndarray, tokens: Sequence[str], rate: float, *, reads_sound: bool) -> str:
    """A zip's attention map with text on the vertical axis and sound on the horizontal one.

    Args:
        weights: ``[queries, memory]``. tokens: the text's tokens, BOS and EOS included.
        rate: speech tokens a second. reads_sound: whether text tokens are the queries.
    """
    shown = weights if reads_sound else weights.T
    shown = shown / np.maximum(shown.max(axis=1 if reads_sound else 0, keepdims=True), 1e-9)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.4, 0.9 + 0.24 * len(shown))
        seconds = shown.shape[1] / rate
        axes.imshow(
            shown, aspect="auto", cmap=_MAP, interpolation="nearest", extent=(0.0, seconds, len(shown) - 0.5, -0.5)
        )
        axes.set_yticks(range(len(shown)), [t.strip() or "·" for t in tokens[: len(shown)]])
        axes.set_xlabel("seconds of sound")
        return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """SVG element without XML prologue, ids made unique to it by its own content."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # several pictures on one page: ids would be there twice
    for size in ("width", "height"):  # the page sets them; viewBox keeps the proportion
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    return svg
