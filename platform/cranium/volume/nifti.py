"""Verified reading of one NIfTI-1 or NIfTI-2 volume, and its reorientation to RAS.

The usual readers accept damaged files silently. Here the gzip stream is read to its end, so that its CRC and length
are checked, every header field that shapes the result is checked before anything is allocated, and whatever fails is
rejected with a code (`quality.REJECTIONS`). Field meanings: nifti1.h, Cox et al. 2004, https://nifti.nimh.nih.gov.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from isal import isal_zlib
from nibabel.quaternions import quat2mat
from numpy.typing import NDArray

from cranium.volume.quality import Note, Rejected

Orientation = Literal["agree", "sform", "qform", "assume_ras"]

MAX_BYTES = 2 << 30  # of voxels in a file
SLACK_BYTES = 1 << 20  # what a file may hold after its last voxel
MAX_EXTENSION_BYTES = 16 << 20
SPACING_MM = (0.05, 50.0)  # beyond: rejected
USUAL_SPACING_MM = (0.3, 8.0)  # beyond: noted
MAX_SHEAR = 0.02  # largest |cosine| between two voxel axes
MAX_NONFINITE = 1e-3  # share of the voxels
MAX_MAGNITUDE = 1e30
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


@dataclass(frozen=True)
class Volume:
    """A volume as stored: `data` float32 [I, J, K], `affine` voxel index -> RAS+ world mm."""

    data: NDArray[np.float32]
    affine: NDArray[np.float64]
    notes: tuple[Note, ...]
    sha256: str  # of the file's bytes
    acquisition: Mapping[str, str | float] = field(default_factory=dict)  # of DICOM: the reviewed sidecar


@dataclass(frozen=True)
class _Header:
    order: str  # byte order, < or >
    dims: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    affine: NDArray[np.float64]

    @property
    def nbytes(self) -> int:
        return int(np.prod([int(d) for d in self.dims], dtype=object)) * self.dtype.itemsize


def read(
    path: Path,
    *,
    root: Path | None = None,
    max_bytes: int = MAX_BYTES,
    orientation: Orientation = "agree",
    labels: bool = False,
) -> Volume:
    """Read and verify a `.nii` or `.nii.gz` file. Raises `Rejected`.

    `root`: a link that leads out of this folder is refused. `max_bytes` bounds both the file and its voxels.
    `orientation`: with "agree", qform and sform must agree within a voxel and one must be set; "sform" or "qform"
    settles a disagreement, "assume_ras" also accepts a header without either. `labels`: a label map, which may be
    the same everywhere (nothing is labelled).
    """
    content = _read_file(path, root, max_bytes)
    digest = hashlib.sha256(content).hexdigest()
    notes: list[Note] = []
    header, body = _unpack(path, content, max_bytes, orientation, notes)
    end = header.offset + header.nbytes
    if len(body) > end and any(body[end:]):
        notes.append(Note("EXTRA_BYTES", f"{len(body) - end} bytes after the last voxel"))
    stored = np.frombuffer(body, header.dtype, header.nbytes // header.dtype.itemsize, header.offset)
    data = _scaled(stored, header, notes, labels).reshape(header.dims, order="F")
    return Volume(data, header.affine, tuple(notes), digest)


def to_ras(data: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Flip and permute the axes so that they point right, anterior, superior as nearly as they can; no resampling."""
    turns = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(data, turns)
    return np.asfortranarray(turned), affine @ nib.orientations.inv_ornt_aff(turns, data.shape)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would block


def _read_file(path: Path, root: Path | None, max_bytes: int) -> bytes:
    try:
        if root is not None and not path.resolve(strict=True).is_relative_to(root.resolve()):
            raise Rejected("NOT_REGULAR", f"links to {path.resolve()}, outside the raw folder; copy it there")
        with open(path, "rb", opener=_without_waiting) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise Rejected("NOT_REGULAR", "not a regular file (pipe or device)")
            if before.st_size > max_bytes:
                raise Rejected(
                    "DIMS_LIMIT", f"a file of {before.st_size} bytes; at most {max_bytes} are read"
                )
            content = file.read(before.st_size + 1)
            after = os.fstat(file.fileno())
    except RuntimeError as error:  # of Path.resolve
        raise Rejected("NOT_REGULAR", "a loop of links") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        code = "NOT_REGULAR" if getattr(error, "errno", None) in (errno.ELOOP, errno.EISDIR) else "IO"
        raise Rejected(code, f"cannot be read: {error}") from error
    if len(content) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        raise Rejected("IO", "the file changed while it was read; ingest again when it is complete")
    return content


def _unpack(
    path: Path, content: bytes, max_bytes: int, orientation: Orientation, notes: list[Note]
) -> tuple[_Header, bytes]:
    """The checked header and the uncompressed bytes from its start to the file's end."""
    if not content:
        raise Rejected("NOT_NIFTI", "the file is empty; download it again")
    zipped, named = content[:2] == b"\x1f\x8b", path.name.lower().endswith(".gz")
    if not zipped:
        block = _header_block(content)
        if named:
            raise Rejected("EXT_MISMATCH", "named .gz but not compressed; rename it to .nii")
        header = _parse(block, max_bytes, orientation, notes)
        _hold(header, len(content))
        return header, content
    stream = isal_zlib.decompressobj(wbits=31)  # gzip with its CRC and length checked at the end
    start = _inflate(stream, content, 544)
    if len(start) < 348 and not stream.eof:
        raise Rejected("GZ_TRUNCATED", "the gzip stream ends inside the header; download the file again")
    block = _header_block(start)
    if not named:
        raise Rejected("EXT_MISMATCH", "compressed but not named .gz; rename it to .nii.gz")
    header = _parse(block, max_bytes, orientation, notes)
    limit = header.offset + header.nbytes + SLACK_BYTES
    body = start + _inflate(stream, stream.unconsumed_tail, limit - len(start) + 1)
    if len(body) > limit:
        raise Rejected("BOMB", f"unpacks to over {limit} bytes, more than its header declares")
    if not stream.eof:
        raise Rejected("GZ_TRUNCATED", "the gzip stream ends early; download the file again")
    if stream.unused_data:
        raise Rejected("GZ_TRAILING", f"{len(stream.unused_data)} bytes follow the gzip stream")
    _hold(header, len(body))
    return header, body


def _inflate(stream: Any, content: bytes, limit: int) -> bytes:
    parts: list[bytes] = []
    room = limit
    while room > 0 and not stream.eof:
        try:
            part = stream.decompress(content, room)
        except isal_zlib.error as error:  # type: ignore[misc]  # its stub declares an instance
            raise Rejected(
                "GZ_CRC", f"the gzip stream is damaged ({error}); download the file again"
            ) from error
        parts.append(part)
        room -= len(part)
        content = stream.unconsumed_tail
        if not content and not part:
            break
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _hold(header: _Header, size: int) -> None:
    if size < header.offset + header.nbytes:
        raise Rejected(
            "DIMS_LIMIT", f"the header declares {header.offset + header.nbytes} bytes, the file holds {size}"
        )


def _header_block(start: bytes) -> Any:
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


def _parse(header: Any, max_bytes: int, orientation: Orientation, notes: list[Note]) -> _Header:
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
    slope, intercept = _scale(float(fields["scl_slope"]), float(fields["scl_inter"]), notes)
    affine = _affine(header, dims, orientation, notes)
    parsed = _Header(header.endianness, dims, dtype, int(offset), slope, intercept, affine)
    if parsed.nbytes > max_bytes:
        raise Rejected(
            "DIMS_LIMIT", f"{dims} voxels take {parsed.nbytes} bytes; at most {max_bytes} are read"
        )
    return parsed


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
    if slope == 0 or np.isnan(slope):
        notes.append(Note("SCALE_ODD", f"scl_slope is {slope}: read unscaled"))
        return 1.0, 0.0
    if not np.isfinite(slope) or not np.isfinite(intercept):
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
    candidates = {}
    if int(fields["sform_code"]) > 0:
        candidates["sform"] = np.asarray(header.get_sform(), np.float64)
    if int(fields["qform_code"]) > 0:
        candidates["qform"] = _qform(header)
    affine = _choose(candidates, pixdim, dims, orientation, notes)
    unit = UNITS_MM.get(int(fields["xyzt_units"]) & 7, 1.0)
    if unit != 1.0:
        notes.append(Note("UNITS", f"1 unit of length in the header is {unit:g} mm"))
    scale = np.diag([unit, unit, unit, 1.0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if np.any(np.abs(spacing / pixdim - 1) > 0.01):
        notes.append(
            Note("SPACING_ODD", f"pixdim {pixdim.round(4).tolist()}, affine {spacing.round(4).tolist()}")
        )
    spacing = spacing * unit
    low, high = SPACING_MM
    if np.any(spacing < low) or np.any(spacing > high):
        raise Rejected("SPACING_INVALID", f"spacing {spacing.tolist()} mm is outside {low} to {high} mm")
    if np.any(spacing < USUAL_SPACING_MM[0]) or np.any(spacing > USUAL_SPACING_MM[1]):
        notes.append(Note("SPACING_ODD", f"spacing {spacing.round(4).tolist()} mm"))
    return scale @ affine


def _qform(header: Any) -> NDArray[np.float64]:
    fields = header.structarr
    b, c, d = (float(fields[f"quatern_{axis}"]) for axis in "bcd")
    if not np.isfinite([b, c, d]).all() or b * b + c * c + d * d > 1 + 1e-5:
        raise Rejected("AFFINE_INVALID", f"quaternion ({b}, {c}, {d}) is no rotation")
    if float(fields["pixdim"][0]) not in (-1.0, 0.0, 1.0):
        raise Rejected("AFFINE_INVALID", f"qfac {float(fields['pixdim'][0])} is neither 1 nor -1")
    a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    affine = np.eye(4)
    qfac = -1.0 if float(fields["pixdim"][0]) == -1 else 1.0
    spacing = np.asarray(fields["pixdim"][1:4], np.float64) * (1, 1, qfac)
    affine[:3, :3] = quat2mat([a, b, c, d]) * spacing
    affine[:3, 3] = [float(fields[f"qoffset_{axis}"]) for axis in "xyz"]
    return affine


def _choose(
    candidates: dict[str, NDArray[np.float64]],
    pixdim: NDArray[np.float64],
    dims: tuple[int, int, int],
    orientation: Orientation,
    notes: list[Note],
) -> NDArray[np.float64]:
    """sform before qform, as the standard's method 3 before method 2; both must agree unless one was asked for."""
    if not candidates:
        if orientation != "assume_ras":
            raise Rejected("NO_ORIENTATION", "neither qform nor sform is set, so left and right are unknown")
        notes.append(Note("ASSUMED_RAS", "no orientation in the header"))
        affine = np.diag([*pixdim, 1.0])
        affine[:3, 3] = -0.5 * pixdim * (np.array(dims) - 1)
        return affine
    for name, affine in candidates.items():
        _check_affine(affine, name)
    name = orientation if orientation in candidates else next(iter(candidates))
    if len(candidates) == 2:
        sform, qform = candidates["sform"], candidates["qform"]
        corners = np.array(np.meshgrid(*[(0, d - 1) for d in dims], [1.0], indexing="ij")).reshape(4, -1)
        corners[3] = 1
        apart = float(np.linalg.norm(((sform - qform) @ corners)[:3], axis=0).max())
        if apart > float(pixdim.min()):
            if orientation == "agree":
                raise Rejected("QS_DISAGREE", f"qform and sform place a corner {apart:.1f} mm apart")
            notes.append(Note("QS_CHOSEN", f"{name} taken; the other is up to {apart:.1f} mm away"))
    return candidates[name]


def _check_affine(affine: NDArray[np.float64], name: str) -> None:
    if not np.isfinite(affine).all():
        raise Rejected("AFFINE_INVALID", f"{name} holds NaN or infinity")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if np.any(lengths < 1e-6):
        raise Rejected("AFFINE_INVALID", f"{name} is singular")
    cosines = (affine[:3, :3] / lengths).T @ (affine[:3, :3] / lengths) - np.eye(3)
    shear = np.abs(cosines).max()
    if shear > MAX_SHEAR:
        raise Rejected("AFFINE_INVALID", f"{name} is sheared or singular: axes at a cosine of {shear:.3f}")


def _scaled(stored: NDArray[Any], header: _Header, notes: list[Note], labels: bool) -> NDArray[np.float32]:
    """Stored numbers x slope + intercept as float32; the few non-finite voxels allowed become zero."""
    values = stored
    if header.dtype.kind == "f":
        finite = np.isfinite(stored)
        bad = stored.size - int(np.count_nonzero(finite))
        if bad > MAX_NONFINITE * stored.size:
            raise Rejected("NONFINITE", f"{bad} of {stored.size} voxels are NaN or infinite")
        if bad:
            notes.append(Note("NONFINITE_FILLED", f"{bad} of {stored.size} voxels"))
            values = np.where(finite, stored, header.dtype.type(0))
    low, high = float(values.min()), float(values.max())
    if max(abs(low), abs(high)) * max(1.0, abs(header.slope)) + abs(header.intercept) > MAX_MAGNITUDE:
        raise Rejected("RANGE", f"intensities from {low:g} to {high:g} are of no scanner")
    if header.dtype.kind in "iu" and max(abs(low), abs(high)) >= 2**53:
        raise Rejected("RANGE", f"integers up to {max(abs(low), abs(high)):g} cannot be represented")
    if low == high and not labels:
        raise Rejected("EMPTY_BRAIN", f"every voxel is {low:g}")
    if header.slope == 1.0 and header.intercept == 0.0:
        return values.astype(np.float32)
    return (values.astype(np.float64) * header.slope + header.intercept).astype(np.float32)
