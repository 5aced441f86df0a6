from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cranium import stream
from cranium.config import Stream
from cranium.store import Artefact
from shards import shard_set

pytestmark = pytest.mark.ray
SPEC = Stream(lanes=4, window_sessions=3)
BATCH = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> stream.Corpus:
    return stream.corpus([shard_set(tmp_path_factory.mktemp("store"))])


def take(corpus: stream.Corpus, start: int, stop: int, rank: int = 0, world: int = 1) -> list[stream.Batch]:
    order = stream.order(SPEC, BATCH, seed=3)
    return list(stream.batches(corpus, order, start=start, stop=stop, rank=rank, world=world))


def test_the_stream_is_what_the_plan_says(ray_cluster, corpus):
    """Two epochs and a bit: every row of an epoch at most once, with the pixels of its session and slice."""
    batches = take(corpus, 0, 65)  # 240 rows, 8 a step: 30 steps an epoch at most
    assert [b.step for b in batches] == list(range(65))
    for batch in batches:
        assert batch.stacks.shape == (BATCH, 3, 1, 28, 28) and batch.stacks.dtype == torch.uint8
        assert batch.rows.tolist() == list(range(BATCH))
        absent = batch.stacks[:, 0, 0, 0, 0] % 3 == 0
        assert torch.equal(batch.present[:, 1], ~absent)
        assert batch.present[:, [0, 2]].all()
    seen = [tuple(row[0, 0, 0, :2].tolist()) for b in batches[:30] for row in b.stacks]
    assert len(set(seen)) == len(seen) == 240


def test_two_workers_hold_the_batch_of_one(ray_cluster, corpus):
    whole = take(corpus, 0, 12)
    halves = [take(corpus, 0, 12, rank, 2) for rank in range(2)]
    for step, batch in enumerate(whole):
        rows = np.concatenate([half[step].rows for half in halves])
        assert rows.tolist() == batch.rows.tolist()
        assert torch.equal(torch.cat([half[step].stacks for half in halves]), batch.stacks)


@pytest.mark.parametrize("start", [1, 17, 44])
def test_a_position_is_found_again(ray_cluster, corpus, start):
    whole = take(corpus, 0, 50)[start:]
    resumed = take(corpus, start, 50)
    assert [b.step for b in resumed] == [b.step for b in whole]
    assert all(torch.equal(a.stacks, b.stacks) for a, b in zip(whole, resumed, strict=True))


def test_a_changed_pixel_stops_the_stream(ray_cluster, tmp_path: Path):
    damaged = shard_set(tmp_path, "damaged")
    path = damaged.path / "shards" / "1.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Exception, match="CRC") as caught:
        take(stream.corpus([damaged]), 0, 30)
    assert "row group" in str(caught.value) and "1.parquet" in str(caught.value)


def test_shard_sets_of_another_form_are_refused(tmp_path: Path):
    small, large = shard_set(tmp_path, "small"), shard_set(tmp_path, "large", size=42)
    with pytest.raises(stream.UserError, match="shape"):
        stream.corpus([small, large])


def test_rows_the_manifest_does_not_count_are_refused(tmp_path: Path):
    made = shard_set(tmp_path)
    text = (made.path / "manifest.json").read_text().replace('"stacks": 240', '"stacks": 241')
    (made.path / "manifest.json").write_text(text)
    with pytest.raises(stream.UserError, match="241"):
        stream.corpus([Artefact(made.path)])
