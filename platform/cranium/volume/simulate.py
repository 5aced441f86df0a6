"""Several MR contrasts of a new subject, simulated from the tissue fractions of one head.

The order follows the physics: tissue fractions -> warp -> lesions -> signed signal of each tissue by the spin-echo
or inversion-recovery equation, mixed by fraction -> slice profile -> coil sensitivity -> magnitude with Rician noise.
Arrays of fractions are `[T, X, Y, Z]` float32 with T in the order of `TISSUES`; what is missing to 1 is bone or air,
both silent at these echo times. Grids are RAS with one spacing in mm; displacements are mm, `[3, X, Y, Z]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

TISSUES = ("csf", "gm", "wm", "lesion", "fat", "muscle")
CSF, GM, WM, LESION, FAT, MUSCLE = range(len(TISSUES))


# ---- signal ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relaxation:
    """T1 and T2 in ms, and the density of visible protons relative to water."""

    t1: float
    t2: float
    density: float


# GM and WM: T2 at both fields and T1 at 3 T, and muscle: Stanisz et al. 2005, Magn Reson Med 54:507. T1 at 1.5 T:
# Rooney et al. 2007, Magn Reson Med 57:308, also the CSF T1 of 4.3 s at every field. CSF T2 of about 2 s: Spijkerman
# et al. 2018, MAGMA 31:415. Fat: de Bazelaire et al. 2004, Radiology 230:652. Water of GM and WM: Whittall et al.
# 1997, Magn Reson Med 37:34; lesions hold 6 % more than WM: Laule et al. 2004, J Neurol 251:284. Chosen, not measured:
# the T1 and T2 of lesions (longer than GM, far from CSF) and the densities of fat and muscle.
RELAXATION: Mapping[float, Mapping[str, Relaxation]] = {
    1.5: {
        "csf": Relaxation(4300, 2000, 1.0),
        "gm": Relaxation(1188, 95, 0.83),
        "wm": Relaxation(656, 72, 0.71),
        "lesion": Relaxation(1250, 150, 0.75),
        "fat": Relaxation(343, 58, 0.45),
        "muscle": Relaxation(1008, 44, 0.70),
    },
    3.0: {
        "csf": Relaxation(4300, 2000, 1.0),
        "gm": Relaxation(1820, 99, 0.83),
        "wm": Relaxation(1084, 69, 0.71),
        "lesion": Relaxation(1900, 145, 0.75),
        "fat": Relaxation(382, 68, 0.45),
        "muscle": Relaxation(1412, 50, 0.70),
    },
}


@dataclass(frozen=True)
class Sequence:
    """A spin echo, or an inversion recovery when `ti` is given. Times in ms; `voxel` in mm, slices along its third."""

    tr: float
    te: float
    ti: float | None
    voxel: tuple[float, float, float]
    noise: float  # standard deviation in one channel, as a share of the white-matter signal

    def signal(self, tissue: Relaxation) -> float:
        """Signed signal of a pure voxel (Bernstein, King, Zhou 2004, Handbook of MRI Pulse Sequences, ch. 14 and 17).

        Spin echo: PD (1 - e^(-TR/T1)) e^(-TE/T2). Inversion recovery: PD (1 - 2 e^(-TI/T1) + e^(-TR/T1)) e^(-TE/T2).
        """
        recovery = 1 - math.exp(-self.tr / tissue.t1)
        if self.ti is not None:
            recovery = 1 - 2 * math.exp(-self.ti / tissue.t1) + math.exp(-self.tr / tissue.t1)
        return tissue.density * recovery * math.exp(-self.te / tissue.t2)


def mix(fractions: Array, sequence: Sequence, tesla: float) -> Array:
    """Signed signal `[X, Y, Z]`, in units of the white-matter signal, of fractions `[T, X, Y, Z]`."""
    if tesla not in RELAXATION:
        raise ValueError(f"no relaxation times at {tesla} T; known: {sorted(RELAXATION)}")
    pure = np.array([sequence.signal(RELAXATION[tesla][name]) for name in TISSUES])
    signed: Array = np.tensordot((pure / abs(pure[WM])).astype(np.float32), fractions, 1)
    return signed


# ---- tissues of a real head ----------------------------------------------------------------------------------------


def mixture(values: NDArray[np.floating], classes: int = 3, iterations: int = 100) -> NDArray[np.float64]:
    """Rising means of a Gaussian mixture fitted by EM to a 256-bin histogram of `values` (Dempster et al. 1977)."""
    if values.size < 10 * classes or not np.ptp(values) > 0:
        raise ValueError(
            f"a mixture of {classes} needs at least {10 * classes} values that differ; got {values.size}"
        )
    counts, edges = np.histogram(values, 256, range=tuple(np.percentile(values, (0.5, 99.5))))
    level = (edges[1:] + edges[:-1]) / 2
    mean = np.percentile(values, 100 * (np.arange(classes) + 0.5) / classes)
    deviation = np.full(classes, values.std() / classes)
    weight = np.full(classes, 1 / classes)
    for _ in range(iterations):
        density = weight * np.exp(-0.5 * ((level[:, None] - mean) / deviation) ** 2) / deviation
        share = counts[:, None] * density / np.maximum(density.sum(1, keepdims=True), 1e-300)
        total = share.sum(0) + 1e-9
        weight, mean = total / total.sum(), (share * level[:, None]).sum(0) / total
        deviation = np.sqrt((share * (level[:, None] - mean) ** 2).sum(0) / total) + 1e-3 * np.ptp(level)
    return np.sort(mean)


def split(intensity: Array, means: NDArray[np.floating]) -> Array:
    """Fractions `[len(means), ...]` of each intensity as a linear mix of its two neighbouring class means."""
    position = np.interp(intensity, means, np.arange(len(means)))
    return np.stack([np.clip(1 - np.abs(position - k), 0, 1) for k in range(len(means))]).astype(np.float32)


def flatten(t1: Array, brain: Mask, degree: int = 2, rounds: int = 30) -> Array:
    """`t1` without its slow shading, a polynomial through the white level of the brain, continued outside it.

    The polynomial is the 0.95 expectile of log intensity by asymmetric least squares (Newey and Powell 1987,
    Econometrica 55:819): white matter is the brightest tissue of a T1-weighted brain and everywhere within reach.
    """
    where = np.argwhere(brain)
    low, high = where.min(0), where.max(0)
    grid = np.indices(t1.shape, np.float32)
    place = [np.clip((2 * g - lo - hi) / (hi - lo), -1, 1) for g, lo, hi in zip(grid, low, high, strict=True)]
    powers = [p for p in np.ndindex((degree + 1,) * 3) if sum(p) <= degree]
    core = np.argwhere(ndimage.binary_erosion(brain, iterations=3))  # the rim is cortex and CSF only
    chosen = tuple(core[(core % 2 == 0).all(1)].T)
    level = np.log(np.maximum(t1[chosen], 0.05 * np.median(t1[brain]))).astype(np.float64)
    terms = np.stack(
        [place[0][chosen] ** i * place[1][chosen] ** j * place[2][chosen] ** k for i, j, k in powers], 1
    )
    weight = np.ones(len(level))
    for _ in range(rounds):
        weighted = terms * weight[:, None]
        factors = np.linalg.solve(terms.T @ weighted + 1e-3 * np.eye(len(powers)), weighted.T @ level)
        weight = np.where(level > terms @ factors, 0.95, 0.05)
    shading = np.zeros_like(t1)
    for (i, j, k), factor in zip(powers, factors, strict=True):
        shading += np.float32(factor) * place[0] ** i * place[1] ** j * place[2] ** k
    return np.asarray(t1 * np.exp(-shading), np.float32)


def label_head(t1: Array, brain: Mask, spacing: float, maps: tuple[Array, Array] | None = None) -> Array:
    """Fractions `[T, X, Y, Z]` of a whole T1 head, or of a bare brain, which gets a skull and scalp of plain shells.

    Inside `brain` CSF, GM and WM come from a Gaussian mixture, or from the given (GM, WM) `maps`. Outside it the same
    T1 says how much is fat or muscle; dark voxels next to the brain are CSF, other dark ones bone or air.
    """
    fractions = np.zeros((len(TISSUES), *t1.shape), np.float32)
    depth = ndimage.distance_transform_edt(~brain, sampling=spacing)
    means = mixture(t1[brain])
    if maps is None:
        fractions[:3] = split(t1, means)
    else:
        fractions[GM], fractions[WM] = maps
        fractions[CSF] = np.clip(1 - maps[0] - maps[1], 0, 1)
    fractions[:3] *= brain
    outside = t1 / means[2] * ~brain
    if (
        outside > 0.3
    ).sum() < 0.2 * brain.sum():  # bare brain: 3 mm of CSF, 6 mm of bone, 3 of muscle, 4 of fat
        fractions[CSF] += (depth > 0) & (depth <= 3)
        fractions[MUSCLE] += (depth > 9) & (depth <= 12)
        fractions[FAT] += (depth > 12) & (depth <= 16)
        return _deface(fractions, brain, depth, spacing)
    bright = max(1.0, float(np.percentile(outside[outside > 0.3], 90)))
    mixed = split(outside, np.array([0.12, 0.5, bright]))
    fractions[MUSCLE] += mixed[1] * ~brain
    fractions[FAT] += mixed[2] * ~brain
    fractions[CSF] += mixed[0] * ((depth > 0) & (depth <= 2.5))
    return _deface(fractions, brain, depth, spacing)


def _deface(fractions: Array, brain: Mask, depth: NDArray[np.floating], spacing: float) -> Array:
    """Removes what shows a face (in front of and below the front of the brain) and the neck; keeps scalp and skull."""
    where = np.argwhere(brain)
    low, high = where.min(0), where.max(0)
    _, y, z = np.ogrid[tuple(slice(n) for n in brain.shape)]
    front = (y > low[1] + 0.55 * (high[1] - low[1])) & (z < low[2] + 0.55 * (high[2] - low[2])) & (depth > 9)
    silent = front | (depth > 26) | ((z < low[2] - 8 / spacing) & (depth > 0))
    fractions *= ~np.broadcast_to(silent, brain.shape)
    return fractions


def find_ventricles(csf: Array, brain: Mask, spacing: float) -> Mask:
    """Lateral ventricles `[X, Y, Z]`: CSF deep in the middle of the brain, pieces of at least 0.5 ml.

    Raises `ValueError` when nothing is found.
    """
    where = np.argwhere(brain)
    low, span = where.min(0), np.ptp(where, axis=0)
    x, y, z = ((np.arange(n) - low[k]) / span[k] for k, n in enumerate(brain.shape))
    window = (
        ((x > 0.32) & (x < 0.68))[:, None, None]
        & ((y > 0.3) & (y < 0.78))[:, None]
        & ((z > 0.38) & (z < 0.74))
    )
    deep = ndimage.distance_transform_edt(brain, sampling=spacing) > 18
    labels, _ = ndimage.label((csf > 0.5) & window & deep)
    sizes = np.bincount(labels.ravel()) * spacing**3 / 1000
    sizes[0] = 0
    if sizes.max() < 0.5:
        raise ValueError("no ventricles found: check the brain mask and the T1 contrast")
    found: Mask = (sizes >= 0.5)[labels]
    return found


# ---- shape ---------------------------------------------------------------------------------------------------------


def smooth_velocity(shape: tuple[int, ...], spacing: float, rms: float, rng: np.random.Generator) -> Array:
    """Random velocity `[3, X, Y, Z]` mm, smooth over about 20 mm, of the given root mean square per component."""
    field = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 20 / spacing) for _ in range(3)])
    scaled: Array = (field * (rms / np.sqrt(np.mean(field**2)))).astype(np.float32)
    return scaled


def widening_velocity(ventricles: Mask, spacing: float) -> Array:
    """Velocity `[3, X, Y, Z]` whose pull-back widens the ventricles by about 1 mm on every side."""
    inside = ndimage.distance_transform_edt(ventricles, sampling=spacing)
    signed = ndimage.distance_transform_edt(~ventricles, sampling=spacing) - inside
    normal = np.stack(np.gradient(ndimage.gaussian_filter(signed, 2 / spacing), spacing))
    reach = np.exp(-np.abs(signed) / 12)
    return np.stack([ndimage.gaussian_filter(-n * reach, 2 / spacing) for n in normal]).astype(np.float32)


def integrate(velocity: Array, spacing: float, squarings: int = 5) -> Array:
    """Displacement in mm of the diffeomorphism exp(velocity), by scaling and squaring (Arsigny et al. 2006, MICCAI)."""
    grid = np.indices(velocity.shape[1:], dtype=np.float32)
    displacement = velocity / np.float32(2**squarings)
    for _ in range(squarings):
        points = grid + displacement / np.float32(spacing)
        displacement = displacement + np.stack(
            [ndimage.map_coordinates(d, points, order=1, mode="nearest") for d in displacement]
        )
    return displacement


def jacobian(displacement: Array, spacing: float) -> NDArray[np.float64]:
    """Determinant `[X, Y, Z]` of the gradient of x + displacement(x)."""
    gradient = np.stack([np.stack(np.gradient(d.astype(np.float64), spacing)) for d in displacement])
    return np.asarray(np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3)))


def random_affine(rng: np.random.Generator) -> NDArray[np.float64]:
    """Linear map [3, 3]: rotations within 8 degrees, scales within 6 %, shears within 3 %."""
    a, b, c = np.radians(rng.uniform(-8, 8, 3))
    turn = _rotation(a, 0) @ _rotation(b, 1) @ _rotation(c, 2)
    shear = np.eye(3) + np.triu(rng.uniform(-0.03, 0.03, (3, 3)), 1)
    return turn @ np.diag(rng.uniform(0.94, 1.06, 3)) @ shear


def _rotation(angle: float, axis: int) -> NDArray[np.float64]:
    i, j = (k for k in range(3) if k != axis)
    turn = np.eye(3)
    turn[i, i] = turn[j, j] = math.cos(angle)
    turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
    return turn


def warp(
    fields: Array, inner: int, linear: NDArray[np.float64], displacement: Array, spacing: float
) -> NDArray[np.float32]:
    """Pull `fields` `[T, X, Y, Z]` (`spacing` mm) back through x -> phi(linear x), both about the grid's centre.

    phi is given by its `displacement` in mm at every second voxel. The first field must cover the `inner` fields after
    it (a brain its tissues): those are looked up only within two voxels of it, which saves a third of the time.
    """
    centre = (np.array(fields.shape[1:]) - 1) / 2
    matrix, offset = linear.astype(np.float32), (centre - linear @ centre).astype(np.float32)
    half = [np.arange(0, n + 1, 2, dtype=np.float32) for n in fields.shape[1:]]
    x, y, z = half[0][:, None, None], half[1][:, None], half[2]
    knots = np.stack([m[0] * x + m[1] * y + m[2] * z + o for m, o in zip(matrix, offset, strict=True)])
    moved = [ndimage.map_coordinates(d, knots / 2, order=1, mode="nearest") for d in displacement]
    points = _double((knots + np.stack(moved) / spacing).astype(np.float32), fields.shape[1:])
    warped = np.zeros(fields.shape, np.float32)
    outer = [0, *range(inner + 1, len(fields))]
    for k in outer:
        warped[k] = ndimage.map_coordinates(fields[k], points, order=1)
    near = ndimage.binary_dilation(warped[0] > 0, iterations=2)
    for k in range(1, inner + 1):
        warped[k][near] = ndimage.map_coordinates(fields[k], points[:, near], order=1)
    return warped


def _double(coarse: Array, shape: tuple[int, ...]) -> Array:
    """Linear interpolation of `[3, ...]` values at every second voxel to all voxels of `shape`."""
    for axis, size in enumerate(shape, 1):
        values = np.moveaxis(coarse, axis, 0)
        fine = np.repeat(values, 2, axis=0)
        fine[1:-1:2] = (values[1:] + values[:-1]) / 2
        coarse = np.moveaxis(fine[:size], 0, axis)
    return np.ascontiguousarray(coarse)


def add_lesions(
    fractions: Array, ventricles: Mask, spacing: float, ml: float, rng: np.random.Generator
) -> Array:
    """Turn about `ml` millilitres of the WM within 14 mm of the ventricles into lesions; `[T, X, Y, Z]` is changed.

    Returns the share of each voxel that is lesion. Blobs are thrown where WM is nearly pure, more often near the
    ventricles, until the load is reached or 200 were thrown.
    """
    distance = ndimage.distance_transform_edt(~ventricles, sampling=spacing)
    places = np.argwhere((fractions[WM] > 0.8) & (distance > 0) & (distance < 14))
    if len(places) == 0:
        raise ValueError("no white matter near the ventricles to hold a lesion")
    odds = np.exp(-distance[tuple(places.T)] / 5)
    voxel = spacing**3 / 1000
    wanted = fractions[WM].copy()
    share = np.zeros_like(wanted)
    load = 0.0
    for _ in range(200):
        if load >= ml:
            break
        centre = places[rng.choice(len(places), p=odds / odds.sum())] + rng.uniform(-0.5, 0.5, 3)
        largest = (3 * (ml - load) * 1000 / (4 * math.pi)) ** (1 / 3)  # the last blob must not overshoot
        radius = min(rng.uniform(2, 6), max(1.2, largest)) / spacing
        reach = math.ceil(2 * radius) + 1
        corner = np.maximum(np.floor(centre).astype(int) - reach, 0)
        box = tuple(slice(c, min(c + 2 * reach + 1, n)) for c, n in zip(corner, share.shape, strict=True))
        stretch = rng.uniform(0.75, 1.35, 3)
        offset = [np.arange(b.start, b.stop) - c for b, c in zip(box, centre, strict=True)]
        x, y, z = (o / s for o, s in zip(offset, stretch, strict=True))
        away = np.sqrt(x[:, None, None] ** 2 + y[:, None] ** 2 + z**2)
        blob = np.clip(0.5 + (radius - away) / 1.5, 0, 1).astype(np.float32) * wanted[box]
        before = float(share[box].sum())
        share[box] = np.maximum(share[box], blob)
        load += (float(share[box].sum()) - before) * voxel
    fractions[LESION] = share
    fractions[WM] -= share
    return np.asarray(share, np.float32)


# ---- scanner -------------------------------------------------------------------------------------------------------


def plan_grid(
    shape: tuple[int, ...], affine: NDArray[np.float64], voxel: tuple[float, ...], tilt: float
) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Shape and affine of a grid with `voxel` mm over the same field of view, turned by `tilt` degrees about x."""
    spacing = np.abs(np.linalg.det(affine[:3, :3])) ** (1 / 3)
    extent = np.array(shape) * spacing
    new_shape = tuple(int(n) for n in np.ceil(extent / voxel - 1e-6))
    new = np.eye(4)
    new[:3, :3] = _rotation(math.radians(tilt), 0) @ np.diag(voxel)
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    new[:3, 3] = middle - new[:3, :3] @ ((np.array(new_shape) - 1) / 2)
    return new_shape, new


def sample(
    field: Array, affine: NDArray[np.float64], shape: tuple[int, ...], target: NDArray[np.float64]
) -> Array:
    """`field` on the grid (`shape`, `target`): averaged over the slice thickness (a box profile), then linear."""
    to_source = np.linalg.inv(affine) @ target
    if shape == field.shape and np.allclose(to_source, np.eye(4), atol=1e-9):
        return field
    thickness = float(np.linalg.norm(target[:3, 2]) / np.linalg.norm(affine[:3, 2]))  # in source voxels
    half = thickness / 2
    reach = np.arange(-math.ceil(half), math.ceil(half) + 1)
    overlap = np.clip(np.minimum(reach + 0.5, half) - np.maximum(reach - 0.5, -half), 0, 1)
    field = ndimage.correlate1d(field, overlap / overlap.sum(), axis=2, mode="constant")
    sampled = ndimage.affine_transform(
        field, to_source[:3, :3], to_source[:3, 3], output_shape=shape, order=1
    )
    return np.asarray(sampled, np.float32)


def acquire(
    signed: Array, noise: float, bias: float, rng: np.random.Generator, level: float = 300
) -> NDArray[np.int16]:
    """Magnitude image: coil sensitivity (smooth, within about `bias`), complex Gaussian noise, then the modulus.

    The noise is Rician (Gudbjartsson and Patz 1995, Magn Reson Med 34:910). White matter lies near `level`; values are
    rounded to int16, so that a last-bit difference between machines does not show.
    """
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in signed.shape]
    x, y, z = axes[0][:, None, None], axes[1][:, None], axes[2]
    c = (bias * rng.uniform(-1, 1, 6)).astype(np.float32)
    sensitivity = np.exp((c[0] * x + c[1] * y + c[2] * z + c[3] * x**2 + c[4] * y**2 + c[5] * z**2) / 2)
    real, imaginary = (np.float32(noise) * rng.standard_normal(signed.shape, np.float32) for _ in range(2))
    magnitude = np.hypot(signed * sensitivity + real, imaginary)
    return np.asarray(np.clip(np.rint(level * magnitude), 0, 32767), np.int16)
