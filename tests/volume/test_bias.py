from __future__ import annotations

import numpy as np
import SimpleITK as sitk

import phantoms
from cranium.volume import bias
from cranium.volume.masks import Masked

SHAPE = (22, 26, 20)
GRID = phantoms.affine((8, 8, 8), SHAPE)
LABELS = phantoms.tissues(phantoms.Head(), SHAPE, GRID)


def shaded(offset: float = 0.0) -> tuple[Masked, np.ndarray]:
    """A T1w under a coil that is nearly twice as bright in front as behind."""
    y = np.linspace(-1, 1, SHAPE[1])[None, :, None]
    x = np.linspace(-1, 1, SHAPE[0])[:, None, None]
    field = np.exp(0.32 * y + 0.2 * x * y) * np.ones(SHAPE)
    data = phantoms.intensities(LABELS, "T1w", 0).astype(np.float32) * field - offset
    return Masked(data.astype(np.float32), GRID, LABELS >= 2, GRID), field


def variation(data: np.ndarray) -> float:
    white = data[LABELS == 4]
    return float(white.std() / white.mean())


def test_a_simulated_field_is_reduced() -> None:
    """Coefficient of variation in white matter: over 9 % shaded, 2 % of noise alone; at most 4 % corrected."""
    scan, _ = shaded()
    corrected = bias.n4(scan)
    print(f"variation in white matter: {variation(scan.data):.3f} -> {variation(corrected):.3f}")
    assert variation(scan.data) > 0.09 and variation(corrected) < 0.04
    assert corrected.dtype == np.float32 and corrected.shape == SHAPE
    np.testing.assert_array_equal(scan.data, shaded()[0].data)  # its input is left alone


def test_the_same_bytes_on_any_number_of_threads() -> None:
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    scan, _ = shaded()
    try:
        found = []
        for threads in (1, 3):
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
            found.append(bias.n4(scan).tobytes())
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert found[0] == found[1]


def test_scans_with_negative_voxels_are_corrected_too() -> None:
    corrected = bias.n4(shaded(600)[0])
    assert np.isfinite(corrected).all()
    assert corrected[LABELS == 4].std() < shaded(600)[0].data[LABELS == 4].std()
