from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import dicoms
import phantoms
from cranium import ingest
from cranium.cards import Card
from cranium.config import Ingest, Machine

pytestmark = pytest.mark.ray


def test_a_tcia_tree_becomes_shards_without_a_trace_of_its_headers(ray_cluster: Any, tmp_path: Path) -> None:
    root = dicoms.nbia_tree(tmp_path / "raw", num_subjects=1)
    study = "UPENN-GBM/UPENN-GBM-00009/01-09-2020-NA-BRAIN ROUTINE-10009"
    named = {"subject": "UPENN-GBM-00009", "phi": True}
    dicoms.series(root / study / "1.000000-a-1", "t1", number=1, **named)
    dicoms.series(root / study / "2.000000-b-2", "t2", number=2, skip=[6], **named)
    dicoms.series(root / study / "3.000000-c-3", "t1", number=3, SeriesDescription="T1 W/WO", **named)
    content = phantoms.card("tcia", contrasts=("T1w", "T1ce", "T2w", "FLAIR"), masks=False)
    layout = {"format": "dicom", "series": ["UPENN-GBM/{subject}/{session}/{series}"], "source": "a test"}
    content |= {"layouts": [layout], "labels": {}, "groups": [], "tables": []}
    card = Card.model_validate({k: v for k, v in content.items() if k != "participants"})
    channels = ("T1w", "T1ce", "T2w", "FLAIR")
    spec = Ingest(contrasts=channels, size=28, spacing_mm=8.0, slice_spacing_mm=8.0, mask="otsu")
    said: list[str] = []
    made = ingest.ingest(
        card, root, spec, Machine(store=tmp_path / "store"), lambda *step: said.append(step[2])
    )
    counts = made.manifest()["counts"]
    assert {k: counts[k] for k in ("scans", "rejected", "sessions")} == {
        "scans": 7,
        "rejected": 2,
        "sessions": 2,
    }
    assert made.manifest()["rejections"] == {"SLICES_MISSING": 1, "AGENT_CONFLICT": 1}
    sessions = pq.read_table(made.path / "sessions.parquet").to_pylist()
    assert {s["subject"]: s["present"] for s in sessions} == {
        "UPENN-GBM-00001": 0b1111,
        "UPENN-GBM-00009": 0b0001,
    }
    assert any("DICOM headers" in text for text in said)
    stored = b"".join(path.read_bytes() for path in made.path.rglob("*") if path.is_file())
    for trace in (dicoms.SECRET, "JANET", "SN-998877", "19500102"):
        assert trace.encode() not in stored
