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


def behind(error: BaseException) -> Iterator[BaseException]:
    """An error, and all that it wraps or came of."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        wrapped = [
            getattr(current, name, None) for name in ("cause", "health_check_failure", "controller_failure")
        ]
        wrapped += list((getattr(current, "worker_failures", None) or {}).values())
        waiting += [one for one in wrapped if isinstance(one, BaseException)]
        waiting += [current.__cause__, current.__context__]


def mendable(error: BaseException) -> UserError | None:
    """The error a user can mend: a `UserError` behind it that wraps no other, or that the disk is full."""
    every = list(behind(error))
    for one in every:
        # Ray's wrapping of one is a UserError too, with a traceback for its message.
        if isinstance(one, UserError) and not isinstance(getattr(one, "cause", None), BaseException):
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
        name, text = type(one).__name__, str(one)
        if name == KILLED and isinstance(one, RuntimeError):
            return "device", text.strip().splitlines()[0]
        if name == KILLED:
            used, largest = USED.search(text), LARGEST.search(text)
            of = f" ({used[1]})" if used else ""
            whom = f", {largest[1]} with {largest[2]}" if largest else ""
            return "host", f"a node ran low on memory{of} and Ray ended a worker{whom}"
        if name in STORE:
            return "objects", text.strip().splitlines()[0]
        if isinstance(one, MemoryError) or ALLOCATORS.search(text):
            return "host", text.strip().splitlines()[0][:200] or name
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
        return (
            f"lower pretrain.compute.prefetch_batches (now {spec.compute.prefetch_batches}), or spread the "
            f"{spec.compute.num_workers} workers over more nodes (pretrain.compute.cpus_per_worker, now "
            f"{spec.compute.cpus_per_worker:g})"
        )
    if stage == "embed":
        batch = f"lower embed.batch_size (now {exp.embed.batch_size})"
        return batch if where == "device" else f"{batch} or {_fewer('embed', exp.embed.compute.num_workers)}"
    if stage == "sweep" and exp.sweep:
        compute = exp.sweep.compute
        tuned = _fewer("sweep.compute.tuned", compute.tuned.num_workers)
        if where == "device":
            return f"lower adapt.finetune.batch_size or {tuned}"
        return f"{_fewer('sweep', compute.num_workers)}, for cells that train a network {tuned}"
    return _fewer("ingest", exp.ingest.compute.num_workers)


def _fewer(stage: str, workers: int) -> str:
    name = stage if "." in stage else f"{stage}.compute"
    return f"lower {name}.num_workers (now {workers})"
