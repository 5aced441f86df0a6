"""What every worker of a pretraining runs: student and teacher over the stream, step by step. [Ray Train]

`pretrain.py` starts it. A worker takes up the newest whole checkpoint (`restart.py`), goes on from its step, and writes
the next ones aside while the steps go on. Asked to stop, or at a step that is not finite, it makes one more and leaves.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cranium import (
    allocator,
    capture,
    checkpoint,
    corpora,
    journals,
    meters,
    restart,
    stall,
    store,
    stream,
)
from cranium.config import Crops, Experiment, Loss, Optimiser, Pretrain, fingerprint
from cranium.dinov2 import anomaly, schedules
from cranium.dinov2.crops import CropSpec
from cranium.dinov2.method import DINOv2, MethodSpec, Student, parameter_groups
from cranium.models.architectures import ARCHITECTURES
from cranium.restart import Position
from cranium.store import Artefact
from cranium.update import Terms, backward, update
from cranium.volume import plan

JOURNAL = "journal"
START = "start.json"  # where the first weights came from and how they fitted
STOP = "stop"  # a file in the run's folder: make a checkpoint and leave
# Whether Ray looks for nodes that are about to be taken away; on a private cluster there are none.
PREEMPTION = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
MOST_SKIPPED = 5  # updates left out in a row; the next one that is not finite ends the run


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs: all steps, or those up to the one to look into (`replay`). What it has to tell."""
    import ray.train

    standing = stall.Standing()
    if payload["replay"] is not None:
        return _train(payload, standing)
    seconds = payload["experiment"]["pretrain"]["compute"]["stall_seconds"]
    rank = ray.train.get_context().get_world_rank()
    with stall.beating(Path(payload["folder"]), rank, seconds, standing):
        return _train(payload, standing)


def _train(payload: dict[str, Any], standing: stall.Standing) -> dict[str, Any]:
    import ray.train
    import ray.train.torch

    exp = Experiment.model_validate(payload["experiment"])
    spec = exp.pretrain
    assert spec
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(spec.compute.threads or max(1, int(spec.compute.cpus_per_worker)))
    if spec.compute.tuned and not spec.compute.gpus_per_worker:
        allocator.keep_freed()
    device = ray.train.torch.get_device()
    corpus = corpora.corpus([Artefact(Path(folder)) for folder in payload["shard_sets"]], exp.stream)
    method, source = _build(spec, payload, corpus, device)
    if rank == 0 and payload["replay"] is None:
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
    replay: int | None = payload["replay"]
    folder = Path(payload["folder"])
    continued = Path(payload["continued"]) if payload["continued"] else None
    position = restart.restore(method, optimiser, folder, continued, replay)
    if world > 1:
        method.student = nn.parallel.DistributedDataParallel(
            method.plain_student,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
        )
    order = stream.order(exp.stream, spec.batch_size, spec.seed)
    labels = {"experiment": exp.name, "run": folder.name, "rank": str(rank)}
    batches = stream.batches(
        corpus,
        order,
        start=position.step,
        stop=spec.steps if replay is None else replay + 1,
        rank=rank,
        world=world,
        prefetch=spec.compute.prefetch_batches,
        read_cpus=spec.compute.read_cpus,
        fill=exp.stream.fill,
        labels=labels if replay is None else None,
    )
    if replay is not None:
        run = Run(folder, device, world, corpus, order)
        return {"replayed": _replayed(spec, method, optimiser, batches, run, replay)}
    journal = journals.Journal(folder / JOURNAL, uuid.uuid4().hex[:8], position.step) if rank == 0 else None
    card = {
        "channels": list(corpus.channels),
        "preprocessing_hash": payload["preprocessing_hash"],
        "preprocessing": payload["preprocessing"],
        "image_size": corpus.shape[-1],
        "config": fingerprint(spec),
    }
    run = Run(folder, device, world, corpus, order, journal, card, standing)
    meter = _meter(spec, labels, position.step, world, folder / JOURNAL)
    if position.step == 0:
        _look(spec, method, run, 0)
    clock, begun = Stopwatch(), position.step
    standing.move(position.step, "first_batch")
    captured = _loop(spec, method, optimiser, batches, position, run, clock, meter)
    standing.move(position.step, "end")
    if journal:
        journal.close()
    if journal and position.step == spec.steps:
        checkpoint.export(run.folder, method.teacher.backbone, card)
    return {
        "source": asdict(source),
        "skipped": position.skipped,
        "captured": str(captured or ""),
        "loop": {"steps": position.step - begun, **{part: round(s, 3) for part, s in clock.spent.items()}},
    }


@dataclass(frozen=True)
class Run:
    """Where one worker works, and on what. Only the first has a journal, and it alone writes."""

    folder: Path
    device: torch.device
    world: int
    corpus: corpora.Corpus
    order: plan.Order
    journal: journals.Journal | None = None
    card: dict[str, Any] = field(default_factory=dict)  # of exported backbones
    standing: stall.Standing = field(default_factory=stall.Standing)


PARTS = ("step", "first_batch", "data_wait", "checkpoint", "tracking", "monitor")


class Stopwatch:
    """Seconds of a loop by what they were spent on: a lap is what passed since the one before."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def lap(self, part: str) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.spent[part] += seconds
        return seconds


def _meter(spec: Pretrain, labels: dict[str, str], step: int, world: int, journal: Path) -> meters.Loop:
    full = {
        "train/target_entropy": math.log(spec.loss.prototypes),
        "train/feature_std": 1 / math.sqrt(ARCHITECTURES[spec.arch].dim),
    }
    attempts = len(list(journal.glob("*.jsonl")))
    return meters.Loop(labels, full, step, spec.steps, spec.batch_size // world, attempts)


def _look(spec: Pretrain, method: DINOv2, run: Run, done: int) -> None:
    """Leave the teacher to be looked at, where that is due."""
    looks = spec.compute.monitor
    if looks and run.journal and (done % looks.every == 0 or done == spec.steps):
        # It brings SciPy and scikit-learn: seconds that a start without looks need not take.
        from cranium import monitor

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
    method = DINOv2(Student(backbone.train(), objective, tuned=spec.compute.tuned).to(device), objective)
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
    position: Position,
    run: Run,
    clock: Stopwatch,
    meter: meters.Loop,
) -> Path | None:
    """Every step from the stream's first to its last, or until asked to stop; the capture of one that ended it."""
    schedule = rates(spec.optimiser, spec.loss, spec.steps, spec.batch_size)
    warned = False  # of a preemption: one checkpoint is made for it
    saved, waiting = position.step, "first_batch"
    for batch in batches:
        waited, waiting = clock.lap(waiting), "data_wait"
        run.standing.move(batch.step, "step")
        now = schedule.at(batch.step)
        terms = update(spec, method, optimiser, batch, now)
        if not terms.finite:
            ends = spec.nonfinite == "stop" or position.in_a_row == MOST_SKIPPED
            if ends and saved != position.step:  # as it was before this step
                restart.save(method, optimiser, position, run.journal is not None, awaited=True)
                saved = position.step
            captured = _captured(spec, terms, batch.step, saved, not ends, run)
            if ends:
                return captured
            position.skipped += 1
        position.in_a_row = 0 if terms.finite else position.in_a_row + 1
        position.step = done = batch.step + 1
        seconds = waited + clock.lap("step")
        meter.step(done, seconds, clock.spent)
        if run.journal and (done % spec.compute.log_every == 0 or done == spec.steps or batch.step == 0):
            values = terms.metrics() | {
                "train/lr": now.lr,
                "train/weight_decay": now.weight_decay,
                "train/momentum": now.momentum,
                "train/teacher_temperature": now.teacher_temperature,
            }
            values |= {"train/skipped": float(position.skipped)} if spec.nonfinite == "skip" else {}
            values |= {"sys/data_wait_seconds": waited, "sys/data_wait_share": waited / seconds}
            values |= {"sys/stacks_per_second": spec.batch_size / seconds}
            run.journal.metrics(batch.step, values)
            meter.entry(values)
        clock.lap("tracking")
        run.standing.move(batch.step, "checkpoint")
        asked = _asked(run, done, spec)
        leaving, preempted = asked == "leave", asked == "save" and not warned
        warned = warned or preempted
        if done % spec.compute.checkpoint_every == 0 or done == spec.steps or leaving or preempted:
            awaited = done == spec.steps or leaving or preempted
            restart.save(method, optimiser, position, run.journal is not None, awaited)
            saved = done
        clock.lap("checkpoint")
        run.standing.move(batch.step, "monitor")
        _look(spec, method, run, done)
        clock.lap("monitor")
        run.standing.move(done, "data_wait")
        if leaving:
            break
    return None


def _captured(spec: Pretrain, terms: Terms, step: int, saved: int, skipped: bool, run: Run) -> Path | None:
    """Write down a step that was not finite."""
    if run.journal is None:
        return None
    rows = tuple(capture.rows(run.corpus, run.order, step))
    found = capture.Capture(step, spec.seed, run.world, saved, skipped, terms.scalars(), rows)
    return capture.write(run.folder, found)


def _replayed(
    spec: Pretrain,
    method: DINOv2,
    optimiser: torch.optim.Optimizer,
    batches: Iterator[stream.Batch],
    run: Run,
    step: int,
) -> list[dict[str, Any]]:
    """Work up to `step` as the run did, and find out where that step stops being finite: by worker."""
    schedule = rates(spec.optimiser, spec.loss, spec.steps, spec.batch_size)
    for batch in batches:
        now = schedule.at(batch.step)
        if batch.step == step:
            break
        update(spec, method, optimiser, batch, now)
    optimiser.zero_grad(set_to_none=True)

    def work(look: anomaly.Look) -> dict[str, torch.Tensor]:
        terms = backward(spec, method, batch, now.teacher_temperature, look)
        return {name: term for name, term in terms.items() if name not in ("total", "teacher_cls")}

    found = anomaly.trace({"student": method.plain_student, "teacher": method.teacher}, work)
    if run.world == 1:
        return [found]
    everyone: list[Any] = [None] * run.world
    torch.distributed.all_gather_object(everyone, found)
    return everyone


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
    if not PREEMPTION:
        return None
    return "save" if ray.train.get_preemption_info() is not None else None
