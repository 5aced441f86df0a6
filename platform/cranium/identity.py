"""How subjects are named in what a store holds, who was forgotten, and the private folder that both rest on.

`<store>/private/` is the owner's alone (0700, files 0600) and no part of any artefact: `salt` is drawn once, a file of
names per shard set ties its keys to ids and paths, `forgotten.json` lists who must not come back. Outputs hold ids as
the collection gives them (`identifiers: plain`) or keys that only who has the salt can tie to them (`salted`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cranium import sources
from cranium.cohort import CohortTable, Refused, Session
from cranium.config import UserError
from cranium.patterns import tidy
from cranium.volume import privacy

PRIVATE = "private"
FORGOTTEN = "forgotten.json"
# At the end of a note: paths, or ids of people who are not here.
EXAMPLES = re.compile(r"[,;] such as .*", re.DOTALL)


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


# ---- names in outputs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """How the subjects and paths of one cohort are written down. Without a salt: as they are, suspects masked."""

    cohort: str
    salt: bytes | None = None
    forgotten: tuple[str, ...] = ()  # keyed hashes of those of the cohort who are left out

    def subject(self, subject: str) -> str:
        return subject if self.salt is None else subject_key(self.salt, self.cohort, subject)

    def path(self, path: str, subject: str, session: str) -> str:
        """A path as outputs may show it; `subject` as outputs show it."""
        if self.salt is None:
            return privacy.masked(tidy(path, "%"), keep=(subject, session))
        return f"{subject}/{privacy.keyed(self.salt, 'path', self.cohort, path)}"


def subject_key(salt: bytes, cohort: str, subject: str) -> str:
    return privacy.keyed(salt, "subject", cohort, subject)


def admit(
    table: CohortTable, cohort: str, salted: bool, store: Path, artefact: str
) -> tuple[CohortTable, Names]:
    """The table without who was forgotten, subjects under the names that outputs give them, and those names.

    Paths of scans stay what they are, for reading; `cover` takes them out of what is written. With `salted` the file
    `private/names-<artefact>.json` ties keys to ids and paths.
    """
    gone, left_out = forgotten(store), set[str]()
    if gone:
        key = {subject: forgotten_key(store, cohort, subject) for subject in _subjects(table)}
        left_out = {k for k in key.values() if k in gone}
        named = privacy.naming(subject for subject, k in key.items() if k in gone)
        table = dataclasses.replace(
            table,
            sessions=tuple(s for s in table.sessions if key[s.subject] not in gone),
            refused=tuple(r for r in table.refused if key[r.subject] not in gone),
            notes=tuple(note for note in table.notes if not named.search(note)),
            overlap_ids={
                other: _without_forgotten(ids, cohort, other, store, gone)
                for other, ids in table.overlap_ids.items()
            },
        )
    names = Names(cohort, salt(store) if salted else None, tuple(sorted(left_out)))
    table = _renamed(table, names, store, artefact) if salted else _masked(table)
    return dataclasses.replace(table, refused=tuple(_refused(table, names))), names


def _masked(table: CohortTable) -> CohortTable:
    """The table with suspect pieces of the examples in its notes masked."""
    keep = {word for s in table.sessions for word in (s.subject, s.session)}
    notes = (EXAMPLES.sub(lambda m: privacy.masked(m[0], keep), note) for note in table.notes)
    return dataclasses.replace(table, notes=tuple(notes))


def _refused(table: CohortTable, names: Names) -> Iterator[Refused]:
    """What was refused, under the names that outputs give; a reason may name another file or series of its subject."""
    paths: dict[str, set[str]] = defaultdict(set)
    for s in table.sessions:
        paths[s.subject] |= _paths(s)
    for r in table.refused:
        paths[r.subject].add(r.path)
    for r in table.refused:
        shown = {path: names.path(path, r.subject, r.session) for path in paths[r.subject]}
        yield dataclasses.replace(r, path=shown[r.path], reason=_replaced(r.reason, shown))


def _without_forgotten(
    ids: Mapping[str, tuple[str, ...]], cohort: str, other: str, store: Path, gone: Container[str]
) -> dict[str, tuple[str, ...]]:
    """A mapping of ids to another collection's, without who was forgotten on either side."""
    left = {}
    for ours, theirs in ids.items():
        known = tuple(t for t in theirs if forgotten_key(store, other, tidy(t)) not in gone)
        if known and forgotten_key(store, cohort, ours) not in gone:
            left[ours] = known
    return left


def _subjects(table: CohortTable) -> list[str]:
    return sorted({s.subject for s in table.sessions} | {r.subject for r in table.refused})


def _renamed(table: CohortTable, names: Names, store: Path, artefact: str) -> CohortTable:
    """The table with keys for subjects, in their order; ids in notes and values likewise."""
    ids, secret = _subjects(table), salt(store)
    keys = {i: names.subject(i) for i in ids}
    if len(set(keys.values())) != len(ids):
        raise RuntimeError(f"{names.cohort}: two subjects have one key")  # 2^-64 a pair: a bug
    files = [(path, s.subject, s.session) for s in table.sessions for path in _paths(s)]
    files += [(r.path, r.subject, r.session) for r in table.refused]
    shown = {path: names.path(path, keys[subject], session) for path, subject, session in files}
    write_private(private(store) / f"names-{artefact}.json", {"subjects": keys, "paths": shown})
    sessions = [
        dataclasses.replace(
            s,
            subject=keys[s.subject],
            values={k: keys[s.subject] if v == s.subject else v for k, v in s.values.items()},
        )
        for s in table.sessions
    ]
    found = privacy.naming(ids)
    return dataclasses.replace(
        table,
        sessions=tuple(sorted(sessions, key=lambda s: (s.subject, s.session))),
        refused=tuple(dataclasses.replace(r, subject=keys[r.subject]) for r in table.refused),
        notes=tuple(found.sub(lambda m: keys[m[0]], EXAMPLES.sub("", note)) for note in table.notes),
        overlap_ids={
            other: {
                keys[ours]: tuple(subject_key(secret, other, one) for one in theirs)
                for ours, theirs in ids.items()
            }
            for other, ids in table.overlap_ids.items()
        },
    )


def _paths(session: Session) -> set[str]:
    """Every file of a session."""
    scans = session.scans.values()
    return {p for p in (session.segmentation, *(x for s in scans for x in (s.path, s.mask))) if p}


def cover(
    records: Sequence[Mapping[str, Any]], sessions: Sequence[sources.Session], names: Names
) -> list[dict[str, Any]]:
    """What was made of each session, with every path under the name that outputs give it."""
    result = []
    for record, session in zip(records, sessions, strict=True):
        paths = sources.paths(session.wanted)
        shown = {path: names.path(path, session.subject, session.session) for path in paths}
        covered = dict(record) | {k: _covered(record[k], shown) for k in ("rejected", "label_map_rejected")}
        if "session" in record:
            covered["session"] = {name: _column(value, shown) for name, value in record["session"].items()}
        result.append(covered)
    return result


def _column(value: Any, shown: Mapping[str, str]) -> Any:
    """A column of sessions.parquet; a string may hold JSON, in which a path is spelled with escapes."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return json.dumps(_covered(json.loads(value), shown))
    return _covered(value, shown)


def _covered(value: Any, shown: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _replaced(value, shown)
    if isinstance(value, list):
        return [_covered(v, shown) for v in value]
    return {k: _covered(v, shown) for k, v in value.items()} if isinstance(value, dict) else value


def _replaced(text: str, shown: Mapping[str, str]) -> str:
    for path in sorted(shown, key=len, reverse=True):
        text = text.replace(path, shown[path])
    return text


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
