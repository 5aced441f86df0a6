"""The whole path as a user runs it: `cranium run` in a process of its own, on phantoms, one scan damaged."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient  # noqa: TID251  (a second opinion on what track sent)
from safetensors.torch import load_file

import phantoms
from cranium import track

pytestmark = pytest.mark.flow
WHO = "SUBJX7Q"  # a subject of home whose id is found by its bytes
EXPERIMENT = phantoms.WHOLE | {
    "pretrain": {**phantoms.PRETRAIN, "steps": 30, "compute": {"checkpoint_every": 5, "log_every": 1}}
}


def cranium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments), capture_output=True, text=True, timeout=900, check=False
    )


def command(folder: Path, verb: str, *settings: str) -> list[str]:
    cohorts = ("ssl", "home", "away")
    facts = [f"store={folder / 'store'}", *(f"raw.{name}={folder.parent / name}" for name in cohorts)]
    return [sys.executable, "-m", "cranium.cli", verb, str(folder / "tiny.yaml"), *facts, *settings]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantom cohorts; one scan of `home` is cut short."""
    root = tmp_path_factory.mktemp("trees")
    for seed, (name, count) in enumerate({"ssl": 8, "home": 18, "away": 6}.items()):
        phantoms.bids_tree(root, name, num_subjects=count, seed=seed)
    scan = sorted((root / "home").glob("sub-*/anat/*_FLAIR.nii.gz"))[0]
    scan.write_bytes(scan.read_bytes()[:-500])
    people = root / "home" / "participants.tsv"
    people.write_text(people.read_text().replace("sub-017", f"sub-{WHO}"))
    for path in sorted((root / "home").rglob("*017*"), key=lambda p: -len(p.parts)):
        path.rename(path.with_name(path.name.replace("017", WHO)))
    return root


def study(trees: Path, name: str) -> Path:
    folder = trees / name
    folder.mkdir()
    for cohort in ("ssl", "home", "away"):
        phantoms.write_card(folder / "datasets", cohort)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def done(trees: Path) -> Path:
    folder = study(trees, "done")
    first = cranium(folder, "run", "--json")
    assert first.returncode == 3, first.stdout + first.stderr  # one scan was rejected, the rest is done
    assert "GZ_TRUNCATED" in first.stdout
    return folder


def manifests(folder: Path, stage: str) -> dict[str, dict]:
    paths = (folder / "store" / stage).glob("*/manifest.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def test_a_damaged_scan_costs_itself_only(done: Path) -> None:
    (name, home), *_ = [(n, m) for n, m in manifests(done, "ingest").items() if m["cohort"] == "home"]
    counts = home["counts"]
    assert counts["rejected"] == 1 and counts["subjects"] == 18
    assert counts["accepted"] + counts["warned"] + counts["rejected"] == counts["scans"]
    quarantine = pd.read_parquet(done / "store" / "ingest" / name / "quarantine.parquet")
    assert quarantine["code"].tolist() == ["GZ_TRUNCATED"]
    assert len(manifests(done, "adapt")) == 3 * 2 * 3
    page = next((done / "store" / "report").glob("*/report.html")).read_text()
    assert "GZ_TRUNCATED" in page and "<script" not in page


def test_a_terminal_shows_a_bar_and_none_of_rays_noise(trees: Path) -> None:
    folder = study(trees, "terminal")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    process = subprocess.Popen(
        command(folder, "ingest"), stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed: the process has ended
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 3
    text = shown.decode()
    assert "━" in text and "sessions read" in text and "GZ_TRUNCATED" in text
    assert not [word for word in ("streaming_executor", "ray-data", "Traceback", "WARNING") if word in text]


def test_leakage_is_refused_before_anything_is_trained(trees: Path) -> None:
    folder = study(trees, "leaky")
    refused = cranium(folder, "run", "adapt.accept_leakage=[]")
    assert refused.returncode == 2
    assert "error LEAKAGE" in refused.stderr and "Traceback" not in refused.stderr
    assert not (folder / "store" / "pretrain").exists()


def test_mlflow_holds_a_parent_and_a_run_per_cell(done: Path) -> None:
    client = MlflowClient(f"sqlite:///{done / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [r for r in runs if r.data.tags["stage"] in ("sweep", "pretrain")]
    children = [r for r in runs if r.data.tags["stage"] == "adapt"]
    assert len(parents) == 2 and len(children) == 18
    assert {r.info.status for r in runs} == {"FINISHED"}
    sweep = next(r for r in parents if r.data.tags["stage"] == "sweep")
    for run in children:
        assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
        wanted = {
            "init",
            "task",
            "cohort",
            "label_fraction",
            "fold",
            "seed",
            "contrasts",
            "cell",
            "git",
            "manifest",
        }
        assert wanted <= set(run.data.tags)
    kept = manifests(done, "adapt")
    scores = {m["cell"]["init"]: set() for m in kept.values()}
    for manifest in kept.values():
        scores[manifest["cell"]["init"]].add(manifest["metrics"]["test/auroc"])
    for run in children:
        assert run.data.metrics["test/auroc"] in scores[run.data.tags["init"]]
    named = {name for run in runs for name in run.data.metrics}
    known = set(track.METRICS) | {name.replace("external/<cohort>/", "test/") for name in track.METRICS}
    assert {name.replace("external/away/", "test/") for name in named} <= known
    pretrain = next(r for r in parents if r.data.tags["stage"] == "pretrain")
    curve = client.get_metric_history(pretrain.info.run_id, "train/loss")
    assert [point.step for point in curve] == list(range(30))


def test_a_second_run_does_nothing_and_a_deleted_cell_alone_is_redone(done: Path) -> None:
    def stamps() -> dict[str, int]:
        return {p.parent.name: p.stat().st_mtime_ns for p in (done / "store").glob("*/*/manifest.json")}

    before = stamps()
    assert cranium(done, "run").returncode == 3
    assert stamps() == before
    gone = sorted(manifests(done, "adapt"))[0]
    kept = manifests(done, "adapt")[gone]["metrics"]
    shutil.rmtree(done / "store" / "adapt" / gone)
    assert cranium(done, "run").returncode == 3
    changed = {name for name, stamp in stamps().items() if before.get(name) != stamp}
    assert gone in changed and {n for n in changed if n.startswith("lesion-")} == {gone}
    assert manifests(done, "adapt")[gone]["metrics"] == kept


@pytest.mark.chaos
def test_a_run_killed_in_the_middle_of_pretraining_ends_as_an_undisturbed_one(
    done: Path, trees: Path
) -> None:
    """SIGKILL of the driver, and with it its cluster; the same command then goes on from the last checkpoint."""
    folder = study(trees, "killed")
    assert cranium(folder, "ingest").returncode == 3
    process = subprocess.Popen(
        command(folder, "pretrain"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list((folder / "store").glob("pretrain/*/ray/checkpoint_2*")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((folder / "store").glob("pretrain/*/manifest.json"))
    again = cranium(folder, "pretrain")
    assert again.returncode == 0, again.stdout + again.stderr
    (ours,), (theirs,) = (list((f / "store" / "pretrain").iterdir()) for f in (folder, done))
    assert ours.name == theirs.name
    assert len(list((ours / "journal").glob("*.jsonl"))) == 2
    a, b = (load_file(run / "backbone.safetensors") for run in (ours, theirs))
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def holding(folder: Path, word: bytes) -> set[str]:
    """Folders of the store with a file whose bytes, or whose Parquet columns, hold a word."""
    found = set()
    for path in (p for p in folder.rglob("*") if p.is_file()):
        parts = [path.read_bytes(), str(path).encode()]
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            names = [n for n in table.column_names if n not in ("pixels", "mask", "features")]
            parts += [repr(table[n].to_pylist()).encode() for n in names]
        if any(word in part for part in parts):
            found.add(path.relative_to(folder).parts[0])
    return found


def test_a_forgotten_subject_is_in_no_byte_of_the_store(done: Path, trees: Path) -> None:
    """After everything else here: the store loses what it had of one subject, and a new run does without."""
    store = done / "store"
    assert {"ingest", "embed", "adapt", "sweep", "mlflow-artifacts"} <= holding(store, WHO.encode())
    gone = cranium(done, "forget", f"subject=home/{WHO}", "--json")
    assert gone.returncode == 0, gone.stdout + gone.stderr
    assert holding(store, WHO.encode()) == set()
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=1000)
    assert all("forgotten" in run.data.tags for run in runs if run.data.tags["stage"] in ("sweep", "adapt"))
    assert not [run for run in runs if run.data.tags["stage"] == "pretrain" and "forgotten" in run.data.tags]
    refused = cranium(done, "report")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    again = cranium(done, "run")
    assert again.returncode == 3 and "1 of its subjects is forgotten" in again.stdout, (
        again.stdout + again.stderr
    )
    assert holding(store, WHO.encode()) == set()
    table = pd.read_parquet(next((store / "ingest").glob("home-*/sessions.parquet")))
    assert table["subject"].nunique() == 17
