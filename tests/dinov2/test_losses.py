"""Losses against their pseudo-code in float64, with gradients, and in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cranium.dinov2 import losses


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_dino_is_its_nested_loop(ignore_diagonal: bool) -> None:
    student = _random(2 if ignore_diagonal else 5, 3, 7).requires_grad_()
    teacher = _random(2, 3, 7, seed=1).softmax(-1)
    loop = torch.zeros((), dtype=torch.float64)
    for s in range(len(student)):
        for t in range(2):
            if ignore_diagonal and s == t:
                continue
            for b in range(3):
                log_q = student[s, b] / 0.1 - torch.logsumexp(student[s, b] / 0.1, 0)
                for k in range(7):
                    loop = loop - teacher[t, b, k] * log_q[k] / 3
    got = losses.dino(student, teacher, temperature=0.1, ignore_diagonal=ignore_diagonal)
    torch.testing.assert_close(got, loop)
    torch.testing.assert_close(_grad(got, student), _grad(loop, student))


def test_perfect_agreement_costs_the_entropy_and_has_no_gradient() -> None:
    teacher = _random(1, 4, 6).softmax(-1)
    student = (0.1 * teacher.log()).requires_grad_()
    loss = losses.dino(student, teacher, temperature=0.1)
    torch.testing.assert_close(loss, torch.special.entr(teacher).sum() / 4)
    assert _grad(loss, student).abs().max() < 1e-12


def test_ibot_is_the_mean_over_patches_then_over_all_images() -> None:
    owner = torch.tensor([0, 0, 0, 2, 2])  # images 1 and 3 of 4 have no masked patch
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2], dtype=torch.float64)
    student = _random(5, 7).requires_grad_()
    teacher = _random(5, 7, seed=1).softmax(-1)
    loop = torch.zeros((), dtype=torch.float64)
    for image in range(4):
        patches = [
            -(teacher[i] * (student[i] / 0.2).log_softmax(0)).sum() for i in range(5) if owner[i] == image
        ]
        loop = loop + (sum(patches) / len(patches) if patches else 0.0) / 4
    got = losses.ibot(student, teacher, weights, 4, temperature=0.2)
    torch.testing.assert_close(got, loop)
    torch.testing.assert_close(_grad(got, student), _grad(loop, student))


def test_ibot_without_a_masked_patch_is_a_zero_that_can_be_differentiated() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = losses.ibot(student, torch.zeros(0, 5), torch.zeros(0), 4)
    loss.backward()
    assert loss == 0.0 and student.grad is not None


def test_koleo_of_two_opposite_points_is_minus_log_2() -> None:
    assert losses.koleo(torch.tensor([[3.0, 0.0], [-0.5, 0.0]])).item() == pytest.approx(
        -math.log(2), abs=1e-6
    )


def test_koleo_is_its_nested_loop() -> None:
    x = _random(9, 4).requires_grad_()
    unit = x / x.norm(dim=1, keepdim=True)
    loop = torch.zeros((), dtype=torch.float64)
    for i in range(9):
        loop = loop - torch.stack([(unit[i] - unit[j]).norm() for j in range(9) if j != i]).min().log() / 9
    got = losses.koleo(x)
    # The official small terms (1e-8) shift the value.
    torch.testing.assert_close(got, loop, rtol=0, atol=1e-7)
    torch.testing.assert_close(_grad(got, x), _grad(loop, x), rtol=0, atol=1e-6)


def test_koleo_neighbours_may_live_elsewhere() -> None:
    mine, theirs = _random(3, 4), _random(5, 4, seed=1)
    together = torch.cat([mine, theirs])
    got = losses.koleo(mine, lambda x: torch.cat([x, theirs]))
    torch.testing.assert_close(got, losses.koleo(together))


def test_koleo_survives_collapse_and_a_single_row() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    loss = losses.koleo(x)
    loss.backward()
    assert loss.isfinite() and loss > 15 and x.grad is not None and x.grad.isfinite().all()
    assert losses.koleo(torch.ones(1, 4)) == 0.0


def test_bf16_does_not_reach_the_losses() -> None:
    x = _random(6, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses.koleo(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, losses.koleo(x))
    low = x.bfloat16()[None]
    assert losses.dino(low, low.float().softmax(-1)).dtype == torch.float32


def test_the_gradient_that_is_written_out_is_the_one_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that do not sum to 1, in the parts that a CPU works in, each row weighted."""
    targets, weights = _random(7, 11, seed=1).exp(), _random(7, seed=2)

    def plain(logits: Tensor) -> Tensor:
        return -(targets * torch.log_softmax(logits / 0.3, dim=-1)).sum(dim=-1)

    want = _random(7, 11).requires_grad_()
    expected = plain(want)
    slope = _grad((expected * weights).sum(), want)
    for at_once in (1, 25, 1 << 18):
        monkeypatch.setattr(losses, "_AT_ONCE", at_once)
        logits = _random(7, 11).requires_grad_()
        got = losses.soft_cross_entropy(logits, targets, 0.3)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(_grad((got * weights).sum(), logits), slope)


def test_scores_in_bf16_are_judged_in_fp32_and_their_gradient_is_bf16() -> None:
    logits = _random(3, 50).bfloat16().requires_grad_()
    targets = _random(3, 50, seed=1).softmax(-1).float()
    got = losses.soft_cross_entropy(logits, targets, 0.1)
    want = logits.detach().double().requires_grad_()
    exact = losses.soft_cross_entropy(want, targets.double(), 0.1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-5)
    slope = _grad(got.sum(), logits)
    assert slope.dtype == torch.bfloat16
    torch.testing.assert_close(slope, _grad(exact.sum(), want).bfloat16(), rtol=1e-2, atol=1e-4)
