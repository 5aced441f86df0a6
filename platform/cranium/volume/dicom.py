"""One DICOM series as a volume: dcm2niix converts exactly its files, and the result must be what their headers say.

A series is named by the path of its folder; where a folder mixes series, `folder#<key>` (12 hex digits of the SHA-256
of its UID, which itself may hold a scanner's serial number and the time), and `folder#<key>@<echo time in ms>` where a
series holds several echoes. Damage inside the pixels cannot be seen: DICOM has no check sum.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import resource
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dcm2niix
import numpy as np
from numpy.typing import NDArray

from cranium.volume import folder as folders
from cranium.volume import nifti
from cranium.volume import sidecar as sidecars
from cranium.volume.headers import Plane, parse
from cranium.volume.nifti import Volume
from cranium.volume.quality import Note, Rejected

TIMEOUT_S = 300.0
MEMORY_BYTES = 8 << 30  # of the converter
# How far an image may lie off its place: mm (rounded headers), and share of the distance.
UNEVEN_MM, UNEVEN = (0.1, 0.1)
GAP = 1.5  # times the usual distance: a slice is missing
APART = 0.25  # voxels: how far the converted grid may lie from that of the headers
# Share by which its distance of images may differ from their mean; is noted.
STRETCH, NOTED_STRETCH = (0.5, 0.005)
OPTIONS = (
    *("-ba", "y", "-b", "y"),  # a sidecar without identity (what it leaves all the same is dropped below)
    *("-z", "n", "-f", "fixed", "-w", "0"),
    *("-m", "y"),  # all files are one volume: what differs in place or echo was sorted out before
    *("-p", "n"),  # the standard's rescale slope on Philips scanners too
    *("-x", "i", "-i", "n", "-l", "o", "-d", "0"),  # no cropping, no turning, the numbers as they are
    *("-g", "i"),  # nothing from a file of defaults in somebody's home
)
_NAME = re.compile(r"(.*)#([0-9a-f]{12})(?:@(\d+(?:\.\d+)?))?", re.DOTALL)


@dataclass(frozen=True)
class _Files:
    """What was laid out for the converter."""

    planes: tuple[Plane, ...]
    sha256: str  # of the sorted hashes of the files, so that their names and order do not matter
    ignored: int


def name(folder: str, uid: str, echo: float | None = None, *, alone: bool) -> str:
    """The path of a series: its folder where it is `alone` there, else with its key, and its echo if it has several."""
    if alone and not _NAME.fullmatch(folder):
        return folder
    return f"{folder}#{key(uid)}" + (f"@{echo:g}" if echo is not None else "")


def split(path: str) -> tuple[str, str, float | None]:
    """The folder, the key ("" for any) and the echo time of a series by its path."""
    match = _NAME.fullmatch(path)
    return (match[1], match[2], float(match[3]) if match[3] else None) if match else (path, "", None)


def key(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:12]


def is_series(path: Path) -> bool:
    """Whether a path names a DICOM series rather than a file."""
    return Path(split(str(path))[0]).is_dir()


def convert(path: Path, root: Path, max_bytes: int = nifti.MAX_BYTES) -> Volume:
    """Convert the series at `path` (see `name`) and read the result as `nifti.read` does. Raises `Rejected`.

    `root`: nothing outside it is read. `max_bytes` bounds the files of the series, and its voxels.
    """
    where, wanted, echo = split(str(path))
    with tempfile.TemporaryDirectory(prefix="cranium-") as temporary:  # of mode 0700
        source, target = Path(temporary) / "in", Path(temporary) / "out"
        source.mkdir()
        target.mkdir()
        files = _lay_out(Path(where), root.resolve(), wanted, echo, source, max_bytes)
        affine, shape = lattice(files.planes)
        _run(source, target, max_bytes)
        made, sidecar = _made(target, echo)
        volume = _agreed(nifti.read(made, max_bytes=max_bytes, phi="ignore"), affine, shape)
    ignored = (Note("FILES_IGNORED", f"{files.ignored} files"),) if files.ignored else ()
    return replace(
        volume, sha256=files.sha256, notes=volume.notes + ignored, acquisition=sidecars.reviewed(sidecar)
    )


def lattice(planes: Sequence[Plane]) -> tuple[NDArray[np.float64], tuple[int, int, int]]:
    """RAS affine (column, row, plane index -> mm) and shape of the grid that planes make. Raises `Rejected`."""
    first = planes[0]
    whole = (len(p.position) == 3 and len(p.orientation) == 6 and len(p.spacing) == 2 for p in planes)
    if not all(whole) or len(planes) < 2:
        raise Rejected(
            "SLICES_UNEVEN", f"{len(planes)} images, or one without position, direction or spacing"
        )
    table = np.array([(*p.orientation, *p.spacing, *p.shape, *p.kind) for p in planes])
    if not np.isfinite(table).all() or np.abs(table - table[0]).max() > 1e-3:
        raise Rejected("SLICES_UNEVEN", "its images differ in size, spacing, direction or kind of number")
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    positions = np.array([p.position for p in planes])
    along = positions @ np.cross(across, down)
    positions, along = positions[np.argsort(along)], np.sort(along)
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if gaps.min() < 0.01 or usual <= 0:
        raise Rejected(
            "SLICES_REPEATED", f"{int((gaps < 0.01).sum())} of {len(planes)} images lie where another does"
        )
    if gaps.max() > GAP * usual:
        after = int(gaps.argmax()) + 1
        raise Rejected(
            "SLICES_MISSING", f"{gaps.max():.2f} mm after image {after} of {len(planes)}, else {usual:.2f} mm"
        )
    step = (positions[-1] - positions[0]) / (len(planes) - 1)
    off = float(np.abs(positions - positions[0] - np.arange(len(planes))[:, None] * step).max())
    if off > UNEVEN_MM + UNEVEN * usual:
        raise Rejected(
            "SLICES_UNEVEN", f"an image lies {off:.2f} mm off its place in even slices of {usual:.2f} mm"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.stack([across * first.spacing[1], down * first.spacing[0], step], axis=1)
    affine[:3, 3] = positions[0]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, (first.shape[1], first.shape[0], len(planes))


def _lay_out(
    folder: Path, root: Path, wanted: str, echo: float | None, target: Path, max_bytes: int
) -> _Files:
    """Copy the files of one series (of one echo) under neutral names: the very bytes that are hashed are converted."""
    uid, planes, ignored, total = "", [], 0, 0
    hashes: dict[str, str] = {}
    for file in folders.names(folder):
        data = folders.content(folder / file, root, max_bytes - total)
        image = parse(io.BytesIO(data), len(data))
        if image is None:
            ignored += 1
            continue
        if wanted and key(image.header.uid) != wanted:
            continue
        if image.header.uid != (uid := uid or image.header.uid):
            raise Rejected(
                "SERIES_MIXED", "images of another series lie among it; put each series into its own folder"
            )
        of_echo = [p for p in image.planes if echo is None or not folders.echoes_apart(p.echo, echo)]
        if not of_echo:
            continue
        if image.lack:
            raise Rejected("DICOM_TRUNCATED", f"a file is not whole: {image.lack}; download it again")
        if image.header.inverted or image.header.colour:
            raise Rejected(
                "DTYPE", "pixels in colour, or with an inverted grey scale (MONOCHROME1), are no scan"
            )
        digest = hashlib.sha256(data).hexdigest()
        if hashes.setdefault(image.instance or digest, digest) != digest:
            raise Rejected("SLICES_REPEATED", "two files with different content claim to be the same image")
        if (target / f"{digest}.dcm").exists():  # a copy under another name
            ignored += 1
            continue
        (target / f"{digest}.dcm").write_bytes(data)
        planes += of_echo
        total += len(data)
    if not planes:
        raise Rejected("NOT_DICOM", "no image of this series is in the folder (any more)")
    times = [p.echo for p in planes]
    if any(folders.echoes_apart(time, times[0]) for time in times):
        raise Rejected(
            "SERIES_MIXED", "its images have several echo times, which were not seen when it was found"
        )
    digest = hashlib.sha256("".join(sorted(hashes.values())).encode()).hexdigest()
    return _Files(tuple(planes), digest, ignored)


def _run(source: Path, target: Path, max_bytes: int) -> None:
    command = [dcm2niix.bin, *OPTIONS, "-o", str(target), str(source)]
    environment = {"HOME": str(target), "LC_ALL": "C"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4 * max_bytes, 4 * max_bytes))
        try:
            said, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise Rejected("CONVERT_FAILED", f"dcm2niix took more than {TIMEOUT_S:g} s") from error
    if process.returncode != 0:
        raise Rejected("CONVERT_FAILED", f"dcm2niix ended with {process.returncode}: {_last_words(said)}")


def _last_words(said: bytes) -> str:
    """Its warnings and errors, without paths and without what it quotes of the headers."""
    lines = [
        line for line in said.decode("ascii", "replace").splitlines() if line.startswith(("Warn", "Err"))
    ]
    return re.sub(r"(['\"]).*?\1|\S*/\S*|\S*\^\S*", "...", " ".join(lines))[-300:] or "it said nothing"


def _made(target: Path, echo: float | None) -> tuple[Path, dict[str, Any]]:
    """The one volume that came out (of this echo), and its sidecar."""
    made = {path: _sidecar(path.with_suffix(".json")) for path in sorted(target.glob("*.nii"))}
    if echo is not None and len(made) > 1:  # of an Enhanced MR file, which holds all of them
        times = {path: 1000 * float(sidecar.get("EchoTime", 0)) for path, sidecar in made.items()}
        made = {path: made[path] for path in made if not folders.echoes_apart(times[path], echo)}
    if not made:
        raise Rejected("CONVERT_FAILED", "dcm2niix made no volume of it")
    if len(made) > 1:
        kinds = ", ".join(path.stem for path in made)
        raise Rejected("CONVERT_SEVERAL", f"dcm2niix made {len(made)} volumes of it: {kinds}")
    return next(iter(made.items()))


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}  # nothing is known of the acquisition then; the voxels do not depend on it
    return content if isinstance(content, dict) else {}


def _agreed(volume: Volume, affine: NDArray[np.float64], shape: tuple[int, int, int]) -> Volume:
    """The volume on the grid of the headers, in dcm2niix's storage order (axes may be turned or swapped).

    dcm2niix takes the distance of the first two images for all of them: where headers are rounded to 0.1 mm that
    stretches the head. So the distance is left to the headers, and everything else must agree.
    """
    turn = np.linalg.inv(affine) @ volume.affine  # index to index
    exact = np.rint(turn)
    axis = int(np.abs(turn[2, :3]).argmax())  # the volume's axis across the images
    stretch = abs(float(turn[2, axis]))
    if 1 - STRETCH < stretch < 1 + STRETCH:
        if turn[2, axis] < 0:
            turn[2, 3] -= (shape[2] - 1) * (stretch - 1)
        turn[:, axis] /= stretch
        exact = np.rint(turn)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in volume.data.shape], indexing="ij")).reshape(3, -1)
    apart = np.abs((turn - exact)[:3, :3] @ corners + (turn - exact)[:3, 3:]).max()
    reached = exact[:3, :3] @ corners + exact[:3, 3:]
    same = np.array_equal(reached.min(axis=1), [0, 0, 0]) and np.array_equal(reached.max(axis=1) + 1, shape)
    if not same or apart > APART:
        off = f"{apart:.2f} voxels from where the headers of {shape} put them"
        raise Rejected("CONVERT_FAILED", f"dcm2niix gives {volume.data.shape} voxels, {off}")
    notes = volume.notes
    if abs(stretch - 1) > NOTED_STRETCH:
        notes += (
            Note("SPACING_ODD", f"uneven distances of the images, their mean was taken: {stretch - 1:+.1%}"),
        )
    return replace(volume, affine=affine @ exact, notes=notes)
