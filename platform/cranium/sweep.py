"""A declared grid of cells on Ray Tune: one trial per cell, each a few lines around `adapt.run_cell`.

A cell's identity is a hash of all that shapes its result, so a second sweep runs only what is missing. Before the
first trial the splits are made, checked for leakage and written down.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from cranium import (
    adapt,
    checkpoint,
    errors,
    leakage,
    meters,
    segmenting,
    store,
    sweep_progress,
    tuned_decoder,
    tuning,
)
from cranium.config import (
    FROZEN,
    WITHOUT_BACKBONE,
    Adapt,
    Adaptation,
    Attention,
    Cell,
    Classification,
    Compute,
    Experiment,
    Finetune,
    Init,
    Knn,
    Machine,
    Probe,
    Segmentation,
    Task,
    fingerprint,
    hiding,
)
from cranium.store import Artefact
from cranium.tasks import splits
from cranium.watch import repeatedly

Tell = Callable[[int, int, str], None]
# (init, cohort, *contrasts) -> features where these alone are seen, none: all that is there; (init, cohort, adaptation)
# -> tokens for the decoder of that adaptation
Features = Mapping[tuple[str, ...], Artefact]
Weights = Mapping[str, Artefact]  # init -> the pretraining behind it
Work = adapt.Work | segmenting.Work
Folds = dict[str, int]
ShardSets = Mapping[str, Artefact]


@dataclass(frozen=True)
class Part:
    """What a grid is made of, of one kind of stack: the experiment with it alone, and what its cells learn from.

    label_files: of every cohort that a segmentation is tested on, which are machine facts and no part of an identity.
    weights: the pretraining behind an initialisation, where one is.
    """

    exp: Experiment
    shard_sets: ShardSets
    features: Features = field(default_factory=dict)
    label_files: Mapping[str, segmenting.LabelFiles] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """What a sweep will do, or has done."""

    artefact: Artefact
    works: tuple[Work, ...]
    folds: Mapping[str, Folds]  # "<task>/<scheme>/<seed>" -> subject -> fold
    stamps: tuple[str, ...]  # overlaps accepted by name; every report shows them

    @property
    def missing(self) -> tuple[Work, ...]:
        return tuple(work for work in self.works if not Artefact(work.folder).done)


def assign(parts: Sequence[Part]) -> tuple[dict[str, Folds], tuple[str, ...]]:
    """The splits of every task, the same for all kinds of stack, and what the leakage gate let pass by name.

    Needs shard sets only, so it is asked before anything is trained. In the folds are those who can be used with each
    kind of stack. Raises `UserError(LEAKAGE)` when a declared group, a subject, a file, a declared overlap or a head
    that looks the same is on two sides and not accepted by name.
    """
    exp = parts[0].exp
    assert exp.sweep and exp.adapt
    folds: dict[str, Folds] = {}
    accepted: dict[str, tuple[set[str], set[str]]] = {}  # what is shared -> tasks and groupings of folds
    for task in exp.adapt.tasks:
        table = adapt.shared([part.shard_sets[task.cohort].path for part in parts], task)
        for scheme in exp.sweep.group_by:
            for seed in exp.sweep.seeds:
                assigned = adapt.assign_folds(table, scheme, exp.sweep.folds, seed)
                folds[f"{task.name}/{scheme}/{seed}"] = assigned
                for part in parts:
                    for overlap in leakage.gate(part.exp, task, assigned, part.shard_sets):
                        tasks, schemes = accepted.setdefault(overlap, (set(), set()))
                        tasks.add(task.name)
                        schemes.add(scheme)
    stamps = (
        f"{what}: {', '.join(sorted(tasks))}, folds grouped by {' and by '.join(sorted(schemes))}"
        for what, (tasks, schemes) in accepted.items()
    )
    return folds, tuple(sorted(stamps))


def declare(machine: Machine, parts: Sequence[Part]) -> Grid:
    """Every cell of an experiment's grid with its identity; the splits and the leakage gate are `assign`'s."""
    folds, stamps = assign(parts)
    works = [
        _segmentation(part, machine, task, cell, mine)
        if isinstance(task, Segmentation)
        else _classification(part, machine, task, cell, mine)
        for part in parts
        for task in part.exp.adapt.tasks  # type: ignore[union-attr]
        for cell in _cells(part.exp, task, folds, part.shard_sets)
        for mine in [folds[f"{task.name}/{cell.scheme}/{cell.seed}"]]
    ]
    key = {"works": [work.folder.name for work in works]}
    made = store.artefact(machine.store, "sweep", parts[0].exp.name, key)
    return Grid(made, tuple(works), folds, stamps)


def _cells(exp: Experiment, task: Task, folds: Mapping[str, Folds], shard_sets: ShardSets) -> Iterator[Cell]:
    assert exp.sweep
    spec, channels = exp.sweep, tuple(shard_sets[task.cohort].manifest()["channels"])
    trained, subsets = spec.contrasts.trained(channels), spec.contrasts.judged(channels)
    for scheme, seed, init, contrasts in itertools.product(spec.group_by, spec.seeds, spec.init, trained):
        numbers = sorted(set(folds[f"{task.name}/{scheme}/{seed}"].values()))
        for adaptation, fraction, fold in itertools.product(
            spec.adaptations(task, init), spec.label_fractions, numbers
        ):
            yield Cell(
                task=task.name,
                cohort=task.cohort,
                init=init,
                adaptation=adaptation,
                label_fraction=fraction,
                scheme=scheme,
                fold=fold,
                seed=seed,
                contrasts=contrasts,
                subsets=subsets,
                fill=exp.fill,
                stack=exp.ingest.stack,
            )


def _classification(
    part: Part, machine: Machine, task: Classification, cell: Cell, folds: Folds
) -> adapt.Work:
    exp, shard_sets = part.exp, part.shard_sets
    assert exp.adapt
    frozen = cell.adaptation in FROZEN and cell.init != "covariates"

    def seen(name: str, subset: tuple[str, ...]) -> adapt.Cohort:
        hidden = () if cell.init == "volumes" else hiding(subset, shard_sets[name].manifest()["channels"])
        made = part.features[(cell.init, name, *hidden)].path if frozen else None
        return adapt.Cohort(name, shard_sets[name].path, made, subset)

    names = (task.cohort, *task.external)
    cohorts = [seen(name, cell.contrasts) for name in names]
    shown = [seen(name, subset) for subset in cell.subsets for name in names]
    spec, start = _spec(exp.adapt, cell.adaptation), None
    key = {
        "recipe": adapt.RECIPE,
        "cell": cell,
        "task": task,
        "spec": spec,
        "covariates": exp.adapt.covariates if cell.init == "covariates" else (),
        "folds": splits.digest(folds),
        "cohorts": [[c.shard_set.name, c.features.name if c.features else None] for c in (*cohorts, *shown)],
    }
    if cell.adaptation not in FROZEN:
        start = _start(exp, machine, cell.init, part.weights.get(cell.init))
        key |= {"start": _identity(start), "tuning": tuning.RECIPE}
    return adapt.Work(
        cell,
        task,
        spec,
        exp.adapt.covariates,
        cohorts[0],
        tuple(cohorts[1:]),
        store.artefact(machine.store, "adapt", cell.name, key).path,
        (("cell", fingerprint(key)[:16]), ("manifest", cohorts[0].shard_set.name)),
        start,
        tuple(shown),
    )


def _segmentation(
    part: Part, machine: Machine, task: Segmentation, cell: Cell, folds: Folds
) -> segmenting.Work:
    exp = part.exp
    assert exp.adapt
    frozen, spec = cell.adaptation in FROZEN, exp.adapt.decoder

    def tokens(name: str) -> Path | None:
        return part.features[cell.init, name, cell.adaptation].path if frozen else None

    cohorts = [
        segmenting.Cohort(name, part.shard_sets[name].path, tokens(name), part.label_files[name])
        for name in (task.cohort, *task.external)
    ]
    key = {
        "recipe": segmenting.RECIPE,
        "cell": cell,
        "task": task,
        "classes": list(task.classes),  # their order numbers them, and a mapping has none here
        "decoder": spec.model_dump(mode="json", exclude={"tuned"} if frozen else {"steps", "batch_size"}),
        "folds": splits.digest(folds),
        "cohorts": [[c.shard_set.name, c.tokens.name if c.tokens else None] for c in cohorts],
    }
    start = None
    if not frozen:
        start = _start(exp, machine, cell.init, part.weights.get(cell.init))
        key |= {"start": _identity(start), "tuning": tuned_decoder.RECIPE}
    return segmenting.Work(
        cell,
        task,
        spec,
        cohorts[0],
        tuple(cohorts[1:]),
        store.artefact(machine.store, "adapt", cell.name, key).path,
        (("cell", fingerprint(key)[:16]), ("manifest", cohorts[0].shard_set.name)),
        start,
    )


def _spec(spec: Adapt, adaptation: Adaptation) -> Probe | Knn | Attention | Finetune:
    match adaptation:
        case "linear":
            return spec.probe
        case "knn":
            return spec.knn
        case "attention":
            return spec.attention
        case "finetune":
            return spec.finetune
        case "lora":
            return spec.lora
        case "conv":
            raise AssertionError("only segmentation is learnt so")


def _start(exp: Experiment, machine: Machine, init: Init, pretrained: Artefact | None) -> tuning.Start:
    arch = exp.arch if init in WITHOUT_BACKBONE else checkpoint.architecture(init, exp.arch, pretrained)
    made = pretrained.path if pretrained else None
    spec = exp.embed
    return tuning.Start(init, arch, spec.seed, spec.features, exp.fill, machine.weights, made)


def _identity(start: tuning.Start) -> dict[str, Any]:
    """What of a start shapes a result: the weights by what they are, not by where they lie."""
    weights = checkpoint.identity(start.weights) if start.weights and not start.pretrained else None
    made = Artefact(start.pretrained).id if start.pretrained else None
    return asdict(start) | {"weights": weights, "pretrained": made}


def sweep(grid: Grid, exp: Experiment, tell: Tell | None = None) -> dict[str, str]:
    """Run what is missing of the grid; returns the cells that failed: folder name -> reason.

    Cells that fail leave the others alone, and are tried again next time; the grid is committed once it is whole.
    """
    assert exp.sweep
    sweep_progress.announce(grid.artefact, (work.folder for work in grid.works))
    missing, compute = grid.missing, exp.sweep.compute
    failures: dict[str, str] = {}
    for frozen, resources in ((True, compute), (False, compute.tuned)):
        part = tuple(work for work in missing if (work.cell.adaptation in FROZEN) == frozen)
        failures |= _searched(grid, part, resources, tell)
        if part := tuple(work for work in part if work.folder.name not in failures):
            failures |= _run(exp, grid, part, resources, tell)
    for work in missing:
        if reason := failures.get(work.folder.name):
            sweep_progress.failed(work.folder, reason)
    sweep_progress.mended(work.folder for work in missing)
    if not failures and (missing or not grid.artefact.done):
        store.write_atomic(
            grid.artefact.path / "splits.json", json.dumps(grid.folds, indent=1, sort_keys=True)
        )
        store.commit(
            grid.artefact.path,
            {
                "stage": "sweep",
                "cells": [work.folder.name for work in grid.works],
                "splits": {name: splits.digest(folds) for name, folds in grid.folds.items()},
                "stamps": list(grid.stamps),
            },
        )
    return failures


def _searched(grid: Grid, part: tuple[Work, ...], compute: Compute, tell: Tell | None) -> dict[str, str]:
    """Search for the settings of those cells that are to be searched for; name -> reason of those that failed."""
    asked = [work for work in part if isinstance(work, adapt.Work)]
    if not any(isinstance(work.spec, Finetune) and work.spec.search for work in asked):
        return {}
    from cranium import searching  # it brings Tune

    each = [(w, grid.folds[f"{w.cell.task}/{w.cell.scheme}/{w.cell.seed}"]) for w in asked]
    wanted = [(work, folds) for work, folds in each if searching.wanted(work, folds)]
    if not wanted:
        return {}
    name, storage = f"{grid.artefact.path.name}-search", grid.artefact.path.parent / ".tune"
    return searching.search(name, storage, wanted, compute, tell or (lambda done, total, text: None))


def _run(
    exp: Experiment, grid: Grid, part: tuple[Work, ...], compute: Compute, tell: Tell | None
) -> dict[str, str]:
    """Run these cells, each a trial with the resources of `compute`; name -> reason of those that failed."""
    import ray
    from ray import tune

    threads = compute.threads or max(1, int(compute.cpus_per_worker))
    # In a tuple, so that it comes to a trial as a reference: read by each of them, 10,000 cells cost it 0.2 s.
    shared = (ray.put((part, dict(grid.folds))),)
    trial = tune.with_parameters(_trial, shared=shared, threads=threads, experiment=exp.name)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": compute.cpus_per_worker, "gpu": compute.gpus_per_worker}),
        param_space={"cell": tune.grid_search(list(range(len(part))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=compute.num_workers, reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"{grid.artefact.path.name}-{len(part)}-tune",
            storage_path=str(grid.artefact.path.parent / ".tune"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )

    def count() -> None:
        missing = grid.missing
        done, failed = len(grid.works) - len(missing), sweep_progress.broken(work.folder for work in missing)
        labels = {"experiment": exp.name, "run": grid.artefact.path.name}
        for state, cells in {"done": done, "failed": failed, "missing": len(missing) - failed}.items():
            meters.put("cranium_sweep_cells", cells, {**labels, "state": state})
        if tell:
            tell(done, len(grid.works), "cells")

    with repeatedly(count, 0.5):
        results = tuner.fit()
    count()
    return {
        part[result.config["cell"]].folder.name: _reason(exp, result.error)
        for result in results
        if result.error and result.config
    }


def _reason(exp: Experiment, error: Exception) -> str:
    """Why a cell failed, in a line."""
    if ran_out := errors.out_of_memory(error):
        where, what = ran_out
        return f"{what}; {errors.less_memory(exp, 'sweep', where)}"
    return str(error).strip().splitlines()[-1]


@lru_cache(maxsize=1)
def _read(shared: Any) -> tuple[tuple[Work, ...], Mapping[str, Folds]]:
    """The cells and their folds, once for all trials of a process."""
    import ray

    found: tuple[tuple[Work, ...], Mapping[str, Folds]] = ray.get(shared)
    return found


def _trial(config: dict[str, Any], shared: tuple[Any], threads: int, experiment: str) -> None:
    import torch

    from ray import tune

    torch.set_num_threads(threads)
    works, folds = _read(shared[0])
    work = works[config["cell"]]
    cell = work.cell
    labels, begun = {"experiment": experiment, "adaptation": cell.adaptation}, time.monotonic()
    try:
        scores = adapt.run_cell(work, folds[f"{cell.task}/{cell.scheme}/{cell.seed}"])
    except Exception as error:  # said at once, for who looks on
        sweep_progress.failed(work.folder, f"{type(error).__name__}: {error}")
        meters.put("cranium_sweep_cell_failures_total", 1, labels)
        raise
    meters.put("cranium_sweep_cell_seconds", time.monotonic() - begun, labels)
    tune.report({name: value for name, value in scores.items() if value is not None})
