"""The stream against its limits: memory copies, a plain scan of the same shards, other loaders, the paper's way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cranium import bench, store
from cranium.store import Artefact
from cranium.volume import shard

SHAPE = (3, 1, 224, 224)
CHANNELS = ("T1w", "T2w", "FLAIR")
SESSION = 96  # slices
SHARD = 640  # rows, 96 MB


class Spec(bench.Settings):
    rows: int = 10_000


def run(spec: Spec, say: Callable[[str], None]) -> bench.Result:
    """Measure and compare; see `docs/stream.md` for what each case is."""
    raise NotImplementedError


# ---- input ----------------------------------------------------------------------------------------------------------


def _head(size: int, rng: np.random.Generator) -> np.ndarray:
    """A slice [3, 1, size, size] uint8: noise in an ellipse, exact zero around it, as a skull-stripped head."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    inside = (x / 0.68) ** 2 + (y / 0.85) ** 2 < 1
    values = rng.normal(120, 30, (3, 1, size, size)).clip(1, 255)
    return (values * inside).astype(np.uint8)


def shard_set(folder: Path, rows: int, size: int = SHAPE[-1]) -> Artefact:
    """A finished shard set of `rows` generated stacks in sessions of at most 100 slices; made once."""
    made = Artefact(folder / "ingest" / f"bench-{rows}x{size}")
    if made.done:
        return made
    (made.path / "shards").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    head = _head(size, rng)
    sessions = [(f"{start // SESSION:06d}", min(SESSION, rows - start)) for start in range(0, rows, SESSION)]
    entries = []
    per_shard = max(1, SHARD // SESSION)
    for number, start in enumerate(range(0, len(sessions), per_shard)):
        tables, groups = [], []
        for subject, slices in sessions[start : start + per_shard]:
            stacks = np.stack([np.roll(head, int(shift), -1) for shift in rng.integers(0, size, slices)])
            for first in range(0, slices, shard.MAX_ROWS):
                part = stacks[first : first + shard.MAX_ROWS]
                indices = list(range(first, first + len(part)))
                tables.append(
                    shard.encode(
                        part,
                        channels=CHANNELS,
                        cohort="bench",
                        subject=subject,
                        session="",
                        slices=indices,
                        num_slices=slices,
                        present=7,
                    )
                )
                groups.append({"subject": subject, "session": "", "rows": len(part), "first_slice": first})
        path = made.path / "shards" / f"{number:05d}.parquet"
        shard.write(path, tables)
        entries.append(
            {
                "file": f"shards/{path.name}",
                "sha256": store.sha256(path),
                "bytes": path.stat().st_size,
                "rows": sum(group["rows"] for group in groups),
                "row_groups": groups,
            }
        )
    known = {"cohort": "bench", "session": "", "present": 7}
    table = pa.Table.from_pylist([{**known, "subject": name, "num_slices": n} for name, n in sessions])
    pq.write_table(table, made.path / "sessions.parquet")
    store.commit(
        made.path,
        {
            "cohort": "bench",
            "channels": list(CHANNELS),
            "shape": [3, 1, size, size],
            "preprocessing_hash": "0" * 8,
            "shards": entries,
            "counts": {"stacks": rows},
        },
    )
    return made
