"""What every worker of a pretraining runs: student and teacher over the stream, step by step. [Ray Train]

`pretrain.py` starts it. A worker takes up the newest whole checkpoint, goes on from its step, and writes the next ones
aside while the steps go on. When asked to stop it makes one more and leaves.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cranium import checkpoint, corpora, monitor, store, stream, track
from cranium.config import Crops, Experiment, Loss, Optimiser, Pretrain, UserError, fingerprint
from cranium.dinov2 import health, schedules
from cranium.dinov2.crops import CropSpec
from cranium.dinov2.method import DINOv2, MethodSpec, Student, clip_gradients, parameter_groups
from cranium.store import Artefact

JOURNAL = "journal"
START = "start.json"  # where the first weights came from and how they fitted
STOP = "stop"  # a file in the run's folder: make a checkpoint and leave


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
    corpus = corpora.corpus([Artefact(Path(folder)) for folder in payload["shard_sets"]], exp.stream)
    method, source = _build(spec, payload, corpus, device)
    if rank == 0:
        store.write_atomic(Path(payload["folder"]) / START, json.dumps(asdict(source)))
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
    start = _restore(method, optimiser, payload["continued"])
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
        read_cpus=spec.compute.read_cpus,
        fill=exp.stream.fill,
    )
    journal = (
        track.Journal(Path(payload["folder"]) / JOURNAL, uuid.uuid4().hex[:8], start) if rank == 0 else None
    )
    card = {
        "channels": list(corpus.channels),
        "preprocessing_hash": payload["preprocessing_hash"],
        "preprocessing": payload["preprocessing"],
        "image_size": corpus.shape[-1],
        "config": fingerprint(spec),
    }
    run = Run(Path(payload["folder"]), device, world, journal, card)
    if start == 0:
        _look(spec, method, run, 0)
    finished = _loop(spec, method, optimiser, batches, run)
    if journal:
        journal.close()
    if journal and finished:
        checkpoint.export(run.folder, method.teacher.backbone, card)
    return asdict(source)


@dataclass(frozen=True)
class Run:
    """Where one worker works. Only the first has a journal, and it alone writes."""

    folder: Path
    device: torch.device
    world: int
    journal: track.Journal | None
    card: dict[str, Any]  # of exported backbones


def _look(spec: Pretrain, method: DINOv2, run: Run, done: int) -> None:
    """Leave the teacher to be looked at, where that is due."""
    looks = spec.compute.monitor
    if looks and run.journal and (done % looks.every == 0 or done == spec.steps):
        monitor.leave(run.folder, done, method.teacher.backbone, run.card)


def _build(
    spec: Pretrain, payload: dict[str, Any], corpus: corpora.Corpus, device: torch.device
) -> tuple[DINOv2, checkpoint.Source]:
    backbone, source = checkpoint.load_backbone(
        payload["start"],
        arch=spec.arch,
        in_channels=corpus.shape[0] * corpus.shape[1],
        image_size=corpus.shape[-1],
        drop_path=spec.drop_path,
        seed=spec.seed,
        weights_file=Path(payload["weights_file"]) if payload["weights_file"] else None,
        position=spec.position,
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
    """The schedules of a run, in steps; rate and, if asked, momentum scaled to the global batch."""
    start, end = (
        schedules.scaled_momentum(m, batch_size, spec.momentum_batch) if spec.momentum_batch else m
        for m in spec.momentum
    )
    return schedules.Schedules(
        total_steps=steps,
        lr=schedules.scaled_lr(spec.lr, batch_size),
        final_lr=spec.min_lr,
        warmup_steps=round(spec.warmup * steps),
        weight_decay=spec.weight_decay[0],
        final_weight_decay=spec.weight_decay[1],
        momentum=start,
        final_momentum=end,
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
    run: Run,
) -> bool:
    """Every step from the stream's first to its last; False when asked to stop before."""
    schedule = rates(spec.optimiser, spec.loss, spec.steps, spec.batch_size)
    warned = False  # of a preemption: one checkpoint is made for it
    clock = time.perf_counter()
    for batch in batches:
        waited = time.perf_counter() - clock
        now = schedule.at(batch.step)
        schedules.apply(now, optimiser.param_groups)
        optimiser.zero_grad(set_to_none=True)
        terms = _backward(spec, method, batch, now.teacher_temperature, run)
        norms = clip_gradients(method.plain_student, spec.optimiser.clip)
        optimiser.step()
        method.update_teacher(now.momentum)
        done = batch.step + 1
        if run.journal and (done % spec.compute.log_every == 0 or done == spec.steps or batch.step == 0):
            seconds = time.perf_counter() - clock
            values = {f"train/{n}": float(v) for n, v in terms.items() if n not in ("total", "teacher_cls")}
            values |= {
                "train/lr": now.lr,
                "train/weight_decay": now.weight_decay,
                "train/momentum": now.momentum,
            }
            values |= {"train/teacher_temperature": now.teacher_temperature}
            values |= {f"train/grad_norm_{module}": float(norm) for module, norm in norms.items()}
            values |= {"train/effective_rank": health.effective_rank(terms["teacher_cls"])}
            values |= {"sys/data_wait_seconds": waited, "sys/data_wait_share": waited / seconds}
            values |= {"sys/stacks_per_second": spec.batch_size / seconds}
            run.journal.metrics(batch.step, values)
        _require_finite(terms["loss"], norms["backbone"], batch, done, spec)
        asked = _asked(run, done, spec)
        leaving, preempted = asked == "leave", asked == "save" and not warned
        warned = warned or preempted
        if done % spec.compute.checkpoint_every == 0 or done == spec.steps or leaving or preempted:
            awaited = done == spec.steps or leaving or preempted
            _save(method, optimiser, done, run.journal is not None, awaited)
        _look(spec, method, run, done)
        if leaving:
            return done == spec.steps
        clock = time.perf_counter()
    return True


def _backward(
    spec: Pretrain, method: DINOv2, batch: stream.Batch, temperature: float, run: Run
) -> dict[str, Tensor]:
    """Losses of a batch and their gradients, part by part; workers exchange gradients with the last part only."""
    reduce, gather = (_reduce, _gather) if run.world > 1 else (_identity, _identity)
    precision = torch.bfloat16 if spec.precision == "bf16" else None
    size = len(batch.rows) // spec.accumulate
    found: list[dict[str, Tensor]] = []
    for number in range(spec.accumulate):
        part = slice(number * size, (number + 1) * size)  # a view: pinned memory stays pinned
        waits = run.world > 1 and number < spec.accumulate - 1
        with method.student.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            terms = method.losses(
                batch.stacks[part].to(run.device, non_blocking=True),
                batch.present[part].to(run.device, non_blocking=True),
                batch.rows[part],
                batch.step,
                seed=spec.seed,
                teacher_temperature=temperature,
                reduce=reduce,
                gather=gather,
                precision=precision,
            )
            (terms["total"] / spec.accumulate).backward()  # type: ignore[no-untyped-call]
        found.append({name: term.detach() for name, term in terms.items()})
    if len(found) == 1:
        return found[0]
    together = {name: torch.stack([terms[name] for terms in found]) for name in found[0]}
    cls = together.pop("teacher_cls").flatten(0, 1)
    return {name: values.mean(0) for name, values in together.items()} | {"teacher_cls": cls}


def _asked(run: Run, done: int, spec: Pretrain) -> Literal["leave", "save"] | None:
    """Whether somebody asked to stop, or a node is about to be taken away; one answer for all workers."""
    import ray.train

    if done % spec.compute.log_every and done != spec.steps:
        return None  # the answer costs messages between workers, and the device must wait for it
    leave = torch.tensor([float((run.folder / STOP).exists())], device=run.device)
    if run.world > 1:
        torch.distributed.all_reduce(leave, torch.distributed.ReduceOp.MAX)
    if leave.item():
        return "leave"
    return "save" if ray.train.get_preemption_info() is not None else None


def _require_finite(loss: Tensor, norm: Tensor, batch: stream.Batch, done: int, spec: Pretrain) -> None:
    # One host sync per log interval only: a NaN is noticed before it is checkpointed, not at every step.
    due = (
        done % spec.compute.log_every == 0 or done % spec.compute.checkpoint_every == 0 or done == spec.steps
    )
    if due and not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
        raise UserError(
            "NOT_FINITE",
            f"the loss is {float(loss)}, the gradient's norm {float(norm)} at step {batch.step} (seed {spec.seed}); "
            "lower pretrain.optimiser.lr, or set pretrain.precision=fp32",
            exit_code=1,
        )


def _identity(x: Tensor) -> Tensor:
    return x


def _reduce(x: Tensor) -> Tensor:
    torch.distributed.all_reduce(x := x.clone())
    return x


def _gather(x: Tensor) -> Tensor:
    import torch.distributed.nn.functional as collectives

    return torch.cat(list(collectives.all_gather(x)))  # type: ignore[no-untyped-call]


def _save(method: DINOv2, optimiser: torch.optim.Optimizer, done: int, writes: bool, awaited: bool) -> None:
    """Write a checkpoint aside and hand it to Ray, which copies it while the steps go on, unless it is `awaited`."""
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode

    if not writes:
        ray.train.report({"step": done})
        return
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    try:
        state = {"step": done, "method": method.state_dict(), "optimiser": optimiser.state_dict()}
        checkpoint.save_training(folder, state)
        ray.train.report(
            {"step": done},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if awaited else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _restore(method: DINOv2, optimiser: torch.optim.Optimizer, continued: str | None) -> int:
    """Take up the newest whole checkpoint of this run, else of the run it continues; the step to go on with."""
    import ray.train

    if ray.train.get_checkpoint() is None:
        folders = sorted((Path(continued) / "ray").glob("checkpoint_*")) if continued else []
    else:
        folders = [Path(reported.checkpoint.path) for reported in ray.train.get_all_reported_checkpoints()]
    for folder in reversed(folders):
        try:
            state = checkpoint.load_training(folder)
        except checkpoint.Damaged as damage:
            print(f"checkpoint left out: {damage}", flush=True)
            continue
        try:
            method.load_state_dict(state["method"])
            optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                "CHECKPOINT", f"{folder} holds another network or other heads: {reason}"
            ) from None
        return int(state["step"])
    if folders:
        raise UserError("CHECKPOINT", f"none of {len(folders)} checkpoints of this run is whole", 1)
    return 0
