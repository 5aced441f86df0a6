"""The whole objective: the same on one and two workers, a teacher without gradient, exact state."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from setups import CROPS, batch, build, run  # type: ignore[import-not-found]

from cranium.dinov2 import crops, losses, masking, method, schedules
from cranium.dinov2.centering import MovingCentre, sinkhorn


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes, each with every other row of the batch, make of it under DDP."""
    folder, here = tmp_path_factory.mktemp("workers"), Path(__file__).parent
    paths = os.pathsep.join(
        [str(here.parents[1] / "platform"), str(here)]
    )  # a safe path leaves the script's folder out
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    arguments = ["2", str(folder / "meet"), str(folder / "out.pt")]
    processes = [
        subprocess.Popen([sys.executable, str(here / "worker.py"), str(rank), *arguments], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    result: dict[str, Any] = torch.load(folder / "out.pt", weights_only=True)
    return result


@pytest.mark.parametrize("centering", ["sinkhorn", "moving"])
def test_two_workers_do_what_one_does(two_workers: dict[str, Any], centering: str) -> None:
    two, one = two_workers[centering], run(build(centering), *batch())
    for got, expected in zip(two["terms"], one["terms"], strict=True):
        assert got.keys() == expected.keys()
        for name in expected.keys() - {"teacher_cls"}:  # each worker's own rows
            torch.testing.assert_close(got[name], expected[name], rtol=2e-5, atol=2e-6, msg=name)
    for part in ("gradients", "state"):
        assert two[part].keys() == one[part].keys()
        for name, expected in one[part].items():
            worst = (two[part][name] - expected).abs().max()
            assert worst <= 2e-5 * expected.abs().max().clamp(min=1e-2), (name, worst)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("arch", ["vit_tiny_patch14", "vit_tiny_patch14_reg4"])
def test_the_tuned_step_is_the_plain_one(drop_path: float, arch: str) -> None:
    """Losses, gradients, and what two steps leave: in float64, where another order of the same sums hardly shows."""
    found = []
    for tuned in (True, False):
        made = build(drop_path=drop_path, arch=arch, tuned=tuned, koleo_weight=0.1)
        made.plain_student.double(), made.teacher.double()
        assert made.teacher.tuned == tuned
        found.append(run(made, *batch()))
    fast, plain = found
    for got, expected in zip(fast["terms"], plain["terms"], strict=True):
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-9, msg=name)
    for part in ("gradients", "state"):
        assert fast[part].keys() == plain[part].keys()
        for name, expected in plain[part].items():
            torch.testing.assert_close(fast[part][name], expected, rtol=1e-8, atol=1e-9, msg=name)


def test_the_tuned_step_in_bf16_is_as_far_from_fp32_as_the_plain_one() -> None:
    """Over eight draws: how far rounding takes a single one is chance, and another processor rounds elsewhere."""

    def gradients(tuned: bool, precision: torch.dtype | None, seed: int) -> torch.Tensor:
        made = build(drop_path=0.0, tuned=tuned, koleo_weight=0.1)
        out = made.losses(*batch(), 0, seed=seed, teacher_temperature=0.05, precision=precision)
        out["total"].backward()
        return torch.cat([p.grad.flatten() for p in made.plain_student.parameters()])

    def distance(tuned: bool, seed: int) -> float:
        exact = gradients(False, None, seed)
        return float((gradients(tuned, torch.bfloat16, seed) - exact).norm() / exact.norm())

    tuned, plain = ([distance(way, seed) for seed in range(8)] for way in (True, False))
    assert sum(tuned) < 1.25 * sum(plain) and max(plain) < 0.1


def test_a_network_of_which_a_step_drops_everything_still_has_every_gradient() -> None:
    made = build(drop_path=0.97)
    stacks, present, rows = batch(2)
    made.losses(stacks, present, rows, 0, seed=3, teacher_temperature=0.05)["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.plain_student.parameters())


def test_terms_are_the_losses_of_the_parts() -> None:
    tiny = build(drop_path=0.0)
    stacks, present, rows = batch()
    out = tiny.losses(stacks, present, rows, 0, seed=3, teacher_temperature=0.05)
    views, local = crops.apply(stacks, present, crops.sample(rows, 0, 3, CROPS, size=(64, 64)), CROPS)
    masks = torch.from_numpy(masking.sample(rows, 0, 3, 4)).flatten(0, 1)
    student, teacher = tiny.plain_student, tiny.teacher
    with torch.no_grad():
        seen, hidden = teacher.backbone(views.flatten(0, 1)), student.backbone(views.flatten(0, 1), masks)
        targets = sinkhorn(teacher.dino_head(seen.cls), 0.05).view(2, 4, -1)
        scores = student.dino_head(hidden.cls).view(2, 4, -1)
        local_scores = student.dino_head(student.backbone(local.flatten(0, 1)).cls).view(2, 4, -1)
        crossed = sum(losses.dino(scores[[s]], targets[[1 - s]]) for s in range(2))
        torch.testing.assert_close(out["dino_global"], crossed / 6)  # 2 global and 2 x 2 local pairs
        torch.testing.assert_close(out["dino_local"], losses.dino(local_scores, targets) / 6)
        koleo = losses.koleo(hidden.cls[:4]) + losses.koleo(hidden.cls[4:])
        torch.testing.assert_close(out["koleo"], koleo)
        patch_targets = sinkhorn(teacher.dino_head(seen.patches[masks]), 0.05)
        patch_scores = student.dino_head(hidden.patches[masks])
        ibot = torch.zeros(())
        owner = masks.nonzero()[:, 0]
        for image in range(8):
            if masks[image].any():
                own = losses.soft_cross_entropy(patch_scores, patch_targets, 0.1)[owner == image]
                ibot += own.mean() / 8
        torch.testing.assert_close(out["ibot"], ibot)
    torch.testing.assert_close(out["loss"], out["dino_global"] + out["dino_local"] + ibot + koleo)
    torch.testing.assert_close(out["total"].detach(), out["loss"])
    torch.testing.assert_close(out["target_entropy"], torch.special.entr(targets).sum(-1).mean())
    assert out["prototypes_used"] == len(targets.argmax(-1).unique()) / 32
    unit = torch.nn.functional.normalize(seen.cls, dim=-1)
    torch.testing.assert_close(out["feature_std"], unit.std(0, correction=0).mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"shared_head": False, "unit_prototypes": False, "centering": "moving"}]
)
def test_the_gradient_is_the_slope_of_the_loss(options: dict[str, Any]) -> None:
    """In float64, with stochastic depth and masks on: central differences along a direction, part by part."""
    tiny = build(**{"centering": "sinkhorn", **options})
    for network in (tiny.plain_student, tiny.teacher):
        network.double()

    def loss() -> torch.Tensor:
        if options:  # each call starts from the same centres
            tiny.centres = {name: MovingCentre(32) for name in ("dino", "ibot")}
        return tiny.losses(*batch(), 0, seed=3, teacher_temperature=0.05)["total"]

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for part, module in tiny.plain_student.named_children():
        moved = list(module.parameters())
        ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in moved]
        slope = sum(
            float((p.grad * way).sum()) for p, way in zip(moved, ways, strict=True) if p.grad is not None
        )
        ends = []
        with torch.no_grad():
            for step in (1e-7, -2e-7, 1e-7):
                for parameter, way in zip(moved, ways, strict=True):
                    parameter.add_(way, alpha=step)
                ends.append(float(loss()))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-7, rel=1e-5), part


@pytest.mark.parametrize("shared", [True, False])
def test_all_of_the_student_learns_and_nothing_of_the_teacher(shared: bool) -> None:
    tiny = build(shared_head=shared)
    out = tiny.losses(*batch(), 0, seed=3, teacher_temperature=0.05)
    out["total"].backward()
    assert [name for name, p in tiny.plain_student.named_parameters() if p.grad is None] == []
    assert all(p.grad is None and not p.requires_grad for p in tiny.teacher.parameters())
    assert not tiny.teacher.training
    assert (tiny.plain_student.ibot_head is None) == shared


def test_switched_off_terms_leave_no_idle_parameter() -> None:
    crops_alone = dataclasses.replace(CROPS, num_local=0)
    tiny = build(ibot_weight=0.0, koleo_weight=0.0, shared_head=False, crops=crops_alone)
    out = tiny.losses(*batch(), 0, seed=3, teacher_temperature=0.05)
    assert {"ibot", "koleo"}.isdisjoint(out) and out["dino_local"] == 0.0
    out["total"].backward()
    idle = [n for n, p in tiny.plain_student.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert not tiny.plain_student.backbone.mask_token.requires_grad


def test_a_step_is_a_function_of_seed_step_and_rows() -> None:
    tiny = build()
    stacks, present, rows = batch()

    def loss(step: int, seed: int) -> float:
        return float(tiny.losses(stacks, present, rows, step, seed=seed, teacher_temperature=0.05)["loss"])

    assert loss(1, 3) == loss(1, 3)
    assert len({loss(1, 3), loss(2, 3), loss(1, 4)}) == 3


def test_the_teacher_moves_by_one_less_momentum() -> None:
    tiny = build()
    with torch.no_grad():
        for parameter in tiny.plain_student.parameters():
            parameter += 1.0
    before = [parameter.clone() for parameter in tiny.teacher.parameters()]
    tiny.update_teacher(0.75)
    for old, new in zip(before, tiny.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)


def test_state_is_plain_tensors_and_resumes_exactly(tmp_path: Path) -> None:
    first, second = build("moving"), build("moving")
    run(first, *batch())
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.centres["dino"].centre.any()
    again = [run(tiny, *batch()) for tiny in (first, second)]
    for name, tensor in again[0]["state"].items():
        assert torch.equal(tensor, again[1]["state"][name]), name
    with pytest.raises(KeyError):
        second.load_state_dict({k: v for k, v in first.state_dict().items() if k != "centre.ibot"})


def test_bf16_networks_fp32_losses() -> None:
    tiny = build()
    precise = tiny.losses(*batch(), 0, seed=3, teacher_temperature=0.05)
    rough = tiny.losses(*batch(), 0, seed=3, teacher_temperature=0.05, precision=torch.bfloat16)
    assert rough["total"].dtype == torch.float32
    assert rough["dino_global"] != precise["dino_global"]
    torch.testing.assert_close(rough["dino_global"], precise["dino_global"], rtol=0.02, atol=0)


def test_groups_hold_each_parameter_once_with_its_layers_rate() -> None:
    student = build(shared_head=False).plain_student
    groups = method.parameter_groups(student, 0.04, 0.5, 0.2)
    by_id = {id(p): group for group in groups for p in group["params"]}
    assert len(by_id) == sum(len(group["params"]) for group in groups) == len(list(student.parameters()))
    rates = {name: by_id[id(p)] for name, p in student.named_parameters()}
    assert rates["backbone.vit.pos_embed"]["lr_multiplier"] == 0.5**7
    assert rates["backbone.vit.patch_embed.proj.weight"]["lr_multiplier"] == pytest.approx(0.2 * 0.5**7)
    assert rates["backbone.vit.blocks.0.attn.qkv.weight"]["lr_multiplier"] == 0.5**6
    assert rates["backbone.vit.blocks.5.mlp.fc1.weight"]["lr_multiplier"] == 0.5
    assert rates["backbone.vit.norm.weight"]["lr_multiplier"] == 1.0
    assert rates["ibot_head.mlp.0.weight"]["part"] == "head"
    assert rates["ibot_head.prototypes"]["part"] == rates["dino_head.prototypes"]["part"] == "last_layer"
    for name, parameter in student.named_parameters():
        vector = parameter.ndim < 2 and not name.endswith("mask_token")
        assert (rates[name]["weight_decay"] == 0.0) == vector, name


def test_each_module_is_clipped_on_its_own() -> None:
    student = build(shared_head=False).plain_student
    modules = {"backbone": student.backbone, "dino_head": student.dino_head, "ibot_head": student.ibot_head}
    for size, module in zip((10.0, 0.5, 6.0), modules.values(), strict=True):
        assert module is not None
        count = sum(p.numel() for p in module.parameters())
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, size / count**0.5)
    before = {name: float(norm) for name, norm in method.clip_gradients(student, 3.0).items()}
    assert before == pytest.approx({"backbone": 10.0, "dino_head": 0.5, "ibot_head": 6.0}, rel=1e-4)
    norms = {
        name: float(torch.cat([p.grad.flatten().double() for p in module.parameters()]).norm())  # type: ignore[union-attr]
        for name, module in modules.items()
    }
    assert norms == pytest.approx({"backbone": 3.0, "dino_head": 0.5, "ibot_head": 3.0}, rel=1e-4)


def test_continuing_warms_the_heads_while_the_backbone_and_the_last_layer_stand_still() -> None:
    """Loaded weights are the student's and the teacher's; two frozen steps change no bit of them."""
    tiny = build(drop_path=0.0, unit_prototypes=False)
    loaded = {name: t.clone() for name, t in tiny.plain_student.backbone.state_dict().items()}
    optimiser = torch.optim.AdamW(method.parameter_groups(tiny.plain_student, 0.4, 0.9, 0.2))
    plan = schedules.Schedules(4, 1e-2, freeze_backbone_steps=2, freeze_last_layer_steps=1)
    heads = [{name: t.clone() for name, t in tiny.plain_student.dino_head.state_dict().items()}]
    for step in range(3):
        rates = plan.at(step)
        schedules.apply(rates, optimiser.param_groups)
        out = tiny.losses(*batch(), step, seed=3, teacher_temperature=rates.teacher_temperature)
        optimiser.zero_grad()
        out["total"].backward()
        optimiser.step()
        tiny.update_teacher(rates.momentum)
        heads.append({name: t.clone() for name, t in tiny.plain_student.dino_head.state_dict().items()})
        for network in (tiny.plain_student, tiny.teacher):
            state = network.backbone.state_dict()
            still = [torch.equal(state[name], loaded[name]) for name in loaded]
            assert all(still) if step < 2 else not all(still)
    for name in ("prototypes", "prototype_norms"):
        assert torch.equal(heads[1][name], heads[0][name]) and not torch.equal(heads[2][name], heads[1][name])
    assert not torch.equal(heads[1]["mlp.0.weight"], heads[0]["mlp.0.weight"])


def test_it_learns() -> None:
    tiny = build(drop_path=0.0, koleo_weight=0.1)
    optimiser = torch.optim.AdamW(method.parameter_groups(tiny.plain_student, 0.04, 1.0, 1.0))
    plan = schedules.Schedules(15, 3e-3)
    history = []
    for step in range(15):
        rates = plan.at(step)
        schedules.apply(rates, optimiser.param_groups)
        out = tiny.losses(*batch(), 0, seed=3, teacher_temperature=rates.teacher_temperature)
        optimiser.zero_grad()
        out["total"].backward()
        optimiser.step()
        tiny.update_teacher(rates.momentum)
        history.append(float(out["dino_global"] + out["dino_local"]))
    assert history[-1] < history[0] - 0.3, history
