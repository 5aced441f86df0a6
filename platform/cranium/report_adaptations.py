"""The part of a report that asks how a backbone is best used: initialisation against adaptation."""

from __future__ import annotations

from collections.abc import Sequence

from cranium import wording
from cranium.figures.page import Section, Table
from cranium.tasks import comparison
from cranium.tasks.comparison import REFERENCES, TEST, Comparison, Point
from cranium.tasks.metrics import Undefined
from cranium.tasks.statistics import Interval


def section(found: Sequence[Point], resamples: int) -> list[Section]:
    """None where there is one adaptation only. A table per task and split scheme, at the largest label fraction."""
    top = [p for p in found if p.test == TEST]
    if len({p.setting.adaptation for p in top}) < 2:
        return []
    tables, smaller = [], []
    pairs = comparison.between_adaptations(found, resamples)
    for task in sorted({p.setting._replace(adaptation="") for p in top}):
        ours = [p for p in top if p.setting._replace(adaptation="") == task]
        full = max(p.label_fraction for p in ours)
        ours = [p for p in ours if p.label_fraction == full]
        where = wording.setting(task, {p.setting._replace(adaptation="") for p in top})
        tables.append(_crossed(ours, where))
        mine = [p for p in pairs if p.setting._replace(adaptation="") == task]
        smaller.append(_between(mine, f"One adaptation against another: {where}"))
    text = (
        "Mean AUROC over held-out folds at the largest label fraction (95 % interval; models are fixed). "
        "Read down a column to compare initialisations, along a row to compare adaptations. Rows without a "
        "backbone have one value. Every cell of a row was learnt from the same labelled subjects; where an epoch is "
        "selected, the subjects that select it are a part of them.",
    )
    return [Section("adaptations", "Adaptations", text, (), tuple(tables), tuple(smaller))]


def _crossed(ours: Sequence[Point], where: str) -> Table:
    """Initialisations down, adaptations along."""
    ways = sorted({p.setting.adaptation: comparison.way(p) for p in ours}.items(), key=lambda item: item[1])
    names = tuple(name for name, _ in ways)
    rows: list[tuple[object, ...]] = []
    for init in sorted({p.init for p in ours}, key=comparison.rank):
        of = {p.setting.adaptation: p for p in ours if p.init == init}
        if init in REFERENCES:
            shown = [*[""] * len(names), _value(next(iter(of.values())))]
        else:
            shown = [*(_value(of[name]) if name in of else "" for name in names), ""]
        rows.append((init, *shown))
    return Table(("init", *names, "no backbone"), tuple(rows), f"AUROC: {where}")


def _value(point: Point) -> str:
    mean = "undefined" if point.mean is None else f"{point.mean:.2f}"
    return f"{mean} ({wording.interval(point.interval)})".replace(" ", wording.NO_BREAK)


def _between(pairs: Sequence[Comparison], name: str) -> Table:
    rows: list[tuple[object, ...]] = []
    for pair in pairs:
        estimate = pair.interval.estimate if isinstance(pair.interval, Interval) else None
        p = (
            pair.corrected.reason
            if isinstance(pair.corrected, Undefined)
            else wording.p_value(pair.corrected.p)
        )
        rows.append((f"{pair.a} minus {pair.b}", estimate, wording.interval(pair.interval, signed=True), p))
    return Table(("difference", "AUROC", "95 % interval", "corrected t, p (exploratory)"), tuple(rows), name)
