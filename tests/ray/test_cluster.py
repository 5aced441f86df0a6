"""A private cluster that nobody joins by accident, quiet on the terminal, gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cranium import cluster
from cranium.config import Machine, UserError

pytestmark = pytest.mark.ray

NOISY = """
import sys
from pathlib import Path
from cranium import cluster
from cranium.config import Machine

log = Path(sys.argv[1])

def trial(config):
    print("noise of a trial")
    from ray import tune
    tune.report({"score": config["x"]})

def train(config):
    print("noise of a worker")
    import ray.train
    ray.train.report({"x": 1})

with cluster.quiet(log) as terminal, cluster.hold():
    print("noise of the driver")
    with cluster.connect(Machine(store=log.parent)) as first:
        import ray, ray.data
        folder = ray._private.worker._global_node.get_temp_dir_path()
        listening = ray.get_runtime_context().gcs_address
        assert ray.data.from_items([1, 2, 3]).map_batches(lambda b: b).count() == 3
    with cluster.connect(Machine(store=log.parent)) as second:
        from ray import tune
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        space = {"x": tune.grid_search([1, 2])}
        run = tune.RunConfig(storage_path=str(log.parent), verbose=0)
        results = tune.Tuner(trial, param_space=space, run_config=run).fit()
        assert sorted(r.metrics["score"] for r in results) == [1, 2]
        TorchTrainer(
            train, scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="t", storage_path=str(log.parent)),
        ).fit()
    assert first == second, "one cluster for both stages"
    print("ours:", folder, listening, file=terminal.out)
"""


def test_the_terminal_is_ours_and_the_noise_is_in_the_log(tmp_path: Path) -> None:
    script = tmp_path / "noisy.py"
    script.write_text(NOISY)
    log = tmp_path / "logs" / "noise.log"
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_AUTH_MODE")
    }
    environment["PYTHONPATH"] = str(Path(cluster.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, str(script), str(log)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr + log.read_text()
    assert run.stderr == "" and run.stdout.startswith("ours: ") and run.stdout.count("\n") == 1
    text = log.read_text()
    for noise in (
        "noise of the driver",
        "noise of a trial",
        "noise of a worker",
        "Started a local Ray instance",
    ):
        assert noise in text
    _, folder, listening = run.stdout.split()
    assert listening.count(":") == 1
    assert not Path(folder).exists(), "the private folder is removed"


def test_inside_a_cluster_the_same_one_is_used(ray_cluster: cluster.Connection, machine: Machine) -> None:
    import ray

    with cluster.connect(machine, num_cpus=2) as inner:
        assert inner == ray_cluster and inner.num_cpus == 6
    assert ray.is_initialized(), "an inner connect does not end the outer one"


def test_state_api_answers(ray_cluster: cluster.Connection) -> None:
    """Without it a stopped Train-in-Tune trial would keep its resources for ever."""
    from ray.util.state import list_placement_groups

    assert isinstance(list_placement_groups(), list)


def test_the_callers_signal_handlers_come_back(ray_cluster: cluster.Connection, machine: Machine) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with cluster.connect(machine):
        signal.signal(signal.SIGINT, lambda *_: None)  # as Train does, whose handler ends with exit code 0
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_job_address_is_refused_for_connecting(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused, cluster._attached("http://127.0.0.1:8265"):
        pass
    assert refused.value.code == "ADDRESS" and "submit" in str(refused.value)


OWNS = """
import signal, sys
from pathlib import Path
from cranium import cluster

with cluster._owned(Path(sys.argv[1])):
    print("owned", flush=True)
    signal.pause()
"""


def test_what_a_killed_command_left_goes_with_the_next_one(tmp_path: Path) -> None:
    """A folder whose owner lives stays, and so does whatever else is called so; of processes likewise."""
    folders = [tmp_path / f"cranium-{name}" for name in ("killed", "alive", "others")]
    environment = {**os.environ, "PYTHONPATH": str(Path(cluster.__file__).parents[1])}
    owners = []
    for folder in folders:
        (folder / "session_latest").mkdir(parents=True)
    for folder in folders[:2]:
        command = [sys.executable, "-c", OWNS, str(folder)]
        owners.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        assert owners[-1].stdout is not None and owners[-1].stdout.readline() == "owned\n"
    agents = [
        subprocess.Popen(["sleep", "600"], env={**os.environ, "RAY_TMPDIR": str(folder)})
        for folder in folders
    ]
    try:
        cluster._sweep_up(tmp_path)
        assert all(folder.is_dir() for folder in folders)
        owners[0].kill()
        owners[0].wait()
        cluster._sweep_up(tmp_path)
        assert [folder.is_dir() for folder in folders] == [False, True, True]
        assert agents[0].wait(10) == -signal.SIGKILL and [one.poll() for one in agents[1:]] == [None, None]
    finally:
        for owner in [*owners, *agents]:
            owner.kill()
            owner.communicate()


@pytest.mark.parametrize(("cores", "logical"), [(1, 4), (2, 4), (3, 6), (4, 8), (6, 8), (8, 8), (64, 64)])
def test_logical_cpus(monkeypatch: pytest.MonkeyPatch, cores: int, logical: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert cluster.logical_cpus() == logical
