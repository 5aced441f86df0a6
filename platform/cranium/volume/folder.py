"""The DICOM images of a folder: opened so that nothing outside the raw folder is, and which series they are of."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from cranium.volume.headers import Header, Image, parse
from cranium.volume.quality import Rejected

SAME_MS = 0.05  # echo times closer than this are one echo


def names(folder: Path) -> list[str]:
    """Regular or linked files of a folder that may be DICOM, 2 before 10. Raises `Rejected(IO)`."""
    try:
        with os.scandir(folder) as entries:
            found = [
                e.name
                for e in entries
                if e.name[0] != "." and e.name.upper() != "DICOMDIR" and not e.is_dir()
            ]
    except OSError as error:
        raise Rejected("IO", f"the folder cannot be read ({error.strerror})") from error
    return sorted(found, key=_natural)


def content(path: Path, root: Path, max_bytes: int) -> bytes:
    """All bytes of a file below `root`. Raises `Rejected`."""
    with _opened(path, root) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise Rejected("DIMS_LIMIT", f"more than {max_bytes} bytes in a series are not read")
        data = file.read(size + 1)
    if len(data) != size:
        raise Rejected("IO", "a file changed while it was read; ingest again when it is complete")
    return data


def read_header(folder: Path, root: Path) -> tuple[Header, ...]:
    """The series of a folder, one entry for each (and for each echo of one), in the order of its files.

    Where the first two, the middle and the last image agree, the folder is taken to hold their series only, and
    conversion, which reads every header, rejects it if that was wrong; else every header is read. Raises `Rejected`.
    """
    listed = names(folder)
    starts = (listed, listed[1:], listed[len(listed) // 2 :], listed[::-1])
    found = [image for order in starts if (image := _first(folder, order, root)) is not None]
    if not found:
        raise Rejected("NOT_DICOM", f"none of its {len(listed)} files is a DICOM image")
    if len({(i.header.uid, i.header.image_type, *_echoes([i])) for i in found}) > 1:
        found = [image for name in listed if (image := look(folder / name, root)) is not None]
    return tuple(_series(found))


def look(path: Path, root: Path) -> Image | None:
    """`parse` of a file below `root`, without reading its pixels."""
    with _opened(path, root) as file:
        return parse(file, os.fstat(file.fileno()).st_size)


def echoes_apart(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and abs(one - other) > SAME_MS


def _first(folder: Path, order: Sequence[str], root: Path) -> Image | None:
    return next((image for name in order if (image := look(folder / name, root)) is not None), None)


def _series(images: Sequence[Image]) -> Iterator[Header]:
    members: dict[str, list[Image]] = {}
    for image in images:
        members.setdefault(image.header.uid, []).append(image)
    for group in members.values():
        times = _echoes(group)
        for time in times:
            near = next((i for i in group if not echoes_apart(i.header.te, time)), group[0])
            several = {"echoes": len(times), "echo": time, "te": time} if len(times) > 1 else {}
            yield replace(near.header, **several)  # type: ignore[arg-type]


def _echoes(images: Sequence[Image]) -> list[float | None]:
    """Distinct echo times of all planes, shortest first; [None] where none is told."""
    found: list[float] = []
    for time in sorted({p.echo for i in images for p in i.planes if p.echo is not None}):
        if not found or time - found[-1] > SAME_MS:
            found.append(time)
    return list(found) or [None]


def _opened(path: Path, root: Path) -> BinaryIO:
    try:
        if not path.resolve(strict=True).is_relative_to(root):
            raise Rejected("NOT_REGULAR", "a file links to outside the raw folder; copy it there")
        file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # a pipe without a writer would block
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise Rejected("NOT_REGULAR", "a file of the folder is a pipe or a device")
    except RuntimeError as error:
        raise Rejected("NOT_REGULAR", "a loop of links") from error
    except OSError as error:
        raise Rejected("IO", f"a file cannot be read ({error.strerror})") from error
    return io.BufferedReader(file)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    return tuple((0, int(p), p) if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p)
