"""A shard set: what its manifest says, how it is committed, and whether its files are still what was committed.

`shards/<16 hex>.parquet` are named by their content and never change. `manifest.json`, committed last, lists them with
their row groups and SHA-256; `sessions.parquet` holds what is known of each session, `quarantine.parquet` every scan
that was rejected, `records.parquet` what the next version may re-use. Readers take the list from the manifest, never
the folder. Where shards lie elsewhere (`s3://...`), the store has copies of manifest and tables, and a file `place`.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import cranium
from cranium import cohort, place, store, trust
from cranium.cards import Card
from cranium.config import Ingest, UserError, fingerprint
from cranium.place import Where, at, publish
from cranium.store import Artefact
from cranium.volume import shard

RECIPE = 6  # raise it when the same scans and settings give other bytes
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
    "acquisition": pa.string(),  # of each channel: scanner, field strength, TR, TE, ..., as far as its sidecar says
    "warnings": pa.string(),
    "measures": pa.string(),  # of the pixels, for the quality page (volume/measure.py)
    "fingerprint": pa.binary(),  # that tells the same head in another collection (volume/fingerprint.py)
}
QUARANTINE = ("cohort", "subject", "session", "contrast", "path", "code", "reason")
LABEL_MAPS = ("accepted", "warned", "rejected", "unused")  # unused: no scan of the session was accepted
TABLES = ("sessions.parquet", "quarantine.parquet", "records.parquet")


@dataclass(frozen=True)
class Done:
    """What became of a session: `look` and `content` say what its files were (`sources.py`), `record` what was made."""

    subject: str
    session: str
    look: str  # "" where a file could not be read: then its look says nothing
    content: str
    record: dict[str, Any]


def files(artefact: Artefact, manifest: dict[str, Any]) -> list[str]:
    """Where each of the manifest's shards lies: a local path, or `s3://...` (which is no path)."""
    base = shard.base(artefact.path)
    return [str(at(base, entry["file"])) for entry in manifest["shards"]]


# ---- committing -----------------------------------------------------------------------------------------------------


def commit(
    target: Artefact,
    base: Where,
    card: Card,
    spec: Ingest,
    done: Sequence[Done],
    shards: list[dict[str, Any]],
    refused: tuple[cohort.Refused, ...],
    notes: tuple[str, ...],
    version: dict[str, Any],
) -> None:
    """Write the tables, check that everything adds up, commit the manifest, remove what was in the way.

    `base` is the folder the shards are in. `version` (what shapes pixels, what was re-used) goes into the manifest.
    """
    unread = [[card.name, r.subject, r.session, r.contrast, r.path, r.code, r.reason] for r in refused]
    rejected = sorted([row for one in done for row in one.record["rejected"]] + unread)
    sessions = [one.record["session"] for one in done if one.record["row_groups"]]
    counts = counts_of(done, len(unread), shards)
    rejected = sorted(rejected + [one.record["label_map_rejected"] for one in done if _map_rejected(one)])
    codes = dict(Counter(row[5] for row in rejected))
    if not sessions:
        raise UserError(
            "NOTHING_LEFT", f"{card.name}: every scan was rejected ({codes}), e.g. {rejected[0][4:]}", 3
        )
    _agree(target, base, done, shards, counts)
    columns = {name: pa.array([row[i] for row in rejected], pa.string()) for i, name in enumerate(QUARANTINE)}
    tables = (_sessions_table(card, sessions), pa.table(columns), _records_table(done))
    manifest = {
        "stage": "ingest",
        "cohort": card.name,
        "card": card.model_dump(mode="json"),
        "preprocessing": spec.preprocessing.model_dump(mode="json"),
        "preprocessing_hash": fingerprint(spec.preprocessing),
        "channels": list(spec.channels),
        "classes": list(card.segmentation),  # of the label maps, from 1; JSON sorts the card's own
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "codec": spec.codec,
        "counts": counts,
        "missing": missing(spec.channels, sessions),
        "shards": shards,
        "tables": write_tables(base, tables),
        "rejections": codes,
        "notes": list(notes),
        "code_version": cranium.__version__,
        "recipe": RECIPE,
        "simulated": card.simulated,
        **version,
    }
    store.commit(base, manifest, create=True)
    fetch(target, base)
    trust.remember(target.path, trust.seen(base, manifest))
    # Last: while `work` is there, the next ingest knows that there is something left to remove.
    tidy(target, base)


def tidy(target: Artefact, base: Where) -> None:
    """Remove what work on a finished set left: parts, and shards that its manifest does not list."""
    listed = {entry["file"].split("/")[1] for entry in store.read_manifest(base)["shards"]}
    strays = [name for name in place.names(at(base, "shards")) if name not in listed]
    place.remove([at(base, "shards", name) for name in strays])
    place.remove([at(base, name) for name in place.names(base) if name.startswith(".")])  # never became whole
    for folder in dict.fromkeys((str(base), str(target.path))):
        place.remove_folder(at(folder, "work"))


def fetch(target: Artefact, base: Where) -> None:
    """Copy manifest and tables of a set that is done at `base` into the store: only pixels are read from there."""
    if str(base) == str(target.path):
        return
    try:
        content = place.read(at(base, store.MANIFEST))
    except FileNotFoundError:
        return
    local = target.path / store.MANIFEST
    if local.is_file() and local.read_bytes() == content:
        return
    store.read_manifest(base)  # of a version that can be read
    for name in TABLES:
        place.write(target.path / name, place.read(at(base, name)))
    place.write(target.path / shard.PLACE, f"{base}\n")
    place.write(local, content)


def counts_of(done: Sequence[Done], refused: int, shards: list[dict[str, Any]]) -> dict[str, int]:
    """Outcomes of all scans; `refused` is the number of files that were turned away before any was read."""
    made = [one for one in done if one.record["row_groups"]]
    rejected = refused + sum(len(one.record["rejected"]) for one in done)
    scans = refused + sum(one.record["scans"] for one in done)
    warned = sum(one.record["warned"] for one in done)
    counts = {
        "scans": scans,
        "accepted": scans - warned - rejected,
        "warned": warned,
        "rejected": rejected,
        "sessions": len(made),
        "subjects": len({one.subject for one in made}),
        "stacks": sum(entry["rows"] for entry in shards),
    }
    # Counted apart, so that scans add up.
    maps = Counter(one.record["label_map"] for one in done)
    if maps.keys() - {None}:
        counts |= {f"label_maps_{outcome}": maps[outcome] for outcome in LABEL_MAPS}
    return counts


def _map_rejected(one: Done) -> bool:
    return one.record["label_map_rejected"] is not None


def missing(channels: Sequence[str], sessions: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {c: sum(not s["present"] >> i & 1 for s in sessions) for i, c in enumerate(channels)}


def _agree(
    target: Artefact, base: Where, done: Sequence[Done], shards: list[dict[str, Any]], counts: dict[str, int]
) -> None:
    """Rows read back from the shards are the rows that sessions made; every scan has one outcome. Else a bug."""
    made = {(one.subject, one.session): one.record["row_groups"] for one in done if one.record["row_groups"]}
    stored: dict[tuple[str, str], list[int]] = {}
    for entry in shards:
        rows = shard.read_footer(at(base, entry["file"])).row_groups
        for group, found in zip(entry["row_groups"], rows, strict=True):
            stored.setdefault((group["subject"], group["session"]), []).append(found)
    if made != stored or counts["stacks"] != sum(map(sum, made.values())):
        raise RuntimeError(f"{target.id}: sessions made row groups {made}, the shards hold {stored}")
    channels = sum(
        bin(one.record["session"]["present"]).count("1") for one in done if one.record["row_groups"]
    )
    if counts["accepted"] < 0 or counts["accepted"] + counts["warned"] != channels:
        raise RuntimeError(
            f"{target.id}: the counts do not add up: {counts}, {channels} channels are present"
        )


def _sessions_table(card: Card, sessions: list[dict[str, Any]]) -> pa.Table:
    layout = RECORD | {name: pa.float64() if name in cohort.FLOATS else pa.string() for name in card.columns}
    rows = [row | {"fingerprint": base64.b64decode(row["fingerprint"])} for row in sessions]
    return pa.Table.from_pylist(rows, schema=pa.schema(list(layout.items())))


def _records_table(done: Sequence[Done]) -> pa.Table:
    rows = [asdict(d) | {"record": json.dumps(d.record)} for d in done]
    return pa.Table.from_pylist(rows, pa.schema([(one.name, pa.string()) for one in fields(Done)]))


def write_tables(base: Where, tables: Iterable[pa.Table]) -> dict[str, str]:
    """Name -> SHA-256."""
    hashes = {}
    for name, table in zip(TABLES, tables, strict=True):

        def write(path: Path, table: pa.Table = table, name: str = name) -> None:
            pq.write_table(table, path)
            hashes[name] = store.sha256(path)

        publish(at(base, name), write)
    return hashes


def records(folder: Path) -> list[Done]:
    """What became of each session of a finished set."""
    rows: list[dict[str, Any]] = pq.read_table(folder / TABLES[2]).to_pylist()
    return [Done(**(row | {"record": json.loads(row["record"])})) for row in rows]


def origins(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """Look and content of the files of each session of a finished set, by subject and session."""
    table = pq.read_table(folder / TABLES[2], columns=["subject", "session", "look", "content"])
    return {(row["subject"], row["session"]): (row["look"], row["content"]) for row in table.to_pylist()}


def pack(
    base: Where, sources: Sequence[tuple[Where, int]], groups: list[dict[str, Any]], codec: shard.Codec
) -> dict[str, Any]:
    """Copy row groups (file, index) into one shard named by its content; its entry for the manifest."""

    def tables() -> Iterator[pa.Table]:
        for where, index in sources:
            table = shard.read_row_group(where, index)
            shard.check_rows(table, f"{where}, row group {index}")
            yield table

    name, digest, size = place.publish_by_content(
        at(base, "shards"), ".parquet", lambda path: shard.write(path, tables(), codec)
    )
    rows = sum(group["rows"] for group in groups)
    return {"file": f"shards/{name}", "sha256": digest, "bytes": size, "rows": rows, "row_groups": groups}
