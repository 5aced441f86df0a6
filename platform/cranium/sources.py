"""Whether the files that a session was made of are still the same: by names, sizes and times, and if these differ, by
content.

A look is had from listing the raw folder and costs nothing. Content (SHA-256 of every file) is what decides: a copied
or touched file is no other file, and one that was replaced by another of the same size is.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from cranium import cohort, config, place
from cranium.volume import dicom, sidecar

THREADS = 8  # that read files for their hash


@dataclass(frozen=True)
class Session:
    """A session that is wanted now.

    `wanted` says which scan fills which channel, `look` what its files look like, `values` what tables say of it.
    """

    subject: str  # as outputs name it
    session: str
    root: Path
    wanted: Mapping[str, Any]
    look: str
    values: Mapping[str, Any]

    @cached_property
    def content(self) -> str:
        """`content` of its files as they are now; they are read for it."""
        return content(self.root, self.wanted)

    def is_made_of(self, look: str, content: str) -> bool:
        """Whether its files are those that looked so, or at least have that content."""
        return look == self.look or content == self.content


class Listing:
    """The files below a raw folder as they were listed."""

    def __init__(self, table: cohort.CohortTable) -> None:
        self.stamps = {path: [path, size, table.times.get(path)] for path, size in table.files}
        self.folders: dict[str, list[str]] = defaultdict(list)
        for path in sorted(self.stamps):
            self.folders[path.rpartition("/")[0]].append(path)

    def look(self, wanted: Mapping[str, Any]) -> str:
        """Fingerprint of which files a session has, of their sizes and times."""
        files = (
            file for path in _with_sidecars(wanted) for file in self.folders.get(dicom.split(path)[0], [path])
        )
        return config.fingerprint([_asked(wanted), [self.stamps.get(file) for file in files]])


def paths(wanted: Mapping[str, Any]) -> list[str]:
    """What is read for a session: its scans, their masks, its label map; not the sidecars beside them."""
    found = {path for scan in wanted["scans"].values() for path in scan[1:3]} | {wanted["segmentation"]}
    return sorted(found - {None})


def _with_sidecars(wanted: Mapping[str, Any]) -> Iterator[str]:
    for path in paths(wanted):
        yield path
        if path.endswith((".nii", ".nii.gz")):
            yield str(sidecar.beside(PurePosixPath(path)))


def content(root: Path, wanted: Mapping[str, Any], known: Mapping[str, str] | None = None) -> str:
    """Fingerprint of which files a session has, and of their bytes. `known`: SHA-256 of those read already, by path."""
    hashes = {path: (known or {}).get(path) or _hash(root / path) for path in _with_sidecars(wanted)}
    return config.fingerprint([_asked(wanted), hashes])


def _asked(wanted: Mapping[str, Any]) -> list[Any]:
    return [wanted["scans"], wanted["segmentation"]]


def _hash(path: Path) -> Any:
    """SHA-256 of a file, or of each in the folder of a DICOM series; None where it cannot be read."""
    try:
        if dicom.is_series(path):
            folder = Path(dicom.split(str(path))[0])
            return {file.name: _hash(file) for file in folder.iterdir() if not file.is_dir()}
        return place.sha256(path) if stat.S_ISREG(os.stat(path).st_mode) else None  # a pipe would block
    except OSError:
        return None


def read(sessions: Iterable[Session]) -> None:
    """Have the content of many sessions at once: it is kept."""
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda session: session.content, sessions):
            pass
