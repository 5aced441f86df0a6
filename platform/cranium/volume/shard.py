"""Parquet shards of slice stacks: how rows are laid out, written, read back and checked.

A row is one slice stack `[C, S, H, W]` of uint8 (or uint16), held as raw C-order bytes in a fixed-size binary column:
Parquet has no 8-bit type, so a tensor column would store four bytes a pixel and decode value by value. A row group is a
run of at most `MAX_ROWS` slices of one session, so a session is read, added or forgotten by touching few row groups.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib
from numpy.typing import NDArray

Codec = Literal["none", "lz4", "zstd"]
Where = Path | str  # a string with `://` is in an object store
Shape = tuple[int, int, int, int]  # [C, S, H, W]

SCHEMA_VERSION = 2
DTYPES = ("uint8", "uint16")  # of a pixel; little-endian
MAX_ROWS = 64  # of a row group
METADATA = b"cranium"
PLACE = "place"  # a file of a shard set's folder that says where its shards are, when they are elsewhere
MEND = "restore it, or ingest again"
META_COLUMNS = ("cohort", "subject", "session", "slice", "num_slices", "present", "crc", "mask_crc")


class ShardError(ValueError):
    """A shard that cannot be trusted: `code` is SHARD_MISSING, SHARD_CORRUPT, SHARD_SCHEMA or SHARD_IO."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class Footer:
    """What a shard says of itself: rows of each row group, stack shape, channel names and kind of pixel."""

    row_groups: tuple[int, ...]
    shape: Shape
    channels: tuple[str, ...]
    dtype: str = "uint8"

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


def schema(shape: Sequence[int], channels: Sequence[str], dtype: str = "uint8") -> pa.Schema:
    """The Arrow schema of shards whose stacks are `shape` = [C, S, H, W] with these channel names and pixels."""
    c, s, h, w = shape
    if c != len(channels):
        raise ValueError(f"a stack of {c} channels needs {c} channel names, got {list(channels)}")
    meta = {
        "shape": [c, s, h, w],
        "dtype": dtype,
        "channels": list(channels),
        "schema_version": SCHEMA_VERSION,
    }
    return pa.schema(
        [
            pa.field("cohort", pa.string(), nullable=False),
            pa.field("subject", pa.string(), nullable=False),
            pa.field("session", pa.string(), nullable=False),
            pa.field("slice", pa.int32(), nullable=False),
            pa.field("num_slices", pa.int32(), nullable=False),
            pa.field("present", pa.uint32(), nullable=False),
            pa.field("pixels", pa.binary(c * s * h * w * np.dtype(dtype).itemsize), nullable=False),
            pa.field("mask", pa.binary(s * h * w), nullable=True),
            # Of `pixels` and of `mask`, apart: who reads no label maps can check the pixels.
            pa.field("crc", pa.uint32(), nullable=False),
            pa.field("mask_crc", pa.uint32(), nullable=True),
        ],
        metadata={METADATA: json.dumps(meta, sort_keys=True).encode()},
    )


def encode(
    pixels: NDArray[Any],
    *,
    channels: Sequence[str],
    cohort: str,
    subject: str,
    session: str,
    slices: Sequence[int],
    num_slices: int,
    present: int,
    masks: NDArray[np.uint8] | None = None,
) -> pa.Table:
    """Rows of one session from stacks `[n, C, S, H, W]` uint8 or uint16 (n <= 64) and labels `[n, S, H, W]` or None.

    `slices` are their indices in the session's grid, rising. The table views `pixels`; don't write to it afterwards.
    """
    n = len(pixels)
    if pixels.dtype.name not in DTYPES or pixels.ndim != 5 or not 0 < n <= MAX_ROWS:
        raise ValueError(
            f"expected 1 to {MAX_ROWS} uint8 or uint16 stacks [n, C, S, H, W], got {pixels.dtype} {pixels.shape}"
        )
    if len(slices) != n or any(b <= a for a, b in itertools.pairwise(slices)):
        raise ValueError("one rising slice index is needed for each stack")
    if masks is not None and masks.shape != (n, *pixels.shape[2:]):
        raise ValueError(f"masks {masks.shape} do not lie on the stacks {pixels.shape}")
    layout = schema(pixels.shape[1:], channels, pixels.dtype.name)
    mask_type = layout.field("mask").type
    columns = [
        pa.array([cohort] * n, pa.string()),
        pa.array([subject] * n, pa.string()),
        pa.array([session] * n, pa.string()),
        pa.array(slices, pa.int32()),
        pa.array([num_slices] * n, pa.int32()),
        pa.array([present] * n, pa.uint32()),
        _bytes(pixels, layout.field("pixels").type),
        pa.nulls(n, mask_type) if masks is None else _bytes(masks, mask_type),
        pa.array(_crcs(pixels), pa.uint32()),
        pa.nulls(n, pa.uint32()) if masks is None else pa.array(_crcs(masks), pa.uint32()),
    ]
    return pa.Table.from_arrays(columns, schema=layout)


def _crcs(rows: NDArray[Any]) -> list[int | None]:
    return [isal_zlib.crc32(row) for row in np.ascontiguousarray(rows)]


def _bytes(rows: NDArray[Any], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))])


def write(path: Path, tables: Iterable[pa.Table], codec: Codec = "none") -> int:
    """Write each table (a run of one session, from `encode`) as one row group; returns the number of rows.

    Dictionary and statistics only on the small columns; pages carry checksums. The file is not renamed or flushed to
    disk here: who publishes it does that.
    """
    writer: pq.ParquetWriter | None = None
    rows = 0
    try:
        for table in tables:
            writer = writer or pq.ParquetWriter(
                path,
                table.schema,
                compression=codec,
                compression_level={"pixels": 1, "mask": 1} if codec == "zstd" else None,
                use_dictionary=list(META_COLUMNS),
                write_statistics=list(META_COLUMNS),
                write_page_checksum=True,
                version="2.6",
            )
            writer.write_table(table, row_group_size=MAX_ROWS)
            rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise ValueError(f"{path}: a shard needs at least one row group")
    return rows


def base(folder: Path) -> str:
    """Below what the file names of a shard set's manifest lie: its folder, or what its file `place` says."""
    try:
        return (folder / PLACE).read_text().strip()
    except FileNotFoundError:
        return str(folder)


def read_footer(where: Where) -> Footer:
    """Row groups, shape and channels, no pixel read. Raises `ShardError` when absent, cut, or not of our schema."""
    return _footer(open_file(where), where)


def read_row_group(
    where: Where, index: int, columns: Sequence[str] | None = None, verify: bool = False
) -> pa.Table:
    """One row group as a table; `columns` None reads all. `verify` also checks Parquet's page checksums.

    Raises `ShardError`. The rows' own CRC is a separate step (`check_rows`), so that it is paid once, by the reader.
    """
    file = open_file(where, verify)
    _footer(file, where)
    try:
        return file.read_row_group(
            index, columns=None if columns is None else list(columns), use_threads=False
        )
    except (OSError, pa.ArrowException) as error:
        raise ShardError("SHARD_CORRUPT", f"{where} row group {index}: {error}; {MEND}") from error


def open_file(where: Where, verify: bool = False) -> pq.ParquetFile:
    """Open a shard on a file system, or at `s3://` through fsspec. Raises `ShardError`."""
    try:
        if "://" not in str(where):
            with Path(where).open("rb") as file:
                _refuse_extensions(file, where)
            # `pre_buffer` is for stores where a request is dear; from a disk it costs a tenth more CPU.
            return pq.ParquetFile(where, pre_buffer=False, page_checksum_verification=verify)
        import fsspec

        files = fsspec.filesystem(str(where).partition("://")[0], use_listings_cache=False)
        source = files.open(str(where), "rb", cache_type="none")  # pyarrow asks for the ranges it needs
        _refuse_extensions(source, where)
        return pq.ParquetFile(source, page_checksum_verification=verify)
    except FileNotFoundError:
        raise ShardError("SHARD_MISSING", f"{where} is missing; {MEND}") from None
    except PermissionError as error:
        raise ShardError("SHARD_IO", f"{where} cannot be read ({error}); check its permissions") from error
    except (OSError, pa.ArrowException) as error:
        raise ShardError("SHARD_CORRUPT", f"{where}: {error}; {MEND}") from error


def _refuse_extensions(file: BinaryIO, where: Where) -> None:
    """By the footer's own bytes: `pq.ParquetFile` would already run the Python code of a registered extension type."""
    end = file.seek(0, 2)
    file.seek(max(0, end - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > end - 12:
        raise ShardError("SHARD_CORRUPT", f"{where}: its footer is cut or damaged; {MEND}")
    file.seek(end - 8 - length)
    footer = file.read(length)
    # A key and its value in Thrift's compact form; the value is an Arrow schema in base64.
    schemas = re.findall(rb"ARROW:schema\x18[\x80-\xff]*[\x00-\x7f]([A-Za-z0-9+/]+=*)", footer)
    if len(schemas) != footer.count(b"ARROW:schema") or any(_has_extension(found) for found in schemas):
        raise ShardError("SHARD_SCHEMA", f"{where} has an extension type in its schema; no shard has one")


def _has_extension(schema: bytes) -> bool:
    return b"ARROW:extension" in base64.b64decode(schema[: len(schema) // 4 * 4])


def _footer(file: pq.ParquetFile, path: Where) -> Footer:
    # An allow-list: pickled columns, too, have run foreign code in Ray.
    meta = _metadata(file.schema_arrow, str(path))
    shape, channels = tuple(meta["shape"]), tuple(meta["channels"])
    if not file.schema_arrow.equals(schema(shape, channels, meta["dtype"]), check_metadata=False):
        raise ShardError(
            "SHARD_SCHEMA", f"{path} does not have the columns of a shard: {file.schema_arrow.names}"
        )
    groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
    return Footer(groups, shape, channels, meta["dtype"])


def _metadata(layout: pa.Schema, where: str) -> dict[str, Any]:
    raw = (layout.metadata or {}).get(METADATA)
    if raw is None:
        raise ShardError("SHARD_SCHEMA", f"{where} is no shard of Cranium: its schema has no `cranium` entry")
    try:
        meta: dict[str, Any] = dict(json.loads(raw))
        found = int(meta["schema_version"])
        if (
            found == SCHEMA_VERSION
            and meta["dtype"] in DTYPES
            and len(meta["shape"]) == 4
            and meta["channels"]
        ):
            return meta
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            "SHARD_SCHEMA", f"{where}: its `cranium` entry cannot be read ({error!r}); {MEND}"
        ) from None
    mend = "upgrade Cranium to read it" if found > SCHEMA_VERSION else "ingest again"
    raise ShardError(
        "SHARD_SCHEMA", f"{where} has schema version {found}, this Cranium reads {SCHEMA_VERSION}; {mend}"
    )


def stack_shape(rows: pa.Table | pa.RecordBatch) -> Shape:
    """[C, S, H, W] of the stacks of these rows, from the schema's metadata."""
    c, s, h, w = _metadata(rows.schema, "a batch of rows")["shape"]
    return c, s, h, w


def pixels(rows: pa.Table | pa.RecordBatch) -> NDArray[Any]:
    """Stacks `[n, C, S, H, W]`, uint8 or uint16 as stored.

    A read-only view of the value buffer when the rows are one chunk, else one copy.
    """
    meta = _metadata(rows.schema, "a batch of rows")
    return _view(rows, "pixels", meta["shape"], np.dtype(meta["dtype"]))


def masks(rows: pa.Table | pa.RecordBatch) -> NDArray[np.uint8] | None:
    """Label maps `[n, S, H, W]`, or None when no row has one. Rows without one among others are zero.

    Read `mask_crc` with them, for `check_rows`.
    """
    column = rows.column("mask")
    if column.null_count == len(column):
        return None
    labels = _view(rows, "mask", stack_shape(rows)[1:], np.dtype(np.uint8))
    if column.null_count:  # what lies under a null is undefined
        labels = labels.copy()
        labels[np.asarray(column.is_null())] = 0
    return labels


def _view(
    rows: pa.Table | pa.RecordBatch, name: str, shape: Sequence[int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    column = rows.column(name)
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    size = int(np.prod(shape))
    views = [
        np.frombuffer(
            chunk.buffers()[1], dtype, len(chunk) * size, chunk.offset * size * dtype.itemsize
        ).reshape(-1, *shape)
        for chunk in chunks
        if len(chunk)
    ]
    if not views:
        return np.empty((0, *shape), dtype)
    stacked = views[0] if len(views) == 1 else np.concatenate(views)
    stacked.flags.writeable = False  # the buffer may be shared with other processes
    return stacked


def check_rows(rows: pa.Table | pa.RecordBatch, where: str) -> None:
    """Compare every row's pixels with their CRC and, where these rows have the column `mask`, its label map too.

    Raises `ShardError(SHARD_CORRUPT)` naming the first bad row.
    """
    _compare(_crcs(pixels(rows)), rows.column("crc"), where, "the pixels")
    if "mask" in rows.schema.names:
        found: list[int | None] = [None] * rows.num_rows
        if (labels := masks(rows)) is not None:
            there = np.asarray(rows.column("mask").is_valid())
            found = [crc if here else None for crc, here in zip(_crcs(labels), there, strict=True)]
        _compare(found, rows.column("mask_crc"), where, "the label map")


def _compare(found: list[int | None], expected: pa.Array | pa.ChunkedArray, where: str, what: str) -> None:
    for index, (crc, stored) in enumerate(zip(found, expected.to_pylist(), strict=True)):
        if crc != stored:
            raise ShardError(
                "SHARD_CORRUPT", f"{where}: {what} of row {index} changed (its CRC differs); {MEND}"
            )
