"""How a process is measured by `cranium bench step`: it says that it is ready, then works so many steps when told."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable

import numpy as np


def serve(step: Callable[[], float]) -> None:
    """`step` makes one optimisation step and returns its loss. A line of input is a number of steps."""
    import torch

    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    print(json.dumps({"torch": torch.__version__}), file=out, flush=True)
    for line in sys.stdin:
        losses = [step() for _ in range(int(line))]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"loss": losses[-1], "memory_mb": memory}), file=out, flush=True)


def batch(path: str) -> dict[str, np.ndarray]:
    """`global` [2B, 3, 224, 224] and `local` [8B, 3, 98, 98], views apart in turn; `masks` [2B, 256]."""
    with np.load(path) as kept:
        return dict(kept)
