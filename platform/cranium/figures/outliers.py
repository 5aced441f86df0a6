"""Which sessions look unlike the rest of their cohort: one declared, robust score and what made it.

Of every measure the distance from the cohort's median is divided by 1.4826 times its median absolute deviation, or by
the distance of its 10 % and 90 % quantiles over 2.563 where that is more (two groups are no outliers). Both are the
standard deviation of normal values, and a few outliers do not move them. The score of a session is the greatest of its
deviations. It orders a page; it rejects nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cranium.volume.measure import PERCENT

FLAGGED = 5.0  # scores from here on are called outliers
ENOUGH = 8  # sessions below which a median deviation says little


@dataclass(frozen=True)
class Measure:
    """One number of every session: its name and unit, how to say it, and the least deviation that means anything."""

    name: str
    values: NDArray[np.float64]  # [n], NaN where there is none
    floor: float  # of the deviation, on the scale of `values` or of their logarithm
    unit: str = ""
    log: bool = False

    @property
    def deviations(self) -> NDArray[np.float64]:
        """Robust z of every session, 0 where it has no value."""
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.log(self.values) if self.log else self.values
        known = np.isfinite(scale)
        if not known.any():
            return np.zeros(len(scale))
        low, middle, high = (float(q) for q in np.percentile(scale[known], (10, 50, 90)))
        spread = 1.4826 * float(np.median(np.abs(scale[known] - middle)))
        return np.where(known, (scale - middle) / max(spread, (high - low) / 2.563, self.floor), 0.0)

    def say(self, row: int, deviation: float) -> str:
        """What is odd about a session, in words."""
        median = float(np.nanmedian(self.values))
        unit = f"\u00a0{self.unit}" if self.unit else ""
        far = f"{deviation:+.1f}".replace("-", "\u2212")
        return f"{self.name} {_said(float(self.values[row]))}{unit} (median {_said(median)}, {far})"


def _said(value: float) -> str:
    size = abs(value)
    text = f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return text.replace("-", "\u2212")


@dataclass(frozen=True)
class Scores:
    """Of every session the score and the measures behind it, worst first (those flagged, at least one)."""

    score: NDArray[np.float64]
    reasons: tuple[tuple[str, ...], ...]
    measures: tuple[Measure, ...]

    @property
    def order(self) -> list[int]:
        """Rows by falling score; equal ones stay in their order."""
        return [int(i) for i in np.argsort(-self.score, kind="stable")]


def score(measures: Sequence[Measure]) -> Scores:
    """The score of every session, [n]."""
    table = np.stack([measure.deviations for measure in measures], axis=1)  # [n, measures]
    worst = np.abs(table)
    reasons = []
    for row in range(len(table)):
        order = np.argsort(-worst[row], kind="stable")
        kept = [k for k in order[:3] if worst[row, k] >= FLAGGED] or list(order[:1])
        reasons.append(tuple(measures[k].say(row, float(table[row, k])) for k in kept if worst[row, k] > 0))
    return Scores(np.round(worst.max(axis=1), 2), tuple(reasons), tuple(measures))


def measured(sessions: Sequence[Mapping[str, Any]], channels: Sequence[str]) -> list[Measure]:
    """The measures that are scored, from those of `volume.measure` for every session."""

    def of(get: Callable[[Mapping[str, Any]], float | None]) -> NDArray[np.float64]:
        return np.array([math.nan if (v := get(s)) is None else float(v) for s in sessions])

    axes = ("left-right", "front-back", "up-down")
    found = [
        Measure("brain volume", of(lambda s: s["brain_ml"]), 0.03, "ml", log=True),
        Measure("fill of the brain's box", of(lambda s: s["fill"]), 0.02),
    ]
    found += [
        Measure(f"brain {axis}", of(lambda s, k=k: s["extent_mm"][k]), 3.0, "mm")  # type: ignore[misc]
        for k, axis in enumerate(axes)
    ]
    for c in channels:
        with_channel = [s["channels"].get(c) or {} for s in sessions]
        for key, what, floor in (
            ("sharpness", "sharpness", 0.05),
            ("cover", "share of the brain covered", 0.01),
            ("symmetry", "left-right symmetry", 0.02),
        ):
            values = np.array([np.nan if s.get(key) is None else s[key] for s in with_channel], float)
            found.append(Measure(f"{c} {what}", values, floor, log=key == "sharpness"))
        tables = [s.get("quantiles") for s in with_channel]
        found.append(Measure(f"{c} intensity skew", np.array([_skew(t) for t in tables]), 0.12))
        found.append(Measure(f"{c} bright tail", np.array([_tail(t) for t in tables]), 0.2, log=True))
    pairs = dict.fromkeys(pair for s in sessions for pair in s["correlation"])
    for pair in pairs:
        name = f"correlation of {pair.replace('+', ' and ')}"
        found.append(Measure(name, of(lambda s, p=pair: s["correlation"].get(p)), 0.03))  # type: ignore[misc]
    return [measure for measure in found if np.isfinite(measure.values).any()]


def _skew(quantiles: Sequence[float] | None) -> float:
    """Where the median lies between the 5 % and 95 % quantiles, -1 to 1; no gain or offset changes it."""
    if quantiles is None:
        return math.nan
    low, middle, high = (quantiles[PERCENT.index(p)] for p in (5, 50, 95))
    return (high + low - 2 * middle) / (high - low) if high > low else math.nan


def _tail(quantiles: Sequence[float] | None) -> float:
    """How far the 95 % quantile lies above the median, in interquartile ranges."""
    if quantiles is None:
        return math.nan
    low, middle, high, top = (quantiles[PERCENT.index(p)] for p in (25, 50, 75, 95))
    return (top - middle) / (high - low) if high > low else math.nan
