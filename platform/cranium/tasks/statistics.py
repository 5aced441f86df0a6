"""Intervals and tests: what a difference between two initialisations may be called.

The pooled value of a metric is the mean of its fold values; scores are never concatenated over folds, because
each fold has a model, and so a scale, of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from . import weighted
from .metrics import Floats, Undefined, Value

Metric = Callable[[ArrayLike, ArrayLike, Floats], Floats]
MIN_PAIRS = 6  # with 5 the smallest two-sided p of a signed-rank test is 1/16
MIN_KEPT = 0.5  # share of resamples that must be defined for an interval to be shown


@dataclass(frozen=True)
class Fold:
    """One model on one test set: labels [n], probs [n] or [n, k], the declared group of each row [n]."""

    labels: NDArray[np.int64]
    probs: Floats
    groups: Sequence[str]


@dataclass(frozen=True)
class Interval:
    """A mean over folds with its percentile bootstrap interval, and what was resampled."""

    estimate: float
    low: float
    high: float
    level: float
    num_folds: int
    num_groups: int
    num_rows: int
    dropped: int  # resamples in which a class was missing
    by_fold: bool  # groups were drawn inside each fold; False: over the folds, which share or are groups


@dataclass(frozen=True)
class Test:
    """A two-sided t-test over folds: mean difference, its interval, t, degrees of freedom and p."""

    __test__ = False  # not a pytest class

    difference: float
    low: float
    high: float
    t: float
    df: int
    p: float


@dataclass(frozen=True)
class Wilcoxon:
    """A two-sided signed-rank test of pairs: how many differ, their median difference a - b, and p."""

    pairs: int
    median: float
    p: float


@dataclass(frozen=True)
class DeLong:
    """Two correlated AUROCs on one test set: difference a - b, 95 % interval, z and two-sided p."""

    auroc_a: float
    auroc_b: float
    difference: float
    low: float
    high: float
    z: float
    p: float


def bootstrap_interval(
    folds: Sequence[Fold],
    metric: Metric = weighted.auroc,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval | Undefined:
    """Percentile interval of the mean over folds of `metric`, resampling whole groups with replacement.

    Groups are drawn inside each fold (stratified by fold). Folds that share a group (one external cohort
    scored by every fold's model, or repeated cross-validation) share one draw. When a fold is a single
    group (leave one group out) the groups are drawn over all folds and each fold weighs as often as it was
    drawn. The models are fixed: the interval holds the sampling of test subjects, not the variance of
    training. Undefined when a fold lacks a class, or when half the resamples do, or with fewer than two
    groups.
    """
    return _bootstrap([(1.0, folds)], metric, resamples, level, seed)


def bootstrap_difference(
    a: Sequence[Fold],
    b: Sequence[Fold],
    metric: Metric = weighted.auroc,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval | Undefined:
    """Interval of mean(a) - mean(b) on shared draws: the folds of a and b are the same test sets."""
    if [(list(f.groups), f.labels.tolist()) for f in a] != [(list(f.groups), f.labels.tolist()) for f in b]:
        raise ValueError("the two sides were not tested on the same subjects in the same folds")
    return _bootstrap([(1.0, a), (-1.0, b)], metric, resamples, level, seed)


def _bootstrap(
    sides: Sequence[tuple[float, Sequence[Fold]]], metric: Metric, resamples: int, level: float, seed: int
) -> Interval | Undefined:
    folds = sides[0][1]
    if not folds:
        return Undefined("no folds")
    groups = sorted({group for fold in folds for group in fold.groups})
    if len(groups) < 2:
        return Undefined(f"one group only ({', '.join(groups)}): nothing to resample")
    draws, merged = _draws(folds, groups, resamples, np.random.default_rng(seed))
    column = {group: k for k, group in enumerate(groups)}
    total = np.zeros(resamples)
    estimate = 0.0
    for sign, side in sides:
        values, shares = np.empty((len(side), resamples)), np.empty((len(side), resamples))
        for k, fold in enumerate(side):
            whole = float(metric(fold.labels, fold.probs, np.ones((1, len(fold.labels))))[0])
            if np.isnan(whole):
                return Undefined(
                    f"fold {k} of {len(side)} has a test set of {len(fold.labels)} without every class"
                )
            estimate += sign * whole / len(side)
            drawn = draws[:, [column[g] for g in sorted(set(fold.groups))]].sum(axis=1)
            shares[k] = drawn / len(set(fold.groups)) if merged else 1.0
            values[k] = metric(fold.labels, fold.probs, draws[:, [column[g] for g in fold.groups]])
        # A fold that was not drawn has no say; a drawn fold without every class makes the resample undefined.
        shared = np.where(shares > 0, shares * values, 0.0).sum(axis=0)
        total += sign * shared / shares.sum(axis=0)
    kept = total[np.isfinite(total)]
    if len(kept) < MIN_KEPT * resamples:
        return Undefined(
            f"{resamples - len(kept)} of {resamples} resamples lack a class: too few test subjects"
        )
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        estimate=estimate,
        low=float(low),
        high=float(high),
        level=level,
        num_folds=len(folds),
        num_groups=len(groups),
        num_rows=sum(len(fold.labels) for fold in folds),
        dropped=resamples - len(kept),
        by_fold=not merged,
    )


def _draws(
    folds: Sequence[Fold], groups: Sequence[str], resamples: int, rng: np.random.Generator
) -> tuple[Floats, bool]:
    """How often each group is drawn [resamples, groups], and whether the folds became one stratum."""
    strata: list[set[str]] = []
    for fold in folds:
        mine = set(fold.groups)
        touching = [stratum for stratum in strata if stratum & mine]
        strata = [stratum for stratum in strata if not stratum & mine] + [mine.union(*touching)]
    merged = any(len(stratum) == 1 for stratum in strata)
    if merged:
        strata = [set(groups)]
    column = {group: k for k, group in enumerate(groups)}
    draws = np.zeros((resamples, len(groups)))
    for stratum in sorted(strata, key=min):
        columns = [column[group] for group in sorted(stratum)]
        draws[:, columns] = rng.multinomial(len(columns), np.full(len(columns), 1 / len(columns)), resamples)
    return draws, merged


def paired_t_test(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Test | Undefined:
    """Two-sided paired t-test of a - b over k folds. Optimistic: the training sets of folds overlap."""
    return _t_test(a, b, 1 / max(len(a), 1), level)


def corrected_t_test(
    a: Sequence[float], b: Sequence[float], n_train: float, n_test: float, level: float = 0.95
) -> Test | Undefined:
    """Corrected resampled t-test (Nadeau & Bengio 2003): variance x (1/k + n_test/n_train)."""
    if n_train <= 0 or n_test <= 0:
        raise ValueError(f"sizes must be positive: n_train={n_train}, n_test={n_test}")
    return _t_test(a, b, 1 / max(len(a), 1) + n_test / n_train, level)


def _t_test(a: Sequence[float], b: Sequence[float], factor: float, level: float) -> Test | Undefined:
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if len(a) != len(b) or not np.isfinite(difference).all():
        raise ValueError("give one finite value per fold on both sides")
    if len(difference) < 2:
        return Undefined(f"{len(difference)} fold: a t-test needs 2")
    mean, variance, df = difference.mean(), difference.var(ddof=1), len(difference) - 1
    if variance <= 1e-24:  # equal up to rounding
        return Undefined("the difference is the same in every fold: its variance is 0")
    error = float(np.sqrt(variance * factor))
    t, half = mean / error, stats.t.ppf((1 + level) / 2, df) * error
    return Test(
        float(mean), float(mean - half), float(mean + half), float(t), df, float(2 * stats.t.sf(abs(t), df))
    )


def power(test: Test, difference: float, alpha: float = 0.05) -> float:
    """Chance that this t-test finds a true mean difference of that size (noncentral t; its standard error is kept).

    Asked of a difference that would matter, never of the one that was seen: that says nothing beyond p.
    """
    bound = float(stats.t.ppf(1 - alpha / 2, test.df))
    moved = difference / _error(test)
    return float(stats.nct.sf(bound, test.df, moved) + stats.nct.cdf(-bound, test.df, moved))


def detectable(test: Test, wanted: float = 0.8, alpha: float = 0.05) -> float:
    """The true mean difference that this t-test would find in a share `wanted` of studies like this one."""
    error = most = _error(test)
    while power(test, most, alpha) < wanted:
        most *= 2  # far beyond it the noncentral t has no number
    return float(optimize.brentq(lambda d: power(test, d, alpha) - wanted, 0.0, most, xtol=1e-9 * error))


def _error(test: Test) -> float:
    return test.difference / test.t if test.t else (test.high - test.low) / (2 * stats.t.ppf(0.975, test.df))


def wilcoxon(a: Sequence[float], b: Sequence[float]) -> Wilcoxon | Undefined:
    """Wilcoxon's signed-rank test of a - b, exact also with ties (mid-ranks); pairs without a difference are left out.

    Undefined below 6 pairs that differ: no outcome of theirs could be called significant at 0.05.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if len(a) != len(b) or not np.isfinite(difference).all():
        raise ValueError("give one finite value per pair on both sides")
    differing = difference[abs(difference) > 1e-12]  # equal up to rounding
    if len(differing) < MIN_PAIRS:
        return Undefined(
            f"{len(differing)} pairs that differ: Wilcoxon needs {MIN_PAIRS}, as fewer cannot reach 0.05"
        )
    doubled = np.rint(2 * stats.rankdata(abs(differing))).astype(int)  # whole numbers: mid-ranks are halves
    ways = np.ones(1)  # share of all signs by the doubled sum of the positive ranks
    for rank in doubled:
        longer = np.zeros(len(ways) + rank)
        longer[: len(ways)] += ways / 2
        longer[rank:] += ways / 2
        ways = longer
    positive = int(doubled[differing > 0].sum())
    tail = min(ways[: positive + 1].sum(), ways[positive:].sum())
    return Wilcoxon(len(differing), float(np.median(difference)), float(min(1.0, 2 * tail)))


def delong(labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike) -> DeLong | Undefined:
    """DeLong's test (1988) of two AUROCs on one test set, by mid-ranks (Sun & Xu 2014, algorithm 2).

    labels [n] in {0, 1}; scores [n]. Undefined when a class has fewer than 2 subjects or the two rankings
    agree on every pair, so that the difference has no variance.
    """
    y = np.asarray(labels).astype(bool)
    scores = np.stack([np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)])
    n1, n0 = int(y.sum()), int((~y).sum())
    if min(n1, n0) < 2:
        return Undefined(f"{n1} positive and {n0} negative subjects: DeLong needs 2 of each")
    ranks = stats.rankdata(scores, axis=1)
    v10 = (ranks[:, y] - stats.rankdata(scores[:, y], axis=1)) / n0  # share of negatives below each positive
    v01 = 1 - (ranks[:, ~y] - stats.rankdata(scores[:, ~y], axis=1)) / n1
    area = v10.mean(axis=1)
    covariance = np.cov(v10) / n1 + np.cov(v01) / n0
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if variance <= 1e-15:
        return Undefined("both scores rank the subjects alike: the difference has no variance")
    difference, error = float(area[0] - area[1]), float(np.sqrt(variance))
    z, half = difference / error, float(stats.norm.ppf(0.975)) * error
    p = float(2 * stats.norm.sf(abs(z)))
    return DeLong(float(area[0]), float(area[1]), difference, difference - half, difference + half, z, p)


def holm(p_values: Sequence[Value]) -> list[Value]:
    """Holm's step-down adjustment over one family of tests; undefined ones stay so and do not count."""
    defined = [(p, k) for k, p in enumerate(p_values) if not isinstance(p, Undefined)]
    adjusted, running = list(p_values), 0.0
    for rank, (p, k) in enumerate(sorted(defined)):
        running = max(running, min(1.0, p * (len(defined) - rank)))
        adjusted[k] = running
    return adjusted
