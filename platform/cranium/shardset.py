"""A shard set: what its manifest says, how it is committed, and whether its files are still what was committed.

`shards/<16 hex>.parquet` are named by their content and never change. `manifest.json`, committed last, lists them with
their row groups and SHA-256; `sessions.parquet` holds what is known of each session, `quarantine.parquet` every scan
that was rejected. Readers take the list from the manifest, never the folder.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import cranium
from cranium import cohort, store
from cranium.cards import Card
from cranium.config import Ingest, UserError, fingerprint
from cranium.store import Artefact
from cranium.volume import shard

RECIPE = 2  # raise it when the same scans and settings give other bytes
RECORD = {  # columns of sessions.parquet beside those of the card; a string holds JSON where it has structure
    "cohort": pa.string(),
    "subject": pa.string(),
    "session": pa.string(),
    "present": pa.int64(),  # bit i: channel i
    "num_slices": pa.int32(),
    "slice_first": pa.int32(),
    "native_shape": pa.string(),  # of each channel
    "native_affine": pa.string(),  # of each channel: voxel -> RAS mm
    "stack_affine": pa.string(),  # (row, column, slice, 1) -> RAS mm
    "crop": pa.string(),  # the whole grid's shape [Z, H, W] and the run of slices kept
    "transforms": pa.string(),  # of each channel: its world -> the session's (4x4, RAS mm), for the way back
    "mask_quality": pa.string(),  # of each channel: source, ml, border_cm2, dice
    "label_ml": pa.string(),  # of each class of the label map, in the slices kept; null without one
    "sources": pa.string(),  # of each channel: contrast, path, sha256
    "warnings": pa.string(),
    "measures": pa.string(),  # of the pixels, for the quality page (volume/measure.py)
    "fingerprint": pa.binary(),  # that tells the same head in another collection (volume/fingerprint.py)
}
QUARANTINE = ("cohort", "subject", "session", "contrast", "path", "code", "reason")


def publish(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside, flush to disk, rename: the file is there whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ---- committing --------------------------------------------------------------------------------------------------


def commit(
    target: Artefact,
    card: Card,
    spec: Ingest,
    records: list[dict[str, Any]],
    shards: list[dict[str, Any]],
    refused: tuple[cohort.Refused, ...],
    notes: tuple[str, ...],
    overlap_ids: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> None:
    """Write the tables, check that everything adds up, commit the manifest, remove what was in the way."""
    unread = [[card.name, r.subject, r.session, r.contrast, r.path, r.code, r.reason] for r in refused]
    rejected = sorted([row for record in records for row in record["rejected"]] + unread)
    maps = Counter(record["label_map"] for record in records)
    sessions = [record["session"] for record in records if record["row_groups"]]
    scans = sum(record["scans"] for record in records) + len(refused)
    warned = sum(record["warned"] for record in records)
    counts = {
        "scans": scans,
        "accepted": scans - warned - len(rejected),
        "warned": warned,
        "rejected": len(rejected),
        "sessions": len(sessions),
        "subjects": len({session["subject"] for session in sessions}),
        "stacks": sum(entry["rows"] for entry in shards),
    }
    if maps.keys() - {
        None
    }:  # counted apart, so that the scans add up; unused: no scan of the session was accepted
        counts |= {f"label_maps_{outcome}": maps[outcome] for outcome in ("accepted", "rejected", "unused")}
    rejected = sorted(
        rejected + [record["label_map_rejected"] for record in records if record["label_map_rejected"]]
    )
    codes = dict(Counter(row[5] for row in rejected))
    if not sessions:
        raise UserError(
            "NOTHING_LEFT", f"{card.name}: every scan was rejected ({codes}), e.g. {rejected[0][4:]}", 3
        )
    _agree(target, records, shards, counts, sum(bin(s["present"]).count("1") for s in sessions))
    publish(
        target.path / "sessions.parquet", lambda path: pq.write_table(_sessions_table(card, sessions), path)
    )
    columns = {name: pa.array([row[i] for row in rejected], pa.string()) for i, name in enumerate(QUARANTINE)}
    publish(target.path / "quarantine.parquet", lambda path: pq.write_table(pa.table(columns), path))
    listed = {Path(entry["file"]).name for entry in shards}
    for stray in (target.path / "shards").iterdir():  # of an attempt that was killed
        if stray.name not in listed:
            stray.unlink()
    manifest = {
        "stage": "ingest",
        "cohort": card.name,
        "card": card.model_dump(mode="json"),
        "preprocessing": spec.preprocessing.model_dump(mode="json"),
        "preprocessing_hash": fingerprint(spec.preprocessing),
        "channels": list(spec.channels),
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "codec": spec.codec,
        "counts": counts,
        "missing": {c: sum(not s["present"] >> i & 1 for s in sessions) for i, c in enumerate(spec.channels)},
        "shards": shards,
        "rejections": codes,
        "notes": list(notes),
        "overlap_ids": overlap_ids,  # other cohort -> our subject -> theirs, of declared overlaps with a mapping
        "code_version": cranium.__version__,
        "recipe": RECIPE,
        "simulated": card.simulated,
    }
    store.commit(target.path, manifest)
    shutil.rmtree(target.path / "work")


def _agree(
    target: Artefact,
    records: list[dict[str, Any]],
    shards: list[dict[str, Any]],
    counts: dict[str, int],
    channels: int,
) -> None:
    """Rows read back from the shards are the rows that sessions made; every scan has one outcome. Else a bug."""
    made = [rows for record in records for rows in record["row_groups"]]
    stored = [rows for entry in shards for rows in shard.read_footer(target.path / entry["file"]).row_groups]
    if made != stored or counts["stacks"] != sum(made):
        raise RuntimeError(f"{target.id}: sessions made row groups {made}, the shards hold {stored}")
    if counts["accepted"] < 0 or counts["accepted"] + counts["warned"] != channels:
        raise RuntimeError(
            f"{target.id}: the counts do not add up: {counts}, {channels} channels are present"
        )


def _sessions_table(card: Card, sessions: list[dict[str, Any]]) -> pa.Table:
    layout = RECORD | {name: pa.float64() if name in cohort.FLOATS else pa.string() for name in card.columns}
    rows = [row | {"fingerprint": base64.b64decode(row["fingerprint"])} for row in sessions]
    return pa.Table.from_pylist(rows, schema=pa.schema(list(layout.items())))


# ---- trust ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    code: str  # SHARD_MISSING | SHARD_CORRUPT | SHARD_SCHEMA | SHARD_HASH | SHARD_UNKNOWN
    file: str
    message: str


def verify(artefact: Artefact, full: bool = True) -> list[Problem]:
    """Compare the shards with the manifest: presence, size, footer; stray files; with `full` also SHA-256."""
    manifest = artefact.manifest()
    problems = [p for entry in manifest["shards"] if (p := _problem(artefact, manifest, entry, full))]
    listed = {Path(entry["file"]).name for entry in manifest["shards"]}
    folder = artefact.path / "shards"
    strays = (
        sorted(p.name for p in folder.glob("*.parquet") if p.name not in listed) if folder.is_dir() else []
    )
    unknown = [
        Problem("SHARD_UNKNOWN", f"shards/{name}", "is in no manifest, so it is never read")
        for name in strays
    ]
    return problems + unknown


def check(artefact: Artefact) -> None:
    """The cheap check before a step is made: presence, size, footer. Raises `UserError` naming the first problem."""
    if problems := [p for p in verify(artefact, full=False) if p.code != "SHARD_UNKNOWN"]:
        first, more = problems[0], f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        remedy = f"restore it, or remove {artefact.path} and ingest again"
        raise UserError(first.code, f"{artefact.id}/{first.file} {first.message}{more}; {remedy}")


def _problem(
    artefact: Artefact, manifest: dict[str, Any], entry: dict[str, Any], full: bool
) -> Problem | None:
    path = artefact.path / entry["file"]
    try:
        footer = shard.read_footer(path)
    except shard.ShardError as error:
        return Problem(
            error.code, entry["file"], "is missing" if error.code == "SHARD_MISSING" else str(error)
        )
    if path.stat().st_size != entry["bytes"]:
        return Problem(
            "SHARD_CORRUPT", entry["file"], f"has {path.stat().st_size} bytes, not {entry['bytes']}"
        )
    rows = tuple(group["rows"] for group in entry["row_groups"])
    expected = shard.Footer(rows, tuple(manifest["shape"]), tuple(manifest["channels"]), manifest["dtype"])
    if footer != expected:
        return Problem(
            "SHARD_CORRUPT", entry["file"], "has other row groups, shape or channels than the manifest says"
        )
    if full and store.sha256(path) != entry["sha256"]:
        return Problem("SHARD_HASH", entry["file"], "has other bytes than the manifest says")
    return None
