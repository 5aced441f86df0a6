"""Charts of how a number is distributed over a cohort, a row for each site. Plain values in, inline SVG out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from . import style

Values = NDArray[np.float64]
TINTS = ("#0a7cc4", "#e08a00", "#009e73", "#cc79a7", "#7a5fc0", "#b07a45")
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), "-", (0, (4, 1.5)))
BINS = 48
MOST_ROWS = 12


@dataclass(frozen=True)
class Rows:
    """Values by row (a site) and series (a contrast, an axis): row -> series -> values; `counts` of each row."""

    values: Mapping[str, Mapping[str, Values]]
    counts: Mapping[str, int]


def ridges(
    rows: Rows, label: str, title: str, weights: Mapping[str, Mapping[str, Values]] | None = None
) -> str:
    """A small histogram for each row on one axis, a colour and a dash for each series; heights are of its own row.

    With `weights`, `values` are bin edges [k + 1] and the weights their heights [k]: a histogram made elsewhere.
    """
    series = list(dict.fromkeys(name for row in rows.values.values() for name in row))
    low, high = _range(rows.values)
    most = max((len(v) for row in rows.values.values() for v in row.values()), default=1)
    edges = np.linspace(low, high, (BINS if weights or most > 100 else BINS // 2) + 1)
    with style.drawing():
        made, (axes,) = style.figure(0.85 + 0.46 * len(rows.values) + (0.22 if len(series) > 1 else 0))
        for place, (name, row) in enumerate(rows.values.items()):
            heights = {
                s: _rebinned(v, weights[name][s], edges)
                if weights
                else np.histogram(v, edges)[0].astype(float)
                for s, v in row.items()
            }
            _ridge(axes, place, heights, edges, series)
            axes.text(
                1.01,
                place + 0.02,
                f"n {rows.counts[name]:,}",
                transform=axes.get_yaxis_transform(),
                fontsize=8,
            )
        axes.set(xlim=(low, high), ylim=(len(rows.values) - 0.7, -1.0), xlabel=label)
        axes.set_yticks(range(len(rows.values)), [_cut(name) for name in rows.values])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=6)
        if len(series) > 1:
            for number, name in enumerate(series):
                axes.plot([], [], color=TINTS[number % 6], ls=DASHES[number % 6], lw=2, label=name)
            made.legend(loc="outside upper left", ncols=4, handlelength=1.8, columnspacing=1.4)
        return style.to_svg(made, title)


def _ridge(
    axes: Axes, place: int, heights: Mapping[str, Values], edges: Values, series: Sequence[str]
) -> None:
    top = max((float(h.max()) for h in heights.values()), default=0.0)
    axes.axhline(place, color=style.FAINT, lw=0.8, zorder=1)
    for name, height in heights.items():
        if not top > 0 or not height.any():
            continue
        number = series.index(name) % 6
        line = place - 0.82 * height / top
        outline = np.where(height > 0, line, np.nan)
        tint, dash = TINTS[number], DASHES[number]
        axes.stairs(line, edges, baseline=place, fill=True, color=tint, alpha=0.22, lw=0, zorder=3)
        axes.stairs(outline, edges, baseline=place, color=tint, lw=1.3, ls=dash, zorder=3)


def _range(values: Mapping[str, Mapping[str, Values]]) -> tuple[float, float]:
    every = np.concatenate([v for row in values.values() for v in row.values()] or [np.zeros(1)])
    every = every[np.isfinite(every)]
    low, high = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
    pad = 0.04 * (high - low) or 0.1 * max(abs(low), 1e-3)
    return low - pad, high + pad


def _rebinned(old: Values, heights: Values, edges: Values) -> Values:
    """A histogram on other bins: mass is spread evenly inside each old bin."""
    total = np.concatenate([[0.0], np.cumsum(heights)])
    return np.diff(np.interp(edges, old, total))


def _cut(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}\u2026"
