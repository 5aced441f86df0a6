"""DICOM series below a raw folder: which one claims to be which contrast of a session, and why the others do not.

The folders that fit a layout's `series` patterns are looked into (four headers each where those agree, no pixels),
every series in them is told its contrast by `volume.contrast`, in the light of its whole study, and claims are put in
order for the choice among repeats: by pattern, original images before derived ones, 3D before 2D acquisitions, then by
time of acquisition (by series number where a time is missing). The first or the last of the best kind is taken, as
the layout's `repeats` says.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cranium.cards import Layout
from cranium.patterns import Match, matching
from cranium.volume import dicom
from cranium.volume.contrast import Decision, classify
from cranium.volume.folder import read_header
from cranium.volume.headers import Header
from cranium.volume.quality import ASIDE, NOTES, Rejected, named

Progress = Callable[[int, int, str], None]
Key = tuple[str, str, str]  # subject, session, contrast
THREADS = 16  # headers lie scattered: reading them is waiting


@dataclass(frozen=True, order=True)
class Refused:
    """A file or DICOM series that matches the card and is not used; no contrast where none was told."""

    subject: str
    session: str
    contrast: str
    path: str
    code: str
    reason: str


@dataclass(frozen=True)
class Found:
    """`claims`: best first; `reasons`: by the path of a claim, why it is of its contrast; `notes`: what to tell."""

    claims: dict[Key, list[Match]]
    refused: tuple[Refused, ...]
    reasons: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Series:
    header: Header
    path: str  # as `dicom.name` gives it
    pattern: int
    fields: Mapping[str, str]

    @property
    def who(self) -> tuple[str, str]:
        return self.fields["subject"], self.fields.get("session", "")

    @property
    def study(self) -> tuple[str, str]:
        return self.fields["subject"], self.header.study or self.who[1]

    def refusal(self, code: str, reason: str, contrast: str = "") -> Refused:
        return Refused(*self.who, contrast, self.path, code, reason)


def matches(layout: Layout, root: Path, files: Mapping[str, int], progress: Progress | None = None) -> Found:
    """All series of a DICOM layout. `files`: every file below `root` with its size, by its relative path."""
    found: list[_Series] = []
    refused: list[Refused] = []
    folders = _folders(layout, files)
    for folder, read in _read(root.resolve(), list(folders), progress):
        pattern, fields = folders[folder]
        if isinstance(read, Rejected):
            who = fields["subject"], fields.get("session", "")
            refused.append(Refused(*who, "", folder, read.code, read.reason))
            continue
        for header in read:
            path = dicom.name(folder, header.uid, header.echo, alone=len(read) == 1)
            found.append(_Series(header, path, pattern, fields))
    told = _told(layout, found)
    refused += [s.refusal(d.code, d.reason) for s, d in told if d.contrast is None]
    groups: dict[Key, list[_Series]] = defaultdict(list)
    for one, decision in _of_one_day(layout, told, refused):
        groups[*one.who, str(decision.contrast)].append(one)
    claims = {key: _ordered(key[2], group, refused) for key, group in sorted(groups.items())}
    paths = {match.path for group in claims.values() for match in group}
    used = [(one, decision) for one, decision in told if one.path in paths]
    reasons = {one.path: decision.reason for one, decision in used}
    return Found(claims, tuple(sorted(refused)), reasons, (*_aside(refused), *_notes(used)))


def identity(paths: Iterable[str], files: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Path and size of every file that the scans at these paths are made of, in order: of a series, of its folder."""
    wanted = {dicom.split(path)[0] if path not in files else path for path in paths}
    for path in sorted(files):
        if path in wanted or _parent(path) in wanted:
            yield path, files[path]


def sizes(files: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Bytes of every file, and of the files in every folder."""
    found = dict(files)
    folders: Counter[str] = Counter()
    for path, size in found.items():
        folders[_parent(path)] += size
    return {**folders, **found}


def listed(paths: Iterable[str], known: Mapping[str, int]) -> dict[str, int]:
    """By `sizes`, what the scans at these paths hold: of a series, its whole folder."""
    of = {path: path if path in known else dicom.split(path)[0] for path in sorted(paths)}
    return {path: known[place] for path, place in of.items() if place in known}


def changed(root: Path, listed: Mapping[str, int]) -> dict[str, Rejected]:
    """Of scans that held so many bytes when the folder was listed, those that hold others by now, as rejections."""
    found = {}
    for path, size in listed.items():
        with contextlib.suppress(OSError):  # reading it will say so
            if (now := _bytes(root / path)) != size >= 0:
                reason = f"had {size} bytes when the folder was listed, has {now} now; ingest again when it is whole"
                found[path] = Rejected("IO", reason)
    return found


def _bytes(path: Path) -> int:
    if not dicom.is_series(path):
        return path.stat().st_size
    with os.scandir(dicom.split(str(path))[0]) as entries:
        return sum(entry.stat().st_size for entry in entries if not entry.is_dir())


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _folders(layout: Layout, files: Iterable[str]) -> dict[str, tuple[int, dict[str, str]]]:
    """The folders that hold files and fit a pattern (the first that fits), with what their path tells."""
    holding = sorted({_parent(path) for path in files})
    found: dict[str, tuple[int, dict[str, str]]] = {}
    for index, pattern in enumerate(layout.series):
        for folder, fields in matching(pattern, holding):
            subject = layout.subject.format(**fields) if layout.subject else fields["subject"]
            found.setdefault(folder, (index, {**fields, "subject": subject}))
    return dict(sorted(found.items()))


def _read(
    root: Path, folders: list[str], progress: Progress | None
) -> Iterator[tuple[str, tuple[Header, ...] | Rejected]]:
    def look(folder: str) -> tuple[Header, ...] | Rejected:
        try:
            return read_header(root / folder, root)
        except Rejected as reason:
            return reason

    with ThreadPoolExecutor(THREADS) as pool:
        for done, (folder, read) in enumerate(zip(folders, pool.map(look, folders), strict=True), 1):
            yield folder, read
            if progress:
                progress(done, len(folders), "folders of DICOM headers read")


def _told(layout: Layout, found: list[_Series]) -> list[tuple[_Series, Decision]]:
    """Every series with its contrast or why it has none, judged among all series of its study."""
    studies: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for one in found:
        studies[one.study].append(one.header)
    descriptions = {str(contrast): patterns for contrast, patterns in layout.descriptions.items()}
    return [(one, classify(one.header, descriptions, studies[one.study])) for one in found]


def _of_one_day(
    layout: Layout, told: list[tuple[_Series, Decision]], refused: list[Refused]
) -> Iterator[tuple[_Series, Decision]]:
    """Scans of the day of their session. Where the pattern has no session a subject's days would be mixed in one."""
    days: dict[tuple[str, str], set[str]] = defaultdict(set)
    usable = [(one, decision) for one, decision in told if decision.contrast is not None]
    for one, _ in usable:
        days[one.who].add(one.header.date)
    for one, decision in usable:
        known = sorted(days[one.who] - {""})
        taken = known[:1] if layout.repeats == "first" else known[-1:]
        if one.header.date and [one.header.date] != taken:
            reason = f"its session has scans of {len(known)} days, the {layout.repeats} was taken; "
            hint = "give the pattern a {session}"
            refused.append(one.refusal("SESSION_MIXED", reason + hint, str(decision.contrast)))
        else:
            yield one, decision


def _ordered(contrast: str, group: list[_Series], refused: list[Refused]) -> list[Match]:
    timed = all(one.header.when for one in group)

    def by_time(one: _Series) -> tuple[str, int, float, str]:
        header = one.header
        return header.when if timed else "", header.number, header.echo or 0.0, one.path

    def kind(one: _Series) -> int:
        derived, flat = one.header.image_type[:1] == ("DERIVED",), one.header.dimension != "3D"
        return 4 * one.pattern + 2 * derived + flat

    claims: list[Match] = []
    seen: dict[tuple[str, float | None], str] = {}
    for one in sorted(group, key=lambda one: (kind(one), by_time(one))):
        earlier = seen.setdefault((one.header.uid, one.header.echo), one.path)
        if earlier != one.path:
            refused.append(
                one.refusal("DUP_ID", f"the same series lies in {named(earlier)}, which was taken", contrast)
            )
            continue
        rank = len(claims) + 1
        claims.append(
            Match((kind(one), (rank, str(rank)), one.path), {**one.fields, "run": str(rank)}, one.path)
        )
    return claims


def _aside(refused: list[Refused]) -> Iterator[str]:
    counts = Counter(refusal.code for refusal in refused if refusal.code in ASIDE)
    if counts:
        told = ", ".join(f"{number} {code}" for code, number in sorted(counts.items()))
        yield f"{counts.total()} DICOM series are of another kind than a cohort's scans: {told}"


def _notes(used: list[tuple[_Series, Decision]]) -> Iterator[str]:
    noted: dict[str, list[str]] = defaultdict(list)
    for one, decision in used:
        for note in decision.notes:
            noted[note.code].append(one.path)
    for code, paths in sorted(noted.items()):
        yield f"{code}, {len(paths)} DICOM series: {NOTES[code]}; such as {paths[0]}"
