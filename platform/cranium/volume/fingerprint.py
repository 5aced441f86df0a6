"""Which sessions of different collections show the same head: a fingerprint of a few kilobytes, and how two compare.

A brain is put into a frame of its own (centroid, axes, spread along each axis) and sampled on a coarse grid; of each
point only the sign is kept of what differs from its neighbourhood. Spacing, intensity scale, shading, noise, a turn and
a few mm of mask leave most bits as they are; the ventricles and gyri of another person do not. What all heads have in
common is taken away before two are compared. Pure NumPy; what was measured stands in docs/quality.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from cranium.volume.slices import box

Array = NDArray[np.float32]

SIDE = 36  # cells along an axis of the grid
REACH = 2.1  # its half width, in standard deviations of the brain along that axis (2.24: the surface of an ellipsoid)
COARSE_MM = 2.0  # what a volume is averaged to first
NEIGHBOURHOOD = 1.1  # cells: sigma of the Gaussian that what is kept differs from
FRAMES = 2  # world axes, which a cut mask cannot turn; axes of inertia, which turn with the head

THRESHOLD = 0.52  # of the similarity without what all heads share
THRESHOLD_FEW = 0.65  # where fewer than `OTHERS` sessions show what that is
OTHERS = 8

_LINE = np.linspace(-REACH, REACH, SIDE)
_POINTS = np.stack(np.meshgrid(_LINE, _LINE, _LINE, indexing="ij"), axis=-1)  # [x, y, z, 3]
_DEPTH, _HEIGHT = np.indices((SIDE,) * 3)[1:]
# Every other line of cells, left to right: neighbours say nearly the same, and a mirror image has the same cells.
BALL = (np.linalg.norm(_POINTS, axis=-1) <= REACH) & ((_DEPTH + _HEIGHT) % 2 == 0)
CELLS = int(BALL.sum())
BYTES = -(-CELLS // 8)


@dataclass(frozen=True)
class Match:
    """Two sessions that show the same head: rows of the two tables compared, and how alike they are (at most 1)."""

    first: int
    second: int
    similarity: float


# ---- making one -----------------------------------------------------------------------------------------------------


def fingerprint(volumes: NDArray[Any], brain: NDArray[np.bool_], affine: NDArray[np.float64]) -> bytes:
    """The fingerprint of a conformed session: `volumes` [C, Z, H, W], `brain` [Z, H, W], affine (row, column, slice).

    For each of `FRAMES` 1 + C runs of `BYTES` bytes, a bit a cell: where there is brain, then for each channel where it
    is brighter than its neighbourhood; all zero for a channel that is absent.
    """
    means, coarse = _averaged([brain.view(np.uint8), *volumes], brain, affine)
    centre, covariance = _moments(means[0], coarse)
    planes: list[NDArray[np.bool_]] = []
    for axes in (np.eye(3), _inertia(covariance)):
        places, blur = _sampling(coarse, centre, axes, covariance)
        tissue, *values = _straight(means, places, blur) if not planes else _turned(means, places, blur)
        inside = tissue > 0.5
        planes.append(inside[BALL])
        weight = inside.astype(np.float32)
        near = np.maximum(ndimage.gaussian_filter(weight, NEIGHBOURHOOD), 1e-3)
        for value in values:
            value /= np.maximum(tissue, 1e-3)
            around = ndimage.gaussian_filter(value * weight, NEIGHBOURHOOD) / near  # of what is inside
            planes.append((inside & (value > around))[BALL])
    return b"".join(np.packbits(plane).tobytes() for plane in planes)


def _averaged(
    volumes: Sequence[NDArray[Any]], brain: NDArray[np.bool_], affine: NDArray[np.float64]
) -> tuple[Array, NDArray[np.float64]]:
    """Means [n, Z, Y, X] of n volumes in blocks of about `COARSE_MM` of the brain's box; and (z, y, x) -> mm.

    Blocks at the far end may reach beyond the box, where there is no brain.
    """
    steps = affine[:3, [2, 0, 1]]
    size = np.maximum(1, np.round(COARSE_MM / np.linalg.norm(steps, axis=0))).astype(int)
    part = box(brain)
    blocks = []
    for volume in volumes:
        fits = volume.dtype == np.uint8 and np.prod(size) <= 257
        summed = volume[part]
        for axis, step in enumerate(size):
            summed = _added(summed, axis, int(step), np.uint16 if fits else np.uint32)
        blocks.append((summed / np.prod(size)).astype(np.float32))
    coarse = np.eye(4)
    coarse[:3, :3] = steps * size
    coarse[:3, 3] = affine[:3, 3] + steps @ ([side.start for side in part] + (size - 1) / 2)
    return np.stack(blocks), coarse


def _added(values: NDArray[Any], axis: int, step: int, dtype: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    """Sums of `step` neighbours along an axis; the last may be of fewer. `np.add.reduceat` takes five times as long."""
    lines = np.moveaxis(values, axis, 0)
    found = lines[::step].astype(dtype)
    for offset in range(1, step):
        more = lines[offset::step]
        found[: len(more)] += more
    return np.moveaxis(found, 0, axis)


def _moments(share: Array, coarse: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centroid (mm) and covariance (mm2) of the brain."""
    sides = [
        np.arange(count) - (count - 1) / 2 for count in share.shape
    ]  # about the middle, for the digits' sake
    total = float(share.sum(dtype=np.float64))
    mean, second = np.zeros(3), np.zeros((3, 3))
    for a, b, other in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        plane = share.sum(axis=other, dtype=np.float64) / total
        second[a, b] = second[b, a] = sides[a] @ plane @ sides[b]
        for axis, line in ((a, plane.sum(axis=1)), (b, plane.sum(axis=0))):
            mean[axis], second[axis, axis] = sides[axis] @ line, sides[axis] ** 2 @ line
    middle = (np.array(share.shape) - 1) / 2
    centre = coarse[:3, :3] @ (mean + middle) + coarse[:3, 3]
    floor = np.diag(np.full(3, 1e-6))
    return centre, coarse[:3, :3] @ (second - np.outer(mean, mean)) @ coarse[:3, :3].T + floor


def _inertia(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axes of inertia as columns, in the order and with the signs nearest to those of the world."""
    _, axes = np.linalg.eigh(covariance)
    order = max(
        itertools.permutations(range(3)), key=lambda o: float(np.abs(np.diag(axes[:, list(o)])).sum())
    )
    axes = axes[:, list(order)]
    turned: NDArray[np.float64] = axes * np.where(np.diag(axes) < 0, -1, 1)
    return turned


def _sampling(
    coarse: NDArray[np.float64],
    centre: NDArray[np.float64],
    axes: NDArray[np.float64],
    covariance: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the points lie among the blocks [z y x, x, y, z], and the blur (blocks) that a cell's size asks for."""
    spread = np.sqrt(np.diag(axes.T @ covariance @ axes))
    world = centre + (_POINTS * spread) @ axes.T
    inverse = np.linalg.inv(coarse[:3, :3])
    places = (world - coarse[:3, 3]) @ inverse.T
    cell = spread * (_LINE[1] - _LINE[0])
    blur = 0.5 * (np.abs(axes) @ cell) / np.abs(coarse[:3, :3]).sum(axis=1)  # along world x, y, z
    return places.transpose(3, 0, 1, 2), blur[::-1]


def _turned(means: Array, places: NDArray[np.float64], blur: NDArray[np.float64]) -> list[Array]:
    """Of each volume [Z, Y, X] the values [x, y, z] at places, blurred."""
    return [ndimage.map_coordinates(ndimage.gaussian_filter(v, blur), places, order=1) for v in means]


def _straight(means: Array, places: NDArray[np.float64], blur: NDArray[np.float64]) -> Array:
    """The same where each axis of the grid runs along one of the volumes': a matrix an axis, a fifth of the time."""
    lines = (places[0, 0, 0], places[1, 0, :, 0], places[2, :, 0, 0])
    z, y, x = (
        ndimage.map_coordinates(
            ndimage.gaussian_filter1d(np.eye(count, dtype=np.float32), sigma, axis=0),
            np.stack(np.meshgrid(line, np.arange(count), indexing="ij")),
            order=1,
        )
        for line, count, sigma in zip(lines, means.shape[1:], blur, strict=True)
    )
    values: Array = np.tensordot(y @ (means @ x.T), z, (1, 1))  # [n, y, x, z]
    return values.transpose(0, 2, 1, 3)


# ---- comparing ------------------------------------------------------------------------------------------------------

_FLIP = np.zeros((SIDE,) * 3, np.int64)
_FLIP[BALL] = np.arange(CELLS)
_FLIP = _FLIP[::-1][BALL]  # cell -> the cell on the other side
_BLOCK = 512  # rows compared at a time


def matches(prints: Sequence[bytes], people: Sequence[str], rows: Sequence[int]) -> list[Match]:
    """Pairs of one of `rows` and any other session, of different `people`, whose fingerprints match; the best first.

    `prints` [n] of the same channels and `people` [n], one a session. Raises `ValueError` for other layouts.
    """
    if not len(rows):
        return []
    names = np.unique(np.array([str(person) for person in people]), return_inverse=True)[1]
    found: dict[tuple[int, int], float] = {}
    for signs in _unpacked(prints):
        there = np.flatnonzero(signs.any(axis=1))
        if len(there) < 2:
            continue
        threshold = THRESHOLD if len(there) - 2 >= OTHERS else THRESHOLD_FEW
        cells, mirrored = _filled(signs[there])
        wanted = np.flatnonzero(np.isin(there, rows))
        for start in range(0, len(wanted), _BLOCK):
            block = wanted[start : start + _BLOCK]
            alike = similarity(cells, mirrored, block)
            alike[names[there[block]][:, None] == names[there][None]] = -1
            for i, j in np.argwhere(alike >= threshold).tolist():
                pair = (int(there[block[i]]), int(there[j]))
                pair = (min(pair), max(pair))
                found[pair] = max(found.get(pair, -1.0), float(alike[i, j]))
    listed = [Match(*pair, round(value, 3)) for pair, value in found.items()]
    return sorted(listed, key=lambda match: (-match.similarity, match.first, match.second))


def _unpacked(prints: Sequence[bytes]) -> Iterator[NDArray[np.int8]]:
    """For every channel and frame [n, CELLS]: 1 brighter, -1 not, 0 outside the brain or absent."""
    sizes = sorted({len(text) for text in prints})
    if len(sizes) != 1 or sizes[0] % (BYTES * FRAMES) or sizes[0] < 2 * BYTES * FRAMES:
        raise ValueError(f"fingerprints of {sizes} bytes cannot be compared")
    packed = np.frombuffer(b"".join(prints), np.uint8).reshape(len(prints), FRAMES, -1, BYTES)
    for frame, channel in itertools.product(range(FRAMES), range(1, packed.shape[2])):
        inside, brighter = (
            np.unpackbits(packed[:, frame, k], axis=1, count=CELLS).astype(np.int8) for k in (0, channel)
        )
        absent = ~packed[:, frame, channel].any(axis=1)
        inside[absent] = 0
        yield inside * (2 * brighter - 1)


def _filled(signs: NDArray[np.int8]) -> tuple[Array, Array]:
    """Signs [n, cells] as float, outside a brain the mean of the others; and the same mirrored."""
    cells = signs.astype(np.float32)
    if len(cells) - 2 >= OTHERS:
        mean = cells.sum(axis=0) / np.maximum((signs != 0).sum(axis=0), 1)
        cells = np.where(signs == 0, mean, cells)
    return cells, np.ascontiguousarray(cells[:, _FLIP])


def similarity(cells: Array, mirrored: Array, rows: NDArray[np.int64]) -> Array:
    """Correlation [rows, n] of sessions, the greater of as it is and mirrored; `cells` and `mirrored` [n, cells].

    Where `OTHERS` or more are there, the mean c of all but the two compared is taken from both: <a - c, b - c> over the
    norms, with every term an inner product of rows and of their total, so that all pairs cost a matrix product.
    """
    squares = np.einsum("ij,ij->i", cells, cells)
    others = len(cells) - 2
    product = cells[rows] @ cells.T
    flipped = cells[rows] @ mirrored.T
    if others < OTHERS:
        plain: Array = np.maximum(product, flipped) / np.sqrt(squares[rows][:, None] * squares[None])
        return plain

    def inner(both: Array, square: Array, total: Array) -> tuple[Any, Any, Any]:
        """<a, c>, <b, c> and <c, c> for c = (total - a - b) / others."""
        mine, theirs = cells[rows] @ total, cells @ total
        whole = float(cells.sum(axis=0) @ total)
        a, b = square[rows][:, None], square[None]
        ac = (mine[:, None] - a - both) / others
        bc = (theirs[None] - b - both) / others
        cc = (whole + a + b + 2 * both - 2 * mine[:, None] - 2 * theirs[None]) / others**2
        return ac, bc, cc

    ac, bc, cc = inner(product, squares, cells.sum(axis=0))
    a, b = squares[rows][:, None], squares[None]
    norm = np.sqrt(np.maximum(a - 2 * ac + cc, 1e-3) * np.maximum(b - 2 * bc + cc, 1e-3))
    straight = (product - ac - bc + cc) / norm
    ac, bc, cc = inner(flipped, np.einsum("ij,ij->i", cells, mirrored), mirrored.sum(axis=0))
    result: Array = np.maximum(straight, (flipped - ac - bc + cc) / norm)
    return result
