"""Alarms ring for what they name and for nothing else; effective rank in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from cranium.dinov2 import health

HEALTHY = {
    "train/target_entropy": 3.0,
    "train/feature_std": 0.08,
    "train/effective_rank": 20.0,
    "train/grad_norm_backbone": 1.0,
    "sys/data_wait_share": 0.01,
}


def found(change: dict[str, float], begin: int = 40, length: int = 60) -> list[health.Alarm]:
    entries = [(s, HEALTHY | (change if begin <= s < begin + length else {})) for s in range(100)]
    return health.alarms(entries, steps=100, prototypes=64, dim=64)


def test_effective_rank_in_closed_form() -> None:
    assert health.effective_rank(torch.eye(8)) == pytest.approx(8, rel=1e-5)
    assert health.effective_rank(torch.ones(5, 3)) == pytest.approx(1, rel=1e-3)
    two = torch.diag(torch.tensor([3.0, 1.0]))  # shares 3/4 and 1/4
    assert health.effective_rank(two) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert health.effective_rank(torch.zeros(4, 4)) == pytest.approx(1)


def test_a_healthy_run_has_no_alarm() -> None:
    assert found({}) == []
    assert health.alarms([], steps=100, prototypes=64, dim=64) == []


@pytest.mark.parametrize(
    ("code", "change", "step"),
    [
        ("COLLAPSED", {"train/target_entropy": 0.1}, 49),
        ("UNIFORM", {"train/target_entropy": math.log(64) * 0.99}, 49),
        ("FEATURES", {"train/feature_std": 0.01}, 49),
        ("RANK", {"train/effective_rank": 1.2}, 49),
        ("STARVED", {"sys/data_wait_share": 0.3}, 49),
        ("SPIKE", {"train/grad_norm_backbone": 11.0}, 40),
    ],
)
def test_each_alarm(code: str, change: dict[str, float], step: int) -> None:
    assert [(alarm.code, alarm.step) for alarm in found(change)] == [(code, step)]


def test_one_odd_batch_and_uniform_targets_at_the_start_are_no_alarm() -> None:
    assert found({"train/feature_std": 0.0}, begin=50, length=9) == []
    assert found({"train/target_entropy": math.log(64)}, begin=0, length=25) == []


def test_an_alarm_says_when_it_was_last_seen_and_how_far_a_spike_went() -> None:
    (flat,) = found({"train/feature_std": 0.0}, begin=20, length=30)
    assert (flat.step, flat.last) == (29, 49)
    entries = [
        (s, HEALTHY | {"train/grad_norm_backbone": {50: 15.0, 70: 40.0}.get(s, 1.0)}) for s in range(100)
    ]
    (spike,) = health.alarms(entries, steps=100, prototypes=64, dim=64)
    assert (spike.step, spike.last) == (50, 70) and "40 times" in spike.seen
