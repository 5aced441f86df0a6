"""The vision transformers there are: plain numbers, no torch, so that a cost can be told at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PositionRule = Literal["dinov2", "timm", "transformers"]
"""How a position table is resampled to another grid; see `models/positions.py`."""

RGB_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Architecture:
    """What timm needs to build a backbone, and the statistics and positions its released weights expect."""

    patch_size: int
    dim: int
    depth: int
    heads: int
    table_size: int | None
    """Image side in pixels behind the position table; None: the caller's `image_size`."""
    layer_scale: float | None
    timm_name: str | None
    """timm's registered name; None: ours, through timm's class."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    position: PositionRule = "timm"
    registers: int = 0
    """Register tokens (Darcet et al., 2023); such weights are released with a table without a CLS entry."""


def _dinov2(size: str, dim: int, depth: int, heads: int, registers: int = 0) -> Architecture:
    # The released models without registers were made, and are run by the official code, with one rule; those with
    # registers with another, which is also timm's.
    name = f"vit_{size}_patch14_{f'reg{registers}_' if registers else ''}dinov2"
    rule: PositionRule = "timm" if registers else "dinov2"
    return Architecture(14, dim, depth, heads, 518, 1e-5, name, RGB_STATISTICS, rule, registers)


def _imagenet(size: str, dim: int, depth: int, heads: int) -> Architecture:
    return Architecture(16, dim, depth, heads, 224, None, f"vit_{size}_patch16_224", HALF_STATISTICS)


ARCHITECTURES: dict[str, Architecture] = {
    # LayerScale 0.1 is the choice for a shallow network trained from scratch (CaiT, Touvron et al., 2021).
    "vit_tiny_patch14": Architecture(14, 192, 6, 3, None, 0.1, None, RGB_STATISTICS),
    "vit_tiny_patch14_reg4": Architecture(14, 192, 6, 3, None, 0.1, None, RGB_STATISTICS, registers=4),
    "vit_small_patch14_dinov2": _dinov2("small", 384, 12, 6),
    "vit_base_patch14_dinov2": _dinov2("base", 768, 12, 12),
    "vit_large_patch14_dinov2": _dinov2("large", 1024, 24, 16),
    "vit_small_patch14_reg4_dinov2": _dinov2("small", 384, 12, 6, registers=4),
    "vit_base_patch14_reg4_dinov2": _dinov2("base", 768, 12, 12, registers=4),
    "vit_large_patch14_reg4_dinov2": _dinov2("large", 1024, 24, 16, registers=4),
    "vit_small_patch16_224": _imagenet("small", 384, 12, 6),
    "vit_base_patch16_224": _imagenet("base", 768, 12, 12),
    "vit_large_patch16_224": _imagenet("large", 1024, 24, 16),
}
