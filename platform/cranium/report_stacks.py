"""The part of a report that asks what a stack should show: kinds of stack against each other, all else being equal."""

from __future__ import annotations

from collections.abc import Sequence

from cranium import wording
from cranium.figures import plots
from cranium.figures.page import Plate, Section, Table
from cranium.tasks import comparison
from cranium.tasks.comparison import NO_STACK, REFERENCES, TEST, Comparison, Point
from cranium.tasks.metrics import Undefined
from cranium.tasks.statistics import Interval

TEXT = (
    "Mean AUROC over held-out folds at the largest label fraction (95 % interval; models are fixed). Contrasts: a "
    "slice in every contrast. Neighbours: the slice of one contrast between its neighbours. Both: that of every "
    "contrast. Folds and labelled subjects are the same for all: those whom every kind of stack has. A backbone that "
    "was pretrained here was pretrained on the kind of stack it is shown. Volumes and covariates look at no slice, and "
    "are left out.",
    "Differences are paired: the same subjects in the same folds. They are exploratory, and not adjusted for their "
    "number. Neighbours differs from the others in contrasts too, so only both minus contrasts tells what neighbouring "
    "slices add. Detectable is the true difference that the corrected test would find in four of five such studies.",
)


def section(found: Sequence[Point], pairs: Sequence[Comparison]) -> list[Section]:
    """None where there is one kind of stack only. A figure per task, split scheme and adaptation; `pairs` of stacks."""
    top = [p for p in found if p.test == TEST and p.init not in NO_STACK]
    if len({p.setting.stack for p in top}) < 2:
        return []
    plates, tables = [], []
    settings = sorted({comparison.without_stack(p.setting) for p in top})
    for setting in settings:
        ours = [p for p in top if comparison.without_stack(p.setting) == setting]
        full = max(p.label_fraction for p in ours)
        ours = [p for p in ours if p.label_fraction == full]
        where = wording.setting(setting, settings)
        plates.append(_plate(ours, where))
        tables.append(_table([p for p in pairs if comparison.without_stack(p.setting) == setting], where))
    return [Section("stacks", "Kinds of stack", TEXT, tuple(plates), tuple(tables))]


def answer(pairs: Sequence[Comparison]) -> list[str]:
    """What neighbouring slices add to backbones, in a sentence with its interval."""
    said = []
    for pair in pairs:
        init, _, kind = pair.a.partition(", ")
        against = pair.b.partition(", ")[2]
        if (kind, against) == ("both", "contrasts") and init not in REFERENCES:
            change = pair.interval.estimate if isinstance(pair.interval, Interval) else None
            shown = "unknown" if change is None else f"{change:+.2f}"
            said.append(
                f"{init} ({pair.setting.adaptation}) {shown} ({wording.interval(pair.interval, signed=True)})"
            )
    if not said:
        return []
    return [
        f"With neighbouring slices of each contrast instead of single ones the AUROC changes by: {'; '.join(said)}. "
        "Exploratory, not adjusted for their number."
    ]


def _plate(ours: Sequence[Point], where: str) -> Plate:
    """Initialisations down, under each its kinds of stack."""
    marks, rows = [], list[tuple[object, ...]]()
    for p in sorted(ours, key=lambda p: (comparison.rank(p.init), comparison.by_stack(p.setting))):
        kind = comparison.variant(p.setting, ours)
        dots = tuple(value for value in p.fold_values if not isinstance(value, Undefined))
        low, high, why = None, None, ""
        if isinstance(p.interval, Undefined):
            why = p.interval.reason
        else:
            low, high = p.interval.low, p.interval.high
        marks.append(plots.Mark(f"{p.init}, {kind}", p.mean, low, high, dots, why, p.init))
        shape = (p.init, p.setting.stack, p.setting.contrasts)
        rows.append((*shape, p.mean, low, high, len(p.cells), why))
    columns = ("init", "stack", "contrasts", "mean AUROC", "low", "high", "cells", "undefined")
    caption = "A ring is the AUROC of one cell, a bar runs from chance to the mean over folds, a whisker its interval."
    picture = plots.bars(marks, f"AUROC by kind of stack: {where}")
    return Plate(where, caption, picture, (Table(columns, tuple(rows), "kinds of stack"),))


def _table(pairs: Sequence[Comparison], where: str) -> Table:
    rows: list[tuple[object, ...]] = []
    for pair in pairs:
        estimate = pair.interval.estimate if isinstance(pair.interval, Interval) else None
        test = pair.corrected
        p = test.reason if isinstance(test, Undefined) else wording.p_value(test.p)
        missed = "undefined" if isinstance(pair.detectable, Undefined) else pair.detectable
        kind = pair.b.partition(", ")[2]
        rows.append(
            (f"{pair.a} minus {kind}", estimate, wording.interval(pair.interval, signed=True), p, missed)
        )
    columns = ("difference", "AUROC", "95 % interval", "corrected t, p (exploratory)", "detectable")
    return Table(columns, tuple(rows), f"One kind of stack against another: {where}")
