"""Rows R1 to R4 and R15 at random times: a pretraining is killed, one process or all, and ends as an undisturbed one.

`test_pretraining` kills each process by name at a known step; here moment and target are drawn. One kill by default;
`CHAOS_KILLS=20` for the soak, `CHAOS_SEED`, and `CHAOS_LOG=FILE` for a line of JSON a kill.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient  # noqa: TID251  (a second opinion on what track sent)

import phantoms
import pretrainings
import random_kills
from cranium import journals, pretrain, store, track
from cranium.store import Artefact
from random_kills import Command, Disturbed

pytestmark = pytest.mark.chaos

KILLS = random_kills.kills(1)
STEPS, EVERY = 40 * KILLS, 10
EXPERIMENT = {
    "name": "steps",
    "ingest": {"cohorts": ["ssl"], "contrasts": ["T1w"], **phantoms.COARSE},
    "stream": {"lanes": 4, "window": 3},
    "pretrain": {
        **phantoms.PRETRAIN,
        "steps": STEPS,
        "compute": {"checkpoint_every": EVERY, "log_every": 1, "num_workers": 2},
    },
}


def begin(base: Path, verb: str, home: Path, log: Path) -> Command:
    return Command([verb, str(base / "steps.yaml"), f"store={home}", f"raw.ssl={base / 'ssl'}"], log)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("steps")
    phantoms.bids_tree(root, "ssl", num_subjects=12, contrasts=("T1w",), missing=())
    phantoms.write_card(root / "datasets", "ssl", contrasts=("T1w",))
    (root / "steps.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    made = begin(root, "ingest", root / "store", root / "ingest.log")
    assert made.wait(240) == 0, made.output.read_text()
    return root


def lost_little(folder: Callable[[], Path | None]) -> None:
    """Every attempt goes on from a checkpoint: what is done again is one interval, or two where a copy was cut."""
    path = folder()
    if path is None:
        return
    reached = 0
    for segment in sorted((path / pretrain.JOURNAL).glob("*.jsonl")):
        lines = segment.read_bytes().split(b"\n")[:-1]
        if not lines:
            continue  # killed before its first line
        resume = json.loads(lines[0])["resume"]
        assert resume % EVERY == 0 and resume > reached - 2 * EVERY, (segment.name, resume, reached)
        reached = max(reached, resume + len(lines) - 1)


def test_killed_at_random_it_ends_as_an_undisturbed_one(base: Path, tmp_path: Path) -> None:
    calm, home, began = tmp_path / "calm" / "store", tmp_path / "killed" / "store", iter(range(1000))
    for folder in (calm, home):
        shutil.copytree(base / "store", folder)
    quiet = begin(base, "pretrain", calm, tmp_path / "calm.log")
    assert quiet.wait(600) == 0, quiet.output.read_text()
    (undisturbed,) = store.find(calm, "pretrain")

    def folder() -> Path | None:
        return next(home.glob("pretrain/*"), None)

    def done() -> int:
        path = folder()
        entries = journals.read(path / pretrain.JOURNAL) if path else []
        return entries[-1].step + 1 if entries else 0

    draw = random.Random(random_kills.SEED)
    training = Disturbed(
        "pretrain",
        lambda: begin(base, "pretrain", home, tmp_path / f"{next(began)}.log"),
        done,
        STEPS,
        lambda: bool(store.find(home, "pretrain")),
        lambda: lost_little(folder),
    )
    assert training.run(random_kills.plan(draw, KILLS), draw) == KILLS
    (made,) = store.find(home, "pretrain")
    assert made.path.name == undisturbed.path.name
    pretrainings.same(made, undisturbed, STEPS)
    _tracked_once(home, made)


def _tracked_once(home: Path, made: Artefact) -> None:
    """MLflow has one run, finished, with every step of the journal once."""
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("steps")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags[track.KEY] == made.id
    sent = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")}
    assert sent == {(e.step, e.metrics["train/loss"]) for e in journals.read(made.path / pretrain.JOURNAL)}
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == STEPS
