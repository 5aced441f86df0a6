"""A Ray cluster of three hosts that come and go."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import hosts

pytestmark = pytest.mark.flow
CLUSTER = Path(__file__).parents[2] / "deploy" / "kubernetes" / "cluster.yaml"
WORKER = yaml.safe_load(CLUSTER.read_text())["spec"]["workerGroupSpecs"][0]["template"]["spec"]
PRE_STOP = WORKER["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]


@pytest.fixture(scope="module")
def three() -> Iterator[hosts.Hosts]:
    if why := hosts.missing():
        pytest.skip(why)
    with hosts.hosts("node", "other", cpus=3) as made:
        yield made


@pytest.fixture(scope="module")
def laptop(three: hosts.Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Laptop]:
    with hosts.tunnel(three.folder) as address:
        made = hosts.Laptop(three, tmp_path_factory.mktemp("study"), address)
        made.wait()
        yield made


def test_the_hook_of_a_pod_drains_its_own_node(laptop: hosts.Laptop, tmp_path: Path) -> None:
    """New work goes elsewhere at once; what runs goes on, and when it has ended the node leaves; others stay."""
    three, told, drained = laptop.to, tmp_path / "told", tmp_path / "drained"
    done = []
    work = [sys.executable, str(Path(__file__).with_name("drained.py")), hosts.GCS, str(told), str(drained)]
    worker = threading.Thread(target=lambda: done.append(three.run("head", *work)))
    worker.start()
    while not told.exists() and worker.is_alive():
        time.sleep(0.1)
    assert PRE_STOP[:2] == ["/bin/sh", "-c"] and PRE_STOP[2].endswith("&& sleep 120")
    begun = time.monotonic()
    hook = three.inside(
        "other", *PRE_STOP[:2], PRE_STOP[2].replace("sleep 120", "true"), RAY_ADDRESS=hosts.GCS
    )
    print(f"the hook took {time.monotonic() - begun:.1f} s")
    drained.touch()
    worker.join()
    assert hook.returncode == 0, hook.stderr
    assert done[0].returncode == 0, done[0].stderr
    seen = json.loads(done[0].stdout.splitlines()[-1])
    node, other = hosts.ADDRESSES["node"], hosts.ADDRESSES["other"]
    assert set(seen["before"]) == {node, other} and sorted(seen["busy"]) == [node, other]
    assert set(seen["after"]) == {node}
    laptop.wait("head", "node")
    three.kill("other")
    three.join("other")
    laptop.wait()
