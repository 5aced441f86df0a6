from __future__ import annotations

import numpy as np
import pytest

import phantoms
from cranium.volume import labels, nifti, normalise, slices
from cranium.volume.masks import Masked, masked
from cranium.volume.nifti import Volume
from cranium.volume.quality import Note, Rejected

HEAD = phantoms.Head(lesion=(-32.0, 10.0, 5.0))
VALUES = ((2,), (3, 4), (5,))  # csf; grey and white; lesion
SPEC = {
    "size": 90,
    "spacing_mm": 2.0,
    "slice_spacing_mm": 2.0,
    "percentiles": (0.5, 99.5),
    "min_brain": 0.02,
}


def head(
    spacing: tuple[float, float, float] = (2, 2, 2),
    degrees: tuple[float, float, float] = (0, 0, 0),
    axes: str = "RAS",
) -> tuple[Masked, Volume]:
    """A T1w of a head with its mask, and its tissues as a label map on the same voxels."""
    shape = tuple(round(n / s) for n, s in zip((176, 208, 160), spacing, strict=True))
    grid = phantoms.affine(spacing, shape, degrees)
    tissues = phantoms.tissues(HEAD, shape, grid)

    def volume(data: np.ndarray) -> Volume:
        return Volume(*phantoms.turned(data.astype(np.float32), grid, axes), (), "")

    scan = masked(volume(phantoms.intensities(tissues, "T1w", -1)), volume(tissues >= 2))
    return scan, volume(np.where(tissues == 1, 0, tissues))


def placed(scan: Masked, label_map: Volume, **changes: object) -> tuple[labels.LabelMap, normalise.Conformed]:
    scans = {"T1w": scan}
    done = normalise.conform(scans, ("T1w",), **(SPEC | changes))  # type: ignore[arg-type]
    at = (done.transforms, done.grid, done.brain, done.slices)
    return labels.place(label_map, VALUES, scans, *at), done


def truth(grid: slices.Grid) -> np.ndarray:
    """The phantom's own classes at the grid's pixels, from its formula."""
    tissues = phantoms.tissues(HEAD, grid.shape, grid.affine[:, [2, 0, 1, 3]])
    return np.array([0, 0, 1, 2, 2, 3])[tissues]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_classes_lie_where_the_anatomy_is() -> None:
    """Raw values become class numbers, in place, whatever the order of axes and the tilt."""
    for axes, degrees in (("LAS", (0, 0, 0)), ("PIR", (7, -5, 9))):
        found, done = placed(*head(axes=axes, degrees=degrees))
        expected = truth(done.grid)
        for index in (1, 2, 3):
            assert dice(found.classes == index, expected == index) > 0.93, (axes, index)
        assert found.notes == ()


def test_flipped_headers_give_the_same_labels_bit_for_bit() -> None:
    first, _ = placed(*head((4, 4, 4)))
    for axes in ("LAS", "LPI", "AIL"):
        other, _ = placed(*head((4, 4, 4), axes=axes))
        np.testing.assert_array_equal(other.classes, first.classes)
        assert other.ml == first.ml


def test_volumes_are_those_of_the_pixels_and_of_the_head() -> None:
    found, done = placed(*head())
    kept = found.classes[done.slices.start : done.slices.stop]
    for index, ml in enumerate(found.ml, 1):
        assert ml == pytest.approx(np.count_nonzero(kept == index) * 8 / 1000)
    lesion = 4 / 3 * np.pi * HEAD.lesion_mm**3 / 1000
    assert found.ml[2] == pytest.approx(lesion, rel=0.02)


GRIDS = {  # mm a voxel, degrees, axes
    "slabs": ((1.5, 1.5, 5.0), (0.0, 0.0, 0.0), "LPS"),
    "fine tilted slabs": ((1.0, 1.0, 5.0), (8.0, -6.0, 10.0), "LAS"),
    "tilted slabs": ((1.5, 1.5, 5.0), (8.0, -6.0, 10.0), "LIP"),
    "sagittal slabs": ((4.0, 1.5, 1.5), (5.0, 3.0, -4.0), "PIR"),
}


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_labels_return_to_the_scan(name: str) -> None:
    """Native to the stack's grid (1 mm, so no coarser) and back to native: Dice at least 0.98 for each structure."""
    scan, label_map = head(*GRIDS[name])
    found, done = placed(scan, label_map, size=168, spacing_mm=1.0, slice_spacing_mm=1.0)
    back = slices.to_native(found.classes, done.grid, label_map.data.shape, label_map.affine)
    original = np.array([0, 0, 1, 2, 2, 3])[label_map.data.astype(int)]
    scores = [dice(back == index, original == index) for index in (1, 2, 3)]
    print(f"{name}: " + ", ".join(f"{s:.4f}" for s in scores))
    assert min(scores) >= 0.98


@pytest.mark.parametrize("radius", [2.5, 4.0])
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_small_structures_return_too(name: str, radius: float) -> None:
    """Ellipsoids of a few voxels along every axis of the scan; below 2 voxels a single one decides."""
    spacing, degrees, _ = GRIDS[name]
    shape = tuple(int(20 * max(2.0, radius / 2) / s) + 2 * int(radius) for s in spacing)
    native = phantoms.affine(spacing, shape, degrees)
    index = np.indices(shape).reshape(3, -1).T - (np.array(shape) - 1) / 2
    drawn = ((index / radius) ** 2).sum(axis=1).reshape(shape) <= 1
    grid = slices.session_grid(np.ones(shape, bool), native, 200, 1.0, 1.0)
    conformed = slices.onto_grid(drawn.astype(np.uint8), native, grid, labels=True)
    score = dice(slices.to_native(conformed, grid, shape, native) > 0, drawn)
    print(f"{name}, semi-axes of {radius} voxels: {score:.4f}")
    assert score >= 0.98


def test_labels_move_with_the_scan_they_were_drawn_on() -> None:
    """T1w moved between the scans; its labels follow to the FLAIR, and back through the recorded transform."""
    move = phantoms.affine((1, 1, 1), (1, 1, 1), (0, 0, 8))
    move[:3, 3] = (10, -6, 4)
    flair, _ = head()
    t1w, label_map = head(spacing=(2, 2, 3))
    scans = {
        "FLAIR": flair,
        "T1w": Masked(t1w.data, move @ t1w.affine, t1w.brain, move @ t1w.brain_affine),
    }
    drawn = Volume(label_map.data, move @ label_map.affine, (), "")
    done = normalise.conform(scans, ("FLAIR", "T1w"), **SPEC)  # type: ignore[arg-type]
    transforms = {"FLAIR": np.eye(4), "T1w": np.linalg.inv(move)}
    found = labels.place(drawn, VALUES, scans, transforms, done.grid, done.brain, done.slices)
    expected = truth(done.grid)
    assert min(dice(found.classes == i, expected == i) for i in (1, 2, 3)) > 0.93
    back = slices.to_native(found.classes, done.grid, drawn.data.shape, drawn.affine, transforms["T1w"])
    original = np.array([0, 0, 1, 2, 2, 3])[drawn.data.astype(int)]
    assert min(dice(back == i, original == i) for i in (1, 2, 3)) > 0.98


def rejected(scan: Masked, label_map: Volume) -> Rejected:
    with pytest.raises(Rejected) as error:
        placed(scan, label_map)
    return error.value


@pytest.mark.parametrize("value", [7.0, 2.5, -1.0, 70000.0])
def test_values_outside_the_card_are_rejected(value: float) -> None:
    scan, label_map = head((4, 4, 4))
    data = label_map.data.copy(order="F")
    data[20, 20, 20] = value
    found = rejected(scan, Volume(data, label_map.affine, (), ""))
    assert found.code == "MASK_VALUES" and f"{value:g}" in found.reason
    holes = Volume(label_map.data, label_map.affine, (Note("NONFINITE_FILLED", "3 voxels"),), "")
    assert rejected(scan, holes).code == "MASK_VALUES"


def test_zero_is_background_unless_it_is_a_class() -> None:
    scan, label_map = head((4, 4, 4))
    done = normalise.conform({"T1w": scan}, ("T1w",), **SPEC)  # type: ignore[arg-type]
    at = ({"T1w": scan}, done.transforms, done.grid, done.brain, done.slices)
    found = labels.place(label_map, ((0,), (2,), (3, 4, 5)), *at)
    air = truth(done.grid) == 0
    ml = np.count_nonzero(air[done.slices.start : done.slices.stop]) * 8 / 1000
    assert found.ml[0] == pytest.approx(ml, rel=0.1)  # less what lies outside the scan's field of view
    with pytest.raises(Rejected):
        labels.place(label_map, ((0,), (2,)), *at)


def test_a_map_that_lies_elsewhere_is_rejected() -> None:
    scan, label_map = head((4, 4, 4))
    shifted = label_map.affine.copy()
    shifted[0, 3] += 3
    assert rejected(scan, Volume(label_map.data, shifted, (), "")).code == "MASK_GRID"
    far = label_map.affine.copy()
    far[1, 3] += 60
    found = rejected(scan, Volume(label_map.data[:, :, :-1], far, (), ""))
    assert found.code == "MASK_GRID" and "outside the brain" in found.reason


def test_a_map_on_a_grid_of_its_own_is_noted() -> None:
    scan, _ = head((4, 4, 4))
    _, label_map = head((2, 2, 2))
    found, done = placed(scan, label_map)
    assert [note.code for note in found.notes] == ["LABELS_GRID"]
    assert dice(found.classes == 1, truth(done.grid) == 1) > 0.93


def test_a_map_that_lies_elsewhere_may_be_drawn_on_what_was_rejected() -> None:
    scan, label_map = head((4, 4, 4))
    done = normalise.conform({"T1w": scan}, ("T1w",), **SPEC)  # type: ignore[arg-type]
    at = (done.transforms, done.grid, done.brain, done.slices)
    shifted = Volume(label_map.data, label_map.affine.copy(), (), "")
    shifted.affine[0, 3] += 9
    with pytest.raises(Rejected, match=r"correct its header$"):
        labels.place(shifted, VALUES, {"T1w": scan}, *at)
    with pytest.raises(Rejected, match="unless it was drawn on the FLAIR, which was rejected"):
        labels.place(shifted, VALUES, {"T1w": scan}, *at, ("FLAIR",))


def test_what_lies_beyond_the_slices_kept_is_noted() -> None:
    found, _ = placed(*head((4, 4, 4)), slices=slices.Kept("range", 10, 5))
    assert [note.code for note in found.notes] == ["LABELS_CUT"]


def test_a_small_label_between_coarse_slices_is_not_cut() -> None:
    scan, label_map = head((1, 1, 1))
    centres = np.argwhere(label_map.data == 5)
    for offset in range(8):  # wherever a slice happens to lie
        at = np.rint(centres.mean(0)).astype(int) + np.array([0, 0, offset])
        ball = np.sum((np.indices(label_map.data.shape).T - at) ** 2, -1).T <= 9
        small = Volume(np.where(ball, 5.0, 0.0).astype(np.float32), label_map.affine, (), "")
        found, _ = placed(scan, small, slice_spacing_mm=8.0)
        assert found.notes == ()


def test_what_is_cut_is_counted_on_the_maps_own_voxels() -> None:
    scan, label_map = head((2, 2, 2))
    found, done = placed(scan, label_map, slices=slices.Kept("range", 10, 5))
    bottom, top = (
        done.grid.affine[2, 2] * (edge - 0.5) + done.grid.affine[2, 3]
        for edge in (done.slices.start, done.slices.stop)
    )
    height = np.argwhere(label_map.data)[:, 2] * 2.0 + label_map.affine[2, 3]
    lost = np.count_nonzero((height < bottom) | (height >= top)) * 0.008
    (note,) = found.notes
    assert note.reason.startswith(f"{lost:.1f} of {len(height) * 0.008:.1f} ml")


def test_an_empty_map_is_a_map() -> None:
    scan, label_map = head((4, 4, 4))
    found, _ = placed(scan, Volume(np.zeros_like(label_map.data), label_map.affine, (), ""))
    assert found.ml == (0.0, 0.0, 0.0) and not found.classes.any() and found.notes == ()


def test_an_empty_map_can_be_read(tmp_path: object) -> None:
    path = phantoms.write(tmp_path / "labels.nii.gz", np.zeros((8, 8, 8), np.uint8), np.eye(4))  # type: ignore[operator]
    assert not nifti.read(path, labels=True).data.any()
    with pytest.raises(Rejected):
        nifti.read(path)
