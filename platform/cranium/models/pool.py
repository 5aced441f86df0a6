"""From slices to subjects: pooling of features over the rows that belong together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


def mean_pool(features: Tensor, subject_index: Tensor, num_subjects: int | None = None) -> Tensor:
    """Mean of `features` [M, D] over the rows of each subject: [n, D].

    `subject_index` [M] int64 in 0..n-1. Raises ValueError if a subject has no row.
    """
    counts = _count(subject_index, num_subjects)
    sums = features.new_zeros(len(counts), features.shape[1]).index_add(0, subject_index, features)
    return sums / counts[:, None].to(features.dtype)


def max_pool(features: Tensor, subject_index: Tensor, num_subjects: int | None = None) -> Tensor:
    """Largest value of each of `features` [M, D] over the rows of each subject: [n, D]; otherwise as `mean_pool`."""
    counts = _count(subject_index, num_subjects)
    least = features.new_full((len(counts), features.shape[1]), -torch.inf)
    return least.scatter_reduce(0, subject_index[:, None].expand_as(features), features, "amax")


class Pooled(NamedTuple):
    """Subject features [n, D] and the weight [M] of each row, which sums to 1 over a subject's rows."""

    features: Tensor
    weights: Tensor


class AttentionPool(nn.Module):
    """Gated attention pooling (Ilse, Tomczak and Welling, 2018, equation 9)."""

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, features: Tensor, subject_index: Tensor, num_subjects: int | None = None) -> Pooled:
        """Pool `features` [M, D] by `subject_index` [M] int64 in 0..n-1."""
        count = len(_count(subject_index, num_subjects))
        scores = self.score(torch.tanh(self.value(features)) * torch.sigmoid(self.gate(features)))[
            :, 0
        ].float()
        top = scores.new_full((count,), -torch.inf).scatter_reduce(0, subject_index, scores.detach(), "amax")
        weights = torch.exp(scores - top[subject_index])
        weights = weights / weights.new_zeros(count).index_add(0, subject_index, weights)[subject_index]
        weights = weights.to(features.dtype)
        pooled = features.new_zeros(count, features.shape[1])
        return Pooled(pooled.index_add(0, subject_index, features * weights[:, None]), weights)


def _count(subject_index: Tensor, num_subjects: int | None) -> Tensor:
    counts = torch.bincount(subject_index, minlength=num_subjects or 0)
    if num_subjects is not None and len(counts) > num_subjects:
        raise ValueError(f"subject_index reaches {len(counts) - 1}, but there are {num_subjects} subjects")
    if bool((counts == 0).any()):
        raise ValueError(f"subject {int((counts == 0).nonzero()[0])} has no row to pool")
    return counts
