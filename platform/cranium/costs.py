"""What an experiment will cost, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cranium.config import Adapt, Experiment
from cranium.dinov2 import cost as estimates
from cranium.dinov2.cost import Cost


def pretraining(exp: Experiment) -> Cost:
    """Of one initialisation, from shapes alone."""
    assert exp.pretrain
    crops, loss, shape = exp.pretrain.crops, exp.pretrain.loss, exp.ingest.preprocessing.shape
    return estimates.of_pretraining(
        exp.pretrain.arch,
        images=exp.pretrain.steps * exp.pretrain.batch_size,
        channels=shape[0] * shape[1],
        num_global=crops.num_global,
        global_size=crops.global_size,
        num_local=crops.num_local,
        local_size=crops.local_size,
        prototypes=loss.prototypes,
        head_hidden=loss.head_hidden,
        head_bottleneck=loss.head_bottleneck,
        mask_ratio=loss.mask_ratio,
        mask_probability=loss.mask_probability if loss.ibot_weight else 0.0,
    )


def _searches(spec: Adapt) -> Iterator[tuple[str, str]]:
    for way, of in (("finetune", spec.finetune), ("lora", spec.lora)):
        if of.search:
            yield way, f"{of.search.trials} trials for each of its cells, then the cell itself"


def estimate(exp: Experiment) -> dict[str, Any]:
    """What `cranium show` says of steps, stacks, FLOPs, GPU-hours and cells, over all kinds of stack."""
    cost: dict[str, Any] = {"declared cost": exp.cost} if exp.cost else {}
    parts = [exp.of_stack(stack) for stack in exp.stacks]
    if len(parts) > 1:
        shapes = (" x ".join(map(str, part.ingest.shape)) for part in parts)
        cost["kinds of stack"] = ", ".join(f"{s} {of}" for s, of in zip(exp.stacks, shapes, strict=True))
    if exp.pretrain:
        runs, each = len(exp.pretrain.inits), [pretraining(part) for part in parts]
        cost["steps"] = runs * exp.pretrain.steps * len(parts)
        cost["stacks seen"] = cost["steps"] * exp.pretrain.batch_size
        cost["computed cost"] = "; ".join(map(str, each))
        giga = ", ".join(f"{of.flops_per_image / 1e9:.0f}" for of in each)
        cost["FLOPs"] = f"{runs * sum(of.flops for of in each):.2e} ({giga} GFLOPs a stack)"
        hours = {gpu: estimates.in_short(runs * sum(of.hours(gpu) for of in each)) for gpu in estimates.PEAK}
        share = f"{estimates.UTILISATION:.0%} of its peak"
        cost["GPU-hours"] = f"{', '.join(f'{gpu} {h}' for gpu, h in hours.items())} (computed, at {share})"
    if exp.sweep and exp.adapt:
        grid = sum(map(_cells_of_a_fold, parts))
        folds = exp.sweep.folds * exp.sweep.group_by.count("subject")
        others = [scheme for scheme in exp.sweep.group_by if scheme != "subject"]
        cost["cells"] = f"{grid * folds}" + "".join(f" + {grid} for each {scheme}" for scheme in others)
        cost |= {
            f"search of {way}": said for way, said in _searches(exp.adapt) if way in exp.sweep.adaptation
        }
    return cost


def _cells_of_a_fold(exp: Experiment) -> int:
    assert exp.sweep and exp.adapt
    rows = sum(len(exp.sweep.adaptations(t, i)) for t in exp.adapt.tasks for i in exp.sweep.init)
    return rows * len(exp.sweep.contrasts.train) * len(exp.sweep.label_fractions) * len(exp.sweep.seeds)
