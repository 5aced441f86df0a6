"""Rows R5 and R15: a sweep killed at random, seeded moments ends with every cell done exactly once.

Driver, worker, node, head or everything at once are killed by SIGKILL; the same command is given again. Three kills by
default; `CHAOS_KILLS=20` for the soak, `CHAOS_SEED`, and `CHAOS_LOG=FILE` for a line of JSON a kill.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient  # noqa: TID251  (a second opinion on what track sent)

import phantoms
import random_kills
from cranium import store, track
from random_kills import Command, Disturbed

pytestmark = pytest.mark.chaos

KILLS = random_kills.kills(3)
SEEDS = max(1, KILLS // 2)
EXPERIMENT = {
    "name": "grid",
    "ingest": {"cohorts": ["home"], "contrasts": ["T1w"], **phantoms.COARSE},
    "stream": {"lanes": 4, "window": 3},
    "adapt": {
        "tasks": [phantoms.LESION],
        "attention": {"steps": 40},
    },
    "sweep": {
        "init": ["random", "covariates"],
        "adaptation": ["linear", "attention"],
        "label_fractions": [0.5, 1.0],
        "folds": 3,
        "seeds": list(range(SEEDS)),
    },
}
CELLS = (2 + 1) * 2 * 3 * SEEDS
File = tuple[int, int, bytes]  # inode, time of the last change, content


class Lab:
    """An experiment and a store for it, where features are there and nothing is swept."""

    def __init__(self, base: Path, home: Path) -> None:
        self.base, self.store, self.began = base, home / "store", 0
        shutil.copytree(base / "store", self.store)

    def begin(self) -> Command:
        self.began += 1
        return begin(self.base, "sweep", self.store, self.store.parent / f"{self.began:02}.log")

    def finished(self) -> dict[str, File]:
        """Every file of every cell that is done; what a worker says of a failure is none."""
        return {
            str(path.relative_to(self.store)): (
                path.stat().st_ino,
                path.stat().st_mtime_ns,
                path.read_bytes(),
            )
            for made in self.store.glob(f"adapt/*/{store.MANIFEST}")
            for path in sorted(made.parent.iterdir())
            if path.name != "failure.json" and path.name[0] != "."
        }

    def done(self) -> int:
        return len(list(self.store.glob(f"adapt/*/{store.MANIFEST}")))

    def over(self) -> bool:
        return bool(store.find(self.store, "sweep"))


def begin(base: Path, verb: str, home: Path, log: Path) -> Command:
    return Command([verb, str(base / "grid.yaml"), f"store={home}", f"raw.home={base / 'home'}"], log)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grid")
    phantoms.bids_tree(
        root,
        "home",
        num_subjects=24,
        conditions=("control", "lesion"),
        contrasts=("T1w",),
        missing=(),
        heads=24,
    )
    phantoms.write_card(root / "datasets", "home", contrasts=("T1w",))
    (root / "grid.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    for verb in ("ingest", "embed"):
        made = begin(root, verb, root / "store", root / f"{verb}.log")
        assert made.wait(240) == 0, made.output.read_text()
    return root


@pytest.fixture(scope="module")
def calm(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    lab = Lab(base, tmp_path_factory.mktemp("calm"))
    command = lab.begin()
    assert command.wait(600) == 0, command.output.read_text()
    command.gone(60)
    return {name: content for name, (_, _, content) in lab.finished().items()}


def unchanged(lab: Lab, calm: dict[str, bytes]) -> Callable[[], None]:
    """What is finished is as in the undisturbed sweep, and never written again: the same file, the same time."""
    seen: dict[str, File] = {}

    def check() -> None:
        now = lab.finished()
        assert {name for name, (_, _, content) in now.items() if calm.get(name) != content} == set()
        assert {name for name, file in seen.items() if now.get(name) != file} == set()
        seen.update(now)

    return check


def test_killed_at_random_every_cell_is_done_once(base: Path, calm: dict[str, bytes], tmp_path: Path) -> None:
    draw, lab = random.Random(random_kills.SEED), Lab(base, tmp_path)
    sweeping = Disturbed("sweep", lab.begin, lab.done, CELLS, lab.over, unchanged(lab, calm))
    assert sweeping.run(random_kills.plan(draw, KILLS), draw) == KILLS
    assert lab.finished().keys() == calm.keys()
    (sweep,) = store.find(lab.store, "sweep")
    cells = sweep.manifest()["cells"]
    assert len(cells) == len(set(cells)) == CELLS
    assert {path.name for path in (lab.store / "adapt").iterdir()} == set(cells)
    assert [p for p in lab.store.glob("adapt/*/*") if p.name == "failure.json"] == []
    _tracked_once(lab, cells)


def _tracked_once(lab: Lab, cells: list[str]) -> None:
    """MLflow has one finished run a cell with each of its numbers once, below one that is finished."""
    client = MlflowClient(f"sqlite:///{lab.store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("grid")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=10_000)
    assert {run.info.status for run in runs} == {"FINISHED"}
    keys = Counter(run.data.tags[track.KEY] for run in runs)
    (sweep,) = store.find(lab.store, "sweep")
    assert keys == Counter([sweep.id, *(f"adapt/{name}" for name in cells)])
    (parent,) = [run for run in runs if run.data.tags[track.KEY] == sweep.id]
    for run in runs:
        if run is parent:
            continue
        assert run.data.tags[track.PARENT] == parent.info.run_id
        folder = lab.store / run.data.tags[track.KEY]
        wanted = {
            k: v
            for k, v in json.loads((folder / "manifest.json").read_text())["metrics"].items()
            if v is not None
        }
        assert wanted.items() <= run.data.metrics.items()
        assert {len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics} == {1}
