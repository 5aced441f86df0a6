"""The same experiment on a laptop and, by `submit`, on three hosts that lose nodes and MLflow: the same report."""

from __future__ import annotations

import html.parser
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from mlflow import MlflowClient  # noqa: TID251  (a second opinion on what track sent)
from safetensors.torch import load_file

import hosts
import phantoms
from cranium import journals

pytestmark = pytest.mark.flow
COHORTS = {"ssl": 8, "home": 18, "away": 6}
STEPS = 40
EXPERIMENT = phantoms.WHOLE | {"pretrain": {**phantoms.PRETRAIN, "steps": STEPS}}
# Two workers, whose sums of two are the same in either order; a host has room for one of them.
COMPUTE = {"num_workers": 2, "threads": 1, "checkpoint_every": 5, "log_every": 1, "max_failures": 5}
MLFLOW = "http://127.0.0.1:5077"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "pyproject.toml").touch()
    for seed, (name, count) in enumerate(COHORTS.items()):
        phantoms.bids_tree(folder / "raw", name, num_subjects=count, seed=seed)
        phantoms.write_card(folder / "datasets", name)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    return folder


def facts(study: Path, store: Path, cpus: int) -> list[str]:
    compute = COMPUTE | {"cpus_per_worker": cpus}
    return [
        f"store={store}",
        *(f"raw.{name}={study / 'raw' / name}" for name in COHORTS),
        *(f"pretrain.compute.{key}={value}" for key, value in compute.items()),
    ]


@pytest.fixture(scope="module")
def laptop_run(study: Path) -> Path:
    store = study / "laptop"
    words = [sys.executable, "-m", "cranium.cli", "run", "tiny.yaml", *facts(study, store, 1)]
    done = subprocess.run(words, cwd=study, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return store


@pytest.fixture(scope="module")
def three() -> Iterator[hosts.Hosts]:
    if why := hosts.missing():
        pytest.skip(why)
    with hosts.hosts("node", "other", cpus=3) as made:
        yield made


class Tracking:
    """An MLflow server on the head, that goes down and comes up again over the same database."""

    def __init__(self, three: hosts.Hosts, folder: Path) -> None:
        self.three, self.folder = three, folder
        folder.mkdir()

    @property
    def database(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def start(self) -> None:
        where = ["--backend-store-uri", self.database, "--artifacts-destination", f"{self.folder}/artefacts"]
        listen = ["--host", "127.0.0.1", "--port", MLFLOW.rsplit(":", 1)[1], "--workers", "1"]
        self.three.begin("head", sys.executable, "-m", "mlflow", "server", *where, *listen)
        self.process = self.three.started["head"][-1]
        code = f"import urllib.request; urllib.request.urlopen({MLFLOW + '/health'!r}, timeout=5)"
        until("MLflow answers", lambda: not self.three.run("head", sys.executable, "-c", code).returncode)

    def stop(self) -> None:
        everyone = [self.process, *self.process.children(recursive=True)]
        for process in everyone:
            process.kill()
        psutil.wait_procs(everyone, timeout=10)
        self.three.started["head"].remove(self.process)


def until(what: str, is_so: Callable[[], bool], sent: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 400
    while not is_so():
        if sent is not None and sent.poll() is not None:
            raise AssertionError(f"ended before {what}: {sent.communicate()[0][-4000:]}")
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.2)


def finished(store: Path, stage: str) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in store.glob(f"{stage}/*/manifest.json")}


@pytest.mark.timeout(1200)
def test_nodes_and_mlflow_go_and_the_report_is_the_same(
    study: Path, laptop_run: Path, three: hosts.Hosts
) -> None:
    store, tracking = study / "cluster", Tracking(three, study / "mlflow")
    with hosts.tunnel(three.folder) as address:
        laptop = hosts.Laptop(three, study, address)
        laptop.wait()
        tracking.start()
        sent = laptop.begin(
            "submit", "run", "tiny.yaml", *facts(study, store, 2), f"tracking_uri={MLFLOW}", "--json"
        )
        checkpoints = "pretrain/*/ray/checkpoint_*/training.pt"
        until("a checkpoint", lambda: bool(list(store.glob(checkpoints))), sent)
        tracking.stop()
        three.kill("other")
        laptop.wait("head", "node")
        three.join("other")
        until("pretraining ends", lambda: bool(finished(store, "pretrain")), sent)
        tracking.start()
        until("three cells", lambda: len(finished(store, "adapt")) >= 3, sent)
        three.kill("node")
        before = len(finished(store, "adapt"))
        three.join("node")
        said = sent.communicate(timeout=600)[0]
        assert sent.returncode == 0, said[-6000:]
    assert before < 18, "the node was killed after the last cell"

    (pretrained,) = finished(store, "pretrain").values()
    (calm,) = finished(laptop_run, "pretrain").values()
    attempts = sorted((pretrained / "journal").glob("*.jsonl"))
    assert len(attempts) > 1, "the pretraining lost no worker"
    assert pretrained.name == calm.name
    assert_same_journal(pretrained, calm)
    assert_same_tensors(pretrained, calm)
    assert_same_predictions(store, laptop_run)
    (ours,), (theirs,) = (list(home.glob("report/*/report.html")) for home in (store, laptop_run))
    assert text(ours) == text(theirs)
    assert_same_runs(tracking.database, f"sqlite:///{laptop_run}/mlflow.db")


def assert_same_journal(pretrained: Path, calm: Path) -> None:
    """Every step once, with the same numbers, whatever was done twice in between."""
    ours, theirs = (
        [
            (e.step, {k: v for k, v in e.metrics.items() if not k.startswith("sys/")})
            for e in journals.read(of)
        ]
        for of in (pretrained / "journal", calm / "journal")
    )
    assert [step for step, _ in ours] == list(range(STEPS)) and ours == theirs


def assert_same_tensors(pretrained: Path, calm: Path) -> None:
    ours, theirs = (load_file(of / "backbone.safetensors") for of in (pretrained, calm))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def assert_same_predictions(store: Path, calm: Path) -> None:
    ours, theirs = finished(store, "adapt"), finished(calm, "adapt")
    assert ours.keys() == theirs.keys() and len(ours) == 18
    for name, folder in ours.items():
        tables = [pd.read_parquet(of / "predictions.parquet") for of in (folder, theirs[name])]
        pd.testing.assert_frame_equal(*tables, check_exact=True)


class Text(html.parser.HTMLParser):
    """What a page says, by its sections; pictures, and what is not said of the science, apart."""

    def __init__(self) -> None:
        super().__init__()
        self.section, self.within, self.said = "", 0, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.section = dict(attrs).get("id") or "" if tag == "section" else self.section
        self.within += tag in ("svg", "style", "script")

    def handle_endtag(self, tag: str) -> None:
        self.within -= tag in ("svg", "style", "script")

    def handle_data(self, data: str) -> None:
        if not self.within and self.section not in ("provenance", "training") and data.strip():
            self.said.append(data.strip())


def text(page: Path) -> list[str]:
    """All but the ids of MLflow's runs, when it was made, and how long it took."""
    reader = Text()
    reader.feed(page.read_text())
    assert len(reader.said) > 300
    return [said for said in reader.said if not re.fullmatch("[0-9a-f]{32}", said)]


def assert_same_runs(ours: str, theirs: str) -> None:
    """One run a cell and one a pretraining, in both; and no metric less, though the server was away."""
    found = []
    for uri in (ours, theirs):
        client = MlflowClient(uri)
        (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
        runs = client.search_runs([experiment.experiment_id], max_results=1000)
        assert {run.info.status for run in runs} == {"FINISHED"}
        cells = {run.data.tags["cell"]: run.data.metrics for run in runs if "cell" in run.data.tags}
        (pretraining,) = [run for run in runs if "train/loss" in run.data.metrics]
        losses = client.get_metric_history(pretraining.info.run_id, "train/loss")
        found.append((len(runs), cells, sorted((m.step, m.value) for m in losses)))
    assert found[0] == found[1] and len(found[0][1]) == 18 and len(found[0][2]) == STEPS
