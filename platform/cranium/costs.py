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
    """What `cranium show` says of steps, stacks, FLOPs, GPU-hours and cells."""
    cost: dict[str, Any] = {"declared cost": exp.cost} if exp.cost else {}
    if exp.pretrain:
        runs = len(exp.pretrain.inits)
        cost["steps"] = runs * exp.pretrain.steps
        cost["stacks seen"] = cost["steps"] * exp.pretrain.batch_size
        each = pretraining(exp)
        cost["computed cost"] = str(each)
        cost["FLOPs"] = f"{runs * each.flops:.2e} ({each.flops_per_image / 1e9:.0f} GFLOPs a stack)"
        hours = {gpu: estimates.in_short(runs * each.hours(gpu)) for gpu in estimates.PEAK}
        share = f"{estimates.UTILISATION:.0%} of its peak"
        cost["GPU-hours"] = f"{', '.join(f'{gpu} {h}' for gpu, h in hours.items())} (computed, at {share})"
    if exp.sweep and exp.adapt:
        rows = sum(len(exp.sweep.adaptations(t, i)) for t in exp.adapt.tasks for i in exp.sweep.init)
        grid = rows * len(exp.sweep.contrasts.train) * len(exp.sweep.label_fractions) * len(exp.sweep.seeds)
        folds = exp.sweep.folds * exp.sweep.group_by.count("subject")
        others = [scheme for scheme in exp.sweep.group_by if scheme != "subject"]
        cost["cells"] = f"{grid * folds}" + "".join(f" + {grid} for each {scheme}" for scheme in others)
        cost |= {
            f"search of {way}": said for way, said in _searches(exp.adapt) if way in exp.sweep.adaptation
        }
    return cost
