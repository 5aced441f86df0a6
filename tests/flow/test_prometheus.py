"""A real Prometheus watches a Ray cluster at work: each panel's query and each alert's series has an answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import phantoms

pytestmark = pytest.mark.flow

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
VARIABLES = {"$experiment": ".*", "$run": ".*", "$node": ".*", "$__rate_interval": "30s"}
SECONDS = 2  # between Ray's exports, and between scrapes; 10 in earnest
# What a machine without a GPU has no numbers of, and what only a fault brings that is not made here.
NO_GPU = {"cluster: GPU", "cluster: GPUs in use", "cluster: Memory of GPUs", "CraniumIdleGPU"}
NO_FAULT = {"sweep: Errors in cells", "CraniumCellsFailing", "CraniumWorkersKilledForMemory"}
KILL_AFTER = 40  # steps
EXPERIMENT = {
    "name": "seen",
    "asks": "can it be seen?",
    "ingest": {"cohorts": ["ssl", "home"], **phantoms.COARSE},
    "stream": {"lanes": 4, "window": 3},
    "pretrain": {
        **phantoms.PRETRAIN,
        "steps": 120,
        "nonfinite": "skip",
        "compute": {"checkpoint_every": 20, "log_every": 1},
    },
    "adapt": {
        "tasks": [phantoms.LESION],
        # phantoms share their three heads
        "accept_leakage": [f"{u}:{p}" for u in ("head", "duplicate") for p in ("ssl+test", "test+train")],
    },
    "sweep": {
        "init": ["random", "covariates"],
        "label_fractions": [0.5, 1.0],
        "folds": 3,
        "seeds": list(range(6)),
    },
}


def expressions() -> Iterator[tuple[str, str]]:
    """Every query of a panel, and every series that an alert looks at, with where it stands."""
    for path in sorted((DASHBOARDS / "grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                text = target["expr"]
                for name, value in VARIABLES.items():
                    text = text.replace(name, value)
                yield f"{path.stem}: {panel['title']}", text
    for group in yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            series = re.findall(r"(?:ray_\w+|\bup\b)(?:\{[^}]*\})?", rule["expr"])
            yield from ((rule["alert"], one) for one in series)


class Prometheus:
    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, **asked: str) -> Any:
        """The answer's data; an expression that is not valid raises."""
        query = urllib.parse.urlencode(asked)
        with urllib.request.urlopen(f"http://{self.address}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression as of now; those that are not a number count for nothing."""
        found = self.get("query", query=expression)["result"]
        return [one for one in found if one["value"][1] != "NaN"]


def port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str], log: Path, env: Mapping[str, str] | None = None) -> Iterator[psutil.Process]:
    """A process that is ended with the body, and all below it."""
    with log.open("wb") as file:
        started = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    try:
        yield started
    finally:
        family = [*started.children(recursive=True), started] if started.is_running() else []
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        started.wait(30)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[psutil.Process, str, Path]]:
    """A Ray head, its address, and the file that says what is to be scraped."""
    folder = Path(tempfile.mkdtemp(prefix="cranium-", dir="/tmp"))  # Ray's sockets need a short path
    address = f"127.0.0.1:{port()}"
    ports = ("dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=6"]
    command += ["--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}", f"--temp-dir={folder}"]
    command += [f"--{name}={port()}" for name in ports]
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CRANIUM_")},
        "RAY_metrics_report_interval_ms": str(1000 * SECONDS),
        "RAY_worker_niceness": "0",
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    found = folder / "prom_metrics_service_discovery.json"
    try:
        with process(command, tmp_path / "ray.log", env) as started:
            deadline = time.monotonic() + 60
            while not found.is_file() or "targets" not in found.read_text():
                assert time.monotonic() < deadline, (tmp_path / "ray.log").read_text()
                time.sleep(0.5)
            yield started, address, found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def prometheus(head: tuple[psutil.Process, str, Path], tmp_path: Path) -> Iterator[Prometheus]:
    """With the configuration of `dashboards/`, but for the file of Ray's nodes and how often."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    config = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (source,) = job["file_sd_configs"]
    assert source["files"] == [f"/tmp/ray/{head[2].name}"]
    source["files"] = [str(head[2])]
    config["rule_files"] = [str(DASHBOARDS / name) for name in config["rule_files"]]
    config["global"] = {"scrape_interval": f"{SECONDS}s", "evaluation_interval": f"{SECONDS}s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    server = Prometheus(f"127.0.0.1:{port()}")
    command = [program, f"--config.file={tmp_path / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address={server.address}"]
    with process(command, tmp_path / "prometheus.log"):
        yield server


def test_every_panel_and_alert_has_an_answer(
    head: tuple[psutil.Process, str, Path], prometheus: Prometheus, tmp_path: Path
) -> None:
    ray, address, _ = head
    for seed, (name, count) in enumerate({"ssl": 8, "home": 18}.items()):
        phantoms.bids_tree(tmp_path, name, num_subjects=count, seed=seed)
        phantoms.write_card(tmp_path / "datasets", name)
    (tmp_path / "seen.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    command = [sys.executable, "-m", "cranium.cli", "run", str(tmp_path / "seen.yaml"), f"address={address}"]
    command += [f"store={tmp_path / 'store'}", *(f"raw.{name}={tmp_path / name}" for name in ("ssl", "home"))]

    wanted, answered, killed = set(expressions()), set(), False
    with process(command, tmp_path / "run.log") as running:
        while running.poll() is None:
            for where, expression in wanted - answered:
                if prometheus.query(expression):
                    answered.add((where, expression))
            done = prometheus.query("max(ray_cranium_pretrain_steps_done)")
            if not killed and done and float(done[0]["value"][1]) > KILL_AFTER:
                (worker,) = [p for p in ray.children(recursive=True) if "RayTrainWorker" in p.cmdline()[0]]
                worker.kill()
                killed = True
            time.sleep(SECONDS)
    assert running.returncode == 0, (tmp_path / "run.log").read_text()[-3000:]
    assert killed

    empty = sorted(wanted - answered)
    assert [one for one in empty if one[0] not in NO_GPU | NO_FAULT] == []
    starts = prometheus.query("max(max_over_time(ray_cranium_pretrain_attempts[1h]))")
    assert float(starts[0]["value"][1]) == 2
    groups = prometheus.get("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    raised = prometheus.query('max_over_time(ALERTS{alertstate="firing"}[1h])')
    assert raised == [], "an undisturbed run but for one kill"
