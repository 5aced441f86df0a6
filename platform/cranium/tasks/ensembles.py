"""Two initialisations on one external cohort by the models of all folds together, and DeLong's test between them.

Every fold's model scores everybody of an external cohort, so their mean probability is one score a subject: a pair of
scores on one test set, which is what DeLong's test is of. It holds the models fixed, as the bootstrap does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .comparison import REFERENCES, TEST, Point, Setting, cheapest, unlearnt
from .metrics import Undefined, Value
from .statistics import DeLong, Fold, delong, holm


@dataclass(frozen=True)
class Pair:
    """AUROC of a minus b on an external cohort, each the mean over the models of its cells."""

    setting: Setting
    test: str
    a: str
    b: str
    found: DeLong | Undefined
    holm: Value


def ensemble(point: Point) -> Fold | Undefined:
    """The mean probabilities of a point's cells on its test, one row a subject."""
    folds = [cell.tests[point.test] for cell in point.cells]
    if missing := unlearnt(point.cells):
        return missing
    if any(
        not np.array_equal(fold.labels, folds[0].labels) or fold.groups != folds[0].groups for fold in folds
    ):
        return Undefined("its models were not tested on the same subjects")
    return Fold(folds[0].labels, np.mean([fold.probs for fold in folds], axis=0), folds[0].groups)


def pairs(found: Sequence[Point]) -> list[Pair]:
    """Every pair of initialisations on every external cohort, at the largest label fraction; Holm within each.

    Rows without a backbone are compared with each other once, beside the cheapest adaptation, as on held-out folds.
    """
    grouped: dict[tuple[Setting, str], list[Point]] = defaultdict(list)
    for point in found:
        if point.test != TEST:
            grouped[point.setting, point.test].append(point)
    once = cheapest({setting for setting, _ in grouped})
    results: list[Pair] = []
    for (setting, test), members in sorted(grouped.items()):
        full = max(point.label_fraction for point in members)
        members = [point for point in members if point.label_fraction == full]
        family = [
            Pair(setting, test, a.init, b.init, compared := _compared(a, b), _p(compared))
            for b, a in combinations(members, 2)
            if setting in once or not {a.init, b.init} <= set(REFERENCES)
        ]
        adjusted = holm([pair.holm for pair in family])
        results += [replace(pair, holm=p) for pair, p in zip(family, adjusted, strict=True)]
    return results


def _p(found: DeLong | Undefined) -> Value:
    return found if isinstance(found, Undefined) else found.p


def _compared(a: Point, b: Point) -> DeLong | Undefined:
    one, other = ensemble(a), ensemble(b)
    for side in (one, other):
        if isinstance(side, Undefined):
            return side
    assert isinstance(one, Fold) and isinstance(other, Fold)
    if not np.array_equal(one.labels, other.labels) or one.groups != other.groups:
        return Undefined("the two were not tested on the same subjects")
    if one.probs.ndim > 1 and one.probs.shape[1] != 2:
        return Undefined(f"DeLong's test is of two classes, not of {one.probs.shape[1]}")
    if len(set(one.groups)) < len(one.groups):
        return Undefined(
            f"{len(one.groups)} subjects of {len(set(one.groups))} groups: DeLong takes each for independent"
        )
    return delong(one.labels, _positive(one), _positive(other))


def _positive(fold: Fold) -> NDArray[np.float64]:
    return fold.probs if fold.probs.ndim == 1 else fold.probs[:, 1]
