"""How the teacher's scores become targets that use all prototypes: Sinkhorn-Knopp, or a moving centre."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all workers; the identity on one."""


def identity(x: Tensor) -> Tensor:
    """One worker's all-reduce and all-gather."""
    return x


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3, reduce: Reduce = identity) -> Tensor:
    """Targets [n, K] from teacher `logits` [n, K]: rows sum to 1, prototypes near equal mass (SwAV, 3.1).

    pseudo-code, over the rows of all workers:
        Q = exp(logits / temperature)
        repeat: Q[:, k] /= sum of column k;  Q[i, :] /= sum of row i

    `reduce` sums over workers, which may hold unequal numbers of rows, also none. In fp32 (fp64 stays); the
    constant subtracted before exp is shared by all workers, so it cancels.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    peak = logits.max() if logits.numel() else logits.new_zeros(())
    shared = reduce(torch.stack([peak, logits.new_tensor(float(logits.numel() > 0))]))
    q = logits.sub_(shared[0] / shared[1].clamp(min=1.0)).exp_()
    # All the rounds only ever scale rows and columns: factors are kept, and applied once.
    smallest = torch.finfo(q.dtype).tiny
    by_row, by_column = q.new_ones(len(q)), q.new_ones(q.shape[1])
    for _ in range(iterations):
        # A prototype that no row reaches (all its exponentials underflow) keeps zero mass.
        by_column = 1.0 / reduce(by_row @ q).clamp(min=smallest)
        by_row = 1.0 / (q @ by_column).clamp(min=smallest)
    return q.mul_(by_row[:, None]).mul_(by_column)


class MovingCentre:
    """Softmax of scores less their running mean (DINO, equation 4)."""

    def __init__(self, prototypes: int, momentum: float = 0.9, device: torch.device | str = "cpu") -> None:
        self.centre = torch.zeros(prototypes, device=device)
        self.momentum = momentum

    @torch.no_grad()
    def __call__(self, logits: Tensor, temperature: float, reduce: Reduce = identity) -> Tensor:
        """Targets [n, K] of `logits` [n, K]; then move the centre by the mean over all workers' rows."""
        logits = logits.float()
        targets = torch.softmax((logits - self.centre) / temperature, dim=-1)
        total = reduce(torch.cat([logits.sum(dim=0), logits.new_tensor([len(logits)])]))
        mean = total[:-1] / total[-1].clamp(min=1.0)
        # Without a single row anywhere there is nothing to move to.
        weight = (1.0 - self.momentum) * (total[-1] > 0)
        self.centre = self.centre + weight * (mean - self.centre)
        return targets
