"""Named artefacts on a (shared) file system: `<store>/<stage>/<name>-<8 hex>/`, the manifest committed last.

A folder without `manifest.json` is work in progress and is never read as a result; with it, it is done and its files
do not change. The hex comes from `config.fingerprint` of what shaped the artefact, so a second run finds the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cranium import place
from cranium.config import UserError, fingerprint

MANIFEST = "manifest.json"
TOMBSTONE = "tombstone.json"  # of an artefact that depended on a subject who was forgotten
SCHEMA_VERSION = 1
IDENTITY = "store-id"  # a file of the store


@dataclass(frozen=True)
class Artefact:
    """One folder of the store. `key` is everything that shaped it; it stands in the manifest under `key`."""

    path: Path

    @property
    def id(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def done(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.path)


def artefact(store: Path, stage: str, name: str, key: Any) -> Artefact:
    """Where the artefact of this key lies (it need not exist yet)."""
    return Artefact(store / stage / f"{name}-{fingerprint(key)[:8]}")


def read_manifest(folder: place.Where) -> dict[str, Any]:
    """The manifest of a finished artefact. Raises `UserError` when absent, unreadable or of another schema."""
    require_not_forgotten(folder)
    path = place.at(folder, MANIFEST)
    try:
        manifest = json.loads(place.read(path))
    except FileNotFoundError:
        raise UserError(
            "NOT_DONE", f"{folder} has no {MANIFEST}: it was never finished; run the stage again"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            "MANIFEST",
            f"{path} is damaged ({error}); restore it, or remove its folder and run the stage again",
        ) from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        mend = "upgrade Cranium to read it" if newer else "remove its folder and run the stage again"
        raise UserError(
            "MANIFEST_VERSION",
            f"{path} has schema version {version}; this Cranium reads {SCHEMA_VERSION}; {mend}",
        )
    return dict(manifest)


def commit(folder: place.Where, manifest: dict[str, Any], create: bool = False) -> None:
    """Make the artefact visible: write its manifest, whole or not at all, after everything else is on disk.

    With `create` the first of two writers wins and the other gets `UserError(BUSY)`.
    """
    content = json.dumps({"schema_version": SCHEMA_VERSION, **manifest}, indent=1, sort_keys=True)
    try:
        place.write(place.at(folder, MANIFEST), content, create)
        place.remove([place.at(folder, TOMBSTONE)])  # this was made anew, without who was forgotten
    except FileExistsError:
        raise UserError(
            "BUSY", f"{folder} was finished by another process meanwhile; run again to use what it made"
        ) from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, flush to disk, rename over: a reader sees the old file or the new one, never a part."""
    place.write(path, content)


def discard(folder: Path) -> None:
    """Remove an artefact, its manifest first, so that nobody reads what is half gone."""
    (folder / MANIFEST).unlink(missing_ok=True)
    place.remove_folder(folder)


def tombstone(folder: Path, content: dict[str, Any]) -> None:
    """Say in an artefact's folder why it must not be read any more: `message` is what its readers are told."""
    write_atomic(folder / TOMBSTONE, json.dumps({"code": "FORGOTTEN", **content}, indent=1, sort_keys=True))


def require_not_forgotten(folder: place.Where) -> None:
    """Raise `UserError(FORGOTTEN)` for an artefact that depended on a subject who was forgotten."""
    path = place.at(folder, TOMBSTONE)
    if not place.is_remote(path) and Path(path).is_file():
        raise UserError("FORGOTTEN", str(json.loads(Path(path).read_text())["message"]))


def require_idle(store: Path, besides: str) -> None:
    """Raise `UserError(BUSY)` when a process of this machine holds any lock of the store but `besides`."""
    for path in sorted((store / "locks").glob("*.lock")):
        if path.stem != besides:
            with lock(store, path.stem):
                pass


@contextlib.contextmanager
def lock(store: Path, name: str) -> Iterator[None]:
    """Hold a named lock of the store for this process. Raises `UserError(BUSY)` when another process holds it.

    The kernel frees it when the process dies, so a killed run never leaves a stale lock.
    """
    path = lock_file(store, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                "BUSY", f"{name} is being made by {holder}; wait for it, or stop it first"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def is_held(store: Path, name: str) -> bool:
    """Whether a process of this file system holds a lock of the store; nothing is written."""
    try:
        with lock_file(store, name).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def lock_file(store: Path, name: str) -> Path:
    """What `lock` locks; written when somebody takes the lock."""
    return store / "locks" / f"{name.replace('/', '-')}.lock"


def identity(store: Path) -> str:
    """What a store is called where several meet, made when it is first asked; a copy of the store keeps it."""
    path = store / IDENTITY
    with contextlib.suppress(FileExistsError):  # by another process, meanwhile
        if not path.is_file():
            place.write(path, uuid.uuid4().hex, create=True)
    return path.read_text()


def find(store: Path, stage: str, name: str = "*") -> list[Artefact]:
    """Every finished artefact of a stage (and a name), in order."""
    found = sorted((store / stage).glob(f"{name}-????????/{MANIFEST}"))
    return [Artefact(path.parent) for path in found]


def sha256(path: Path) -> str:
    return place.sha256(path)
