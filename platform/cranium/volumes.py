"""Brain, tissue and ventricle volumes of every session of a shard set, once: a row of the table that has no backbone.

In: a finished shard set with T1w. Out: `<store>/embed/volumes_<cohort>-<hex>/volumes.parquet`, a row per session, ml;
null where a session has no T1w or too little of it. How they are measured: `volume/tissue.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cranium import sessions, store
from cranium.config import Experiment, Machine, UserError
from cranium.store import Artefact
from cranium.volume import tissue

RECIPE = 1
VOLUMES = "volumes.parquet"
MEASURES = tissue.Volumes._fields

Progress = Callable[[int, int, str], None]


def artefact(machine: Machine, shard_set: Artefact) -> Artefact:
    """Where the volumes of this shard set lie."""
    manifest = shard_set.manifest()
    key = {"recipe": RECIPE, "shards": [entry["sha256"] for entry in manifest["shards"]]}
    return store.artefact(machine.store, "embed", f"volumes_{manifest['cohort']}", key)


def measure(
    exp: Experiment, machine: Machine, shard_set: Artefact, progress: Progress | None = None
) -> Artefact:
    """Volumes of every session of `shard_set`; returns at once when they are there."""
    import ray

    made = artefact(machine, shard_set)
    if made.done:
        return made
    started, manifest = time.monotonic(), shard_set.manifest()
    if "T1w" not in manifest["channels"]:
        raise UserError("NO_T1W", f"tissue is told apart on T1w, {shard_set.id} holds {manifest['channels']}")
    spec, compute = manifest["preprocessing"], exp.embed.compute
    along = float(spec["slice_spacing_mm"]) * int(spec["slices"]["every"])
    table = pd.read_parquet(shard_set.path / "sessions.parquet", columns=["subject", "session"])
    rows_of = np.array_split(np.arange(len(table)), max(1, min(len(table), 4 * compute.num_workers)))
    parts = [table.iloc[some] for some in rows_of]
    task = ray.remote(num_cpus=compute.cpus_per_worker)(measured)
    arguments = (shard_set.path, manifest["channels"].index("T1w"), (along, *2 * [float(spec["spacing_mm"])]))
    waiting = [task.remote(part, *arguments) for part in parts]
    rows: list[pd.DataFrame] = []
    with store.lock(machine.store, made.id):
        made.path.mkdir(parents=True, exist_ok=True)
        for result in waiting:
            rows.append(ray.get(result))
            if progress:
                progress(sum(map(len, rows)), len(table), manifest["cohort"])
        pq.write_table(pa.Table.from_pandas(pd.concat(rows), preserve_index=False), made.path / VOLUMES)
        store.commit(
            made.path,
            {
                "stage": "embed",
                "init": "volumes",
                "cohort": manifest["cohort"],
                "shard_set": shard_set.id,
                "rows": len(table),
                "seconds": round(time.monotonic() - started, 3),
            },
        )
    return made


def measured(table: pd.DataFrame, shard_set: Path, channel: int, spacing: tuple[float, ...]) -> pd.DataFrame:
    """`table` (subject, session) with a column of each measure."""
    keys = list(zip(table["subject"], table["session"], strict=True))
    found: list[tuple[Any, ...]] = []
    for stacks in sessions.read(shard_set, keys):
        image = stacks[:, channel, stacks.shape[2] // 2].numpy()
        found.append(tissue.volumes(image, spacing) or (None,) * len(MEASURES))
    return table.reset_index(drop=True).join(pd.DataFrame(found, columns=MEASURES, dtype=float))


def read(folder: Path, table: pd.DataFrame) -> np.ndarray:
    """Float64 [n, measures] of the sessions in `table`, in its order; NaN where there is none."""
    kept = pd.read_parquet(folder / VOLUMES).set_index(["subject", "session"])
    keys = pd.MultiIndex.from_arrays([table["subject"], table["session"]])
    values: np.ndarray = kept.reindex(keys)[list(MEASURES)].to_numpy(np.float64)
    return values
