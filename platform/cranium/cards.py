"""What a published collection is and how its files become a cohort: `datasets/*.yaml`, one card each.

A card holds facts, never code: path patterns with named fields, where labels and demographics lie, who else may be in
the collection. It is found by its file name.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cranium.config import NAME, Contrast, Frozen, UserError
from cranium.reading import share, validated, with_base

# One, or a list.
Several = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]


class Layout(Frozen):
    """Where the files of a cohort lie below its raw folder, in one form in which the collection is distributed.

    A pattern is a relative path with `{subject}`, `{session}`, `{run}` and other fields and `[optional]` parts, e.g.
    `sub-{subject}[/ses-{session}]/anat/sub-{subject}[_ses-{session}]_T1w.nii.gz` (see `patterns.py`). Files of one
    contrast and session that differ in another field (run, acq, rec, ...) are repeats: one is taken, and it is noted.
    """

    name: str | None = None  # by which a table says that it belongs to this layout only
    format: Literal["nifti", "dicom"] = "nifti"
    files: dict[Contrast, Several] = {}  # nifti: of each contrast, the best first
    series: tuple[str, ...] = ()  # dicom: folders, one series each; headers tell the contrast
    descriptions: dict[Contrast, tuple[str, ...]] = {}  # dicom: regular expressions of SeriesDescription
    repeats: Literal["first", "last"] = "first"  # which of several runs (or series) of a contrast is taken
    # What a subject is called where subjects are numbered anew in every folder: fields of the path, e.g.
    # `{dataset}_{subject}`. None: the field `subject`.
    subject: str | None = None
    mask: str | None = None  # brain mask; may hold {contrast} when every contrast has its own grid
    segmentation: Several = ()  # label map, the best first; on the grid of one of the scans, or in the same world
    # How the name of a session tells when it was: a regular expression that finds `day` (since entry into the study)
    # or `date` (YYYY-MM-DD), e.g. `d(?P<day>\\d+)`. Dated visits of a table are joined by it.
    when: str | None = None
    source: str | None = None  # public description the patterns were taken from
    unverified: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source is None and not self.unverified:
            raise ValueError("cite the public `source` of this layout, or mark it `unverified: true`")
        if self.format == "nifti" and (not self.files or self.series or self.descriptions):
            raise ValueError("a NIfTI layout names `files`, and no `series` or `descriptions`")
        if self.format == "dicom" and (not self.series or self.files):
            raise ValueError(
                "a DICOM layout names `series`, the folders that hold one series each, and no `files`"
            )
        if self.when and not {"day", "date"} & re.compile(self.when).groupindex.keys():
            raise ValueError(f"`when: {self.when}` finds neither (?P<day>...) nor (?P<date>...)")
        return self


class Column(Frozen):
    """One of our columns, from a row: a column of the file (in YAML a plain name will do), or a rule over several."""

    column: str | None = None
    values: dict[str, str] = {}  # the file's value -> ours, "1" and "1.0" alike; others stay as they are
    missing: tuple[str, ...] = ()  # codes that say nothing, e.g. "-4", "888"
    # our value -> conditions on the file's columns, of which one must hold whole; the first value that fits is taken
    cases: dict[str, tuple[dict[str, Several], ...]] = {}
    plus_session_days: bool = False  # years at entry: add the days from entry to the session

    @property
    def needs(self) -> tuple[str, ...]:
        """The file's columns that are read."""
        of_cases = (name for case in self.cases.values() for condition in case for name in condition)
        return tuple(dict.fromkeys([self.column] if self.column else of_cases))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.column is None) == (not self.cases):
            raise ValueError("a column is either `column`, one of the file, or `cases` over some of them")
        return self


class Visit(Frozen):
    """Rows that are dated visits: a session takes the nearest, if there is one within so many days.

    Of two that are equally near and differ, neither is taken; it is noted.
    """

    column: Several  # of days since entry, or of dates; three columns are year, month, day
    dates: Several = ()  # strptime formats of the column; () when it holds days since entry
    missing: Several = ()  # codes of a row without a date, e.g. "-4"
    within_days: int = Field(ge=0)
    at: Several = ()  # our columns, joined before, that date the session (one, or three); (): its name (`layout.when`)


Columns = dict[str, Annotated[Column, BeforeValidator(lambda v: {"column": v} if isinstance(v, str) else v)]]


class Table(Frozen):
    """A TSV, CSV or XLSX file, how its rows belong to sessions, and what is kept of them.

    It lies below the raw folder, or in a folder of its own (`raw.<cohort>_tables=DIR`). Tables are joined in order; one
    fills only what those before it left absent, and may use their columns as keys.
    """

    # Names, or patterns with *, the best first; where several fit, the shallowest. One with {subject} is one file a
    # subject, e.g. sub-{subject}/sub-{subject}_sessions.tsv; then the column `subject` is not used.
    file: Several = ("participants.tsv",)
    sheet: str | None = None  # of a workbook; None: its first
    layout: Several = ()  # only where the files lie in a layout of this name
    subject: str | None = "participant_id"  # column of subjects; None when `keys` alone tell the row
    session: str | None = None  # column of sessions; a row without one belongs to every session
    ids: str | None = (
        None  # how a cell of `subject` is read: an expression with (?P<subject>) and perhaps (?P<session>)
    )
    numbers: bool = False  # ids are numbers: "004", "4" and "4.0" are one
    keys: dict[
        str, str
    ] = {}  # a further column of the file -> what it must equal: one of our columns, or a path field
    visit: Visit | None = None
    columns: Columns = {}  # ours: the file's; a name that starts with _ serves later joins and is not kept
    optional: bool = False  # a missing file is noted, not refused
    source: str | None = None  # public description of the columns
    unverified: bool = False

    @property
    def each(self) -> bool:
        """Whether every subject has a file of its own."""
        return any("{subject" in name for name in self.file)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.subject is None and not self.keys:
            raise ValueError("a table is joined by its column `subject`, or by `keys`")
        if self.ids and "subject" not in re.compile(self.ids).groupindex:
            raise ValueError(f"`ids: {self.ids}` finds no (?P<subject>...)")
        return self


class Label(Frozen):
    """A label column and the raw values that make each class, in class order."""

    column: str
    classes: dict[str, tuple[str, ...]]
    source: str | None = None  # what the raw values mean, by a public description
    unverified: bool = False


class Step(Frozen):
    """One public table that turns one kind of id into another: a row has both."""

    file: Several
    sheet: str | None = None
    have: str  # column of the ids at hand
    have_ids: str | None = None  # how its cells are read: an expression with (?P<id>...)
    want: str  # column of the ids looked for
    want_ids: str | None = None  # a row whose cell is of another form is passed over
    digits: int = 0  # ids looked for are padded with zeros to so many digits, as in the other's paths


class Overlap(Frozen):
    """People who are, or are suspected to be, in another collection too.

    `mapping` is the way, one public table after another, from this cohort's subjects to the other's: the `have` of the
    first step holds our subjects (as in the paths), the `want` of the last the other card's. Without it nobody can say
    who they are. `tables.translate` walks it. The files lie with the cohort's other tables.
    """

    cohort: str
    reason: str
    source: str | None = None
    mapping: tuple[Step, ...] = ()


class Expected(Frozen):
    """How much the published collection holds; a folder that holds another number is noted."""

    subjects: int | None = None
    sessions: int | None = None
    scans: int | None = None
    source: str


class Card(Frozen):
    """One `datasets/*.yaml`: a published collection and how its files become a cohort."""

    name: str = Field(pattern=NAME)
    title: str
    summary: str = ""
    access: Literal["open", "registration", "agreement", "generated", "yours"]
    url: str | None = None
    licence: str
    citation: str
    role: str
    expected: Expected | None = None
    contrasts: tuple[Contrast, ...]
    layouts: tuple[Layout, ...] = Field(min_length=1)  # the first one that any file matches is taken
    segmentation: dict[str, tuple[int, ...]] = {}  # class -> values of the label map, in class order from 1
    tables: tuple[Table, ...] = ()
    labels: dict[str, Label] = {}
    groups: tuple[str, ...] = ()  # columns that tie subjects together (family, head)
    # Column of matched sets (one subject per class, alike in all else). Folds keep a set whole: split, the held-out
    # class would be the rarer one of its set in training, and covariates alone would fall far below chance.
    matched: str | None = None
    overlaps: tuple[Overlap, ...] = ()
    simulated: bool = False
    stripped: bool = False  # the scans hold brain alone: what is not background is the mask

    @property
    def columns(self) -> tuple[str, ...]:
        """Our columns of a session, in the order of the tables."""
        every = (name for table in self.tables for name in table.columns if not name.startswith("_"))
        return tuple(dict.fromkeys(every))

    def facts(self, *names: str) -> dict[str, Any]:
        """Some fields as plain values, without where their facts are from: a better citation changes no result."""
        return {name: _uncited(getattr(self, name)) for name in names}

    @property
    def unverified(self) -> tuple[str, ...]:
        """What in this card nobody could verify by a public source, in words."""
        layouts = [
            f"layout {layout.name or n}" for n, layout in enumerate(self.layouts, 1) if layout.unverified
        ]
        tables = [f"table {table.file[0]}" for table in self.tables if table.unverified]
        return (
            *layouts,
            *tables,
            *(f"label {name}" for name, label in self.labels.items() if label.unverified),
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if any(layout.segmentation for layout in self.layouts) and not self.segmentation:
            raise ValueError(
                "a layout has a `segmentation`, but no class of it is named under `segmentation`"
            )
        if all(layout.format == "nifti" for layout in self.layouts):
            found = {contrast for layout in self.layouts for contrast in layout.files}
            if missing := set(self.contrasts) - found:
                raise ValueError(f"no file pattern for {sorted(missing)} under layouts[].files")
        names = {layout.name for layout in self.layouts}
        if unknown := {name for table in self.tables for name in table.layout} - names:
            raise ValueError(f"tables name layouts {sorted(unknown)} that are not under `layouts`")
        used = {label.column for label in self.labels.values()} | set(self.groups)
        if lost := used.union([self.matched] if self.matched else []) - set(self.columns):
            raise ValueError(f"{sorted(lost)} are not among tables[].columns {sorted(self.columns)}")
        return self


def _uncited(value: Any) -> Any:
    match value:
        case Layout() | Table() | Label():
            return value.model_dump(mode="json", exclude={"source", "unverified"})
        case dict():
            return {name: _uncited(one) for name, one in value.items()}
        case tuple():
            return [_uncited(one) for one in value]
    return value


def load_card(name_or_path: str | Path, folder: Path | None = None) -> Card:
    """A cohort card by path, or by name from `folder` or else the shipped `datasets/`."""
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        folders = [*([folder] if folder else []), share() / "datasets"]
        path = next(
            (f / f"{name_or_path}.yaml" for f in folders if (f / f"{name_or_path}.yaml").is_file()), path
        )
        if not path.is_file():
            folder = folders[0]
            known = sorted({p.stem for f in folders for p in f.glob("*.yaml")})
            near = difflib.get_close_matches(str(name_or_path), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError("NO_COHORT", f"no card {path.name}.yaml in {folder}; {hint}")
    card = validated(Card, with_base(path), str(path))
    if card.name != path.stem:
        raise UserError(
            "CONFIG", f"{path}: `name` is {card.name}, but cohorts are found by file name; make them equal"
        )
    return card
