"""Small shard sets written directly, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from cranium import store
from cranium.store import Artefact
from cranium.volume import shard

CHANNELS = ("T1w", "T2w", "FLAIR")


def shard_set(
    root: Path,
    cohort: str = "tiny",
    *,
    sessions: int = 12,
    slices: int = 20,
    size: int = 28,
    depth: int = 1,
    seed: int = 0,
    group_rows: int = 64,
    other: Mapping[int, int] | None = None,
) -> Artefact:
    """A finished shard set of random stacks; the first pixel of a row says its session, the second its slice.

    `depth`: slices of each of the three contrasts.
    `other`: number of a session -> the channel that is an other one than without it.
    """
    rng = np.random.default_rng(seed)
    folder = root / "ingest" / f"{cohort}-00000000"
    (folder / "shards").mkdir(parents=True)
    entries, rows = [], []
    for part in np.array_split(np.arange(sessions), 3):
        tables, groups = [], []
        for number in part.tolist():
            pixels = rng.integers(1, 255, (slices, 3, depth, size, size), dtype=np.uint8)
            pixels[..., 0, 0], pixels[..., 0, 1] = number, np.arange(slices)[:, None, None]
            if other and number in other:
                pixels[:, other[number]] ^= 255
            present = 7 if number % 3 else 5
            if present == 5:
                pixels[:, 1] = 0
            subject = f"{number:03d}"
            for first in range(0, slices, group_rows):
                last = min(slices, first + group_rows)
                tables.append(
                    shard.encode(
                        pixels[first:last],
                        channels=CHANNELS,
                        cohort=cohort,
                        subject=subject,
                        session="",
                        slices=list(range(first, last)),
                        num_slices=slices,
                        present=present,
                    )
                )
                groups.append({"subject": subject, "session": "", "rows": last - first, "first_slice": first})
            rows.append(
                {
                    "cohort": cohort,
                    "subject": subject,
                    "session": "",
                    "present": present,
                    "num_slices": slices,
                }
            )
        path = folder / "shards" / f"{len(entries)}.parquet"
        shard.write(path, tables)
        entries.append(
            {
                "file": f"shards/{path.name}",
                "sha256": store.sha256(path),
                "rows": slices * len(part),
                "row_groups": groups,
            }
        )
    pd.DataFrame(rows).to_parquet(folder / "sessions.parquet")
    store.commit(
        folder,
        {
            "cohort": cohort,
            "channels": list(CHANNELS),
            "shape": [3, depth, size, size],
            "preprocessing_hash": "0" * 8,
            "shards": entries,
            "counts": {"stacks": sessions * slices},
        },
    )
    return Artefact(folder)
