"""Whether the files of a shard set are still what was committed: a full check, and a cheap one before each use."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cranium import place, store
from cranium.config import UserError
from cranium.place import Where, at
from cranium.store import Artefact
from cranium.volume import shard

NAMES = re.compile(r"shards/[0-9a-f]{16}\.parquet|[a-z]+\.parquet")  # what a manifest may name
VERIFIED = "verified.json"  # what shards looked like when their content was last compared with the manifest
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Problem:
    code: (
        str  # SHARD_MISSING | _CORRUPT | _SCHEMA | _HASH | _UNKNOWN | _IO | _ROWS, TABLE_MISSING | TABLE_HASH
    )
    file: str
    message: str
    mend: str


def verify(artefact: Artefact, progress: Progress | None = None) -> list[Problem]:
    """Read everything again: SHA-256 of every shard and table, footers, row counts; shards that no manifest lists.

    `progress(MB read, MB in all, file)`. Raises `UserError` for a manifest that cannot be read.
    """
    manifest, base = _manifest(artefact), shard.base(artefact.path)
    found, total, read = place.names(at(base, "shards")), sum(e["bytes"] for e in manifest["shards"]), 0
    problems, good = [], {}
    for index, entry in enumerate(manifest["shards"]):

        def tell(count: int, name: str = entry["file"]) -> None:
            nonlocal read
            read += count
            if progress:
                progress(read >> 20, max(1, total >> 20), name)

        problem = _problem(base, manifest, index, found, tell)
        problems += [problem] if problem else []
        if not problem:
            good[entry["file"]] = _look(found, entry)
    listed = {entry["file"].split("/")[1] for entry in manifest["shards"]}
    problems += _bad_tables(artefact.path, base, manifest) + _bad_counts(manifest)
    for name in sorted(name for name in found if name.endswith(".parquet") and name not in listed):
        message, mend = "is in no manifest, so it is never read", "remove it if nobody misses it"
        problems.append(Problem("SHARD_UNKNOWN", f"shards/{name}", message, mend))
    remember(artefact.path, good)
    return problems


def check(artefact: Artefact) -> None:
    """The cheap check before a step is made. Raises `UserError` naming the first problem.

    Every shard and table is there with its size and footer. One that has another time stamp (or ETag) than when its
    content was last compared with the manifest is compared again, on a file system; the rows' CRC sees the rest.
    """
    manifest, base = _manifest(artefact), shard.base(artefact.path)
    found, before = place.names(at(base, "shards")), remembered(artefact.path)
    problems = _bad_tables(artefact.path, artefact.path, manifest)
    for index, entry in enumerate(manifest["shards"]):
        look = _look(found, entry)
        if look is not None and before.get(entry["file"]) == look and look[0] == entry["bytes"]:
            continue
        content = None if place.is_remote(base) else _no_progress
        if problem := _problem(base, manifest, index, found, content):
            problems.append(problem)
    if problems:
        first, more = problems[0], f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(first.code, f"{artefact.id}/{first.file} {first.message}{more}; {first.mend}", 1)
    if (now := seen(base, manifest, found)) != before:
        remember(artefact.path, now)


def _manifest(artefact: Artefact) -> dict[str, Any]:
    """Its manifest. Raises `UserError(PATH_ESCAPE)` when that names what is no shard or table of the set."""
    manifest = artefact.manifest()
    for name in [*(entry["file"] for entry in manifest["shards"]), *manifest.get("tables", {})]:
        if not NAMES.fullmatch(name):
            raise UserError(
                "PATH_ESCAPE",
                f"{artefact.path / store.MANIFEST} names {name!r}, which no shard set holds; "
                f"it was not written by Cranium: remove {artefact.path} and ingest again",
                1,
            )
    return manifest


def _no_progress(count: int) -> None: ...


def _problem(
    base: Where,
    manifest: dict[str, Any],
    index: int,
    found: dict[str, tuple[int, str]],
    content: Callable[[int], None] | None,
) -> Problem | None:
    """What is wrong with a shard; its bytes are hashed when `content` wants to hear of them."""
    entry, of = manifest["shards"][index], f"(shard {index + 1} of {len(manifest['shards'])})"
    where = at(base, entry["file"])

    def problem(code: str, message: str) -> Problem:
        return Problem(
            code, entry["file"], f"{of} {message}", f"restore {where}, or remove {base} and ingest again"
        )

    look = _look(found, entry)
    if look is None:
        return problem("SHARD_MISSING", "is missing")
    if look[0] != entry["bytes"]:
        return problem("SHARD_CORRUPT", f"has {look[0]} bytes, not {entry['bytes']}")
    try:
        footer = shard.read_footer(where)
    except shard.ShardError as error:
        return problem(error.code, f"cannot be read: {error}")
    rows = tuple(group["rows"] for group in entry["row_groups"])
    if footer != shard.Footer(rows, tuple(manifest["shape"]), tuple(manifest["channels"]), manifest["dtype"]):
        return problem("SHARD_CORRUPT", "has other row groups, shape or channels than the manifest says")
    if content and place.sha256(where, content) != entry["sha256"]:
        return problem("SHARD_HASH", "has other bytes than the manifest says")
    return None


def _bad_tables(folder: Path, base: Where, manifest: dict[str, Any]) -> list[Problem]:
    """Of the tables in the store, and of those beside the shards where that is another place."""
    problems = []
    for where in dict.fromkeys((str(folder), str(base))):
        for name, digest in manifest.get("tables", {}).items():
            mend = f"restore {at(where, name)}, or remove {base} and ingest again"
            try:
                if place.sha256(at(where, name)) != digest:
                    message = "has other bytes than the manifest says"
                    problems.append(Problem("TABLE_HASH", name, message, mend))
            except FileNotFoundError:
                problems.append(Problem("TABLE_MISSING", name, "is missing", mend))
    return problems


def _bad_counts(manifest: dict[str, Any]) -> list[Problem]:
    rows = sum(group["rows"] for entry in manifest["shards"] for group in entry["row_groups"])
    if rows == manifest["counts"]["stacks"]:
        return []
    message = f"lists {rows} rows, but counts {manifest['counts']['stacks']}"
    return [
        Problem("SHARD_ROWS", store.MANIFEST, message, "restore it, or remove its folder and ingest again")
    ]


# The stamp: what each shard looked like (bytes, time stamp or ETag) when its content was found right.


def _look(found: dict[str, tuple[int, str]], entry: dict[str, Any]) -> list[Any] | None:
    look = found.get(entry["file"].split("/")[1])
    return list(look) if look else None


def seen(
    base: Where, manifest: dict[str, Any], found: dict[str, tuple[int, str]] | None = None
) -> dict[str, Any]:
    found = place.names(at(base, "shards")) if found is None else found
    return {entry["file"]: _look(found, entry) for entry in manifest["shards"]}


def remembered(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / VERIFIED).read_text()))
    except (OSError, ValueError):
        return {}


def remember(folder: Path, seen: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a store that cannot be written is checked again next time
        place.write(folder / VERIFIED, json.dumps(seen))
