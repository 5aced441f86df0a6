"""Is a run healthy? What its journal says, against what collapse, starvation and divergence look like."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RECENT = 10  # entries that must agree before an alarm is raised: one odd batch is none
COLLAPSED, UNIFORM = 0.05, 0.98  # shares of the greatest entropy beyond which targets say nothing
SETTLED = 0.25  # share of the steps after which targets should no longer be uniform
FLAT = 0.1  # share of the spread of features that use every direction
LINE = 2.0  # effective rank
SPIKE = 10.0  # a gradient this many times its recent median
STARVED = 0.1  # share of a step spent waiting for data

Entry = tuple[int, dict[str, float]]  # step, metrics by their names in the journal


@dataclass(frozen=True)
class Alarm:
    code: str
    step: int  # where it was raised
    last: int  # the last logged step it was seen at
    seen: str  # what is wrong
    mend: str  # what to try


Rule = Callable[[int, Mapping[str, float]], bool]


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """exp(entropy of the normalised singular values) of `features` [n, D]: Roy and Vetterli 2007, EUSIPCO.

    1 when all rows lie on one line through the origin, min(n, D) when they spread evenly.
    """
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return float(torch.exp(torch.special.entr(shares).sum()))


def alarms(entries: Sequence[Entry], *, steps: int, prototypes: int, dim: int) -> list[Alarm]:
    """What is wrong with a run of `steps` steps so far, the first time each thing was seen; empty when healthy."""
    most = math.log(prototypes)
    spread = 1 / math.sqrt(dim)  # standard deviation of unit features that use every direction
    rules: dict[str, tuple[Rule, str, str]] = {
        "COLLAPSED": (
            lambda step, m: m.get("train/target_entropy", most) < COLLAPSED * most,
            "the teacher gives nearly all images one prototype",
            "lower the learning rate, raise the teacher's temperature, or use centering: sinkhorn",
        ),
        "UNIFORM": (
            lambda step, m: step > SETTLED * steps and m.get("train/target_entropy", 0.0) > UNIFORM * most,
            "the teacher's targets are still uniform, so there is nothing to learn from",
            "lower its momentum or its temperature, or use fewer prototypes",
        ),
        "FEATURES": (
            lambda step, m: m.get("train/feature_std", spread) < FLAT * spread,
            "CLS features are nearly constant over images",
            "lower the learning rate, raise koleo_weight",
        ),
        "RANK": (
            lambda step, m: m.get("train/effective_rank", dim) < LINE,
            "CLS features lie on one line",
            "lower the learning rate, raise koleo_weight",
        ),
        "STARVED": (
            lambda step, m: m.get("sys/data_wait_share", 0.0) > STARVED,
            f"over {STARVED:.0%} of a step is spent waiting for data",
            "raise compute.prefetch_batches, or read from a nearer disk",
        ),
    }
    found = [
        Alarm(code, held[0], held[-1], seen, mend)
        for code, (rule, seen, mend) in rules.items()
        if (held := _held(entries, rule))
    ]
    return sorted([*found, *_spikes(entries)], key=lambda alarm: alarm.step)


def _held(entries: Sequence[Entry], rule: Rule) -> list[int]:
    """Steps at which a rule had held for `RECENT` entries in a row."""
    run, steps = 0, []
    for step, metrics in entries:
        run = run + 1 if rule(step, metrics) else 0
        if run >= RECENT:
            steps.append(step)
    return steps


def _spikes(entries: Sequence[Entry]) -> list[Alarm]:
    """One alarm for all gradients far above their recent median, with the size of the greatest."""
    name = "train/grad_norm_backbone"
    norms = [(step, metrics[name]) for step, metrics in entries if name in metrics]
    times: dict[int, float] = {}
    for index in range(2 * RECENT, len(norms)):
        usual = statistics.median(norm for _, norm in norms[index - 2 * RECENT : index])
        step, norm = norms[index]
        if norm > SPIKE * usual:
            times[step] = norm / usual if usual else math.inf
    if not times:
        return []
    seen = f"the gradient is {max(times.values()):.0f} times its recent median"
    return [
        Alarm(
            "SPIKE",
            min(times),
            max(times),
            seen,
            "look at the loss there (it is clipped); if it comes back, lower the learning rate",
        )
    ]
