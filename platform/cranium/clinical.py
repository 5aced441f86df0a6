"""What the tables of a card say of each session: keys, dated visits and small rules, joined in order. No Ray here.

Which tables there are, and what is kept of them, is declared under `tables:` in a card (`cards.Table`).
"""

from __future__ import annotations

import contextlib
import datetime
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cranium.cards import Card, Column, Table, Visit
from cranium.config import UserError
from cranium.patterns import matching, tidy
from cranium.tables import ABSENT, Cells, Folder, find, read
from cranium.volume.quality import named

Value = str | float | None
FLOATS = ("age", "gestational_age")  # our columns that are held as numbers
YEAR = 365.25  # days
MOST_NAMED = 5  # in a note


@dataclass
class Known:
    """A session and what is known of it; tables add to `values`. `day` counts from entry, or is a date's ordinal."""

    subject: str
    session: str
    fields: Mapping[str, str] = field(default_factory=dict)  # of the path of its first scan
    day: int | None = None
    dated: bool = False  # `day` is a date
    values: dict[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        return named(f"{self.subject} {self.session}".rstrip())


def same(raw: str, value: str | float) -> bool:
    """Whether two spellings are one value: "1", "1.0" and 1.0 are."""
    try:
        return float(raw) == float(value)
    except ValueError:
        return raw.strip() == str(value).strip()


def join(
    card: Card, layout: str | None, sessions: Sequence[Known], folders: Sequence[Folder]
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Fill the `values` of sessions from the tables of a card; the files read, and notes.

    Raises `UserError` when a table that is not optional is missing, or one cannot be read or trusted.
    """
    used: list[Path] = []
    notes: list[str] = []
    for session in sessions:
        session.values = dict.fromkeys(name for table in card.tables for name in table.columns)
    for table in card.tables:
        if table.layout and layout not in table.layout:
            continue
        files = _files(table, folders)
        if not files:
            missing = _missing(card, table, folders)
            if not table.optional and table.columns:
                raise UserError("NO_TABLE", missing)
            notes += [missing] if table.columns else []
            continue
        used += files.values()
        notes += _Join(table, files, sessions).notes()
    for session in sessions:
        session.values = {name: session.values[name] for name in card.columns}
    return tuple(dict.fromkeys(used)), tuple(notes)


def _files(table: Table, folders: Sequence[Folder]) -> dict[str, Path]:
    """The file of a table by "", or the files of its subjects by their names."""
    if not table.each:
        path = find(table.file, table.sheet, _needed(table), folders)
        return {"": path} if path else {}
    found: dict[str, Path] = {}
    for folder in folders:
        for pattern in table.file:
            for name, fields in matching(pattern, folder.files):
                found.setdefault(fields["subject"], folder.root / name)
    return found


def _needed(table: Table) -> tuple[str, ...]:
    ids = [name for name in (None if table.each else table.subject, table.session) if name]
    visit = table.visit.column if table.visit else ()
    of_columns = [name for column in table.columns.values() for name in column.needs]
    return tuple(dict.fromkeys([*ids, *table.keys, *visit, *of_columns]))


def _missing(card: Card, table: Table, folders: Sequence[Folder]) -> str:
    where = " or ".join(str(folder.root) for folder in folders)
    columns = ", ".join(name for name in table.columns if not name.startswith("_"))
    names = " or ".join(table.file)
    holding = "" if "*" not in names else f" with columns {', '.join(_needed(table))}"
    return (
        f"{names} is missing{holding}, so {columns or 'what it joins'} are absent; put it into {where}, "
        f"or give its folder: raw.{card.name}_tables=DIR"
    )


class _Join:
    """One table on its way to the sessions."""

    def __init__(self, table: Table, files: Mapping[str, Path], sessions: Sequence[Known]) -> None:
        self.table, self.files = table, files
        self.odd: list[str] = []  # ids of another form than `ids` says
        self.without: list[Known] = []  # no row
        self.far: list[Known] = []  # no visit near enough
        self.tied: list[Known] = []
        wanted = {key for session in sessions for key in self._keys(session)}
        rows = self._rows(wanted)
        for session in sessions:
            self._fill(session, next((rows[key] for key in self._keys(session) if key in rows), []))

    def _keys(self, session: Known) -> list[tuple[str, ...]]:
        """What a row must hold to belong to a session: the best first. Empty when a key is unknown."""
        known = [_of_session(session, name) for name in self.table.keys.values()]
        further = [canonical(value) for value in known if value is not None]
        if len(further) < len(known):
            return []
        subject = self._id(session.subject) if self.table.subject or self.table.each else ""
        # By `ids` alone a row without a session belongs to the scans without one; a column `session` may be empty.
        sessions = [session.session, ""] if self.table.session or not self._told_by_ids else [session.session]
        return [(subject, name, *further) for name in dict.fromkeys(sessions)]

    @property
    def _told_by_ids(self) -> bool:
        return bool(self.table.ids and "session" in re.compile(self.table.ids).groupindex)

    def _id(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text.strip())
        return canonical(text) if self.table.numbers else text.removeprefix("sub-")

    def _rows(self, wanted: set[tuple[str, ...]]) -> dict[tuple[str, ...], list[_Row]]:
        table, found = self.table, defaultdict(list)
        expression = re.compile(table.ids) if table.ids else None
        for line, cells, owner in self._lines():
            subject, session = owner or (cells[table.subject] if table.subject else ""), ""
            if expression:
                match = expression.fullmatch(subject.strip())
                if match is None:
                    self.odd.append(subject)
                    continue
                subject, session = match["subject"], match.groupdict().get("session") or ""
            if table.session:
                session = tidy(cells[table.session].strip().removeprefix("ses-"))
            subject = subject if owner else tidy(subject.strip())
            key = (self._id(subject), session, *(canonical(cells[name]) for name in table.keys))
            if key in wanted:
                where = f"{self.files[owner]} line {line}"
                values = {name: value_of(name, spec, cells, where) for name, spec in table.columns.items()}
                found[key].append(_Row(where, values, self._day(cells, where)))
        return found

    def _lines(self) -> Iterator[tuple[int, Cells, str]]:
        for owner, path in self.files.items():
            for line, cells in read(path, self.table.sheet, _needed(self.table)):
                yield line, cells, owner

    def _day(self, cells: Cells, where: str) -> int | None:
        return day_of(self.table.visit, cells, where) if self.table.visit else None

    def _fill(self, session: Known, rows: list[_Row]) -> None:
        visit = self.table.visit
        if not rows:
            self.without.append(session)
            return
        if visit is None:
            row: _Row | None = self._agreed(session, rows)
        else:
            row = self._nearest(visit, session, [row for row in rows if set(row.values.values()) - {None}])
        if row is None:
            return
        for name, value in row.values.items():
            if session.values.get(name) is None:
                session.values[name] = _at_session(self.table.columns[name], value, session)

    def _agreed(self, session: Known, rows: list[_Row]) -> _Row:
        for other in rows[1:]:
            if other.values != rows[0].values:
                lines = f"{rows[0].where} and {other.where.rpartition('/')[2]}"
                raise UserError("DUP_ID", f"{lines} differ, but both are subject {session}")
        return rows[0]

    def _nearest(self, visit: Visit, session: Known, rows: list[_Row]) -> _Row | None:
        day = _day_of_session(visit, session)
        gaps = [(abs(row.day - day), row) for row in rows if row.day is not None] if day is not None else []
        within = [(gap, row) for gap, row in gaps if gap <= visit.within_days]
        if not within:
            self.far.append(session)
            return None
        least = min(gap for gap, _ in within)
        first, *others = [row for gap, row in within if gap == least]
        if any(other.values != first.values for other in others):
            self.tied.append(session)
            return None
        return first

    def notes(self) -> Iterator[str]:
        name = self.table.file[0] if self.table.each else self.files[""].name
        if self.without:
            who = list(dict.fromkeys(s.subject for s in self.without))
            yield f"{len(who)} subjects have no row in {name}: {_some(map(named, who))}"
        if self.far and self.table.visit:
            days = self.table.visit.within_days
            yield f"{len(self.far)} sessions have no visit within {days} days in {name}: {_some(map(str, self.far))}"
        if self.tied:
            tied = _some(map(str, self.tied))
            yield f"{len(self.tied)} sessions lie between two visits that differ in {name}, none taken: {tied}"
        if self.odd:
            yield f"{len(self.odd)} rows of {name} have ids of another form, such as {_some(dict.fromkeys(self.odd))}"


@dataclass(frozen=True)
class _Row:
    where: str  # file and line
    values: Mapping[str, Value]
    day: int | None


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:MOST_NAMED]) + (" ..." if len(every) > MOST_NAMED else "")


def _of_session(session: Known, name: str) -> str | None:
    known = {"subject": session.subject, "session": session.session, **session.fields}
    value = session.values.get(name, known.get(name))
    return None if value is None else str(value)


def canonical(text: str) -> str:
    """One spelling of an id that is compared as a number: "004", "4.0" and "4" are "4"; other text stays."""
    text = text.strip()
    return str(int(text.partition(".")[0])) if re.fullmatch(r"\d+(\.0*)?", text) else text


# ---- what a row says ------------------------------------------------------------------------------------------------


def value_of(name: str, spec: Column, cells: Cells, where: str) -> Value:
    """Our value of a row, before what the session adds to it. Raises `UserError` when a number is none."""
    if spec.column is None:
        return next(
            (ours for ours, any_of in spec.cases.items() if any(_holds(c, cells) for c in any_of)), None
        )
    text = cells[spec.column].strip()
    if text.lower() in ABSENT or any(same(code, text) for code in spec.missing):
        return None
    text = next((ours for theirs, ours in spec.values.items() if same(theirs, text)), text)
    if name not in FLOATS:
        return text
    try:
        return float(text.removesuffix("+"))  # "89+": ages above a limit are published like this
    except ValueError:
        raise UserError("TABLE", f"{where}: {name} `{text}` is no number") from None


def _holds(condition: Mapping[str, tuple[str, ...]], cells: Cells) -> bool:
    return all(any(same(raw, cells[name]) for raw in raws) for name, raws in condition.items())


def _at_session(spec: Column, value: Value, session: Known) -> Value:
    if not spec.plus_session_days or not isinstance(value, float):
        return value
    return round(value + session.day / YEAR, 2) if session.day is not None and not session.dated else None


def day_of(visit: Visit, cells: Cells, where: str) -> int | None:
    """When a visit was: days since entry, or a date as its ordinal; None when the row does not say."""
    text = "-".join(cells[name].strip() for name in visit.column)
    if not text.strip("-") or text.lower() in ABSENT or any(same(code, text) for code in visit.missing):
        return None
    if len(visit.column) == 3:
        year, month, day = (canonical(cells[name]) for name in visit.column)
        text = f"{year}-{month:>02}-{day:>02}"
    return _day(text, visit.dates, where)


def _day(text: str, formats: Sequence[str], where: str) -> int:
    if not formats:
        try:
            return int(float(text))
        except ValueError:
            raise UserError("TABLE", f"{where}: `{text}` is no number of days") from None
    for form in formats:
        with contextlib.suppress(ValueError):
            return datetime.datetime.strptime(text, form).toordinal()
    raise UserError("TABLE", f"{where}: `{text}` is no date of the form {' or '.join(formats)}")


def _day_of_session(visit: Visit, session: Known) -> int | None:
    if not visit.at:
        return session.day if session.dated == bool(visit.dates) else None
    told = {name: str(session.values.get(name) or "") for name in visit.at}
    return day_of(visit.model_copy(update={"column": visit.at}), told, f"the scan of {session}")
