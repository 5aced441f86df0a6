"""Segmentation of slices: a task's classes from a card's, which slices a batch draws, the fit, scores per subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .metrics import Undefined, missed, segmentation_metrics

# (step, rows) -> scores [B, K, H, W] and class numbers [B, H, W], on one device
Forward = Callable[[int, NDArray[np.int64]], tuple[Tensor, Tensor]]
METRICS = ("dice", "hd95_mm", "surface_dice")


@dataclass(frozen=True)
class Fit:
    """How a decoder is trained: AdamW on Dice + cross-entropy, the rate warmed up and then cosine to zero."""

    steps: int
    batch_size: int
    weight_decay: float
    warmup: float  # share of the steps
    foreground: float  # share of a batch drawn from slices with foreground, where there are any
    seed: int
    clip: float = 1.0


def lookup(classes: Mapping[str, Sequence[str]], declared: Sequence[str]) -> NDArray[np.uint8]:
    """Table from the class numbers of shards (0, then `declared` from 1) to those of a task (0, then `classes`).

    Raises ValueError for a name the card does not have, and for one in two classes: each pixel has one class.
    """
    table = np.zeros(256, np.uint8)
    taken: dict[str, str] = {}
    for number, (name, parts) in enumerate(classes.items(), 1):
        for part in parts:
            if part not in declared:
                raise ValueError(f"{part!r} is no class of the card; it has {', '.join(declared) or 'none'}")
            if part in taken:
                raise ValueError(
                    f"{part!r} is in {taken[part]!r} and in {name!r}; unions belong in `regions`"
                )
            taken[part] = name
            table[1 + list(declared).index(part)] = number
    return table


def batches(foreground: NDArray[np.bool_], fit: Fit) -> Iterator[NDArray[np.int64]]:
    """Rows of every step. Rows with and without foreground are two queues, each shuffled anew when used up, so every
    row is drawn once before any is drawn twice.
    """
    rng = np.random.default_rng([fit.seed, 11])
    queues = [np.flatnonzero(foreground), np.flatnonzero(~foreground)]
    if not len(queues[0]):
        raise ValueError("no slice of the training subjects holds any of the classes")
    share = fit.foreground if len(queues[1]) else 1.0
    draws = [_endless(queue, rng) for queue in queues]
    for step in range(fit.steps):
        # The running total keeps the share where it is no whole number of rows.
        first = int(share * fit.batch_size * (step + 1) + 0.5) - int(share * fit.batch_size * step + 0.5)
        counts = (first, fit.batch_size - first)
        yield np.array([next(draw) for draw, count in zip(draws, counts, strict=True) for _ in range(count)])


def _endless(rows: NDArray[np.int64], rng: np.random.Generator) -> Iterator[np.int64]:
    while True:
        yield from rng.permutation(rows)


def fit(
    forward: Forward, foreground: NDArray[np.bool_], groups: list[dict[str, Any]], how: Fit
) -> list[float]:
    """Train the parameters of `groups` (each with its own `lr`); the loss of every step.

    `foreground` [n] bool says of each row whether its labels hold a class. Raises ValueError when none does, or when
    the loss is not finite.
    """
    from monai.losses import DiceCELoss  # here: it takes seconds, which only training should pay

    # The Dice of a whole batch, as most slices lack most classes; background is left to the cross-entropy.
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    optimiser = torch.optim.AdamW(groups, weight_decay=how.weight_decay)
    rates = [group["lr"] for group in optimiser.param_groups]
    weights = [p for group in optimiser.param_groups for p in group["params"]]
    losses = []
    for step, rows in enumerate(batches(foreground, how)):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, how.steps, how.warmup)
        scores, wanted = forward(step, rows)
        value = loss(scores.float(), wanted[:, None].long())
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, how.clip)
        optimiser.step()
        losses.append(float(value.detach()))
        if not np.isfinite(losses[-1]):
            raise ValueError(f"the loss of step {step} is not finite; lower the rate in adapt.decoder")
    return losses


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the full rate at a step: linear over the warm-up, then half a cosine towards 0."""
    begin = warmup * steps
    if step < begin:
        return (step + 1) / (begin + 1)
    return float(0.5 * (1 + np.cos(np.pi * (step - begin) / max(1.0, steps - begin))))


# ---- scores ---------------------------------------------------------------------------------------------------------


def scored(
    truth: NDArray[np.uint8],
    prediction: NDArray[np.uint8],
    regions: Mapping[str, Sequence[int]],
    affine: NDArray[np.float64],
    tolerance_mm: float,
) -> list[dict[str, Any]]:
    """A row per region (name -> its class numbers) of one subject, both maps [I, J, K] on the voxels of `affine`.

    A metric without a value is None and `undefined` says why. An empty prediction of something that is there has Dice
    and surface Dice 0, the image diagonal as HD95, and is `missed`: it stays in every mean.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    voxel_ml = float(abs(np.linalg.det(affine[:3, :3]))) / 1000
    rows = []
    for name, numbers in regions.items():
        a, b = np.isin(truth, list(numbers)), np.isin(prediction, list(numbers))
        values = segmentation_metrics(a, b, spacing.tolist(), tolerance_mm)
        reasons = {value.reason for value in values.values() if isinstance(value, Undefined)}
        rows.append(
            {
                "region": name,
                **{k: None if isinstance(v, Undefined) else v for k, v in values.items()},
                "missed": missed(a, b),
                "undefined": "; ".join(sorted(reasons)),
                "truth_ml": float(a.sum()) * voxel_ml,
                "predicted_ml": float(b.sum()) * voxel_ml,
            }
        )
    return rows
