"""Versions of a shard set: one over the shards of an earlier one, and one without a subject.

Shards are named by their content and never change, so versions share them: by a second name on a file system (a hard
link), by a copy inside an object store. What did not change is neither read from its scans nor written again.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cranium import place, shardset, sources, store, trust
from cranium.config import UserError
from cranium.place import Where, at
from cranium.store import Artefact
from cranium.volume import privacy, shard

TOUCHED = "touched.json"  # look of a session's files -> another look of the same content

# ---- over an earlier one --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What of an earlier version holds: `records` by the session's place now, and whole `shards`.

    A record that has `at` (file, row group) lies in a shard that is not kept whole: its rows are to be copied.
    """

    source: str  # the earlier version, "" when there is none
    records: dict[int, dict[str, Any]]
    shards: list[dict[str, Any]]


def keep(
    base: Where, earlier: Iterable[Artefact], pixels: str, sessions: Sequence[sources.Session], limit: int
) -> Kept:
    """Take over what did not change from the version that has most of it, and remember the choice for a resumed ingest.

    `pixels` is a fingerprint of all settings that shape rows; versions of another are no use. Every shard needed is
    linked into `base`, so that the earlier version may go. Shards under half of `limit` bytes are joined with new ones.
    """
    where = at(base, "work", "kept.json")
    with contextlib.suppress(FileNotFoundError):
        return _remembered(where)
    found = [(same, version) for version in earlier if (same := _unchanged(version, pixels, sessions))]
    if found:
        same, version = max(found, key=lambda pair: (len(pair[0]), pair[1].id))
        kept = _split(version, same, len(sessions), limit)
        for file in _needed(kept):
            place.link(at(shard.base(version.path), file), at(base, file))
    else:
        kept = Kept("", {}, [])
    content = {"source": kept.source, "records": kept.records, "shards": kept.shards}
    try:
        place.write(where, json.dumps(content), create=True)
    except FileExistsError:  # another writer, far away, was quicker: its choice holds for both
        return _remembered(where)
    return kept


def _remembered(where: Where) -> Kept:
    known = json.loads(place.read(where))
    return Kept(known["source"], {int(i): r for i, r in known["records"].items()}, known["shards"])


def replaced(version: Artefact, sessions: Sequence[sources.Session]) -> list[str]:
    """The content of those sessions whose files are not those that a version was made of, names and sizes apart.

    What has another time alone is read once for its hash; that it is the same is remembered.
    """
    known, same = shardset.origins(version.path), _touched(version.path)
    doubtful = []
    for wanted in sessions:
        look, content = known.get((wanted.subject, wanted.session), (wanted.look, ""))
        if same.get(look, look) != wanted.look:
            doubtful.append((wanted, look, content))
    if not doubtful:
        return []
    sources.read(wanted for wanted, *_ in doubtful)
    touched = {look: wanted.look for wanted, look, content in doubtful if look and wanted.content == content}
    if touched:
        with contextlib.suppress(OSError):  # a store that cannot be written is looked at again next time
            place.write(version.path / TOUCHED, json.dumps(same | touched))
    return sorted(wanted.content for wanted, _, content in doubtful if wanted.content != content)


def _touched(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / TOUCHED).read_text()))
    except (OSError, ValueError):
        return {}


def _unchanged(
    version: Artefact, pixels: str, sessions: Sequence[sources.Session]
) -> dict[int, dict[str, Any]]:
    """Place now -> record of the sessions that a version has with the same files; none when it cannot be trusted."""
    try:
        if version.manifest().get("pixels") != pixels:
            return {}
        trust.check(version)
    except UserError:
        return {}
    known = {(one.subject, one.session): one for one in shardset.records(version.path)}
    pairs = [(wanted, known.get((wanted.subject, wanted.session))) for wanted in sessions]
    sources.read(wanted for wanted, one in pairs if one and one.look != wanted.look)
    same = {}
    for place_now, (wanted, one) in enumerate(pairs):
        # A copy is one only as long as its original is there, so that is judged anew.
        copy = one is not None and any(row[5] == "DUP_CONTENT" for row in one.record["rejected"])
        if one is not None and wanted.is_made_of(one.look, one.content) and not copy:
            same[place_now] = one.record | {"index": place_now, "content": one.content}
            if one.record["row_groups"]:
                same[place_now]["session"] = one.record["session"] | dict(wanted.values)
    return same


def _split(version: Artefact, same: dict[int, dict[str, Any]], wanted: int, limit: int) -> Kept:
    """Which shards are kept whole, and where the rows of the other sessions are."""
    by_name = {
        (record["session"]["subject"], record["session"]["session"]): index
        for index, record in same.items()
        if record["row_groups"]
    }
    entries = version.manifest()["shards"]
    named = [[(group["subject"], group["session"]) for group in entry["row_groups"]] for entry in entries]
    whole = [all(name in by_name for name in names) for names in named]
    if len(same) < wanted or not all(whole):  # there is something to join small ones with
        whole = [w and entry["bytes"] >= limit / 2 for w, entry in zip(whole, entries, strict=True)]
    records = dict(same)
    for entry, names, stays in zip(entries, named, whole, strict=True):
        for group, name in enumerate(names):
            if name in by_name:
                record = records[by_name[name]]
                here = [*record.get("at", []), [entry["file"], group]]
                records[by_name[name]] = record | ({"kept": True} if stays else {"at": here})
    return Kept(version.id, records, [entry for entry, stays in zip(entries, whole, strict=True) if stays])


def _needed(kept: Kept) -> list[str]:
    files = {entry["file"] for entry in kept.shards}
    return sorted(files | {file for record in kept.records.values() for file, _ in record.get("at", [])})


# ---- without a subject ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewritten:
    """What was taken out."""

    rows: int = 0
    sessions: int = 0
    shards: int = 0  # files that were replaced or removed


def rewrite(artefact: Artefact, drop: Callable[[str, str], bool]) -> Rewritten:
    """Take sessions (`drop(subject, session)`) out of a finished set: only the shards that hold them are rewritten.

    The manifest is replaced, then the old bytes are removed. Another version may hold the same shard under a hard
    link: rewrite every version. Hold the artefact's lock. After a kill, call it again: it goes on.
    """
    base = shard.base(artefact.path)
    # Of an attempt that was killed between its manifest there and the one here.
    shardset.fetch(artefact, base)
    manifest = artefact.manifest()
    done = shardset.records(artefact.path)
    old = [pq.read_table(artefact.path / name) for name in shardset.TABLES]
    known = {(one.subject, one.session) for one in done} | {
        (group["subject"], group["session"]) for entry in manifest["shards"] for group in entry["row_groups"]
    }
    known |= {(row["subject"], row["session"]) for table in old for row in _keys(table)}
    gone = {key for key in known if drop(*key)}
    if not gone:
        shardset.tidy(artefact, base)
        return Rewritten()
    kept = [one for one in done if (one.subject, one.session) not in gone]
    if not any(one.record["row_groups"] for one in kept):
        place.remove([at(base, store.MANIFEST)])
        place.remove_folder(base)
        store.discard(artefact.path)
        return Rewritten(
            manifest["counts"]["stacks"], manifest["counts"]["sessions"], len(manifest["shards"])
        )
    shards = [_without(base, entry, gone, manifest["codec"]) for entry in manifest["shards"]]
    left = [entry for entry in shards if entry["rows"]]
    tables = [
        table.filter(
            pa.array([(row["subject"], row["session"]) not in gone for row in _keys(table)], pa.bool_())
        )
        for table in old
    ]
    quarantine = tables[1].to_pylist()
    people = {subject for subject, _ in gone}
    names = privacy.naming(people)
    read = sum(len(one.record["rejected"]) + (one.record["label_map_rejected"] is not None) for one in kept)
    counts = shardset.counts_of(kept, len(quarantine) - read, left)
    sessions = [one.record["session"] for one in kept if one.record["row_groups"]]
    fresh = manifest | {
        "shards": left,
        "tables": shardset.write_tables(base, tables),
        "counts": counts,
        "missing": shardset.missing(manifest["channels"], sessions),
        "rejections": dict(Counter(row["code"] for row in quarantine)),
        "overlap_ids": {
            other: {ours: theirs for ours, theirs in ids.items() if ours not in people}
            for other, ids in manifest["overlap_ids"].items()
        },
        "notes": [note for note in manifest["notes"] if not names.search(note)],
    }
    store.commit(base, fresh)
    shardset.tidy(artefact, base)
    shardset.fetch(artefact, base)
    trust.remember(artefact.path, trust.seen(base, fresh))
    before = manifest["counts"]
    changed = sum(new is not entry for new, entry in zip(shards, manifest["shards"], strict=True))
    return Rewritten(before["stacks"] - counts["stacks"], before["sessions"] - counts["sessions"], changed)


def _keys(table: pa.Table) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = table.select(["subject", "session"]).to_pylist()
    return rows


def _without(
    base: Where, entry: dict[str, Any], gone: set[tuple[str, str]], codec: shard.Codec
) -> dict[str, Any]:
    """The shard of an entry without these sessions: the entry itself when it holds none of them."""
    keep = [i for i, g in enumerate(entry["row_groups"]) if (g["subject"], g["session"]) not in gone]
    if len(keep) == len(entry["row_groups"]):
        return entry
    if not keep:
        return {"rows": 0}
    source = at(base, entry["file"])
    return shardset.pack(base, [(source, i) for i in keep], [entry["row_groups"][i] for i in keep], codec)


def unfinished(folder: Path, name: str) -> list[Artefact]:
    """Ingests of a cohort in this store that were begun and never finished."""
    found = sorted((folder / "ingest").glob(f"{name}-????????"))
    return [Artefact(path) for path in found if path.is_dir() and not Artefact(path).done]
