"""What is said to a cluster, and by which token, before anything of Ray is started."""

from __future__ import annotations

import contextlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cranium import cluster, jobs
from cranium.cluster import Job
from cranium.config import UserError
from cranium.target import Target, read_target

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def no_auth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in AUTH:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


@pytest.mark.parametrize(
    "address", ["http://head:8265", "https://10.0.0.1", "head:6379", "ray://[fd00::1]:10001"]
)
def test_no_cluster_elsewhere_without_a_word_on_tokens(
    no_auth: pytest.MonkeyPatch, address: str
) -> None:  # X7
    with pytest.raises(UserError) as refused:
        cluster._set_auth(address)
    assert refused.value.code == "NO_TOKEN" and "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, "disabled"),
        ({"RAY_AUTH_TOKEN": "x"}, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "/x"}, "token"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}, "disabled"),
    ],
)
def test_authentication_is_always_said(no_auth: pytest.MonkeyPatch, given: dict[str, str], mode: str) -> None:
    for name, value in given.items():
        no_auth.setenv(name, value)
    for address in ("auto", "127.0.0.1:6379", "http://localhost:8265", *(["head:6379"] if given else [])):
        cluster._set_auth(address)
        assert os.environ["RAY_AUTH_MODE"] == mode


def test_a_token_in_the_users_folder_is_a_token(no_auth: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    cluster._set_auth("head:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_private_cluster_always_has_a_token_of_its_own() -> None:
    """Ray's own ports listen on every interface."""
    assert cluster.LOCAL_ENVIRONMENT["RAY_AUTH_MODE"] == "token"
    assert len(cluster.LOCAL_ENVIRONMENT["RAY_AUTH_TOKEN"]) == 64


# ---- what a job is told ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tunnel() -> Iterator[str]:
    """The end here of a tunnel to a dashboard: a port of this machine behind which no Ray is."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def sent(monkeypatch: pytest.MonkeyPatch, target: Target) -> list[str]:
    """The arguments a job would get."""
    heard: list[str] = []

    def submit(
        address: str, name: str, verb: str, key: str, arguments: list[str], files: dict[str, str]
    ) -> tuple[Job, bool]:
        heard.extend(arguments)
        return Job("cranium-x-1", "SUCCEEDED", 0), True

    monkeypatch.setattr(cluster, "submit", submit)
    monkeypatch.setattr(cluster, "follow", lambda *args: Job("cranium-x-1", "SUCCEEDED", 0))
    jobs.submit("run", target)
    return heard


def target(folder: Path, *settings: str) -> Target:
    (folder / "datasets").mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text("name: tiny\ningest: {cohorts: [bids]}\n")
    return read_target(path, list(settings))


def test_the_end_of_a_tunnel_is_elsewhere() -> None:
    with tunnel() as address:
        assert cluster.python_here(address) is None
    assert cluster.python_here("http://head:8265") is None


def test_a_cluster_elsewhere_is_told_what_was_said_and_keeps_its_own_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STORE", "CACHE", "ADDRESS", "TRACKING_URI"):
        monkeypatch.delenv(f"CRANIUM_{name}", raising=False)
    with tunnel() as address:
        arguments = sent(
            monkeypatch, target(tmp_path, f"address={address}", "store=/store", "raw.bids=/store/raw")
        )
        assert sorted(arguments) == ["--json", "experiment.yaml", "raw.bids=/store/raw", "store=/store"]
        with pytest.raises(UserError, match="a folder that its nodes share") as refused:
            sent(monkeypatch, target(tmp_path, f"address={address}"))
        assert refused.value.code == "NO_STORE"


def test_secrets_of_the_sender_stay_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # X6
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    given: dict[str, object] = {}

    class Client:
        def list_jobs(self) -> list[object]:
            return []

        def submit_job(self, **job: object) -> None:
            given.update(job)

    monkeypatch.setattr(cluster, "_client", lambda address: Client())
    monkeypatch.setattr(cluster, "job", lambda address, job_id: Job(job_id, "PENDING", None))
    cluster.submit(
        "http://head:8265", "tiny", "run", "key", ["experiment.yaml"], {"experiment.yaml": "name: tiny\n"}
    )
    assert given["entrypoint"] == "python -m cranium.cli run experiment.yaml"
    assert "hunter2" not in repr(given)
