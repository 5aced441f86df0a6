"""Every bad file ends in a code; whatever is accepted is right. `# I7` marks row I7 of the fault matrix.

Elsewhere: I11, I18, I19, I20 tests/volume/test_normalise.py and tests/ray/test_ingest.py; I21, I22
tests/test_faults.py; I25 tests/test_privacy.py; I26 tests/test_cohort.py; random damage tests/volume/test_fuzz.py.
"""

from __future__ import annotations

import errno
import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from isal import igzip

import phantoms
from cranium.volume import nifti
from cranium.volume.quality import Rejected

RNG = np.random.default_rng(0)
DATA = RNG.integers(-50, 1000, (12, 14, 10)).astype(np.int16)
GRID = phantoms.affine((2.0, 2.5, 3.0), DATA.shape, (5, 3, -4))
FIELD = {  # offset and struct format in a NIfTI-1 header
    "dim": (40, "8h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "b"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "quatern_b": (256, "f"),
    "qoffset_x": (268, "f"),
    "srow_x": (280, "4f"),
    "srow_y": (296, "4f"),
    "magic": (344, "4s"),
}


def stored(data: np.ndarray = DATA, grid: np.ndarray = GRID, **fields: Any) -> bytes:
    """The bytes of a valid .nii with some header fields overwritten."""
    image = nib.Nifti1Image(data, grid, dtype=data.dtype)
    image.set_qform(grid, 1)
    image.set_sform(grid, 1)
    content = bytearray(image.to_bytes())
    for name, value in fields.items():
        offset, layout = FIELD[name]
        values = value if isinstance(value, list | tuple) else [value]
        struct.pack_into(f"<{layout}", content, offset, *values)
    return bytes(content)


def file(folder: Path, content: bytes, name: str = "a.nii") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, 1, mtime=0) if name.endswith(".gz") else content)
    return path


def code(call: Callable[[], Any]) -> str:
    with pytest.raises(Rejected) as error:
        call()
    assert error.value.reason
    return error.value.code


def code_of(folder: Path, **fields: Any) -> str:
    return code(lambda: nifti.read(file(folder, stored(**fields))))


def notes(volume: nifti.Volume) -> list[str]:
    return [note.code for note in volume.notes]


# ---- what is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8", ">i2", ">f4"])
def test_agrees_with_nibabel(tmp_path: Path, name: str, kind: str) -> None:
    image = nib.Nifti1Image(np.abs(DATA % 120).astype(kind), GRID)
    image.header.set_data_dtype(kind)
    image.set_qform(GRID, 1)
    if kind.startswith(">"):
        image = nib.Nifti1Image(image.dataobj, GRID, image.header.as_byteswapped(">"))
    path = file(tmp_path, image.to_bytes(), name)
    volume = nifti.read(path)
    expected = nib.load(path)
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, expected.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)
    assert volume.notes == ()


def test_nifti2_and_qform_alone(tmp_path: Path) -> None:
    second = file(tmp_path, nib.Nifti2Image(DATA, GRID).to_bytes(), "b.nii.gz")
    np.testing.assert_allclose(nifti.read(second).affine, GRID, atol=1e-6)
    for axes in ("RAS", "LAS", "PIL"):  # of either handedness: qfac
        data, grid = phantoms.turned(DATA, GRID, axes)
        volume = nifti.read(file(tmp_path, stored(data, grid, sform_code=0)))
        np.testing.assert_allclose(volume.affine, grid, atol=1e-4)


def test_scale_is_applied(tmp_path: Path) -> None:
    volume = nifti.read(file(tmp_path, stored(scl_slope=0.5, scl_inter=-3.0)))
    np.testing.assert_array_equal(volume.data, (DATA * 0.5 - 3).astype(np.float32))
    assert volume.notes == ()


@pytest.mark.parametrize("axes", ["LAS", "LPS", "PIR", "SAL", "ARI"])
def test_reorientation_is_bit_equal(tmp_path: Path, axes: str) -> None:
    grid = phantoms.affine((2.0, 2.5, 3.0), DATA.shape)
    data, turned = phantoms.turned(DATA, grid, axes)
    volume = nifti.read(phantoms.write(tmp_path / "a.nii.gz", data, turned))
    back, affine = nifti.to_ras(volume.data, volume.affine)
    np.testing.assert_array_equal(back, DATA)
    np.testing.assert_allclose(affine, grid, atol=1e-6)


# ---- gzip and sizes -------------------------------------------------------------------------------------------------


def test_every_truncation_is_rejected(tmp_path: Path) -> None:  # I1
    path = file(tmp_path, stored(), "a.nii.gz")
    whole = path.read_bytes()
    for keep in [
        *np.linspace(3, len(whole) - 20, 40).astype(int),
        *(len(whole) - n for n in (1, 4, 7, 8, 9)),
    ]:
        path.write_bytes(whole[:keep])
        assert code(lambda: nifti.read(path)) == "GZ_TRUNCATED"


def test_no_flipped_bit_passes_silently(
    tmp_path: Path,
) -> None:  # I2: 300 seeds, and every bit of gzip's header
    path = file(tmp_path, stored(), "a.nii.gz")
    whole, clean = path.read_bytes(), nifti.read(path)
    seeds = np.random.default_rng(1).integers(80, len(whole) * 8, 300).tolist()
    for bit in [*range(80), *seeds]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            volume = nifti.read(path)
        except Rejected as error:  # damage is said, not the nonsense that it makes of a header
            # Past gzip's own header either the check sum fails, or the bits now run on beyond the end.
            assert bit < 80 or error.code in ("GZ_CRC", "GZ_TRUNCATED"), (bit, error)
        else:
            assert bit < 80, "only a flip in gzip's own header, such as its time stamp, may change nothing"
            np.testing.assert_array_equal(volume.data, clean.data)
            np.testing.assert_array_equal(volume.affine, clean.affine)


@pytest.mark.parametrize(("offset", "what"), [(-8, "crc"), (-4, "length")])
def test_the_check_sum_and_the_length_are_checked(tmp_path: Path, offset: int, what: str) -> None:  # I2
    path = file(tmp_path, stored(), "a.nii.gz")
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    assert code(lambda: nifti.read(path)) == "GZ_CRC", what


def test_what_follows_a_stream_is_rejected(tmp_path: Path) -> None:  # I3
    path = file(tmp_path, stored(), "a.nii.gz")
    whole = path.read_bytes()
    for tail in (b"x", b"\0" * 512, gzip.compress(b"second member")):
        path.write_bytes(whole + tail)
        assert code(lambda: nifti.read(path)) == "GZ_TRAILING"


def test_what_is_no_nifti(tmp_path: Path) -> None:  # I4
    read = nifti.read
    assert code(lambda: read(file(tmp_path, b""))) == "NOT_NIFTI"
    with pytest.raises(Rejected, match="web page"):
        read(file(tmp_path, b"<!DOCTYPE html><html>" + b" " * 400))
    assert code(lambda: read(file(tmp_path, b"<html>" * 100, "a.nii.gz"))) == "NOT_NIFTI"
    assert code(lambda: read(file(tmp_path, stored()[:200]))) == "NOT_NIFTI"
    assert code_of(tmp_path, magic=b"ni1\0") == "NOT_NIFTI"
    assert code_of(tmp_path, magic=b"\0\0\0\0") == "NOT_NIFTI"
    plain = tmp_path / "plain.nii.gz"
    plain.write_bytes(stored())
    assert code(lambda: read(plain)) == "EXT_MISMATCH"
    zipped = tmp_path / "zipped.nii"
    zipped.write_bytes(gzip.compress(stored()))
    assert code(lambda: read(zipped)) == "EXT_MISMATCH"


HOSTILE = """
import resource, sys
from pathlib import Path
from cranium.volume import nifti
from cranium.volume.quality import Rejected
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (96 << 20),) * 2)  # beyond this an allocation fails
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        nifti.read(path)
        print(path.name, "accepted")
    except Rejected as error:
        print(path.name, error.code)
print("rss", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_hostile_sizes_cost_no_memory(
    tmp_path: Path,
) -> None:  # I5, I6: peak RSS and address space are bounded
    """In a process that may take 96 MiB more: headers that declare 64 TB, and 400 MiB of zeros in 2 MB of gzip."""
    with igzip.open(tmp_path / "bomb.nii.gz", "wb", 1) as out:
        out.write(stored())
        for _ in range(400):
            out.write(bytes(1 << 20))
    with igzip.open(tmp_path / "bomb_in_disguise.nii.gz", "wb", 1) as out:  # it declares all of it, and more
        out.write(stored(dim=[3, 1000, 1000, 1000, 1, 1, 1, 1]))
        for _ in range(400):
            out.write(bytes(1 << 20))
    huge = [3, 32767, 32767, 32767, 1, 1, 1, 1]
    for name, dim in (("huge", huge), ("axes", [9, *huge[1:]]), ("more", [3, 12, 14, 9999, 1, 1, 1, 1])):
        file(tmp_path, stored(dim=dim), f"{name}.nii")
        file(tmp_path, stored(dim=dim), f"{name}.nii.gz")
    file(tmp_path, stored(vox_offset=1e9), "offset.nii")
    command = [sys.executable, "-c", HOSTILE, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    said = dict(line.split() for line in run.stdout.splitlines())
    assert int(said.pop("rss")) < 64 << 10  # KiB
    assert said == {
        "bomb.nii.gz": "BOMB",
        "bomb_in_disguise.nii.gz": "DIMS_LIMIT",
        "offset.nii": "HEADER_INVALID",
        **{f"{name}.nii{z}": "DIMS_LIMIT" for name in ("huge", "axes", "more") for z in ("", ".gz")},
    }


def test_a_few_extra_bytes_are_noted(tmp_path: Path) -> None:
    assert notes(nifti.read(file(tmp_path, stored() + b"abc", "a.nii.gz"))) == ["EXTRA_BYTES"]
    assert notes(nifti.read(file(tmp_path, stored() + bytes(300)))) == []


# ---- header ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        ([3, 32767, 32767, 32767, 1, 1, 1, 1], "DIMS_LIMIT"),
        ([3, 12, 14, 11, 1, 1, 1, 1], "DIMS_LIMIT"),  # more than the file holds
        ([9, 12, 14, 10, 1, 1, 1, 1], "DIMS_LIMIT"),
        ([3, 0, 14, 10, 1, 1, 1, 1], "DIMS_INVALID"),
        ([3, 12, -5, 10, 1, 1, 1, 1], "DIMS_INVALID"),
        ([-1, 12, 14, 10, 1, 1, 1, 1], "DIMS_INVALID"),
        ([3, 1, 168, 10, 1, 1, 1, 1], "DIMS_INVALID"),
        ([2, 12, 140, 1, 1, 1, 1, 1], "NDIM"),
        ([4, 12, 14, 5, 2, 1, 1, 1], "NDIM"),
        ([5, 12, 14, 5, 1, 2, 1, 1], "NDIM"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_dimensions(tmp_path: Path, dim: list[int], expected: str, name: str) -> None:  # I5, I7, I17
    assert code(lambda: nifti.read(file(tmp_path, stored(dim=dim), name))) == expected


def test_fourth_axis_of_one_is_dropped(tmp_path: Path) -> None:  # I17
    volume = nifti.read(file(tmp_path, stored(dim=[4, 12, 14, 10, 1, 1, 1, 1])))
    np.testing.assert_array_equal(volume.data, DATA)
    assert notes(volume) == ["SQUEEZED"]


def test_max_bytes(tmp_path: Path) -> None:  # I5: of the file, and of its voxels as float32
    path = file(tmp_path, stored(), "a.nii.gz")
    assert code(lambda: nifti.read(path, max_bytes=4 * DATA.size - 1)) == "DIMS_LIMIT"
    assert nifti.read(path, max_bytes=4 * DATA.size).data.shape == DATA.shape
    plain = file(tmp_path, stored())
    assert code(lambda: nifti.read(plain, max_bytes=plain.stat().st_size - 1)) == "DIMS_LIMIT"


@pytest.mark.parametrize("datatype", [0, 1, 32, 128, 1536, 1792, 2048, 2304, 77])
def test_types_of_no_scan(tmp_path: Path, datatype: int) -> None:  # I16
    assert code_of(tmp_path, datatype=datatype) == "DTYPE"


def test_contradictions(tmp_path: Path) -> None:
    assert code_of(tmp_path, bitpix=32) == "HEADER_INVALID"
    for offset in (-100.0, 0.0, 351.0, 352.5, float("nan"), float("inf"), 1e12):
        assert code_of(tmp_path, vox_offset=offset) == "HEADER_INVALID"


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "fields",
    [
        {"srow_x": [NAN, 0, 0, 0]},
        {"srow_x": [2.0, 0, 0, INF]},
        {"srow_x": [0.0, 0, 0, 0]},
        {"srow_x": [0.0, 2.5, 0, 0], "srow_y": [0.0, 2.5, 0, 0]},
        {"srow_x": [2.0, 1.0, 0, 0], "srow_y": [0.0, 2.5, 0, 0]},  # sheared
        {"quatern_b": NAN},
        {"quatern_b": 1.5},
        {"qoffset_x": NAN},
        {"srow_x": [2.0, 0, 0, 2e4], "qform_code": 0},  # 20 m from the origin
        {"srow_x": [3e38, 0, 0, 0]},
    ],
)
def test_affines(tmp_path: Path, fields: dict[str, Any]) -> None:  # I8
    assert code_of(tmp_path, **fields) == "AFFINE_INVALID"


def test_a_broken_affine_may_be_left_for_the_other(tmp_path: Path) -> None:  # I8
    path = file(tmp_path, stored(srow_x=[NAN] * 4))
    for name in ("agree", "sform", "assume_ras"):
        assert code(lambda name=name: nifti.read(path, orientation=name)) == "AFFINE_INVALID"
    volume = nifti.read(path, orientation="qform")
    assert notes(volume) == ["QS_CHOSEN"]
    np.testing.assert_allclose(volume.affine, GRID, atol=1e-5)
    other = file(tmp_path, stored(quatern_b=NAN))
    np.testing.assert_allclose(nifti.read(other, orientation="sform").affine, GRID, atol=1e-5)


def test_qform_and_sform(tmp_path: Path) -> None:  # I9
    shifted = [*GRID[0, :3], GRID[0, 3] + 2.5]  # a voxel is 2 mm
    path = file(tmp_path, stored(srow_x=shifted))
    assert code(lambda: nifti.read(path)) == "QS_DISAGREE"
    by_sform, by_qform = (nifti.read(path, orientation=name) for name in ("sform", "qform"))
    assert notes(by_sform) == notes(by_qform) == ["QS_CHOSEN"]
    np.testing.assert_allclose(by_sform.affine[0], shifted, atol=1e-5)
    np.testing.assert_allclose(by_qform.affine, GRID, atol=1e-5)
    flipped = file(tmp_path, stored(srow_x=[-v for v in GRID[0]]))
    assert code(lambda: nifti.read(flipped)) == "QS_DISAGREE"
    within = file(tmp_path, stored(srow_x=[*GRID[0, :3], GRID[0, 3] + 1.5]))
    assert nifti.read(within).notes == ()


def test_no_orientation(tmp_path: Path) -> None:  # I10
    path = file(tmp_path, stored(qform_code=0, sform_code=0))
    assert code(lambda: nifti.read(path)) == "NO_ORIENTATION"
    volume = nifti.read(path, orientation="assume_ras")
    assert notes(volume) == ["ASSUMED_RAS"]
    np.testing.assert_allclose(np.diag(volume.affine), [2, 2.5, 3, 1])
    np.testing.assert_allclose(volume.affine @ [*(np.array(DATA.shape) - 1) / 2, 1], [0, 0, 0, 1])


def with_spacing(spacing: float) -> bytes:
    return stored(grid=phantoms.affine((spacing, 2, 2), DATA.shape))


def test_spacing(tmp_path: Path) -> None:  # I12
    for bad in (0.0, -1.0, NAN, INF):
        assert code_of(tmp_path, pixdim=[1.0, bad, 2.5, 3, 0, 0, 0, 0]) == "SPACING_INVALID"
    for bad in (0.001, 300.0):
        assert code(lambda bad=bad: nifti.read(file(tmp_path, with_spacing(bad)))) == "SPACING_INVALID"
    for odd in (0.2, 12.0):
        assert notes(nifti.read(file(tmp_path, with_spacing(odd)))) == ["SPACING_ODD"]
    disagree = stored(pixdim=[1.0, 4.0, 2.5, 3, 0, 0, 0, 0], qform_code=0)
    assert notes(nifti.read(file(tmp_path, disagree))) == ["SPACING_ODD"]


def test_units(tmp_path: Path) -> None:
    micrometres = stored(grid=phantoms.affine((2000, 2000, 2000), DATA.shape), xyzt_units=3)
    volume = nifti.read(file(tmp_path, micrometres))
    np.testing.assert_allclose(np.diag(volume.affine), [2, 2, 2, 1])
    assert notes(volume) == ["UNITS"]
    assert notes(nifti.read(file(tmp_path, stored(xyzt_units=5)))) == ["UNITS"]  # of no meaning: taken as mm


@pytest.mark.parametrize("slope", [0.0, NAN])
def test_unscaled(tmp_path: Path, slope: float) -> None:  # I13
    volume = nifti.read(file(tmp_path, stored(scl_slope=slope, scl_inter=7.0)))
    np.testing.assert_array_equal(volume.data, DATA)
    assert notes(volume) == ["SCALE_ODD"]


def test_other_scales(tmp_path: Path) -> None:  # I13
    for fields in ({"scl_slope": INF}, {"scl_slope": -INF}, {"scl_slope": 1.0, "scl_inter": NAN}):
        assert code_of(tmp_path, **fields) == "SCALE_INVALID"
    negative = nifti.read(file(tmp_path, stored(scl_slope=-1.0, scl_inter=0.0)))
    np.testing.assert_array_equal(negative.data, -DATA.astype(np.float32))
    assert notes(negative) == ["SCALE_ODD"]


# ---- voxels ---------------------------------------------------------------------------------------------------------


def test_nonfinite_voxels(tmp_path: Path) -> None:  # I14
    data = RNG.normal(size=(20, 20, 20)).astype(np.float32)
    data.flat[:8] = [NAN, INF, -INF, NAN, NAN, NAN, NAN, NAN]  # exactly a thousandth
    volume = nifti.read(file(tmp_path, stored(data)))
    assert notes(volume) == ["NONFINITE_FILLED"]
    assert not np.any(volume.data.flat[:8])
    np.testing.assert_array_equal(volume.data.flat[8:], data.flat[8:])
    scaled = nifti.read(file(tmp_path, stored(data, scl_slope=2.0, scl_inter=5.0)))
    assert not np.any(scaled.data.flat[:8])  # zero as an intensity, not as a stored number
    data.flat[8] = NAN
    assert code(lambda: nifti.read(file(tmp_path, stored(data)))) == "NONFINITE"


def test_range(tmp_path: Path) -> None:  # I15
    data = RNG.normal(size=DATA.shape)
    data[0, 0, 0] = 1e300
    assert code(lambda: nifti.read(file(tmp_path, stored(data)))) == "RANGE"
    large = np.full(DATA.shape, 2**63, np.uint64)
    large[0] = 0
    assert code(lambda: nifti.read(file(tmp_path, stored(large)))) == "RANGE"
    assert code_of(tmp_path, scl_slope=1e38) == "RANGE"
    for fields in (
        {"scl_slope": 1.0, "scl_inter": 1e12},
        {"scl_slope": 1e-9, "scl_inter": 1.0},
    ):
        assert code_of(tmp_path, **fields) == "RANGE"  # float32 would round the differences away


def test_constant(tmp_path: Path) -> None:  # I18
    for value in (0, 7):
        assert (
            code(lambda value=value: nifti.read(file(tmp_path, stored(np.full_like(DATA, value)))))
            == "EMPTY_BRAIN"
        )
    empty = nifti.read(file(tmp_path, stored(np.zeros_like(DATA))), labels=True)
    assert not empty.data.any()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path: Path) -> None:  # I23
    assert code(lambda: nifti.read(tmp_path / "none.nii")) == "IO"
    assert code(lambda: nifti.read(tmp_path / "none.nii", root=tmp_path)) == "IO"
    assert code(lambda: nifti.read(tmp_path / "nul\0.nii")) == "IO"
    assert code(lambda: nifti.read(tmp_path / ("x" * 300))) == "IO"
    path = file(tmp_path, stored())
    if os.geteuid():
        path.chmod(0)
        assert code(lambda: nifti.read(path)) == "IO"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_errors_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:  # I23
    path = file(tmp_path, stored(), "secret.nii")

    def refuses(*_: Any) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(nifti, "_without_waiting", refuses)
    with pytest.raises(Rejected, match=os.strerror(number)) as error:
        nifti.read(path)
    assert error.value.code == "IO" and "secret" not in error.value.reason


def test_a_file_that_grows_while_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # I23
    path = file(tmp_path, stored())
    true = os.fstat

    def fstat(handle: int) -> os.stat_result:
        result = true(handle)
        with path.open("ab") as growing:
            growing.write(b"more")
        return result

    monkeypatch.setattr(nifti.os, "fstat", fstat)
    assert code(lambda: nifti.read(path)) == "IO"


@pytest.mark.timeout(10)
def test_only_regular_files_below_the_root(tmp_path: Path) -> None:  # I24
    root, outside = tmp_path / "raw", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    file(outside, stored())
    (root / "out.nii").symlink_to(outside / "a.nii")
    assert code(lambda: nifti.read(root / "out.nii", root=root)) == "NOT_REGULAR"
    file(root, stored())
    (root / "in.nii").symlink_to("a.nii")
    assert nifti.read(root / "in.nii", root=root).data.shape == DATA.shape
    (root / "loop.nii").symlink_to("loop.nii")
    assert code(lambda: nifti.read(root / "loop.nii", root=root)) == "NOT_REGULAR"
    os.mkfifo(root / "pipe.nii")
    assert code(lambda: nifti.read(root / "pipe.nii", root=root)) == "NOT_REGULAR"
    assert code(lambda: nifti.read(Path("/dev/zero"))) == "NOT_REGULAR"
    assert code(lambda: nifti.read(root)) == "NOT_REGULAR"
