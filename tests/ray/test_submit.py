"""Jobs on a real `ray start --head`: shipped code and config, exit codes, idempotent ids, stop."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import phantoms
from cranium import cluster, config, pretrain, reading
from cranium.store import Artefact

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _environment() -> dict[str, str]:
    paths = [str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")]
    return {
        **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")},
        **cluster.ENVIRONMENT,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """A cluster of its own beside the session's: private folder, free ports, stopped by its own process ids."""
    folder = tempfile.mkdtemp(prefix="cr-", dir="/tmp")
    gcs, http, client, agent, grpc = _free_ports(5)
    ports = [f"--port={gcs}", f"--dashboard-port={http}", f"--ray-client-server-port={client}"]
    ports += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *ports]
    command += ["--num-cpus=4", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    command += [f"--temp-dir={folder}", "--object-store-memory=200000000", "--include-dashboard=true"]
    with open(f"{folder}/head.log", "wb") as log:
        head = subprocess.Popen(
            command,
            env={**_environment(), "RAY_TMPDIR": folder},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{http}"
    try:
        _wait(address, head, folder)
        yield address
    finally:
        mine = [root := psutil.Process(head.pid), *root.children(recursive=True)]
        for process in mine:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        for process in psutil.wait_procs(mine, timeout=10)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(address: str, head: subprocess.Popen[bytes], folder: str) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
        assert head.poll() is None, Path(f"{folder}/head.log").read_text()
    raise AssertionError("the head did not start")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one phantom cohort, one of whose scans is damaged."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "pyproject.toml").touch()
    phantoms.write_card(folder / "datasets", "jobs")
    raw = phantoms.bids_tree(folder / "raw", "jobs", num_subjects=3)
    scan = sorted(raw.glob("sub-*/anat/*_FLAIR.nii.gz"))[0]
    scan.write_bytes(scan.read_bytes()[:-300])
    (folder / "tiny.yaml").write_text(
        "name: tiny\ningest: {cohorts: [jobs], size: 56, spacing_mm: 4.0, slice_spacing_mm: 8.0, min_brain: 0.02, "
        "align: none}\n"
    )
    return folder


def _cranium(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cranium.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=240)


def test_submit_ships_the_config_runs_it_and_returns_its_exit_code(dashboard: str, study: Path) -> None:
    facts = [f"address={dashboard}", f"store={study / 'store'}", f"raw.jobs={study / 'raw' / 'jobs'}"]
    done = _cranium("submit", "ingest", "tiny.yaml", *facts, "--json", cwd=study)
    assert done.returncode == 3, done.stdout + done.stderr  # the damaged scan; Ray itself only says FAILED
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["exit_code"] == 3 and last["status"] == "FAILED" and last["job"].endswith("-1")
    assert "scans rejected (" in done.stdout, "the job's own output is followed"
    manifests = list((study / "store" / "ingest").glob("jobs-*/manifest.json"))
    assert len(manifests) == 1 and json.loads(manifests[0].read_text())["counts"]["rejected"] == 1

    again = _cranium("submit", "ingest", "tiny.yaml", *facts, "--json", cwd=study)
    assert json.loads(again.stdout.splitlines()[-1])["job"].endswith("-2"), "an ended job is not attached to"
    status = _cranium("status", "tiny.yaml", *facts, cwd=study)
    assert "done" in status.stdout and status.stdout.count("cranium-tiny-ingest-") == 2
    logs = _cranium("logs", last["job"], f"address={dashboard}", cwd=study)
    assert logs.returncode == 3 and "jobs:" in logs.stdout


def test_a_job_under_way_is_attached_to_and_can_be_stopped(
    dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cluster.shlex, "join", lambda words: f"{sys.executable} -c 'import time; time.sleep(120)'"
    )
    first, fresh = cluster.submit(dashboard, "sleepy", "run", "the same work", [], {})
    second, fresh_again = cluster.submit(dashboard, "sleepy", "run", "the same work", [], {})
    resumed, fresh_resumed = cluster.submit(dashboard, "sleepy", "resume", "the same work", [], {})
    other, _ = cluster.submit(dashboard, "sleepy", "run", "other work", [], {})
    assert (fresh, fresh_again, fresh_resumed) == (True, False, False)
    assert first.id == second.id == resumed.id != other.id
    assert cluster.stop(dashboard, other.id).status == "STOPPED"
    assert cluster.stop(dashboard, first.id).status == "STOPPED"
    third, fresh = cluster.submit(dashboard, "sleepy", "run", "the same work", [], {})
    assert fresh and third.id.endswith("-2")
    cluster.stop(dashboard, third.id)


def test_a_submitted_resume_refuses_other_settings(dashboard: str, study: Path) -> None:
    """The job looks for an unfinished pretraining in the store that it sees, before any training."""
    (study / "trained.yaml").write_text(
        (study / "tiny.yaml").read_text().replace("name: tiny", "name: trained")
        + "pretrain: {cohorts: [jobs], inits: [scratch], arch: vit_tiny_patch14, steps: 10, batch_size: 8}\n"
    )
    facts = [f"address={dashboard}", f"store={study / 'store'}", f"raw.jobs={study / 'raw' / 'jobs'}"]
    assert _cranium("submit", "ingest", "trained.yaml", *facts, cwd=study).returncode == 3
    exp, machine = reading.load_experiment(study / "trained.yaml"), config.Machine(store=study / "store")
    shards = [Artefact(path.parent) for path in (study / "store" / "ingest").glob("jobs-*/manifest.json")]
    begun = pretrain.artefact(exp, machine, "scratch", shards)
    (begun.path / "ray" / "checkpoint_1").mkdir(parents=True)
    (begun.path / pretrain.KEY).write_text(config.canonical(pretrain._key(exp, machine, "scratch", shards)))
    done = _cranium("resume", "trained.yaml", "pretrain.steps=20", *facts, "--json", cwd=study)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "RESUME_DIFFERS" in done.stdout and "pretrain.steps: 10 -> 20" in done.stdout
    assert [path.name for path in (study / "store" / "pretrain").iterdir()] == [begun.path.name]


def test_leaving_the_follower_leaves_the_job(dashboard: str, study: Path) -> None:
    env = {**_environment(), "CRANIUM_STORE": str(study / "store-left")}
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from cranium.cli import main; main()"
    words = ["submit", "ingest", "tiny.yaml", f"address={dashboard}", f"raw.jobs={study / 'raw' / 'jobs'}"]
    follower = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=study, env=env, stdout=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    job = follower.stdout.readline().split()[1]
    follower.send_signal(signal.SIGINT)
    assert follower.wait(60) == 130
    follower.stdout.close()
    assert cluster.follow(dashboard, job, lambda text: None).exit_code == 3


def test_nobody_at_the_address_is_one_line(study: Path) -> None:
    facts = ["address=http://127.0.0.1:1", f"store={study / 'store'}", f"raw.jobs={study}"]
    done = _cranium("submit", "ingest", "tiny.yaml", *facts, cwd=study)
    assert done.returncode == 1
    assert done.stderr.startswith("error NO_CLUSTER: ") and done.stderr.count("\n") == 1
