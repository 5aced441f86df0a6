"""MLflow as deploy/tracking starts it: a real Postgres, artefacts in a bucket, a password, known hosts."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from cranium import journals, track
from cranium.track import Tracker

pytestmark = pytest.mark.flow
ROOT = Path(__file__).parents[2]
TRACKING = ROOT / "deploy" / "tracking"
SETTINGS = yaml.safe_load((TRACKING / "compose.yaml").read_text())["services"]["mlflow"]["environment"]


@dataclass(frozen=True)
class Server:
    uri: str
    home: Path
    process: subprocess.Popen[bytes]
    bucket: str  # address of the object store

    def secret(self, name: str) -> str:
        return (self.home / "secrets" / name).read_text()

    def asked(self, path: str, **body: str) -> bytes:
        """An answer to the administrator."""
        told = base64.b64encode(f"admin:{self.secret('admin_password')}".encode()).decode()
        headers = {"Authorization": f"Basic {told}", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body else None
        asked = urllib.request.Request(f"{self.uri}/api/2.0/mlflow/{path}", data, headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return bytes(answer.read())

    def everyone(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Started by the one command, with the artefacts' place of compose.yaml."""
    pytest.importorskip("pg8000", reason="needs pip install 'cranium[tracking]'")
    pytest.importorskip("flask_wtf", reason="needs pip install 'cranium[tracking]'")
    if not shutil.which("initdb") and not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("needs Postgres's programs: apt-get install postgresql")
    home = Path(subprocess.check_output(["mktemp", "-d", "/tmp/cr-mlflow-XXXXXX"], text=True).strip())
    home.chmod(0o755)  # Postgres's own user, where root tests, has to get through
    port = _free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_"))}
    store = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "s3server.py"], stdout=subprocess.PIPE, text=True
    )
    assert store.stdout
    bucket = f"http://127.0.0.1:{store.stdout.readline().strip()}"
    environment |= {
        "PORT": str(port),
        "ARTEFACTS": SETTINGS["ARTEFACTS"],
        "AWS_ENDPOINT_URL": bucket,
        "WORKERS": "1",
    }
    with (home / "log").open("wb") as log:
        words = [sys.executable, TRACKING / "local.py", home]
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    try:
        uri = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        made = Server(uri, home, process, bucket)
        assert json.loads(
            made.asked("experiments/get-by-name?experiment_name=Default")
        )  # the first one is slow
        yield made
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        store.kill()
        store.wait()
        store.stdout.close()
        deadline = time.monotonic() + 10  # the last of them may be dying at this moment
        while (left := [child for child in children if _lives(child)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        for child in left:
            child.kill()
        shutil.rmtree(home)
        assert left == [], "one command starts it all, and its end ends all"


@pytest.fixture
def signed_in(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.secret("admin_password"))
    monkeypatch.setenv(
        "MLFLOW_HTTP_REQUEST_TIMEOUT", "60"
    )  # on a busy machine it may need more than five seconds
    return server


def test_cranium_tracks_into_it(signed_in: Server, tmp_path: Path) -> None:
    tracker = track.Tracker(signed_in.uri, "postgres")
    parent = tracker.run("sweep", "a sweep", {"init": "scratch"})
    with journals.Journal(tmp_path / "journal") as journal:
        for step in range(1500):
            journal.metrics(step, {"train/loss": 1 / (step + 1), "train/lr": 1e-4})
    assert tracker.replay(parent, tmp_path / "journal") == 3000
    assert tracker.replay(parent, tmp_path / "journal") == 0
    tracker.record("cell", "a cell", parent, {"fold": "0"}, {"lr": "0.1"}, {"test/auroc": 0.75})
    assert tracker.run("sweep", "a sweep", {}) == parent, "found by its key"
    (cell,) = tracker.children(parent)
    assert cell.metrics == {"test/auroc": 0.75} and cell.params == {"lr": "0.1"} and cell.status == "FINISHED"
    history = tracker.client.get_metric_history(parent, "train/loss")
    assert [point.step for point in history] == list(range(1500))
    assert history[999].value == pytest.approx(1e-3)


def test_a_journal_of_an_outage_comes_whole_where_sending_it_broke_off(
    signed_in: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics are sent side by side; one request fails, and the next command sends what is left, each point once."""
    tracker, names = track.Tracker(signed_in.uri, "outage"), [f"train/{letter}" for letter in "abcdefg"]
    run = tracker.run("long", "long", {})
    with journals.Journal(tmp_path / "journal") as journal:
        for step in range(1200):
            journal.metrics(step, {name: step + 0.25 for name in names[: 1 + step % len(names)]})
    sent, broken, points = Tracker.send, iter([False] * 7 + [True]), list[int]()

    def breaks(self: Tracker, run_id: str, *what: object) -> None:
        if next(broken, False):
            raise track.TrackingError("gone")
        sent(self, run_id, *what)  # type: ignore[arg-type]
        points.append(len(what[0]))  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(track.TrackingError, match="gone"):
        patch.setattr(Tracker, "send", breaks)
        tracker.replay(run, tmp_path / "journal")
    everything = sum(1 + step % len(names) for step in range(1200))
    assert 0 < sum(points) < everything
    assert tracker.replay(run, tmp_path / "journal") == everything - sum(points)
    assert tracker.replay(run, tmp_path / "journal") == 0
    for number, name in enumerate(names):
        history = tracker.client.get_metric_history(run, name)
        there = [step for step in range(1200) if step % len(names) >= number]
        assert [(point.step, point.value) for point in history] == [(step, step + 0.25) for step in there]


def test_artefacts_are_in_the_bucket(
    signed_in: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    tracker = track.Tracker(signed_in.uri, "artefacts")
    run = tracker.run("one", "one", {})
    (tmp_path / "page.html").write_text("<p>a page</p>")
    tracker.artefact(run, tmp_path / "page.html")
    keys = {"aws_access_key_id": signed_in.secret("s3_access_key"), "aws_secret_access_key": "any"}
    store = boto3.client("s3", endpoint_url=signed_in.bucket, region_name="us-east-1", **keys)
    found = [one["Key"] for one in store.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert [key for key in found if key.endswith(f"{run}/artifacts/page.html")]


def test_nobody_gets_in_without_the_password(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    with pytest.raises(track.TrackingError, match=r"not authenticated|401"):
        track.Tracker(server.uri, "no password")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "guess")
    with pytest.raises(track.TrackingError):
        track.Tracker(server.uri, "a wrong password")


def test_who_was_made_by_the_administrator_gets_in(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.asked("users/create", username="anna", password="correct horse battery")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse battery")
    tracker = track.Tracker(server.uri, "annas")
    tracker.finish(tracker.run("one", "one", {}))


@pytest.mark.parametrize("host", ["evil.example", "evil.example:5000", "10.0.0.1"])
def test_it_answers_to_its_own_names_only(signed_in: Server, host: str) -> None:
    """A page elsewhere can give its own name the address 127.0.0.1; the request then names that page."""
    asked = urllib.request.Request(f"{signed_in.uri}/", headers={"Host": host})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, timeout=10)
    assert refused.value.code == 403


def test_it_listens_on_loopback_and_shows_no_secret(server: Server) -> None:
    words, listening = [], set()
    for process in server.everyone():
        words.append(" ".join(process.cmdline()))
        listening |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    assert any("basic-auth" in line for line in words) and any("postgres" in line for line in words)
    log = (server.home / "log").read_text()
    for path in (server.home / "secrets").iterdir():
        if path.name != "s3_identities":
            assert not [line for line in words if path.read_text() in line], (
                f"{path.name} is in a command line"
            )
            assert path.read_text() not in log, f"{path.name} is in the log"
