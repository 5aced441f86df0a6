"""Steps of Cranium. `own.py KIND BATCH ROW_STEP THREADS PRECISION`, KIND one of plain, tuned, shipped, peak, crops.

`plain` and `tuned` start from views, as the peers do, with their moving centre; `shipped` is all that training does in
a step under default settings: crops, Sinkhorn-Knopp, health numbers, the system's allocator told to keep what it has.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from serve import batch, serve

from cranium import allocator
from cranium.dinov2 import crops
from cranium.dinov2.method import DINOv2, MethodSpec, Student, clip_gradients, parameter_groups
from cranium.models import vit

PEAK, PEAK_TIMES = 2048, 40
CROPS = 64


def stacks(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    inside = ((y - 112) / 90) ** 2 + ((x - 112) / 70) ** 2 < 1
    pixels = torch.randint(1, 256, (count, 3, 1, 224, 224), dtype=torch.uint8) * inside
    return pixels.byte(), torch.ones(count, 3, dtype=torch.bool)


def training(kind: str, path: str, row_step: int, bf16: bool) -> None:
    if kind == "shipped":
        allocator.keep_freed()
    spec = MethodSpec() if kind == "shipped" else MethodSpec(centering="moving")
    student = Student(vit.build("vit_small_patch14_dinov2").train(), spec, tuned=kind != "plain")
    method = DINOv2(student, spec)
    optimiser = torch.optim.AdamW(parameter_groups(student, 0.04, 0.9, 0.2), lr=1e-4, fused=True)
    given = batch(path)
    rows = np.arange(len(given["global"]) // 2)
    views = [torch.from_numpy(given[name]) for name in ("global", "local")]
    views = [v.view(-1, len(rows), *v.shape[1:]) for v in views]
    pixels, present = stacks(len(rows))
    options = {"seed": 0, "teacher_temperature": 0.07, "precision": torch.bfloat16 if bf16 else None}

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        if kind == "shipped":
            terms = method.losses(pixels, present, rows, row_step, **options)
        else:
            terms = method.losses_of(tuple(views), rows, row_step, **options)
        terms["total"].backward()
        clip_gradients(student, 3.0)
        optimiser.step()
        method.update_teacher(0.994)
        return float(terms["loss"])

    serve(step)


def peak(bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(PEAK, PEAK, dtype=dtype) for _ in range(2))

    def step() -> float:
        for _ in range(PEAK_TIMES):
            a @ b
        return 0.0

    serve(step)


def cropping() -> None:
    pixels, present = stacks(CROPS)
    spec, number = MethodSpec().crops, iter(range(10**9))

    def step() -> float:
        crops.apply(pixels, present, crops.sample(np.arange(CROPS), next(number), 0, spec), spec)
        return 0.0

    serve(step)


if __name__ == "__main__":
    kind, path, row_step, threads, precision = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    if kind == "peak":
        peak(precision == "bf16")
    elif kind == "crops":
        cropping()
    else:
        training(kind, path, int(row_step), precision == "bf16")
