"""Quantities of a run over its steps: lines, what bounds them, where an alarm held, where it was resumed.

Long runs are drawn bin by bin, the median with the least and greatest around it, so that no spike is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from . import style
from .page import Table

BINS = 200  # of a line and of the table behind it
ALARM = "#d1495b"
MARKERS = ("o", "s", "^")
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.4)))  # so that colour is never the only difference

Series = Mapping[int, float]  # step -> value


@dataclass(frozen=True)
class Bound:
    """A level that a quantity can't pass, or should not pass (`alarm`)."""

    value: float
    label: str = ""
    alarm: bool = False


@dataclass(frozen=True)
class Panel:
    """One quantity, or a few of one kind, on one axis."""

    title: str
    lines: Mapping[str, Series]
    bounds: tuple[Bound, ...] = ()
    alarms: tuple[tuple[int, int], ...] = ()  # steps between which one held
    plan: Series | None = None  # what the settings say, also of steps to come
    log: bool = False
    looks: bool = False  # few values: mark each, and draw the level of the first, at step 0, on


@dataclass(frozen=True)
class Binned:
    """Steps from `first` to `last` of each bin, and the middle, least and greatest value in it."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    middle: NDArray[np.float64]
    least: NDArray[np.float64]
    greatest: NDArray[np.float64]


def binned(series: Series, most: int = BINS) -> Binned:
    """A series in at most `most` bins of equally many entries; each its own bin where there are no more."""
    steps, values = np.array([*series.keys()], np.int64), np.array([*series.values()], float)
    parts = np.array_split(np.arange(len(steps)), min(most, len(steps)))
    rows = [
        (steps[p[0]], steps[p[-1]], np.median(values[p]), values[p].min(), values[p].max()) for p in parts
    ]
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Binned(*columns) if columns else Binned(*([np.empty(0)] * 5))  # type: ignore[arg-type]


def draw(
    panels: Sequence[Panel], steps: int, resumes: Sequence[int], title: str, tints: Sequence[str]
) -> str:
    """The panels over steps 0 to `steps`, two to a row; `resumes` are marked on every axis."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with style.drawing():
        made, axes = style.figure(0.35 + (1.5 if columns == 2 else 2.1) * rows, columns, rows)
        for spare in axes[len(panels) :]:
            spare.remove()
        for place, (panel, on) in enumerate(zip(panels, axes, strict=False)):
            for number, (name, series) in enumerate(panel.lines.items()):
                _line(on, name, series, tints[number % len(tints)], number, panel.looks)
            _levels(on, panel)
            for step in resumes:
                on.axvline(step, color=style.INK, lw=0.8, ls=(0, (1, 2)), alpha=0.7)
                on.plot(
                    step, 0, "^", color=style.INK, ms=5, transform=on.get_xaxis_transform(), clip_on=False
                )
            for first, last in panel.alarms:
                on.axvspan(first, max(last, first + steps / 100), color=ALARM, alpha=0.16, lw=0)
            on.set_xlim(-0.01 * steps, 1.01 * steps)
            on.locator_params(axis="x", nbins=4 if columns == 2 else 6, integer=True)
            if not panel.log:
                on.locator_params(axis="y", nbins=4)
            on.set_title(panel.title, fontsize=9)
            if place >= len(panels) - columns:
                on.set_xlabel("step")
        if len(panels[0].lines) > 1:
            handles, labels = axes[0].get_legend_handles_labels()
            made.legend(
                handles, labels, loc="outside upper left", ncols=4, handlelength=2.2, columnspacing=1.4
            )
        return style.to_svg(made, title)


def _line(axes: Axes, name: str, series: Series, tint: str, number: int, looks: bool) -> None:
    found = binned(series)
    x = (found.first + found.last) / 2
    if (found.greatest > found.least).any():
        axes.fill_between(x, found.least, found.greatest, color=tint, alpha=0.18, lw=0)
    form: dict[str, Any] = {"ls": DASHES[number % len(DASHES)]}
    if looks:
        form = {"marker": MARKERS[number % len(MARKERS)], "ms": 4.5, "clip_on": False}
        if 0 in series:
            axes.axhline(series[0], color=tint, lw=1.1, ls=(0, (5, 3)))
    axes.plot(x, found.middle, color=tint, lw=1.5, label=name, **form)


def _levels(axes: Axes, panel: Panel) -> None:
    if panel.plan:
        axes.plot([*panel.plan], [*panel.plan.values()], color=style.INK, lw=0.8, ls=(0, (1, 1.5)), zorder=1)
    if panel.log:
        axes.set_yscale("log", subs=(2, 5))
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:g}")
    for bound in panel.bounds:
        tint, dots = (ALARM, (0, (1, 1.2))) if bound.alarm else (style.INK, (0, (1, 2.5)))
        axes.axhline(bound.value, color=tint, lw=1.1, ls=dots)
        axes.annotate(
            bound.label, (1, bound.value), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="bottom", fontsize=8,
        )  # fmt: skip


def table(lines: Mapping[str, Series], name: str) -> Table:
    """What is drawn, as rows by step; of a bin its first and last step, and the median, least and greatest value."""
    steps = sorted({step for series in lines.values() for step in series})
    if len(steps) <= BINS:
        rows = tuple((step, *(series.get(step) for series in lines.values())) for step in steps)
        return Table(("step", *lines), rows, name)
    columns = ["from step", "to step"]
    columns += [f"{what}{which}" for what in lines for which in ("", ", least", ", greatest")]
    binned_rows: list[tuple[object, ...]] = []
    for part in np.array_split(np.array(steps), BINS):
        row: list[object] = [int(part[0]), int(part[-1])]
        for series in lines.values():
            values = [series[step] for step in part.tolist() if step in series]
            row += [float(np.median(values)), min(values), max(values)] if values else [None] * 3
        binned_rows.append(tuple(row))
    return Table(tuple(columns), tuple(binned_rows), name)
