"""Tables beside the scans: how a TSV, CSV or XLSX file is found and read; no Ray, no pixels."""

from __future__ import annotations

import csv
import datetime
import fnmatch
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import openpyxl

from cranium.cards import Overlap
from cranium.config import UserError

Cells = Mapping[str, str]  # of one row, by the file's column
ABSENT = {"", "n/a", "na", "nan", "none", "null", "."}  # cells that say nothing


@dataclass(frozen=True)
class Folder:
    """Where tables may lie, and the relative paths of the files in it."""

    root: Path
    files: Sequence[str]


def find(
    names: Sequence[str], sheet: str | None, needed: Sequence[str], folders: Sequence[Folder]
) -> Path | None:
    """The file a card means: the first name that fits, in the first folder where one does, the shallowest there.

    Where a pattern with * fits several files, those without the needed columns are passed over. Raises `UserError`
    when more than one is left: two releases of one table must not be mixed up.
    """
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError("PATH_ESCAPE", f"tables.file {name} leads out of the folder")
    for folder in folders:
        for name in names:
            fits = [
                p
                for p in folder.files
                if fnmatch.fnmatchcase(p if "/" in name else p.rsplit("/", 1)[-1], name)
            ]
            fits = [p for p in fits if not p.rsplit("/", 1)[-1].startswith(".")]
            if "*" in name:
                fits = [p for p in fits if set(needed) <= set(header(folder.root / p, sheet))]
            depth = min((p.count("/") for p in fits), default=0)
            nearest = [p for p in fits if p.count("/") == depth]
            if len(nearest) > 1:
                raise UserError(
                    "TABLE", f"{name} may be any of {', '.join(nearest)} below {folder.root}; leave one there"
                )
            if nearest:
                return folder.root / nearest[0]
    return None


def header(path: Path, sheet: str | None) -> list[str]:
    """Column names of a table, [] when it is none."""
    try:
        return next((names for _, names in _raw_rows(path, sheet)), [])
    except UserError:
        return []


def read(path: Path, sheet: str | None, needed: Sequence[str]) -> Iterator[tuple[int, Cells]]:
    """Line number and the needed cells by column. BOM, CRLF and blank lines are fine; a ragged row is not."""
    rows = _raw_rows(path, sheet)
    _, names = next(rows, (0, []))
    if missing := [name for name in needed if name not in names]:
        raise UserError("TABLE", f"{path} has no column {', '.join(missing)}; it has {', '.join(names[:40])}")
    places = {name: names.index(name) for name in needed}
    for line, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(names):
            raise UserError("TABLE", f"{path} line {line}: {len(cells)} cells under {len(names)} columns")
        yield line, {name: cells[place] for name, place in places.items()}


def _raw_rows(path: Path, sheet: str | None) -> Iterator[tuple[int, list[str]]]:
    if path.suffix.lower() == ".xlsx":
        yield from _workbook(path, sheet)
        return
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            for cells in reader:
                yield reader.line_num, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError("TABLE", f"{path} is no UTF-8 table ({error}); save it again as UTF-8") from error


def _workbook(path: Path, sheet: str | None) -> Iterator[tuple[int, list[str]]]:
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError("TABLE", f"{path} is no Excel workbook ({error})") from error
    try:
        if sheet is not None and sheet not in book.sheetnames:
            raise UserError("TABLE", f"{path} has no sheet {sheet}; it has {', '.join(book.sheetnames)}")
        pages = book[sheet] if sheet else book[book.sheetnames[0]]
        width = 0
        for line, cells in enumerate(pages.iter_rows(values_only=True), 1):
            texts = [_cell(value) for value in cells]
            while len(texts) > width and width and not texts[-1]:  # empty cells that were once formatted
                texts.pop()
            if line == 1:
                while texts and not texts[-1]:
                    texts.pop()
                width = len(texts)
            yield line, texts + [""] * (width - len(texts))
    finally:
        book.close()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime.datetime):
        return value.date().isoformat()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


# ---- people in two collections --------------------------------------------------------------------------------------


def translate(
    overlap: Overlap, subjects: Iterable[str], folders: Sequence[Folder]
) -> dict[str, tuple[str, ...]] | None:
    """Which of `subjects` (of the card that declares the overlap) are whom in the other collection.

    None when there is no mapping, or one of its tables is not there.
    """
    if not overlap.mapping:
        return None
    who = {subject: {subject} for subject in subjects}
    for step in overlap.mapping:
        path = find(step.file, step.sheet, (step.have, step.want), folders)
        if path is None:
            return None
        becomes: dict[str, set[str]] = defaultdict(set)
        for _, cells in read(path, step.sheet, (step.have, step.want)):
            have, want = _id_in(cells[step.have], step.have_ids), _id_in(cells[step.want], step.want_ids)
            if have and want:
                becomes[have].add(want.zfill(step.digits))
        who = {subject: {new for one in ids for new in becomes.get(one, ())} for subject, ids in who.items()}
    return {subject: tuple(sorted(ids)) for subject, ids in sorted(who.items()) if ids}


def _id_in(cell: str, expression: str | None) -> str | None:
    text = cell.strip()
    if text.lower() in ABSENT:
        return None
    if expression is None:
        return text
    match = re.fullmatch(expression, text)
    return match["id"] if match else None
