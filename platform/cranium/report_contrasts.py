"""The part of a report that asks what is lost when contrasts are missing: every subset against what was learnt from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cranium import wording
from cranium.figures import plots
from cranium.figures.page import Dot, Plate, Section, Table
from cranium.tasks import subsets
from cranium.tasks.comparison import TEST, Cell, rank
from cranium.tasks.metrics import Undefined
from cranium.tasks.statistics import Interval
from cranium.tasks.subsets import SubsetPoint

FILLS = {
    "zero": "A contrast that is not seen is zero in every pixel.",
    "replicate": "A contrast that is not seen is a copy of the first that is.",
}


def section(cells: Sequence[Cell], resamples: int) -> list[Section]:
    """None where nothing was judged on subsets. A figure for each setting, a table for each of its test sets."""
    found = subsets.points(cells, resamples)
    if not found:
        return []
    settings = sorted({p.setting for p in found})
    plates, tables = [], []
    for setting in settings:
        mine = [p for p in found if p.setting == setting]
        channels = _channels(mine)
        where = wording.setting(setting, settings)
        for test in dict.fromkeys(p.test for p in mine):
            beside = "" if test == TEST else f", on {test}"
            tables.append(_table([p for p in mine if p.test == test], channels, f"{where}{beside}"))
        plates.append(_plate(mine, channels, where))
    fills = sorted({cell.fill for cell in cells if cell.subsets})
    text = (
        "A cell's model is judged again on the same test subjects while some contrasts are hidden from it: only those "
        f"with a full disc are seen. {' '.join(FILLS[fill] for fill in fills)} The first row is the ordinary test: "
        "each subject shows whatever it has of the contrasts learnt from. Every other row holds the subjects who "
        "have each of its contrasts, n of them, and nobody else. All at the largest label fraction.",
        "Change is against the first row, on the subjects of both, so it is paired; a row that hides nothing from them "
        "changes nothing. Intervals are 95 %, resample test groups and hold the models fixed. Among so many rows some "
        "exclude 0 by chance: they are not adjusted for their number.",
    )
    return [Section("contrasts", "Missing contrasts", text, tuple(plates), tuple(tables))]


def _channels(found: Iterable[SubsetPoint]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(channel for p in found for channel in _seen(p)))


def _seen(point: SubsetPoint) -> tuple[str, ...]:
    return point.trained if point.subset is None else point.subset


def _table(found: Sequence[SubsetPoint], channels: Sequence[str], name: str) -> Table:
    """Subsets down, initialisations along."""
    inits = sorted({p.init for p in found}, key=rank)
    rows: list[tuple[object, ...]] = []
    for subset in dict.fromkeys(p.subset for p in found):
        of = {p.init: p for p in found if p.subset == subset}
        one = next(iter(of.values()))
        shown = [text for init in inits for text in (_score(of[init]), _change(of[init]))]
        rows.append((*(Dot(c in _seen(one)) for c in channels), _who(one), one.num_subjects, *shown))
    names = [name for init in inits for name in (init, f"{init}, change")]
    return Table((*channels, "subjects", "n", *names), tuple(rows), name)


def _who(point: SubsetPoint) -> str:
    return f"have{wording.NO_BREAK}{'any' if point.subset is None else 'each'}"


def _score(point: SubsetPoint) -> str:
    if isinstance(point.mean, Undefined):
        return f"undefined ({point.mean.reason})"
    return f"{point.mean:.2f} ({wording.interval(point.interval)})".replace(" ", wording.NO_BREAK)


def _change(point: SubsetPoint) -> str:
    if point.change is None:
        return "compared with"
    if isinstance(point.change, Undefined):
        return f"undefined ({point.change.reason})"
    said = f"by {point.change.estimate:+.2f} ({wording.interval(point.change, signed=True)})"
    return said.replace(" ", wording.NO_BREAK)


def _plate(found: Sequence[SubsetPoint], channels: Sequence[str], where: str) -> Plate:
    inits = sorted({p.init for p in found}, key=rank)
    tests = list(dict.fromkeys(p.test for p in found))
    rows = list(dict.fromkeys(p.subset for p in found))
    of = {(p.subset, p.test, p.init): p for p in found}
    patterns = [tuple(c in _seen(of[row, tests[0], inits[0]]) for c in channels) for row in rows]
    panels = {
        "held-out folds" if test == TEST else test: [
            (of[row, test, inits[0]].num_subjects, [_mark(of[row, test, init]) for init in inits])
            for row in rows
        ]
        for test in tests
    }
    caption = (
        "A full disc is a contrast that is seen. A marker is the mean AUROC over folds, a line its 95 % interval, n "
        "the number of subjects. The top row is the ordinary test, where a subject may lack some of the contrasts."
    )
    picture = plots.subsets(patterns, channels, panels, f"AUROC by the contrasts that are seen: {where}")
    return Plate(where, caption, picture, (_numbers(found, channels),))


def _mark(point: SubsetPoint) -> plots.Mark:
    mean = None if isinstance(point.mean, Undefined) else point.mean
    if isinstance(point.interval, Interval):
        return plots.Mark(point.init, mean, point.interval.low, point.interval.high)
    return plots.Mark(point.init, mean, note=point.interval.reason)


def _numbers(found: Sequence[SubsetPoint], channels: Sequence[str]) -> Table:
    """Everything above as numbers, a row for each subset, test set and initialisation."""
    rows: list[tuple[object, ...]] = []
    for p in found:
        score = (p.interval.low, p.interval.high) if isinstance(p.interval, Interval) else (None, None)
        change: tuple[object, ...] = (None, None, None)
        if isinstance(p.change, Interval):
            change = (p.change.estimate, p.change.low, p.change.high)
        why = [value.reason for value in (p.mean, p.interval, p.change) if isinstance(value, Undefined)]
        seen = [Dot(c in _seen(p)) for c in channels]
        mean = None if isinstance(p.mean, Undefined) else p.mean
        sizes = (p.num_subjects, p.num_folds)
        rows.append(
            (
                *seen,
                _who(p),
                p.test,
                p.init,
                *sizes,
                mean,
                *score,
                *change,
                "; ".join(dict.fromkeys(why)),
            )
        )
    columns = ("subjects", "tested on", "init", "n", "cells", "mean AUROC", "low", "high", "change", "change, low",
               "change, high", "undefined")  # fmt: skip
    return Table((*channels, *columns), tuple(rows), "contrasts")
