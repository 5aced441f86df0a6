"""What a pretraining costs beside its steps: waiting for data, checkpoints, tracking; and what Ray costs around them.

`cranium bench pretrain [steps= size= batch= data= out=]`: a tiny ViT on generated stacks, on one worker of a private
cluster, with a checkpoint every hundred steps and a journal entry every ten. The larger a network, the smaller the
shares; a tiny one is the hard case.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from cranium import bench, bench_rows, cluster, pretrain
from cranium.config import Experiment, Machine
from cranium.store import Artefact


class Spec(bench.Settings):
    rounds: int = Field(1, ge=1)
    steps: int = Field(500, ge=10)
    size: int = Field(84, ge=28, multiple_of=28)  # pixels in plane, and of global crops
    batch: int = Field(8, ge=8, multiple_of=8)
    rows: int = Field(5_000, ge=1_000)
    fits: int = Field(2, ge=1)  # trivial ones


def run(spec: Spec, say: Callable[[str], None]) -> bench.Result:
    """Measure a whole pretraining and trivial fits on a cluster that is up."""
    machine = bench.machine()
    say("making the stacks")
    made = bench_rows.shard_set(spec.data, spec.rows, spec.size)
    store = Path(tempfile.mkdtemp(prefix="pretrain-", dir=spec.data))
    try:
        with cluster.connect(Machine(store=store)):
            cases = [
                bench.Case(
                    "pretraining",
                    spec.steps,
                    lambda: _trained(spec, made, store),
                    "steps",
                    spec.rounds,
                    False,
                ),
                bench.Case("trivial fit", 1, lambda: _fitted(store), "fits", spec.fits, True),
            ]
            measured = bench.measure(cases, spec.rounds, say)
    finally:
        shutil.rmtree(store)
    by_name = {case.name: case for case in measured}
    return bench.Result(
        "pretrain",
        "cranium bench pretrain",
        spec.model_dump(mode="json", exclude={"data", "out"}),
        machine | {"load_after": bench.load()},
        measured,
        _targets(by_name),
    )


def experiment(spec: Spec) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "bench",
            "ingest": {"cohorts": ["bench"], "size": spec.size},
            "pretrain": {
                "cohorts": ["bench"],
                "inits": ["scratch"],
                "arch": "vit_tiny_patch14",
                "steps": spec.steps,
                "batch_size": spec.batch,
                "precision": "fp32",
                "crops": {"global_size": spec.size, "local_size": spec.size // 2, "num_local": 2},
                "loss": {"prototypes": 1024, "head_hidden": 512, "head_bottleneck": 128},
                "compute": {"checkpoint_every": max(1, spec.steps // 5), "log_every": 10},
            },
        }
    )


def _trained(spec: Spec, made: Artefact, store: Path) -> Mapping[str, float]:
    """Shares of the loop's time; seconds around it; MB of a checkpoint."""
    shutil.rmtree(store / "pretrain", ignore_errors=True)
    done = pretrain.pretrain(experiment(spec), Machine(store=store), "scratch", [made])
    manifest = done.manifest()
    parts = {name: seconds for name, seconds in manifest["loop"].items() if name != "steps"}
    loop = sum(parts.values())
    size = max(path.stat().st_size for path in done.path.glob("ray/checkpoint_*/*.pt"))
    return {
        **{f"{name}_percent": 100 * seconds / loop for name, seconds in parts.items()},
        "step_ms": 1000 * parts["step"] / spec.steps,
        "around_s": manifest["seconds"] - loop,
        "checkpoint_mb": size / 1e6,
    }


def _fitted(store: Path) -> Mapping[str, float]:
    """What Ray Train takes for nothing: from `fit()` to the worker's function, and from its end."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    begun = time.time()
    result = TorchTrainer(
        _nothing,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=f"fit-{time.time_ns()}", storage_path=str(store)),
    ).fit()
    worked: dict[str, Any] = result.return_value
    return {"before_s": worked["begun"] - begun, "after_s": time.time() - worked["ended"]}


def _nothing(config: Mapping[str, Any] | None = None) -> dict[str, float]:
    import ray.train

    begun = time.time()
    ray.train.report({"nothing": 0})
    return {"begun": begun, "ended": time.time()}


def _targets(measured: Mapping[str, bench.Measured]) -> list[bench.Target]:
    own, fit = measured["pretraining"], measured["trivial fit"]
    waited = own.fact("first_batch_percent") + own.fact("data_wait_percent")
    beside = own.fact("checkpoint_percent") + own.fact("tracking_percent")
    return [
        bench.Target("waiting for data, first batch included, % of the loop", waited, 2.0, at_least=False),
        bench.Target("checkpoints and tracking, % of the loop", beside, 1.0, at_least=False),
        bench.Target("a warm trivial fit, s", 1 / fit.per_second, 15.0, 8.0, at_least=False),
    ]
