"""Verified reading of one NIfTI-1 or NIfTI-2 volume, and its reorientation to RAS.

The usual readers accept damaged files silently. Here the gzip stream is read to its end, so that its CRC and length
are checked, every header field that shapes the result is checked before anything is allocated (`header.py`), and
whatever fails is rejected with a code (`quality.REJECTIONS`). No text of a file leaves this module: a header's words
are only looked at for what identifies a person (`privacy.py`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from cranium.volume import header as headers
from cranium.volume import privacy, sidecar
from cranium.volume.header import Header
from cranium.volume.header import Orientation as Orientation
from cranium.volume.quality import Note, Rejected

Phi = Literal["note", "reject", "ignore"]

MAX_BYTES = 2 << 30  # of a file, of its voxels as stored, and of its voxels as float32
SLACK_BYTES = 1 << 20  # what a file may hold after its last voxel
# How far a gzip stream with an unusable header is read on, to tell damage from nonsense.
DRAIN_BYTES = 256 << 20
MAX_SIDECAR_BYTES = 1 << 20
MAX_NONFINITE = 1e-3  # share of the voxels
MAX_MAGNITUDE = 1e30
LEVELS = 256  # intensities must differ by more than float32 rounds: this many steps between the extremes
CHUNK = 1 << 20


@dataclass(frozen=True)
class Volume:
    """A volume as stored: `data` float32 [I, J, K], `affine` voxel index -> RAS+ world mm."""

    data: NDArray[np.float32]
    affine: NDArray[np.float64]
    notes: tuple[Note, ...]
    sha256: str  # of the file's bytes
    acquisition: Mapping[str, str | float] = field(
        default_factory=dict
    )  # what its sidecar says (`sidecar.py`)


def read(
    path: Path,
    *,
    root: Path | None = None,
    max_bytes: int = MAX_BYTES,
    orientation: Orientation = "agree",
    labels: bool = False,
    phi: Phi = "note",
) -> Volume:
    """Read and verify a `.nii` or `.nii.gz` file. Raises `Rejected`.

    `root`: a link that leads out of this folder is refused. `max_bytes` bounds the file and its voxels. `orientation`:
    with "agree", qform and sform must agree within a voxel and one must be set; "sform" or "qform" settles a
    disagreement, "assume_ras" also accepts a header without either. `labels`: a label map, which may be the same
    everywhere (nothing is labelled). `phi`: what becomes of a file with text around it that may identify a person (of a
    DICOM series it always does, and a note would say nothing).
    """
    content = _read_file(path, root, max_bytes)
    digest = hashlib.sha256(content).hexdigest()
    notes: list[Note] = []
    header, body = _unpack(path, content, max_bytes, orientation, notes)
    end = header.offset + header.nbytes
    if len(body) > end and any(body[end:]):
        notes.append(Note("EXTRA_BYTES", f"{len(body) - end} bytes after the last voxel"))
    beside = b"" if phi == "ignore" else _sidecar(path)
    if phi != "ignore" and (suspects := privacy.told(_suspects(path, root, header, body, beside))):
        if phi == "reject":
            raise Rejected("PHI_SUSPECT", suspects)
        notes.append(Note("PHI_SUSPECT", f"{suspects}; the file is used, the text is not"))
    stored = np.frombuffer(body, header.dtype, header.voxels, header.offset)
    data = _scaled(stored, header, notes, labels).reshape(header.dims, order="F")
    return Volume(data, header.affine, tuple(notes), digest, sidecar.acquisition(beside))


def to_ras(data: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Flip and permute the axes so that they point right, anterior, superior as nearly as they can; no resampling."""
    turns = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(data, turns)
    return np.asfortranarray(turned), affine @ nib.orientations.inv_ornt_aff(turns, data.shape)


# ---- files ----------------------------------------------------------------------------------------------------------


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would block


def _read_file(path: Path, root: Path | None, max_bytes: int) -> bytes:
    try:
        if root is not None and not path.resolve(strict=True).is_relative_to(root.resolve()):
            raise Rejected("NOT_REGULAR", "a link that leads out of the raw folder; copy the file there")
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
        number = getattr(error, "errno", None)
        code = "NOT_REGULAR" if number in (errno.ELOOP, errno.EISDIR, errno.ENXIO) else "IO"
        reason = os.strerror(number) if number else "no file can have this name"  # the path may name a person
        raise Rejected(code, f"cannot be read: {reason}") from error
    if len(content) != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        raise Rejected("IO", "the file changed while it was read; ingest again when it is complete")
    return content


def _suspects(
    path: Path, root: Path | None, header: Header, body: bytes, beside: bytes
) -> tuple[privacy.Suspect, ...]:
    """What in the words around a scan may identify a person: name, header, extensions, JSON sidecar."""
    name = path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name
    texts: Mapping[str, str] = {"file name": name, **header.texts}
    found = privacy.review(texts) + privacy.review_bytes("extension", body[348 : header.offset])
    return found + (privacy.review_sidecar(beside) if beside else ())


def _sidecar(path: Path) -> bytes:
    """The JSON beside a scan; empty where none can be read: no voxel depends on it."""
    try:
        with open(sidecar.beside(path), "rb", opener=_without_waiting) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return file.read(MAX_SIDECAR_BYTES) if regular else b""
    except OSError:
        return b""


# ---- gzip -----------------------------------------------------------------------------------------------------------


def _unpack(
    path: Path, content: bytes, max_bytes: int, orientation: Orientation, notes: list[Note]
) -> tuple[Header, bytes]:
    """The checked header and the uncompressed bytes from its start to the file's end."""
    if not content:
        raise Rejected("NOT_NIFTI", "the file is empty; download it again")
    named = path.name.lower().endswith(".gz")
    if content[:2] != b"\x1f\x8b":
        block = headers.block(content)
        if named:
            raise Rejected("EXT_MISMATCH", "named .gz but not compressed; rename it to .nii")
        header = headers.parse(block, max_bytes, orientation, notes)
        _hold(header, len(content))
        return header, content
    stream = isal_zlib.decompressobj(wbits=31)  # gzip with its CRC and length checked at the end
    start = _inflate(stream, content, 544)
    if len(start) < 348 and not stream.eof:
        raise Rejected("GZ_TRUNCATED", "the gzip stream ends inside the header; download the file again")
    try:
        block = headers.block(start)
        if not named:
            raise Rejected("EXT_MISMATCH", "compressed but not named .gz; rename it to .nii.gz")
        header = headers.parse(block, max_bytes, orientation, notes)
    except Rejected:
        _drain(stream)  # a damaged stream makes nonsense of a header: then the damage is what is said
        raise
    limit = header.offset + header.nbytes + SLACK_BYTES
    stream = isal_zlib.decompressobj(wbits=31)
    body = _inflate(stream, content, limit + 1)  # from the start again: to join two parts is to copy all
    if len(body) > limit:
        raise Rejected("BOMB", f"unpacks to over {limit} bytes, more than its header declares")
    _whole(stream)
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


def _drain(stream: Any) -> None:
    """Read a stream on for its CRC, keeping nothing. Raises `Rejected(GZ_CRC | GZ_TRUNCATED)` where it is damaged."""
    for _ in range(DRAIN_BYTES // CHUNK):
        if stream.eof or not _inflate(stream, stream.unconsumed_tail, CHUNK):
            return _whole(stream)


def _whole(stream: Any) -> None:
    if not stream.eof:
        raise Rejected("GZ_TRUNCATED", "the gzip stream ends early; download the file again")


def _hold(header: Header, size: int) -> None:
    if size < header.offset + header.nbytes:
        raise Rejected(
            "DIMS_LIMIT", f"the header declares {header.offset + header.nbytes} bytes, the file holds {size}"
        )


# ---- voxels ---------------------------------------------------------------------------------------------------------


def _scaled(stored: NDArray[Any], header: Header, notes: list[Note], labels: bool) -> NDArray[np.float32]:
    """Stored numbers x slope + intercept as float32; the few non-finite voxels allowed become zero."""
    values, missing = stored, None
    if header.dtype.kind == "f":
        missing = ~np.isfinite(stored)
        bad = int(np.count_nonzero(missing))
        if bad > MAX_NONFINITE * stored.size:
            raise Rejected("NONFINITE", f"{bad} of {stored.size} voxels are NaN or infinite")
        if bad:
            notes.append(Note("NONFINITE_FILLED", f"{bad} of {stored.size} voxels"))
            values = np.where(missing, stored[~missing][0], stored)
    low, high = float(values.min()), float(values.max())
    _check_range(low, high, header, labels)
    if header.slope == 1.0 and header.intercept == 0.0:
        result = values.astype(np.float32)
    else:
        result = (values.astype(np.float64) * header.slope + header.intercept).astype(np.float32)
    if missing is not None:
        result[missing] = 0
    return result


def _check_range(low: float, high: float, header: Header, labels: bool) -> None:
    """Intensities must survive float32 without overflow and without rounding their differences away."""
    ends = low * header.slope + header.intercept, high * header.slope + header.intercept
    top = max(abs(low), abs(high), *map(abs, ends))
    if not top <= MAX_MAGNITUDE:
        raise Rejected("RANGE", f"intensities from {ends[0]:g} to {ends[1]:g} are of no scanner")
    if header.dtype.kind in "iu" and max(abs(low), abs(high)) >= 2**53:
        raise Rejected("RANGE", f"integers up to {max(abs(low), abs(high)):g} cannot be represented")
    if labels:
        return
    if low == high:
        raise Rejected("EMPTY_BRAIN", f"every voxel is {low:g}")
    if abs(ends[1] - ends[0]) < LEVELS * float(np.spacing(np.float32(max(map(abs, ends))))):
        raise Rejected("RANGE", f"intensities from {ends[0]:g} to {ends[1]:g} differ by less than they round")
