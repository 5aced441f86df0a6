"""Jobs on a Ray cluster of two hosts, with a token, through a tunnel: what docs/kubernetes.md and docs/vm.md say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import hosts
import phantoms
from cranium import store

pytestmark = pytest.mark.flow
WORKER = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "kubernetes" / "cluster.yaml").read_text())[
    "spec"
]["workerGroupSpecs"][0]
POD = WORKER["template"]["spec"]["containers"][0]
SCANS = 40


@pytest.fixture(scope="module")
def two() -> Iterator[hosts.Hosts]:
    if why := hosts.missing():
        pytest.skip(why)
    with hosts.hosts("node") as made:
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


@pytest.fixture(scope="module")
def laptop(two: hosts.Hosts, study: Path) -> Iterator[hosts.Laptop]:
    with hosts.tunnel(two.folder) as address:
        made = hosts.Laptop(two, study, address)
        made.wait()
        yield made


def begin(laptop: hosts.Laptop, verb: str, name: str, home: Path) -> subprocess.Popen[str]:
    facts = (f"store={home}", f"raw.many={laptop.folder}/raw/many", "--json")
    return laptop.begin("submit", verb, f"{name}.yaml", *facts)


def test_nobody_is_heard_without_the_token(laptop: hosts.Laptop) -> None:
    for token in ("", "0" * 32):
        with pytest.raises(urllib.error.HTTPError) as refused:
            laptop.asked("/api/jobs/", token)
        assert refused.value.code in (401, 403)


@pytest.mark.parametrize("host", ["head", "node"])
def test_probes_are_answered_at_a_pods_address_without_a_token(laptop: hosts.Laptop, host: str) -> None:
    for probe in (POD["readinessProbe"], POD["livenessProbe"]):
        url = f"http://{hosts.ADDRESSES[host]}:{probe['httpGet']['port']}{probe['httpGet']['path']}"
        code = f"import urllib.request; print(urllib.request.urlopen({url!r}, timeout=10).status)"
        done = laptop.to.run(host, sys.executable, "-c", code)
        assert done.stdout.strip() == "200", done.stderr


def test_two_experiments_at_once_both_get_on(laptop: hosts.Laptop, tmp_path: Path) -> None:
    """Through the tunnel the job runs by the cluster's own Python; the second one does not wait for the first's end."""
    sent = {name: begin(laptop, "ingest", name, tmp_path / "store") for name in ("one", "two")}
    together = False
    while any(process.poll() is None for process in sent.values()):
        jobs = json.loads(laptop.asked("/api/jobs/", laptop.to.token))
        together |= sum(job["status"] == "RUNNING" for job in jobs) == 2
        time.sleep(1)
    for name, process in sent.items():
        said = process.communicate()[0]
        assert process.returncode == 0, said
        assert json.loads(said.splitlines()[-1])["status"] == "SUCCEEDED", name
    assert together
    assert len(store.find(tmp_path / "store", "ingest")) == 2
    entrypoints = {
        job["entrypoint"].split()[0] for job in json.loads(laptop.asked("/api/jobs/", laptop.to.token))
    }
    assert entrypoints == {"python"}


def test_a_job_that_died_with_its_cluster_goes_on_on_another(laptop: hosts.Laptop, tmp_path: Path) -> None:
    home = tmp_path / "store"
    begun = begin(laptop, "run", "one", home)
    while begun.poll() is None and len(list(home.glob("ingest/**/[0-9]*.json"))) < 3:
        time.sleep(0.1)
    laptop.to.kill()
    begun.kill()
    begun.communicate()
    read = len(list(home.glob("ingest/**/[0-9]*.json")))
    assert read >= 3 and store.find(home, "ingest") == []

    laptop.to.token = "1" * 32
    (laptop.to.folder / "tunnel").unlink()
    laptop.to.ray()
    laptop.wait()
    again = begin(laptop, "resume", "one", home)
    said = again.communicate(timeout=240)[0]
    assert again.returncode == 0, said
    (made,) = store.find(home, "ingest")
    counts = made.manifest()["counts"]
    assert counts["accepted"] + counts["warned"] == SCANS
