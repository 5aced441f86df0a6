"""Simulated contrasts against closed forms and the conditions they must meet."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from cranium.volume import simulate as s

INVERSION = s.Sequence(9000, 120, 2500, (2, 2, 2), 0.0)
T1W = s.Sequence(2300, 3, 1200, (2, 2, 2), 0.0)
T2W = s.Sequence(5000, 95, None, (2, 2, 2), 0.0)


def ball(shape: tuple[int, ...], radius: float, centre: tuple[float, ...] | None = None) -> np.ndarray:
    middle = np.array(centre if centre is not None else [(n - 1) / 2 for n in shape])
    return sum((g - m) ** 2 for g, m in zip(np.indices(shape), middle, strict=True)) <= radius**2


def test_signal_limits() -> None:
    tissue = s.Relaxation(1000, 80, 0.8)
    assert s.Sequence(1e9, 0, None, (1, 1, 1), 0).signal(tissue) == pytest.approx(0.8)
    assert s.Sequence(1e9, 80, None, (1, 1, 1), 0).signal(tissue) == pytest.approx(0.8 / math.e)
    assert s.Sequence(1000, 0, None, (1, 1, 1), 0).signal(tissue) == pytest.approx(0.8 * (1 - 1 / math.e))
    # an inversion recovery with a long TR is nulled at TI = T1 ln 2 and fully inverted at TI = 0
    assert s.Sequence(1e9, 0, 1000 * math.log(2), (1, 1, 1), 0).signal(tissue) == pytest.approx(0, abs=1e-12)
    assert s.Sequence(1e9, 0, 0, (1, 1, 1), 0).signal(tissue) == pytest.approx(-0.8)


@pytest.mark.parametrize("tesla", [1.5, 3.0])
def test_contrast_has_the_order_of_tissues(tesla: float) -> None:
    def level(sequence: s.Sequence, name: str) -> float:
        return abs(sequence.signal(s.RELAXATION[tesla][name]))

    spin_echo = s.Sequence(600, 12, None, (2, 2, 2), 0) if tesla == 1.5 else T1W
    assert level(spin_echo, "csf") < level(spin_echo, "lesion") < level(spin_echo, "wm")
    assert level(spin_echo, "csf") < level(spin_echo, "gm") < level(spin_echo, "wm")
    assert level(T2W, "wm") < level(T2W, "gm") < level(T2W, "csf")
    assert level(T2W, "wm") < level(T2W, "lesion")
    assert (
        level(INVERSION, "csf")
        < 0.25 * level(INVERSION, "wm")
        < level(INVERSION, "gm")
        < level(INVERSION, "lesion")
    )


def test_fractions_mix_signed_signal_not_magnitude() -> None:
    early = s.Sequence(9000, 10, 1100, (2, 2, 2), 0.0)  # CSF still inverted, WM recovered
    csf, wm = (early.signal(s.RELAXATION[3.0][name]) for name in ("csf", "wm"))
    assert csf < 0 < wm
    fractions = np.zeros((len(s.TISSUES), 1, 1, 1), np.float32)
    fractions[s.CSF], fractions[s.WM] = 0.4, 0.6
    assert s.mix(fractions, early, 3.0).item() == pytest.approx((0.4 * csf + 0.6 * wm) / wm, rel=1e-5)


def test_unknown_field_strength_is_named() -> None:
    with pytest.raises(ValueError, match="7"):
        s.mix(np.zeros((len(s.TISSUES), 1, 1, 1), np.float32), T1W, 7.0)


def test_mixture_finds_three_classes() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(m, 5, n) for m, n in ((30, 3000), (80, 6000), (120, 5000))])
    np.testing.assert_allclose(s.mixture(values), (30, 80, 120), atol=1.5)
    with pytest.raises(ValueError, match="mixture"):
        s.mixture(np.ones(100))


def test_split_is_linear_between_neighbouring_means() -> None:
    means = np.array([10.0, 20.0, 40.0])
    fractions = s.split(np.array([5, 10, 15, 20, 35, 50], np.float32), means)
    expected = [[1, 1, 0.5, 0, 0, 0], [0, 0, 0.5, 1, 0.25, 0], [0, 0, 0, 0, 0.75, 1]]
    np.testing.assert_allclose(fractions, expected, atol=1e-6)
    inner = np.linspace(10, 40, 31, dtype=np.float32)
    np.testing.assert_allclose(np.tensordot(means, s.split(inner, means), 1), inner, rtol=1e-5)


def test_flatten_removes_a_known_shading() -> None:
    brain = ball((40, 48, 40), 17)
    tissue = np.where(np.indices(brain.shape).sum(0) % 5 < 2, 60, 100).astype(np.float32)
    x, y, _ = (
        np.linspace(-1, 1, n)[tuple(slice(None) if k == a else None for k in range(3))]
        for a, n in enumerate(brain.shape)
    )
    shaded = tissue * np.exp(0.4 * x - 0.3 * y**2).astype(np.float32)
    flat = s.flatten(shaded, brain)
    inner = ndimage.binary_erosion(brain, iterations=2)
    ratio = (flat / tissue)[inner]
    assert ratio.std() / ratio.mean() < 0.02 < np.std((shaded / tissue)[inner])


def test_bare_brain_gets_skull_and_scalp() -> None:
    brain = ball((60, 60, 60), 20)
    rng = np.random.default_rng(0)
    t1 = brain * np.where(ball(brain.shape, 6), 20, np.where(ball(brain.shape, 14), 100, 60)) + rng.normal(
        0, 1, brain.shape
    )
    fractions = s.label_head(t1.astype(np.float32) * brain, brain, 2.0)
    depth = ndimage.distance_transform_edt(~brain, sampling=2.0)
    top = np.indices(brain.shape)[2] > 35  # where no face is taken off
    total = fractions.sum(0)
    assert total.max() <= 1 + 1e-5
    np.testing.assert_allclose(total[brain], 1, atol=1e-5)
    assert total[(depth > 3.5) & (depth < 8.5)].max() == 0, "bone gives no signal"
    assert fractions[s.FAT][top & (depth > 12.5) & (depth < 15.5)].min() == 1
    assert fractions[s.WM][ball(brain.shape, 12) & ~ball(brain.shape, 8)].mean() > 0.9


def test_face_and_neck_are_removed() -> None:
    brain = ball((60, 60, 60), 18)
    fractions = np.ones((len(s.TISSUES), *brain.shape), np.float32)
    depth = ndimage.distance_transform_edt(~brain, sampling=2.0)
    kept = s._deface(fractions, brain, depth, 2.0)
    assert kept[:, brain].min() == 1
    assert kept[:, 30, 54, 24].max() == 0  # nose
    assert kept[:, 30, 30, 2].max() == 0  # neck
    assert kept[:, 30, 30, 51].min() == 1  # scalp on top


def test_ventricles_are_the_deep_csf() -> None:
    brain = ball((70, 80, 60), 32, (35, 40, 28))
    ventricles = ball(brain.shape, 5, (35, 40, 31))
    csf = (ventricles | ball(brain.shape, 3, (35, 14, 28))).astype(np.float32)
    np.testing.assert_array_equal(s.find_ventricles(csf, brain, 2.0), ventricles)
    with pytest.raises(ValueError, match="no ventricles"):
        s.find_ventricles(np.zeros_like(csf), brain, 2.0)


def test_integrating_a_constant_velocity_is_a_shift() -> None:
    velocity = np.tile(np.array([3, -2, 1], np.float32)[:, None, None, None], (1, 8, 9, 10))
    np.testing.assert_allclose(s.integrate(velocity, 4.0), velocity, rtol=1e-5)


def test_integrating_a_linear_velocity_is_the_exponential() -> None:
    grid = np.indices((21, 21, 21), np.float32) - 10
    velocity = np.stack([0.2 * grid[0], -0.1 * grid[1], 0 * grid[2]])
    inner = (slice(None), slice(7, 14), slice(7, 14), slice(7, 14))
    expected = np.stack([(math.exp(0.2) - 1) * grid[0], (math.exp(-0.1) - 1) * grid[1], 0 * grid[2]])
    np.testing.assert_allclose(s.integrate(velocity, 1.0, 8)[inner], expected[inner], atol=0.005)


def test_jacobian_of_a_scaling() -> None:
    grid = np.indices((6, 6, 6), np.float32) * 2
    scales = np.array([0.1, 0.2, -0.5], np.float32)[:, None, None, None]
    np.testing.assert_allclose(s.jacobian(scales * grid, 2.0), 1.1 * 1.2 * 0.5, rtol=1e-5)


@pytest.mark.parametrize("widen", [-1.5, 0.0, 3.0])
def test_warps_are_invertible(widen: float) -> None:
    ventricles = ball((26, 30, 26), 3)
    for seed in range(5):
        velocity = s.smooth_velocity(ventricles.shape, 4.0, 2.0, np.random.default_rng(seed))
        velocity += widen * s.widening_velocity(ventricles, 4.0)
        assert s.jacobian(s.integrate(velocity, 4.0), 4.0).min() > 0.2


def test_affines_are_invertible_and_near_one() -> None:
    for seed in range(50):
        assert 0.8 < np.linalg.det(s.random_affine(np.random.default_rng(seed))) < 1.25


def test_warp_equals_a_direct_lookup() -> None:
    rng = np.random.default_rng(1)
    shape = (25, 24, 23)
    cover = ball(shape, 7).astype(np.float32)
    smooth = ndimage.gaussian_filter(rng.random((2, *shape)), (0, 2, 2, 2)).astype(np.float32)
    fields = np.stack([cover, cover * smooth[0], smooth[1]])
    linear = s.random_affine(rng)
    knots = tuple((n + 2) // 2 for n in shape)
    shift = np.tile(np.array([2, -1, 3], np.float32)[:, None, None, None], (1, *knots))
    centre = (np.array(shape) - 1) / 2
    found = s.warp(fields, 1, linear, shift, 2.0)
    offset = centre - linear @ centre + np.array([2, -1, 3]) / 2
    expected = np.stack([ndimage.affine_transform(f, linear, offset, order=1) for f in fields])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_widening_grows_the_ventricles() -> None:
    shape = (52, 60, 52)
    ventricles = ball(shape, 6)
    unit = s.widening_velocity(ventricles, 2.0)[:, ::2, ::2, ::2]
    fields = np.stack([np.ones(shape), ventricles]).astype(np.float32)
    volumes = [
        s.warp(fields, 0, np.eye(3), s.integrate(w * unit, 4.0), 2.0)[1].sum()
        for w in (-1.0, 0.0, 1.0, 2.0, 3.0)
    ]
    assert volumes[1] == pytest.approx(ventricles.sum(), rel=1e-5)
    assert np.all(np.diff(volumes) > 0.1 * volumes[1])


@pytest.mark.parametrize("ml", [0.0, 0.4, 3.0, 9.0])
def test_lesions_reach_the_load_inside_white_matter(ml: float) -> None:
    shape = (50, 60, 50)
    ventricles = ball(shape, 5)
    fractions = np.zeros((len(s.TISSUES), *shape), np.float32)
    fractions[s.WM] = ball(shape, 20) & ~ventricles
    before = fractions.sum(0)
    share = s.add_lesions(fractions, ventricles, 2.0, ml, np.random.default_rng(3))
    assert share.sum() * 0.008 == pytest.approx(ml, abs=0.15 + 0.1 * ml)
    np.testing.assert_allclose(fractions.sum(0), before, atol=1e-6)
    np.testing.assert_array_equal(fractions[s.LESION], share)
    assert fractions.min() >= 0
    distance = ndimage.distance_transform_edt(~ventricles, sampling=2.0)
    assert not share[distance > 14 + 2 * 6 * 1.35].any()


def test_sample_averages_over_the_slice() -> None:
    field = np.zeros((4, 4, 24), np.float32)
    field[:, :, 11:13] = 1  # 4 mm of signal at 2 mm
    affine = np.diag([2.0, 2, 2, 1])
    shape, grid = s.plan_grid(field.shape, affine, (2, 2, 8), 0.0)
    assert shape == (4, 4, 6)
    total = s.sample(field, affine, shape, grid).sum() * 8
    assert total == pytest.approx(field.sum() * 2, rel=1e-5)
    np.testing.assert_array_equal(s.sample(field, affine, field.shape, affine), field)


@pytest.mark.parametrize("tilt", [0.0, 5.0])
def test_grid_keeps_the_centre_in_the_world(tilt: float) -> None:
    affine = np.array([[2.0, 0, 0, -90], [0, 2, 0, -120], [0, 0, 2, -70], [0, 0, 0, 1]])
    shape, grid = s.plan_grid((90, 108, 91), affine, (1.8, 1.8, 4.5), tilt)
    middle = [m @ np.append((np.array(n) - 1) / 2, 1) for m, n in ((affine, (90, 108, 91)), (grid, shape))]
    np.testing.assert_allclose(*middle, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(grid[:3, :3], axis=0), (1.8, 1.8, 4.5))


def test_noise_is_rician() -> None:
    """Without signal the modulus is Rayleigh: mean sigma sqrt(pi/2); with much signal its deviation is sigma."""
    rng = np.random.default_rng(0)
    empty = s.acquire(np.zeros((60, 60, 60), np.float32), 0.1, 0.0, rng, level=1e4)
    assert empty.mean() == pytest.approx(1000 * math.sqrt(math.pi / 2), rel=0.01)
    strong = s.acquire(np.full((60, 60, 60), -2, np.float32), 0.1, 0.0, rng, level=1e4)
    assert strong.std() == pytest.approx(1000, rel=0.02)
    assert strong.dtype == np.int16 and strong.min() > 0
    assert strong.mean() == pytest.approx(math.hypot(20000, 1000) - 25, rel=0.002)


def test_bias_is_smooth_and_positive() -> None:
    image = s.acquire(np.ones((20, 24, 16), np.float32), 0.0, 0.3, np.random.default_rng(2)).astype(float)
    assert image.min() > 300 * math.exp(-0.9) and image.max() < 300 * math.exp(0.9)
    assert image.std() > 5
    assert np.abs(np.diff(image, axis=0)).max() < 0.1 * image.mean()
