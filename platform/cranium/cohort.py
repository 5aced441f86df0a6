"""A cohort's card and a folder of files -> a table of sessions: which scans there are, and what is known of them."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from cranium import clinical, series
from cranium.cards import Card, Label, Layout
from cranium.clinical import FLOATS, Known, Value, same
from cranium.config import UserError
from cranium.patterns import Match, belongs, matching
from cranium.series import Refused
from cranium.tables import Folder, translate
from cranium.volume import sidecar
from cranium.volume.quality import named

__all__ = ["FLOATS", "CohortTable", "Refused", "Scan", "Session", "Value", "label_of", "scan"]

Claims = dict[tuple[str, str, str], list[Match]]  # by subject, session, contrast


@dataclass(frozen=True)
class Scan:
    """One file chosen for a contrast. Paths are relative to the raw folder; no `mask` where no such file is."""

    contrast: str
    path: str
    mask: str | None
    note: str | None = None  # what the choice among several runs left out


@dataclass(frozen=True)
class Session:
    subject: str
    session: str  # "" when the cohort has none
    scans: Mapping[str, Scan]  # by contrast
    values: Mapping[str, Value]  # by our column name
    segmentation: str | None = None  # path of its label map


@dataclass(frozen=True)
class CohortTable:
    """Sessions sorted by subject and session, what was refused, and `files`: (path, bytes) of all that is used."""

    root: Path
    layout: Layout  # the one the files lie in
    sessions: tuple[Session, ...]
    refused: tuple[Refused, ...]
    files: tuple[tuple[str, int], ...]
    tables: tuple[Path, ...]  # that labels and demographics were read from
    notes: tuple[str, ...]
    # Other cohort -> ours -> theirs.
    overlap_ids: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    times: Mapping[str, int] = field(default_factory=dict)  # of `files`: when each was changed last, in ns

    @property
    def missing(self) -> dict[str, int]:
        """How many sessions lack each contrast that some session has."""
        seen = Counter(contrast for session in self.sessions for contrast in session.scans)
        return {contrast: len(self.sessions) - n for contrast, n in sorted(seen.items())}


def scan(
    card: Card, raw: Path, tables: Path | None = None, progress: series.Progress | None = None
) -> CohortTable:
    """Match the card's patterns against the files below `raw`, and join its tables, found in `tables` or below `raw`.

    Raises `UserError` when a folder is wrong, nothing matches, or a table is missing or cannot be trusted.
    """
    for folder in (raw, *([tables] if tables else ())):
        if not folder.is_dir():
            key = card.name if folder is raw else f"{card.name}_tables"
            raise UserError(
                "NO_RAW", f"{folder} is no folder; give the one that holds {card.title}: raw.{key}=DIR"
            )
    root = raw.resolve()
    links: list[str] = []
    walked = {path: (size, time) for path, size, time in _walk(root, links)}
    files = {path: size for path, (size, _) in walked.items()}
    unused: Counter[str] = Counter()
    for layout in card.layouts:
        claimed = _claimed(layout, root, files, progress)
        if claimed.claims:
            break
        unused.update(refusal.code for refusal in claimed.refused)
    else:
        raise UserError("NO_SCANS", _nothing_found(card, raw, list(files), links, unused))
    sessions, refused = _sessions(layout, claimed.claims, files)
    refused += claimed.refused
    folders = [Folder(root, list(files))]
    if tables:
        folders.insert(0, Folder(tables.resolve(), [path for path, *_ in _walk(tables.resolve(), [])]))
    known = [_known(card, layout, session, claimed.claims) for session in sessions]
    read, notes = clinical.join(card, layout.name, known, folders)
    sessions = tuple(replace(s, values=k.values) for s, k in zip(sessions, known, strict=True))
    used = _identity(sessions, refused, files)
    alike = _near_collisions(s.subject for s in sessions)
    subjects = sorted({s.subject for s in sessions})
    mapped = {overlap.cohort: translate(overlap, subjects, folders) for overlap in card.overlaps}
    overlap_ids = {other: ids for other, ids in mapped.items() if ids is not None}
    told = (*claimed.notes, *_unused(layout, files, claimed.claims), *_unowned(layout, files, sessions))
    linked = [f"{_links(links)}: bring what they hold below {raw}"] if links else []
    notes = (*alike, *_off(card, sessions), *told, *linked, *notes, *_unmapped(card, mapped))
    times = {path: walked[path][1] for path, _ in used}
    return CohortTable(root, layout, sessions, refused, used, read, notes, overlap_ids, times)


def label_of(label: Label, value: Value) -> str | None:
    """The class of a raw value, or None when absent or of no class. "1", "1.0" and 1.0 are one value."""
    if value is None:
        return None
    return next((name for name, raws in label.classes.items() if any(same(raw, value) for raw in raws)), None)


def _known(card: Card, layout: Layout, session: Session, claims: Claims) -> Known:
    """A session as tables see it: when it was, by its name, and the fields of the path of its first scan."""
    first = next(contrast for contrast in (*card.contrasts, *session.scans) if contrast in session.scans)
    chosen = session.scans[first].path
    of_first = claims[session.subject, session.session, first]
    known = Known(session.subject, session.session, next(c.fields for c in of_first if c.path == chosen))
    if layout.when and (when := re.search(layout.when, session.session)):
        parts = when.groupdict()
        if parts.get("day"):
            known.day = int(parts["day"])
        elif parts.get("date"):
            with contextlib.suppress(ValueError):  # digits that are no date: the session has none
                known.day, known.dated = datetime.date.fromisoformat(parts["date"]).toordinal(), True
    return known


def _unused(layout: Layout, files: Mapping[str, int], claims: Claims) -> Iterator[str]:
    """NIfTI files that no pattern takes for anything: mostly as it should be, but never unseen."""
    beside = [*([layout.mask] if layout.mask else []), *layout.segmentation]
    known = {claim.path for every in claims.values() for claim in every}
    known |= {path for pattern in beside for path, _ in matching(pattern, files)}
    left = [path for path in files if path.endswith((".nii", ".nii.gz")) and path not in known]
    left = [path for path in left if not path.rpartition("/")[2].startswith(".")]
    if left:
        yield f"{len(left)} NIfTI files fit no pattern of the card, such as {', '.join(left[:3])}"


def _unowned(layout: Layout, files: Mapping[str, int], sessions: tuple[Session, ...]) -> Iterator[str]:
    """Label maps of subjects none of whose maps is taken: a typing error in a name would lose them unseen."""
    taken = {session.segmentation for session in sessions}
    found = [(fields["subject"], path) for p in layout.segmentation for path, fields in matching(p, files)]
    served = {subject for subject, path in found if path in taken}
    left = {path for subject, path in found if subject not in served}
    if left:
        yield f"{len(left)} label maps belong to no scan that is taken, such as {', '.join(sorted(left)[:3])}"


def _unmapped(card: Card, mapped: Mapping[str, object]) -> Iterator[str]:
    """Overlaps whose mapping could not be walked, for want of a table."""
    for overlap in card.overlaps:
        if overlap.mapping and mapped[overlap.cohort] is None:
            names = " and ".join(step.file[0] for step in overlap.mapping)
            yield f"who is also in {overlap.cohort} is not known without {names}; put them beside the tables"


def _off(card: Card, sessions: tuple[Session, ...]) -> Iterator[str]:
    """How the counts differ from those of the published collection."""
    if card.expected is None:
        return
    found = {
        "subjects": len({s.subject for s in sessions}),
        "sessions": len(sessions),
        "scans": sum(len(s.scans) for s in sessions),
    }
    for what, number in found.items():
        if (expected := getattr(card.expected, what)) not in (None, number):
            yield f"{number} {what} found, {expected} are in the published collection ({card.expected.source})"


# ---- files ----------------------------------------------------------------------------------------------------------


def _walk(root: Path, links: list[str]) -> Iterator[tuple[str, int, int]]:
    """Path, size and time (ns) of every file, in a fixed order.

    Hidden folders are not entered, nor are those that are links, which are added to `links`.
    """
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        paths = (os.path.join(folder, name) for name in folders)
        links += [Path(path).relative_to(root).as_posix() for path in paths if os.path.islink(path)]
        for name in sorted(names):
            path = os.path.join(folder, name)
            try:
                found = os.stat(path)
                size, time = found.st_size, found.st_mtime_ns
            except OSError:
                size, time = -1, 0  # a broken link; reading it will say so
            yield Path(path).relative_to(root).as_posix(), size, time


@dataclass(frozen=True)
class _Claimed:
    """What the files of a layout claim to be: by subject, session, contrast, the best first; and what is to be told."""

    claims: Claims
    refused: tuple[Refused, ...] = ()
    notes: tuple[str, ...] = ()


def _claimed(
    layout: Layout, root: Path, files: Mapping[str, int], progress: series.Progress | None
) -> _Claimed:
    if layout.format == "dicom":
        told = series.matches(layout, root, files, progress)
        return _Claimed(told.claims, told.refused, told.notes)
    found: Claims = defaultdict(list)
    owner: dict[str, str] = {}
    for contrast, patterns in layout.files.items():
        for order, pattern in enumerate(patterns):
            for path, fields in matching(pattern, files):
                # By a better pattern of the same contrast; of another one it would be two scans.
                if path in owner:
                    if owner[path] != contrast:
                        both = f"patterns of {owner[path]} and of {contrast}"
                        raise UserError("PATTERN", f"{path} fits {both}; correct `layouts` in the card")
                    continue
                owner[path] = contrast
                run = fields.get("run", "")
                subject = layout.subject.format(**fields) if layout.subject else fields["subject"]
                key = (subject, fields.get("session", ""), str(contrast))
                number = (int(run) if run.isdigit() else 0, run)
                found[key].append(Match((order, number, path), fields, path))
    return _Claimed({key: sorted(claims, key=lambda m: m.order) for key, claims in sorted(found.items())})


def _links(links: list[str]) -> str:
    return f"{len(links)} folders that are links are not followed, such as {', '.join(links[:3])}"


def _nothing_found(
    card: Card, raw: Path, paths: list[str], links: list[str], unused: Mapping[str, int]
) -> str:
    if unused:
        codes = ", ".join(f"{number} {code}" for code, number in sorted(unused.items()))
        return f"no DICOM series below {raw} can be used as a scan of {card.name}: {codes}; see docs/dicom.md"
    layout = card.layouts[0]
    contrast, patterns = [*layout.files.items(), ("series", layout.series)][0]
    scans = [p for p in paths if p.endswith((".nii", ".nii.gz"))] or paths
    instead = f"it holds {len(paths)} files, such as {', '.join(scans[:3])}" if paths else "it is empty"
    if links:
        instead = f"{_links(links)}, and {instead if paths else 'nothing else is there'}"
    return (
        f"no file below {raw} matches the layout of {card.name} ({contrast}: {' or '.join(patterns)}); {instead}. "
        "Give the folder that these paths start from, or correct `layouts` in the card"
    )


def _sessions(
    layout: Layout, claims: Claims, files: Mapping[str, int]
) -> tuple[tuple[Session, ...], tuple[Refused, ...]]:
    """Sessions without values yet; of several claims to one contrast one is taken, what else there was is told."""
    beside = [_Beside(pattern, files) for pattern in ([layout.mask] if layout.mask else [])]
    maps = [_Beside(pattern, files) for pattern in layout.segmentation]
    scans: dict[tuple[str, str], dict[str, Scan]] = defaultdict(dict)
    label_maps: dict[tuple[str, str], str] = {}
    refused: list[Refused] = []
    for (subject, session, contrast), every in claims.items():
        chosen, repeats = _chosen(layout, every)
        for other in every:
            if other.path not in {chosen.path, *(m.path for m in repeats)}:
                reason = f"{named(chosen.path)} is the {contrast} of the same subject, session and run, and was taken"
                refused.append(Refused(subject, session, contrast, other.path, "DUP_ID", reason))
        note = _choice(layout, chosen, 1 + len(repeats)) if repeats else None
        mask = next(filter(None, (b.file_of(chosen.fields, contrast) for b in beside)), None)
        scans[subject, session][contrast] = Scan(contrast, chosen.path, mask, note)
        label_map = next(filter(None, (b.file_of(chosen.fields, contrast) for b in maps)), None)
        if label_map:
            label_maps.setdefault((subject, session), label_map)
    keys = sorted(scans)
    return tuple(Session(*key, scans[key], {}, label_maps.get(key)) for key in keys), tuple(refused)


def _chosen(layout: Layout, every: list[Match]) -> tuple[Match, list[Match]]:
    """The claim that is taken, and its repeats. The best pattern goes first, then `layout.repeats`."""
    best = [claim for claim in every if claim.order[0] == every[0].order[0]]
    chosen = best[0] if layout.repeats == "first" else best[-1]
    return chosen, [m for m in every if dict(m.fields) != dict(chosen.fields)]


def _choice(layout: Layout, chosen: Match, number: int) -> str:
    which = ("lowest", "first") if layout.repeats == "first" else ("highest", "last")
    if layout.format == "dicom":
        return f"{named(chosen.path)} taken of {number} series: the {which[1]} of the best kind"
    if (run := chosen.fields.get("run", "")).isdigit():
        return f"run {run} taken of {number}: the {which[0]}"
    return f"{named(chosen.path)} taken of {number}: the {which[1]} by run and name"


class _Beside:
    """Files of one pattern that belong to scans: brain masks, label maps."""

    def __init__(self, pattern: str, files: Iterable[str]) -> None:
        self.pattern = pattern
        self.by_subject: dict[str, list[tuple[str, dict[str, str]]]] = defaultdict(list)
        for path, fields in matching(pattern, files):
            self.by_subject[fields["subject"]].append((path, fields))

    def file_of(self, scan: Mapping[str, str], contrast: str) -> str | None:
        fits = [
            (-belongs(fields, {**scan, "contrast": contrast}, self.pattern), path)
            for path, fields in self.by_subject.get(scan["subject"], ())
        ]
        return min((fit for fit in fits if fit[0]), default=(0, None))[1]


def _identity(
    sessions: tuple[Session, ...], refused: tuple[Refused, ...], files: Mapping[str, int]
) -> tuple[tuple[str, int], ...]:
    """What the result depends on: every file that is read, with its size."""
    used = {r.path for r in refused}
    for session in sessions:
        used |= {session.segmentation} - {None}  # type: ignore[arg-type]
        for found in session.scans.values():
            used |= {found.path, found.mask} - {None}  # type: ignore[arg-type]
    used |= {beside for path in used if (beside := str(sidecar.beside(PurePosixPath(path)))) in files}
    return tuple(series.identity(used, files))


def _near_collisions(subjects: Iterator[str]) -> Iterator[str]:
    alike: dict[str, set[str]] = defaultdict(set)
    for subject in subjects:
        alike[re.sub(r"(?<!\d)0+(?=\d)", "", subject.casefold())].add(subject)
    for names in alike.values():
        if len(names) > 1:
            yield f"subjects {', '.join(map(named, sorted(names)))} have nearly the same name; are they one person?"
