"""The probe that attends: finds the slice that matters, tuned inside its own subjects only."""

from __future__ import annotations

import numpy as np
import pytest

from cranium.models import attend
from cranium.models.attend import Bags
from cranium.models.probe import fit_linear

HOW = attend.Training(hidden=16, lr=0.02, batch_size=16, look_every=20, seed=0)


def needles(subjects: int, seed: int) -> tuple[Bags, np.ndarray]:
    """Twelve slices a subject; in class 1 one of them, marked by feature 0, carries the finding, which a mean hides."""
    rng = np.random.default_rng(seed)
    labels = np.arange(subjects) % 2
    values = rng.normal(size=(subjects, 12, 6))
    values[..., 0] = 0
    place = rng.integers(12, size=subjects)
    values[np.arange(subjects), place, 0] = 8
    values[np.arange(subjects), place, 1] = np.where(labels, 2.0, -2.0)
    return Bags(values.reshape(-1, 6), np.repeat(np.arange(subjects), 12)), labels


def fitted(bags: Bags, labels: np.ndarray, **changes: object) -> attend.AttentionProbe:
    settings = {"weight_decays": (0.01, 1.0), "steps": 160, "folds": 3, "num_classes": 2} | changes
    return attend.fit_attention(bags, labels, HOW, **settings)


def test_it_finds_the_slice_that_a_mean_hides() -> None:
    (bags, labels), (others, truth) = needles(48, 0), needles(48, 1)
    probe = fitted(bags, labels)
    right = (probe.predict(others).argmax(1) == truth).mean()
    mean = fit_linear(
        bags.values.reshape(48, 12, 6).mean(1), labels, c_grid=(0.01, 1.0, 100.0), folds=3, seed=0
    )
    by_mean = (mean.predict(others.values.reshape(48, 12, 6).mean(1)).argmax(1) == truth).mean()
    assert right >= 0.95 and right > by_mean + 0.1
    assert probe.chosen_by.startswith("log-loss over 3 inner folds") and probe.steps % 20 == 0


def test_labels_of_noise_get_few_steps_or_a_strong_decay() -> None:
    rng = np.random.default_rng(0)
    bags, labels = Bags(rng.normal(size=(24 * 4, 40)), np.repeat(np.arange(24), 4)), np.arange(24) % 2
    assert fitted(bags, labels, folds=4, weight_decays=(0.01,)).steps == 20  # more steps fit more noise
    assert fitted(bags, labels, folds=4).weight_decay == 1.0


def test_the_same_call_gives_the_same_probe() -> None:
    bags, labels = needles(12, 0)
    assert np.array_equal(fitted(bags, labels).predict(bags), fitted(bags, labels).predict(bags))


def test_one_of_a_class_is_too_few_to_choose_by_and_it_says_so() -> None:
    bags, labels = needles(6, 0)
    rows = np.array([0, 1, 2, 4])
    probe = fitted(bags.of(rows), labels[rows])
    assert "too few" in probe.chosen_by and probe.steps == 100
    with pytest.raises(ValueError, match="two classes"):
        fitted(bags.of(rows), np.zeros(4, int))


def test_bags_of_some_subjects_are_numbered_anew_in_the_order_asked() -> None:
    bags = Bags(np.arange(6.0)[:, None], np.array([0, 0, 1, 2, 2, 2]))
    some = bags.of(np.array([2, 0]))
    assert some.values[:, 0].tolist() == [3, 4, 5, 0, 1] and some.subject.tolist() == [0, 0, 0, 1, 1]
