"""A tiny pretraining, what makes two of them equal, and one in a process of its own in which something is killed.

    pretrainings.py SHARDS STORE [--kill worker|node|controller|gcs] [--stop] [--nodes]

prints a line of JSON for each step that is seen and for the kill. `--nodes`: on a loopback cluster of a head without
CPUs and two nodes, instead of a private one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cranium import checkpoint, cluster, journals, pretrain, restart, training
from cranium.config import Experiment, Machine
from cranium.dinov2.method import DINOv2
from cranium.store import Artefact

STEPS = 40
KILL_AFTER = 18  # steps
SPOILT = 5


def experiment(workers: int = 1, steps: int = STEPS, **changed: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "tiny",
            "ingest": {"cohorts": ["tiny"], "size": 28},
            "stream": {"lanes": 4, "window": 3},
            "pretrain": {
                "cohorts": ["tiny"],
                "inits": ["scratch"],
                "arch": "vit_tiny_patch14",
                "drop_path": 0.1,
                "steps": steps,
                "batch_size": 8,
                "crops": {"global_size": 28, "local_size": 14, "num_local": 2},
                "loss": {"prototypes": 64, "head_hidden": 64, "head_bottleneck": 32},
                "precision": "fp32",
                "compute": {
                    "num_workers": workers,
                    "checkpoint_every": 8,
                    "log_every": 1,
                    "keep_checkpoints": 2,
                    "monitor": {"cohort": "tiny", "every": 16, "stacks": 60},
                },
                **changed,
            },
        }
    )


def spoilt(told: dict[str, Any]) -> dict[str, Any]:
    """A worker. In one step the gradient of the last one is not finite, though its loss is."""
    import ray.train

    context = ray.train.get_context()
    if context.get_world_rank() < context.get_world_size() - 1:
        return training.train_worker(told)
    plain = DINOv2.losses

    def losses(self: DINOv2, stacks: Any, present: Any, rows: Any, step: int, **more: Any) -> dict[str, Any]:
        terms = plain(self, stacks, present, rows, step, **more)
        return terms | {"total": terms["total"] * (math.inf if step == SPOILT else 1.0)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DINOv2, "losses", losses)
        return training.train_worker(told)


# ---- what a run left ------------------------------------------------------------------------------------------------


def last_state(made: Artefact) -> dict[str, Any]:
    return checkpoint.load_training(restart.kept(made.path)[-1])


def journal(made: Artefact) -> list[tuple[int, dict[str, float]]]:
    """Steps and what was measured of the training, not of the machine."""
    return [
        (e.step, {k: v for k, v in e.metrics.items() if not k.startswith("sys/")})
        for e in journals.read(made.path / pretrain.JOURNAL)
    ]


def same(ours: Artefact, theirs: Artefact, steps: int = STEPS) -> None:
    """Tensors, optimiser, position, journal and backbone of two runs are equal, bit for bit."""
    a, b = last_state(ours), last_state(theirs)
    assert a["step"] == b["step"] == steps
    for name, tensor in b["method"].items():
        assert torch.equal(a["method"][name], tensor), name
    for index, state in b["optimiser"]["state"].items():
        assert all(torch.equal(a["optimiser"]["state"][index][k], v) for k, v in state.items())
    assert journal(ours) == journal(theirs)
    x, y = (load_file(made.path / checkpoint.BACKBONE) for made in (ours, theirs))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def seconds_lost(made: Artefact, killed: float) -> float:
    """From a kill to the next step that was done."""
    newest = sorted((made.path / pretrain.JOURNAL).glob("*.jsonl"))[-1]
    entries = [json.loads(line) for line in newest.read_text().splitlines()[1:]]
    return float(entries[0]["time"] - killed)


# ---- a process of its own -------------------------------------------------------------------------------------------


def victims(what: str) -> list[psutil.Process]:
    """Processes below this one: the workers, their nodes (raylets), Train's controller, the cluster's store."""
    below = psutil.Process().children(recursive=True)
    name = {"controller": "ray::TrainController", "gcs": "gcs_server"}.get(what, "RayTrainWorker")
    found = [process for process in below if any(name in part for part in process.cmdline()[:1])]
    return [process.parent() for process in found] if what == "node" else found  # type: ignore[misc]


@contextlib.contextmanager
def loopback() -> Iterator[str]:
    """A head without CPUs and two nodes, either of which can hold the whole run."""
    from ray.cluster_utils import Cluster

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": one.getsockname()[1]}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=4)
        nodes.wait_for_nodes()
        yield nodes.address
    finally:
        nodes.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--kill", choices=("worker", "node", "controller", "gcs"))
    parser.add_argument("--stop", action="store_true", help="SIGSTOP instead of SIGKILL: it hangs")
    parser.add_argument("--nodes", action="store_true")
    parser.add_argument("--changed", type=json.loads, default={})
    asked = parser.parse_args()
    left = [asked.kill] if asked.kill else []

    def tell(done: int, total: int, text: str) -> None:
        print(json.dumps({"done": done}), flush=True)
        if left and done >= KILL_AFTER and (found := victims(left[0])):
            left.clear()
            for process in found[:1]:
                print(json.dumps({"killed": time.time(), "pid": process.pid}), flush=True)
                os.kill(process.pid, signal.SIGSTOP if asked.stop else signal.SIGKILL)

    with contextlib.ExitStack() as stack:
        address = stack.enter_context(loopback()) if asked.nodes else None
        machine = Machine(store=asked.store, address=address)
        stack.enter_context(cluster.connect(machine))
        shards = Artefact(asked.shards)
        made = pretrain.pretrain(experiment(**asked.changed), machine, "scratch", [shards], progress=tell)
        print(json.dumps({"made": str(made.path)}), flush=True)


if __name__ == "__main__":
    main()
