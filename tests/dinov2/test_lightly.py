"""Agreement with lightly's losses on the inputs of the official numbers, where the definitions agree.

They agree on DINO, iBOT and KoLeo on one worker with the moving centre. They differ in these, so nothing is compared:
Sinkhorn-Knopp (lightly 1.6.0 has none for DINO and iBOT); several workers (its centre is a mean of the workers' means,
ours the mean over all rows, which is not the same when masks differ in size); DINO of global and local views (lightly
has one mean over all pairs, the official code and ours two terms that add up to it); KoLeo under autocast (lightly
computes in the surrounding precision, the official code and ours in fp32).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cranium.dinov2 import centering, losses

FOLDER = Path(__file__).parents[1] / "reference"
INPUTS = np.load(FOLDER / "dinov2_b8931f7.npz")
LIGHTLY = np.load(FOLDER / "lightly_1.6.0.npz")
PAIRS = 2 * (2 + 8) - 2  # teacher and student views compared, an image's own view left out


def given(name: str) -> Tensor:
    return torch.from_numpy(INPUTS[name])


def agrees(got: Tensor, name: str) -> None:
    want = torch.from_numpy(LIGHTLY[name]).to(got.dtype)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_dino_and_its_centre_twice() -> None:
    centre = centering.MovingCentre(24)
    for number in range(2):
        teacher = given("teacher_global")
        targets = centre(teacher.flatten(0, 1), 0.07).view_as(teacher)
        views, local = (given(name).requires_grad_() for name in ("student_global", "student_local"))
        loss = losses.dino(views, targets, ignore_diagonal=True) + losses.dino(local, targets)
        loss = loss / PAIRS
        agrees(loss.detach(), f"dino{number}")
        for name, gradient in zip(
            ("global", "local"), torch.autograd.grad(loss, (views, local)), strict=True
        ):
            agrees(gradient, f"dino{number}.grad_{name}")
        agrees(centre.centre, f"dino{number}.centre")


def test_ibot_and_its_centre_twice() -> None:
    centre, masks = centering.MovingCentre(24), given("masks")
    weights = (1.0 / masks.sum(dim=1)).repeat_interleave(masks.sum(dim=1))
    for number in range(2):
        targets = centre(given("teacher_masked"), 0.07)
        masked = given("student_masked").requires_grad_()
        loss = losses.ibot(masked, targets, weights, len(masks))
        agrees(loss.detach(), f"ibot{number}")
        agrees(torch.autograd.grad(loss, masked)[0], f"ibot{number}.grad_masked")
        agrees(centre.centre, f"ibot{number}.centre")


def test_koleo_in_fp32_and_not_under_autocast() -> None:
    cls = given("cls").requires_grad_()
    loss = torch.stack([losses.koleo(view) for view in cls]).sum()
    agrees(loss.detach(), "koleo")
    agrees(torch.autograd.grad(loss, cls)[0], "koleo.grad")
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.stack([losses.koleo(view) for view in cls]).sum()
    assert torch.equal(ours, loss)
    theirs, ours = float(LIGHTLY["koleo.autocast"]), float(ours.detach())
    assert abs(theirs / ours - 1.0) > 1e-4  # the difference stated above
    assert theirs == pytest.approx(ours, rel=0.02)
