"""A contact sheet: the slices of a session that a prediction comes from, in every contrast, and where it attends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from . import style

COLUMNS = 12  # slices shown, each the middle one of its share; where it attends, the one attended to most
TILE = 0.86  # inches
INK, QUIET, MARK, PAPER = "#e8eaed", "#9aa0a6", "#ffb000", "#0f1114"


def write(
    path: Path,
    stacks: NDArray[Any],
    *,
    title: str,
    channels: Sequence[str],
    places: NDArray[Any],
    total: int,
    attention: NDArray[Any] | None,
) -> None:
    """Draw stacks [k, C, S, H, W] into the PNG `path`; `places` [k] of the session's `total` slices, from 1.

    `attention` [k]: what share of the prediction's weight each slice has; None where all have the same.
    """
    chosen = _chosen(len(stacks), attention)
    there = [c for c in range(stacks.shape[1]) if stacks[:, c].any()]
    box = _box(stacks.max(axis=(0, 1, 2)) > 0)
    strip = 0 if attention is None else 0.9
    height = TILE * len(there) + strip + 0.62
    with style.drawing():
        made, axes = style.figure(
            height,
            len(chosen),
            len(there) + (attention is not None),
            height_ratios=[TILE] * len(there) + ([strip] if strip else []),
        )
        made.set_size_inches(TILE * len(chosen) + 0.5, height)
        made.set_facecolor(PAPER)
        grid = np.array(axes, object).reshape(-1, len(chosen))
        for row, channel in enumerate(there):
            for column, index in enumerate(chosen):
                _tile(grid[row, column], stacks[index, channel, stacks.shape[2] // 2][box])
                if row == 0:
                    grid[row, column].set_title(str(places[index]), color=QUIET, fontsize=8, loc="center")
            grid[row, 0].set_ylabel(channels[channel], color=INK)
        if attention is not None:
            below = grid[-1, 0].get_gridspec()[-1, :]
            for axis in grid[-1]:
                axis.remove()
            _strip(made.add_subplot(below), places, attention, chosen)
        used = f"all {total}" if len(stacks) == total else f"{len(stacks)} of {total}"
        words = f"{title}   (from {used} slices, {len(chosen)} shown; left is left)"
        made.suptitle(words, color=INK, fontsize=10, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, dpi=130, facecolor=PAPER)


def _chosen(count: int, attention: NDArray[Any] | None) -> list[int]:
    parts = np.array_split(np.arange(count), min(COLUMNS, count))
    if attention is None:
        return [int(part[len(part) // 2]) for part in parts]
    return [int(part[attention[part].argmax()]) for part in parts]


def _tile(axis: Axes, image: NDArray[Any]) -> None:
    axis.imshow(image, cmap="gray", vmin=0, vmax=np.iinfo(image.dtype).max, interpolation="bicubic")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _strip(axis: Axes, places: NDArray[Any], attention: NDArray[Any], chosen: Sequence[int]) -> None:
    """The attention of every slice; those shown above are marked."""
    shown = np.isin(np.arange(len(places)), chosen)
    axis.bar(places, attention, width=0.8, color=[MARK if s else QUIET for s in shown])
    axis.axhline(1 / len(places), color=INK, linewidth=0.6, linestyle=":")
    axis.set(ylabel="attention", xlabel="slice", xlim=(places[0] - 1, places[-1] + 1))
    axis.tick_params(labelcolor=QUIET, labelsize=7)
    axis.xaxis.label.set_color(QUIET)
    axis.yaxis.label.set_color(INK)
    axis.grid(False)


def _box(inside: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The rectangle around what any slice holds."""
    if not inside.any():
        return slice(None), slice(None)
    ends = [np.flatnonzero(inside.any(axis=axis))[[0, -1]] for axis in (1, 0)]
    return slice(ends[0][0], ends[0][1] + 1), slice(ends[1][0], ends[1][1] + 1)
