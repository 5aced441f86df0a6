"""The report's charts. Each takes plain values and returns inline SVG; none computes a statistic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from . import style

CHANCE = 0.5


@dataclass(frozen=True)
class Mark:
    """A mean with its interval and the values it averages; None and () where there is none."""

    name: str
    mean: float | None
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()
    note: str = ""  # why there is no mean or interval
    init: str = ""  # whose colour it has, where its name says more


@dataclass(frozen=True)
class Curve:
    """One line over label fractions; marks run in parallel with `fractions`."""

    name: str
    fractions: tuple[float, ...]
    marks: tuple[Mark, ...]


def _limits(marks: Sequence[Mark], dots: bool = False, chance: float | None = CHANCE) -> tuple[float, float]:
    """An axis that holds chance, 1 and everything drawn, in tenths; from 0 where there is no chance level."""
    if chance is None:
        return -0.02, 1.02
    values = [v for m in marks for v in (m.mean, m.low, m.high, *(m.dots if dots else ())) if v is not None]
    return min(0.4, np.floor(min(values, default=0.5) * 10 - 0.2) / 10), 1.02


def bars(marks: Sequence[Mark], title: str, *, axis: str = "AUROC", chance: float | None = CHANCE) -> str:
    """A row per initialisation: bar from chance (or 0) to the mean, whisker the interval, a ring for each value."""
    base = chance or 0.0
    with style.drawing():
        made, (axes,) = style.figure(0.75 + 0.46 * len(marks))
        low, high = _limits(marks, dots=True, chance=chance)
        for row, mark in enumerate(marks):
            tint = style.colour(mark.init or mark.name)
            if mark.mean is not None:
                axes.barh(row, mark.mean - base, left=base, height=0.56, color=tint, alpha=0.38, lw=0)
            if mark.low is not None and mark.high is not None:
                axes.plot([mark.low, mark.high], [row, row], color=style.INK, lw=1.4, zorder=4)
                axes.plot([mark.low, mark.high], [row, row], "|", color=style.INK, ms=8, mew=1.4, zorder=4)
            if mark.mean is not None:
                axes.plot(mark.mean, row, "|", color=style.INK, ms=15, mew=2.4, zorder=5)
            shift = (
                np.linspace(-0.15, 0.15, len(mark.dots)) if len(mark.dots) > 1 else np.zeros(len(mark.dots))
            )
            axes.plot(mark.dots, row + shift, "o", ms=4.8, mfc=style.PAPER, mec=tint, mew=1.4, zorder=6)
            axes.text(
                1.02, row, _value(mark), transform=axes.get_yaxis_transform(), va="center", fontsize=8.5
            )
        if chance is not None:
            axes.axvline(chance, color=style.INK, lw=0.9, ls=(0, (3, 3)))
            axes.text(chance, -0.72, "\u00a0chance", ha="left", va="center", fontsize=8, color=style.INK)
        axes.set(xlim=(low, high), ylim=(len(marks) - 0.4, -0.6 if chance is None else -0.95), xlabel=axis)
        axes.set_yticks(range(len(marks)), [mark.name for mark in marks])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        return style.to_svg(made, title)


def _value(mark: Mark) -> str:
    if mark.mean is None:
        return "undefined"
    if mark.low is None or mark.high is None:
        return f"{mark.mean:.2f}"
    return f"{mark.mean:.2f}  ({mark.low:.2f} to {mark.high:.2f})"


def curves(lines: Sequence[Curve], sizes: Mapping[float, str], title: str) -> str:
    """AUROC against label fraction (log scale): marker the mean, band the interval, n under each fraction."""
    with style.drawing():
        made, (axes,) = style.figure(3.3)
        ticks = sorted({fraction for line in lines for fraction in line.fractions})
        for line in lines:
            tint = style.colour(line.name)
            kept = [
                (f, m, m.mean) for f, m in zip(line.fractions, line.marks, strict=True) if m.mean is not None
            ]
            x, means = [f for f, _, _ in kept], [mean for _, _, mean in kept]
            axes.plot(
                x,
                means,
                "-",
                marker=style.marker(line.name),
                color=tint,
                lw=2,
                ms=6,
                label=line.name,
                zorder=4,
            )
            banded = [(f, m.low, m.high) for f, m, _ in kept if m.low is not None]
            if len(banded) > 1:
                f, low, high = zip(*banded, strict=True)
                axes.fill_between(f, low, high, color=tint, alpha=0.16, lw=0, zorder=2)
                for edge in (low, high):
                    axes.plot(f, edge, color=tint, lw=0.7, alpha=0.6, zorder=3)
        axes.axhline(CHANCE, color=style.INK, lw=0.9, ls=(0, (3, 3)))
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{100 * f:g} %\n{sizes.get(f, '')}" for f in ticks])
        if len(ticks) > 1:
            axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
        axes.set_ylim(*_limits([m for line in lines for m in line.marks]))
        axes.set(ylabel="AUROC", xlabel="labelled training subjects")
        axes.grid(axis="x", visible=False)
        made.legend(loc="outside upper left", ncols=min(4, len(lines)), handlelength=1.6, columnspacing=1.4)
        return style.to_svg(made, title)


def pairs(rows: Sequence[tuple[Mark, Mark]], names: tuple[str, str], title: str) -> str:
    """A row per initialisation: filled marker on held-out folds, open marker on the external cohort."""
    with style.drawing():
        made, (axes,) = style.figure(1.05 + 0.5 * len(rows))
        for row, (inside, outside) in enumerate(rows):
            tint = style.colour(inside.name)
            for mark, shift, face in ((inside, -0.14, tint), (outside, 0.14, style.PAPER)):
                if mark.low is not None and mark.high is not None:
                    axes.plot([mark.low, mark.high], [row + shift] * 2, color=tint, lw=2.2, alpha=0.55)
                if mark.mean is not None:
                    axes.plot(mark.mean, row + shift, "o", ms=7.5, mfc=face, mec=tint, mew=1.8, zorder=4)
        grey = style.colour("random")
        for name, face in zip(names, (grey, style.PAPER), strict=True):
            axes.plot([], [], "o", ms=7, mfc=face, mec=grey, mew=1.8, label=name)
        axes.axvline(CHANCE, color=style.INK, lw=0.9, ls=(0, (3, 3)))
        axes.set(xlim=_limits([m for row in rows for m in row]), ylim=(len(rows) - 0.5, -0.5), xlabel="AUROC")
        axes.set_yticks(range(len(rows)), [inside.name for inside, _ in rows])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        made.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.4)
        return style.to_svg(made, title)


def presence(
    patterns: Sequence[tuple[bool, ...]],
    channels: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    title: str,
) -> str:
    """A row per pattern of contrasts: discs for what is there, then a bar of sessions for each cohort."""
    with style.drawing():
        widths = [0.36 * len(channels), *([1.5] * len(counts))]
        made, axes = style.figure(
            0.95 + 0.34 * len(patterns),
            columns=1 + len(counts),
            sharey=True,
            gridspec_kw={"width_ratios": widths},
        )
        discs(axes[0], patterns, channels)
        for panel, (cohort, numbers) in zip(axes[1:], counts.items(), strict=True):
            panel.barh(
                range(len(numbers)), numbers, height=0.6, color=style.colour("scratch"), alpha=0.5, lw=0
            )
            for row, number in enumerate(numbers):
                panel.text(number, row, f"\u00a0{number}", va="center", fontsize=8.5)
            panel.set_title(cohort, fontsize=8.5)
            panel.set_xlim(0, max([*numbers, 1]) * 1.3)
            panel.set_xticks([])
            panel.grid(visible=False)
            panel.spines["bottom"].set_visible(False)
        return style.to_svg(made, title)


def subsets(
    patterns: Sequence[tuple[bool, ...]],
    channels: Sequence[str],
    panels: Mapping[str, Sequence[tuple[int, Sequence[Mark]]]],
    title: str,
) -> str:
    """A row per subset of contrasts: discs for what is seen, then for each test set a mark per init, and n."""
    with style.drawing():
        names = [mark.name for mark in next(iter(panels.values()))[0][1]]
        step = 0.62 / max(len(names), 1)
        made, axes = style.figure(
            0.95 + len(patterns) * (0.2 + 0.13 * len(names)),
            columns=1 + len(panels),
            sharey=True,
            gridspec_kw={"width_ratios": [0.3 * len(channels), *([1.6] * len(panels))]},
        )
        discs(axes[0], patterns, channels)
        marks = [mark for rows in panels.values() for _, row in rows for mark in row]
        low, high = _limits(marks)
        for panel, (test, rows) in zip(axes[1:], panels.items(), strict=True):
            for row, (count, found) in enumerate(rows):
                for place, mark in enumerate(found):
                    y, tint = row + (place - (len(found) - 1) / 2) * step, style.colour(mark.name)
                    if mark.low is not None and mark.high is not None:
                        panel.plot([mark.low, mark.high], [y, y], color=tint, lw=1.8, alpha=0.55)
                    if mark.mean is not None:
                        panel.plot(mark.mean, y, style.marker(mark.name), color=tint, ms=5.5, zorder=4)
                panel.text(high, row, f"\u00a0{count}", va="center", fontsize=8)
            panel.text(high, -0.62, "\u00a0n", va="bottom", fontsize=8)
            panel.axhline(0.5, color=style.FAINT, lw=0.9)
            panel.axvline(CHANCE, color=style.INK, lw=0.9, ls=(0, (3, 3)))
            panel.set(xlim=(low, high), xlabel="AUROC")
            panel.set_title(test, fontsize=8.5)
            panel.grid(axis="y", visible=False)
            panel.spines["left"].set_visible(False)
        for name in names:
            axes[1].plot([], [], style.marker(name), color=style.colour(name), ms=5.5, label=name)
        made.legend(loc="outside upper left", ncols=min(4, len(names)), handletextpad=0.2, columnspacing=1.4)
        return style.to_svg(made, title)


def discs(axes: Axes, patterns: Sequence[tuple[bool, ...]], names: Sequence[str]) -> None:
    """A row of discs for each pattern, full where something is there; names above."""
    tint = style.colour("scratch")
    for row, pattern in enumerate(patterns):
        for column, there in enumerate(pattern):
            face, edge = (tint, tint) if there else ("none", style.FAINT)
            axes.plot(column, row, "o", ms=10, mfc=face, mec=edge, mew=1.4)
    axes.set_xticks(range(len(names)), list(names), rotation=45, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(len(patterns) - 0.45, -0.55))
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def histories(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    tints: Mapping[str, str],
    title: str,
) -> str:
    """Small multiples over optimiser steps: panel name -> run name -> (steps, values)."""
    with style.drawing():
        rows = (len(panels) + 1) // 2
        made, axes = style.figure(0.35 + 1.45 * rows, columns=min(2, len(panels)), rows=rows, sharex=True)
        for spare in axes[len(panels) :]:
            spare.remove()
        for place, (name, lines) in enumerate(panels.items()):
            for run, (steps, values) in lines.items():
                axes[place].plot(steps, values, color=tints[run], lw=1.5, label=run)
            axes[place].set_title(name, fontsize=9)
            axes[place].locator_params(axis="both", nbins=4)
            if place >= len(panels) - 2:
                axes[place].tick_params(labelbottom=True)
                axes[place].set_xlabel("step")
        handles, labels = axes[0].get_legend_handles_labels()
        made.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=1.4)
        return style.to_svg(made, title)


def durations(seconds: Mapping[str, float], title: str) -> str:
    """A bar per stage, labelled in minutes and seconds."""
    with style.drawing():
        made, (axes,) = style.figure(0.35 + 0.34 * len(seconds))
        axes.barh(
            range(len(seconds)),
            list(seconds.values()),
            height=0.6,
            color=style.colour("scratch"),
            alpha=0.5,
            lw=0,
        )
        for row, value in enumerate(seconds.values()):
            axes.text(value, row, "\u00a0" + clock(value), va="center", fontsize=8.5)
        axes.set_yticks(range(len(seconds)), list(seconds))
        axes.set_xticks([])
        axes.set(xlim=(0, max([*seconds.values(), 1e-9]) * 1.25), ylim=(len(seconds) - 0.4, -0.6))
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        return style.to_svg(made, title)


def clock(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 07 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"
