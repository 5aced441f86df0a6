"""A sweep of frozen cells against the fits alone: what Tune, the files and MLflow add to each cell.

`cranium bench sweep [cells= subjects= dim= data= out=]`. Features are generated: noise, shifted a little by class.
Cells are whole ones: inner folds, regularisation, judging, files, a run in MLflow.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from rich.console import Console
from threadpoolctl import threadpool_limits

from cranium import adapt, bench, cluster, embed, recording, store, sweep
from cranium.config import Experiment, Machine
from cranium.store import Artefact
from cranium.study import Study
from cranium.volume import fingerprint

COHORT = "bench"
FRACTIONS = (0.05, 0.1, 0.25, 0.5, 1.0)
FOLDS = 5
SLICES = 4  # feature rows of a subject


class Spec(bench.Settings):
    cells: int = Field(1000, ge=2 * FOLDS * len(FRACTIONS), multiple_of=FOLDS * len(FRACTIONS))
    subjects: int = Field(300, ge=100)
    dim: int = Field(768, ge=8)  # CLS and patch mean of a ViT-S


def run(spec: Spec, say: Callable[[str], None]) -> bench.Result:
    """Measure the stages of one sweep in turn; each is worked once, as a user's would be."""
    machine = bench.machine()
    folder = spec.data / "bench-sweep"
    shutil.rmtree(folder, ignore_errors=True)
    own = Machine(store=folder)
    exp = experiment(spec)
    sets, features = generated(folder, spec)
    study = Study(exp, own, {}, Console(quiet=True))
    grid = sweep.declare(own, [sweep.Part(exp, sets, features)])
    alone = grid.works[:: max(1, len(grid.works) // 100)]  # some of every fraction

    def fits() -> None:
        with threadpool_limits(1):  # as Ray's workers have it
            for work in alone:
                cell = work.cell
                adapt.run_cell(work, grid.folds[f"{cell.task}/{cell.scheme}/{cell.seed}"])
                shutil.rmtree(work.folder)

    def again() -> None:
        whole = sweep.declare(own, [sweep.Part(exp, sets, features)])
        assert not whole.missing
        recording.swept(study, whole, {})

    with cluster.connect(own):
        swept = bench.Case("sweep", len(grid.works), lambda: _swept(study, grid), "cells", 1, warm=False)
        cases = [
            bench.Case("cells alone, one process", len(alone), fits, "cells", 1),
            swept,
            bench.Case("again, all there", len(grid.works), again, "cells", 1),
        ]
        measured = bench.measure(cases, 1, say)
    shutil.rmtree(folder)
    return bench.Result(
        "sweep",
        "cranium bench sweep",
        spec.model_dump(mode="json", exclude={"data", "out"}),
        machine | {"load_after": bench.load()},
        measured,
        _targets({case.name: case for case in measured}),
    )


def _swept(study: Study, grid: sweep.Grid) -> dict[str, float]:
    begun = time.perf_counter()
    with recording.sweeping(study, grid, lambda done, total, text: None) as live:
        failures = sweep.sweep(grid, study.exp, live)
    fitted = time.perf_counter()
    recording.swept(study, grid, failures)
    assert not failures and not study.notes, study.notes
    return {"trials_s": fitted - begun, "mlflow_after_s": time.perf_counter() - fitted}


def _targets(measured: Mapping[str, bench.Measured]) -> list[bench.Target]:
    alone, whole, again = (measured[n] for n in ("cells alone, one process", "sweep", "again, all there"))
    wall = sum(whole.wall)
    added = 2 * wall / whole.items - 1 / alone.per_second  # two workers
    target = bench.Target
    return [
        target("minutes for 1,000 cells, all in", wall / whole.items * 1000 / 60, 10, at_least=False),
        target("s of a worker a cell, beyond the cell alone", added, 0.3, at_least=False),
        target("s to run 1,000 finished cells again", 1000 / again.per_second, 10, at_least=False),
    ]


# ---- generated input ------------------------------------------------------------------------------------------------


def experiment(spec: Spec) -> Experiment:
    task = {
        "task": "classification",
        "name": "bench",
        "cohort": COHORT,
        "label": "label",
        "classes": ["a", "b"],
    }
    grid = {
        "init": ["random"],
        "label_fractions": FRACTIONS,
        "folds": FOLDS,
        "seeds": list(range(spec.cells // (FOLDS * len(FRACTIONS)))),
        "compute": {"num_workers": 2},
    }
    plain = {"name": "bench", "ingest": {"cohorts": [COHORT]}, "adapt": {"tasks": [task]}, "sweep": grid}
    return Experiment.model_validate(plain)


def generated(folder: Path, spec: Spec) -> tuple[dict[str, Artefact], dict[tuple[str, ...], Artefact]]:
    """A cohort and its features in the store `folder`, as a sweep takes them."""
    return {COHORT: _shard_set(folder, spec)}, {("random", COHORT): _features(folder, spec)}


def _subjects(spec: Spec) -> list[str]:
    return [f"{n:05d}" for n in range(spec.subjects)]


def _shard_set(folder: Path, spec: Spec) -> Artefact:
    """Manifest and sessions of a cohort whose stacks nobody will read."""
    made = Artefact(folder / "ingest" / "bench-sweep")
    if made.done:
        return made
    made.path.mkdir(parents=True)
    names = _subjects(spec)
    rng = np.random.default_rng(0)
    shape = (fingerprint.FRAMES, 2, fingerprint.CELLS)
    pd.DataFrame(
        {
            "cohort": COHORT,
            "subject": names,
            "session": "",
            "present": 1,
            "label": ["ab"[n % 2] for n in range(spec.subjects)],
            "fingerprint": [np.packbits(rng.random(shape) < 0.5, axis=2).tobytes() for _ in names],
            "sources": [json.dumps({"T1w": {"path": name, "sha256": name}}) for name in names],
        }
    ).to_parquet(made.path / "sessions.parquet")
    labels = {"label": {"column": "label", "classes": {"a": ["a"], "b": ["b"]}}}
    card: dict[str, Any] = {
        "labels": labels,
        "groups": [],
        "matched": None,
        "overlaps": [],
        "simulated": True,
    }
    store.commit(made.path, {"cohort": COHORT, "card": card, "channels": ["T1w"], "overlap_ids": {}})
    return made


def _features(folder: Path, spec: Spec) -> Artefact:
    made = Artefact(folder / "embed" / "bench-sweep")
    if made.done:
        return made
    made.path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = np.repeat(_subjects(spec), SLICES)
    rows = rng.normal(size=(len(names), spec.dim)).astype(np.float32)
    rows[np.repeat(np.arange(spec.subjects) % 2 == 1, SLICES)] += 0.05
    columns = {
        "present": np.ones(len(names), np.uint32),
        "cohort": [COHORT] * len(names),
        "subject": names,
        "session": [""] * len(names),
        "slice": np.tile(np.arange(SLICES, dtype=np.int32), spec.subjects),
    }
    assert set(columns) == set(embed.IDENTITY)
    raw = pa.array([row.tobytes() for row in rows], pa.binary(4 * spec.dim))
    pq.write_table(pa.table({**columns, "features": raw}), made.path / embed.FEATURES)
    store.commit(made.path, {"cohort": COHORT})
    return made
