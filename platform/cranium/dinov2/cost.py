"""What a pretraining costs, before it is run: floating-point operations from shapes alone, hours from a GPU's peak.

Pure arithmetic, no torch. A multiply and an add are two operations; attention's softmax, norms and the views are left
out (below 1 %), and dropped branches are counted as if they ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cranium.models.architectures import ARCHITECTURES, Architecture

PEAK: Mapping[str, float] = {"A100": 312e12, "H100": 989e12}
"""Dense bf16 operations per second: the peaks that the published rates below are shares of."""
UTILISATION = 0.4
"""Share of the peak that a good run reaches. Published: DINOv2 46 % on A100; DINOv3's recipe 25 % on H100."""


@dataclass(frozen=True)
class Cost:
    """Of one initialisation."""

    images: int
    flops_per_image: float
    heads: float
    """Their share of it."""

    @property
    def flops(self) -> float:
        return self.images * self.flops_per_image

    def hours(self, gpu: str, utilisation: float = UTILISATION) -> float:
        """Of one GPU; several share it."""
        return self.flops / (PEAK[gpu] * utilisation) / 3600

    def __str__(self) -> str:
        images = f"{self.images / 1e6:.1f} million stacks" if self.images >= 1e6 else f"{self.images} stacks"
        hours = f"{in_short(self.hours('A100'))} A100-hours at {UTILISATION:.0%} of its peak"
        return f"{images} an init, {self.flops:.2g} FLOPs: {hours}".replace("e+", "e")


def in_short(value: float) -> str:
    """Two digits, as much as an estimate has."""
    return f"{float(f'{value:.2g}'):g}" if value >= 0.01 else "below 0.01"


def forward(arch: Architecture, size: int, channels: int = 3) -> float:
    """Operations of one forward pass over one image `size` pixels wide.

    2 * [L * (12 N D^2 + 2 N^2 D) + patches * channels * p^2 * D],   N = patches + 1 + registers
    """
    patches, dim = (size // arch.patch_size) ** 2, arch.dim
    tokens = patches + 1 + arch.registers
    blocks = arch.depth * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
    return 2.0 * (blocks + patches * channels * arch.patch_size**2 * dim)


def of_pretraining(
    arch: str,
    *,
    images: int,
    channels: int = 3,
    num_global: int = 2,
    global_size: int = 224,
    num_local: int = 8,
    local_size: int = 98,
    prototypes: int = 65536,
    head_hidden: int = 2048,
    head_bottleneck: int = 256,
    mask_ratio: tuple[float, float] = (0.1, 0.5),
    mask_probability: float = 0.5,
) -> Cost:
    """The student goes forward and back (three forwards) over all views, the teacher forward over the global ones.

    The heads see the CLS token of every view and the masked patches, the teacher's those of the global views.
    """
    spec = ARCHITECTURES[arch]
    over_global = num_global * forward(spec, global_size, channels)
    over_local = num_local * forward(spec, local_size, channels)
    backbone = 3 * (over_global + over_local) + over_global
    patches = num_global * (global_size // spec.patch_size) ** 2
    masked = mask_probability * sum(mask_ratio) / 2 * patches
    layers = head_hidden * (spec.dim + head_hidden + head_bottleneck) + head_bottleneck * prototypes
    heads = 2.0 * layers * (3 * (num_global + num_local + masked) + num_global + masked)
    return Cost(images, backbone + heads, heads / (backbone + heads))
