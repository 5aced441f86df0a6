"""Phantom heads written as BIDS trees: small, fast, and known in closed form.

A head is a function of world coordinates (RAS mm), so the same head can be sampled on any grid, tilted, flipped or
anisotropic: a scalp, a brain ellipsoid of grey matter around white matter, two ventricles left and right (the right one
larger, so that a flip shows), and on demand a lesion. Everything follows from a seed.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

CONTRASTS = ("T1w", "T2w", "FLAIR")
TISSUES = ("air", "scalp", "csf", "grey", "white", "lesion")
INTENSITIES = {  # of TISSUES, arbitrary units
    "T1w": (0, 900, 150, 500, 800, 350),
    "T2w": (0, 500, 1000, 600, 400, 850),
    "FLAIR": (0, 600, 100, 650, 450, 1000),
    "T1ce": (0, 900, 150, 520, 820, 990),
}
# Settings of stages that suit them: an ingest and a pretraining of seconds.
COARSE: dict[str, Any] = {"size": 56, "spacing_mm": 4.0, "slice_spacing_mm": 8.0, "align": "none"}
PRETRAIN: dict[str, Any] = {
    "cohorts": ["ssl"],
    "inits": ["scratch"],
    "arch": "vit_tiny_patch14",
    "batch_size": 8,
    "crops": {"global_size": 56, "local_size": 28, "num_local": 2},
    "loss": {"prototypes": 64, "head_hidden": 64, "head_bottleneck": 32},
    "precision": "fp32",
}
LESION: dict[str, Any] = {
    "task": "classification",
    "name": "lesion",
    "cohort": "home",
    "label": "condition",
    "classes": ["control", "lesion"],
}
# The whole path on cohorts ssl, home and away, which share their three heads.
WHOLE: dict[str, Any] = {
    "name": "tiny",
    "asks": "does the path hold?",
    "ingest": {"cohorts": ["ssl", "home", "away"], **COARSE},
    "stream": {"lanes": 4, "window": 3},
    "pretrain": PRETRAIN,
    "adapt": {
        "tasks": [LESION | {"external": ["away"]}],
        "accept_leakage": [
            f"head:{pair}"
            for pair in ("external+ssl", "external+test", "external+train", "ssl+test", "test+train")
        ],
    },
    "sweep": {"init": ["random", "scratch", "covariates"], "label_fractions": [0.5, 1.0], "folds": 3},
}
RADII_MM = (62.0, 80.0, 55.0)  # of the brain: left-right, front-back, up-down


@dataclass(frozen=True)
class Head:
    """One head: `scale` multiplies every radius, `ventricles` those of the ventricles; `lesion` is a centre in mm."""

    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ventricles: float = 1.0
    lesion: tuple[float, float, float] | None = None
    lesion_mm: float = 14.0
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)


def head(seed: int, condition: str = "control") -> Head:
    """A head of a seed: size within 5 %; `atrophy` widens the ventricles, `lesion` puts one near the left ventricle."""
    rng = np.random.default_rng([seed, 7])
    scale = tuple(float(s) for s in rng.uniform(0.95, 1.05, 3))
    ventricles = float(rng.uniform(0.85, 1.15)) * (1.7 if condition == "atrophy" else 1.0)
    lesion = (
        (-32.0, float(rng.uniform(-20, 20)), float(rng.uniform(0, 15))) if condition == "lesion" else None
    )
    return Head(scale, ventricles, lesion)  # type: ignore[arg-type]


def affine(
    spacing: Sequence[float] = (4.0, 4.0, 4.0),
    shape: Sequence[int] = (44, 52, 40),
    tilt_degrees: Sequence[float] = (0.0, 0.0, 0.0),
    centre: Sequence[float] = (0.0, 0.0, 0.0),
) -> np.ndarray:
    """RAS affine of a grid whose middle lies at `centre` (mm), turned about x, y, z by `tilt_degrees`."""
    turn = np.eye(3)
    for axis, degrees in enumerate(np.deg2rad(tilt_degrees)):
        a, b = [i for i in range(3) if i != axis]
        one = np.eye(3)
        one[[a, b], [a, b]] = np.cos(degrees)
        one[a, b], one[b, a] = -np.sin(degrees), np.sin(degrees)
        turn = one @ turn
    result = np.eye(4)
    result[:3, :3] = turn @ np.diag(spacing)
    result[:3, 3] = np.asarray(centre) - result[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return result


def tissues(of: Head, shape: Sequence[int], grid: np.ndarray) -> np.ndarray:
    """Index into `TISSUES` of every voxel [I, J, K] of a grid."""
    index = np.indices(shape, np.float32).reshape(3, -1)
    world = (grid[:3, :3] @ index + grid[:3, 3:]).T - np.asarray(of.centre)

    def inside(centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        return (((world - centre) / radii) ** 2).sum(axis=1) <= 1

    brain = np.multiply(RADII_MM, of.scale)
    found = np.zeros(len(world), np.uint8)
    found[inside((0, 0, 0), brain + 14)] = 1
    found[inside((0, 0, 0), brain)] = 3
    found[inside((0, 0, 0), brain * 0.8)] = 4
    found[inside((-14, 0, 8), np.multiply((7, 26, 10), of.ventricles))] = 2
    found[inside((14, 0, 8), np.multiply((10, 30, 13), of.ventricles))] = 2
    if of.lesion is not None:
        found[inside(of.lesion, (of.lesion_mm,) * 3)] = 5
    return found.reshape(shape)


def intensities(labels: np.ndarray, contrast: str, seed: int = 0, gain: float = 1.0) -> np.ndarray:
    """int16 intensities of tissue labels in one contrast, with noise of a seed (none when negative)."""
    values = np.asarray(INTENSITIES[contrast], np.float32)[labels] * gain
    if seed >= 0:
        rng = np.random.default_rng([seed, CONTRASTS.index(contrast) if contrast in CONTRASTS else 9])
        values += rng.normal(0, 15, labels.shape).astype(np.float32)
    return np.clip(values, 0, 32767).astype(np.int16)


def turned(data: np.ndarray, grid: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume stored along other axes, e.g. "LAS" or "PIR": same world, other memory order."""
    target = nib.orientations.axcodes2ornt(axes)
    turns = nib.orientations.ornt_transform(nib.orientations.io_orientation(grid), target)
    return nib.orientations.apply_orientation(data, turns), grid @ nib.orientations.inv_ornt_aff(
        turns, data.shape
    )


def write(path: Path, data: np.ndarray, grid: np.ndarray) -> Path:
    """Write a NIfTI file (gzip level 1 when named .gz), equal bytes for equal input."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, grid)
    image.set_qform(grid, 1)
    image.set_sform(grid, 1)
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)
    return path


def bids_tree(
    root: Path,
    cohort: str = "phantom",
    *,
    num_subjects: int = 6,
    conditions: Sequence[str] = ("control", "lesion", "atrophy"),
    contrasts: Sequence[str] = CONTRASTS,
    missing: Sequence[Sequence[str]] = ((), ("T2w",)),
    sites: int = 2,
    heads: int = 3,
    sessions: Sequence[str] = (),
    spacing: Sequence[float] = (4.0, 4.0, 4.0),
    shape: Sequence[int] = (44, 52, 40),
    tilt: bool = True,
    seed: int = 0,
) -> Path:
    """A BIDS dataset `root/cohort` with participants.tsv and one brain mask a contrast; returns its folder.

    Subject i has condition i % len(conditions), lacks the contrasts missing[(i // len(conditions)) % len(missing)],
    comes from site i % sites and "head" i % heads (a label only). `sessions` () means none. With `tilt`, T2w is
    turned and stored as LPS, FLAIR is anisotropic and stored as PIR. Files:
    `sub-001[/ses-a]/anat/sub-001[_ses-a]_T1w.nii.gz`, `derivatives/masks/.../sub-001[_ses-a]_T1w_mask.nii.gz`.
    """
    folder = Path(root) / cohort
    rows = []
    for index in range(num_subjects):
        condition = conditions[index % len(conditions)]
        absent = missing[(index // len(conditions)) % len(missing)] if missing else ()
        subject = f"{index + 1:03}"
        age = 50 + (7 * index) % 35
        of = head(seed * 1000 + index, condition)
        rows.append(
            (
                f"sub-{subject}",
                age,
                "FM"[index % 2],
                f"site{index % sites}",
                f"head{index % heads}",
                condition,
            )
        )
        for session in sessions or ("",):
            for contrast in contrasts:
                if contrast not in absent:
                    _write_scan(
                        folder, subject, session, contrast, of, spacing, shape, tilt, seed * 1000 + index
                    )
    header = ("participant_id", "age", "sex", "site", "head", "condition")
    with (folder / "participants.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    description = {"Name": cohort, "BIDSVersion": "1.9.0", "DatasetType": "raw"}
    (folder / "dataset_description.json").write_text(json.dumps(description))
    return folder


def t1w_tree(root: Path, subjects: int) -> Path:
    """`root/sub-NNN/anat` with one T1w scan each, all of one head and small, and their participants.tsv."""
    grid = affine()
    labels = tissues(head(0), (44, 52, 40), grid)
    rows = ["participant_id\tage\tsex\tsite\thead\tcondition"]
    for number in range(subjects):
        name = f"sub-{number:03}"
        write(root / name / "anat" / f"{name}_T1w.nii.gz", intensities(labels, "T1w", number), grid)
        rows.append(f"{name}\t60\tF\ts\th\tcontrol")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    return root


def _write_scan(
    folder: Path,
    subject: str,
    session: str,
    contrast: str,
    of: Head,
    spacing: Sequence[float],
    shape: Sequence[int],
    tilt: bool,
    seed: int,
) -> None:
    degrees, axes, spacing, shape = (0.0, 0.0, 0.0), "RAS", list(spacing), list(shape)
    if tilt and contrast == "T2w":
        degrees, axes = (6.0, -4.0, 3.0), "LPS"
    if tilt and contrast == "FLAIR":
        axes, spacing[2], shape[2] = "PIR", spacing[2] * 1.5, round(shape[2] / 1.5)
    grid = affine(spacing, shape, degrees)
    labels = tissues(of, shape, grid)
    session_part = f"_ses-{session}" if session else ""
    anat = Path(f"sub-{subject}") / (f"ses-{session}/anat" if session else "anat")
    stem = f"sub-{subject}{session_part}_{contrast}"
    write(folder / anat / f"{stem}.nii.gz", *turned(intensities(labels, contrast, seed), grid, axes))
    mask = (labels >= 2).astype(np.uint8)
    write(folder / "derivatives/masks" / anat / f"{stem}_mask.nii.gz", *turned(mask, grid, axes))


def card(
    cohort: str = "phantom", *, contrasts: Sequence[str] = CONTRASTS, masks: bool = True
) -> dict[str, Any]:
    """The card of a tree made by `bids_tree`, ready for `cards.Card.model_validate` or for `datasets/*.yaml`."""
    place = "sub-{subject}[/ses-{session}]/anat/sub-{subject}[_ses-{session}][_run-{run}]"
    mask = "derivatives/masks/sub-{subject}[/ses-{session}]/anat/sub-{subject}[_ses-{session}]_{contrast}_mask.nii.gz"
    return {
        "name": cohort,
        "title": "Phantom heads",
        "access": "generated",
        "licence": "CC0-1.0",
        "citation": "none",
        "role": "tests",
        "contrasts": list(contrasts),
        "layouts": [
            {
                "files": {contrast: [f"{place}_{contrast}.nii.gz"] for contrast in contrasts},
                "mask": mask if masks else None,
                "source": "https://bids-specification.readthedocs.io",
            }
        ],
        "tables": [{"columns": {c: c for c in ("age", "sex", "site", "head", "condition")}}],
        "labels": {
            "condition": {
                "column": "condition",
                "classes": {c: [c] for c in ("control", "lesion", "atrophy")},
            }
        },
        "groups": ["head"],
        "simulated": True,
    }


def write_card(folder: Path, cohort: str = "phantom", **options: Any) -> Path:
    """`card` as `folder/<cohort>.yaml`."""
    path = Path(folder) / f"{cohort}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(card(cohort, **options), sort_keys=False))
    return path
