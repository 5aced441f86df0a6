from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cranium.volume import shard

SHAPE = (3, 1, 28, 30)
CHANNELS = ("T1w", "T2w", "FLAIR")


def run(seed: int, n: int = 5, masks: bool = False) -> tuple[np.ndarray, pa.Table]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, *SHAPE), np.uint8)
    labels = rng.integers(0, 4, (n, *SHAPE[1:]), np.uint8) if masks else None
    table = shard.encode(
        pixels,
        channels=CHANNELS,
        cohort="phantom",
        subject=f"{seed:03}",
        session="",
        slices=range(10, 10 + n),
        num_slices=n,
        present=0b101,
        masks=labels,
    )
    return pixels, table


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_what_is_written_is_read(tmp_path: Path, codec: shard.Codec) -> None:
    path = tmp_path / "a.parquet"
    runs = [run(0, 64), run(1, 7, masks=True), run(2, 1)]
    assert shard.write(path, (t for _, t in runs), codec) == 72
    footer = shard.read_footer(path)
    assert footer == shard.Footer((64, 7, 1), SHAPE, CHANNELS)
    for index, (pixels, table) in enumerate(runs):
        rows = shard.read_row_group(path, index, verify=True)
        assert rows.equals(table)
        assert rows.schema.metadata[shard.METADATA] == table.schema.metadata[shard.METADATA]
        np.testing.assert_array_equal(shard.pixels(rows), pixels)
        shard.check_rows(rows, "here")
        assert rows["crc"].to_pylist() == [zlib.crc32(stack.tobytes()) for stack in pixels]
        assert (shard.masks(rows) is None) == (index != 1)


def test_layout_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    shard.write(path, [run(0, 64)[1]])
    group = pq.ParquetFile(path).metadata.row_group(0)
    by_name = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    pixels = by_name["pixels"]
    assert pixels.physical_type == "FIXED_LEN_BYTE_ARRAY"
    assert not pixels.is_stats_set and not pixels.has_dictionary_page
    assert by_name["subject"].is_stats_set and by_name["slice"].statistics.min == 10
    assert path.stat().st_size < 64 * np.prod(SHAPE) * 1.1  # bytes stay bytes


def test_pixels_views_slices_and_joins_chunks() -> None:
    (a, first), (b, second) = run(0), run(1)
    view = shard.pixels(first)
    assert not view.flags.owndata and not view.flags.writeable
    assert np.shares_memory(view, a)
    np.testing.assert_array_equal(shard.pixels(first.slice(2, 2)), a[2:4])
    joined = pa.concat_tables([first.slice(1), second.slice(0, 3)])
    np.testing.assert_array_equal(shard.pixels(joined), np.concatenate([a[1:], b[:3]]))
    np.testing.assert_array_equal(shard.pixels(first.to_batches()[0]), a)
    shard.check_rows(joined, "here")


def test_masks_of_mixed_rows() -> None:
    _, without = run(0, 2)
    _, with_masks = run(1, 3, masks=True)
    labels = shard.masks(pa.concat_tables([without, with_masks]).combine_chunks())
    assert labels is not None
    np.testing.assert_array_equal(labels[:2], 0)
    np.testing.assert_array_equal(labels[2:], shard.masks(with_masks))


def test_every_flipped_pixel_byte_trips_the_crc(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pixels, table = run(0)
    shard.write(path, [table])
    whole = path.read_bytes()
    start = whole.index(pixels[3].tobytes())
    rng = np.random.default_rng(0)
    for offset in rng.integers(0, pixels[3].size, 20):
        damaged = bytearray(whole)
        damaged[start + offset] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        rows = shard.read_row_group(path, 0)  # Parquet itself notices nothing
        with pytest.raises(shard.ShardError, match="here: the pixels of row 3") as error:
            shard.check_rows(rows, "here")
        assert error.value.code == "SHARD_CORRUPT"
        with pytest.raises(shard.ShardError, match="row group 0"):
            shard.read_row_group(path, 0, verify=True)


def test_a_changed_label_trips_its_crc_and_not_that_of_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    _, table = run(1, masks=True)
    shard.write(path, [table])
    labels = shard.masks(table)
    assert labels is not None and table["mask_crc"].to_pylist() == [zlib.crc32(m.tobytes()) for m in labels]
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(labels[2].tobytes()) + 17] ^= 1
    path.write_bytes(damaged)
    rows = shard.read_row_group(path, 0)
    with pytest.raises(shard.ShardError, match="here: the label map of row 2") as error:
        shard.check_rows(rows, "here")
    assert error.value.code == "SHARD_CORRUPT"
    shard.check_rows(
        shard.read_row_group(path, 0, ["pixels", "crc"]), "here"
    )  # who reads no labels checks none


def test_a_label_map_that_comes_or_goes_trips_its_crc() -> None:
    """Only the rows that have a map have its CRC."""
    (_, without), (_, drawn) = run(0, 2), run(1, 2, masks=True)
    at = drawn.schema.get_field_index("mask")
    mixed = pa.concat_tables([without, drawn]).combine_chunks()
    assert mixed["mask_crc"].null_count == 2
    shard.check_rows(mixed, "here")
    for changed in (
        drawn.set_column(at, drawn.schema.field("mask"), without["mask"]),
        without.set_column(at, drawn.schema.field("mask"), drawn["mask"]),
    ):
        with pytest.raises(shard.ShardError, match="label map of row 0"):
            shard.check_rows(changed, "here")


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -9])
def test_cut_files_are_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.parquet"
    shard.write(path, [run(0)[1]])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(shard.ShardError) as error:
        shard.read_footer(path)
    assert error.value.code == "SHARD_CORRUPT"


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(shard.ShardError) as error:
        shard.read_footer(tmp_path / "none.parquet")
    assert error.value.code == "SHARD_MISSING"
    foreign = tmp_path / "b.parquet"
    pq.write_table(pa.table({"pixels": [b"x"]}), foreign)
    with pytest.raises(shard.ShardError) as error:
        shard.read_footer(foreign)
    assert error.value.code == "SHARD_SCHEMA"
    _, table = run(0)
    pq.write_table(table.drop_columns("crc"), foreign)  # our metadata, other columns
    with pytest.raises(shard.ShardError) as error:
        shard.read_row_group(foreign, 0)
    assert error.value.code == "SHARD_SCHEMA"


def test_encode_refuses_what_does_not_fit() -> None:
    def call(shape: tuple[int, ...], slices: list[int], channels: tuple[str, ...] = CHANNELS) -> None:
        meta = {"cohort": "c", "subject": "s", "session": "", "num_slices": 3, "present": 1}
        shard.encode(np.zeros(shape, np.uint8), channels=channels, slices=slices, **meta)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="1 to 64"):
        call((65, *SHAPE), list(range(65)))
    with pytest.raises(ValueError, match="rising"):
        call((2, *SHAPE), [4, 4])
    with pytest.raises(ValueError, match="channel names"):
        call((1, *SHAPE), [0], ("T1w",))


class Foreign(pa.ExtensionType):  # type: ignore[misc]
    """An extension type whose Python code would run wherever it is registered and such a file is opened."""

    ran = 0

    def __init__(self) -> None:
        super().__init__(pa.binary(28 * 30 * 3), "tests.foreign")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"code"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Foreign:
        cls.ran += 1
        return cls()


@pytest.fixture
def registered() -> Iterator[None]:
    pa.register_extension_type(Foreign())
    yield
    pa.unregister_extension_type("tests.foreign")


def test_p9_extension_types_are_refused_before_their_code_runs(tmp_path: Path, registered: None) -> None:
    _, table = run(0)
    path = tmp_path / "a.parquet"
    at = table.schema.get_field_index("pixels")
    column = pa.ExtensionArray.from_storage(Foreign(), table["pixels"].combine_chunks())
    pq.write_table(table.set_column(at, "pixels", column), path)
    pq.ParquetFile(path)
    assert Foreign.ran > 0  # merely opening it would do
    Foreign.ran = 0
    for look in (shard.read_footer, shard.open_file, lambda p: shard.read_row_group(p, 0)):
        with pytest.raises(shard.ShardError) as error:
            look(path)
        assert error.value.code == "SHARD_SCHEMA" and "extension type" in str(error.value)
    assert Foreign.ran == 0
    # a schema that hides its length is no way around
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"ARROW:schema\x18", b"ARROW:schema\x28"))
    with pytest.raises(shard.ShardError):
        shard.open_file(path)


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(pa.array([b"x" * 2520] * 5, pa.binary()), id="P9-variable-bytes"),
        pytest.param(pa.array([[1] * 8] * 5, pa.list_(pa.uint8())), id="P9-list"),
        pytest.param(pa.array(["x"] * 5), id="P9-text"),
    ],
)
def test_p9_only_our_columns_are_read(tmp_path: Path, column: pa.Array) -> None:
    """An allow-list: a column of pickles is a column of variable bytes."""
    _, table = run(0)
    path = tmp_path / "a.parquet"
    for changed in (
        table.set_column(table.schema.get_field_index("pixels"), "pixels", column),
        table.append_column("more", column),
    ):
        pq.write_table(changed, path)
        with pytest.raises(shard.ShardError) as error:
            shard.read_footer(path)
        assert error.value.code == "SHARD_SCHEMA"


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        (b"{", "cannot be read"),
        (b"[]", "cannot be read"),
        (b'{"schema_version": 2, "dtype": "uint8"}', "cannot be read"),
        (b'{"schema_version": 3}', "upgrade Cranium"),
        (b'{"schema_version": 1}', "ingest again"),
    ],
)
def test_p4_a_schema_of_another_version_is_refused(tmp_path: Path, meta: bytes, says: str) -> None:
    _, table = run(0)
    path = tmp_path / "a.parquet"
    pq.write_table(table.replace_schema_metadata({shard.METADATA: meta}), path)
    with pytest.raises(shard.ShardError, match=says) as error:
        shard.read_footer(path)
    assert error.value.code == "SHARD_SCHEMA"


def test_shards_elsewhere_are_named_by_a_file_of_their_set(tmp_path: Path) -> None:
    assert shard.base(tmp_path) == str(tmp_path)
    (tmp_path / shard.PLACE).write_text("s3://bucket/ingest/x-00000000\n")
    assert shard.base(tmp_path) == "s3://bucket/ingest/x-00000000"


def test_uint16_travels_and_is_said(tmp_path: Path) -> None:
    stacks = np.random.default_rng(0).integers(0, 65536, (5, 2, 1, 6, 6), np.uint16)
    names = {"channels": ("T1w", "T2w"), "cohort": "c", "subject": "s", "session": ""}
    table = shard.encode(stacks, slices=range(5), num_slices=5, present=3, **names)  # type: ignore[arg-type]
    shard.write(tmp_path / "x.parquet", [table])
    assert shard.read_footer(tmp_path / "x.parquet").dtype == "uint16"
    back = shard.read_row_group(tmp_path / "x.parquet", 0)
    shard.check_rows(back, "x")
    np.testing.assert_array_equal(shard.pixels(back), stacks)
    np.testing.assert_array_equal(shard.pixels(back.slice(2, 2)), stacks[2:4])
    assert shard.pixels(back).dtype == np.uint16
    with pytest.raises(ValueError, match="uint8 or uint16"):
        shard.encode(stacks.astype(np.int32), slices=range(5), num_slices=5, present=3, **names)  # type: ignore[arg-type]
