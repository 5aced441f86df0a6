"""What a DICOM image says of itself: its sequence, where its planes are, whether it is whole.

Pixels are never read. Whatever a header holds of free text stays here and in `contrast`: reasons quote only words of a
closed vocabulary, because operators write names into descriptions. Attributes: DICOM PS3.3 and PS3.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import pydicom
from pydicom import config
from pydicom.tag import Tag
from pydicom.uid import UID

from cranium.volume.quality import Rejected

# Values that break a rule of form (a letter too many in a time) are as good as they were; each would print a warning.
config.settings.reading_validation_mode = config.IGNORE

START_BYTES = 1024  # of a file: its preamble and, of the meta group, the transfer syntax
DEFLATED = b"1.2.840.10008.1.2.1.99"  # unpacks without bound, and no archive of MRI uses it
DIRECTORY = "1.2.840.10008.1.3.10"  # the class of a DICOMDIR
TAIL_BYTES = 4096  # of a file, where compressed pixels end
END_OF_PIXELS = b"\xfe\xff\xdd\xe0"
GROUPS: Mapping[str, str] = {  # where Enhanced MR keeps what Classic MR has on top
    "RepetitionTime": "MRTimingAndRelatedParametersSequence",
    "FlipAngle": "MRTimingAndRelatedParametersSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "InversionTimes": "MRModifierSequence",
    "InversionRecovery": "MRModifierSequence",
    "DiffusionBValue": "MRDiffusionSequence",
    "ContrastBolusAgentAdministered": "ContrastBolusUsageSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "FrameType": "MRImageFrameTypeSequence",
}
TOP = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality ImageType SeriesNumber StudyDate "
    "SeriesDate AcquisitionDate SeriesTime AcquisitionTime AcquisitionDateTime SeriesDescription ProtocolName "
    "StudyDescription BodyPartExamined SequenceName PulseSequenceName EchoPulseSequence ScanningSequence "
    "SequenceVariant MRAcquisitionType EchoTime InversionTime AngioFlag AcquisitionContrast ContrastBolusAgent "
    "ContrastBolusAgentSequence ContrastBolusVolume ContrastBolusStartTime NumberOfTemporalPositions "
    "BurnedInAnnotation PhotometricInterpretation PixelRepresentation SamplesPerPixel NumberOfFrames Rows Columns "
    "BitsAllocated SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
)
TAGS = [Tag(keyword) for keyword in (*TOP.split(), *GROUPS, *sorted(set(GROUPS.values())))]


@dataclass(frozen=True)
class Header:
    """What an image says of its series; "", None or an empty set where it says nothing. Times of the sequence in ms."""

    uid: str
    study: str  # its UID
    date: str  # of the study, YYYYMMDD
    modality: str
    sop_class: str
    number: int  # of the series
    when: str  # date and time of acquisition, which sort as text
    image_type: tuple[str, ...]
    description: str  # free text: never to be shown
    protocol: str  # free text
    study_description: str  # free text
    sequence_name: str
    scanning: frozenset[str]  # SE, GR, IR, EP, RM
    variant: frozenset[str]  # SK, SP, SS, MP, MTC, ...
    dimension: str  # 2D or 3D
    tr: float | None
    te: float | None
    ti: float | None
    flip: float | None
    weighting: str  # AcquisitionContrast of Enhanced MR
    agent: str  # free text
    agent_given: str  # YES or NO, of Enhanced MR
    agent_volume: float | None
    agent_start: str  # time of day
    b_value: float | None
    temporal: float | None  # number of time points
    angio: bool
    burned_in: bool
    colour: bool
    inverted: bool  # the smallest number is the brightest
    body_part: str
    echoes: int = 1  # of its series
    echo: float | None = None  # this one, where the series has several: its echo time


@dataclass(frozen=True)
class Plane:
    """One image plane: DICOM's patient coordinates (LPS, mm), rows x columns, (row, column) spacing in mm."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]  # direction of increasing column, then of increasing row
    spacing: tuple[float, ...]
    shape: tuple[int, int]
    kind: tuple[int, int]  # bits of a pixel; signed or not
    echo: float | None


@dataclass(frozen=True)
class Image:
    """A DICOM file: its header, its planes (several in Enhanced MR), and what its pixels lack ("" for nothing)."""

    header: Header
    instance: str  # its UID
    planes: tuple[Plane, ...]
    lack: str


def parse(file: BinaryIO, size: int) -> Image | None:
    """The image of an open file, or None where it is no DICOM image (DICOMDIR included). Raises `Rejected`."""
    start = file.read(START_BYTES)
    if start[128:132] != b"DICM":
        return None
    if DEFLATED in start:
        raise Rejected("DICOM_INVALID", "deflated DICOM is not read; save it with another transfer syntax")
    file.seek(0)
    try:
        ds = pydicom.dcmread(file, stop_before_pixels=True, force=False, specific_tags=TAGS)
        if str(ds.file_meta.get("MediaStorageSOPClassUID", "")) == DIRECTORY:
            return None
        return Image(_header(ds), _text(ds, "SOPInstanceUID"), tuple(_planes(ds)), _lack(file, size, ds))
    except Exception as error:  # pydicom raises whatever its parser met; the text may quote the header
        raise Rejected("DICOM_INVALID", f"a DICOM file cannot be parsed ({type(error).__name__})") from error


def _value(ds: Any, keyword: str, frame: int = 0) -> Any:
    """A value on top of a data set, or in the functional groups of a frame, or in those that its frames share."""
    if keyword in ds:
        return ds.get(keyword)
    frames, shared = ds.get("PerFrameFunctionalGroupsSequence"), ds.get("SharedFunctionalGroupsSequence")
    group = GROUPS.get(keyword, "")
    for place in (frames[frame] if frames else None, shared[0] if shared else None):
        if place is not None and group in place and place.get(group):
            return place.get(group)[0].get(keyword)
    return None


def _text(ds: Any, keyword: str) -> str:
    value = _value(ds, keyword)
    return "" if value is None else str(value).strip()


def _words(ds: Any, keyword: str) -> tuple[str, ...]:
    value = _value(ds, keyword)
    if value is None or isinstance(value, str):
        value = [value or ""]
    return tuple(str(v).strip().upper() for v in value if str(v).strip())


def _number(ds: Any, keyword: str, frame: int = 0) -> float | None:
    values = _numbers(ds, keyword, frame)
    return values[0] if values else None


def _numbers(ds: Any, keyword: str, frame: int = 0) -> tuple[float, ...]:
    value = _value(ds, keyword, frame)
    if value is None or value == "":
        return ()
    try:
        return tuple(float(v) for v in value) if hasattr(value, "__len__") else (float(value),)
    except (TypeError, ValueError):
        return ()


def _header(ds: Any) -> Header:
    date = next((d for k in ("AcquisitionDate", "SeriesDate", "StudyDate") if (d := _text(ds, k))), "")
    time = next((t for k in ("AcquisitionTime", "SeriesTime") if (t := _text(ds, k))), "")
    pulse, inversion = _text(ds, "EchoPulseSequence"), _text(ds, "InversionRecovery")
    scanning = {"SPIN": {"SE"}, "GRADIENT": {"GR"}, "BOTH": {"SE", "GR"}}.get(pulse, set())
    echo = _number(ds, "EchoTime")
    bolus = "NOT NAMED" if ds.get("ContrastBolusAgentSequence") else ""
    return Header(
        uid=_text(ds, "SeriesInstanceUID"),
        study=_text(ds, "StudyInstanceUID"),
        date=_text(ds, "StudyDate") or date,
        modality=_text(ds, "Modality"),
        sop_class=str(UID(_text(ds, "SOPClassUID"))),
        number=int(_number(ds, "SeriesNumber") or 0),
        when=_text(ds, "AcquisitionDateTime") or (date + time if time else ""),
        image_type=_words(ds, "ImageType") + _words(ds, "FrameType"),
        description=_text(ds, "SeriesDescription"),
        protocol=_text(ds, "ProtocolName"),
        study_description=_text(ds, "StudyDescription"),
        sequence_name=_text(ds, "SequenceName") or _text(ds, "PulseSequenceName"),
        scanning=frozenset(
            {*_words(ds, "ScanningSequence"), *scanning, *({"IR"} if inversion == "YES" else ())}
        ),
        variant=frozenset(_words(ds, "SequenceVariant")),
        dimension=_text(ds, "MRAcquisitionType").upper(),
        tr=_number(ds, "RepetitionTime") or None,
        te=echo if echo is not None else _number(ds, "EffectiveEchoTime"),
        ti=_number(ds, "InversionTime") or _number(ds, "InversionTimes") or None,
        flip=_number(ds, "FlipAngle"),
        weighting=_text(ds, "AcquisitionContrast").upper(),
        agent=_text(ds, "ContrastBolusAgent") or bolus,
        agent_given=_text(ds, "ContrastBolusAgentAdministered").upper(),
        agent_volume=_number(ds, "ContrastBolusVolume"),
        agent_start=_text(ds, "ContrastBolusStartTime"),
        b_value=_number(ds, "DiffusionBValue"),
        temporal=_number(ds, "NumberOfTemporalPositions"),
        angio=_text(ds, "AngioFlag").upper() == "Y",
        burned_in=_text(ds, "BurnedInAnnotation").upper() == "YES",
        colour=(_number(ds, "SamplesPerPixel") or 1) > 1 or "COLOR" in _text(ds, "PhotometricInterpretation"),
        inverted=_text(ds, "PhotometricInterpretation").upper() == "MONOCHROME1",
        body_part=_text(ds, "BodyPartExamined").upper(),
    )


def _planes(ds: Any) -> Iterator[Plane]:
    echo = _number(ds, "EchoTime")
    for frame in range(len(ds.get("PerFrameFunctionalGroupsSequence") or [None])):
        yield Plane(
            position=_numbers(ds, "ImagePositionPatient", frame),
            orientation=_numbers(ds, "ImageOrientationPatient", frame),
            spacing=_numbers(ds, "PixelSpacing", frame),
            shape=(int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)),
            kind=(int(ds.get("BitsAllocated") or 0), int(ds.get("PixelRepresentation") or 0)),
            echo=echo if echo is not None else _number(ds, "EffectiveEchoTime", frame),
        )


def _lack(file: BinaryIO, size: int, ds: Any) -> str:
    """What is missing of the pixels; the file stands at their element, if there is one."""
    at, syntax = file.tell(), ds.file_meta.TransferSyntaxUID
    order = "little" if syntax.is_little_endian else "big"
    wide = 8 if syntax.is_implicit_VR else 12  # tag, (kind,) length
    head = file.read(wide)
    group, element = (int.from_bytes(head[i : i + 2], order) for i in (0, 2))  # type: ignore[arg-type]
    if (group, element) != (0x7FE0, 0x0010) or len(head) < wide:
        return "it holds no pixels"
    if syntax.is_compressed:
        file.seek(max(0, size - TAIL_BYTES))
        return "" if END_OF_PIXELS in file.read() else "its compressed pixels have no end"
    samples = int(ds.get("SamplesPerPixel") or 1) * int(ds.get("NumberOfFrames") or 1)
    need = (
        int(ds.get("Rows") or 0)
        * int(ds.get("Columns") or 0)
        * samples
        * int(ds.get("BitsAllocated") or 0)
        // 8
    )
    have = size - at - wide
    return "" if have >= need > 0 else f"it ends {need - have} bytes early" if need else "it has no size"
