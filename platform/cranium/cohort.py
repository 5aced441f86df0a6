"""A cohort's card and a folder of files -> a table of sessions: which scans there are, and what is known of them."""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cranium.cards import Card, Label, Layout, Participants
from cranium.config import UserError
from cranium.patterns import Match, compile_pattern, render

Value = str | float | None
ABSENT = {"", "n/a", "na", "nan", "none", "null", "."}  # cells of a table that say nothing
FLOATS = ("age",)  # columns held as numbers


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
class Refused:
    """A file that matches the card but cannot be told apart from another."""

    subject: str
    session: str
    contrast: str
    path: str
    code: str
    reason: str


@dataclass(frozen=True)
class CohortTable:
    """Sessions sorted by subject and session, what was refused, and `files`: (path, bytes) of all that is used."""

    root: Path
    layout: Layout  # the one the files lie in
    sessions: tuple[Session, ...]
    refused: tuple[Refused, ...]
    files: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]

    @property
    def missing(self) -> dict[str, int]:
        """How many sessions lack each contrast that some session has."""
        seen = Counter(contrast for session in self.sessions for contrast in session.scans)
        return {contrast: len(self.sessions) - n for contrast, n in sorted(seen.items())}


def scan(card: Card, raw: Path) -> CohortTable:
    """Match the card's patterns against the files below `raw`, and join the table of participants.

    Raises `UserError` when the folder is wrong, holds nothing that matches, or the table cannot be read.
    """
    if not raw.is_dir():
        raise UserError(
            "NO_RAW", f"{raw} is no folder; give the one that holds {card.title}: raw.{card.name}=DIR"
        )
    root = raw.resolve()
    files = dict(_walk(root))
    found = ((layout, _matches(layout, files)) for layout in card.layouts)
    layout, matches = next(((layout, m) for layout, m in found if m), (card.layouts[0], {}))
    if not matches:
        raise UserError("NO_SCANS", _nothing_found(card, raw, list(files)))
    rows = _participants(card.participants, root)
    sessions, refused = _sessions(card, layout, matches, files, rows)
    notes = (*_near_collisions(s.subject for s in sessions), *_without_row(card, sessions, rows))
    return CohortTable(root, layout, sessions, refused, _identity(card, sessions, refused, files), notes)


def label_of(label: Label, value: Value) -> str | None:
    """The class of a raw value, or None when absent or of no class. "1", "1.0" and 1.0 are one value."""
    if value is None:
        return None
    return next(
        (name for name, raws in label.classes.items() if any(_same(raw, value) for raw in raws)), None
    )


def _same(raw: str, value: str | float) -> bool:
    try:
        return float(raw) == float(value)
    except ValueError:
        return raw.strip() == str(value).strip()


# ---- files ----------------------------------------------------------------------------------------------------------


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Relative path and size of every file, in a fixed order. Folders that are links or hidden are not entered."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            try:
                size = os.stat(path).st_size
            except OSError:
                size = -1  # a broken link; reading it will say so
            yield Path(path).relative_to(root).as_posix(), size


def _matches(layout: Layout, files: Mapping[str, int]) -> dict[tuple[str, str, str], list[Match]]:
    """(subject, session, contrast) -> files that claim it, best first."""
    if layout.format != "nifti":
        raise UserError("DICOM", "DICOM folders are not read; convert them with dcm2niix and give a card")
    found: dict[tuple[str, str, str], list[Match]] = defaultdict(list)
    for contrast in layout.files:
        for order, pattern in enumerate(layout.files[contrast]):
            expression = compile_pattern(pattern)
            for path in files:
                if match := expression.fullmatch(path):
                    fields = {
                        k: unicodedata.normalize("NFC", v)
                        for k, v in match.groupdict().items()
                        if v is not None
                    }
                    run = fields.get("run", "")
                    key = (fields["subject"], fields.get("session", ""), str(contrast))
                    number = (int(run) if run.isdigit() else 0, run)
                    found[key].append(Match((order, number, path), fields, path))
    return {key: sorted(claims, key=lambda m: m.order) for key, claims in sorted(found.items())}


def _nothing_found(card: Card, raw: Path, paths: list[str]) -> str:
    layout = card.layouts[0]
    contrast, patterns = next(iter({**layout.files, "series": layout.series}.items()))
    scans = [p for p in paths if p.endswith((".nii", ".nii.gz"))] or paths
    instead = f"it holds {len(paths)} files, such as {', '.join(scans[:3])}" if paths else "it is empty"
    return (
        f"no file below {raw} matches the layout of {card.name} ({contrast}: {' or '.join(patterns)}); {instead}. "
        "Give the folder that these paths start from, or correct `layouts` in the card"
    )


def _sessions(
    card: Card,
    layout: Layout,
    matches: Mapping[tuple[str, str, str], list[Match]],
    files: Mapping[str, int],
    rows: Mapping[tuple[str, str], Mapping[str, Value]],
) -> tuple[tuple[Session, ...], tuple[Refused, ...]]:
    scans: dict[tuple[str, str], dict[str, Scan]] = defaultdict(dict)
    label_maps: dict[tuple[str, str], str] = {}
    refused: list[Refused] = []
    for (subject, session, contrast), claims in matches.items():
        first, note = claims[0], None
        repeated = {m.path for m in claims[1:] if m.fields.get("run", "") != first.fields.get("run", "")}
        if repeated:
            note = (
                f"run {first.fields.get('run') or 'without number'} taken of {1 + len(repeated)}: the lowest"
            )
        for other in claims[1:]:
            if other.path not in repeated | {first.path}:
                reason = f"{first.path} is the {contrast} of the same subject, session and run, and was taken"
                refused.append(Refused(subject, session, contrast, other.path, "DUP_ID", reason))
        mask = _beside(layout.mask, contrast, first.fields, files)
        scans[subject, session][contrast] = Scan(contrast, first.path, mask, note)
        if label_map := _beside(layout.segmentation, contrast, first.fields, files):
            label_maps.setdefault((subject, session), label_map)
    columns = card.participants.columns if card.participants else {}
    nothing = dict.fromkeys(columns)
    sessions = tuple(
        Session(
            subject,
            session,
            found,
            rows.get((subject, session)) or rows.get((subject, "")) or nothing,
            label_maps.get((subject, session)),
        )
        for (subject, session), found in sorted(scans.items())
    )
    return sessions, tuple(refused)


def _beside(
    pattern: str | None, contrast: str, fields: Mapping[str, str], files: Mapping[str, int]
) -> str | None:
    """The file that belongs to a scan by this pattern (a brain mask, a label map), if it is there."""
    if pattern is None:
        return None
    with_run = {**fields, "contrast": contrast}
    without_run = {k: v for k, v in with_run.items() if k != "run"}
    tries = (render(pattern, with_run), render(pattern, without_run))
    return next((path for path in tries if path in files), None)


def _identity(
    card: Card, sessions: tuple[Session, ...], refused: tuple[Refused, ...], files: Mapping[str, int]
) -> tuple[tuple[str, int], ...]:
    """What the result depends on: every file that is read, with its size."""
    used = {r.path for r in refused}
    for session in sessions:
        used |= {session.segmentation} - {None}  # type: ignore[arg-type]
        for found in session.scans.values():
            used |= {found.path, found.mask} - {None}  # type: ignore[arg-type]
    return tuple((path, files[path]) for path in sorted(used))


def _near_collisions(subjects: Iterator[str]) -> Iterator[str]:
    alike: dict[str, set[str]] = defaultdict(set)
    for subject in subjects:
        alike[re.sub(r"(?<!\d)0+(?=\d)", "", subject.casefold())].add(subject)
    for names in alike.values():
        if len(names) > 1:
            yield f"subjects {', '.join(sorted(names))} have nearly the same name; are they one person?"


# ---- participants ---------------------------------------------------------------------------------------------------


def _participants(spec: Participants | None, root: Path) -> dict[tuple[str, str], dict[str, Value]]:
    """(subject, session or "") -> values by our column name. Names are matched with or without `sub-`, `ses-`."""
    if spec is None:
        return {}
    path = root / spec.file
    if not path.resolve().is_relative_to(root):
        raise UserError("PATH_ESCAPE", f"participants.file {spec.file} leads out of {root}")
    if not path.is_file():
        if not spec.columns:
            return {}
        raise UserError(
            "NO_TABLE", f"{path} is missing; put it there or correct `participants.file` in the card"
        )
    found: dict[tuple[str, str], tuple[int, dict[str, Value]]] = {}
    for line, row in _table(
        path, [spec.subject, *([spec.session] if spec.session else []), *spec.columns.values()]
    ):
        subject = unicodedata.normalize("NFC", row[spec.subject].strip().removeprefix("sub-"))
        session = row[spec.session].strip().removeprefix("ses-") if spec.session else ""
        values = {
            ours: _value(ours, row[theirs], f"{path} line {line}") for ours, theirs in spec.columns.items()
        }
        earlier = found.setdefault((subject, session), (line, values))
        if earlier[1] != values:
            both = f"{subject} {session}".rstrip()
            raise UserError(
                "DUP_ID", f"{path} lines {earlier[0]} and {line} differ, but both are subject {both}"
            )
    return {key: values for key, (_, values) in found.items()}


def _table(path: Path, needed: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column. BOM, CRLF and blank lines are fine; a row of another length is not."""
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = next(reader, [])
            if missing := [name for name in needed if name not in header]:
                raise UserError(
                    "TABLE", f"{path} has no column {', '.join(missing)}; it has {', '.join(header)}"
                )
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    found = f"{len(cells)} cells under {len(header)} columns"
                    raise UserError("TABLE", f"{path} line {reader.line_num}: {found}")
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError("TABLE", f"{path} is no UTF-8 table ({error}); save it again as UTF-8") from error


def _value(name: str, cell: str, where: str) -> Value:
    text = cell.strip()
    if text.lower() in ABSENT:
        return None
    if name not in FLOATS:
        return text
    try:
        return float(text.removesuffix("+"))  # "89+": ages above a limit are published like this
    except ValueError:
        raise UserError("TABLE", f"{where}: {name} `{text}` is no number") from None


def _without_row(
    card: Card, sessions: tuple[Session, ...], rows: Mapping[tuple[str, str], Mapping[str, Value]]
) -> Iterator[str]:
    if card.participants is None:
        return
    lost = sorted(
        {s.subject for s in sessions if not {(s.subject, s.session), (s.subject, "")} & rows.keys()}
    )
    if lost:
        some = ", ".join(lost[:5]) + (" ..." if len(lost) > 5 else "")
        yield f"{len(lost)} subjects have no row in {card.participants.file}: {some}"
