"""A declared grid of cells on Ray Tune: one trial per cell, each a few lines around `adapt.run_cell`.

A cell's identity is a hash of all that shapes its result, so a second sweep runs only what is missing. Before the
first trial the splits are made, checked for leakage and written down.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cranium import adapt, leakage, segmenting, store
from cranium.config import (
    WITHOUT_BACKBONE,
    Cell,
    Classification,
    Experiment,
    Machine,
    Segmentation,
    Sweep,
    Task,
    UserError,
    fingerprint,
)
from cranium.store import Artefact
from cranium.tasks import splits
from cranium.watch import repeatedly

Progress = Callable[[int, int, str], None]
# (init, cohort) -> features; (init, cohort, adaptation) -> tokens for the decoder of that adaptation
Features = Mapping[tuple[str, ...], Artefact]
Work = adapt.Work | segmenting.Work
Folds = dict[str, int]


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


def assign(exp: Experiment, shard_sets: Mapping[str, Artefact]) -> tuple[dict[str, Folds], tuple[str, ...]]:
    """The splits of every task, and what the leakage gate let pass by name.

    Needs shard sets only, so it is asked before anything is trained. Raises `UserError(LEAKAGE)` when a declared
    group, a subject, a file, a declared overlap or a head that looks the same is on two sides and not accepted by name.
    """
    assert exp.sweep and exp.adapt
    folds: dict[str, Folds] = {}
    accepted: dict[str, tuple[set[str], set[str]]] = {}  # what is shared -> tasks and groupings of folds
    for task in exp.adapt.tasks:
        table = adapt.subjects(shard_sets[task.cohort].path, task)
        for scheme in exp.sweep.group_by:
            for seed in exp.sweep.seeds:
                assigned = adapt.assign_folds(table, scheme, exp.sweep.folds, seed)
                folds[f"{task.name}/{scheme}/{seed}"] = assigned
                for overlap in leakage.gate(exp, task, assigned, shard_sets):
                    tasks, schemes = accepted.setdefault(overlap, (set(), set()))
                    tasks.add(task.name)
                    schemes.add(scheme)
    stamps = (
        f"{what}: {', '.join(sorted(tasks))}, folds grouped by {' and by '.join(sorted(schemes))}"
        for what, (tasks, schemes) in accepted.items()
    )
    return folds, tuple(sorted(stamps))


def declare(
    exp: Experiment,
    machine: Machine,
    shard_sets: Mapping[str, Artefact],
    features: Features,
    label_files: Mapping[str, segmenting.LabelFiles] | None = None,
) -> Grid:
    """Every cell of the experiment's grid with its identity; the splits and the leakage gate are `assign`'s.

    `label_files`: of every cohort that a segmentation is tested on, which are machine facts and no part of an identity.
    """
    assert exp.sweep and exp.adapt
    folds, stamps = assign(exp, shard_sets)
    works = [
        _segmentation(exp, machine, task, cell, mine, shard_sets, features, label_files or {})
        if isinstance(task, Segmentation)
        else _classification(exp, machine, task, cell, mine, shard_sets, features)
        for task in exp.adapt.tasks
        for cell in _cells(exp.sweep, task, folds, shard_sets)
        for mine in [folds[f"{task.name}/{cell.scheme}/{cell.seed}"]]
    ]
    key = {"works": [work.folder.name for work in works]}
    return Grid(store.artefact(machine.store, "sweep", exp.name, key), tuple(works), folds, stamps)


def _cells(
    spec: Sweep, task: Task, folds: Mapping[str, Folds], shard_sets: Mapping[str, Artefact]
) -> Iterator[Cell]:
    contrasts = tuple(shard_sets[task.cohort].manifest()["channels"])
    for scheme, seed, init in itertools.product(spec.group_by, spec.seeds, spec.init):
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
            )


def _classification(
    exp: Experiment,
    machine: Machine,
    task: Classification,
    cell: Cell,
    folds: Folds,
    shard_sets: Mapping[str, Artefact],
    features: Features,
) -> adapt.Work:
    assert exp.adapt
    cohorts = [
        adapt.Cohort(
            name,
            shard_sets[name].path,
            None if cell.init in WITHOUT_BACKBONE else features[cell.init, name].path,
        )
        for name in (task.cohort, *task.external)
    ]
    key = {
        "recipe": adapt.RECIPE,
        "cell": cell,
        "task": task,
        "probe": exp.adapt.probe,
        "covariates": exp.adapt.covariates if cell.init == "covariates" else (),
        "folds": splits.digest(folds),
        "cohorts": [[c.shard_set.name, c.features.name if c.features else None] for c in cohorts],
    }
    return adapt.Work(
        cell,
        task,
        exp.adapt.probe,
        exp.adapt.covariates,
        cohorts[0],
        tuple(cohorts[1:]),
        store.artefact(machine.store, "adapt", cell.name, key).path,
        (("cell", fingerprint(key)[:16]), ("manifest", cohorts[0].shard_set.name)),
    )


def _segmentation(
    exp: Experiment,
    machine: Machine,
    task: Segmentation,
    cell: Cell,
    folds: Folds,
    shard_sets: Mapping[str, Artefact],
    features: Features,
    label_files: Mapping[str, segmenting.LabelFiles],
) -> segmenting.Work:
    assert exp.adapt
    if cell.adaptation == "finetune":
        raise UserError("NOT_YET", "sweep.adaptation: a segmentation cannot be fine-tuned yet; drop finetune")
    cohorts = [
        segmenting.Cohort(
            name, shard_sets[name].path, features[cell.init, name, cell.adaptation].path, label_files[name]
        )
        for name in (task.cohort, *task.external)
    ]
    key = {
        "recipe": segmenting.RECIPE,
        "cell": cell,
        "task": task,
        "classes": list(task.classes),  # their order numbers them, and a mapping has none here
        "decoder": exp.adapt.decoder,
        "folds": splits.digest(folds),
        "cohorts": [[c.shard_set.name, c.tokens.name] for c in cohorts],
    }
    return segmenting.Work(
        cell,
        task,
        exp.adapt.decoder,
        cohorts[0],
        tuple(cohorts[1:]),
        store.artefact(machine.store, "adapt", cell.name, key).path,
        (("cell", fingerprint(key)[:16]), ("manifest", cohorts[0].shard_set.name)),
    )


def sweep(grid: Grid, exp: Experiment, progress: Progress | None = None) -> dict[str, str]:
    """Run what is missing of the grid; returns the cells that failed: folder name -> reason.

    Cells that fail leave the others alone, and are tried again next time; the grid is committed once it is whole.
    """
    missing = grid.missing
    failures = _run(grid, missing, exp, progress) if missing else {}
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


def _run(grid: Grid, missing: tuple[Work, ...], exp: Experiment, progress: Progress | None) -> dict[str, str]:
    from ray import tune

    assert exp.sweep
    compute = exp.sweep.compute
    trial = tune.with_parameters(_trial, works=missing, folds=dict(grid.folds))
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": compute.cpus_per_worker, "gpu": compute.gpus_per_worker}),
        param_space={"cell": tune.grid_search(list(range(len(missing))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=compute.num_workers, reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"{grid.artefact.path.name}-tune",
            storage_path=str(grid.artefact.path.parent / ".tune"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )

    def tell() -> None:
        if progress:
            progress(sum(Artefact(work.folder).done for work in missing), len(missing), "cells")

    with repeatedly(tell, 0.5):
        results = tuner.fit()
    if progress:
        progress(len(missing), len(missing), "cells")
    return {
        missing[result.config["cell"]].folder.name: str(result.error).strip().splitlines()[-1]
        for result in results
        if result.error and result.config
    }


def _trial(config: dict[str, Any], works: tuple[Work, ...], folds: Mapping[str, Folds]) -> None:
    from ray import tune

    work = works[config["cell"]]
    cell = work.cell
    scores = adapt.run_cell(work, folds[f"{cell.task}/{cell.scheme}/{cell.seed}"])
    tune.report({name: value for name, value in scores.items() if value is not None})
