"""The models of all folds together on an external cohort, by hand and by DeLong's test of the means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cranium.tasks import comparison, ensembles
from cranium.tasks.comparison import Cell, Setting
from cranium.tasks.metrics import Undefined, auroc
from cranium.tasks.statistics import DeLong, Fold, delong, holm

SETTING = Setting("lesion", "demo", "T1w", "contrasts", "subject", "linear")
LABELS = np.arange(40) % 2


def cell(
    init: str, fold: int, gain: float, fraction: float = 1.0, groups: int = 40, classes: int = 2
) -> Cell:
    rng = np.random.default_rng([fold, int(gain * 10)])

    def scores(labels: np.ndarray, name: str) -> Fold:
        score = 1 / (1 + np.exp(-(gain * labels + rng.normal(size=len(labels)))))
        rest = np.repeat((1 - score)[:, None] / (classes - 1), classes - 1, axis=1)
        groups_of = [f"{name}{k % groups}" for k in range(len(labels))]
        return Fold(labels, np.append(rest, score[:, None], axis=1), groups_of)

    tests = {"test": scores(LABELS[:20], f"s{fold}-"), "away": scores(LABELS, "e")}
    return Cell(SETTING, init, fraction, fold, 0, 80, 40, 0, 20, tests, "", f"{init}-{fold}")


def made(**changed: object) -> list[Cell]:
    gains = {"random": 0.2, "scratch": 0.8, "brainfound": 1.4}
    return [cell(init, k, gain, **changed) for init, gain in gains.items() for k in range(5)]


def test_a_pair_is_delongs_test_of_the_mean_probabilities_and_holm_is_over_the_cohort() -> None:
    cells = [*made(), *made(fraction=0.5)]
    found = ensembles.pairs(comparison.points(cells, resamples=50))
    assert [(pair.a, pair.b, pair.test) for pair in found] == [
        ("scratch", "random", "away"),
        ("brainfound", "random", "away"),
        ("brainfound", "scratch", "away"),
    ]
    means = {
        init: sum(c.tests["away"].probs[:, 1] for c in cells if c.init == init and c.label_fraction == 1) / 5
        for init in ("random", "scratch", "brainfound")
    }
    for pair in found:
        expected = delong(LABELS, means[pair.a], means[pair.b])
        assert isinstance(pair.found, DeLong) and isinstance(expected, DeLong)
        assert pair.found.p == pytest.approx(expected.p, rel=1e-9)
        assert pair.found.auroc_a == pytest.approx(auroc(LABELS, means[pair.a]), abs=1e-12)
    assert [pair.holm for pair in found] == holm([pair.found.p for pair in found])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"groups": 8}, "40 subjects of 8 groups: DeLong takes each for independent"),
        ({"classes": 3}, "DeLong's test is of two classes, not of 3"),
    ],
)
def test_what_delong_is_not_of_is_undefined_with_its_reason(changed: dict[str, int], reason: str) -> None:
    found = ensembles.pairs(comparison.points(made(**changed), resamples=50))
    assert len(found) == 3
    assert all(pair.found == pair.holm == Undefined(reason) for pair in found)


def test_models_of_other_subjects_and_of_nothing_are_no_ensemble() -> None:
    one, *rest = made()
    other = replace(one, tests={**one.tests, "away": replace(one.tests["away"], labels=1 - LABELS)})
    for changed, reason in (
        (other, "not tested on the same subjects"),
        (replace(one, unlearnable="one class"), "one class"),
    ):
        found = ensembles.pairs(comparison.points([changed, *rest], resamples=50))
        assert [isinstance(pair.found, Undefined) for pair in found] == [True, True, False]
        assert isinstance(found[0].found, Undefined) and reason in found[0].found.reason


def test_rows_without_a_backbone_meet_each_other_once() -> None:
    cells = [
        cell(init, k, gain)
        for init, gain in (("random", 0.1), ("cnn", 0.9), ("volumes", 0.5))
        for k in range(3)
    ]
    dear = [replace(c, setting=SETTING._replace(adaptation="finetune")) for c in cells]
    names = [
        (p.a, p.b, p.setting.adaptation) for p in ensembles.pairs(comparison.points([*cells, *dear], 50))
    ]
    assert sum({"cnn", "volumes"} == {a, b} for a, b, _ in names) == 1 and len(names) == 5
