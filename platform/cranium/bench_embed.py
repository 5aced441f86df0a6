"""Embedding a shard set against the bare forward pass of the same backbone on the same batches, already in memory.

`cranium bench embed [rows= arch= data= out=]`. Stacks are generated; both ways use every core, or the GPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping

import numpy as np
import torch
from pydantic import Field

from cranium import bench, bench_rows, cluster, embed, shardset
from cranium.config import Arch, Experiment, Machine
from cranium.models.vit import Backbone
from cranium.store import Artefact
from cranium.volume import shard


class Spec(bench.Settings):
    rounds: int = 2
    rows: int = Field(1_000, ge=50)  # a row group, and so a batch, is a fiftieth of them, at most 64
    size: int = Field(224, ge=28)  # pixels in plane
    arch: Arch = "vit_small_patch14_dinov2"


def run(spec: Spec, say: Callable[[str], None]) -> bench.Result:
    """Measure both ways in turn; the start of the actors and the file of features are in what embedding takes."""
    machine = bench.machine()
    say("making the stacks")
    made = bench_rows.shard_set(spec.data, spec.rows, spec.size)
    exp, own = experiment(spec), Machine(store=spec.data / "bench-embed")
    manifest = made.manifest()
    batches = [
        shard.pixels(shard.read_row_group(file, index)).copy()
        for file, entry in zip(shardset.files(made, manifest), manifest["shards"], strict=True)
        for index in range(len(entry["row_groups"]))
    ]
    backbone, _ = embed.load(exp, own, "random", manifest, None)
    with cluster.connect(own):
        cases = [
            bench.Case("bare forward pass", spec.rows, lambda: _forward(backbone, exp, batches)),
            bench.Case("embed", spec.rows, lambda: _embedded(exp, own, made), warm=False),
        ]
        measured = bench.measure(cases, spec.rounds, say)
    shutil.rmtree(own.store)
    return bench.Result(
        "embed",
        "cranium bench embed",
        spec.model_dump(mode="json", exclude={"data", "out"}),
        machine | {"load_after": bench.load()},
        measured,
        _targets({case.name: case for case in measured}),
    )


def experiment(spec: Spec) -> Experiment:
    compute = {"cpus_per_worker": os.cpu_count(), "gpus_per_worker": int(torch.cuda.is_available())}
    return Experiment.model_validate(
        {
            "name": "bench",
            "ingest": {"cohorts": ["bench"], "size": spec.size},
            "pretrain": {"cohorts": ["bench"], "arch": spec.arch},
            "embed": {"compute": compute},
        }
    )


def _targets(measured: Mapping[str, bench.Measured]) -> list[bench.Target]:
    rate = measured["embed"].per_second / measured["bare forward pass"].per_second
    return [bench.Target("rate over the bare forward pass, start included", rate, 0.9)]


# ---- cases ----------------------------------------------------------------------------------------------------------


def _forward(backbone: Backbone, exp: Experiment, batches: list[np.ndarray]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    ready = backbone.to(device).eval()
    for batch in batches:
        embed.encode(ready, batch, exp.embed.features, exp.embed.batch_size, device)
    torch.set_num_threads(before)


def _embedded(exp: Experiment, machine: Machine, made: Artefact) -> None:
    (found,) = embed.embed(exp, machine, "random", made)
    shutil.rmtree(found.path)
