"""A sweep whose cells search for their settings, on Ray Tune."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import searches
from cranium import adapt, cluster, store, sweep
from cranium.config import Experiment
from cranium.store import Artefact

pytestmark = pytest.mark.ray


def test_tune_goes_the_way_of_the_plain_loop_also_after_a_kill(
    ray_cluster: cluster.Connection, tmp_path: Path
) -> None:
    home = searches.cohort(tmp_path)
    of = searches.folds(home)
    calm = [searches.work(tmp_path / "calm", home, init=init) for init in ("random", "cnn")]
    searches.played(calm, of)
    works = tuple(replace(one, folder=tmp_path / "adapt" / one.cell.name) for one in calm)
    with pytest.raises(searches.Killed):  # in the middle of the second trial of the first cell
        searches.played(works[:1], of, die_after=6)
    compute = {"tuned": {"num_workers": 2}}
    exp = Experiment.model_validate(
        {
            "name": "search",
            "ingest": {"cohorts": ["home"]},
            "adapt": {"tasks": [searches.TASK]},
            "sweep": {"init": ["random"], "compute": compute},
        }
    )
    grid = sweep.Grid(Artefact(tmp_path / "sweep" / "search-0"), works, {"lesion/subject/0": of}, ())
    told = []
    assert sweep.sweep(grid, exp, lambda done, total, text: told.append((done, total, text))) == {}
    assert (2, 2, "cells") in told and grid.artefact.done
    assert any(text == "trials" and total == 10 for _, total, text in told)
    for one, undisturbed in zip(works, calm, strict=True):
        assert searches.kept(one) == searches.kept(undisturbed)
        adapt.run_cell(undisturbed, of)
        kept = [store.read_manifest(cell.folder) for cell in (one, undisturbed)]
        assert kept[0] == kept[1] and kept[0]["search"]["trials"] == 5
        found = [pd.read_parquet(cell.folder / adapt.PREDICTIONS) for cell in (one, undisturbed)]
        pd.testing.assert_frame_equal(*found)
