"""From the predictions of cells to points with intervals, and from pairs of points to differences with tests.

A setting is what must be equal for two initialisations to share a chart: task, cohort, contrasts, kind of stack, split
scheme, and how they were adapted. Rows without a backbone have one way of their own; they stand beside every
adaptation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from .metrics import Undefined, Value, auroc
from .statistics import (
    Fold,
    Interval,
    Test,
    Wilcoxon,
    bootstrap_difference,
    bootstrap_interval,
    corrected_t_test,
    detectable,
    holm,
    paired_t_test,
    wilcoxon,
)

ORDER = ("random", "imagenet", "dinov2", "scratch", "brainfound")  # then run:<id>, and these last:
REFERENCES = ("cnn", "volumes", "covariates")
NO_STACK = ("volumes", "covariates")  # of these, what looks at no slice: the same whatever a stack shows
STACKS = ("contrasts", "neighbours", "both")
ADAPTATIONS = ("linear", "knn", "attention", "conv", "lora", "finetune")
TEST = "test"


class Setting(NamedTuple):
    """The part of a cell that two comparable cells share."""

    task: str
    cohort: str
    contrasts: str
    stack: str
    scheme: str
    adaptation: str


class Shown(NamedTuple):
    """A cell on a subset of contrasts: scores of all who have it; of those its own test has too, hidden and its own."""

    scores: Fold
    hidden: Fold
    own: Fold


@dataclass(frozen=True)
class Cell:
    """One trained model: where it stands in the grid, its sizes, and its scores on each test set.

    tests: "test" for the held-out fold, else the name of an external cohort -> scores with rows in subject order.
    subsets: of contrasts that it is judged on besides -> the same tests, of the subjects who have each of them.
    unlearnable: why nothing could be learnt, so that its scores are of nobody.
    """

    setting: Setting
    init: str
    label_fraction: float
    fold: int
    seed: int
    n_train: int
    n_train_positive: int
    n_validation: int
    n_test: int
    tests: Mapping[str, Fold]
    run_id: str
    name: str
    contrasts: tuple[str, ...] = ()  # that were learnt from
    fill: str = "zero"  # of those that are not seen
    subsets: Mapping[tuple[str, ...], Mapping[str, Shown]] = field(default_factory=dict)
    unlearnable: str = ""

    def auroc(self, test: str) -> Value:
        """On one of its tests. Undefined when a class is absent, or nothing was learnt."""
        if self.unlearnable:
            return Undefined(self.unlearnable)
        return auroc(self.tests[test].labels, self.tests[test].probs)


@dataclass(frozen=True)
class Point:
    """AUROC of one initialisation at one label fraction on one test set, over its cells (folds x seeds)."""

    setting: Setting
    init: str
    label_fraction: float
    test: str
    fold_values: tuple[Value, ...]  # one per cell, in the order of `cells`
    interval: Interval | Undefined
    cells: tuple[Cell, ...]

    @property
    def mean(self) -> float | None:
        """The mean over folds, or None when a fold has no value."""
        values = [value for value in self.fold_values if not isinstance(value, Undefined)]
        return float(np.mean(values)) if len(values) == len(self.fold_values) else None


@dataclass(frozen=True)
class Comparison:
    """AUROC of a minus b at one label fraction on held-out folds."""

    setting: Setting
    a: str
    b: str
    label_fraction: float
    interval: Interval | Undefined  # bootstrap over test groups, models fixed
    paired: Test | Undefined
    corrected: Test | Undefined
    over_seeds: Wilcoxon | Undefined  # of the means over folds
    holm: Value | None = None  # the corrected p adjusted over the family; None outside the primary family

    @property
    def detectable(self) -> Value:
        """The true difference that the corrected test would find in four of five studies like this one."""
        return self.corrected if isinstance(self.corrected, Undefined) else detectable(self.corrected)

    @property
    def shown(self) -> bool:
        """Whether a difference may be claimed: the interval excludes 0 and the adjusted corrected test agrees."""
        if isinstance(self.interval, Undefined) or not isinstance(self.holm, float):
            return False
        return not self.interval.low <= 0 <= self.interval.high and self.holm < 0.05


def rank(init: str) -> tuple[int, str]:
    """Sort key: the same order of initialisations in every chart and table."""
    if init in ORDER:
        return ORDER.index(init), init
    return len(ORDER) + (REFERENCES.index(init) + 1 if init in REFERENCES else 0), init


def beside_references(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, those without a backbone repeated beside every adaptation of their setting instead of their own."""
    ways: dict[Setting, set[str]] = defaultdict(set)
    for cell in cells:
        if cell.init not in REFERENCES:
            ways[cell.setting._replace(adaptation="")].add(cell.setting.adaptation)
    placed = []
    for cell in cells:
        ours = ways.get(cell.setting._replace(adaptation=""), set()) if cell.init in REFERENCES else set()
        for way in sorted(ours) or [cell.setting.adaptation]:
            placed.append(replace(cell, setting=cell.setting._replace(adaptation=way)))
    return placed


def points(cells: Sequence[Cell], resamples: int = 2000) -> list[Point]:
    """One point per setting, initialisation, label fraction and test set, in chart order."""
    grouped: dict[tuple[Setting, str, float, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        for test in cell.tests:
            grouped[cell.setting, cell.init, cell.label_fraction, test].append(cell)
    found = []
    for key in sorted(grouped, key=lambda k: (k[0], rank(k[1]), k[2], k[3])):
        members = tuple(sorted(grouped[key], key=lambda cell: (cell.fold, cell.seed)))
        values = tuple(cell.auroc(key[3]) for cell in members)
        interval = unlearnt(members) or bootstrap_interval(
            [cell.tests[key[3]] for cell in members], resamples=resamples
        )
        found.append(Point(*key, values, interval, members))
    return found


def unlearnt(cells: Sequence[Cell]) -> Undefined | None:
    """Why the mean over these cells does not exist, where one of them has learnt nothing."""
    return next((Undefined(cell.unlearnable) for cell in cells if cell.unlearnable), None)


def comparisons(found: Sequence[Point], resamples: int = 2000) -> list[Comparison]:
    """Every pair of initialisations on held-out folds, at every label fraction.

    The primary family is all pairs at the largest fraction of a setting: Holm adjusts inside it. Smaller fractions
    are exploratory and carry no adjusted p. Covariates take part: to be no better than the scanner is a finding.
    Pairs of rows without a backbone are the same beside every adaptation, and taken beside the cheapest alone.
    """
    grouped: dict[tuple[Setting, float], list[Point]] = defaultdict(list)
    for point in found:
        if point.test == TEST:
            grouped[point.setting, point.label_fraction].append(point)
    largest: dict[Setting, float] = {}
    for setting, fraction in grouped:
        largest[setting] = max(fraction, largest.get(setting, 0.0))
    results = []
    for (setting, fraction), members in sorted(grouped.items(), key=lambda item: (item[0][0], -item[0][1])):
        new = setting in cheapest(largest)
        pairs = [
            _compare(a, b, resamples)
            for b, a in combinations(members, 2)
            if new or not {a.init, b.init} <= set(REFERENCES)
        ]
        if fraction == largest[setting]:
            p_values = [c.corrected if isinstance(c.corrected, Undefined) else c.corrected.p for c in pairs]
            pairs = [replace(pair, holm=p) for pair, p in zip(pairs, holm(p_values), strict=True)]
        results += pairs
    return results


def between_adaptations(found: Sequence[Point], resamples: int = 2000) -> list[Comparison]:
    """Every pair of adaptations of one initialisation on held-out folds at its largest label fraction: exploratory."""
    grouped: dict[tuple[Setting, str], list[Point]] = defaultdict(list)
    for point in found:
        if point.test == TEST and point.init not in REFERENCES:
            grouped[point.setting._replace(adaptation=""), point.init].append(point)
    results = []
    for _, members in sorted(grouped.items(), key=lambda item: (item[0][0], rank(item[0][1]))):
        full = max(point.label_fraction for point in members)
        members = sorted((p for p in members if p.label_fraction == full), key=way)
        for b, a in combinations(members, 2):
            pair = _compare(a, b, resamples)
            names = (f"{p.init}, {p.setting.adaptation}" for p in (a, b))
            results.append(replace(pair, a=next(names), b=next(names)))
    return results


def between_stacks(found: Sequence[Point], resamples: int = 2000) -> list[Comparison]:
    """Pairs of kinds of stack of one initialisation and adaptation, at its largest label fraction: exploratory.

    Who looks at no slice is left out. `a` and `b` say initialisation and stack; contrasts too, where one kind of stack
    was learnt from several subsets.
    """
    grouped: dict[tuple[Setting, str], list[Point]] = defaultdict(list)
    for point in found:
        if point.test == TEST and point.init not in NO_STACK:
            grouped[without_stack(point.setting), point.init].append(point)
    results = []
    for _, members in sorted(grouped.items(), key=lambda item: (item[0][0], rank(item[0][1]))):
        full = max(point.label_fraction for point in members)
        members = sorted((p for p in members if p.label_fraction == full), key=lambda p: by_stack(p.setting))
        for b, a in combinations(members, 2):
            if a.setting.stack != b.setting.stack:
                pair = _compare(a, b, resamples)
                names = (f"{p.init}, {variant(p.setting, members)}" for p in (a, b))
                results.append(replace(pair, a=next(names), b=next(names)))
    return results


def without_stack(setting: Setting) -> Setting:
    """What two settings share that differ in what a stack shows."""
    return setting._replace(contrasts="", stack="")


def by_stack(setting: Setting) -> tuple[int, int, str]:
    """Sort key: kinds of stack in the order of the config, the most contrasts first."""
    place = STACKS.index(setting.stack) if setting.stack in STACKS else len(STACKS)
    return place, -len(setting.contrasts), setting.contrasts


def variant(setting: Setting, among: Collection[Point]) -> str:
    """The kind of stack, and the contrasts where they are needed to tell it from the others."""
    same = {p.setting.contrasts for p in among if p.setting.stack == setting.stack}
    return setting.stack if len(same) < 2 else f"{setting.stack} ({setting.contrasts})"


def cheapest(settings: Collection[Setting]) -> set[Setting]:
    """Of settings that differ in their adaptation only, the one with the cheapest."""
    first: dict[Setting, Setting] = {}
    for setting in sorted(settings, key=lambda s: cheapness(s.adaptation)):
        first.setdefault(setting._replace(adaptation=""), setting)
    return set(first.values())


def way(point: Point) -> int:
    return cheapness(point.setting.adaptation)


def cheapness(name: str) -> int:
    """Sort key: adaptations from the cheapest to the dearest."""
    return ADAPTATIONS.index(name) if name in ADAPTATIONS else len(ADAPTATIONS)


def _compare(a: Point, b: Point, resamples: int) -> Comparison:
    ours = {(cell.fold, cell.seed): k for k, cell in enumerate(a.cells)}
    theirs = {(cell.fold, cell.seed): k for k, cell in enumerate(b.cells)}
    shared = sorted(ours.keys() & theirs.keys())
    interval: Interval | Undefined = Undefined("no fold in common")
    paired: Test | Undefined = Undefined("no fold in common")
    corrected = paired
    if shared:
        try:
            interval = unlearnt([*a.cells, *b.cells]) or bootstrap_difference(
                [a.cells[ours[key]].tests[TEST] for key in shared],
                [b.cells[theirs[key]].tests[TEST] for key in shared],
                resamples=resamples,
            )
        except ValueError as error:
            interval = Undefined(str(error))
        by_fold: dict[int, list[tuple[Value, Value]]] = defaultdict(list)
        for key in shared:
            by_fold[key[0]].append((a.fold_values[ours[key]], b.fold_values[theirs[key]]))
        flat = [value for pairs in by_fold.values() for pair in pairs for value in pair]
        gone = [value for value in flat if isinstance(value, Undefined)]
        if gone:
            paired = corrected = gone[0]
        else:  # seeds of one fold are averaged first: they are no further test sets
            x = [float(np.mean([pair[0] for pair in pairs])) for pairs in by_fold.values()]
            y = [float(np.mean([pair[1] for pair in pairs])) for pairs in by_fold.values()]
            n_train = float(np.mean([a.cells[ours[key]].n_train for key in shared]))
            n_test = float(np.mean([a.cells[ours[key]].n_test for key in shared]))
            paired, corrected = paired_t_test(x, y), corrected_t_test(x, y, n_train, n_test)
    over = _over_seeds(a, b)
    return Comparison(a.setting, a.init, b.init, a.label_fraction, interval, paired, corrected, over)


def _over_seeds(a: Point, b: Point) -> Wilcoxon | Undefined:
    """One pair a seed: the means over its folds, where both sides have all of them."""
    means: list[dict[int, float]] = []
    folds = {cell.fold for cell in (*a.cells, *b.cells)}
    for point in (a, b):
        by_seed: dict[int, list[float]] = defaultdict(list)
        for cell, value in zip(point.cells, point.fold_values, strict=True):
            if not isinstance(value, Undefined):
                by_seed[cell.seed].append(value)
        means.append(
            {seed: float(np.mean(values)) for seed, values in by_seed.items() if len(values) == len(folds)}
        )
    shared = sorted(means[0].keys() & means[1].keys())
    return wilcoxon([means[0][seed] for seed in shared], [means[1][seed] for seed in shared])
