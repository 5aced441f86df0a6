"""Agreement with the official DINOv2 code: its numbers from equal inputs (see `tests/reference/README.md`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cranium.dinov2 import centering, losses, masking
from cranium.dinov2.head import Head
from cranium.dinov2.method import MethodSpec, Student, parameter_groups
from cranium.dinov2.schedules import cosine
from cranium.models import vit

OFFICIAL = np.load(Path(__file__).parents[1] / "reference" / "dinov2_b8931f7.npz")
MODELS = np.load(Path(__file__).parents[1] / "reference" / "dinov2_models_b8931f7.npz")
PAIRS = 2 * (2 - 1 + 8)  # student and teacher views compared, per image


def given(name: str) -> Tensor:
    return torch.from_numpy(OFFICIAL[name])


def agrees(got: Tensor, name: str) -> None:
    """rtol 1e-5 in fp32, of the largest entry where entries cross zero."""
    want = given(name).to(got.dtype)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("mode", "rounds"), [("sinkhorn", 1), ("centering", 2)])
def test_targets_losses_and_gradients(mode: str, rounds: int) -> None:
    centres = [centering.MovingCentre(24) for _ in range(2)]
    masks = given("masks")
    weights = (1.0 / masks.sum(dim=1)).repeat_interleave(masks.sum(dim=1))
    for number in range(rounds):
        tag = f"{mode}{number}"
        teacher, patches = given("teacher_global"), given("teacher_masked")
        if mode == "sinkhorn":
            targets = centering.sinkhorn(teacher.flatten(0, 1), 0.07)
            patch_targets = centering.sinkhorn(patches, 0.07)
        else:
            targets = centres[0](teacher.flatten(0, 1), 0.07)
            patch_targets = centres[1](patches, 0.07)
        targets = targets.view_as(teacher)
        agrees(targets, f"{tag}.targets")
        agrees(patch_targets, f"{tag}.patch_targets")
        views, local, masked = (
            given(name).requires_grad_() for name in ("student_global", "student_local", "student_masked")
        )
        terms = {
            "dino_global": losses.dino(views, targets, ignore_diagonal=True) / PAIRS,
            "dino_local": losses.dino(local, targets) / PAIRS,
            "ibot": losses.ibot(masked, patch_targets, weights, len(masks)),
        }
        for name, term in terms.items():
            agrees(term.detach(), f"{tag}.{name}")
        for name, term, x in zip(
            ("global", "local", "masked"), terms.values(), (views, local, masked), strict=True
        ):
            agrees(torch.autograd.grad(term, x)[0], f"{tag}.grad_{name}")


def test_koleo() -> None:
    cls = given("cls").requires_grad_()
    loss = torch.stack([losses.koleo(view) for view in cls]).sum()
    agrees(loss.detach(), "koleo")
    agrees(torch.autograd.grad(loss, cls)[0], "koleo.grad")


def test_head() -> None:
    head = Head(16, 20, 12, 24)
    state = {
        name.removeprefix("head."): given(name) for name in OFFICIAL.files if name.startswith("head.mlp.")
    }
    assert given("head.last_layer.weight_g").unique().tolist() == [1.0]  # unit prototypes, as ours stay
    head.load_state_dict({**state, "prototypes": given("head.last_layer.weight_v")})
    agrees(head(given("head.tokens")).detach(), "head.scores")


def test_head_with_learned_norms_and_its_gradients() -> None:
    head = Head(16, 20, 12, 24, unit_prototypes=False)
    assert head.prototype_norms is not None and head.prototype_norms.unique().tolist() == [
        1.0
    ]  # at the start
    state = {
        n.removeprefix("head."): torch.from_numpy(MODELS[n])
        for n in MODELS.files
        if n.startswith("head.mlp.")
    }
    names = {"prototypes": "weight_v", "prototype_norms": "weight_g"}
    last = {ours: torch.from_numpy(MODELS[f"head.last_layer.{theirs}"]) for ours, theirs in names.items()}
    head.load_state_dict({**state, **last})
    scores = head(torch.from_numpy(MODELS["head.tokens"]))
    np.testing.assert_allclose(scores.detach(), MODELS["head.scores"], rtol=1e-5, atol=1e-6)
    (scores * torch.from_numpy(MODELS["head.weights"])).sum().backward()
    for name, parameter in head.named_parameters():
        want = MODELS[f"head.grad.{'last_layer.' + names[name] if name in names else name}"]
        assert parameter.grad is not None
        np.testing.assert_allclose(
            parameter.grad, want, rtol=1e-5, atol=1e-5 * np.abs(want).max(), err_msg=name
        )


def test_rates_and_decay_of_every_parameter() -> None:
    """Layer-wise rates 0.9, the patch embedding's 0.2, what decays, and what is the last layer."""
    groups = json.loads(str(MODELS["groups"]))
    backbone = vit.build("vit_tiny_patch14_reg4", image_size=56)
    spec = MethodSpec(prototypes=24, head_hidden=20, head_bottleneck=12, unit_prototypes=False)
    student = Student(backbone, spec)
    by_id = {id(p): group for group in parameter_groups(student, 0.04, 0.9, 0.2) for p in group["params"]}
    ours = {name: by_id[id(p)] for name, p in student.named_parameters()}
    outside = {"mask_token": "backbone.mask_token", "register_tokens": "backbone.vit.reg_token"}
    head = {"last_layer.weight_g": "prototype_norms", "last_layer.weight_v": "prototypes"}
    theirs = [(outside.get(name, f"backbone.vit.{name}"), *rest) for name, *rest in groups["backbone"]]
    theirs += [(f"dino_head.{head.get(name, name)}", *rest) for name, *rest in groups["head"]]
    assert {name for name, *_ in theirs} == set(ours)
    for name, rate, decay, last in theirs:
        group = ours[name]
        assert group["lr_multiplier"] == pytest.approx(rate, rel=1e-12), name
        assert group["decay_multiplier"] == decay and group["weight_decay"] == 0.04 * decay, name
        assert (group["part"] == "last_layer") == last, name


@pytest.mark.parametrize("name", ["lr", "wd", "momentum", "temperature"])
def test_schedules(name: str) -> None:
    base, final, total, warmup, start = OFFICIAL[f"schedule.{name}.args"].tolist()
    got = [cosine(step, int(total), base, final, int(warmup), start) for step in range(55)]
    np.testing.assert_allclose(got, OFFICIAL[f"schedule.{name}"], rtol=1e-12, atol=1e-15)


def test_masks_are_as_blocky() -> None:
    """Random masks are compared by their statistics. Ours hide exactly what was asked; theirs may fall short."""
    for want, count, _, pairs, _, middle, edge in OFFICIAL["masking"]:
        random = np.random.default_rng([7, int(want)])
        masks = np.stack([masking.draw_blocks(random, 16, int(want)) for _ in range(1000)])
        assert (masks.sum(axis=(1, 2)) == want).all() and want - count < 0.5
        neighbours = (masks[:, 1:] & masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] & masks[:, :, :-1]).sum(
            (1, 2)
        )
        # Neighbours hidden together tell how blocky a mask is; the shares, where the blocks lie.
        assert neighbours.mean() == pytest.approx(pairs, rel=0.02)
        assert masks[:, 4:12, 4:12].mean() == pytest.approx(middle, abs=0.015)
        assert masks[:, [0, -1]].mean() == pytest.approx(edge, abs=0.015)
