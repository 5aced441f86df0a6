"""Reading what a plan asks for: row groups in order, every row checked. Runs in Ray's workers, so it imports little."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from cranium.volume import shard

COLUMNS = ("pixels", "present", "crc")


def read(items: pa.Table) -> Iterator[pa.Table]:
    """Rows of the row groups that `items` names (lists `files` and `indices`), each checked against its CRC.

    Yields one table a row group: `pixels`, `present`, and `last`, true for its last row. Raises
    `ShardError(SHARD_CORRUPT | SHARD_MISSING | SHARD_SCHEMA)`.
    """
    for item in items.to_pylist():
        for file, index in zip(item["files"], item["indices"], strict=True):
            table = shard.read_row_group(Path(file), index, columns=COLUMNS)
            shard.check_rows(table, f"{file}, row group {index}")
            last = pa.array(np.arange(1, table.num_rows + 1) == table.num_rows)
            yield table.select(["pixels", "present"]).append_column("last", last)
