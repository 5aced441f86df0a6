"""What a JSON sidecar, of BIDS or of dcm2niix, says of an acquisition: numbers and codes of a closed form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, TypeVar

from cranium.volume import privacy

AnyPath = TypeVar("AnyPath", bound=PurePath)
# Of the sidecar -> our name, unit, largest sensible value.
NUMBERS: Mapping[str, tuple[str, float, float]] = {
    "MagneticFieldStrength": ("field_tesla", 1, 20),
    "RepetitionTime": ("tr_ms", 1000, 60_000),
    "EchoTime": ("te_ms", 1000, 2_000),
    "InversionTime": ("ti_ms", 1000, 20_000),
    "FlipAngle": ("flip_degrees", 1, 360),
}
CODES: Mapping[str, tuple[str, str]] = {  # -> our name, the form a value must have
    "Manufacturer": ("manufacturer", "Siemens|GE|Philips|Canon|Toshiba|Hitachi|UIH|Bruker|Mediso"),
    "ManufacturersModelName": ("model", r"(?!.*\d{5})[A-Za-z][A-Za-z0-9 .+_/-]{0,39}"),
    "MRAcquisitionType": ("dimension", "2D|3D"),
    "ScanningSequence": ("scanning", r"[A-Z]{2}(\\[A-Z]{2})*"),
    "SequenceVariant": ("variant", r"[A-Z0-9]{2,4}(\\[A-Z0-9]{2,4})*"),
}


def beside(path: AnyPath) -> AnyPath:
    """Where the sidecar of a NIfTI file lies, if it has one."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")


def reviewed(sidecar: Mapping[str, Any]) -> dict[str, str | float]:
    """What may be kept of a sidecar: numbers of the sequence, and codes of a closed form. Everything else is dropped.

    dcm2niix leaves, even when asked to leave out identity, times, descriptions, stations and comments.
    """
    kept: dict[str, str | float] = {}
    for theirs, (ours, unit, largest) in NUMBERS.items():
        value = sidecar.get(theirs)
        if isinstance(value, int | float) and math.isfinite(value) and 0 < value * unit <= largest:
            kept[ours] = round(float(value * unit), 4)
    for theirs, (ours, form) in CODES.items():
        value = sidecar.get(theirs)
        if isinstance(value, str) and re.fullmatch(form, value) and not privacy.kinds(value):
            kept[ours] = value
    return kept


def acquisition(content: bytes) -> dict[str, str | float]:
    """`reviewed` of a sidecar's bytes; nothing where they are no JSON object."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return reviewed(found) if isinstance(found, dict) else {}
