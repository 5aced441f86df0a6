"""Rows R2 to R4, R7: a node, Train's controller, the head, or all in the midst of a checkpoint is killed; one hangs.

What is left, or the same command again, ends with the tensors, the position and the journal of an undisturbed run. Each
test prints the time from the kill to the next step (60 s are asked for, on two cores that do nothing else).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import pretrainings
from cranium import checkpoint, restart, stall
from cranium.store import Artefact
from shards import shard_set

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return shard_set(tmp_path_factory.mktemp("shards"))


def begin(shards: Artefact, store: Path, *more: str) -> subprocess.Popen[str]:
    """The pretraining in a process of its own; its noise goes to a file."""
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")},
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with (store.parent / f"{store.name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, pretrainings.__file__, str(shards.path), str(store), *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def told(process: subprocess.Popen[str], seconds: float = 600) -> dict[str, Any]:
    """What it printed, taken together; it must end well."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output[-2000:]
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    return facts


@pytest.fixture(scope="module")
def undisturbed(shards: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return Artefact(Path(told(begin(shards, tmp_path_factory.mktemp("calm") / "store"))["made"]))


@pytest.mark.parametrize("what", ["node", "controller"])
def test_the_same_command_goes_on_without(
    what: str, shards: Artefact, undisturbed: Artefact, tmp_path: Path
) -> None:
    found = told(begin(shards, tmp_path / "store", "--nodes", "--kill", what))
    made = Artefact(Path(found["made"]))
    assert len(list((made.path / "journal").glob("*.jsonl"))) == 2, "nothing was killed"
    pretrainings.same(made, undisturbed)
    lost = pretrainings.seconds_lost(made, found["killed"])
    print(f"{what} killed: {lost:.1f} s to the next step")


def test_without_its_head_the_command_ends_and_the_next_one_goes_on(
    shards: Artefact, undisturbed: Artefact, tmp_path: Path
) -> None:
    """The cluster's store dies, and with it the cluster: nothing but the run's folder is left."""
    process = begin(shards, tmp_path / "store", "--kill", "gcs")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output
    (killed,) = [json.loads(line)["killed"] for line in output.splitlines() if '"killed"' in line]
    ended = time.time()
    made = Artefact(Path(told(begin(shards, tmp_path / "store"))["made"]))
    pretrainings.same(made, undisturbed)
    lost = pretrainings.seconds_lost(made, ended)
    print(f"head killed: the command ended after {ended - killed:.1f} s; {lost:.1f} s to the next step")


def test_a_worker_that_hangs_is_named_and_ended(shards: Artefact, tmp_path: Path) -> None:
    """SIGSTOP: nothing of Ray or of the collective says a word for minutes."""
    compute = {"num_workers": 2, "checkpoint_every": 8, "log_every": 1, "stall_seconds": 30}
    changed = ["--changed", json.dumps({"compute": compute})]
    process = begin(shards, tmp_path / "hung", *changed, "--kill", "worker", "--stop")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    facts = {
        k: v for line in output.splitlines() if line.startswith("{") for k, v in json.loads(line).items()
    }
    (said,) = [line for line in output.splitlines() if f"(process {facts['pid']} on " in line]
    assert said.startswith("no step for 30 s: worker ") and "does not answer" in said
    assert said.count("process") == 1, "the one that waits was ended too"
    made = Artefact(Path(facts["made"]))
    # That it ends as an undisturbed one is asked where a worker of two is killed (`ray/test_pretrain.py`).
    assert [step for step, _ in pretrainings.journal(made)] == list(range(pretrainings.STEPS))
    waits = "01".replace(said.removeprefix("no step for 30 s: worker ")[0], "")
    assert "training.py" in (made.path / stall.STACKS / f"worker-{waits}.txt").read_text()
    lost = pretrainings.seconds_lost(made, facts["killed"])
    print(f"worker stopped: {lost:.1f} s to the next step, of them 30 to be sure")


def test_everything_killed_while_a_checkpoint_is_copied(
    shards: Artefact, undisturbed: Artefact, tmp_path: Path
) -> None:
    """As when the power fails. Ray's list of checkpoints, which it writes in place, is cut as well."""
    process = begin(shards, tmp_path / "store")
    torn = kill_in_the_midst(process, tmp_path / "store")
    killed = time.time()
    run = torn.parents[1]
    before = [folder for folder in restart.kept(run) if folder != torn]
    assert before, "killed at the first checkpoint: nothing to go on from"
    # Had it been a large one; a quick disk has all of it by now, or a quick kill none.
    (torn / checkpoint.TRAINING).write_bytes((before[-1] / checkpoint.TRAINING).read_bytes()[:1000])
    ray_list = run / restart.RAY / restart.LIST
    ray_list.write_text(ray_list.read_text()[:40])
    made = Artefact(Path(told(begin(shards, tmp_path / "store"))["made"]))
    assert made.path == run and not torn.exists()
    newest = sorted((run / "journal").glob("*.jsonl"))[-1]
    assert json.loads(newest.read_text().splitlines()[0])["resume"] >= 8
    pretrainings.same(made, undisturbed)
    lost = pretrainings.seconds_lost(made, killed)
    print(f"all killed: {lost:.1f} s to the next step")


def kill_in_the_midst(process: subprocess.Popen[str], store: Path) -> Path:
    """SIGKILL to the command and all below it, as soon as the folder of its second checkpoint appears; that folder."""
    deadline, below = time.monotonic() + 300, []
    while time.monotonic() < deadline:
        folders = sorted(store.glob("pretrain/*/ray/checkpoint_*/"))
        if len(folders) == 1 and not below:
            below = psutil.Process(process.pid).children(recursive=True)  # a look takes longer than a copy
            below.sort(key=lambda one: "RayTrainWorker" not in one.cmdline()[0])
        if len(folders) > 1:
            break
        time.sleep(0.0005)
    else:
        raise AssertionError("no second checkpoint")
    for one in (below[0], process, *below[1:]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    psutil.wait_procs(below, timeout=30)
    process.communicate()
    return folders[-1]
