"""Tissue volumes against a phantom whose volumes are known, and the mixture against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from cranium.volume import tissue


def test_the_mixture_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(m, s, n) for m, s, n in ((60, 10, 2000), (120, 12, 5000), (180, 8, 3000))]
    values = np.clip(np.concatenate(parts).round(), 1, 255).astype(int)
    ours = tissue.mixture(np.bincount(values, minlength=256).astype(float), steps=2000, tolerance=1e-12)
    terciles = np.quantile(values, [1 / 6, 1 / 2, 5 / 6])[:, None]
    theirs = GaussianMixture(3, means_init=terciles, max_iter=2000, tol=1e-12).fit(values[:, None])
    order = np.argsort(theirs.means_[:, 0])
    np.testing.assert_allclose(ours.means, theirs.means_[order, 0], rtol=1e-3)
    np.testing.assert_allclose(ours.weights, theirs.weights_[order], rtol=5e-3)
    np.testing.assert_allclose(ours.stds, np.sqrt(theirs.covariances_[order, 0, 0]), rtol=5e-3)


def head(ventricle: float, spacing: tuple[float, float, float], seed: int = 0) -> tuple[np.ndarray, dict]:
    """A ball of 60 mm: white inside 35 mm, grey to 54 mm, CSF outside, and a ball of CSF in the middle."""
    rng = np.random.default_rng(seed)
    axes = [(np.arange(round(140 / s)) - round(140 / s) / 2 + 0.5) * s for s in spacing]
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    mean = np.select([radius < ventricle, radius < 35, radius < 54, radius < 60], [50, 200, 130, 50], 0)
    image = np.where(mean > 0, np.clip(mean + 8 * rng.normal(size=mean.shape), 1, 255), 0)
    ball = {r: 4 / 3 * np.pi * r**3 / 1000 for r in (ventricle, 35, 54, 60)}
    truth = {"brain": ball[60], "white": ball[35] - ball[ventricle], "grey": ball[54] - ball[35]}
    truth |= {"csf": ball[60] - ball[54] + ball[ventricle], "deep_csf": ball[ventricle]}
    return image.round().astype(np.uint8), truth


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (4.0, 2.0, 2.0)])
def test_the_volumes_of_a_phantom_are_those_it_was_made_with(spacing) -> None:
    image, truth = head(16, spacing)
    found = tissue.volumes(image, spacing)
    for name, value in truth.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.05), name
    assert found.csf + found.grey + found.white == pytest.approx(found.brain)


def test_larger_ventricles_are_found_larger_whatever_the_gain() -> None:
    small, _ = head(12, (2.0, 2.0, 2.0))
    large, _ = head(18, (2.0, 2.0, 2.0), seed=1)
    dim = (large * 0.7).astype(np.uint8)
    a, b, c = (tissue.volumes(image, (2.0, 2.0, 2.0)).deep_csf for image in (small, large, dim))
    assert b > 2.5 * a and c == pytest.approx(b, rel=0.05)


def test_an_image_without_a_brain_has_no_volumes() -> None:
    assert tissue.volumes(np.zeros((4, 8, 8), np.uint8), (1, 1, 1)) is None
    assert tissue.volumes(np.full((4, 8, 8), 7, np.uint8), (1, 1, 1)) is None
