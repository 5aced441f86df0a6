"""What a published collection is and how its files become a cohort: `datasets/*.yaml`, one card each.

A card holds facts, never code: path patterns with named fields, where labels and demographics lie, who else may be in
the collection. It is found by its file name.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cranium.config import NAME, Contrast, Frozen, UserError, share, validated, with_base


class Layout(Frozen):
    """Where the files of a cohort lie below its raw folder, in one form in which the collection is distributed.

    A pattern is a relative path with `{subject}`, `{session}`, `{run}` fields and `[optional]` parts, e.g.
    `sub-{subject}[/ses-{session}]/anat/sub-{subject}[_ses-{session}]_T1w.nii.gz`.
    """

    format: Literal["nifti", "dicom"] = "nifti"
    files: dict[Contrast, tuple[str, ...]] = {}  # nifti: of each contrast
    series: tuple[str, ...] = ()  # dicom: folders, one series each; headers tell the contrast
    descriptions: dict[Contrast, tuple[str, ...]] = {}  # dicom: regular expressions of SeriesDescription
    repeats: Literal["first", "last"] = "first"  # which of several runs (or series) of a contrast is taken
    mask: str | None = None  # brain mask; may hold {contrast} when every contrast has its own grid
    segmentation: str | None = None  # label map on the grid of one of the scans, or in the same world
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
        return self


class Participants(Frozen):
    """The table of subjects: a TSV or CSV file, which column names the subject, and the columns to keep."""

    file: str = "participants.tsv"
    subject: str = "participant_id"
    session: str | None = None
    columns: dict[str, str] = {}  # our name -> the file's name


class Label(Frozen):
    """A label column and the raw values that make each class, in class order."""

    column: str
    classes: dict[str, tuple[str, ...]]


class Overlap(Frozen):
    cohort: str
    reason: str
    source: str | None = None


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
    subjects: int | None = None
    contrasts: tuple[Contrast, ...]
    layouts: tuple[Layout, ...] = Field(min_length=1)  # the first one that any file matches is taken
    segmentation: dict[str, tuple[int, ...]] = {}  # class -> values of the label map, in class order from 1
    participants: Participants | None = None
    labels: dict[str, Label] = {}
    groups: tuple[str, ...] = ()  # columns that tie subjects together (family, head)
    # Column of matched sets (one subject per class, alike in all else). Folds keep a set whole: split, the held-out
    # class would be the rarer one of its set in training, and covariates alone would fall far below chance.
    matched: str | None = None
    overlaps: tuple[Overlap, ...] = ()
    simulated: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for layout in self.layouts:
            if layout.segmentation and not self.segmentation:
                raise ValueError(
                    "a layout has a `segmentation`, but no class of it is named under `segmentation`"
                )
        if all(layout.format == "nifti" for layout in self.layouts):
            found = {contrast for layout in self.layouts for contrast in layout.files}
            if missing := set(self.contrasts) - found:
                raise ValueError(f"no file pattern for {sorted(missing)} under layouts[].files")
        columns = set(self.participants.columns) if self.participants else set()
        used = (
            {label.column for label in self.labels.values()}
            | set(self.groups)
            | ({self.matched} if self.matched else set())
        )
        if unknown := used - columns:
            raise ValueError(f"{sorted(unknown)} are not among participants.columns {sorted(columns)}")
        return self


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
