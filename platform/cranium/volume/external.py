"""A brain mask by a program that is installed beside Cranium, such as HD-BET or SynthStrip.

The published weights of both run in their own packages only, so what is plugged in is the program: it reads one NIfTI
file and writes a mask of the same voxels. Its weights are a file whose SHA-256 is declared and checked first.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cranium.volume import nifti
from cranium.volume.masks import Segment, same_grid
from cranium.volume.quality import Rejected

TIMEOUT_S = 1800.0


def parse(command: str, weights: Path | None, sha256: str | None) -> list[str]:
    """The words of a command with `{input}`, `{output}` and, where weights are given, `{weights}`.

    No shell ever sees them. Raises `ValueError`: a placeholder lacks, the program is not installed, or the weights
    have another SHA-256 than the declared one.
    """
    words = shlex.split(command)
    text = " ".join(words)
    if missing := [name for name in ("{input}", "{output}") if name not in text]:
        raise ValueError(f"`{command}` lacks {' and '.join(missing)}")
    if not words or shutil.which(words[0]) is None:
        raise ValueError(f"`{words[0]}` is no program that can be run here; give its full path")
    if ("{weights}" in text or weights or sha256) and not (weights and sha256):
        raise ValueError("weights need both a path (mask_weights) and a SHA-256 (ingest.mask_sha256)")
    if weights and (found := _sha256(weights)) != sha256:
        raise ValueError(f"{weights} has SHA-256 {found}, not {sha256} as declared")
    return [word.replace("{weights}", str(weights)) for word in words]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def segmenter(words: list[str], timeout_s: float = TIMEOUT_S) -> Segment:
    """The program as a function of a scan [I, J, K] and its affine. Raises `ValueError` with what it said."""

    def segment(data: NDArray[np.float32], affine: NDArray[np.float64]) -> NDArray[np.bool_]:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "scan.nii.gz"), Path(folder, "mask.nii.gz")
            _write(source, data, affine)
            names = {"{input}": str(source), "{output}": str(target)}
            _call([_filled(word, names) for word in words], timeout_s)
            try:
                mask = nifti.read(target)
            except Rejected as reason:
                raise ValueError(f"{words[0]} wrote no mask that can be read: {reason}") from reason
        if not same_grid(mask.data.shape, mask.affine, data.shape, affine):
            raise ValueError(f"{words[0]} wrote a mask on other voxels than the scan's")
        found: NDArray[np.bool_] = mask.data != 0  # a mask, or the scan with all but the brain set to zero
        return found

    return segment


def _filled(word: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        word = word.replace(name, value)
    return word


def _call(words: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{words[0]} took longer than {timeout_s:.0f} s") from None
    except OSError as error:
        raise ValueError(f"{words[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        said: Any = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise ValueError(f"{words[0]} ended with {done.returncode} and said: {said[-1][:200]}")


def _write(path: Path, data: NDArray[np.float32], affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nib.save(image, path)
