"""Jobs on a Ray cluster of two hosts, with a token, through a tunnel: what docs/kubernetes.md and docs/vm.md say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import hosts
import phantoms
from cranium import store

pytestmark = pytest.mark.flow
ROOT = Path(__file__).parents[2]
WORKER = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "cluster.yaml").read_text())["spec"][
    "workerGroupSpecs"
][0]
POD = WORKER["template"]["spec"]["containers"][0]
SCANS = 40


@pytest.fixture(scope="module")
def two() -> Iterator[hosts.Hosts]:
    if why := hosts.missing():
        pytest.skip(why)
    with hosts.hosts() as made:
        yield made


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a cohort of many small scans, and two experiments on it."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "pyproject.toml").touch()
    phantoms.write_card(folder / "datasets", "many", contrasts=("T1w",))
    phantoms.t1w_tree(folder / "raw" / "many", SCANS)
    for name, size in (("one", 56), ("two", 70)):
        (folder / f"{name}.yaml").write_text(
            f"name: {name}\ningest: {{cohorts: [many], size: {size}, spacing_mm: 4.0, slice_spacing_mm: 4.0, "
            "align: none, mask: [otsu]}\n"
        )
    return folder


class Sender:
    """A laptop: it has the tunnel's end, the token, and its own Python."""

    def __init__(self, two: hosts.Hosts, study: Path, address: str) -> None:
        self.two, self.study, self.address = two, study, address

    def begin(self, verb: str, name: str, home: Path) -> subprocess.Popen[str]:
        words = [
            "submit",
            verb,
            f"{name}.yaml",
            f"address={self.address}",
            f"store={home}",
            f"raw.many={self.study}/raw/many",
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CRANIUM_"))}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.two.token}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")]
        )
        command = [sys.executable, "-m", "cranium.cli", *words, "--json"]
        return subprocess.Popen(
            command,
            cwd=self.study,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def asked(self, path: str, token: str = "") -> bytes:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with urllib.request.urlopen(
            urllib.request.Request(self.address + path, headers=headers), timeout=20
        ) as answer:
            return bytes(answer.read())


def wait(sender: Sender, nodes: int = 2) -> None:
    """Until the dashboard answers and all nodes are there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            told = json.loads(sender.asked("/api/v0/nodes", sender.two.token))
            alive = [node for node in told["data"]["result"]["result"] if node["state"] == "ALIVE"]
            if len(alive) == nodes:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError("".join(log.read_text()[-2000:] for log in sender.two.folder.glob("*.log")))


@pytest.fixture(scope="module")
def sender(two: hosts.Hosts, study: Path) -> Iterator[Sender]:
    with hosts.tunnel(two.folder) as address:
        made = Sender(two, study, address)
        wait(made)
        yield made


def test_nobody_is_heard_without_the_token(sender: Sender) -> None:
    for token in ("", "0" * 32):
        with pytest.raises(urllib.error.HTTPError) as refused:
            sender.asked("/api/jobs/", token)
        assert refused.value.code in (401, 403)


@pytest.mark.parametrize("host", list(hosts.ADDRESSES))
def test_probes_are_answered_at_a_pods_address_without_a_token(sender: Sender, host: str) -> None:
    for probe in (POD["readinessProbe"], POD["livenessProbe"]):
        url = f"http://{hosts.ADDRESSES[host]}:{probe['httpGet']['port']}{probe['httpGet']['path']}"
        code = f"import urllib.request; print(urllib.request.urlopen({url!r}, timeout=10).status)"
        done = sender.two.run(host, sys.executable, "-c", code)
        assert done.stdout.strip() == "200", done.stderr


def test_two_experiments_at_once_both_get_on(sender: Sender, tmp_path: Path) -> None:
    """Through the tunnel the job runs by the cluster's own Python; the second one does not wait for the first's end."""
    sent = {name: sender.begin("ingest", name, tmp_path / "store") for name in ("one", "two")}
    together = False
    while any(process.poll() is None for process in sent.values()):
        jobs = json.loads(sender.asked("/api/jobs/", sender.two.token))
        together |= sum(job["status"] == "RUNNING" for job in jobs) == 2
        time.sleep(1)
    for name, process in sent.items():
        said = process.communicate()[0]
        assert process.returncode == 0, said
        assert json.loads(said.splitlines()[-1])["status"] == "SUCCEEDED", name
    assert together
    assert len(store.find(tmp_path / "store", "ingest")) == 2
    entrypoints = {
        job["entrypoint"].split()[0] for job in json.loads(sender.asked("/api/jobs/", sender.two.token))
    }
    assert entrypoints == {"python"}


def test_a_job_that_died_with_its_cluster_goes_on_on_another(sender: Sender, tmp_path: Path) -> None:
    home = tmp_path / "store"
    begun = sender.begin("ingest", "one", home)
    while begun.poll() is None and len(list(home.glob("ingest/**/[0-9]*.json"))) < 3:
        time.sleep(0.1)
    sender.two.kill()
    begun.kill()
    begun.communicate()
    read = len(list(home.glob("ingest/**/[0-9]*.json")))
    assert read >= 3 and store.find(home, "ingest") == []

    sender.two.token = "1" * 32
    (sender.two.folder / "tunnel").unlink()
    sender.two.ray()
    wait(sender)
    again = sender.begin("ingest", "one", home)
    said = again.communicate(timeout=240)[0]
    assert again.returncode == 0, said
    (made,) = store.find(home, "ingest")
    counts = made.manifest()["counts"]
    assert counts["accepted"] + counts["warned"] == SCANS
