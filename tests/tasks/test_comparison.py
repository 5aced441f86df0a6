"""Points and pairs of a grid, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cranium.tasks import comparison
from cranium.tasks.comparison import Cell, Setting
from cranium.tasks.metrics import Undefined
from cranium.tasks.statistics import Fold, Test, Wilcoxon, corrected_t_test, detectable, wilcoxon

SETTING = Setting("lesion", "demo", "T1w", "contrasts", "subject", "linear")


def cell(init: str, fold: int, gain: float, fraction: float = 1.0, seed: int = 0) -> Cell:
    rng = np.random.default_rng([fold, seed, int(gain * 10)])
    labels = np.arange(20) % 2
    score = 1 / (1 + np.exp(-(gain * labels + rng.normal(size=20))))
    test = Fold(labels, score, [f"s{fold}-{k}" for k in range(20)])
    return Cell(SETTING, init, fraction, fold, seed, 80, 40, 0, 20, {"test": test}, "", f"{init}-{fold}")


def test_a_point_is_the_mean_of_its_cells_and_points_come_in_chart_order() -> None:
    cells = [
        cell(init, k, gain)
        for init, gain in (("covariates", 0.0), ("scratch", 2.0), ("random", 0.0))
        for k in range(5)
    ]
    found = comparison.points(cells[::-1], resamples=200)
    assert [point.init for point in found] == ["random", "scratch", "covariates"]
    for point in found:
        assert point.mean == pytest.approx(np.mean(point.fold_values))
        assert [member.fold for member in point.cells] == [0, 1, 2, 3, 4]


def test_pairs_are_tested_over_folds_and_seeds_of_a_fold_are_averaged() -> None:
    cells = [
        cell(i, k, g, seed=s)
        for i, g in (("random", 0.3), ("scratch", 1.5))
        for k in range(5)
        for s in range(2)
    ]
    found = comparison.points(cells, resamples=200)
    (pair,) = comparison.comparisons(found, resamples=200)
    assert (pair.a, pair.b) == ("scratch", "random")
    a, b = (
        np.reshape([float(v) for v in point.fold_values], (5, 2)).mean(axis=1)
        for point in (found[1], found[0])
    )
    assert pair.corrected == corrected_t_test(a, b, 80, 20)
    assert isinstance(pair.corrected, Test) and pair.corrected.df == 4 and pair.holm == pair.corrected.p
    assert pair.detectable == detectable(pair.corrected) > 0


def test_each_seed_is_a_pair_of_means_and_fewer_than_six_are_refused() -> None:
    grid = [(i, g, k, s) for i, g in (("random", 0.3), ("scratch", 1.5)) for k in range(3) for s in range(7)]
    cells = [cell(i, k, g, seed=s) for i, g, k, s in grid]
    (pair,) = comparison.comparisons(comparison.points(cells, resamples=100), resamples=100)
    values = {
        (p.init, c.seed, c.fold): v
        for p in comparison.points(cells, 100)
        for c, v in zip(p.cells, p.fold_values, strict=True)
    }
    means = {
        i: [np.mean([values[i, s, k] for k in range(3)]) for s in range(7)] for i in ("random", "scratch")
    }
    assert isinstance(pair.over_seeds, Wilcoxon) and pair.over_seeds.pairs == 7
    assert pair.over_seeds == wilcoxon(means["scratch"], means["random"])
    short = [c for c in cells if (c.fold, c.seed) not in ((0, 0), (1, 1))]  # two seeds lack a fold
    (pair,) = comparison.comparisons(comparison.points(short, resamples=100), resamples=100)
    assert isinstance(pair.over_seeds, Undefined) and pair.over_seeds.reason.startswith("5 pairs")


def test_rows_without_a_backbone_are_compared_with_each_other_once() -> None:
    gains = {"random": 0.0, "cnn": 1.0, "covariates": 0.2}
    cells = [cell(init, k, gain) for init, gain in gains.items() for k in range(5)]
    dear = SETTING._replace(adaptation="finetune")
    cells += [replace(c, setting=dear) for c in cells if c.init == "random"]
    placed = comparison.beside_references(cells)
    pairs = comparison.comparisons(comparison.points(placed, resamples=200), resamples=200)
    found = [(pair.setting.adaptation, pair.a, pair.b) for pair in pairs]
    assert found.count(("linear", "covariates", "cnn")) == 1 and len(found) == 3 + 2
    assert {(a, b) for way, a, b in found if way == "finetune"} == {
        ("cnn", "random"),
        ("covariates", "random"),
    }
    p_values = {pair.a: pair.corrected.p for pair in pairs if pair.setting == dear}
    assert max(p.holm for p in pairs if p.setting == dear) == max(
        *p_values.values(), 2 * min(p_values.values())
    )


def test_only_the_largest_fraction_is_the_family() -> None:
    gains = {"random": 0.0, "scratch": 1.0, "dinov2": 1.2}
    cells = [cell(i, k, g, fraction=f) for i, g in gains.items() for k in range(5) for f in (0.1, 1.0)]
    pairs = comparison.comparisons(comparison.points(cells, resamples=200), resamples=200)
    full = [pair for pair in pairs if pair.label_fraction == 1.0]
    assert len(pairs) == 6 and len(full) == 3
    assert all(pair.holm is None and not pair.shown for pair in pairs if pair not in full)
    raw = sorted(pair.corrected.p for pair in full if isinstance(pair.corrected, Test))
    assert min(float(pair.holm) for pair in full if isinstance(pair.holm, float)) == pytest.approx(
        min(1, 3 * raw[0])
    )


def test_a_difference_needs_both_the_interval_and_the_test() -> None:
    far = [cell(i, k, g) for i, g in (("random", 0.0), ("scratch", 5.0)) for k in range(5)]
    (pair,) = comparison.comparisons(comparison.points(far, resamples=400), resamples=400)
    assert pair.shown
    few = [c for c in far if c.fold < 1]
    (pair,) = comparison.comparisons(comparison.points(few, resamples=400), resamples=400)
    assert isinstance(pair.corrected, Undefined) and not pair.shown
    assert pair.detectable == pair.corrected


def test_other_test_subjects_are_no_pair() -> None:
    mine, theirs = cell("random", 0, 0.0), cell("scratch", 0, 1.0)
    moved = Fold(theirs.tests["test"].labels, theirs.tests["test"].probs, [f"t{k}" for k in range(20)])
    other = Cell(SETTING, "scratch", 1.0, 0, 0, 80, 40, 0, 20, {"test": moved}, "", "x")
    (pair,) = comparison.comparisons(comparison.points([mine, other], resamples=100), resamples=100)
    assert isinstance(pair.interval, Undefined) and "not tested on the same subjects" in pair.interval.reason


def test_rows_without_a_backbone_stand_beside_every_adaptation() -> None:
    tuned = SETTING._replace(adaptation="finetune")
    cells = [replace(cell("random", 0, 1.0), setting=s) for s in (SETTING, tuned)]
    cells.append(cell("covariates", 0, 1.0))
    cells.append(replace(cell("cnn", 0, 1.0), setting=tuned))
    placed = comparison.beside_references(cells)
    assert {(c.init, c.setting.adaptation) for c in placed} == {
        (init, way) for init in ("random", "covariates", "cnn") for way in ("linear", "finetune")
    }
    alone = cell("covariates", 0, 1.0)
    assert comparison.beside_references([alone]) == [alone]


def test_adaptations_of_one_initialisation_are_compared_and_no_two_initialisations() -> None:
    tuned = SETTING._replace(adaptation="finetune")
    cells = [
        replace(cell(init, fold, 1.0), setting=s)
        for s in (SETTING, tuned)
        for init in ("random", "scratch", "covariates")
        for fold in range(3)
    ]
    pairs = comparison.between_adaptations(comparison.points(cells, 50), 50)
    assert [(p.a, p.b) for p in pairs] == [
        ("random, finetune", "random, linear"),
        ("scratch, finetune", "scratch, linear"),
    ]
    assert all(p.holm is None for p in pairs)


def test_kinds_of_stack_are_compared_fold_by_fold_whatever_their_contrasts() -> None:
    """Of each initialisation by itself; where one kind has several subsets of contrasts each is told by its own."""
    kinds = {
        ("contrasts", "T1w + T2w"): 0.3,
        ("contrasts", "T1w"): 0.1,
        ("neighbours", "T1w"): 0.6,
        ("both", "T1w + T2w"): 1.8,
    }
    cells = [
        replace(
            cell(init, k, gain + more, fraction), setting=SETTING._replace(stack=stack, contrasts=contrasts)
        )
        for (stack, contrasts), gain in kinds.items()
        for init, more in (("random", 0.0), ("scratch", 0.4))
        for fraction in (0.5, 1.0)
        for k in range(4)
    ]
    found = comparison.points(cells, resamples=200)
    pairs = comparison.between_stacks(found, resamples=200)
    assert [(pair.a, pair.b) for pair in pairs[:5]] == [
        ("random, neighbours", "random, contrasts (T1w + T2w)"),
        ("random, both", "random, contrasts (T1w + T2w)"),
        ("random, neighbours", "random, contrasts (T1w)"),
        ("random, both", "random, contrasts (T1w)"),
        ("random, both", "random, neighbours"),
    ]
    assert len(pairs) == 10 and all(pair.holm is None and pair.label_fraction == 1.0 for pair in pairs)
    of = {(p.init, p.setting.stack, p.setting.contrasts): p for p in found if p.label_fraction == 1.0}
    a, b = of["scratch", "both", "T1w + T2w"], of["scratch", "contrasts", "T1w"]
    (pair,) = (p for p in pairs if (p.a, p.b) == ("scratch, both", "scratch, contrasts (T1w)"))
    gaps = [[float(v) for v in p.fold_values] for p in (a, b)]
    assert pair.corrected == corrected_t_test(*gaps, 80, 20)
    assert not isinstance(pair.interval, Undefined)
    assert pair.interval.estimate == pytest.approx(np.mean(np.subtract(*gaps)))
    one = [p for p in found if p.setting.stack == "both"]
    assert comparison.between_stacks(one, resamples=50) == []
