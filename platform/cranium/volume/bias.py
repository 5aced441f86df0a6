"""N4 bias field correction (Tustison et al. 2010, IEEE TMI 29:1310), by SimpleITK."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from cranium.volume.masks import Masked
from cranium.volume.register import single_thread

SHRINK_MM = 4.0  # the field is fitted on voxels of about this size, and applied at full resolution
ITERATIONS = (50, 50, 50)  # of each level of the B-spline mesh


def n4(scan: Masked) -> np.ndarray:
    """The scan divided by the smooth field found inside its mask: float32 [I, J, K]. Values below zero are kept.

    The field is multiplicative and the fit is of logarithms, so a scan that was shifted (a mean subtracted) is lifted
    for the fit until its least voxel in the brain is positive, and lowered again after.
    """
    brain = scan.brain_here()
    inside = scan.data[brain]
    lift = float(max(0.0, 1e-3 * np.ptp(inside) - inside.min()))
    image = sitk.GetImageFromArray((scan.data + np.float32(lift)).transpose(2, 1, 0))
    spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    mask = sitk.GetImageFromArray(brain.transpose(2, 1, 0).astype(np.uint8))
    mask.CopyInformation(image)
    shrink = [max(1, round(SHRINK_MM / s)) for s in spacing.tolist()]
    correct = sitk.N4BiasFieldCorrectionImageFilter()
    correct.SetMaximumNumberOfIterations(list(ITERATIONS))
    with single_thread():
        correct.Execute(sitk.Shrink(image, shrink), sitk.Shrink(mask, shrink))
        field = sitk.GetArrayFromImage(correct.GetLogBiasFieldAsImage(image)).transpose(2, 1, 0)
    corrected = (scan.data + np.float32(lift)) / np.exp(field)
    return np.asfortranarray(corrected - np.float32(lift), np.float32)
