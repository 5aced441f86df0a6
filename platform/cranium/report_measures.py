"""The part of a report that judges by other measures than AUROC, on held-out folds and on external cohorts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cranium import wording
from cranium.figures.page import Section, Table
from cranium.tasks import comparison, metrics, weighted
from cranium.tasks.comparison import REFERENCES, TEST, Cell, Point, Setting
from cranium.tasks.metrics import Undefined, Value
from cranium.tasks.statistics import bootstrap_interval

MEASURES = {
    "AUPR": weighted.aupr,
    "balanced accuracy": weighted.balanced_accuracy,
    "F1": weighted.f1,
    "sensitivity at 90 %": weighted.sensitivity_at_90,
    "Brier": weighted.brier,
    "ECE": weighted.ece,
}
TEXT = (
    "Means over held-out folds at the largest label fraction, with 95 % intervals made as those of the AUROC. AUPR is "
    "average precision, whose chance is the share of the class; balanced accuracy and F1 are of the most probable "
    "class; sensitivity is where the specificity is at least 90 %. Beyond two classes AUPR, F1 and sensitivity are "
    "plain means over classes, each against the rest. Lower is better for the Brier score (beyond two summed over "
    "classes, up to 2) and ECE (15 equal bins of the top class), which are of the probabilities as they come: "
    "networks are trained with label smoothing and, unless declared otherwise, weights that balance the classes, and "
    "both move probabilities away from the shares that are observed.",
)
FIXED = (
    "Thresholds are fixed at home: for each model the lowest at which its own held-out fold has 90 % specificity. On "
    "another cohort the same threshold has another specificity; how far that is from 90 % is what a clinic would meet."
)


def section(found: Sequence[Point], settings: Sequence[Setting], resamples: int) -> list[Section]:
    """A table for each setting; where models were taken to other cohorts, one of what their thresholds do there."""
    top = [
        p for p in found if p.label_fraction == max(q.label_fraction for q in found if q.setting == p.setting)
    ]
    once = comparison.cheapest(settings)
    tables, fixed = [], []
    for setting in settings:
        # Rows without a backbone are the same beside every adaptation.
        ours = [p for p in top if p.setting == setting and (setting in once or p.init not in REFERENCES)]
        where = wording.setting(setting, settings)
        tables.append(_measures([p for p in ours if p.test == TEST], where, resamples))
        if outside := [p for p in ours if p.test != TEST]:
            fixed.append(_thresholds(outside, where))
    text = (*TEXT, FIXED) if fixed else TEXT
    return [Section("measures", "Other measures", text, (), (), (*tables, *fixed))]


def _measures(ours: Sequence[Point], where: str, resamples: int) -> Table:
    rows: list[tuple[object, ...]] = []
    for point in ours:
        folds, unlearnt = [cell.tests[TEST] for cell in point.cells], comparison.unlearnt(point.cells)
        shown = []
        for measure in MEASURES.values():
            interval = unlearnt or bootstrap_interval(folds, measure, resamples)
            estimate = "" if isinstance(interval, Undefined) else f"{interval.estimate:.2f} "
            shown.append(f"{estimate}({wording.interval(interval)})".replace(" ", wording.NO_BREAK))
        rows.append((point.init, *shown))
    return Table(("init", *MEASURES), tuple(rows), where)


def _thresholds(outside: Sequence[Point], where: str) -> Table:
    rows: list[tuple[object, ...]] = []
    for point in sorted(outside, key=lambda p: (p.test, comparison.rank(p.init))):
        pairs = [_at_home_threshold(cell, point.test) for cell in point.cells]
        rows.append((point.init, point.test, _mean([a for a, _ in pairs]), _mean([b for _, b in pairs])))
    return Table(
        ("init", "tested on", "sensitivity", "specificity"), tuple(rows), f"Thresholds of home: {where}"
    )


def _at_home_threshold(cell: Cell, test: str) -> tuple[Value, Value]:
    if cell.unlearnable:
        return Undefined(cell.unlearnable), Undefined(cell.unlearnable)
    home, away = cell.tests[TEST], cell.tests[test]
    at = metrics.thresholds(home.labels, home.probs)
    return (at, at) if isinstance(at, Undefined) else metrics.at_thresholds(away.labels, away.probs, at)


def _mean(values: Sequence[Value]) -> float | str:
    missing = [value.reason for value in values if isinstance(value, Undefined)]
    return missing[0] if missing else float(np.mean([value for value in values if isinstance(value, float)]))
