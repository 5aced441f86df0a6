"""The header of a NIfTI-1 or NIfTI-2 file: every field that shapes the result is checked, the rest is dropped.

Nothing of the size that a header declares is allocated here. Field meanings: nifti1.h, Cox et al. 2004,
https://nifti.nimh.nih.gov. Every failure is a `Rejected` with a code of `quality.REJECTIONS`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.quaternions import quat2mat
from numpy.typing import NDArray

from cranium.volume.quality import Note, Rejected

Orientation = Literal["agree", "sform", "qform", "assume_ras"]

MAX_EXTENSION_BYTES = 16 << 20
SPACING_MM = (0.05, 50.0)  # beyond: rejected
USUAL_SPACING_MM = (0.3, 8.0)  # beyond: noted
MAX_SHEAR = 0.02  # largest |cosine| between two voxel axes
MAX_FROM_ORIGIN_MM = 10_000.0  # of the first voxel
DTYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micrometre
TEXTS = ("descrip", "aux_file", "intent_name", "db_name", "data_type")  # fields where people leave words


@dataclass(frozen=True)
class Header:
    dims: tuple[int, int, int]
    dtype: np.dtype[Any]  # with its byte order
    offset: int  # of the first voxel
    slope: float
    intercept: float
    affine: NDArray[np.float64]  # voxel index -> RAS+ world mm
    texts: Mapping[str, str]  # field -> what stands in it, for the privacy check only

    @property
    def voxels(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        return self.voxels * self.dtype.itemsize


def block(start: bytes) -> Any:
    """The header's fields by name, in native numbers (nibabel's record, none of its checks)."""
    for order in "<>":
        size = struct.unpack(f"{order}i", start[:4])[0] if len(start) >= 4 else 0
        kinds = {348: (nib.Nifti1Header, b"n+1\0"), 540: (nib.Nifti2Header, b"n+2\0")}
        if size in kinds and len(start) >= size:
            kind, magic = kinds[size]
            header = kind(start[:size], order, check=False)
            if bytes(start[344:348] if size == 348 else start[4:8]) == magic:
                return header
            raise Rejected(
                "NOT_NIFTI", "no single-file NIfTI (.hdr/.img pairs are not read); convert it to .nii.gz"
            )
    hint = "a web page, so the download failed" if b"<" in start[:64].lstrip()[:1] else "no NIfTI header"
    raise Rejected("NOT_NIFTI", f"the file holds {hint}")


def parse(header: Any, max_bytes: int, orientation: Orientation, notes: list[Note]) -> Header:
    """Check every field that shapes the result, before anything of its size is allocated."""
    fields = header.structarr
    dims = _dims(fields, notes)
    code, bitpix = int(fields["datatype"]), int(fields["bitpix"])
    if code not in DTYPES:
        raise Rejected(
            "DTYPE", f"datatype {code} (colour, complex, extended or unknown) is no scan; convert it"
        )
    dtype = np.dtype(header.endianness + DTYPES[code])
    if bitpix != dtype.itemsize * 8:
        raise Rejected("HEADER_INVALID", f"bitpix {bitpix} does not fit datatype {code}")
    offset = float(fields["vox_offset"])
    if not int(fields["sizeof_hdr"]) + 4 <= offset <= MAX_EXTENSION_BYTES or offset != int(offset):
        raise Rejected("HEADER_INVALID", f"voxels cannot start at byte {offset}")
    needed = math.prod(dims) * max(dtype.itemsize, 4)  # as stored, and as float32
    if needed > max_bytes:
        raise Rejected("DIMS_LIMIT", f"{dims} voxels take {needed} bytes; at most {max_bytes} are read")
    slope, intercept = _scale(float(fields["scl_slope"]), float(fields["scl_inter"]), notes)
    affine = _affine(header, dims, orientation, notes)
    texts = {name: _text(fields[name]) for name in TEXTS if name in (fields.dtype.names or ())}
    return Header(dims, dtype, int(offset), slope, intercept, affine, texts)


def _text(field: Any) -> str:
    return bytes(field.item()).rstrip(b"\0").decode("utf-8", "replace")


def _dims(fields: Any, notes: list[Note]) -> tuple[int, int, int]:
    ndim = int(fields["dim"][0])
    if not 0 <= ndim <= 7:
        raise Rejected(
            "DIMS_LIMIT" if ndim > 7 else "DIMS_INVALID", f"{ndim} axes; a NIfTI file has at most 7"
        )
    dims = [int(d) for d in fields["dim"][1 : ndim + 1]]
    if any(d < 1 for d in dims):
        raise Rejected("DIMS_INVALID", f"an axis has no voxels: {dims}")
    if ndim < 3 or any(d > 1 for d in dims[3:]):
        raise Rejected(
            "NDIM", f"shape {dims} is not one volume; split it and name the right part in the card"
        )
    if any(d == 1 for d in dims[:3]):
        raise Rejected("DIMS_INVALID", f"an axis has one voxel only: {dims}")
    if ndim > 3:
        notes.append(Note("SQUEEZED", f"shape {dims} read as {dims[:3]}"))
    return dims[0], dims[1], dims[2]


def _scale(slope: float, intercept: float, notes: list[Note]) -> tuple[float, float]:
    """NIfTI: a slope of zero means unscaled; writers use NaN for the same."""
    if slope == 0 or math.isnan(slope):
        notes.append(Note("SCALE_ODD", f"scl_slope is {slope}: read unscaled"))
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(intercept):
        raise Rejected("SCALE_INVALID", f"scl_slope {slope}, scl_inter {intercept}")
    if slope < 0:
        notes.append(Note("SCALE_ODD", f"scl_slope is {slope}: intensities run backwards in the file"))
    return slope, intercept


def _affine(
    header: Any, dims: tuple[int, int, int], orientation: Orientation, notes: list[Note]
) -> NDArray[np.float64]:
    fields = header.structarr
    pixdim = np.asarray(fields["pixdim"][1:4], np.float64)
    if not np.all(np.isfinite(pixdim)) or np.any(pixdim <= 0):
        raise Rejected("SPACING_INVALID", f"pixdim {pixdim.tolist()}")
    code = int(fields["xyzt_units"]) & 7
    unit = UNITS_MM.get(code, 1.0)
    if unit != 1.0:
        notes.append(Note("UNITS", f"1 unit of length in the header is {unit:g} mm"))
    elif code not in UNITS_MM:
        notes.append(Note("UNITS", f"length has the undefined unit {code}; taken as mm"))
    affine = _choose(header, pixdim, dims, orientation, notes)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if np.any(np.abs(spacing / pixdim - 1) > 0.01):
        notes.append(
            Note("SPACING_ODD", f"pixdim {pixdim.round(4).tolist()}, affine {spacing.round(4).tolist()}")
        )
    spacing = spacing * unit
    low, high = SPACING_MM
    if not np.all((spacing >= low) & (spacing <= high)):
        raise Rejected("SPACING_INVALID", f"spacing {spacing.tolist()} mm is outside {low} to {high} mm")
    if np.any(spacing < USUAL_SPACING_MM[0]) or np.any(spacing > USUAL_SPACING_MM[1]):
        notes.append(Note("SPACING_ODD", f"spacing {spacing.round(4).tolist()} mm"))
    affine = np.diag([unit, unit, unit, 1.0]) @ affine
    if np.abs(affine[:3, 3]).max() > MAX_FROM_ORIGIN_MM:
        raise Rejected("AFFINE_INVALID", f"the first voxel lies at {affine[:3, 3].tolist()} mm")
    return affine


def _choose(
    header: Any, pixdim: NDArray[np.float64], dims: tuple[int, int, int], orientation: Orientation,
    notes: list[Note],
) -> NDArray[np.float64]:  # fmt: skip
    """sform before qform, as the standard's method 3 before method 2; both must agree unless one was asked for."""
    found = {}
    if int(header.structarr["sform_code"]) > 0:
        found["sform"] = _sform
    if int(header.structarr["qform_code"]) > 0:
        found["qform"] = _qform
    if not found:
        if orientation != "assume_ras":
            raise Rejected("NO_ORIENTATION", "neither qform nor sform is set, so left and right are unknown")
        notes.append(Note("ASSUMED_RAS", "no orientation in the header"))
        affine = np.diag([*pixdim, 1.0])
        affine[:3, 3] = -0.5 * pixdim * (np.array(dims) - 1)
        return affine
    name = orientation if orientation in found else next(iter(found))
    affine = found[name](header)
    if len(found) == 2:
        apart = _apart(affine, found["qform" if name == "sform" else "sform"], header, dims, orientation)
        if apart > float(pixdim.min()):
            if orientation != name:
                raise Rejected("QS_DISAGREE", f"qform and sform place a corner {apart:.1f} apart")
            notes.append(Note("QS_CHOSEN", f"{name} taken; the other is up to {apart:.1f} away"))
    return affine


def _apart(
    affine: NDArray[np.float64], other: Any, header: Any, dims: tuple[int, int, int], orientation: Orientation
) -> float:
    """The largest distance of a corner under two affines; infinite where the one that was not asked for is broken."""
    try:
        second = other(header)
    except Rejected:
        if orientation not in ("sform", "qform"):
            raise
        return math.inf
    corners = np.array(np.meshgrid(*[(0, d - 1) for d in dims], [1.0], indexing="ij")).reshape(4, -1)
    corners[3] = 1
    return float(np.linalg.norm(((affine - second) @ corners)[:3], axis=0).max())


def _sform(header: Any) -> NDArray[np.float64]:
    return _checked(np.asarray(header.get_sform(), np.float64), "sform")


def _qform(header: Any) -> NDArray[np.float64]:
    fields = header.structarr
    b, c, d = (float(fields[f"quatern_{axis}"]) for axis in "bcd")
    if not np.isfinite([b, c, d]).all() or max(map(abs, (b, c, d))) > 2 or b * b + c * c + d * d > 1 + 1e-5:
        raise Rejected("AFFINE_INVALID", f"quaternion ({b}, {c}, {d}) is no rotation")
    qfac = float(fields["pixdim"][0])
    if qfac not in (-1.0, 0.0, 1.0):
        raise Rejected("AFFINE_INVALID", f"qfac {qfac} is neither 1 nor -1")
    a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    affine = np.eye(4)
    spacing = np.asarray(fields["pixdim"][1:4], np.float64) * (1, 1, -1.0 if qfac == -1 else 1.0)
    affine[:3, :3] = quat2mat([a, b, c, d]) * spacing
    affine[:3, 3] = [float(fields[f"qoffset_{axis}"]) for axis in "xyz"]
    return _checked(affine, "qform")


def _checked(affine: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    if not np.isfinite(affine).all() or np.abs(affine).max() > 1e9:
        raise Rejected("AFFINE_INVALID", f"{name} holds NaN, infinity or numbers beyond any scanner")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if np.any(lengths < 1e-6):
        raise Rejected("AFFINE_INVALID", f"{name} is singular")
    cosines = (affine[:3, :3] / lengths).T @ (affine[:3, :3] / lengths) - np.eye(3)
    shear = np.abs(cosines).max()
    if shear > MAX_SHEAR:
        raise Rejected("AFFINE_INVALID", f"{name} is sheared or singular: axes at a cosine of {shear:.3f}")
    return affine
