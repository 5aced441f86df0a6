"""Reading what a plan asks for: row groups in order, every row checked. Runs in Ray's workers, so it imports little."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cranium.volume import shard

COLUMNS = ["pixels", "present", "crc"]


def read(items: pa.Table) -> Iterator[pa.Table]:
    """Rows of the row groups that `items` names (lists `files` and `indices`), each checked against its CRC.

    Yields one table a row group: `pixels`, `present`, and `last`, true for its last row. Raises
    `ShardError(SHARD_CORRUPT | SHARD_MISSING | SHARD_SCHEMA)`.
    """
    for item in items.to_pylist():
        for file, index in zip(item["files"], item["indices"], strict=True):
            table = _row_group(file, index)
            shard.check_rows(table, f"{file}, row group {index}")
            last = pa.array(np.arange(1, table.num_rows + 1) == table.num_rows)
            yield table.select(["pixels", "present"]).append_column("last", last)


def _row_group(file: str, index: int) -> pa.Table:
    try:
        return _opened(file, _state(file)).read_row_group(index, COLUMNS, use_threads=False)
    except (OSError, pa.ArrowException):
        return shard.read_row_group(file, index, COLUMNS)  # gone or damaged: says how


def _state(file: str) -> tuple[int, ...]:
    """Inode, bytes and time of change; () in an object store, where what has this name can only be this."""
    if "://" in file:
        return ()
    state = os.stat(file)
    return state.st_ino, state.st_size, state.st_mtime_ns


@lru_cache(maxsize=64)
def _opened(file: str, state: tuple[int, ...]) -> pq.ParquetFile:
    """A shard whose footer was checked; kept open while its `state` stays."""
    shard.read_footer(file)
    return shard.open_file(file)
