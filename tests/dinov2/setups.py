"""A tiny method and batch, the same in every process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cranium.dinov2.crops import CropSpec
from cranium.dinov2.method import DINOv2, MethodSpec, Student, parameter_groups
from cranium.models import vit

CROPS = CropSpec(num_local=2, global_size=56, local_size=28)


def build(
    centering: str = "sinkhorn",
    drop_path: float = 0.2,
    arch: str = "vit_tiny_patch14",
    tuned: bool = True,
    **options: Any,
) -> DINOv2:
    torch.manual_seed(0)
    spec = MethodSpec(
        **{
            "crops": CROPS,
            "prototypes": 32,
            "head_hidden": 16,
            "head_bottleneck": 8,
            "koleo_weight": 1.0,
            "centering": centering,
            **options,
        }
    )
    backbone = vit.build(arch, image_size=56, drop_path=drop_path)
    return DINOv2(Student(backbone, spec, tuned=tuned), spec)


def batch(rows: int = 4) -> tuple[Tensor, Tensor, np.ndarray[Any, np.dtype[np.int64]]]:
    random = torch.Generator().manual_seed(1)
    stacks = torch.zeros(rows, 3, 1, 64, 64, dtype=torch.uint8)
    stacks[..., 10:50, 12:52] = torch.randint(1, 256, (rows, 3, 1, 40, 40), generator=random).byte()
    return stacks, torch.ones(rows, 3, dtype=torch.bool), np.arange(100, 100 + rows)


def run(method: DINOv2, stacks: Tensor, present: Tensor, rows: Any, **collectives: Any) -> dict[str, Any]:
    """Two SGD steps with the teacher's update; losses of both, the first gradients, and the state after."""
    optimiser = torch.optim.SGD(parameter_groups(method.plain_student, 0.0, 1.0, 1.0), lr=0.1)
    terms, gradients = [], {}
    for step in range(2):
        out = method.losses(stacks, present, rows, step, seed=3, teacher_temperature=0.05, **collectives)
        optimiser.zero_grad()
        out["total"].backward()
        if step == 0:
            named = method.plain_student.named_parameters()
            gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        optimiser.step()
        method.update_teacher(0.9)
        terms.append({name: value.detach() for name, value in out.items() if name != "total"})
    return {"terms": terms, "gradients": gradients, "state": method.state_dict()}
