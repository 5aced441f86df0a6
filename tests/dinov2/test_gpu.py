"""What a CUDA device must show; skipped elsewhere, and never yet run on one (docs/gpu.md)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cranium.dinov2.crops import CropSpec
from cranium.dinov2.method import DINOv2, MethodSpec, Student
from cranium.models import vit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPEC = MethodSpec(
    crops=CropSpec(global_size=56, local_size=28, num_local=2),
    prototypes=128,
    head_hidden=64,
    head_bottleneck=32,
)


def losses(device: str, precision: torch.dtype | None) -> dict[str, float]:
    torch.manual_seed(0)
    student = Student(vit.build("vit_tiny_patch14", image_size=56), SPEC)
    method = DINOv2(copy.deepcopy(student).to(device), SPEC)
    stacks = torch.randint(0, 255, (8, 3, 1, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    present = torch.ones(8, 3, dtype=torch.bool)
    terms = method.losses(
        stacks.to(device),
        present.to(device),
        np.arange(8),
        0,
        seed=0,
        teacher_temperature=0.07,
        precision=precision,
    )
    terms["total"].backward()
    return {name: float(value) for name, value in terms.items()}


def test_cuda_in_fp32_gives_the_losses_of_the_cpu() -> None:
    ours, theirs = losses("cuda", None), losses("cpu", None)
    for name in ("dino_global", "dino_local", "ibot", "koleo"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_bf16_stays_close_to_fp32_and_finite() -> None:
    half, full = losses("cuda", torch.bfloat16), losses("cuda", None)
    assert half["loss"] == pytest.approx(full["loss"], rel=2e-2)
