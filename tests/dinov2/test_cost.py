"""What a pretraining costs: the published table of the formula, and torch's own counter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cranium.dinov2 import cost
from cranium.models import vit
from cranium.models.architectures import ARCHITECTURES


@pytest.mark.parametrize(
    ("size", "forward_global", "forward_local", "total", "h100", "a100"),
    [
        ("small", 12.2, 2.19, 166, 5969, 753),
        ("base", 46.3, 8.63, 593, 1667, 210),
        ("large", 162, 30.5, 2044, 484, 61),
    ],
)
def test_the_anchor_table(
    size: str, forward_global: float, forward_local: float, total: float, h100: float, a100: float
) -> None:
    """GFLOPs, and images a second at an H100's peak and at 40 % of an A100's, at 65,536 prototypes."""
    name = f"vit_{size}_patch14_dinov2"
    assert cost.forward(ARCHITECTURES[name], 224) / 1e9 == pytest.approx(forward_global, rel=0.005)
    assert cost.forward(ARCHITECTURES[name], 98) / 1e9 == pytest.approx(forward_local, rel=0.005)
    spent = cost.of_pretraining(name, images=1000)
    assert spent.flops_per_image / 1e9 == pytest.approx(total, rel=0.005)
    assert 1000 / spent.hours("H100", 1.0) / 3600 == pytest.approx(h100, rel=0.005)
    assert 1000 / spent.hours("A100") / 3600 == pytest.approx(a100, rel=0.01)


def test_heads_weigh_on_a_small_backbone_and_few_prototypes_are_cheap() -> None:
    small = cost.of_pretraining("vit_small_patch14_dinov2", images=1)
    large = cost.of_pretraining("vit_large_patch14_dinov2", images=1)
    assert 0.085 < small.heads < 0.095 and large.heads < 0.01
    assert cost.of_pretraining("vit_small_patch14_dinov2", images=1, prototypes=8192).heads < 0.04


@pytest.mark.parametrize(("arch", "channels"), [("vit_tiny_patch14", 3), ("vit_tiny_patch14_reg4", 5)])
def test_a_forward_is_what_torch_counts(arch: str, channels: int) -> None:
    backbone = vit.build(arch, in_channels=channels, image_size=56).eval()
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.rand(1, channels, 56, 56))
    assert cost.forward(ARCHITECTURES[arch], 56, channels) == pytest.approx(
        counter.get_total_flops(), rel=1e-6
    )


def test_it_needs_no_torch() -> None:
    code = "import sys, cranium.dinov2.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
