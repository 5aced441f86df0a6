"""Random damage to headers and gzip streams: accepted and right, or rejected with a code; bounded; never silent.

Right means: voxels, affine and notes equal what a slow second reader in this file makes of the same bytes (headers), or
what nibabel makes of the undamaged file (streams). The address space of the process is capped meanwhile, so that an
allocation that a header asks for fails the test, and an alarm ends a read that hangs. `CRANIUM_FUZZ_SECONDS=600`
runs on with new seeds for as long; what was found is kept below as tests of their own.
"""

from __future__ import annotations

import gzip
import math
import os
import resource
import signal
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import phantoms
from cranium.volume import nifti
from cranium.volume.quality import REJECTIONS, Rejected

SHAPE = (6, 7, 5)
GRID = phantoms.affine((2.0, 2.5, 3.0), SHAPE, (5, 3, -4))
MAX_SECONDS = 10  # of one read, which takes a millisecond
ROOM = 512 << 20  # address space beyond what the process holds: files here are of a few KiB
MODEST = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
COUNTS: Counter[str] = Counter()


def image(kind: str, order: str, version: int) -> bytes:
    data = np.random.default_rng(3).integers(0, 120, SHAPE).astype(kind)
    make = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    of = make(data, GRID, dtype=data.dtype)
    of.set_qform(GRID, 1)
    of.set_sform(GRID, 1)
    of.header.set_xyzt_units("mm")
    if order == ">":
        of = make(of.dataobj, GRID, of.header.as_byteswapped(">"))
    return bytes(of.to_bytes())


BASES = [
    image(kind, order, version) for kind in ("i2", "f4", "u1", "f8") for order in "<>" for version in (1, 2)
]


@pytest.fixture(scope="module", autouse=True)
def bounded() -> Iterator[None]:
    """Cap the address space for the tests of this file."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(path: Path) -> nifti.Volume | Rejected:
    """What reading gives, within the time; anything but a volume or a `Rejected` fails the test."""

    def late(*_: Any) -> None:
        raise AssertionError(f"reading takes over {MAX_SECONDS} s")

    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        result: nifti.Volume | Rejected = nifti.read(path)
        COUNTS["accepted"] += 1
    except Rejected as error:
        assert error.code in REJECTIONS and error.reason
        COUNTS[error.code] += 1
        result = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    return result


# ---- a second reader ------------------------------------------------------------------------------------------------

FIELDS = {  # version -> name -> (offset, struct format), from nifti1.h and nifti2.h
    1: {
        "sizeof_hdr": (0, "i"),
        "dim": (40, "8h"),
        "datatype": (70, "h"),
        "bitpix": (72, "h"),
        "pixdim": (76, "8f"),
        "vox_offset": (108, "f"),
        "scl_slope": (112, "f"),
        "scl_inter": (116, "f"),
        "xyzt_units": (123, "B"),
        "qform_code": (252, "h"),
        "sform_code": (254, "h"),
        "quatern": (256, "3f"),
        "qoffset": (268, "3f"),
        "srow": (280, "12f"),
        "magic": (344, "4s"),
    },
    2: {
        "sizeof_hdr": (0, "i"),
        "magic": (4, "8s"),
        "datatype": (12, "h"),
        "bitpix": (14, "h"),
        "dim": (16, "8q"),
        "pixdim": (104, "8d"),
        "vox_offset": (168, "q"),
        "scl_slope": (176, "d"),
        "scl_inter": (184, "d"),
        "qform_code": (344, "i"),
        "sform_code": (348, "i"),
        "quatern": (352, "3d"),
        "qoffset": (376, "3d"),
        "srow": (400, "12d"),
        "xyzt_units": (500, "i"),
    },
}
CODES = {
    2: "B", 4: "h", 8: "i", 16: "f", 64: "d", 256: "b", 512: "H", 768: "I", 1024: "q", 1280: "Q",
}  # fmt: skip


def fields(content: bytes) -> tuple[str, dict[str, Any]]:
    """Byte order and fields of a header that was accepted."""
    order = next(o for o in "<>" if struct.unpack_from(f"{o}i", content)[0] in (348, 540))
    version = 1 if struct.unpack_from(f"{order}i", content)[0] == 348 else 2
    read = {
        name: struct.unpack_from(order + layout, content, at)
        for name, (at, layout) in FIELDS[version].items()
    }
    return order, {name: v if len(v) > 1 else v[0] for name, v in read.items()}


def rotation(b: float, c: float, d: float) -> list[list[float]]:
    """Method 2 of nifti1.h, written out."""
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    n = math.sqrt(a * a + b * b + c * c + d * d)
    a, b, c, d = a / n, b / n, c / n, d / n
    return [
        [a * a + b * b - c * c - d * d, 2 * b * c - 2 * a * d, 2 * b * d + 2 * a * c],
        [2 * b * c + 2 * a * d, a * a + c * c - b * b - d * d, 2 * c * d - 2 * a * b],
        [2 * b * d - 2 * a * c, 2 * c * d + 2 * a * b, a * a + d * d - b * b - c * c],
    ]


def check_right(content: bytes, volume: nifti.Volume) -> None:
    """Compare an accepted file with what its bytes say, one voxel and one corner at a time."""
    order, f = fields(content)
    noted = {note.code for note in volume.notes}
    dims = f["dim"][1 : f["dim"][0] + 1]
    assert 3 <= len(dims) <= 7 and all(d > 1 for d in dims[:3]) and all(d == 1 for d in dims[3:])
    assert ("SQUEEZED" in noted) == (len(dims) > 3)
    i, j, k = dims[:3]
    count, start, letter = i * j * k, int(f["vox_offset"]), CODES[f["datatype"]]
    assert start == f["vox_offset"] and f["bitpix"] == 8 * struct.calcsize(f"={letter}")
    stored = struct.unpack_from(f"{order}{count}{letter}", content, start)
    rest = content[start + count * f["bitpix"] // 8 :]
    assert ("EXTRA_BYTES" in noted) == any(rest)
    slope, inter = f["scl_slope"], f["scl_inter"]
    if slope == 0 or math.isnan(slope):
        slope, inter = 1.0, 0.0
        assert "SCALE_ODD" in noted
    finite = [math.isfinite(v) for v in stored]
    assert ("NONFINITE_FILLED" in noted) == (not all(finite))
    expected = [float(v) * slope + inter if ok else 0.0 for v, ok in zip(stored, finite, strict=True)]
    assert volume.data.shape == (i, j, k) and np.isfinite(volume.data).all()
    np.testing.assert_array_equal(
        volume.data.ravel(order="F"),
        np.array(struct.unpack(f"{count}f", struct.pack(f"{count}f", *expected))),
    )
    check_affine(f, (i, j, k), volume.affine)


def check_affine(f: dict[str, Any], shape: tuple[int, int, int], affine: np.ndarray) -> None:
    unit = {1: 1000.0, 3: 0.001}.get(f["xyzt_units"] & 7, 1.0)
    forms = []
    if f["sform_code"] > 0:
        forms.append(np.array([*f["srow"], 0, 0, 0, 1], float).reshape(4, 4))
    if f["qform_code"] > 0:
        qform = np.eye(4)
        qform[:3, :3] = rotation(*f["quatern"])
        qform[:3, :3] *= [*f["pixdim"][1:3], f["pixdim"][3] * (-1 if f["pixdim"][0] == -1 else 1)]
        qform[:3, 3] = f["qoffset"]
        forms.append(qform)
    np.testing.assert_allclose(affine[:3], forms[0][:3] * unit, rtol=1e-6, atol=1e-6 * unit)
    if len(forms) == 2:
        for corner in np.ndindex(2, 2, 2):
            at = [c * (d - 1) for c, d in zip(corner, shape, strict=True)]
            apart = np.linalg.norm((forms[0] - forms[1])[:3] @ [*at, 1])
            assert apart <= min(f["pixdim"][1:4]) * (1 + 1e-6)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    assert np.all((spacing >= 0.049) & (spacing <= 50.1)) and np.abs(affine[:3, 3]).max() <= 1e4
    volume = abs(np.linalg.det(affine[:3, :3])) / spacing.prod()
    assert volume > 0.99  # of a box of these edges: neither sheared nor flat


# ---- headers --------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 4, 5, 7, 8, 9, 16, 64, 127, 348, 352, 540, 544, 32767, -32768, 0.5, 1e-45, 1e-30, 1e9, 1e30, 3e38,
     -3e38, 1e300, 2**31 - 1, 2**62, math.nan, math.inf, -math.inf]
) | st.floats(-100, 100, width=32)  # fmt: skip


def packed(layout: str, values: list[float]) -> bytes:
    """As many bytes as the field has, whatever the numbers; what does not fit is taken as its largest."""
    count, letter = int(layout[:-1] or 1), layout[-1]
    parts = []
    for number in (values * count)[:count]:
        if letter in "fd":
            number = max(-3e38, min(3e38, number)) if letter == "f" and math.isfinite(number) else number
        else:
            bits = 8 * struct.calcsize(f"={letter}")
            low, high = (0, 2**bits - 1) if letter.isupper() else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            number = max(low, min(high, int(number))) if math.isfinite(number) else high
        parts.append(number)
    return struct.pack(f"<{count}{letter}", *parts)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A valid file with fields set to hostile numbers, or with raw bytes written anywhere into its header."""
    content = bytearray(draw(st.sampled_from(BASES)))
    order = "<" if content[0] in (348 % 256, 540 % 256) else ">"
    size = struct.unpack_from(f"{order}i", content)[0]
    layouts = {n: at for n, at in FIELDS[1 if size == 348 else 2].items() if at[1][-1] != "s"}
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            at, layout = layouts[draw(st.sampled_from(sorted(layouts)))]
            count, letter = int(layout[:-1] or 1), layout[-1]
            width = struct.calcsize(f"={letter}")
            item = draw(st.integers(0, count - 1))
            value = packed(letter, [draw(NUMBERS)])
            at += item * width
            content[at : at + width] = value if order == "<" else value[::-1]
        else:
            at = draw(st.integers(0, size + 3))
            raw = draw(st.binary(min_size=1, max_size=4))
            content[at : at + len(raw)] = raw
    tail = draw(st.sampled_from([b"", b"", b"\0" * 40, b"\1\2\3"]))
    return bytes(content) + tail


def header_case(folder: Path, content: bytes, zipped: bool) -> None:
    path = folder / ("a.nii.gz" if zipped else "a.nii")
    path.write_bytes(gzip.compress(content, 1, mtime=0) if zipped else content)
    result = outcome(path)
    if isinstance(result, nifti.Volume):
        check_right(content, result)


@MODEST
@given(content=headers(), zipped=st.booleans())
def test_headers(tmp_path: Path, content: bytes, zipped: bool) -> None:
    header_case(tmp_path, content, zipped)


@st.composite
def voxels(draw: st.DrawFn) -> bytes:
    """A valid file with any bytes among its voxels: NaN, infinities, denormals, numbers of no scanner."""
    base = draw(st.sampled_from(BASES))
    start = 544 if 540 in struct.unpack_from("<i", base) + struct.unpack_from(">i", base) else 352
    raw, at = draw(st.binary(min_size=2, max_size=256)), start + draw(st.integers(0, 500))
    return (base[:at] + raw + base[at + len(raw) :])[: len(base)]


@MODEST
@given(content=voxels())
def test_voxels(tmp_path: Path, content: bytes) -> None:
    header_case(tmp_path, content, zipped=False)


# ---- gzip streams ---------------------------------------------------------------------------------------------------


def compressed(content: bytes, level: int, strategy: int, block: int) -> bytes:
    """gzip with stored, fixed or dynamic blocks, and a new block every so many bytes."""
    parts = [struct.pack("<4BI2B", 31, 139, 8, 0, 0, 0, 255)]
    worker = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    for start in range(0, len(content), block):
        parts += [worker.compress(content[start : start + block]), worker.flush(zlib.Z_FULL_FLUSH)]
    parts += [worker.flush(), struct.pack("<II", zlib.crc32(content), len(content) % 2**32)]
    return b"".join(parts)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """An undamaged file's bytes, and its gzip stream with up to three pieces of damage."""
    base = draw(st.sampled_from(BASES))
    whole = compressed(
        base,
        draw(st.integers(0, 9)),
        draw(st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY])),
        draw(st.sampled_from([100, 999, 10**6])),
    )
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(
            st.sampled_from(["flip", "cut", "insert", "delete", "member", "crc", "length", "flags", "swap"])
        ):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del content[at : at + draw(st.integers(1, 64))]
            case "member":  # another file, the same again, nothing, or the stream cut in two members
                content += draw(
                    st.sampled_from([gzip.compress(b"more"), whole, gzip.compress(b""), b"\x1f\x8b"])
                )
            case "crc" if len(content) > 8:
                content[-8:-4] = draw(st.binary(min_size=4, max_size=4))
            case "length" if len(content) > 8:
                content[-4:] = struct.pack("<I", draw(st.integers(0, 2**32 - 1)))
            case "flags" if len(content) > 4:
                content[3] = draw(st.integers(0, 255))
            case "swap":
                other = draw(st.integers(0, max(0, len(content) - 1)))
                first, second = content[at : at + 16], content[other : other + 16]
                if len(first) == len(second):
                    content[at : at + 16], content[other : other + 16] = second, first
    return base, bytes(content)


def stream_case(folder: Path, base: bytes, content: bytes) -> None:
    path = folder / "a.nii.gz"
    path.write_bytes(content)
    result = outcome(path)
    if isinstance(result, nifti.Volume):  # then the damage was none, such as a flip in gzip's time stamp
        clean = nib.Nifti1Image if struct.unpack_from("<i", base)[0] in (348, 1543569408) else nib.Nifti2Image
        expected = clean.from_bytes(base)
        np.testing.assert_array_equal(result.data, expected.get_fdata(dtype=np.float32))
        np.testing.assert_allclose(result.affine, expected.affine, atol=1e-6)
        assert gzip.decompress(content) == base


@MODEST
@given(case=streams())
def test_streams(tmp_path: Path, case: tuple[bytes, bytes]) -> None:
    stream_case(tmp_path, *case)


def test_split_members(tmp_path: Path) -> None:
    """A file in two gzip members, as block-wise compressors write it, is refused and not read by half."""
    half = len(BASES[0]) // 2
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(BASES[0][:half]) + gzip.compress(BASES[0][half:]))
    result = outcome(tmp_path / "a.nii.gz")
    assert isinstance(result, Rejected) and result.code == "GZ_TRAILING"


# ---- for longer -----------------------------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_for_as_long_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`CRANIUM_FUZZ_SECONDS`: all of the above with new seeds, until the time is over."""
    seconds = float(os.environ.get("CRANIUM_FUZZ_SECONDS", "0"))
    if not seconds:
        pytest.skip("CRANIUM_FUZZ_SECONDS says for how long")
    COUNTS.clear()
    more = settings(MODEST, max_examples=1000, derandomize=False)
    rounds: list[Callable[[], Any]] = [
        lambda: given(content=headers(), zipped=st.booleans())(
            lambda content, zipped: header_case(tmp_path, content, zipped)
        ),
        lambda: given(case=streams())(lambda case: stream_case(tmp_path, *case)),
        lambda: given(content=voxels())(lambda content: header_case(tmp_path, content, False)),
    ]
    start = number = int(time.time())
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        seed(number)(more(rounds[number % 3]()))()
        number += 1
    with capsys.disabled():
        print(f"\n{COUNTS.total()} files, seeds {start} to {number - 1}: {dict(COUNTS.most_common())}")
