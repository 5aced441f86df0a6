"""Pictures of sessions read from their shards: one slice of every contrast, the brain's outline, labels in colour."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from cranium.volume import shard

COLUMNS = ("slice", "pixels", "crc", "mask", "mask_crc")  # of a shard, that are read
SIDE = 176  # pixels of a picture
MARGIN = 0.06  # around the brain, of its size
OUTLINE = (255, 176, 0)
LABELS = ((0, 158, 255), (255, 64, 129), (0, 214, 143), (255, 241, 0), (178, 102, 255), (255, 122, 64))


@dataclass(frozen=True)
class Picture:
    """One contrast of a session: a PNG as a data URI, or None where it is missing, and what it shows in words."""

    label: str
    image: str | None
    alt: str


@dataclass(frozen=True)
class Card:
    """A session of the mosaic: who, its pictures, and lines of text below them; `loud` when it is flagged."""

    title: str
    score: str
    pictures: tuple[Picture, ...]
    lines: tuple[str, ...]
    loud: bool


Groups = dict[tuple[str, str], list[tuple[str, int, int]]]  # (subject, session) -> file, row group, rows


def groups(folder: Path, manifest: dict[str, Any]) -> Groups:
    """Where the row groups of every session lie, in the order of its slices."""
    found: Groups = {}
    base = shard.base(folder)
    for entry in manifest["shards"]:
        for index, group in enumerate(entry["row_groups"]):
            place = (f"{base}/{entry['file']}", index, int(group["rows"]))
            found.setdefault((group["subject"], group["session"]), []).append(place)
    return found


def pictures(
    where: Sequence[tuple[str, int, int]], channels: Sequence[str], present: Sequence[bool]
) -> tuple[Picture, ...]:
    """The middle slice of a session, or of its middle row group the one with most labels, in every channel."""
    middle = sum(rows for *_, rows in where) // 2
    group = 0
    while middle >= where[group][2]:
        middle -= where[group][2]
        group += 1
    path, index, _ = where[group]
    table = shard.read_row_group(path, index, COLUMNS)
    shard.check_rows(table, f"{path}, row group {index}")
    drawn = shard.masks(table)
    if drawn is not None and drawn.any():
        middle = int((drawn > 0).sum(axis=(1, 2, 3)).argmax())
    stack = shard.pixels(table)[middle]  # [C, S, H, W]
    slice_ = stack[:, stack.shape[1] // 2]
    labels = np.zeros(slice_.shape[1:], np.uint8) if drawn is None else drawn[middle][drawn.shape[1] // 2]
    number = int(table.column("slice")[middle].as_py())
    box = _square(slice_.any(axis=0) | (labels > 0))
    found = []
    for channel, image, there in zip(channels, slice_, present, strict=True):
        words = f"{channel}, slice {number + 1} of the grid, with the outline of the brain"
        words += " and labels" if labels.any() else ""
        found.append(Picture(channel, _picture(image, labels, box) if there else None, words))
    return tuple(found)


def _square(inside: NDArray[np.bool_]) -> tuple[slice, slice]:
    """A square around what is inside, with a margin, within the picture."""
    if not inside.any():
        return slice(None), slice(None)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    half = int(np.ceil(extent * (0.5 + MARGIN)))
    parts = []
    for ends, size in ((rows, inside.shape[0]), (columns, inside.shape[1])):
        centre = int(ends[0] + ends[-1] + 1) // 2
        first = max(0, min(centre - half, size - 2 * half))
        parts.append(slice(first, min(size, first + 2 * half)))
    return parts[0], parts[1]


def _picture(image: NDArray[Any], labels: NDArray[np.uint8], box: tuple[slice, slice]) -> str:
    grey = image[box] if image.dtype == np.uint8 else (image[box] >> 8).astype(np.uint8)
    brain = _enlarged((image[box] > 0).astype(np.uint8) * 255, Image.Resampling.BILINEAR) > 127
    shown = _enlarged(grey, Image.Resampling.BICUBIC)
    picture = np.repeat(shown[:, :, None], 3, axis=2).astype(np.float32)
    classes = _enlarged(labels[box], Image.Resampling.NEAREST)
    for value in np.unique(classes[classes > 0]):
        tint = np.array(LABELS[(int(value) - 1) % len(LABELS)], np.float32)
        here = classes == value
        picture[here] = 0.65 * picture[here] + 0.35 * tint
        picture[here & ~ndimage.binary_erosion(here)] = tint
    picture[brain & ~ndimage.binary_erosion(brain, border_value=1)] = OUTLINE
    buffer = io.BytesIO()
    made = Image.fromarray(picture.round().clip(0, 255).astype(np.uint8))
    made.quantize(96, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _enlarged(image: NDArray[np.uint8], way: Image.Resampling) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((SIDE, SIDE), way))
