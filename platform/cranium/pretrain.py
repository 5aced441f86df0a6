"""DINOv2 distillation on slice stacks, on Ray Train workers: what identifies a run, starting it, stopping it.

In: finished shard sets and an initialisation. Out: `<store>/pretrain/<init>-<arch>-<hex>/` with `backbone.safetensors`
(the teacher's), the journal of every step and the training checkpoints. A killed run that is started again goes on
from its last checkpoint and ends with the tensors of an undisturbed one. `training.py` is what a worker does.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cranium import (
    capture,
    checkpoint,
    corpora,
    errors,
    health_page,
    journals,
    monitor,
    restart,
    stall,
    store,
    training,
)
from cranium.config import PRETRAINED_HERE, Experiment, Machine, Pretrain, UserError, canonical
from cranium.course import Course
from cranium.store import Artefact
from cranium.training import JOURNAL, STOP
from cranium.watch import repeatedly

RECIPE = 2
KEY = "key.json"  # what shapes the run, beside its checkpoints
STOP_SECONDS = 25.0  # for the last checkpoint after a signal; Kubernetes kills after 30

Progress = Callable[[int, int, str], None]


def artefact(exp: Experiment, machine: Machine, init: str, shard_sets: list[Artefact]) -> Artefact:
    """Where the pretraining of this initialisation on these shard sets lies."""
    assert exp.pretrain
    name = f"{init}-{exp.pretrain.arch}"
    return store.artefact(machine.store, "pretrain", name, _key(exp, machine, init, shard_sets))


def _key(exp: Experiment, machine: Machine, init: str, shard_sets: list[Artefact]) -> dict[str, Any]:
    assert exp.pretrain
    needs_weights = PRETRAINED_HERE[init] != "random"
    return {
        "recipe": RECIPE,
        "pretrain": exp.pretrain.model_copy(update={"inits": ()}),
        "stream": exp.stream,
        "init": init,
        "start": checkpoint.identity(machine.weights) if needs_weights and machine.weights else None,
        "shards": [[s["sha256"] for s in shards.manifest()["shards"]] for shards in shard_sets],
    }


def pretrain(
    exp: Experiment,
    machine: Machine,
    init: str,
    shard_sets: list[Artefact],
    progress: Progress | None = None,
    monitored: Artefact | None = None,
) -> Artefact:
    """Run (or go on with) the pretraining that makes `init`; returns at once when it is done.

    A signal that raises in the main thread (Ctrl-C, the command line's SIGTERM) first lets the workers make one more
    checkpoint; a second one ends it at once. `monitored` is the shard set of `compute.monitor`. Raises `UserError`.
    """
    assert exp.pretrain
    made = artefact(exp, machine, init, shard_sets)
    if made.done:
        return made
    started = time.monotonic()
    corpus = corpora.corpus(shard_sets, exp.stream)
    if PRETRAINED_HERE[init] != "random":  # asked here once, not by every worker and attempt
        checkpoint.locate(PRETRAINED_HERE[init], exp.arch, machine.weights)
    told = payload(exp, machine, init, shard_sets)
    with store.lock(machine.store, made.id):
        (made.path / STOP).unlink(missing_ok=True)
        restart.tidy(made.path)
        store.write_atomic(made.path / KEY, canonical(_key(exp, machine, init, shard_sets)))
        looks = monitor.watching(made.path, monitored, exp.pretrain.compute.monitor)
        page = health_page.kept(made, exp, init, shard_sets)
        together = stall.watched(made.path, exp.pretrain.compute.stall_seconds)
        with page, _watched(made.path / JOURNAL, exp.pretrain.steps, progress), looks, together:
            found = fit(exp.pretrain, told, made.path)
            if found["captured"]:
                raise capture.ended(made.path.name, Path(found["captured"]))
        card = checkpoint.read_card(made.path)
        store.commit(
            made.path,
            {
                "stage": "pretrain",
                "init": init,
                "steps": exp.pretrain.steps,
                "rows": corpus.rows,
                "cohorts": list(exp.pretrain.cohorts),
                "shard_sets": [shards.id for shards in shard_sets],
                "start": found["source"],
                "skipped": found["skipped"],
                "loop": found["loop"],
                "continued_from": exp.pretrain.continue_from,
                "weights_sha256": store.sha256(made.path / checkpoint.BACKBONE),
                "channels": card["channels"],
                "preprocessing_hash": card["preprocessing_hash"],
                "alarms": [asdict(alarm) for alarm in Course(made, exp, init, tuple(shard_sets)).alarms],
                "seconds": round(time.monotonic() - started, 1),
            },
        )
    return made


def payload(
    exp: Experiment, machine: Machine, init: str, shard_sets: list[Artefact], replay: int | None = None
) -> dict[str, Any]:
    """What a worker is told, in plain values."""
    assert exp.pretrain
    return {
        "experiment": exp.model_dump(mode="json"),
        "start": PRETRAINED_HERE[init],
        "weights_file": str(machine.weights) if machine.weights else None,
        "shard_sets": [str(shards.path) for shards in shard_sets],
        "folder": str(artefact(exp, machine, init, shard_sets).path),
        "continued": str(_continued(exp, machine)) if exp.pretrain.continue_from else None,
        "replay": replay,
        "preprocessing_hash": shard_sets[0].manifest()["preprocessing_hash"],
        "preprocessing": shard_sets[0].manifest().get("preprocessing"),
    }


def spent(made: Artefact) -> str:
    """Where the time of a finished run's last attempt went, in one line."""
    manifest = made.manifest()
    parts = dict(manifest["loop"])
    steps = parts.pop("steps")
    seconds = sum(parts.values())
    shares = ", ".join(f"{name} {value / max(seconds, 1e-9):.1%}" for name, value in parts.items())
    return (
        f"{steps} steps in {seconds:.1f} s ({shares}), {manifest['seconds'] - seconds:.1f} s before and after"
    )


# ---- resuming --------------------------------------------------------------------------------------------------------


def check_resume(exp: Experiment, machine: Machine, init: str, shard_sets: list[Artefact]) -> None:
    """Refuse to call it resuming when this run would start anew while an unfinished one differs from it.

    Raises `UserError(RESUME_DIFFERS)` with every field that differs, and how to accept the change.
    """
    made = artefact(exp, machine, init, shard_sets)
    assert exp.pretrain
    if made.path.exists() or exp.pretrain.continue_from:
        return
    wanted = json.loads(canonical(_key(exp, machine, init, shard_sets)))
    for other in unfinished(machine, f"{init}-{exp.pretrain.arch}"):
        changes = differences(json.loads((other.path / KEY).read_text()), wanted)
        message = (
            f"{other.id} is unfinished, but differs in {'; '.join(changes)}. Give it the old values to go on with it, "
            f"accept the change with pretrain.continue_from={other.path.name}, or start anew with `cranium pretrain`"
        )
        raise UserError("RESUME_DIFFERS", message)


def unfinished(machine: Machine, name: str) -> list[Artefact]:
    """Pretrainings of this name that have a checkpoint and no manifest, newest first."""
    folders = (machine.store / "pretrain").glob(f"{name}-*")
    folders = (f for f in folders if (f / KEY).is_file() and not (f / store.TOMBSTONE).exists())
    begun = [f for f in folders if restart.kept(f)]
    newest = sorted(begun, key=lambda f: (f / KEY).stat().st_mtime_ns, reverse=True)
    return [Artefact(folder) for folder in newest if not Artefact(folder).done]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every field in which two nested keys differ, as `pretrain.optimiser.lr: 0.001 -> 0.002`."""
    found: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            shown = [json.dumps(value) for value in (before, after)]
            short = "other content" if max(map(len, shown)) > 60 else f"{shown[0]} -> {shown[1]}"
            found.append(f"{prefix}{name}: {short}")
    return found


def _continued(exp: Experiment, machine: Machine) -> Path:
    """The folder of the run whose last checkpoint this one starts from."""
    assert exp.pretrain and exp.pretrain.continue_from
    folder = machine.store / "pretrain" / exp.pretrain.continue_from
    store.require_not_forgotten(folder)
    if not restart.kept(folder):
        raise UserError("NO_RUN", f"pretrain.continue_from: {folder} holds no checkpoint")
    return folder


# ---- starting and stopping ------------------------------------------------------------------------------------------


def fit(spec: Pretrain, told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the first worker has to tell; Ray's files and the checkpoints go to `folder/ray`.

    Ray starts dead workers again, from the last checkpoint. Its controller, whose death it does not survive, is
    started again here: `compute.max_failures` times each.
    """
    from ray.exceptions import RayActorError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cranium import collectives

    compute = spec.compute
    resources: dict[str, float] = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker

    def once() -> Any:
        return TorchTrainer(
            training.train_worker,
            train_loop_config=told,
            torch_config=collectives.Torch(),
            scaling_config=ScalingConfig(
                num_workers=compute.num_workers,
                use_gpu=compute.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                # The folder is named by all that shapes the run, so this name can only ever continue this very run.
                name=restart.RAY,
                storage_path=str(folder),
                failure_config=FailureConfig(max_failures=compute.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=compute.keep_checkpoints),
            ),
        ).fit()

    def until_it_lives() -> Any:
        for left in range(compute.max_failures, -1, -1):
            try:
                return once()
            except RayActorError as death:
                if not left:
                    raise
                print(f"the controller of the training died, and is started again: {death}", flush=True)
                restart.tidy(folder)  # it may have died in the midst of its list

    try:
        result = _interruptible(until_it_lives, folder / STOP)
    except Exception as error:
        raise errors.mendable(error) or error from error
    found: dict[str, Any] = result.return_value
    return found


def _interruptible(work: Callable[[], Any], stop: Path) -> Any:
    """`work()` in a thread, so that a signal raises here and not in the midst of it.

    Then the workers are asked, by the file `stop`, to make a checkpoint and leave; a second signal waits no longer.
    """
    outcome: dict[str, Any] = {}
    ended = threading.Event()  # not Thread.join: interrupted once, it takes a running thread for ended

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:  # raised again where it is awaited
            outcome["error"] = error
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True, name="fit").start()
    try:
        ended.wait()
    except BaseException:
        stop.touch()
        ended.wait(STOP_SECONDS)
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


@contextmanager
def _watched(journal: Path, steps: int, progress: Progress | None) -> Iterator[None]:
    """Tell `progress` what the journal says, while the workers write it."""

    def tell() -> None:
        if progress and (entries := journals.read(journal)):
            last = entries[-1]
            loss, rate = last.metrics.get("train/loss", math.nan), last.metrics["sys/stacks_per_second"]
            progress(last.step + 1, steps, f"loss {loss:.3f}, {rate:.0f} stacks/s")

    with repeatedly(tell, 1.0):
        yield
