"""Which patches the student does not see: blocks, as in BEiT and iBOT."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cranium.dinov2.draw import Rows, generator


def sample(
    rows: Rows,
    step: int,
    seed: int,
    grid: int,
    *,
    views: int = 2,
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
) -> NDArray[np.bool_]:
    """Masks [views, B, grid * grid] for the global row numbers `rows` [B]; True is hidden.

    A share `probability` of the views is masked: in each row the views' turns are evenly spread, so of two
    views at one half exactly one is masked. A masked view hides a share of its patches drawn evenly from
    `ratio`.
    """
    if not 0.0 <= ratio[0] <= ratio[1] < 1.0:
        raise ValueError(f"mask ratio must be an interval within [0, 1), got {ratio}")
    masks = np.zeros((views, len(rows), grid * grid), dtype=np.bool_)
    for index, row in enumerate(rows):
        random = generator(seed, step, int(row), "mask")
        turn, shares = random.random(), random.uniform(*ratio, size=views)
        for view in range(views):
            if (turn + view / views) % 1.0 < probability:
                count = max(1, round(shares[view] * grid * grid))
                masks[view, index] = draw_blocks(random, grid, count).ravel()
    return masks


def draw_blocks(
    random: np.random.Generator, grid: int, count: int, *, smallest: int = 4, aspect: float = 0.3
) -> NDArray[np.bool_]:
    """A mask [grid, grid] of exactly `count` patches, in rectangles of `smallest` or more where they fit.

    Sides ratio is log-uniform in [aspect, 1 / aspect]. What is left after ten misfits in a row, or is smaller
    than a block, is made of single patches.
    """
    mask = np.zeros((grid, grid), dtype=np.bool_)
    left, misfits = count, 0
    while left >= smallest and misfits < 10:
        area, log_ratio, u, v = random.random(4)
        area = smallest + area * (left - smallest)
        stretch = math.exp((2.0 * log_ratio - 1.0) * math.log(aspect))
        height, width = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
        misfits += 1
        if not (0 < height <= grid and 0 < width <= grid):
            continue
        top, start = int(u * (grid - height + 1)), int(v * (grid - width + 1))
        block = mask[top : top + height, start : start + width]
        fresh = block.size - int(block.sum())
        if 0 < fresh <= left:
            block[:] = True
            left, misfits = left - fresh, 0
    if left:
        free = np.flatnonzero(~mask)
        mask.flat[random.choice(free, size=left, replace=False)] = True
    return mask
