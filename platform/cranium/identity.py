"""The private folder of a store, who was forgotten, and whether two ids are one person.

`<store>/private/` is the owner's alone (0700, files 0600) and no part of any artefact: `salt` is drawn once, a file of
names per shard set ties its keys to ids and paths (`naming.py`), `forgotten.json` lists who must not come back.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cranium.config import UserError
from cranium.volume import privacy

PRIVATE = "private"
FORGOTTEN = "forgotten.json"

# ---- the private folder ---------------------------------------------------------------------------------------------


def private(store: Path) -> Path:
    """The store's private folder, made if need be. Raises `UserError(PRIVATE)` when others can look into it."""
    folder = store / PRIVATE
    store.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077 or found.st_uid not in (0, os.geteuid()):
        raise UserError(
            "PRIVATE", f"{folder} must be a folder of yours alone; look into it, then chmod 700 {folder}"
        )
    return folder


def salt(store: Path) -> bytes:
    """The store's 32 secret bytes, drawn once: of several processes that draw at once one wins for all."""
    path = private(store) / "salt"
    if not path.exists():
        # Another process may be quicker: then its salt stays.
        with _beside(path, secrets.token_bytes(32)) as beside, contextlib.suppress(FileExistsError):
            os.link(beside, path)
    content = path.read_bytes()
    if len(content) != 32:
        raise UserError(
            "PRIVATE", f"{path} is damaged; restore it: without it no key can be tied to its subject"
        )
    return content


@contextlib.contextmanager
def _beside(path: Path, content: bytes) -> Iterator[Path]:
    """A file of mode 0600 under a name that nobody has (O_EXCL), gone at the end."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def write_private(path: Path, content: Any) -> None:
    """Replace a JSON file of the private folder, whole or not at all."""
    with _beside(path, json.dumps(content, indent=1, sort_keys=True).encode()) as beside:
        os.replace(beside, path)


def forgotten(store: Path) -> dict[str, str]:
    """Keyed hash -> date of everyone who was forgotten."""
    path = store / PRIVATE / FORGOTTEN
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def forgotten_key(store: Path, cohort: str, subject: str) -> str:
    return privacy.keyed(salt(store), "forgotten", cohort, subject)


def remember_forgotten(store: Path, key: str) -> str:
    """Put a key on the list of the forgotten; the date it was first put there."""
    known = forgotten(store)
    date = known.setdefault(key, time.strftime("%Y-%m-%d", time.gmtime()))
    write_private(private(store) / FORGOTTEN, known)
    return date


# ---- two ids, one scan ----------------------------------------------------------------------------------------------


def without_copies(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sessions that hold the bytes of another subject's scan are rejected whole (DUP_CONTENT): one id must be wrong.

    The declared rule: who comes first by name keeps the scan (who is in an earlier version of the set, before that).
    The same bytes twice under one subject are left: they leak nothing.
    """
    owner: dict[str, str] = {}
    kept = {i: dict(record) for i, record in enumerate(records)}
    for i in sorted(kept, key=lambda i: not ({"kept", "at"} & kept[i].keys())):
        record = kept[i]
        if not record["row_groups"]:
            continue
        of = record["session"]
        sources = json.loads(of["sources"])
        copied = [
            s["sha256"] for s in sources.values() if owner.get(s["sha256"], of["subject"]) != of["subject"]
        ]
        if not copied:
            owner |= {s["sha256"]: of["subject"] for s in sources.values()}
            continue
        reason = (
            f"a scan of this session has the bytes of another subject's (sha256 {copied[0][:16]}, see `sources` in "
            "sessions.parquet); find out whose it is and remove the copy"
        )
        who = [of["cohort"], of["subject"], of["session"]]
        rejected = [[*who, s["contrast"], s["path"], "DUP_CONTENT", reason] for s in sources.values()]
        kept[i] = {k: v for k, v in record.items() if k != "session"} | {
            "row_groups": [],
            "warned": 0,
            "rejected": [*record["rejected"], *rejected],
        }
        if record.get("label_map") in ("accepted", "warned"):
            kept[i]["label_map"] = "unused"
    return [kept[i] for i in range(len(records))]
