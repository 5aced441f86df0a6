"""What an error was behind Ray's wrapping: one a user can mend, a full disk, too little memory."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import Literal

from cranium.config import Experiment, UserError

# Ray's and torch's by name: neither is imported only to be asked about.
KILLED = "OutOfMemoryError"  # ray.exceptions: by its monitor; torch: of a device
STORE = ("ObjectStoreFullError", "OutOfDiskError")
ALLOCATORS = re.compile(r"can't allocate memory|not enough memory: you tried to allocate|Unable to allocate")
USED = re.compile(r"was ([\d.]+GB used / [\d.]+GB) limit")
LARGEST = re.compile(r"\(Task: .*?task name=([^,]+),.*?actual memory used=([\d.]+GB)")

Where = Literal["host", "device", "objects"]


def _wrapped(error: BaseException) -> list[BaseException]:
    """What Ray has put into an error of its own, whose text quotes it."""
    names = ("cause", "health_check_failure", "controller_failure")
    every = [getattr(error, name, None) for name in names]
    every += list((getattr(error, "worker_failures", None) or {}).values())
    return [one for one in every if isinstance(one, BaseException)]


def behind(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it came of, without those that only wrap another."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        wrapped = _wrapped(current)
        if not wrapped:
            yield current
        waiting += [*wrapped, current.__cause__, current.__context__]


def mendable(error: BaseException) -> UserError | None:
    """The error a user can mend: a `UserError` behind it, or that the disk is full."""
    every = list(behind(error))
    for one in every:
        if isinstance(one, UserError):
            return one
    for one in every:
        # Also by its words: safetensors, pyarrow and Python each raise an error of their own.
        if getattr(one, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(one):
            where = f" ({one.filename})" if isinstance(one, OSError) and one.filename else ""
            mend = "free some: the same command goes on from what is there"
            return UserError("NO_SPACE", f"the disk is full{where}; {mend}", 1)
    return None


def out_of_memory(error: BaseException) -> tuple[Where, str] | None:
    """Which memory ran out, and what is known of it; None where it was something else.

    A process that the kernel killed for its memory cannot be told from one that was killed otherwise.
    """
    for one in behind(error):
        name, text = type(one).__name__, str(one).strip()
        first = next(iter(text.splitlines()), name)[:200]
        if (name == KILLED and isinstance(one, RuntimeError)) or "CUDA error: out of memory" in text:
            return "device", first
        if name == KILLED:
            used, largest = USED.search(text), LARGEST.search(text)
            of = f" ({used[1]})" if used else ""
            whom = f", {largest[1]} with {largest[2]}" if largest else ""
            return "host", f"a node ran low on memory{of} and Ray ended a worker{whom}"
        if name in STORE:
            return "objects", first
        if (
            isinstance(one, MemoryError)
            or getattr(one, "errno", None) == errno.ENOMEM
            or ALLOCATORS.search(text)
        ):
            return "host", first
    return None


def less_memory(exp: Experiment, stage: str, where: Where) -> str:
    """Which settings of a stage need less of that memory, with their present values."""
    if where == "objects":
        return "give Ray's object store or its spill folder more room (ray start --object-store-memory)"
    if stage == "pretrain" and exp.pretrain:
        spec = exp.pretrain
        if where == "device":
            return (
                f"raise pretrain.compute.num_workers (now {spec.compute.num_workers}, a GPU each) or "
                f"pretrain.accumulate (now {spec.accumulate}), or lower pretrain.batch_size (now {spec.batch_size})"
            )
        spread = f"spread the {spec.compute.num_workers} workers over more nodes (pretrain.compute.cpus_per_worker, now"
        fewer = _lower("pretrain.compute.prefetch_batches", spec.compute.prefetch_batches)
        return f"{fewer}, or {spread} {spec.compute.cpus_per_worker:g})"
    if stage == "embed":
        batch = _lower("embed.batch_size", exp.embed.batch_size)
        fewer = _lower("embed.compute.num_workers", exp.embed.compute.num_workers)
        return batch if where == "device" else f"{batch}, or {fewer}"
    if stage == "sweep" and exp.sweep:
        compute = exp.sweep.compute
        tuned = _lower("sweep.compute.tuned.num_workers", compute.tuned.num_workers)
        if where == "device":
            return f"lower adapt.finetune.batch_size, or {tuned}"
        return f"{_lower('sweep.compute.num_workers', compute.num_workers)}; for cells that train a network, {tuned}"
    return _lower("ingest.compute.num_workers", exp.ingest.compute.num_workers)


def _lower(setting: str, now: int) -> str:
    return f"lower {setting} (now {now})" if now > 1 else f"give it more memory ({setting} is 1 already)"
