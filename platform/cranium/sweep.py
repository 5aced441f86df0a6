"""A declared grid of cells on Ray Tune: one trial per cell, each a few lines around `adapt.run_cell`.

A cell's identity is a hash of all that shapes its result, so a second sweep runs only what is missing. Before the
first trial the splits are made, checked for leakage and written down.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cranium import adapt, store
from cranium.config import PRETRAINED_HERE, Cell, Classification, Experiment, Machine, UserError, fingerprint
from cranium.store import Artefact
from cranium.tasks import splits

Progress = Callable[[int, int, str], None]
Features = Mapping[tuple[str, str], Artefact]  # (init, cohort) -> features
Folds = dict[str, int]


@dataclass(frozen=True)
class Grid:
    """What a sweep will do, or has done."""

    artefact: Artefact
    works: tuple[adapt.Work, ...]
    folds: Mapping[str, Folds]  # "<task>/<scheme>/<seed>" -> subject -> fold
    stamps: tuple[str, ...]  # overlaps accepted by name; every report shows them

    @property
    def missing(self) -> tuple[adapt.Work, ...]:
        return tuple(work for work in self.works if not Artefact(work.folder).done)


def assign(exp: Experiment, shard_sets: Mapping[str, Artefact]) -> tuple[dict[str, Folds], tuple[str, ...]]:
    """The splits of every task, and what the leakage gate let pass by name.

    Needs shard sets only, so it is asked before anything is trained. Raises `UserError(LEAKAGE)` when a declared
    group, a subject, a file or a declared overlap is on two sides and not accepted by name.
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
                for overlap in _gate(exp, task, assigned, shard_sets):
                    tasks, schemes = accepted.setdefault(overlap, (set(), set()))
                    tasks.add(task.name)
                    schemes.add(scheme)
    stamps = (
        f"{what}: {', '.join(sorted(tasks))}, folds grouped by {' and by '.join(sorted(schemes))}"
        for what, (tasks, schemes) in accepted.items()
    )
    return folds, tuple(sorted(stamps))


def declare(
    exp: Experiment, machine: Machine, shard_sets: Mapping[str, Artefact], features: Features
) -> Grid:
    """Every cell of the experiment's grid with its identity; the splits and the leakage gate are `assign`'s."""
    assert exp.sweep and exp.adapt
    folds, stamps = assign(exp, shard_sets)
    works = [
        work
        for task in exp.adapt.tasks
        for scheme in exp.sweep.group_by
        for seed in exp.sweep.seeds
        for work in _works(
            exp, machine, task, scheme, seed, folds[f"{task.name}/{scheme}/{seed}"], shard_sets, features
        )
    ]
    key = {"works": [work.folder.name for work in works]}
    return Grid(store.artefact(machine.store, "sweep", exp.name, key), tuple(works), folds, stamps)


def _works(
    exp: Experiment,
    machine: Machine,
    task: Classification,
    scheme: str,
    seed: int,
    folds: Folds,
    shard_sets: Mapping[str, Artefact],
    features: Features,
) -> list[adapt.Work]:
    assert exp.sweep and exp.adapt
    works = []
    for init in exp.sweep.init:
        cohorts = [
            adapt.Cohort(
                name, shard_sets[name].path, None if init == "covariates" else features[init, name].path
            )
            for name in (task.cohort, *task.external)
        ]
        manifest = shard_sets[task.cohort].manifest()
        for fraction in exp.sweep.label_fractions:
            for fold in sorted(set(folds.values())):
                cell = Cell(
                    task=task.name,
                    cohort=task.cohort,
                    init=init,
                    label_fraction=fraction,
                    scheme=scheme,
                    fold=fold,
                    seed=seed,
                    contrasts=tuple(manifest["channels"]),
                )
                key = {
                    "recipe": adapt.RECIPE,
                    "cell": cell,
                    "task": task,
                    "probe": exp.adapt.probe,
                    "covariates": exp.adapt.covariates if init == "covariates" else (),
                    "folds": splits.digest(folds),
                    "cohorts": [[c.shard_set.name, c.features.name if c.features else None] for c in cohorts],
                }
                folder = store.artefact(machine.store, "adapt", cell.name, key).path
                tags = (("cell", fingerprint(key)[:16]), ("manifest", cohorts[0].shard_set.name))
                works.append(
                    adapt.Work(
                        cell,
                        task,
                        exp.adapt.probe,
                        exp.adapt.covariates,
                        cohorts[0],
                        tuple(cohorts[1:]),
                        folder,
                        tags,
                    )
                )
    return works


def _gate(
    exp: Experiment, task: Classification, folds: Folds, shard_sets: Mapping[str, Artefact]
) -> list[str]:
    """Leakage between train, test, external and the SSL corpus, by subject, declared group and file content."""
    assert exp.adapt and exp.sweep
    pretrained = set(exp.sweep.init) & set(PRETRAINED_HERE) and exp.pretrain
    corpus = exp.pretrain.cohorts if pretrained and exp.pretrain else ()
    home = _units(shard_sets[task.cohort])
    fixed = {
        "ssl": [_units(shard_sets[c]) for c in corpus],
        "external": [_units(shard_sets[c]) for c in task.external],
    }
    declared = _declared({"test": [task.cohort], "ssl": corpus, "external": task.external}, shard_sets)
    found: dict[tuple[str, tuple[str, str]], set[str]] = {}
    for fold in sorted(set(folds.values())):
        test = home["subject_id"].map(lambda s, k=fold: folds.get(s) == k)
        train = home["subject_id"].map(lambda s, k=fold: s in folds and folds[s] != k)
        sides = {"train": [home[train]], "test": [home[test]], **fixed}
        units = {
            unit: {
                side: {v for t in tables if unit in t for vs in t[unit] for v in vs}
                for side, tables in sides.items()
            }
            for unit in sorted({c for tables in sides.values() for t in tables for c in t} - {"subject_id"})
        }
        units["overlap"] = declared
        try:
            overlaps = splits.check_leakage(units, exp.adapt.accept_leakage)
        except splits.Leakage as leakage:
            raise UserError(
                "LEAKAGE", f"task {task.name}: {str(leakage).removeprefix('LEAKAGE: ')}"
            ) from None
        except ValueError as error:
            raise UserError("CONFIG", f"adapt.accept_leakage: {error}") from None
        for overlap in overlaps:
            found.setdefault((overlap.unit, overlap.splits), set()).update(overlap.ids)
    return [_in_words(unit, sides, sorted(ids)) for (unit, sides), ids in sorted(found.items())]


def _in_words(unit: str, sides: tuple[str, str], ids: list[str]) -> str:
    first, second = ("SSL corpus" if side == "ssl" else side for side in sides)
    shown = ", ".join(ids[:6]) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")
    if unit == "overlap":
        return f"{first} and {second} hold collections that are declared to overlap ({shown})"
    return f"{len(ids)} {unit}{'' if len(ids) == 1 else 's'} shared between {first} and {second} ({shown})"


def _declared(sides: Mapping[str, Iterable[str]], shard_sets: Mapping[str, Artefact]) -> dict[str, set[str]]:
    """side -> the pairs of collections on it that a card's `overlaps:` declares to share people."""
    cards = {c: shard_sets[c].manifest()["card"] for cohorts in sides.values() for c in cohorts}
    pairs = {frozenset((c, overlap["cohort"])) for c, card in cards.items() for overlap in card["overlaps"]}
    return {
        side: {" and ".join(sorted(p)) for p in pairs if p & set(cohorts)} for side, cohorts in sides.items()
    }


def _units(shard_set: Artefact) -> pd.DataFrame:
    """One row per session: the values of every unit of leakage, as tuples; ids of a cohort are its own."""
    manifest = shard_set.manifest()
    cohort, card = manifest["cohort"], manifest["card"]
    table = pd.read_parquet(shard_set.path / "sessions.parquet")
    units: dict[str, Any] = {
        "subject_id": table["subject"],
        "subject": [(f"{cohort}/{s}",) for s in table["subject"]],
        "content": [tuple(source["sha256"] for source in json.loads(s).values()) for s in table["sources"]],
    }
    for group in card["groups"]:
        # Simulated cohorts share their source heads by name; families and the like are numbered per collection.
        shared = bool(card["simulated"])
        units[group] = [(str(v) if shared else f"{cohort}/{v}",) for v in table[group]]
    return pd.DataFrame(units)


def sweep(grid: Grid, exp: Experiment, progress: Progress | None = None) -> tuple[Artefact, int]:
    """Run what is missing of the grid; return its artefact and how many cells were made now.

    Cells that fail leave the others alone; they are named at the end in `UserError(CELLS_FAILED)`, exit code 1.
    """
    missing = grid.missing
    if missing:
        failures = _run(grid, missing, exp, progress)
        if failures:
            shown = "; ".join(f"{name}: {reason}" for name, reason in sorted(failures.items())[:3])
            raise UserError(
                "CELLS_FAILED", f"{len(failures)} of {len(missing)} cells failed: {shown}", exit_code=1
            )
    if missing or not grid.artefact.done:
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
    return grid.artefact, len(missing)


def _run(
    grid: Grid, missing: tuple[adapt.Work, ...], exp: Experiment, progress: Progress | None
) -> dict[str, str]:
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
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(missing, stop, progress), daemon=True)
    watcher.start()
    try:
        results = tuner.fit()
    finally:
        stop.set()
        watcher.join()
    if progress:
        progress(len(missing), len(missing), "cells")
    return {
        missing[result.config["cell"]].cell.name: str(result.error).strip().splitlines()[-1]
        for result in results
        if result.error and result.config
    }


def _watch(works: tuple[adapt.Work, ...], stop: threading.Event, progress: Progress | None) -> None:
    while progress and not stop.wait(0.5):
        progress(sum(Artefact(work.folder).done for work in works), len(works), "cells")


def _trial(config: dict[str, Any], works: tuple[adapt.Work, ...], folds: Mapping[str, Folds]) -> None:
    from ray import tune

    work = works[config["cell"]]
    cell = work.cell
    scores = adapt.run_cell(work, folds[f"{cell.task}/{cell.scheme}/{cell.seed}"])
    tune.report({name: value for name, value in scores.items() if value is not None})
