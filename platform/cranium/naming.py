"""What outputs call subjects, sessions and paths: their names, or keys that only who has the salt can tie to them.

`identifiers: plain` keeps ids as the collection gives them, with suspect pieces of paths masked; `salted` writes keys.
Notes and reasons have their names in angle brackets (`quality.named`), so they are replaced whole and nothing else is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cranium import identity, sources
from cranium.cohort import CohortTable, Refused, Session
from cranium.patterns import tidy
from cranium.volume import privacy, quality

WHO = ("subject", "session")
# A day of a session under keys has five digits, so that names sort as days do: from 1900 to 2072, and an origin within
# a hundred years.
FIRST_DAY, MAX_DAYS, MAX_ORIGIN = datetime.date(1900, 1, 1).toordinal(), 63_000, 36_525
# At the end of a note: paths, or ids of people who are not here.
EXAMPLES = re.compile(r"[,;] such as .*", re.DOTALL)


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


def shown(table: CohortTable, names: Names) -> dict[tuple[str, str], tuple[str, str]]:
    """Subject and session -> what outputs call them.

    Under keys a session keeps its name, unless that tells a date or may identify somebody. One that the card dates
    becomes a day on a scale of the subject's own, whose origin only who has the salt can find: order and intervals
    stay. Any other becomes a key.
    """
    found = {(s.subject, s.session) for s in table.sessions} | {(r.subject, r.session) for r in table.refused}
    if names.salt is None:
        return {who: who for who in found}
    taken: set[tuple[str, str]] = set()
    result = {}
    for subject, session in sorted(found):
        name, key = session, privacy.keyed(names.salt, "session", names.cohort, subject, session)
        if date := _date(session, table.layout.when):
            day = _day(date)
            origin = int(privacy.keyed(names.salt, "day", names.cohort, subject), 16) % MAX_ORIGIN
            name = key if day is None else f"d{day + origin:05}"
            name += f"-{key}" if (subject, name) in taken else ""  # a second one on that day
        elif privacy.kinds(session):
            name = key
        taken.add((subject, name))
        result[subject, session] = (names.subject(subject), name)
    return result


def _date(session: str, when: str | None) -> str | None:
    """The date in the name of a session, by the card's expression."""
    found = re.search(when, session) if when else None
    return found.groupdict().get("date") if found else None


def _day(date: str) -> int | None:
    """Days since 1900, or None for digits that are no date of an MRI."""
    with contextlib.suppress(ValueError):
        day = datetime.date.fromisoformat(date).toordinal() - FIRST_DAY
        return day if 0 <= day < MAX_DAYS else None
    return None


def admit(
    table: CohortTable, cohort: str, salted: bool, store: Path, artefact: str
) -> tuple[CohortTable, Names]:
    """The table without who was forgotten, subjects under the names that outputs give them, and those names.

    Paths of scans stay what they are, for reading; `cover` takes them out of what is written. With `salted` the file
    `private/names-<artefact>.json` ties keys to ids and paths.
    """
    gone, left_out = identity.forgotten(store), set[str]()
    if gone:
        key = {subject: identity.forgotten_key(store, cohort, subject) for subject in _subjects(table)}
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
    names = Names(cohort, identity.salt(store) if salted else None, tuple(sorted(left_out)))
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
        known = {path: names.path(path, r.subject, r.session) for path in paths[r.subject]}
        yield dataclasses.replace(r, path=known[r.path], reason=_told(r.reason, known, names))


def _without_forgotten(
    ids: Mapping[str, tuple[str, ...]], cohort: str, other: str, store: Path, gone: Container[str]
) -> dict[str, tuple[str, ...]]:
    """A mapping of ids to another collection's, without who was forgotten on either side."""
    left = {}
    for ours, theirs in ids.items():
        known = tuple(t for t in theirs if identity.forgotten_key(store, other, tidy(t)) not in gone)
        if known and identity.forgotten_key(store, cohort, ours) not in gone:
            left[ours] = known
    return left


def _subjects(table: CohortTable) -> list[str]:
    return sorted({s.subject for s in table.sessions} | {r.subject for r in table.refused})


def _renamed(table: CohortTable, names: Names, store: Path, artefact: str) -> CohortTable:
    """The table with keys for subjects, in their order; ids in notes and values likewise."""
    ids, secret = _subjects(table), identity.salt(store)
    keys = {i: names.subject(i) for i in ids}
    if len(set(keys.values())) != len(ids):
        raise RuntimeError(f"{names.cohort}: two subjects have one key")  # 2^-64 a pair: a bug
    who = shown(table, names)
    files = [(path, s.subject, s.session) for s in table.sessions for path in _paths(s)]
    files += [(r.path, r.subject, r.session) for r in table.refused]
    paths = {path: names.path(path, keys[subject], session) for path, subject, session in files}
    days: dict[str, dict[str, str]] = {key: {} for key in keys.values()}
    for (_, session), (key, name) in who.items():
        days[key][name] = session
    tied = {"subjects": keys, "sessions": days, "paths": paths}
    identity.write_private(identity.private(store) / f"names-{artefact}.json", tied)
    sessions = []
    for s in table.sessions:
        key, name = who[s.subject, s.session]
        covered = {s.subject: key, **({s.session: name} if s.session else {})}
        values = {column: covered.get(v, v) if isinstance(v, str) else v for column, v in s.values.items()}
        sessions.append(dataclasses.replace(s, subject=key, session=name, values=values))
    refused = (
        dataclasses.replace(r, **dict(zip(WHO, who[r.subject, r.session], strict=True)))
        for r in table.refused
    )
    known = keys | {" ".join(them).rstrip(): " ".join(they).rstrip() for them, they in who.items()}
    return dataclasses.replace(
        table,
        sessions=tuple(sorted(sessions, key=lambda s: (s.subject, s.session))),
        refused=tuple(refused),
        notes=tuple(_told(EXAMPLES.sub("", note), known, names) for note in table.notes),
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
        shown = {p: names.path(p, session.subject, session.session) for p in sources.paths(session.wanted)}
        covered = dict(record) | {"rejected": [_row(row, shown, names) for row in record["rejected"]]}
        if row := record["label_map_rejected"]:
            covered["label_map_rejected"] = _row(row, shown, names)
        if of := record.get("session"):
            origins = json.loads(of["sources"])
            for origin in origins.values():
                origin["path"] = shown.get(origin["path"], origin["path"])
            warnings = json.loads(of["warnings"])
            for warning in warnings:
                warning["reason"] = _told(warning["reason"], shown, names)
            told = {"sources": json.dumps(origins), "warnings": json.dumps(warnings)}
            covered["session"] = dict(of) | told
        result.append(covered)
    return result


def _row(row: Sequence[str], shown: Mapping[str, str], names: Names) -> list[str]:
    """A row of the quarantine: cohort, subject, session, contrast, path, code, reason."""
    return [*row[:4], shown.get(row[4], row[4]), row[5], _told(row[6], shown, names)]


def _told(text: str, shown: Mapping[str, str], names: Names) -> str:
    """A note or a reason with every name in it as outputs show it; under keys, one that has no key is left out."""
    known = {quality.named(name): quality.named(to) for name, to in shown.items()}
    known |= {to: to for to in known.values()}  # taken over from an earlier version
    return quality.NAMED.sub(lambda m: known.get(m[0], "<...>" if names.salt else m[0]), text)
