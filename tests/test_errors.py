"""What ran out, by errors that really happened where a CPU can make them happen; and which number to change."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray.exceptions import ObjectStoreFullError, OutOfMemoryError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

import phantoms
from cranium import errors
from cranium.config import Experiment, UserError

EXPERIMENT = Experiment.model_validate(
    {
        "name": "small",
        "ingest": {"cohorts": ["ssl"], "compute": {"num_workers": 3}},
        "pretrain": {"cohorts": ["ssl"], "inits": ["scratch"]},
        "adapt": {"tasks": [phantoms.LESION | {"cohort": "ssl"}]},
        "sweep": {"init": ["scratch"], "compute": {"num_workers": 2}},
    }
)
# As Ray 2.60 said it on a machine that was asked to keep 2 % of its memory.
RAYS_MONITOR = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, \
ID: d01) was 2.09GB used / 23.54GB limit (0.088892)
Considered workers: [
Selected to kill: (Task: job ID=01000000, lease ID=02, task name=Map(_guarded), required resources={CPU: 1}, \
pid=24072, actual memory used=0.06GB, worker ID=58d1)
]"""


def raised(work: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:
        work()
    return caught.value


@pytest.mark.parametrize(
    "work",
    [lambda: torch.empty(10**16), lambda: np.empty(10**16), lambda: pa.allocate_buffer(10**16)],
    ids=["torch", "numpy", "arrow"],
)
def test_an_allocation_that_fails_is_the_hosts_memory(work: Callable[[], object]) -> None:
    found = errors.out_of_memory(raised(work))
    assert found and found[0] == "host" and found[1]


def test_a_worker_that_ray_ended_is_found_behind_all_of_trains_wrapping() -> None:
    killed = WorkerHealthCheckFailedError("A worker health check failed", OutOfMemoryError(RAYS_MONITOR))
    where, what = errors.out_of_memory(WorkerGroupError("worker errors", {1: killed})) or ("", "")
    assert where == "host"
    assert what == (
        "a node ran low on memory (2.09GB used / 23.54GB) and Ray ended a worker, Map(_guarded) with 0.06GB"
    )


def test_what_ray_quotes_of_an_error_is_not_said_for_it() -> None:
    """The text of a wrapping has the words of what it wraps, and a traceback before them."""
    inner = MemoryError("Unable to allocate 71.1 PiB for an array")
    task = RayTaskError("_pack", "Traceback ...\nUnable to allocate", inner).as_instanceof_cause()
    group = WorkerGroupError("can't allocate memory ... No space left on device", {0: task})
    assert errors.out_of_memory(group) == ("host", "Unable to allocate 71.1 PiB for an array")
    assert errors.mendable(group) is None
    full = OSError(errno.ENOSPC, "No space left on device", "/store/x")
    task = RayTaskError("_pack", "No space left on device", full).as_instanceof_cause()
    assert "(/store/x)" in str(errors.mendable(task))


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),  # of fork and mmap
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), "device"),  # of the driver
    ],
)
def test_memory_that_runs_out_elsewhere(error: Exception, where: str) -> None:
    assert (errors.out_of_memory(error) or [""])[0] == where


def test_a_device_and_the_object_store_are_told_apart() -> None:
    device = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    assert errors.out_of_memory(WorkerGroupError("errors", {0: device})) == (
        "device",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
    )
    assert (errors.out_of_memory(ObjectStoreFullError("full")) or [""])[0] == "objects"


@pytest.mark.parametrize(
    "other", [ValueError("memory"), RuntimeError("the actor died unexpectedly"), OSError(5, "i/o")]
)
def test_nothing_else_is_called_memory(other: Exception) -> None:
    assert errors.out_of_memory(other) is None and errors.mendable(other) is None


@pytest.mark.parametrize(
    ("stage", "where", "said"),
    [
        ("pretrain", "device", r"pretrain\.accumulate \(now 1\)"),
        ("pretrain", "host", r"pretrain\.compute\.prefetch_batches \(now 2\)"),
        ("ingest", "host", r"lower ingest\.compute\.num_workers \(now 3\)"),
        ("embed", "device", r"lower embed\.batch_size \(now 64\)"),
        ("sweep", "host", r"lower sweep\.compute\.num_workers \(now 2\)"),
        ("embed", "host", r"give it more memory \(embed\.compute\.num_workers is 1 already\)"),
        ("sweep", "device", r"adapt\.finetune\.batch_size"),
        ("pretrain", "objects", r"--object-store-memory"),
    ],
)
def test_the_number_to_change_is_named(stage: str, where: errors.Where, said: str) -> None:
    assert re.search(said, errors.less_memory(EXPERIMENT, stage, where))


def test_a_full_disk_is_found_by_its_number_and_by_its_words() -> None:
    by_number = RuntimeError("the task failed")
    by_number.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/store/x")
    by_words = WorkerGroupError(
        "errors", {0: RuntimeError("I/O error: No space left on device (os error 28)")}
    )
    for error, file in ((by_number, "(/store/x)"), (by_words, "")):
        found = errors.mendable(error)
        assert found and found.code == "NO_SPACE" and found.exit_code == 1 and file in str(found)
    own = UserError("LABEL", "no such label")
    own.__context__ = by_number
    assert errors.mendable(own) is own
