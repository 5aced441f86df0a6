"""What a worker does within a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cranium import stream, training
from cranium.config import Loss, Optimiser, Pretrain
from cranium.dinov2.method import DINOv2, Student
from cranium.dinov2.schedules import scaled_momentum
from cranium.models import vit


def build(accumulate: int) -> tuple[Pretrain, DINOv2]:
    spec = Pretrain.model_validate(
        {
            "cohorts": ["tiny"],
            "arch": "vit_tiny_patch14",
            "batch_size": 8,
            "accumulate": accumulate,
            "crops": {"global_size": 28, "local_size": 14, "num_local": 2},
            "loss": {"prototypes": 32, "head_hidden": 32, "head_bottleneck": 16},
            "precision": "fp32",
        }
    )
    torch.manual_seed(0)
    objective = training.method_spec(spec.crops, spec.loss)
    return spec, DINOv2(Student(vit.build("vit_tiny_patch14", image_size=28).train(), objective), objective)


def batch(rows: slice = slice(0, 8)) -> stream.Batch:
    rng = np.random.default_rng(0)
    stacks = torch.from_numpy(rng.integers(1, 255, (8, 3, 1, 28, 28), dtype=np.uint8))
    return stream.Batch(
        0, stacks[rows], torch.ones(8, 3, dtype=torch.bool)[rows], np.arange(8)[rows], np.arange(8)[rows]
    )


def gradients(method: DINOv2) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in method.plain_student.named_parameters() if p.grad is not None}


def test_accumulated_gradients_are_the_mean_of_those_of_the_parts(tmp_path: Path) -> None:
    run = training.Run(tmp_path, torch.device("cpu"), 1, None, {})
    spec, method = build(2)
    terms = training._backward(spec, method, batch(), 0.05, run)
    together = gradients(method)
    alone, parts = [], []
    for rows in (slice(0, 4), slice(4, 8)):
        single, method = build(1)
        parts.append(training._backward(single, method, batch(rows), 0.05, run))
        alone.append(gradients(method))
    assert together.keys() == alone[0].keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["loss"], (parts[0]["loss"] + parts[1]["loss"]) / 2)
    assert len(terms["teacher_cls"]) == 16


def test_a_batch_that_the_parts_do_not_share_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulate"):
        Pretrain.model_validate({"cohorts": ["a"], "batch_size": 6, "accumulate": 4})


def test_momentum_follows_the_batch() -> None:
    """Averaging over as many stacks: two steps of half the batch forget what one step forgets."""
    half = scaled_momentum(0.99, 32, 64)
    assert half**2 == pytest.approx(0.99) and scaled_momentum(1.0, 32, 64) == 1.0
    spec = Optimiser(momentum=(0.99, 1.0), momentum_batch=64)
    assert training.rates(spec, Loss(), 10, 32).at(0).momentum == pytest.approx(half)
    assert training.rates(Optimiser(momentum=(0.99, 1.0)), Loss(), 10, 32).at(0).momentum == 0.99
