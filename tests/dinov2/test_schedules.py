"""Schedules at their corners."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from cranium.dinov2.schedules import Schedules, apply, cosine, scaled_lr


def test_corners() -> None:
    values = [cosine(step, 20, 1.0, 0.2, warmup=5, start=0.1) for step in range(25)]
    assert values[0] == 0.1
    assert values[4] == values[5] == 1.0  # the warm-up ends on the base, the cosine starts there
    assert values[2] == pytest.approx(0.55)
    assert values[20:] == [0.2] * 5
    assert all(a > b for a, b in pairwise(values[5:21]))
    assert cosine(10, 20, 1.0, 0.0) == pytest.approx(0.5)
    assert cosine(5, 20, 1.0, 0.0) == pytest.approx(0.5 + math.sqrt(0.125))
    assert cosine(0, 10, 1.0, 0.0, warmup=1) == 1.0


def test_scaling_rules() -> None:
    assert scaled_lr(4e-3, 64) == pytest.approx(1e-3)
    assert scaled_lr(4e-3, 64, "linear") == pytest.approx(2.5e-4)
    assert scaled_lr(4e-3, 64, "none") == 4e-3
    with pytest.raises(ValueError, match="rule"):
        scaled_lr(1.0, 1, "cubic")


def test_rates_of_a_run() -> None:
    schedules = Schedules(
        100,
        1e-3,
        warmup_steps=10,
        temperature_warmup_steps=30,
        freeze_last_layer_steps=5,
        freeze_backbone_steps=20,
    )
    first, sixth, later, last = (schedules.at(step) for step in (0, 5, 20, 100))
    assert (first.lr, first.last_layer_lr, first.backbone_lr) == (0.0, 0.0, 0.0)
    assert sixth.last_layer_lr == sixth.lr > sixth.backbone_lr == 0.0
    assert later.backbone_lr == later.lr
    assert (first.teacher_temperature, last.teacher_temperature) == (0.04, 0.07)
    assert schedules.at(29).teacher_temperature == pytest.approx(0.07)
    assert (first.momentum, last.momentum) == (0.992, 1.0)
    assert (first.weight_decay, last.weight_decay) == (0.04, 0.4)
    assert last.lr == 1e-6


def test_apply_writes_each_part() -> None:
    rates = Schedules(100, 1e-3, freeze_last_layer_steps=50).at(10)
    groups = [
        {"part": part, "lr_multiplier": 0.5, "decay_multiplier": decay}
        for part, decay in (("backbone", 1.0), ("head", 0.0), ("last_layer", 1.0))
    ]
    apply(rates, groups)
    assert [group["lr"] for group in groups] == [rates.lr / 2, rates.lr / 2, 0.0]
    assert [group["weight_decay"] for group in groups] == [rates.weight_decay, 0.0, rates.weight_decay]
