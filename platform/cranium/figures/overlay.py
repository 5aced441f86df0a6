"""A subject's segmentation as a picture: the truth and the prediction side by side on the slice with most to find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from .mosaic import LABELS
from .page import png

SIDE = 320  # pixels of one of the two
MARGIN = 4  # pixels of the slice around the head
TINT = 0.45
GAP = 6
COLOURS = ("blue", "pink", "green", "yellow", "violet", "orange")  # of `mosaic.LABELS`, in words
OUTLINE = (255, 255, 255)  # of the truth, on both


def write(path: Path, pixels: NDArray[Any], truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> None:
    """Draw stacks [n, C, S, H, W] with class numbers [n, H, W] of their middle slices into the PNG `path`.

    Left the truth, right the prediction, each class in a colour; the truth's outline is white on both. The slice is the
    one with most truth, else with most prediction, else the middle one.
    """
    index = _slice(truth, prediction)
    stack = pixels[index][:, pixels.shape[2] // 2]
    image = stack[int(stack.reshape(len(stack), -1).any(axis=1).argmax())]  # the first contrast that is there
    box = _box((image > 0) | (truth[index] > 0) | (prediction[index] > 0))
    grey = image[box] if image.dtype == np.uint8 else (image[box] >> 8).astype(np.uint8)
    halves = [
        _half(grey, truth[index][box], truth[index][box]),
        _half(grey, prediction[index][box], truth[index][box]),
    ]
    gap = np.zeros((SIDE, GAP, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([halves[0], gap, halves[1]], axis=1)).save(path, "png", optimize=True)


def read(path: Path) -> tuple[str, str] | None:
    """The truth and the prediction of a picture that `write` made, each as a data URI; None when it is not there."""
    if not path.is_file():
        return None
    pixels = np.asarray(Image.open(path))
    return png(pixels[:, :SIDE]), png(pixels[:, SIDE + GAP :])


def legend(classes: Sequence[str]) -> str:
    """Which class has which colour, in words."""
    return ", ".join(f"{COLOURS[k % len(COLOURS)]} {name}" for k, name in enumerate(classes))


def _slice(truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> int:
    for labels in (truth, prediction):
        if labels.any():
            return int((labels > 0).sum(axis=(1, 2)).argmax())
    return len(truth) // 2


def _box(inside: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The square around what is inside, so that nothing is stretched."""
    size = inside.shape[0]
    if not inside.any():
        return slice(0, size), slice(0, size)
    ends = [np.flatnonzero(inside.any(axis=axis))[[0, -1]] for axis in (1, 0)]
    extent = min(size, max(int(last - first) for first, last in ends) + 1 + 2 * MARGIN)
    starts = [int(np.clip((first + last + 1 - extent) // 2, 0, size - extent)) for first, last in ends]
    return slice(starts[0], starts[0] + extent), slice(starts[1], starts[1] + extent)


def _half(grey: NDArray[np.uint8], classes: NDArray[np.uint8], truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shown = _enlarged(grey, Image.Resampling.BICUBIC).astype(np.float32)
    picture = np.repeat(shown[:, :, None], 3, axis=2)
    large = _enlarged(classes, Image.Resampling.NEAREST)
    for value in np.unique(large[large > 0]):
        tint = np.array(LABELS[(int(value) - 1) % len(LABELS)], np.float32)
        picture[large == value] = (1 - TINT) * picture[large == value] + TINT * tint
    edge = _enlarged((truth > 0).astype(np.uint8), Image.Resampling.NEAREST) > 0
    picture[edge & ~ndimage.binary_erosion(edge, iterations=2)] = OUTLINE
    return picture.round().clip(0, 255).astype(np.uint8)


def _enlarged(image: NDArray[np.uint8], way: Image.Resampling) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((SIDE, SIDE), way))
