"""Brain masks from deepbet's two TorchScript U-Nets (Fisch et al. 2024, Comput. Biol. Med. 179:108845; MIT licence).

The networks are read as files under a pinned SHA-256; the deepbet package itself is never imported. The steps below are
its published recipe: a coarse pass over the whole head finds the bounding box of the brain, a fine pass inside it gives
the mask, and the largest component without holes is kept.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

BOX_SHA256 = "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa"
MASK_SHA256 = "de8ee7c69654d0dd3935dc4a5d84571d8ecf4637a6bfc01df399c4c2bc86e0fd"
BOX_SIZE = 128  # voxels a side, coarse pass
MASK_SIZE = 256  # voxels a side, fine pass
BOX_MARGIN = 0.1  # of the box on each side
MIN_BRAIN_PLANE = 0.02  # a plane belongs to the box when more than this share of it is brain
_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True)
class Networks:
    """The coarse (`box`) and the fine (`mask`) network; both map `[1, 1, D, D, D]` to `[1, 2, D, D, D]`."""

    box: Any
    mask: Any


def load(box: Path, mask: Path) -> Networks:
    """Read both networks onto the CPU.

    TorchScript can run code, so a file whose SHA-256 is not the pinned one is refused with a `ValueError` before
    torch sees it.
    """
    return Networks(_read_script(box, BOX_SHA256), _read_script(mask, MASK_SHA256))


def _read_script(path: Path, sha256: str) -> Any:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, not the pinned {sha256}: fetch it again from deepbet 1.0.2"
        )
    # torch.export can't read these files, so the advice to move to it is void.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.load(io.BytesIO(content), map_location="cpu").eval()  # type: ignore[no-untyped-call]


def segment(volume: NDArray[Any], affine: NDArray[Any], networks: Networks) -> NDArray[np.bool_]:
    """Brain mask `[X, Y, Z]` on the grid of `volume` `[X, Y, Z]` (any axes; `affine` [4, 4] tells them).

    Raises `ValueError` when the volume is not 3-D or holds no brain.
    """
    if volume.ndim != 3:
        raise ValueError(f"a brain mask needs a 3-D volume, not one of shape {volume.shape}")
    axes = io_orientation(affine)
    canonical = apply_orientation(np.nan_to_num(np.asarray(volume, np.float32)), ornt_transform(axes, _RAS))
    head = torch.from_numpy(np.ascontiguousarray(canonical))
    with torch.inference_mode():
        coarse = _resize(head, (BOX_SIZE,) * 3)
        ordered = coarse.flatten().sort().values  # torch.quantile refuses more than 2^24 values
        low, high = (float(ordered[round(q * (len(ordered) - 1))]) for q in (0.005, 0.995))
        inside = networks.box(_standardise(coarse, low, high)[None, None])[0, 1] > 0.5
        box = _bounding_box(_largest_component(inside.numpy()), tuple(head.shape))
        fine = _standardise(_resize(head[box], (MASK_SIZE,) * 3), low, high)
        brain = networks.mask(fine[None, None])[0, 1]
        inside = _resize(brain, tuple(head[box].shape)) > 0.5
    mask = np.zeros(head.shape, bool)
    mask[box] = ndimage.binary_fill_holes(_largest_component(inside.numpy()))
    back: NDArray[np.bool_] = apply_orientation(mask, ornt_transform(_RAS, axes))
    return np.ascontiguousarray(back)


def _resize(volume: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return functional.interpolate(volume[None, None], shape, mode="nearest-exact")[0, 0]


def _standardise(volume: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Clip to [low, high], then give it the mean and deviation the networks were trained with."""
    clipped = ((volume - low) / max(high - low, 1e-6)).clamp(0, 1)
    return 0.226 * (clipped - clipped.mean()) / clipped.std().clamp(min=1e-6) + 0.449


def _largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count == 0:
        raise ValueError("no brain found: is this a T1-weighted head with a correct affine?")
    largest: NDArray[np.bool_] = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return largest


def _bounding_box(coarse: NDArray[np.bool_], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Box of a coarse mask, scaled to a grid of `shape` and widened by `BOX_MARGIN` on each side."""
    box = []
    for axis, size in enumerate(shape):
        planes = np.flatnonzero(coarse.mean(axis=tuple({0, 1, 2} - {axis})) > MIN_BRAIN_PLANE)
        if len(planes) == 0:
            raise ValueError("too little brain found: does the volume show the whole head?")
        scale = size / coarse.shape[axis]
        centre = round(scale * (planes[0] + planes[-1] + 1) / 2)
        half = round((1 + 2 * BOX_MARGIN) * scale * (planes[-1] + 1 - planes[0])) / 2
        box.append(slice(max(0, int(centre - half)), min(size, int(centre + half))))
    return tuple(box)
