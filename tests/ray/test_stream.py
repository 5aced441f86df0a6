from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cranium import corpora, stream
from cranium.config import Stream, UserError
from cranium.store import Artefact
from cranium.volume import plan, shard
from shards import shard_set

pytestmark = pytest.mark.ray
SPEC = Stream(lanes=4, window=3)
BATCH = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> corpora.Corpus:
    return corpora.corpus([shard_set(tmp_path_factory.mktemp("store"))])


def take(corpus: corpora.Corpus, start: int, stop: int, rank: int = 0, world: int = 1) -> list[stream.Batch]:
    order = stream.order(SPEC, BATCH, seed=3)
    return list(stream.batches(corpus, order, start=start, stop=stop, rank=rank, world=world))


def test_the_stream_is_what_the_plan_says(ray_cluster, corpus):
    """Two epochs and a bit: every row of an epoch once, with the pixels of its session and slice."""
    batches = take(corpus, 0, 65)  # 240 rows, 8 a step: 30 steps an epoch
    assert [b.step for b in batches] == list(range(65))
    for batch in batches:
        assert batch.stacks.shape == (BATCH, 3, 1, 28, 28) and batch.stacks.dtype == torch.uint8
        assert batch.rows.tolist() == list(range(BATCH))
        number = batch.stacks[:, 0, 0, 0, 0]
        assert [corpus.sessions[i].subject for i in batch.sessions] == [f"{n:03d}" for n in number.tolist()]
        assert torch.equal(batch.present[:, 1], number % 3 != 0)
        assert batch.present[:, [0, 2]].all()
    for first in (0, 30):
        seen = {tuple(row[0, 0, 0, :2].tolist()) for b in batches[first : first + 30] for row in b.stacks}
        assert len(seen) == 240 == corpus.rows


@pytest.mark.parametrize("world", [2, 4])
def test_several_workers_hold_the_batch_of_one(ray_cluster, corpus, world):
    whole = take(corpus, 0, 12)
    parts = [take(corpus, 0, 12, rank, world) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert np.concatenate([part[step].rows for part in parts]).tolist() == batch.rows.tolist()
        assert np.concatenate([part[step].sessions for part in parts]).tolist() == batch.sessions.tolist()
        assert torch.equal(torch.cat([part[step].stacks for part in parts]), batch.stacks)


@pytest.mark.parametrize("start", [1, 17, 44])
def test_a_position_is_found_again(ray_cluster, corpus, start):
    whole = take(corpus, 0, 50)[start:]
    resumed = take(corpus, start, 50)
    assert [b.step for b in resumed] == [b.step for b in whole]
    assert all(torch.equal(a.stacks, b.stacks) for a, b in zip(whole, resumed, strict=True))


def test_the_order_survives_small_segments(ray_cluster, corpus, monkeypatch):
    """Many executions of Ray Data, one after the other, give what a single one gives."""
    whole = take(corpus, 0, 40)
    monkeypatch.setattr(stream, "SEGMENT", 5)
    assert all(torch.equal(a.stacks, b.stacks) for a, b in zip(whole, take(corpus, 0, 40), strict=True))


def test_an_absent_contrast_is_filled_where_that_is_declared(ray_cluster, corpus):
    order = stream.order(SPEC, BATCH, seed=3)
    plain = list(stream.batches(corpus, order, start=0, stop=12))
    filled = list(stream.batches(corpus, order, start=0, stop=12, fill="replicate"))
    absent = 0
    for before, after in zip(plain, filled, strict=True):
        assert after.present.all()
        for row, present in enumerate(before.present[:, 1].tolist()):
            absent += not present
            wanted = before.stacks[row].clone()
            if not present:
                wanted[1] = wanted[0]
            assert torch.equal(after.stacks[row], wanted)
    assert absent


# ---- shards that can't be trusted -----------------------------------------------------------------------------------


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("world", [1, 2])
def test_a_shard_that_changes_during_the_run_stops_every_worker_that_reads_it(
    ray_cluster, tmp_path: Path, monkeypatch, world
):
    made = shard_set(tmp_path, "damaged")
    found = corpora.corpus([made])
    monkeypatch.setattr(stream, "SEGMENT", 8)  # else all of this small set is read before the first batch
    order = stream.order(SPEC, BATCH, seed=3)
    running = [stream.batches(found, order, start=0, stop=200, rank=r, world=world) for r in range(world)]
    assert [next(batches).step for batches in running] == [0] * world
    flip(made.path / "shards" / "1.parquet")
    for batches in running:
        with pytest.raises(UserError, match=r"1\.parquet, row group \d.* CRC") as caught:
            list(batches)
        assert caught.value.code == "SHARD_CORRUPT"
        assert "ray::" not in str(caught.value)


def test_a_missing_shard_is_named_and_a_stray_one_is_not_read(ray_cluster, tmp_path: Path):
    made = shard_set(tmp_path)
    found, shards = corpora.corpus([made]), made.path / "shards"
    (shards / "9.parquet").write_bytes((shards / "0.parquet").read_bytes())
    assert corpora.corpus([made]).sessions == found.sessions
    (shards / "1.parquet").unlink()
    with pytest.raises(UserError, match=r"1\.parquet is missing") as caught:
        take(found, 0, 30)
    assert caught.value.code == "SHARD_MISSING"


def test_a_row_group_of_another_length_is_refused(ray_cluster, tmp_path: Path):
    made = shard_set(tmp_path)
    path = made.path / "shards" / "1.parquet"
    groups = [shard.read_row_group(path, index) for index in range(4)]
    shard.write(path, [groups[0].slice(0, 19), *groups[1:]])  # every row and CRC is right
    with pytest.raises(
        UserError, match=r"1\.parquet, row group 0: 19 rows read, the manifest says 20"
    ) as caught:
        take(corpora.corpus([made]), 0, 30)
    assert caught.value.code == "SHARD_ROWS"


# ---- the corpus -----------------------------------------------------------------------------------------------------


def test_shard_sets_of_another_form_are_refused(tmp_path: Path):
    small, large = shard_set(tmp_path, "small"), shard_set(tmp_path, "large", size=42)
    with pytest.raises(UserError, match="shape"):
        corpora.corpus([small, large])


def test_rows_the_manifest_does_not_count_are_refused(tmp_path: Path):
    made = shard_set(tmp_path)
    text = (made.path / "manifest.json").read_text().replace('"stacks": 240', '"stacks": 241')
    (made.path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="241"):
        corpora.corpus([Artefact(made.path)])


def test_filters_are_config_keys(tmp_path: Path):
    sets = [shard_set(tmp_path, "a"), shard_set(tmp_path, "b")]
    every = corpora.corpus(sets)
    assert len(every.sessions) == 24
    with_t2 = corpora.corpus(sets, Stream(contrasts=("T2w",)))
    assert [s.subject for s in with_t2.sessions if s.cohort == "a"] == [
        f"{n:03d}" for n in range(12) if n % 3
    ]
    split = corpora.corpus(sets, Stream(cohorts=("b",), subjects={"b": ("001", "002")}))
    assert [s.key for s in split.sessions] == ["b/001/", "b/002/"]
    for wrong in (Stream(cohorts=("c",)), Stream(contrasts=("PDw",)), Stream(subjects={"a": ("x",)})):
        with pytest.raises(UserError) as caught:
            corpora.corpus(sets, wrong)
        assert caught.value.code == "FILTER"
    with pytest.raises(ValueError, match="not both"):
        Stream(weights={"a": 1.0}, temperature=2.0)


def test_labels_are_joined_by_session(tmp_path: Path):
    sets = [shard_set(tmp_path, "a"), shard_set(tmp_path, "b")]
    path = sets[0].path / "sessions.parquet"
    table = pd.read_parquet(path)
    table["diagnosis"] = [f"d{subject}" for subject in table["subject"]]
    table.sample(frac=1, random_state=0).to_parquet(path)
    corpus = corpora.corpus(sets)
    found = corpora.labels(corpus, "diagnosis")
    assert found.tolist() == [f"d{s.subject}" if s.cohort == "a" else None for s in corpus.sessions]
    with pytest.raises(UserError, match="nothing"):
        corpora.labels(corpus, "nothing")


def test_the_order_of_a_config_is_the_order_of_the_plan():
    spec = Stream(lanes=2, window=5, max_rows_per_session=3, min_slice_gap=4, temperature=2.0)
    assert stream.order(spec, 12, 7) == plan.Order(2, 6, 5, 3, 4, {}, 2.0, 7)
