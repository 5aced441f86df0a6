"""Random numbers as a function of (seed, step, global row): the same however rows are spread over workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]
_PURPOSES = ("crop", "mask", "depth", "noise")


def generator(seed: int, step: int, row: int, purpose: str) -> np.random.Generator:
    """A Philox stream of its own for each (seed, step, row, purpose) (Salmon et al., 2011)."""
    key = np.array([seed, _PURPOSES.index(purpose)], dtype=np.uint64)
    # The low words count the numbers drawn; 2**128 of them lie between two neighbouring rows.
    counter = np.array([0, 0, step, row], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniforms(rows: Rows, step: int, seed: int, purpose: str, count: int) -> NDArray[Any]:
    """`count` numbers in [0, 1) for each of the global row numbers `rows` [B]: [B, count] float64."""
    return np.stack([generator(seed, step, int(row), purpose).random(count) for row in rows])


def keep_rows(rows: Rows, step: int, seed: int, *, num_blocks: int, rate: float, views: int) -> Tensor:
    """Which rows pass each residual branch: [views, 2 * num_blocks, B] bool, on the CPU."""
    drawn = uniforms(rows, step, seed, "depth", views * 2 * num_blocks) >= rate
    return torch.from_numpy(drawn.reshape(len(rows), views, -1).transpose(1, 2, 0).copy())
