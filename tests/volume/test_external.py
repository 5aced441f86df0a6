"""A mask program stands in for HD-BET and SynthStrip: a script that thresholds."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

import phantoms
from cranium.volume import external

SHAPE = (22, 26, 20)
GRID = phantoms.affine((8, 8, 8), SHAPE, (5, 0, 0))
HEAD = phantoms.intensities(phantoms.tissues(phantoms.Head(), SHAPE, GRID), "T2w", -1).astype(np.float32)

SCRIPT = """
import array, gzip, struct, sys
source, target, *rest = sys.argv[1:]
content = gzip.open(source).read()
header, values = bytearray(content[:352]), array.array("f", content[352:])
mask = bytes(value > 550 for value in values)
header[70:74] = struct.pack("<hh", 2, 8)  # uint8
header[112:120] = struct.pack("<ff", 1, 0)
print("said before the end", file=sys.stderr)
{extra}
gzip.open(target, "wb", 1).write(bytes(header) + mask)
"""


def command(folder: Path, extra: str = "", options: str = "") -> str:
    script = folder / "a program.py"
    script.write_text(SCRIPT.format(extra=extra))
    return f"{sys.executable} '{script}' {{input}} {{output}} {options}"


def test_a_program_gives_a_mask(tmp_path: Path) -> None:
    segment = external.segmenter(external.parse(command(tmp_path), None, None))
    np.testing.assert_array_equal(segment(HEAD, GRID), HEAD > 550)


def test_no_shell_sees_the_command(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    extra = f"assert rest == ['; touch {canary}', '$(touch {canary})'], rest"
    words = external.parse(command(tmp_path, extra, f"'; touch {canary}' '$(touch {canary})'"), None, None)
    external.segmenter(words)(HEAD, GRID)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("sys.exit(3)", "ended with 3 and said: said before the end"),
        ("raise SystemExit(0)", "no mask that can be read"),
        ("open(target, 'wb').write(b'<html>'); sys.exit(0)", "NOT_NIFTI"),
        ("header[46:48] = struct.pack('<h', 10)", "other voxels"),  # half the slices
        ("import time; time.sleep(60)", "longer than 1 s"),
    ],
)
def test_what_a_program_does_wrong_is_said(tmp_path: Path, extra: str, said: str) -> None:
    segment = external.segmenter(
        external.parse(command(tmp_path, extra), None, None), timeout_s=1.0 if "sleep" in extra else 60.0
    )
    with pytest.raises(ValueError, match=said):
        segment(HEAD, GRID)


def test_weights_of_another_hash_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "synthstrip.pt"
    weights.write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    line = command(tmp_path, f"assert rest == ['{weights}']", "{weights}")
    external.segmenter(external.parse(line, weights, right))(HEAD, GRID)
    with pytest.raises(ValueError, match=f"SHA-256 {right}, not 000"):
        external.parse(line, weights, "0" * 64)
    with pytest.raises(ValueError, match="both"):
        external.parse(line, weights, None)
    with pytest.raises(ValueError, match="both"):
        external.parse(line, None, None)
    with pytest.raises(ValueError, match="cannot be read"):
        external.parse(line, tmp_path / "absent.pt", right)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hd-bet -i {input}", "lacks {output}"),
        ("", "lacks"),
        ("no-such-program-here {input} {output}", "no program"),
    ],
)
def test_commands_that_cannot_work_are_refused_early(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        external.parse(line, None, None)
