"""Phantom DICOM series and trees: the heads of `phantoms`, written as scanners and archives give them.

A series is sampled on a grid (RAS affine) and written one file a slice, or as one Enhanced MR file. `SEQUENCES` holds
the attributes that tell a contrast, in the manner of three makers; `nbia_tree` and `loni_tree` give the folders of the
two archives. Everything follows from names and seeds: equal calls write equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage

import phantoms

SHAPE = (24, 28, 14)
SPACING = (8.0, 8.0, 8.0)
SECRET = "DOE^JANET"  # the name that must appear in no output
SEQUENCES: Mapping[str, Mapping[str, Any]] = {
    "mprage": {  # Siemens
        "contrast": "T1w",
        "SeriesDescription": "MPRAGE",
        "ScanningSequence": ["GR", "IR"],
        "SequenceVariant": ["SK", "SP", "MP"],
        "MRAcquisitionType": "3D",
        "RepetitionTime": 2300.0,
        "EchoTime": 2.98,
        "InversionTime": 900.0,
        "FlipAngle": 9.0,
    },
    "spgr": {  # GE: no inversion is stored
        "contrast": "T1w",
        "Manufacturer": "GE MEDICAL SYSTEMS",
        "ManufacturerModelName": "SIGNA EXCITE",
        "SeriesDescription": "Sag 3D SPGR",
        "ScanningSequence": "GR",
        "SequenceVariant": ["SS", "SP", "SK"],
        "MRAcquisitionType": "3D",
        "RepetitionTime": 9.0,
        "EchoTime": 3.2,
        "InversionTime": 0.0,
        "FlipAngle": 12.0,
    },
    "t1": {
        "contrast": "T1w",
        "SeriesDescription": "t1 axial",
        "ScanningSequence": "SE",
        "SequenceVariant": "OSP",
        "MRAcquisitionType": "2D",
        "RepetitionTime": 600.0,
        "EchoTime": 12.0,
        "FlipAngle": 90.0,
    },
    "t1_post": {  # with agent, by attribute and by name
        "contrast": "T1ce",
        "SeriesDescription": "t1 axial stealth-post",
        "ScanningSequence": ["GR", "IR"],
        "SequenceVariant": ["SK", "SP", "MP"],
        "MRAcquisitionType": "3D",
        "RepetitionTime": 1760.0,
        "EchoTime": 3.1,
        "InversionTime": 950.0,
        "FlipAngle": 15.0,
        "ContrastBolusAgent": "MULTIHANCE",
    },
    "t2": {  # Philips
        "contrast": "T2w",
        "Manufacturer": "Philips Medical Systems",
        "ManufacturerModelName": "Achieva",
        "SeriesDescription": "T2W_TSE",
        "ScanningSequence": "SE",
        "SequenceVariant": "SK",
        "MRAcquisitionType": "2D",
        "RepetitionTime": 3000.0,
        "EchoTime": 80.0,
        "FlipAngle": 90.0,
    },
    "flair": {
        "contrast": "FLAIR",
        "SeriesDescription": "AX FLAIR",
        "ScanningSequence": ["SE", "IR"],
        "SequenceVariant": ["SK", "SP", "MP"],
        "MRAcquisitionType": "2D",
        "RepetitionTime": 9420.0,
        "EchoTime": 141.0,
        "InversionTime": 2500.0,
        "FlipAngle": 170.0,
    },
    "pd": {
        "contrast": "PDw",
        "SeriesDescription": "PD TSE",
        "ScanningSequence": "SE",
        "SequenceVariant": "SK",
        "MRAcquisitionType": "2D",
        "RepetitionTime": 3000.0,
        "EchoTime": 13.0,
        "FlipAngle": 150.0,
    },
    "t2star": {
        "contrast": None,
        "SeriesDescription": "T2* GRE",
        "ScanningSequence": "GR",
        "SequenceVariant": "SP",
        "MRAcquisitionType": "2D",
        "RepetitionTime": 650.0,
        "EchoTime": 20.0,
        "FlipAngle": 20.0,
    },
    "dwi": {
        "contrast": None,
        "SeriesDescription": "ep2d_diff",
        "ScanningSequence": ["EP", "SE"],
        "SequenceVariant": "SK",
        "MRAcquisitionType": "2D",
        "RepetitionTime": 8000.0,
        "EchoTime": 90.0,
        "FlipAngle": 90.0,
    },
    "adc": {
        "contrast": None,
        "SeriesDescription": "ep2d_diff_ADC",
        "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC", "ND"],
        "ScanningSequence": ["EP", "SE"],
        "SequenceVariant": "SK",
        "MRAcquisitionType": "2D",
        "RepetitionTime": 8000.0,
        "EchoTime": 90.0,
        "FlipAngle": 90.0,
    },
    "localizer": {
        "contrast": None,
        "SeriesDescription": "3 Plane Localizer",
        "ImageType": ["ORIGINAL", "PRIMARY", "M", "LOCALIZER"],
        "ScanningSequence": "GR",
        "SequenceVariant": "SP",
        "MRAcquisitionType": "2D",
        "RepetitionTime": 8.6,
        "EchoTime": 4.0,
        "FlipAngle": 20.0,
    },
    "ct": {"contrast": None, "Modality": "CT", "SeriesDescription": "HEAD CT", "SOPClassUID": CTImageStorage},
}
_TISSUES = {"T1w": "T1w", "T1ce": "T1ce", "T2w": "T2w", "FLAIR": "FLAIR", "PDw": "T2w"}


def uid(*parts: object) -> str:
    """A UID below 2.25 that follows from its parts."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:15], 'big')}"


def grid(
    tilt: Sequence[float] = (0.0, 0.0, 0.0), shape: Sequence[int] = SHAPE, spacing: Sequence[float] = SPACING
) -> np.ndarray:
    return phantoms.affine(spacing, shape, tilt)


def voxels(
    sequence: str, seed: int = 0, shape: Sequence[int] = SHAPE, affine: np.ndarray | None = None
) -> np.ndarray:
    """int16 [I, J, K] of the head of a seed, in the contrast of a sequence."""
    labels = phantoms.tissues(phantoms.head(seed), shape, grid(shape=shape) if affine is None else affine)
    contrast = SEQUENCES[sequence]["contrast"]
    return phantoms.intensities(labels, _TISSUES.get(contrast or "T2w", "T2w"), seed)


def series(
    folder: Path,
    sequence: str = "mprage",
    *,
    seed: int = 0,
    subject: str = "P1",
    study: str = "s1",
    number: int = 1,
    time: str = "101500",
    date: str = "20200102",
    tilt: Sequence[float] = (0.0, 0.0, 0.0),
    shape: Sequence[int] = SHAPE,
    spacing: Sequence[float] = SPACING,
    data: np.ndarray | None = None,
    skip: Sequence[int] = (),
    name: str = "1-{:02}.dcm",
    phi: bool = False,
    **attributes: Any,
) -> list[Path]:
    """Write one series of one file a slice, [I, J] its columns and rows, slices along K; the paths, in order.

    `skip`: slices that are not written. `attributes` replace those of the sequence; None removes one; a callable is
    asked with the slice's index. `phi` adds a patient's name wherever a scanner or an operator may leave it.
    """
    affine = grid(tilt, shape, spacing)
    values = voxels(sequence, seed, shape, affine) if data is None else data
    wanted = {**SEQUENCES[sequence], **attributes}
    series_uid = uid(subject, study, number, sequence)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(shape[2]):
        if k in skip:
            continue
        ds = _slice(values[:, :, k], affine, k)
        ds.InstanceNumber = k + 1
        _identify(ds, subject, study, series_uid, number, date, time, phi)
        _apply(ds, wanted, k)
        paths.append(_save(ds, folder / name.format(k + 1), uid(series_uid, k, wanted.get("EchoTime"))))
    return paths


def enhanced(
    folder: Path,
    sequence: str = "flair",
    *,
    seed: int = 0,
    subject: str = "P1",
    study: str = "s1",
    number: int = 1,
    tilt: Sequence[float] = (0.0, 0.0, 0.0),
    shape: Sequence[int] = SHAPE,
    spacing: Sequence[float] = SPACING,
    skip: Sequence[int] = (),
    **attributes: Any,
) -> Path:
    """The same series as one Enhanced MR file, its attributes in functional groups."""
    affine = grid(tilt, shape, spacing)
    values = voxels(sequence, seed, shape, affine)
    wanted = {**SEQUENCES[sequence], **attributes}
    kept = [k for k in range(shape[2]) if k not in skip]
    ds = _slice(values[:, :, 0], affine, 0)
    row, place, spaced = ds.ImageOrientationPatient, [], ds.PixelSpacing
    thickness = ds.SliceThickness
    for tag in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness"):
        delattr(ds, tag)
    del ds.SpacingBetweenSlices
    for index, k in enumerate(kept):
        position = _slice(values[:, :, k], affine, k).ImagePositionPatient
        content = _items(DimensionIndexValues=[1, index + 1], StackID="1", InStackPositionNumber=index + 1)
        place.append(
            _item(FrameContentSequence=content, PlanePositionSequence=_items(ImagePositionPatient=position))
        )
    inverted = "InversionTime" in wanted
    modifier = {"InversionRecovery": "YES" if inverted else "NO"}
    if inverted:
        modifier["InversionTimes"] = wanted["InversionTime"]
    timing = {"RepetitionTime": wanted["RepetitionTime"], "FlipAngle": wanted["FlipAngle"]}
    shared = _item(
        PlaneOrientationSequence=_items(ImageOrientationPatient=row),
        PixelMeasuresSequence=_items(
            PixelSpacing=spaced, SliceThickness=thickness, SpacingBetweenSlices=thickness
        ),
        MRTimingAndRelatedParametersSequence=_items(**timing),
        MREchoSequence=_items(EffectiveEchoTime=wanted["EchoTime"]),
        MRModifierSequence=_items(**modifier),
        PixelValueTransformationSequence=_items(RescaleIntercept=0.0, RescaleSlope=1.0, RescaleType="US"),
    )
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = Items([shared]), Items(place)
    ds.NumberOfFrames = len(kept)
    ds.PixelData = b"".join(np.ascontiguousarray(values[:, :, k].T).astype("<i2").tobytes() for k in kept)
    ds.EchoPulseSequence = "SPIN" if "SE" in wanted["ScanningSequence"] else "GRADIENT"
    _identify(ds, subject, study, uid(subject, study, number, sequence), number, "20200102", "101500", False)
    inside = (
        "contrast",
        "ScanningSequence",
        "SequenceVariant",
        "RepetitionTime",
        "EchoTime",
        "InversionTime",
    )
    top = {k: v for k, v in wanted.items() if k not in (*inside, "FlipAngle")}
    _apply(ds, {"SOPClassUID": EnhancedMRImageStorage, **top}, 0)
    folder.mkdir(parents=True, exist_ok=True)
    return _save(ds, folder / "1-1.dcm", uid(subject, study, number, sequence, "enhanced"))


def nbia_tree(root: Path, collection: str = "UPENN-GBM", num_subjects: int = 2, seed: int = 0) -> Path:
    """A TCIA download with descriptive names: `collection/subject/date-NA-study-uid/3.000000-series-uid/1-01.dcm`.

    Each subject has one study: localizer, T1w, FLAIR, T2w, DWI, ADC, T1ce, and a CT of the same day.
    """
    order = ("localizer", "t1", "flair", "t2", "dwi", "adc", "t1_post", "ct")
    for index in range(num_subjects):
        subject = f"{collection}-{index + 1:05}"
        study = root / collection / subject / f"01-0{index + 2}-2020-NA-BRAIN ROUTINE-{10000 + index}"
        for number, sequence in enumerate(order, 1):
            described = SEQUENCES[sequence]["SeriesDescription"].replace("*", "")
            folder = study / f"{number}.000000-{described}-{20000 + number}"
            slices = SHAPE[2] if sequence in ("t1", "flair", "t2", "t1_post") else 4
            place = {"subject": subject, "number": number, "time": f"10{number:02}00", "seed": seed + index}
            series(folder, sequence, shape=(*SHAPE[:2], slices), **place)
    (root / collection / "LICENSE").write_text("CC BY 4.0\n")
    return root


def loni_tree(root: Path, project: str = "ADNI", num_subjects: int = 2, seed: int = 0) -> Path:
    """A LONI download: `project/subject/description/date_time/I123/*.dcm`, with a repeated MPRAGE and a dual echo."""
    for index in range(num_subjects):
        subject = f"00{index + 2}_S_0{413 + index}"
        base = {"subject": subject, "seed": seed + index, "study": "v1", "date": "20060502"}
        image = 14000 + 100 * index
        plan = (
            ("mprage", "MPRAGE", "123152"),
            ("mprage", "MPRAGE_REPEAT", "124001"),
            ("dual", "PD_T2", "125010"),
        )
        for number, (sequence, name, time) in enumerate(plan, 1):
            stamp = f"2006-05-02_{time[:2]}_{time[2:4]}_{time[4:]}.0"
            folder = root / project / subject / name / stamp / f"I{image + number}"
            file = f"{project}_{subject}_MR_{name}_br_raw_20060503_{{}}_S{number}_I{image + number}.dcm"
            place = {**base, "number": number, "time": time, "SeriesDescription": name.replace("_", " ")}
            if sequence != "dual":
                series(folder, sequence, name=file, **place)
            else:
                dual_echo(folder, name=file, **place)
    return root


def dual_echo(
    folder: Path, *, name: str = "1-{}.dcm", echoes: Sequence[float] = (13.0, 80.0), **place: Any
) -> None:
    """One series of two echoes, proton density and T2, their files interleaved."""
    place = {"SeriesDescription": "AX PD/T2", **place}
    tilt, shape, spacing = (
        place.get("tilt", (0, 0, 0)),
        place.get("shape", SHAPE),
        place.get("spacing", SPACING),
    )
    for echo, (sequence, time) in enumerate(zip(("pd", "t2"), echoes, strict=True)):
        data = voxels(sequence, place.get("seed", 0), shape, grid(tilt, shape, spacing)) // (1 + echo)
        numbered = [name.format(2 * k + echo + 1) for k in range(shape[2])]
        paths = series(
            folder,
            "pd",
            data=data,
            name=f"echo{echo}-{{}}",
            EchoTime=time,
            EchoNumbers=echo + 1,
            InstanceNumber=lambda k, echo=echo: 2 * k + echo + 1,
            **place,
        )
        for path, final in zip(paths, numbered, strict=True):
            path.rename(path.with_name(final))


def _slice(pixels: np.ndarray, affine: np.ndarray, k: int) -> Dataset:
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    ds = Dataset()
    ds.ImageOrientationPatient = [f"{v:.12g}"[:16] for v in (lps[:3, :2] / spacing[:2]).T.ravel()]
    ds.ImagePositionPatient = [f"{v:.10g}"[:16] for v in lps[:3, 3] + k * lps[:3, 2]]
    ds.PixelSpacing = [float(spacing[1]), float(spacing[0])]
    ds.SliceThickness = ds.SpacingBetweenSlices = float(spacing[2])
    ds.Rows, ds.Columns = pixels.shape[1], pixels.shape[0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelData = np.ascontiguousarray(pixels.T).astype("<i2").tobytes()
    return ds


def _identify(
    ds: Dataset, subject: str, study: str, series_uid: str, number: int, date: str, time: str, phi: bool
) -> None:
    ds.SOPClassUID, ds.Modality = MRImageStorage, "MR"
    ds.Manufacturer, ds.ManufacturerModelName, ds.MagneticFieldStrength = "SIEMENS", "TrioTim", 3.0
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
    ds.PatientID, ds.PatientName, ds.PatientPosition = subject, subject, "HFS"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SeriesNumber = uid(subject, study), series_uid, number
    ds.FrameOfReferenceUID = uid(subject, study, "frame")
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = date
    ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = time
    ds.AcquisitionNumber, ds.StudyID = 1, "1"
    if phi:
        ds.PatientName, ds.PatientBirthDate, ds.InstitutionName = SECRET, "19500102", f"{SECRET} CLINIC"
        ds.ReferringPhysicianName, ds.DeviceSerialNumber, ds.StationName = SECRET, "SN-998877", SECRET
        ds.ImageComments = ds.StudyDescription = ds.ProtocolName = ds.PatientComments = SECRET
        block = ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "LO", SECRET)


def _apply(ds: Dataset, attributes: Mapping[str, Any], k: int) -> None:
    for name, value in attributes.items():
        if name == "contrast":
            continue
        value = value(k) if callable(value) else value
        if value is not None:
            setattr(ds, name, value)
        elif name in ds:
            delattr(ds, name)


def _save(ds: Dataset, path: Path, instance: str) -> Path:
    ds.SOPInstanceUID = instance
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), ds, file_meta=meta, preamble=b"\0" * 128)
    file.save_as(path, enforce_file_format=True)
    return path


def _item(**values: Any) -> Dataset:
    ds = Dataset()
    for name, value in values.items():
        setattr(ds, name, value)
    return ds


def _items(**values: Any) -> Items:
    return Items([_item(**values)])
