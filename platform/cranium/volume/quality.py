"""What can be wrong with a scan: the codes, and how reading and normalising say so.

Every scan ends as accepted, accepted with notes, or rejected with one code; the counts add up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

REJECTIONS: Mapping[str, str] = {
    "IO": "cannot be read, or changed while it was read",
    "NOT_REGULAR": "not a regular file below the raw folder",
    "NOT_NIFTI": "no NIfTI file",
    "EXT_MISMATCH": "the file's name and its content disagree on compression",
    "GZ_TRUNCATED": "the gzip stream ends early",
    "GZ_CRC": "the gzip stream is damaged",
    "GZ_TRAILING": "bytes follow the gzip stream",
    "BOMB": "unpacks to more than its header declares",
    "HEADER_INVALID": "the header contradicts itself",
    "DIMS_LIMIT": "declares more voxels than allowed, or than the file holds",
    "DIMS_INVALID": "an axis of zero, one or a negative number of voxels",
    "NDIM": "not one three-dimensional volume",
    "DTYPE": "voxels of a type that no scan has",
    "SCALE_INVALID": "an infinite or undefined intensity scale",
    "RANGE": "intensities beyond what float32 can hold",
    "NONFINITE": "too many voxels are NaN or infinite",
    "SPACING_INVALID": "voxel spacing that is zero, negative or undefined, or of no scanner",
    "AFFINE_INVALID": "an affine that is undefined, singular or sheared",
    "QS_DISAGREE": "qform and sform place the voxels differently",
    "NO_ORIENTATION": "neither qform nor sform says which side is left",
    "EMPTY_BRAIN": "constant voxels, or an implausible brain mask",
    "MASK_MISSING": "no brain mask where the cohort's card says it lies",
    "MODALITY_GRID": "lies elsewhere than the other contrasts of its session",
    "REGISTRATION_FAILED": "cannot be aligned with its session's reference contrast, or with the template",
    "MASK_VALUES": "a label map with values that the cohort's card does not name",
    "MASK_GRID": "a label map that lies elsewhere than the scans of its session",
    "DUP_ID": "a second file for the same subject, session, run and contrast",
    "NOT_DICOM": "a folder without DICOM images",
    "DICOM_INVALID": "a DICOM file that cannot be parsed",
    "DICOM_TRUNCATED": "a DICOM file ends before its last pixel",
    "NOT_MR": "images of another modality, or no images",
    "LOCALIZER": "a localiser or calibration scan",
    "DERIVED": "computed from other images: a map, projection, reformat, subtraction or capture",
    "BURNED_IN": "text is burnt into the pixels",
    "NOT_STRUCTURAL": "diffusion, perfusion, susceptibility, angiography or another sequence that is not ours",
    "CONTRAST_UNDECIDED": "the sequence's attributes and name do not settle its contrast",
    "AGENT_UNDECIDED": "T1-weighted, but nothing tells whether with contrast agent",
    "AGENT_CONFLICT": "T1-weighted, with contradictory signs of contrast agent",
    "SERIES_MIXED": "a folder holds several series where one was found at first",
    "SLICES_MISSING": "a gap between the slices of a series",
    "SLICES_REPEATED": "two different images of a series lie at one place",
    "SLICES_UNEVEN": "the images of a series differ in size, spacing or direction",
    "CONVERT_FAILED": "dcm2niix did not convert the series, or not to what its headers say",
    "CONVERT_SEVERAL": "dcm2niix made several volumes of one series",
    "SESSION_MIXED": "a scan of another day than the rest of its session",
    "DUP_CONTENT": "the same bytes as a scan of another subject",
    "PHI_SUSPECT": "text that may identify a person, refused as asked",
}
# Of DICOM series that are no scan a cohort could ask for: told, but no more an input that failed than a file that fits
# no pattern of a NIfTI layout is.
ASIDE = frozenset({"NOT_MR", "LOCALIZER", "DERIVED", "NOT_STRUCTURAL"})
NOTES: Mapping[str, str] = {
    "SCALE_ODD": "intensity slope zero or undefined (taken as unscaled), or negative",
    "SPACING_ODD": "unusual voxel spacing, or spacing and affine disagree",
    "UNITS": "spatial units other than millimetres were converted, or are undefined",
    "SQUEEZED": "a trailing axis of one was dropped",
    "NONFINITE_FILLED": "a few NaN or infinite voxels were set to zero",
    "EXTRA_BYTES": "bytes after the last voxel were ignored",
    "ASSUMED_RAS": "no orientation in the header; RAS was assumed as asked",
    "QS_CHOSEN": "qform and sform disagree; one was chosen as asked",
    "MASK_FALLBACK": "brain mask by a classical fallback, not supplied",
    "MASK_SHARED": "the mask of another contrast of the session was used",
    "MASK_UNUSED": "a brain mask could not be used, and the next way to one was taken",
    "MASK_MODEL": "brain mask by a model or a program, not supplied",
    "MASK_ODD": "the brain mask is too small or large, is cut off, or disagrees with another contrast's",
    "MOVED": "moved by more than a centimetre to fit the session's reference contrast",
    "TEMPLATE_ODD": "after the fit to the template its brain mask is not that of the template: look at both",
    "LABELS_GRID": "a label map on the voxels of no scan, placed by its header",
    "LABELS_CUT": "a part of a label map lies outside the slices kept",
    "CROPPED": "brain outside the field of view of the stack was cut off",
    "PARTIAL_COVER": "the scan does not cover the whole brain mask",
    "PHI_SUSPECT": "text in header, sidecar or file name that may identify a person; it is not copied",
    "RUN_CHOSEN": "one of several runs was chosen by the declared rule",
    "DERIVED_USED": "an image that its header calls derived was used",
    "CONTRAST_BY_NAME": "the contrast of a DICOM series by its description, where attributes are missing",
    "CONTRAST_DECLARED": "the card's declared description overrides what the sequence's attributes say",
    "AGENT_SILENT": "T1w because nothing in its study tells of contrast agent before it",
    "FILES_IGNORED": "files beside a DICOM series, or copies of its images, were left out",
}


NAMED = re.compile(r"<[^<>]*>")


def named(name: str) -> str:
    """A path or an id as notes and reasons write it: in angle brackets, in which they write nothing else.

    So it can be found whole, and be replaced by what outputs call it.
    """
    return f"<{name.translate({ord('<'): '%3C', ord('>'): '%3E'})}>"


class Rejected(Exception):
    """This scan cannot be used. `code` is a key of `REJECTIONS`, `reason` says what was found and what to do."""

    def __init__(self, code: str, reason: str) -> None:
        if code not in REJECTIONS:
            raise KeyError(f"{code} is no code of a rejection")
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


@dataclass(frozen=True)
class Note:
    """Something odd about a scan that is used all the same. `code` is a key of `NOTES`."""

    code: str
    reason: str

    def __post_init__(self) -> None:
        if self.code not in NOTES:
            raise KeyError(f"{self.code} is no code of a note")
