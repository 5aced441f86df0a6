"""Volumes of a shard set's sessions: in the order asked, none where there is no brain to measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cranium import sessions, volumes
from cranium.config import UserError
from cranium.volume import tissue
from shards import shard_set


def test_every_session_is_measured_as_its_own_stacks_say(tmp_path: Path) -> None:
    made = shard_set(tmp_path, sessions=3)
    table = pd.read_parquet(made.path / "sessions.parquet", columns=["subject", "session"]).iloc[[2, 0]]
    found = volumes.measured(table, made.path, 0, (4.0, 2.0, 2.0))
    assert found["subject"].tolist() == ["002", "000"]
    for row, stacks in zip(
        found.itertuples(), sessions.read(made.path, [("002", ""), ("000", "")]), strict=True
    ):
        by_hand = tissue.volumes(stacks[:, 0, 0].numpy(), (4.0, 2.0, 2.0))
        assert by_hand is not None and row.brain == by_hand.brain and row.deep_csf == by_hand.deep_csf
    found.to_parquet(tmp_path / volumes.VOLUMES)
    asked = pd.DataFrame({"subject": ["000", "999"], "session": ["", ""]})
    values = volumes.read(tmp_path, asked)
    assert values[0].tolist() == found.iloc[1][list(volumes.MEASURES)].tolist() and np.isnan(values[1]).all()


def test_a_session_gives_as_many_stacks_as_asked_spread_from_end_to_end(tmp_path: Path) -> None:
    made = shard_set(tmp_path, sessions=3, slices=20)
    some, every = (next(sessions.read(made.path, [("001", "")], most=most)) for most in (4, None))
    assert some[:, 0, 0, 0, 1].tolist() == [0, 6, 13, 19] and len(every) == 20
    filled = next(sessions.read(made.path, [("000", "")], fill="replicate"))  # 000 has no T2w
    assert np.array_equal(filled[:, 1], filled[:, 0])
    with pytest.raises(UserError, match="999"):
        next(sessions.read(made.path, [("999", "")]))
