"""The Slurm script with stand-ins for `srun` and `scontrol`: two Ray nodes on loopback, a command, nothing left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import phantoms
from cranium import store

pytestmark = pytest.mark.flow

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "cranium.sbatch"
SCANS = 60
# Options are for Slurm; what follows them is run here, whichever node was asked for.
SRUN = """#!/bin/bash
echo "$@" >> "$STAND_INS/srun.log"
while [ "$1" != --nodelist ]; do shift; done
shift 2
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$STAND_INS/scontrol.log"
[ "$1" = requeue ] || printf 'node1\\nnode2\\n'
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes, one of whose CPUs each is offered to Ray as three."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    # `cranium` is this clone's, whether or not it is installed.
    cranium = tmp_path / "cranium"
    cranium.write_text(f'#!/bin/bash\nexec {sys.executable} -m cranium.cli "$@"\n')
    cranium.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "CRANIUM_"))},
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "STAND_INS": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "3",
    }


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    root = phantoms.t1w_tree(tmp_path / "raw" / "phantom", SCANS)
    phantoms.write_card(root.parent / "datasets", contrasts=("T1w",))
    return root


started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    started.clear()


def begin(raw: Path, home: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    settings = ("size=56", "spacing_mm=4", "slice_spacing_mm=4", "align=none", "mask=[otsu]")
    card = raw.parent / "datasets" / "phantom.yaml"
    words = ["ingest", str(card), f"raw={raw}", f"store={home}", *(f"ingest.{one}" for one in settings)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", str(SCRIPT), *words],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started.append(process)
    return process


def test_a_job_that_runs_out_of_time_is_queued_again_and_goes_on(
    raw: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    home, log, again = tmp_path / "store", tmp_path / "first.log", tmp_path / "second.log"
    first = begin(raw, home, slurm, log)
    while first.poll() is None and len(list(home.glob("ingest/**/[0-9]*.json"))) < 3:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 143, log.read_text()[-3000:]
    assert "Ray: 2 nodes, 6 CPUs, 0 GPUs" in log.read_text()
    assert f"requeue {slurm['SLURM_JOB_ID']}" in (tmp_path / "scontrol.log").read_text()
    assert store.find(home, "ingest") == []

    second = begin(raw, home, slurm, again)
    while second.poll() is None and "Ray: 2 nodes" not in again.read_text():
        time.sleep(0.5)
    assert second.wait(240) == 0, again.read_text()[-3000:]
    (made,) = store.find(home, "ingest")
    assert made.manifest()["counts"]["accepted"] + made.manifest()["counts"]["warned"] == SCANS
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 1
    assert not Path(f"/tmp/ray-{slurm['SLURM_JOB_ID']}").exists()
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if f"ray-{slurm['SLURM_JOB_ID']}" in str(p.info["cmdline"])
    ]
    assert left == []


def test_a_job_without_a_command_says_how_it_is_used(slurm: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env=slurm, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
