"""The three losses of DINOv2, in fp32 whatever the surrounding precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cranium.dinov2.centering import identity


def dino(
    student_logits: Tensor, teacher_probs: Tensor, *, temperature: float = 0.1, ignore_diagonal: bool = False
) -> Tensor:
    """Cross-entropy between views, summed over pairs and averaged over images (DINO, equation 3).

    `student_logits` [V_s, B, K], `teacher_probs` [V_t, B, K].

    pseudo-code:
        for s in student views:
            for t in teacher views, without t == s if ignore_diagonal:
                loss += mean over b of -sum_k teacher[t, b, k] * log softmax(student[s, b] / temperature)[k]

    Official DINOv2 divides the global pairs (V_t^2 - V_t) and local pairs (V_s * V_t) by their joint number;
    so does `method.DINOv2`.
    """
    teacher = _float(teacher_probs)
    total = teacher.sum(dim=0)
    targets = total - teacher if ignore_diagonal else total.expand_as(student_logits)
    if not len(student_logits):
        return _float(student_logits).sum()
    views = zip(student_logits, targets, strict=True)
    return torch.stack([soft_cross_entropy(*view, temperature).mean() for view in views]).sum()


def ibot(
    student: Tensor, teacher_probs: Tensor, weights: Tensor, num_images: int, *, temperature: float = 0.1
) -> Tensor:
    """Cross-entropy on masked patches: mean in each image, then over images (iBOT, equation 2).

    `student` logits and `teacher_probs` [M, K] of the masked patches, `weights` [M] = 1 / masked patches
    of the same image. As in official DINOv2 the sum is divided by all `num_images`, masked or not.
    """
    losses = soft_cross_entropy(student, _float(teacher_probs), temperature)
    return (losses * weights).sum() / num_images


def koleo(cls: Tensor, gather: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """Minus the mean log distance of `cls` [B, D] to the nearest neighbour (Sablayrolles et al., 2018).

    pseudo-code:
        x = cls / |cls|
        for i: loss -= log(min over j != i of |x_i - x_j|) / B

    `gather` concatenates the rows of all workers; its backward must sum gradients over workers (as
    `torch.distributed.nn.functional.all_gather` does), and data parallelism then averages to the gradient of
    one large batch. The identity looks for neighbours on this worker only, as the official code does. One row
    has no neighbour: 0.
    """
    with torch.autocast(cls.device.type, enabled=False):
        x = F.normalize(gather(_float(cls)), dim=-1, eps=1e-8)
        if len(x) < 2:
            return (x * 0.0).sum()
        with torch.no_grad():
            similarity = (x @ x.T).fill_diagonal_(-2.0)
            nearest = similarity.argmax(dim=1)
        # The small terms are the official ones: identical rows give a large finite loss, not infinity.
        distance = F.pairwise_distance(x, x[nearest], eps=1e-8)
        return -torch.log(distance + 1e-8).mean()


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """-sum_k targets * log softmax(logits / temperature) of every row [n, K]: [n]; targets need not sum to 1.

    In fp32 or better, whatever the logits come in.
    """
    losses: Tensor = _SoftCrossEntropy.apply(logits, targets, temperature)
    return losses


_AT_ONCE = 1 << 18
"""Numbers of a CPU's worth of rows: what is made of them stays in its cache."""


class _SoftCrossEntropy(torch.autograd.Function):
    """Its gradient, (softmax * sum of targets - targets) / temperature, is written out: only the inputs are kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        mass, log_sum, losses = [], [], []
        for x, y in _parts(logits, targets):
            scores = _float(x) / temperature
            log_sum.append(torch.logsumexp(scores, dim=-1))
            mass.append(y.sum(dim=-1))
            losses.append(mass[-1] * log_sum[-1] - scores.mul_(y).sum(dim=-1))
        ctx.temperature = temperature
        ctx.save_for_backward(logits, targets, torch.cat(mass), torch.cat(log_sum))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, mass, log_sum = ctx.saved_tensors
        out = torch.empty_like(logits)
        factor = grad / ctx.temperature
        columns = (mass, log_sum, factor)
        for x, y, made, m, s, f in _parts(logits, targets, out, *(c[:, None] for c in columns)):
            slope = (_float(x) / ctx.temperature).sub_(s).exp_().mul_(m).sub_(y)
            torch.mul(slope, f, out=made)
        return out, None, None


def _parts(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all: on a CPU a few at a time."""
    count = len(logits)
    if logits.device.type == "cpu":
        count = max(1, _AT_ONCE // max(1, logits.shape[-1]))
    return zip(*(torch.split(x, max(1, count)) for x in (logits, *others)), strict=True)


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
