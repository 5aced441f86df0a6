"""Ingest in a process that kills itself at a numbered point: before or after any call that changes the file system."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  (pyarrow would import it in every forked process)
import pyarrow.compute  # noqa: F401

import ingests
from cranium.config import Machine

CALLS = ((os, "replace"), (os, "link"), (os, "unlink"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree"))


def ingest(raw: Path, store: Path, point: int, told: Path) -> None:
    """Work until the point (0: to the end), then die by SIGKILL; how many points there were is written to `told`."""
    passed = 0

    def step() -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            step()
            result = real(*arguments, **named)
            step()
            return result

        return call

    for module, name in CALLS:
        setattr(module, name, watched(getattr(module, name)))
    ingests.plainly(raw, Machine(store=store))
    told.write_text(str(passed))


def ingest_elsewhere(raw: Path, store: Path, shards: str, point: int) -> None:
    """The same with shards in an object store: the points are before and after every request that changes it."""
    import s3fs

    passed = 0

    def step() -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    real = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
        changes = method.startswith(("put", "delete", "copy", "create", "complete", "upload"))
        if changes:
            step()
        result = await real(self, method, *arguments, **named)
        if changes:
            step()
        return result

    s3fs.S3FileSystem._call_s3 = call
    ingests.plainly(raw, Machine(store=store, shards=shards))
