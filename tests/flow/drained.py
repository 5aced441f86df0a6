"""Work on a cluster one of whose nodes is drained: `drained.py GCS TOLD DRAINED`, addresses of nodes as JSON.

An actor with a CPU of every node is at work when TOLD is written. Once DRAINED exists it answers once more, and twelve
tasks are given out; where they ran is printed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray


@ray.remote(num_cpus=1)
class Busy:
    def where(self) -> str:
        return ray.util.get_node_ip_address()


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def where() -> str:
    time.sleep(0.3)
    return ray.util.get_node_ip_address()


def main(address: str, told: Path, drained: Path) -> None:
    ray.init(address=address, log_to_driver=False)  # noqa: TID251
    nodes = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")]
    busy = [
        Busy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    before = ray.get([where.remote() for _ in range(12)])
    told.write_text(json.dumps(ray.get([one.where.remote() for one in busy])))
    while not drained.exists():
        time.sleep(0.1)
    after = ray.get([where.remote() for _ in range(12)])
    print(json.dumps({"before": before, "busy": ray.get([b.where.remote() for b in busy]), "after": after}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
