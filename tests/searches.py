"""Cells that search for their settings, and a search without Ray: Tune's part played by a loop."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from cranium import adapt, searching, store, tuning
from cranium.config import Augment, Cell, Classification, Finetune
from shards import shard_set

LABELS = {"condition": {"column": "condition", "classes": {"control": ["control"], "lesion": ["lesion"]}}}
TASK = Classification(
    task="classification", name="lesion", cohort="home", label="condition", classes=("control", "lesion")
)
SPEC = Finetune.model_validate(
    {
        "epochs": 4,
        "warmup": 0,
        "batch_size": 8,
        "slices": 2,
        "max_slices": 2,
        "augment": Augment(flip=0, rotate=0, scale=0, shift=0, blur=0, bias_field=0),
        "search": {
            "trials": 5,
            "space": {
                "blr": {"low": 1e-3, "high": 1.0, "log": True},
                "epochs": {"low": 2, "high": 6},
                "drop_path": [0.0, 0.2],
            },
            "asha": {"grace": 0.3, "reduction": 2},
        },
    }
)


def cohort(root: Path, subjects: int = 24) -> adapt.Cohort:
    """Noise, with a bright corner in the lesions."""
    made = shard_set(root, "home", sessions=subjects, slices=4)
    conditions = ["control", "lesion"] * (subjects // 2)
    sessions = pd.read_parquet(made.path / "sessions.parquet").assign(condition=conditions)
    sessions.to_parquet(made.path / "sessions.parquet")
    store.commit(made.path, store.read_manifest(made.path) | {"card": {"labels": LABELS}})
    return adapt.Cohort("home", made.path, None)


def folds(home: adapt.Cohort) -> dict[str, int]:
    return adapt.assign_folds(adapt.subjects(home.shard_set, TASK), "subject", 3, 0)


def work(
    root: Path, home: adapt.Cohort, spec: Finetune = SPEC, init: str = "random", **cell: Any
) -> adapt.Work:
    fields = {"task": "lesion", "cohort": "home", "init": init, "adaptation": "finetune", "scheme": "subject"}
    fields |= {"label_fraction": 1.0, "fold": 0, "seed": 0, "contrasts": ("T1w",)} | cell
    start = tuning.Start(init, "vit_tiny_patch14", 0, ("cls",), "zero")
    one = Cell.model_validate(fields)
    return adapt.Work(one, TASK, spec, (), home, (), root / "adapt" / one.name, start=start)


class Killed(Exception):
    """The process is gone."""


class Ended(Exception):
    """The scheduler ends the trial."""


def played(works: Sequence[adapt.Work], folds: Mapping[str, int], die_after: int | None = None) -> int:
    """Search as Tune would on one worker; dies after so many reports. Returns how many there were."""
    cells = searching.Cells(works)
    halving = searching.Halving([w.spec.search for w in works])  # type: ignore[union-attr]
    reports = 0
    for number in range(10_000):
        config = cells.suggest(str(number))
        if config == searching.Searcher.FINISHED:
            return reports
        trial = SimpleNamespace(trial_id=str(number), config=config)
        halving.on_trial_add(None, trial)
        last: dict[str, Any] = {"training_iteration": 0}

        def report(progress: float, score: float, trial: Any = trial, last: dict[str, Any] = last) -> None:
            nonlocal reports
            if reports == die_after:
                raise Killed
            reports += 1
            last |= {
                "progress": progress,
                "score": score,
                "training_iteration": last["training_iteration"] + 1,
            }
            if halving.on_trial_result(None, trial, last) == "STOP":
                raise Ended
            cells.on_trial_result(trial.trial_id, last)

        with contextlib.suppress(Ended):
            searching.attempt(works[config["cell"]], folds, config["number"], config["settings"], report)
        halving.on_trial_complete(None, trial, last)
        cells.on_trial_complete(trial.trial_id, last)
    raise AssertionError("the search does not end")


def kept(work: adapt.Work) -> dict[str, str]:
    """Every file of a cell's search."""
    files = [*(work.folder / "search").iterdir(), work.folder / "search.json"]
    return {str(path.relative_to(work.folder)): path.read_text() for path in sorted(files)}
