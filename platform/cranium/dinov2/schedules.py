"""What changes with the step: learning rate, weight decay, teacher momentum and temperature."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


def cosine(step: int, total: int, base: float, final: float, warmup: int = 0, start: float = 0.0) -> float:
    """The value at `step`: linear from `start` to `base` over `warmup` steps, then half a cosine to `final`.

    The official rule: the warm-up's last step is `base` itself, and `final` is reached at step `total`.
    """
    if step < warmup:
        return base if warmup == 1 else start + (base - start) * step / (warmup - 1)
    if step >= total:
        return final
    progress = (step - warmup) / (total - warmup)
    return base - 0.5 * (base - final) * (1.0 - math.cos(math.pi * progress))


def scaled_lr(base: float, global_batch: int, rule: str = "sqrt", reference: int = 1024) -> float:
    """Learning rate for `global_batch` stacks when `base` was meant for `reference`."""
    ratio = global_batch / reference
    match rule:
        case "sqrt":
            return base * math.sqrt(ratio)
        case "linear":
            return base * ratio
        case "none":
            return base
    raise ValueError(f"unknown learning-rate rule {rule!r}; choose sqrt, linear or none")


def scaled_momentum(base: float, global_batch: int, reference: int) -> float:
    """Teacher momentum for `global_batch` stacks when `base` was meant for `reference`: Busbridge et al. 2023, eq. 4.

    The teacher then averages over the same number of stacks, not of steps.
    """
    return float(base ** (global_batch / reference))


class Rates(NamedTuple):
    """All scheduled values at one step."""

    lr: float
    backbone_lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float


@dataclass(frozen=True)
class Schedules:
    """Schedules by step; defaults are those of DINOv2's ViT-L, lengths in steps."""

    total_steps: int
    lr: float
    final_lr: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: float = 0.992
    final_momentum: float = 1.0
    start_temperature: float = 0.04
    teacher_temperature: float = 0.07
    temperature_warmup_steps: int = 0
    freeze_last_layer_steps: int = 0
    """Prototypes stand still while the other layers settle."""
    freeze_backbone_steps: int = 0
    """Fresh heads settle before they may move loaded weights."""

    def at(self, step: int) -> Rates:
        """The values that step number `step` (from 0) uses."""
        total = self.total_steps
        lr = cosine(step, total, self.lr, self.final_lr, self.warmup_steps)
        warmup = self.temperature_warmup_steps
        temperature = self.teacher_temperature
        return Rates(
            lr=lr,
            backbone_lr=0.0 if step < self.freeze_backbone_steps else lr,
            last_layer_lr=0.0 if step < self.freeze_last_layer_steps else lr,
            weight_decay=cosine(step, total, self.weight_decay, self.final_weight_decay),
            momentum=cosine(step, total, self.momentum, self.final_momentum),
            teacher_temperature=cosine(
                step, warmup, temperature, temperature, warmup, self.start_temperature
            ),
        )


def apply(rates: Rates, groups: Iterable[dict[str, Any]]) -> None:
    """Write the step's rates into an optimiser's `param_groups` (see `method.parameter_groups`)."""
    for group in groups:
        base = {"backbone": rates.backbone_lr, "head": rates.lr, "last_layer": rates.last_layer_lr}[
            group["part"]
        ]
        group["lr"] = base * group["lr_multiplier"]
        group["weight_decay"] = rates.weight_decay * group["decay_multiplier"]
