from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcm2niix
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import RLELossless

import dicoms
import phantoms
from cranium.volume import dicom, folder, sidecar
from cranium.volume.headers import parse
from cranium.volume.nifti import Volume, to_ras
from cranium.volume.quality import Rejected


def rejected(call: Callable[[], Any], code: str) -> str:
    with pytest.raises(Rejected) as found:
        call()
    assert found.value.code == code, found.value
    return found.value.reason


def codes(volume: Volume) -> list[str]:
    return [note.code for note in volume.notes]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where conversions keep their files."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def assembled(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """A second opinion: pydicom's pixels, slice by slice, and an affine by the standard's formula; as RAS."""
    images = [pydicom.dcmread(path) for path in paths]
    across, down = (np.array(images[0].ImageOrientationPatient[i : i + 3], float) for i in (0, 3))
    images.sort(key=lambda ds: float(np.dot(ds.ImagePositionPatient, np.cross(across, down))))
    values = [
        ds.pixel_array.astype(float) * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
        for ds in images
    ]
    places = np.array([ds.ImagePositionPatient for ds in images], float)
    rows, columns = (float(v) for v in images[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across * columns, down * rows
    affine[:3, 2], affine[:3, 3] = (places[-1] - places[0]) / (len(images) - 1), places[0]
    affine[:2] *= -1  # DICOM's x and y point left and back
    return to_ras(np.stack(values, axis=2).transpose(1, 0, 2), affine)


# ---- voxels and places ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "options"),
    [
        ("mprage", {"tilt": (10.0, -5.0, 7.0), "spacing": (8.0, 7.0, 7.5)}),
        ("t2", {"RescaleSlope": 2.5, "RescaleIntercept": -3.0}),
        ("t2", {"RescaleSlope": lambda k: 1 + 0.1 * k, "RescaleIntercept": 4.0}),
        ("flair", {"tilt": (0.0, 0.0, 95.0)}),
    ],
)
def test_same_values_at_the_same_places_as_a_slow_assembly(
    tmp_path: Path, sequence: str, options: dict[str, Any]
) -> None:
    paths = dicoms.series(tmp_path / "scan", sequence, **options)
    volume = dicom.convert(tmp_path / "scan", tmp_path)
    (data, affine), (values, expected) = to_ras(volume.data, volume.affine), assembled(paths)
    np.testing.assert_allclose(affine, expected, atol=1e-6)
    np.testing.assert_allclose(data, values, rtol=1e-6, atol=1e-3)  # both round to float32


def test_enhanced_multi_frame_is_the_same_volume(tmp_path: Path) -> None:
    dicoms.enhanced(tmp_path / "scan", "flair", tilt=(8.0, 0.0, 4.0))
    (header,) = folder.read_header(tmp_path / "scan", tmp_path)
    assert (header.tr, header.te, header.ti, header.scanning) == (9420.0, 141.0, 2500.0, {"SE", "IR"})
    volume = dicom.convert(tmp_path / "scan", tmp_path)
    data, affine = to_ras(volume.data, volume.affine)
    grid = dicoms.grid((8.0, 0.0, 4.0))
    np.testing.assert_allclose(affine, grid, atol=1e-5)
    np.testing.assert_array_equal(data, dicoms.voxels("flair", affine=grid))
    dicoms.enhanced(tmp_path / "gap", "flair", skip=[9])
    rejected(lambda: dicom.convert(tmp_path / "gap", tmp_path), "SLICES_MISSING")


def test_each_echo_of_a_series_is_a_scan(tmp_path: Path) -> None:
    dicoms.dual_echo(tmp_path / "scan")
    headers = folder.read_header(tmp_path / "scan", tmp_path)
    assert [(h.echo, h.te, h.echoes) for h in headers] == [(13.0, 13.0, 2), (80.0, 80.0, 2)]
    names = [dicom.name("scan", h.uid, h.echo, alone=False) for h in headers]
    second = dicom.convert(tmp_path / names[1], tmp_path)
    np.testing.assert_array_equal(to_ras(second.data, second.affine)[0], dicoms.voxels("t2") // 2)
    assert second.acquisition["te_ms"] == 80.0
    rejected(lambda: dicom.convert(tmp_path / "scan", tmp_path), "SERIES_MIXED")


def test_rounded_positions_do_not_stretch_the_volume(tmp_path: Path) -> None:
    """As in a real series: positions to 0.1 mm, whose first distance dcm2niix would take for all."""
    for name, step in (("up", 1.2), ("down", -1.2)):

        def position(k: int, step: float = step) -> list[float]:
            return [92.0, 108.0, step * k + (0.1 if k == 1 else 0.0)]

        shape, spacing = (8, 9, 60), (8.0, 8.0, 1.2)
        data = dicoms.voxels("pd", shape=shape)
        place = {"shape": shape, "spacing": spacing, "data": data, "ImagePositionPatient": position}
        dicoms.series(tmp_path / name, "pd", **place)
        volume = dicom.convert(tmp_path / name, tmp_path)
        values, affine = to_ras(volume.data, volume.affine)
        np.testing.assert_allclose(np.diag(affine), [8.0, 8.0, 1.2, 1.0], atol=1e-9)
        np.testing.assert_allclose(affine[2, 3], min(0, 59 * step), atol=1e-9)
        np.testing.assert_array_equal(values, data if step > 0 else data[:, :, ::-1])
        assert step < 0 or codes(volume) == ["SPACING_ODD"]  # the uneven distance comes first, and is noted


def test_the_hash_is_of_the_images_not_of_their_names(tmp_path: Path) -> None:
    dicoms.series(tmp_path / "a")
    dicoms.series(tmp_path / "b", name="IM{}")
    dicoms.series(tmp_path / "c", seed=1)
    first, second, other = (dicom.convert(tmp_path / x, tmp_path).sha256 for x in "abc")
    assert first == second != other


# ---- what lies in a folder ------------------------------------------------------------------------------------------


def test_files_beside_images_and_copies_of_images_are_left_out(tmp_path: Path) -> None:
    paths = dicoms.series(tmp_path / "scan", name="IM{}")
    for name in ("DICOMDIR", ".DS_Store", "readme.txt"):
        (tmp_path / "scan" / name).write_bytes(b"x" * 300)
    shutil.copy(paths[3], tmp_path / "scan" / "copy of IM4")
    (tmp_path / "scan" / "folder").mkdir()
    assert len(folder.read_header(tmp_path / "scan", tmp_path)) == 1
    volume = dicom.convert(tmp_path / "scan", tmp_path)
    assert volume.data.shape == dicoms.SHAPE and codes(volume) == ["FILES_IGNORED"]


def test_a_folder_that_mixes_series_names_each(tmp_path: Path) -> None:
    for number, sequence in enumerate(("t1", "t2"), 1):
        dicoms.series(tmp_path / "scan", sequence, number=number, name=f"{number}-{{:02}}.dcm")
    headers = folder.read_header(tmp_path / "scan", tmp_path)
    assert [h.description for h in headers] == ["t1 axial", "T2W_TSE"]
    path = dicom.name("scan", headers[1].uid, alone=False)
    volume = dicom.convert(tmp_path / path, tmp_path)
    np.testing.assert_array_equal(to_ras(volume.data, volume.affine)[0], dicoms.voxels("t2"))
    rejected(lambda: dicom.convert(tmp_path / "scan", tmp_path), "SERIES_MIXED")
    rejected(lambda: dicom.convert(tmp_path / "scan#0123456789ab", tmp_path), "NOT_DICOM")


def test_names_of_series_can_be_read_back() -> None:
    for text in ("a/b", "a/b#1", "a/b#0123456789ab"):
        uid = "1.2.3"
        assert dicom.split(dicom.name(text, uid, alone=False)) == (text, dicom.key(uid), None)
        assert dicom.split(dicom.name(text, uid, 13.25, alone=False)) == (text, dicom.key(uid), 13.25)
        assert dicom.split(dicom.name(text, uid, alone=True))[0] == text
    assert dicom.name("a/b", "1.2.3", alone=True) == "a/b"


def test_what_is_no_dicom_or_leads_outside_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    (root / "none").mkdir(parents=True)
    (root / "none" / "a.txt").write_text("no image")
    rejected(lambda: folder.read_header(root / "none", root), "NOT_DICOM")
    rejected(lambda: folder.read_header(root / "absent", root), "IO")
    path = dicoms.series(tmp_path / "outside", shape=(8, 8, 3))[0]
    (root / "link").mkdir()
    (root / "link" / "1.dcm").symlink_to(path)
    rejected(lambda: folder.read_header(root / "link", root), "NOT_REGULAR")
    os.mkfifo(root / "none" / "pipe")
    rejected(lambda: folder.read_header(root / "none", root), "NOT_REGULAR")
    rejected(lambda: dicom.convert(tmp_path / "outside", tmp_path, max_bytes=500), "DIMS_LIMIT")
    deflated = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"[:20])
    assert parse(io.BytesIO(path.read_bytes()), path.stat().st_size) is not None
    start = deflated[:400] + b"1.2.840.10008.1.2.1.99" + deflated[422:]
    rejected(lambda: parse(io.BytesIO(start), len(start)), "DICOM_INVALID")


# ---- series that are not whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("SLICES_MISSING", {"skip": [7]}),
        ("SLICES_REPEATED", {"ImagePositionPatient": lambda k: [0.0, 0.0, 8.0 * max(k, 1)]}),
        ("SLICES_UNEVEN", {"ImagePositionPatient": lambda k: [0.0, 0.0, 8.0 * k + (2.0 if k == 5 else 0)]}),
        ("SLICES_UNEVEN", {"ImagePositionPatient": lambda k: [0.0, 3.0 * (k == 5), 8.0 * k]}),
        ("SLICES_UNEVEN", {"PixelSpacing": lambda k: [8.0, 8.0 + (k == 5)]}),
        ("SLICES_UNEVEN", {"ImagePositionPatient": None}),
        ("SLICES_UNEVEN", {"PixelRepresentation": lambda k: k % 2}),
        ("DTYPE", {"PhotometricInterpretation": "MONOCHROME1"}),
        ("SLICES_UNEVEN", {"skip": range(1, 12)}),
        ("SLICES_REPEATED", {"SOPInstanceUID": "1.2.3"}),
    ],
)
def test_series_that_make_no_grid(tmp_path: Path, code: str, options: dict[str, Any]) -> None:
    instance = options.pop("SOPInstanceUID", None)
    paths = dicoms.series(tmp_path / "scan", shape=(6, 6, 12), **options)
    for path in paths if instance else ():
        ds = pydicom.dcmread(path)
        ds.SOPInstanceUID = instance
        ds.save_as(path)
    rejected(lambda: dicom.convert(tmp_path / "scan", tmp_path), code)


def test_compressed_pixels_are_read_and_their_end_is_looked_for(tmp_path: Path) -> None:
    paths = dicoms.series(tmp_path / "scan", "t2")
    for path in paths:
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless)
        ds.save_as(path)
    volume = dicom.convert(tmp_path / "scan", tmp_path)
    np.testing.assert_array_equal(to_ras(volume.data, volume.affine)[0], dicoms.voxels("t2"))
    paths[5].write_bytes(paths[5].read_bytes()[:-60])
    rejected(lambda: dicom.convert(tmp_path / "scan", tmp_path), "DICOM_TRUNCATED")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_rejected(tmp_path: Path, share: float) -> None:
    paths = dicoms.series(tmp_path / "scan", shape=(12, 12, 6))
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[: int(len(content) * share)])
    with pytest.raises(Rejected) as found:
        dicom.convert(tmp_path / "scan", tmp_path)
    # cut inside its header the file tells less of itself; never is it taken
    assert found.value.code in ("DICOM_TRUNCATED", "DICOM_INVALID", "SERIES_MIXED")


@pytest.mark.filterwarnings("ignore:Expected")  # pydicom tells of each odd header
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(132, 1100), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_headers_are_parsed_or_rejected(damage: list[tuple[int, int]]) -> None:
    content = bytearray(_one_image())
    for place, value in damage:
        content[place % len(content)] = value
    try:
        parse(io.BytesIO(bytes(content)), len(content))
    except Rejected as reason:
        assert reason.code == "DICOM_INVALID"


def _one_image(made: list[bytes] = []) -> bytes:  # noqa: B006  # written once
    if not made:
        with tempfile.TemporaryDirectory() as place:
            made.append(dicoms.series(Path(place), shape=(4, 4, 2))[0].read_bytes())
    return made[0]


# ---- the converter --------------------------------------------------------------------------------------------------


def converter(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of dcm2niix; `$out` is its output folder, `$in` its input."""
    head = '#!/bin/sh\nwhile [ "$1" != "-o" ]; do shift; done\nout="$2"; in="$3"\n'
    path.write_text(head + script)
    path.chmod(0o700)
    monkeypatch.setattr(dcm2niix, "bin", str(path))


def test_its_files_are_private_neutral_and_always_removed(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dicoms.series(tmp_path / "scan", shape=(6, 6, 4), name=f"{dicoms.SECRET}-{{}}.dcm")
    seen = tmp_path / "seen"
    script = f'/bin/ls "$in" > {seen}; /usr/bin/stat -c %a "$in/.." > {seen}.mode; exit 0\n'
    converter(tmp_path / "fake", script, monkeypatch)
    rejected(lambda: dicom.convert(tmp_path / "scan", tmp_path), "CONVERT_FAILED")
    assert len(seen.read_text().split()) == 4 and dicoms.SECRET not in seen.read_text()
    assert Path(f"{seen}.mode").read_text().strip() == "700"
    assert (
        stat.S_IMODE((tmp_path / "scan").stat().st_mode) != 0o700
    )  # it was not the raw folder that we looked at
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    dicom.convert(tmp_path / "scan", tmp_path)
    assert list(scratch.iterdir()) == []


def test_failures_are_coded_and_quote_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dicoms.series(tmp_path / "scan", shape=(6, 6, 4))

    def convert() -> Volume:
        return dicom.convert(tmp_path / "scan", tmp_path)

    said = f"Error: no good '{dicoms.SECRET}' {dicoms.SECRET} /tmp/x/{dicoms.SECRET}"
    converter(tmp_path / "fails", f'echo "{said}"; exit 3\n', monkeypatch)
    reason = rejected(convert, "CONVERT_FAILED")
    assert "Error: no good" in reason and dicoms.SECRET not in reason
    converter(tmp_path / "slow", "/bin/sleep 30\n", monkeypatch)
    monkeypatch.setattr(dicom, "TIMEOUT_S", 0.2)
    assert "0.2 s" in rejected(convert, "CONVERT_FAILED")
    converter(tmp_path / "two", 'echo x > "$out/fixed.nii"; echo x > "$out/fixed_Eq.nii"\n', monkeypatch)
    assert "fixed_Eq" in rejected(convert, "CONVERT_SEVERAL")
    converter(tmp_path / "html", 'echo "<html>" > "$out/fixed.nii"\n', monkeypatch)
    rejected(convert, "NOT_NIFTI")


def test_a_volume_that_lies_elsewhere_than_its_headers_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dicoms.series(tmp_path / "scan", shape=(6, 7, 4))
    right = dicoms.grid(shape=(6, 7, 4))
    mirrored, moved, data = right.copy(), right.copy(), dicoms.voxels("mprage", shape=(6, 7, 4))
    mirrored[0] *= -1
    moved[2, 3] += 4.0  # half a voxel
    turned = phantoms.turned(data, right, "PIR")
    for name, voxels, affine, good in (
        ("right", data, right, True),
        ("turned", *turned, True),
        ("moved", data, moved, False),
        ("cut", data[:, :, :3], right, False),
    ):
        made = phantoms.write(tmp_path / f"{name}.nii", np.asarray(voxels), affine)
        converter(tmp_path / name, f'/bin/cp {made} "$out/fixed.nii"\n', monkeypatch)
        if good:
            volume = dicom.convert(tmp_path / "scan", tmp_path)
            np.testing.assert_allclose(to_ras(volume.data, volume.affine)[1], right, atol=1e-6)
        else:
            rejected(lambda: dicom.convert(tmp_path / "scan", tmp_path), "CONVERT_FAILED")


# ---- identity -------------------------------------------------------------------------------------------------------


def test_nothing_of_a_patient_comes_along(tmp_path: Path) -> None:
    described = f"{dicoms.SECRET} MPRAGE"
    dicoms.series(tmp_path / "scan", phi=True, subject=dicoms.SECRET, SeriesDescription=described)
    volume = dicom.convert(tmp_path / "scan", tmp_path)
    told = repr((volume.acquisition, volume.notes)).upper()
    assert not [
        word for word in ("DOE", "JANET", "CLINIC", "998877", "1950", "2020", "10:15") if word in told
    ]
    assert volume.acquisition == {
        "field_tesla": 3.0,
        "tr_ms": 2300.0,
        "te_ms": 2.98,
        "ti_ms": 900.0,
        "flip_degrees": 9.0,
        "manufacturer": "Siemens",
        "model": "TrioTim",
        "dimension": "3D",
        "scanning": "GR\\IR",
        "variant": "SK\\SP\\MP",
    }


def test_sidecars_are_reviewed_value_by_value() -> None:
    hostile = {
        "EchoTime": float("nan"),
        "RepetitionTime": "2.3",
        "FlipAngle": -3,
        "InversionTime": 1e9,
        "MagneticFieldStrength": True and 3,
        "Manufacturer": "DOE^JANET",
        "ManufacturersModelName": "Skyra 19500102",
        "ScanningSequence": "GR JANET",
        "SeriesDescription": "DOE",
        "AcquisitionTime": "10:15:00",
        "DeviceSerialNumber": "1",
    }
    assert sidecar.reviewed(hostile) == {"field_tesla": 3.0}
