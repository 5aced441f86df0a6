"""DINOv2 distillation on slice stacks, on Ray Train workers: the loop, its checkpoints and its journal.

In: finished shard sets and an initialisation. Out: `<store>/pretrain/<init>-<arch>-<hex>/` with `backbone.safetensors`
(the teacher's), the journal of every step and the training checkpoints. A killed run that is started again goes on
from its last checkpoint and ends with the tensors of an undisturbed one.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cranium import checkpoint, store, stream, track
from cranium.config import (
    PRETRAINED_HERE,
    Crops,
    Experiment,
    Loss,
    Machine,
    Optimiser,
    Pretrain,
    UserError,
    fingerprint,
)
from cranium.dinov2 import schedules
from cranium.dinov2.crops import CropSpec
from cranium.dinov2.method import DINOv2, MethodSpec, Student, parameter_groups
from cranium.store import Artefact

RECIPE = 1
JOURNAL = "journal"

Progress = Callable[[int, int, str], None]


def artefact(exp: Experiment, machine: Machine, init: str, shard_sets: list[Artefact]) -> Artefact:
    """Where the pretraining of this initialisation on these shard sets lies."""
    assert exp.pretrain
    key = {
        "recipe": RECIPE,
        "pretrain": exp.pretrain.model_copy(update={"inits": ()}),
        "stream": exp.stream,
        "init": init,
        "start": machine.weights.name if PRETRAINED_HERE[init] != "random" and machine.weights else None,
        "shards": [[s["sha256"] for s in shards.manifest()["shards"]] for shards in shard_sets],
    }
    return store.artefact(machine.store, "pretrain", f"{init}-{exp.pretrain.arch}", key)


def pretrain(
    exp: Experiment, machine: Machine, init: str, shard_sets: list[Artefact], progress: Progress | None = None
) -> Artefact:
    """Run (or go on with) the pretraining that makes `init`; returns at once when it is done."""
    assert exp.pretrain
    made = artefact(exp, machine, init, shard_sets)
    if made.done:
        return made
    started = time.monotonic()
    corpus = stream.corpus(shard_sets)
    if PRETRAINED_HERE[init] != "random":  # asked here once, not by every worker and attempt
        checkpoint.locate(PRETRAINED_HERE[init], exp.arch, machine.weights)
    spec = {
        "experiment": exp.model_dump(mode="json"),
        "init": init,
        "start": PRETRAINED_HERE[init],
        "weights_file": str(machine.weights) if machine.weights else None,
        "shard_sets": [str(shards.path) for shards in shard_sets],
        "folder": str(made.path),
        "preprocessing_hash": shard_sets[0].manifest()["preprocessing_hash"],
    }
    with store.lock(machine.store, made.id):
        made.path.mkdir(parents=True, exist_ok=True)
        with _watched(made.path / JOURNAL, exp.pretrain.steps, progress):
            source = _fit(exp.pretrain, spec, made.path)
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
                "start": source,
                "weights_sha256": store.sha256(made.path / checkpoint.BACKBONE),
                "channels": card["channels"],
                "preprocessing_hash": card["preprocessing_hash"],
                "seconds": round(time.monotonic() - started, 1),
            },
        )
    return made


def _fit(spec: Pretrain, payload: dict[str, Any], folder: Path) -> dict[str, Any]:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    compute = spec.compute
    resources: dict[str, float] = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=payload,
        scaling_config=ScalingConfig(
            num_workers=compute.num_workers,
            use_gpu=compute.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            # The folder is named by all that shapes the run, so this name can only ever continue this very run.
            name="ray",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=compute.keep_checkpoints),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise _explained(error) from error
    source: dict[str, Any] = result.return_value
    return source


def _explained(error: BaseException) -> BaseException:
    """The `UserError` a worker raised, found behind Ray's wrapping; else the error as it is."""
    seen: list[Any] = [error]
    while seen:
        current = seen.pop()
        if isinstance(current, UserError):
            return current
        seen += [e for e in (getattr(current, "worker_failures", None) or {}).values()]
        seen += [e for e in (getattr(current, "cause", None), current.__cause__) if e is not None]
    return error


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs. Returns where its first weights came from."""
    import ray.train
    import ray.train.torch

    exp = Experiment.model_validate(payload["experiment"])
    spec = exp.pretrain
    assert spec
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(spec.compute.threads or max(1, int(spec.compute.cpus_per_worker)))
    device = ray.train.torch.get_device()
    corpus = stream.corpus([Artefact(Path(folder)) for folder in payload["shard_sets"]])
    method, source = _build(spec, payload, corpus, device)
    optimiser = torch.optim.AdamW(
        parameter_groups(
            method.plain_student,
            spec.optimiser.weight_decay[0],
            spec.optimiser.layer_decay,
            spec.optimiser.patch_embed_lr,
        ),
        betas=(0.9, spec.optimiser.beta2),
        fused=True,
    )
    start = _restore(method, optimiser, device)
    if world > 1:
        method.student = nn.parallel.DistributedDataParallel(
            method.plain_student,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
        )
    batches = stream.batches(
        corpus,
        stream.order(exp.stream, spec.batch_size, spec.seed),
        start=start,
        stop=spec.steps,
        rank=rank,
        world=world,
        prefetch=spec.compute.prefetch_batches,
    )
    journal = (
        track.Journal(Path(payload["folder"]) / JOURNAL, uuid.uuid4().hex[:8], start) if rank == 0 else None
    )
    _loop(spec, method, optimiser, batches, device, world, journal)
    if journal:
        journal.close()
        card = {
            "channels": list(corpus.channels),
            "preprocessing_hash": payload["preprocessing_hash"],
            "image_size": corpus.shape[-1],
            "config": fingerprint(spec),
        }
        checkpoint.export(Path(payload["folder"]), method.teacher.backbone, card)
    return asdict(source)


def _build(
    spec: Pretrain, payload: dict[str, Any], corpus: stream.Corpus, device: torch.device
) -> tuple[DINOv2, checkpoint.Source]:
    backbone, source = checkpoint.load_backbone(
        payload["start"],
        arch=spec.arch,
        in_channels=corpus.shape[0] * corpus.shape[1],
        image_size=corpus.shape[-1],
        drop_path=spec.drop_path,
        seed=spec.seed,
        weights_file=Path(payload["weights_file"]) if payload["weights_file"] else None,
    )
    objective = method_spec(spec.crops, spec.loss)
    torch.manual_seed(spec.seed)  # the heads' first weights: the same on every worker
    method = DINOv2(Student(backbone.train(), objective).to(device), objective)
    if spec.compute.compile and device.type == "cuda":
        for network in (method.plain_student, method.teacher):
            for block in network.backbone.vit.blocks:
                block.compile()
    return method, source


def method_spec(crops: Crops, loss: Loss) -> MethodSpec:
    return MethodSpec(
        crops=CropSpec(**crops.model_dump()),
        **{k: v for k, v in loss.model_dump().items() if k != "teacher_temperature"},
    )


def rates(spec: Optimiser, loss: Loss, steps: int, batch_size: int) -> schedules.Schedules:
    """The schedules of a run, in steps; the learning rate scaled by the square root of the global batch."""
    return schedules.Schedules(
        total_steps=steps,
        lr=schedules.scaled_lr(spec.lr, batch_size),
        final_lr=spec.min_lr,
        warmup_steps=round(spec.warmup * steps),
        weight_decay=spec.weight_decay[0],
        final_weight_decay=spec.weight_decay[1],
        momentum=spec.momentum[0],
        final_momentum=spec.momentum[1],
        start_temperature=loss.teacher_temperature[0],
        teacher_temperature=loss.teacher_temperature[1],
        temperature_warmup_steps=round(spec.temperature_warmup * steps),
        freeze_last_layer_steps=round(spec.freeze_last_layer * steps),
        freeze_backbone_steps=round(spec.freeze_backbone * steps),
    )


def _loop(
    spec: Pretrain,
    method: DINOv2,
    optimiser: torch.optim.Optimizer,
    batches: Iterator[stream.Batch],
    device: torch.device,
    world: int,
    journal: track.Journal | None,
) -> None:
    schedule = rates(spec.optimiser, spec.loss, spec.steps, spec.batch_size)
    precision = torch.bfloat16 if spec.compute.precision == "bf16" else None
    reduce, gather = (_reduce, _gather) if world > 1 else (_identity, _identity)
    clock = time.perf_counter()
    for batch in batches:
        waited = time.perf_counter() - clock
        now = schedule.at(batch.step)
        schedules.apply(now, optimiser.param_groups)
        terms = method.losses(
            batch.stacks.to(device, non_blocking=True),
            batch.present.to(device, non_blocking=True),
            batch.rows,
            batch.step,
            seed=spec.seed,
            teacher_temperature=now.teacher_temperature,
            reduce=reduce,
            gather=gather,
            precision=precision,
        )
        optimiser.zero_grad(set_to_none=True)
        terms["total"].backward()  # type: ignore[no-untyped-call]
        norm = _clip(method.plain_student, spec.optimiser.clip)
        optimiser.step()
        method.update_teacher(now.momentum)
        done = batch.step + 1
        if journal and (done % spec.compute.log_every == 0 or done == spec.steps or batch.step == 0):
            seconds = time.perf_counter() - clock
            values = {f"train/{name}": float(value) for name, value in terms.items() if name != "total"}
            values |= {"train/lr": now.lr, "train/momentum": now.momentum, "train/grad_norm": float(norm)}
            values |= {"sys/data_wait_seconds": waited, "sys/stacks_per_second": spec.batch_size / seconds}
            journal.metrics(batch.step, values)
        _require_finite(terms["loss"], batch, done, spec)
        if done % spec.compute.checkpoint_every == 0 or done == spec.steps:
            _save(method, optimiser, done, journal is not None)
        clock = time.perf_counter()


def _require_finite(loss: Tensor, batch: stream.Batch, done: int, spec: Pretrain) -> None:
    # One host sync per log interval only: a NaN is noticed before it is checkpointed, not at every step.
    due = (
        done % spec.compute.log_every == 0 or done % spec.compute.checkpoint_every == 0 or done == spec.steps
    )
    if due and not math.isfinite(float(loss)):
        raise UserError(
            "NOT_FINITE",
            f"the loss is {float(loss)} at step {batch.step} (seed {spec.seed}); lower pretrain.optimiser.lr, or set "
            "pretrain.compute.precision=fp32",
            exit_code=1,
        )


def _clip(student: Student, limit: float) -> Tensor:
    """Clip the gradients of each module on its own (backbone, heads); returns the backbone's norm before."""
    modules = [student.backbone, student.dino_head, *([student.ibot_head] if student.ibot_head else [])]
    norms = [nn.utils.clip_grad_norm_(module.parameters(), limit) for module in modules]
    return norms[0]


def _identity(x: Tensor) -> Tensor:
    return x


def _reduce(x: Tensor) -> Tensor:
    torch.distributed.all_reduce(x := x.clone())
    return x


def _gather(x: Tensor) -> Tensor:
    import torch.distributed.nn.functional as collectives

    return torch.cat(list(collectives.all_gather(x)))  # type: ignore[no-untyped-call]


def _save(method: DINOv2, optimiser: torch.optim.Optimizer, done: int, writes: bool) -> None:
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        if writes:
            state = {"step": done, "method": method.state_dict(), "optimiser": optimiser.state_dict()}
            checkpoint.save_training(Path(folder), state)
        given = ray.train.Checkpoint.from_directory(folder) if writes else None
        ray.train.report({"step": done}, checkpoint=given)


def _restore(method: DINOv2, optimiser: torch.optim.Optimizer, device: torch.device) -> int:
    """Take up the newest checkpoint of this run, if any; returns the step to go on with."""
    import ray.train

    last = ray.train.get_checkpoint()
    if last is None:
        return 0
    with last.as_directory() as folder:
        state = checkpoint.load_training(Path(folder))
    method.load_state_dict(state["method"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


@contextmanager
def _watched(journal: Path, steps: int, progress: Progress | None) -> Iterator[None]:
    """Tell `progress` what the journal says, while the workers write it."""
    stop = threading.Event()

    def watch() -> None:
        while progress and not stop.wait(1.0):
            if entries := track.read_journal(journal):
                last = entries[-1]
                loss, rate = last.metrics["train/loss"], last.metrics["sys/stacks_per_second"]
                progress(last.step + 1, steps, f"loss {loss:.3f}, {rate:.0f} stacks/s")

    watcher = threading.Thread(target=watch, daemon=True, name="journal-watch")
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
