from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from cranium.volume import quality
from cranium.volume.quality import Note, Rejected


def test_rejections_cross_processes_whole() -> None:
    back = pickle.loads(pickle.dumps(Rejected("GZ_CRC", "why")))
    assert (back.code, back.reason, str(back)) == ("GZ_CRC", "why", "GZ_CRC: why")


def test_unknown_codes_are_bugs() -> None:
    with pytest.raises(KeyError):
        Rejected("NO_SUCH", "why")
    with pytest.raises(KeyError):
        Note("NO_SUCH", "why")


def test_every_code_is_used_and_every_used_code_is_known() -> None:
    package = Path(quality.__file__).parents[1]
    text = "".join(p.read_text() for p in package.rglob("*.py") if p.name != "quality.py")
    raised = set(re.findall(r'Rejected\(\s*"([A-Z_]+)"', text)) | {"DIMS_LIMIT", "DIMS_INVALID"}
    raised |= {"DUP_ID", "DUP_CONTENT"}  # found where scans are gathered, not read
    raised |= set(re.findall(r'(?:Decision\(None, |refusal\()"([A-Z_]+)"', text))  # of DICOM series
    noted = set(re.findall(r'Note\(\s*"([A-Z_]+)"', text))
    assert raised == set(quality.REJECTIONS)
    assert noted == set(quality.NOTES)
