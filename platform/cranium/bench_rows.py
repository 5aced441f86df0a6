"""Generated input of the benchmarks: shards, a memmap of the same rows, scans. Noise in an ellipse; no brain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cranium import store
from cranium.store import Artefact
from cranium.volume import shard

CHANNELS = ("T1w", "T2w", "FLAIR")
SHARD_ROWS = 640  # 96 MB at 224 pixels
Pixels = NDArray[np.uint8]


def shard_set(folder: Path, rows: int, size: int) -> Artefact:
    """A finished shard set of `rows` stacks [3, 1, size, size] in sessions of at most 96 slices; made once."""
    made = Artefact(folder / "ingest" / f"bench-{rows}x{size}-v{shard.SCHEMA_VERSION}")
    if made.done:
        return made
    (made.path / "shards").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    head = _head(size, rng)
    slices = min(96, max(1, rows // 50))
    sessions = [(f"{n:06d}", min(slices, rows - start)) for n, start in enumerate(range(0, rows, slices))]
    entries: list[dict[str, Any]] = []
    for first in range(0, len(sessions), max(1, SHARD_ROWS // slices)):
        part = sessions[first : first + max(1, SHARD_ROWS // slices)]
        tables = [table for name, count in part for table in _session(name, count, head, rng)]
        path = made.path / "shards" / f"{len(entries):05d}.parquet"
        shard.write(path, tables)
        entries.append(_entry(path, tables))
    known = {"cohort": "bench", "session": "", "present": 7}
    _commit(made, [{**known, "subject": name, "num_slices": n} for name, n in sessions], entries, rows, size)
    return made


def repeated(made: Artefact, times: int) -> Artefact:
    """A shard set whose manifest lists the row groups of `made` so often, as other subjects: larger without bytes."""
    larger = Artefact(made.path.with_name(f"{made.path.name}-times{times}"))
    if larger.done:
        return larger
    larger.path.mkdir(parents=True, exist_ok=True)
    manifest = made.manifest()
    entries, rows = [], []
    for turn in range(times):
        for entry in manifest["shards"]:
            groups = [{**g, "subject": f"{turn}-{g['subject']}"} for g in entry["row_groups"]]
            entries.append({**entry, "file": f"../{made.path.name}/{entry['file']}", "row_groups": groups})
        for row in pq.read_table(made.path / "sessions.parquet").to_pylist():
            rows.append({**row, "subject": f"{turn}-{row['subject']}"})
    _commit(larger, rows, entries, times * manifest["counts"]["stacks"], manifest["shape"][-1])
    return larger


def _head(size: int, rng: np.random.Generator) -> Pixels:
    """A stack [3, 1, size, size]: noise in an ellipse, exact zero around it, as a head without its skull."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    inside = (x / 0.68) ** 2 + (y / 0.85) ** 2 < 1
    return np.asarray(rng.normal(120, 30, (3, 1, size, size)).clip(1, 255) * inside, np.uint8)


def _session(subject: str, count: int, head: Pixels, rng: np.random.Generator) -> list[pa.Table]:
    stacks = np.stack([np.roll(head, int(shift), -1) for shift in rng.integers(0, head.shape[-1], count)])
    return [
        shard.encode(
            stacks[first : first + shard.MAX_ROWS],
            channels=CHANNELS,
            cohort="bench",
            subject=subject,
            session="",
            slices=list(range(first, min(count, first + shard.MAX_ROWS))),
            num_slices=count,
            present=7,
        )
        for first in range(0, count, shard.MAX_ROWS)
    ]


def _entry(path: Path, tables: list[pa.Table]) -> dict[str, Any]:
    groups = [
        {
            "subject": table["subject"][0].as_py(),
            "session": "",
            "rows": table.num_rows,
            "first_slice": table["slice"][0].as_py(),
        }
        for table in tables
    ]
    return {
        "file": f"shards/{path.name}",
        "sha256": store.sha256(path),
        "bytes": path.stat().st_size,
        "rows": sum(table.num_rows for table in tables),
        "row_groups": groups,
    }


def _commit(made: Artefact, sessions: list[dict[str, Any]], entries: list[Any], rows: int, size: int) -> None:
    pq.write_table(pa.Table.from_pylist(sessions), made.path / "sessions.parquet")
    form = {"cohort": "bench", "channels": list(CHANNELS), "shape": [3, 1, size, size]}
    counts = {"stacks": rows}
    store.commit(made.path, {**form, "preprocessing_hash": "0" * 8, "shards": entries, "counts": counts})


def memmap(made: Artefact, folder: Path) -> Path:
    """The pixels of a shard set as one `.npy` [rows, 3, 1, size, size]; made once."""
    path = folder / f"{made.path.name}.npy"
    if not path.exists():
        manifest = made.manifest()
        beside = path.with_suffix(".part")
        shape = (manifest["counts"]["stacks"], *manifest["shape"])
        rows = np.lib.format.open_memmap(beside, "w+", np.uint8, shape)
        done = 0
        for entry in manifest["shards"]:
            for index in range(len(entry["row_groups"])):
                table = shard.read_row_group(made.path / entry["file"], index)
                rows[done : done + table.num_rows] = shard.pixels(table)
                done += table.num_rows
        rows.flush()
        beside.rename(path)
    return path


def scans(folder: Path, shape: tuple[int, int, int]) -> list[Path]:
    """One subject's three contrasts as `.nii.gz`, int16 [x, y, z], background exactly zero; made once."""
    import SimpleITK as sitk

    paths = [folder / f"scan-{'x'.join(map(str, shape))}-{contrast}.nii.gz" for contrast in CHANNELS]
    rng = np.random.default_rng(1)
    z, y, x = (np.linspace(-1, 1, n) for n in reversed(shape))
    inside = (x / 0.68) ** 2 + (y[:, None] / 0.85) ** 2 + (z[:, None, None] / 0.85) ** 2 < 1
    for path in (path for path in paths if not path.exists()):
        volume = (rng.normal(1200, 40, inside.shape) * inside).astype(np.int16)
        beside = path.with_name(f"part-{path.name}")
        sitk.WriteImage(sitk.GetImageFromArray(volume), str(beside), True)
        beside.rename(path)
    return paths
