"""Two jobs of two workers stream at once on a loopback cluster of three nodes; prints where every read ran, as JSON.

A process of its own, because the tests' session is connected to another cluster: `nodes.py FOLDER` of a shard set.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray
from cranium import corpora, stream
from cranium.config import Stream
from cranium.store import Artefact
from cranium.volume import visit

STEPS, WORLD = 60, 2


def noted(items: pa.Table, log: Path) -> list[pa.Table]:
    """`visit.read`, that leaves a note of where and when it ran."""
    started = time.time()
    tables = list(visit.read(items))
    note = {"node": ray.get_runtime_context().get_node_id(), "started": started, "ended": time.time()}
    with log.open("a") as file:
        file.write(json.dumps(note) + "\n")
    return tables


def consume(folder: str, log: str, rank: int) -> dict[str, Any]:
    """One worker of a job: all its batches, and the node it ran on."""
    stream.read = partial(_each, log=Path(log))  # type: ignore[assignment]
    corpus = corpora.corpus([Artefact(Path(folder))])
    order = stream.order(Stream(lanes=4, window=3), 8, seed=3)
    batches = stream.batches(corpus, order, start=0, stop=STEPS, rank=rank, world=WORLD, read_cpus=1.0)
    rows = sum(len(batch.stacks) for batch in batches)
    return {"node": ray.get_runtime_context().get_node_id(), "rows": rows, "log": log}


def _each(items: pa.Table, log: Path) -> Any:
    yield from noted(items, log)


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=4) for _ in range(WORLD)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)  # noqa: TID251
    try:
        running = [
            ray.remote(consume)
            .options(num_cpus=1, scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False))
            .remote(str(folder), str(folder / f"{job}-{rank}.log"), rank)
            for job in ("a", "b")
            for rank, node in enumerate(nodes)
        ]
        found = ray.get(running, timeout=200)
        for worker in found:
            worker["reads"] = [json.loads(line) for line in Path(worker["log"]).read_text().splitlines()]
        print(json.dumps({"head": cluster.head_node.node_id, "workers": found}))
    finally:
        ray.shutdown()  # noqa: TID251
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
