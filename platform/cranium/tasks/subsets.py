"""What a cell loses when some contrasts are hidden from it: its scores on each subset, and against its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .comparison import TEST, Cell, Setting, rank, unlearnt
from .metrics import Undefined, Value, auroc
from .statistics import Fold, Interval, bootstrap_difference, bootstrap_interval


@dataclass(frozen=True)
class SubsetPoint:
    """AUROC of one initialisation at one label fraction on one test set, of which only `subset` is seen."""

    setting: Setting
    init: str
    trained: tuple[str, ...]  # contrasts that were learnt from
    label_fraction: float
    test: str
    subset: tuple[str, ...] | None  # None: the cell's own test, with whatever a subject has of those
    num_subjects: int
    num_folds: int
    mean: Value
    interval: Interval | Undefined
    change: Interval | Undefined | None  # against the own test of the same subjects; None: it is that


def points(cells: Sequence[Cell], resamples: int = 2000) -> list[SubsetPoint]:
    """Of the cells that were judged on subsets, at the largest label fraction of their setting; in chart order.

    A setting's first point is its own test, then come the subsets in the order they were declared.
    """
    grouped: dict[tuple[Setting, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.subsets:
            grouped[cell.setting, cell.init].append(cell)
    found = []
    for setting, init in sorted(grouped, key=lambda key: (key[0], rank(key[1]))):
        mine = grouped[setting, init]
        full = max(cell.label_fraction for cell in mine)
        top = sorted((c for c in mine if c.label_fraction == full), key=lambda c: (c.fold, c.seed))
        for test in sorted({test for cell in top for test in cell.tests}, key=lambda t: (t != TEST, t)):
            found.append(_own(top, test, resamples))
            found += [_subset(top, test, subset, resamples) for subset in top[0].subsets]
    return found


def _own(cells: Sequence[Cell], test: str, resamples: int) -> SubsetPoint:
    folds = [(cell, cell.tests[test]) for cell in cells if test in cell.tests]
    return _point(cells, test, None, folds, None, resamples)


def _subset(cells: Sequence[Cell], test: str, subset: tuple[str, ...], resamples: int) -> SubsetPoint:
    shown = [(cell, cell.subsets[subset][test]) for cell in cells if test in cell.subsets[subset]]
    pairs = [one for _, one in shown if len(one.hidden.labels)]
    change: Interval | Undefined = Undefined("no subject is in both tests of every fold")
    if len(pairs) == len(cells):
        a, b = [one.hidden for one in pairs], [one.own for one in pairs]
        change = bootstrap_difference(a, b, resamples=resamples)
    return _point(cells, test, subset, [(cell, one.scores) for cell, one in shown], change, resamples)


def _point(
    cells: Sequence[Cell],
    test: str,
    subset: tuple[str, ...] | None,
    scored: Sequence[tuple[Cell, Fold]],
    change: Interval | Undefined | None,
    resamples: int,
) -> SubsetPoint:
    first, folds = cells[0], [fold for _, fold in scored]
    values = [auroc(fold.labels, fold.probs) for fold in folds]
    if lacking := len(cells) - len(folds):
        values.append(Undefined(f"nobody has all of these in {lacking} of {len(cells)} folds"))
    if why := unlearnt(cells):
        values.insert(0, why)
    unknown = [value for value in values if isinstance(value, Undefined)]
    known = [value for value in values if not isinstance(value, Undefined)]
    sizes = [len(fold.labels) for cell, fold in scored if cell.seed == first.seed]
    return SubsetPoint(
        first.setting,
        first.init,
        first.contrasts,
        first.label_fraction,
        test,
        subset,
        sum(sizes) if test == TEST else max(sizes, default=0),
        len(folds),
        unknown[0] if unknown else float(np.mean(known)),
        unknown[0] if unknown else bootstrap_interval(folds, resamples=resamples),
        change,
    )
