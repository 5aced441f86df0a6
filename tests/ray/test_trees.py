"""Every card's phantom tree, written from its source's description, becomes shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import trees
from cranium import ingest
from cranium.cards import load_card
from cranium.config import Ingest, Machine
from cranium.volume.quality import ASIDE

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("name", trees.WRITERS)
def test_a_tree_becomes_shards(ray_cluster: Any, name: str, tmp_path: Path) -> None:
    expected = trees.WRITERS[name](tmp_path / "raw")
    card = load_card(expected.card)
    spec = Ingest(
        contrasts=card.contrasts,
        size=28,
        spacing_mm=8.0,
        slice_spacing_mm=16.0,
        mask=("otsu",),
        align="none",
        min_brain=0.01,
        compute={"num_workers": 2},
    )
    made = ingest.ingest(card, tmp_path / "raw", spec, Machine(store=tmp_path / "store"))
    counts = made.manifest()["counts"]
    found = expected.sessions
    refused = [code for code, _ in expected.refused if code not in ASIDE]
    assert counts["sessions"] == len(found) and counts["subjects"] == len({subject for subject, _ in found})
    assert counts["accepted"] + counts["warned"] == sum(len(f.contrasts) for f in found.values())
    assert counts["rejected"] == len(refused)
    maps = sum(counts.get(f"label_maps_{outcome}", 0) for outcome in ("accepted", "warned"))
    assert maps == sum(f.segmentation is not None for f in found.values())
    table = pq.read_table(made.path / "sessions.parquet").to_pylist()
    rows = {(row["subject"], row["session"]): row for row in table}
    assert rows.keys() == found.keys()
    for who, session in found.items():
        present = [c for i, c in enumerate(card.contrasts) if rows[who]["present"] >> i & 1]
        assert sorted(present) == sorted(session.contrasts)
        assert {column: rows[who][column] for column in session.values} == dict(session.values)
