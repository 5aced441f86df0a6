"""Intervals and tests against slow loops, scipy and simulation (rows S6, S8)."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy import stats

from cranium.tasks import metrics, statistics, weighted
from cranium.tasks.metrics import Undefined
from cranium.tasks.statistics import Fold, Test, Wilcoxon, paired_t_test


def fold(rng: np.random.Generator, n: int, shift: float, name: str, groups: int | None = None) -> Fold:
    labels = np.arange(n) % 2
    score = 1 / (1 + np.exp(-(rng.normal(size=n) + shift * labels)))
    names = [f"{name}-{i if groups is None else i // 2 % groups}" for i in range(n)]
    return Fold(labels, np.stack([1 - score, score], 1), names)


def test_estimate_is_the_mean_of_fold_values_not_of_concatenated_scores() -> None:
    good = Fold(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4]), list("abcd"))
    also = Fold(np.array([0, 0, 1, 1]), np.array([0.6, 0.7, 0.8, 0.9]), list("efgh"))
    got = statistics.bootstrap_interval([good, also])
    assert isinstance(got, statistics.Interval)
    assert got.estimate == 1.0 and got.low == got.high == 1.0  # concatenated it would be 0.75
    assert (got.num_folds, got.num_groups, got.num_rows, got.by_fold) == (2, 8, 8, True)
    assert 0 < got.dropped < 1000


def test_interval_equals_a_slow_bootstrap_of_whole_groups() -> None:
    rng = np.random.default_rng(1)
    folds = [fold(rng, 24, 1.0, f"f{k}", groups=6) for k in range(3)]
    got = statistics.bootstrap_interval(folds, resamples=4000, seed=0)
    assert isinstance(got, statistics.Interval)
    slow = []
    for _ in range(2000):
        values = []
        for f in folds:
            names = sorted(set(f.groups))
            rows = [i for g in rng.choice(names, len(names)) for i in range(24) if f.groups[i] == g]
            values.append(metrics.auroc(f.labels[rows], f.probs[rows]))
        slow.append(np.mean(values))
    low, high = np.quantile(slow, [0.025, 0.975])
    assert got.low == pytest.approx(low, abs=0.01) and got.high == pytest.approx(high, abs=0.01)


def test_one_external_cohort_scored_by_every_fold_is_drawn_once() -> None:
    rng = np.random.default_rng(2)
    one = fold(rng, 40, 1.0, "ext")
    alone, five = (statistics.bootstrap_interval([one] * k, seed=3) for k in (1, 5))
    assert isinstance(alone, statistics.Interval) and isinstance(five, statistics.Interval)
    # Five copies of the same answers hold no more information than one.
    assert (five.low, five.high) == pytest.approx((alone.low, alone.high))


def test_leaving_one_head_out_resamples_the_heads() -> None:
    rng = np.random.default_rng(3)
    heads = []
    for k, shift in enumerate((0.0, 1.0, 3.0)):
        f = fold(rng, 30, shift, "x")
        heads.append(Fold(f.labels, f.probs, [f"head-{k}"] * 30))
    got = statistics.bootstrap_interval(heads, resamples=4000)
    assert isinstance(got, statistics.Interval) and not got.by_fold and got.num_groups == 3
    values = [float(weighted.auroc(f.labels, f.probs, np.ones((1, 30)))[0]) for f in heads]
    means = sorted(np.mean(draw) for draw in product(values, repeat=3))
    assert got.low == pytest.approx(means[0], abs=1e-9) and got.high == pytest.approx(means[-1], abs=1e-9)
    alone = statistics.bootstrap_interval(heads[:1])
    assert isinstance(alone, Undefined) and "one group only (head-0)" in alone.reason


def test_difference_is_paired_and_refuses_other_subjects() -> None:
    rng = np.random.default_rng(4)
    a = [fold(rng, 30, 1.0, f"f{k}") for k in range(5)]
    nearly = [Fold(f.labels, f.probs + 1e-6 * rng.normal(size=f.probs.shape), f.groups) for f in a]
    got = statistics.bootstrap_difference(a, nearly)
    assert isinstance(got, statistics.Interval) and -0.02 < got.low <= got.high < 0.02
    with pytest.raises(ValueError, match="same subjects"):
        statistics.bootstrap_difference(a, a[::-1])


def test_a_fold_without_a_class_is_undefined_not_dropped() -> None:
    rng = np.random.default_rng(5)
    f = fold(rng, 10, 1.0, "f")
    lonely = Fold(np.zeros(4, int), np.full(4, 0.5), list("wxyz"))
    got = statistics.bootstrap_interval([f, lonely])
    assert isinstance(got, Undefined) and "fold 1 of 2" in got.reason


def test_random_scores_are_covered_by_their_interval() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for trial in range(200):
        folds = [fold(rng, 20, 0.0, f"f{k}") for k in range(5)]
        got = statistics.bootstrap_interval(folds, resamples=400, seed=trial)
        assert isinstance(got, statistics.Interval)
        covered += got.low <= 0.5 <= got.high
    # 95 % nominal; percentile intervals of 100 subjects are slightly narrow, so binomial(200, 0.93).
    assert covered >= stats.binom.ppf(1e-4, 200, 0.93)


def test_two_thousand_resamples_of_a_thousand_subjects_take_a_second() -> None:
    rng = np.random.default_rng(7)
    folds = [fold(rng, 200, 0.5, f"f{k}") for k in range(5)]
    start = time.process_time()
    statistics.bootstrap_interval(folds, resamples=2000)
    assert time.process_time() - start < 1.0


def test_paired_t_test_agrees_with_scipy_and_the_correction_widens_it() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.normal(0.8, 0.05, 5), rng.normal(0.75, 0.05, 5)
    got = statistics.paired_t_test(a, b)
    reference = stats.ttest_rel(a, b)
    assert isinstance(got, statistics.Test)
    assert (got.t, got.p, got.df) == pytest.approx((reference.statistic, reference.pvalue, 4))
    assert (got.low, got.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    corrected = statistics.corrected_t_test(a, b, n_train=80, n_test=20)
    assert isinstance(corrected, statistics.Test)
    # 5-fold: variance x (1/5 + 1/4) instead of 1/5, so t shrinks by sqrt(0.45 / 0.2) = 1.5.
    assert got.t / corrected.t == pytest.approx(1.5) and corrected.p > got.p


def test_equal_differences_have_no_t() -> None:
    for a, b in (([0.7, 0.8], [0.7, 0.8]), ([0.7, 0.8, 0.9], [0.6, 0.7, 0.8])):
        got = statistics.paired_t_test(a, b)
        assert isinstance(got, Undefined) and "variance is 0" in got.reason
    assert isinstance(statistics.paired_t_test([0.7], [0.6]), Undefined)
    with pytest.raises(ValueError, match="finite"):
        statistics.paired_t_test([0.7, float("nan")], [0.6, 0.5])


def slow_delong(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Structural components by two loops (DeLong et al. 1988, equations 4 to 6): difference and p."""
    pos, neg = np.flatnonzero(y == 1), np.flatnonzero(y == 0)

    def above(s: np.ndarray, i: int, j: int) -> float:
        return 1.0 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0.0

    v10 = np.array([[np.mean([above(s, i, j) for j in neg]) for i in pos] for s in (a, b)])
    v01 = np.array([[np.mean([above(s, i, j) for i in pos]) for j in neg] for s in (a, b)])
    area = v10.mean(axis=1)

    def s_matrix(v: np.ndarray) -> np.ndarray:
        return (v - area[:, None]) @ (v - area[:, None]).T / (v.shape[1] - 1)

    s = s_matrix(v10) / len(pos) + s_matrix(v01) / len(neg)
    contrast = np.array([1.0, -1.0])
    z = contrast @ area / np.sqrt(contrast @ s @ contrast)
    return float(contrast @ area), float(2 * stats.norm.sf(abs(z)))


@pytest.mark.parametrize("decimals", [1, 6])  # 1: many ties
def test_delong_agrees_with_structural_components(decimals: int) -> None:
    rng = np.random.default_rng(9)
    y = (np.arange(37) % 3 == 0).astype(int)
    a = np.round(rng.random(37) + 0.3 * y, decimals)
    b = np.round(0.5 * a + rng.random(37), decimals)
    got = statistics.delong(y, a, b)
    assert isinstance(got, statistics.DeLong)
    assert (got.difference, got.p) == pytest.approx(slow_delong(y, a, b), abs=1e-12)
    assert got.auroc_a == pytest.approx(metrics.auroc(y, a))


def test_delong_of_equal_rankings_is_undefined() -> None:
    y, s = np.array([0, 1, 0, 1, 0]), np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    got = statistics.delong(y, s, s**3)
    assert isinstance(got, Undefined) and "rank the subjects alike" in got.reason
    assert isinstance(statistics.delong([0, 0, 1], s[:3], s[:3]), Undefined)


def test_holm_by_hand() -> None:
    gone = Undefined("no folds")
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, then made monotone.
    assert statistics.holm([0.04, 0.01, gone, 0.03, 0.02]) == pytest.approx([0.06, 0.04, gone, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


# ---- signed ranks and power -----------------------------------------------------------------------------------------


def slow_signed_ranks(difference: np.ndarray) -> float:
    """Two-sided p from the definition: all 2^n signs of the ranks."""
    ranks = stats.rankdata(abs(difference))
    seen = ranks[difference > 0].sum()
    sums = np.array([sum(r for r, sign in zip(ranks, signs, strict=True) if sign)
                     for signs in product((0, 1), repeat=len(ranks))])  # fmt: skip
    return float(min(1.0, 2 * min((sums <= seen + 1e-9).mean(), (sums >= seen - 1e-9).mean())))


@pytest.mark.parametrize("seed", range(5))
def test_signed_ranks_agree_with_scipy_and_with_ties_with_all_signs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.3, 1, 9), rng.normal(0, 1, 9)
    found = statistics.wilcoxon(a, b)
    assert isinstance(found, Wilcoxon) and found.pairs == 9
    assert found.p == pytest.approx(stats.wilcoxon(a, b, method="exact").pvalue)
    assert found.median == pytest.approx(float(np.median(a - b)))
    tied = np.round(rng.normal(0.5, 1, 10))
    differing = tied[tied != 0]
    found = statistics.wilcoxon(tied, np.zeros(10))
    if len(differing) < 6:
        assert isinstance(found, Undefined)
    else:
        assert isinstance(found, Wilcoxon) and found.p == pytest.approx(slow_signed_ranks(differing))


def test_fewer_than_six_pairs_are_refused_as_they_could_show_nothing() -> None:
    least = [2 * 0.5**n for n in (5, 6)]
    assert least[0] > 0.05 > least[1]
    refused = statistics.wilcoxon([1, 2, 3, 4, 5, 7.0], [0, 0, 0, 0, 0, 7.0])  # one pair does not differ
    assert isinstance(refused, Undefined) and "5 pairs that differ" in refused.reason
    found = statistics.wilcoxon([1, 2, 3, 4, 5, 6.0], [0] * 6)
    assert isinstance(found, Wilcoxon) and found.p == pytest.approx(least[1])
    with pytest.raises(ValueError, match="one finite value"):
        statistics.wilcoxon([1.0], [1.0, 2.0])


def test_a_detectable_difference_is_found_in_four_of_five_simulated_studies() -> None:
    rng, folds, spread = np.random.default_rng(0), 5, 0.04
    test = paired_t_test([0.1, 0.2, 0.25, 0.1, 0.15], [0.1, 0.15, 0.2, 0.12, 0.1])
    assert isinstance(test, Test)
    scaled = replace(
        test, difference=0.01, t=0.01 / (spread / np.sqrt(folds))
    )  # a standard error that is known
    wanted = statistics.detectable(scaled)
    studies = rng.normal(wanted, spread, (40_000, folds))
    t = studies.mean(1) / (studies.std(1, ddof=1) / np.sqrt(folds))
    found = (abs(t) > stats.t.ppf(0.975, folds - 1)).mean()
    assert found == pytest.approx(0.8, abs=0.01) == pytest.approx(statistics.power(scaled, wanted), abs=0.01)
    assert statistics.power(scaled, 0.0) == pytest.approx(0.05)
    level = replace(test, difference=0.0, t=0.0, low=-0.1, high=0.1)
    error = 0.1 / stats.t.ppf(0.975, 4)
    assert statistics.power(level, statistics.detectable(level)) == pytest.approx(0.8)
    assert statistics.detectable(level) == pytest.approx(wanted * error / (spread / np.sqrt(folds)))
