"""One step of a pretraining: the losses and gradients of a batch, and the update, left out where it is not finite.

The same on every worker of the process group, if there is one: losses and gradients are those of the whole batch.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cranium import stream
from cranium.config import Pretrain
from cranium.dinov2 import anomaly, health, schedules
from cranium.dinov2.centering import identity
from cranium.dinov2.method import DINOv2, clip_gradients


@dataclass(frozen=True)
class Terms:
    """What a step found, the same on every worker."""

    losses: dict[str, Tensor]  # of `DINOv2.losses`
    norms: dict[str, Tensor]  # of gradients, by module, before clipping
    finite: bool

    def scalars(self) -> dict[str, float]:
        values = {name: float(v) for name, v in self.losses.items() if name not in ("total", "teacher_cls")}
        return values | {f"grad_norm_{name}": float(norm) for name, norm in self.norms.items()}

    def metrics(self) -> dict[str, float]:
        """What of it is for the journal; charts take finite numbers only."""
        values = {f"train/{name}": value for name, value in self.scalars().items()}
        if self.finite:
            values["train/effective_rank"] = health.effective_rank(self.losses["teacher_cls"])
        return {name: value for name, value in values.items() if math.isfinite(value)}


def update(
    spec: Pretrain,
    method: DINOv2,
    optimiser: torch.optim.Optimizer,
    batch: stream.Batch,
    now: schedules.Rates,
) -> Terms:
    """One step. Where its loss or gradient is not finite nothing of it enters student, teacher, centres, optimiser.

    Losses and gradients are those of the whole batch, so all workers see the same. It is looked at here and not every
    so many steps, because weights that have taken up a NaN are lost: the device is waited for once a step.
    """
    schedules.apply(now, optimiser.param_groups)
    optimiser.zero_grad(set_to_none=True)
    centres = {name: centre.centre for name, centre in method.centres.items()}  # a step replaces them
    losses = backward(spec, method, batch, now.teacher_temperature)
    norms = clip_gradients(method.plain_student, spec.optimiser.clip)
    finite = bool(torch.stack([losses["loss"], *norms.values()]).isfinite().all())
    if finite:
        optimiser.step()
        method.update_teacher(now.momentum)
    else:
        for name, centre in centres.items():
            method.centres[name].centre = centre
    return Terms(losses, norms, finite)


def backward(
    spec: Pretrain,
    method: DINOv2,
    batch: stream.Batch,
    temperature: float,
    look: anomaly.Look | None = None,
) -> dict[str, Tensor]:
    """Losses of a batch and their gradients, part by part; workers exchange gradients with the last part only.

    `look` is shown the loss of each part before it is differentiated.
    """
    several = _workers() > 1
    reduce, gather = (_reduce, _gather) if several else (identity, identity)
    device = method.plain_student.dino_head.prototypes.device
    precision = torch.bfloat16 if spec.precision == "bf16" else None
    size = len(batch.rows) // spec.accumulate
    found: list[dict[str, Tensor]] = []
    for number in range(spec.accumulate):
        part = slice(number * size, (number + 1) * size)  # a view: pinned memory stays pinned
        waits = several and number < spec.accumulate - 1
        with method.student.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            terms = method.losses(
                batch.stacks[part].to(device, non_blocking=True),
                batch.present[part].to(device, non_blocking=True),
                batch.rows[part],
                batch.step,
                seed=spec.seed,
                teacher_temperature=temperature,
                reduce=reduce,
                gather=gather,
                precision=precision,
            )
            total = terms["total"] / spec.accumulate
            if look:
                look(total)
            total.backward()  # type: ignore[no-untyped-call]
        found.append({name: term.detach() for name, term in terms.items()})
    if len(found) == 1:
        return found[0]
    together = {name: torch.stack([terms[name] for terms in found]) for name in found[0]}
    cls = together.pop("teacher_cls").flatten(0, 1)
    return {name: values.mean(0) for name, values in together.items()} | {"teacher_cls": cls}


def _workers() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _reduce(x: Tensor) -> Tensor:
    torch.distributed.all_reduce(x := x.clone())
    return x


def _gather(x: Tensor) -> Tensor:
    import torch.distributed.nn.functional as collectives

    return torch.cat(list(collectives.all_gather(x)))  # type: ignore[no-untyped-call]
