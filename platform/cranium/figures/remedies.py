"""What a person can do about a rejected scan, by code; the reason beside it says what was found."""

from __future__ import annotations

from collections.abc import Mapping

from cranium.volume.quality import NOTES, REJECTIONS

_AGAIN = "Download the file again and compare its checksum with the source's."
_HEADER = "Repair the header from the original DICOM, or leave the scan out."
REMEDIES: Mapping[str, str] = {
    "IO": "Check permissions and the disk; run again when the file no longer changes.",
    "NOT_REGULAR": "Put the file itself where the link or device is.",
    "NOT_NIFTI": "Look at the file: a web page or an archive in its place is a failed download.",
    "EXT_MISMATCH": "Rename it to .nii or .nii.gz, whichever it is.",
    "GZ_TRUNCATED": _AGAIN,
    "GZ_CRC": _AGAIN,
    "GZ_TRAILING": _AGAIN,
    "BOMB": "Don't trust this file; ask where it comes from.",
    "HEADER_INVALID": _HEADER,
    "DIMS_LIMIT": _HEADER,
    "DIMS_INVALID": _HEADER,
    "NDIM": "Take one volume out of the series, or point the card at the right file.",
    "DTYPE": "Convert to integers or floats; colour and complex images are no scans.",
    "SCALE_INVALID": _HEADER,
    "RANGE": "Rescale the intensities in the source.",
    "NONFINITE": "Find out which step made NaN and leave it out.",
    "SPACING_INVALID": _HEADER,
    "AFFINE_INVALID": _HEADER,
    "QS_DISAGREE": "Find out which of the two is right, then set ingest.orientation to it.",
    "NO_ORIENTATION": "Convert again from DICOM with dcm2niix; or say that it is RAS, if you know it.",
    "EMPTY_BRAIN": "Look at the scan and its mask; supply a mask, or leave the scan out.",
    "MASK_MISSING": "Add the mask, or let ingest.mask fall back on another way.",
    "MODALITY_GRID": "Check that the scans are of one session; co-register them (ingest.align).",
    "DUP_ID": "Keep one file, or give each its run or session in the name.",
}


def meaning(code: str) -> str:
    """What a code of a rejection or a note means."""
    return REJECTIONS.get(code) or NOTES.get(code) or "see its reason"


def remedy(code: str) -> str:
    """What to do about a rejection."""
    return REMEDIES.get(code, "See its reason.")
