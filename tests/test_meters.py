"""Numbers for Prometheus, with a stand-in for Ray's exporter: what is told, when, and that nothing is without Ray."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ray
from cranium import meters, stream

LABELS = {"experiment": "e", "run": "r", "rank": "0"}
Told = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What reaches Ray's meters, whose labels are checked as Ray does."""
    found: Told = []

    def meter(name: str, text: str, *more: Any) -> Any:
        labels = more[-1]

        class Exported:
            def record(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(labels), name
                found.append((name, value, tags))

            set = inc = observe = record

        return Exported()

    monkeypatch.setattr(meters, "_made", {})
    monkeypatch.setattr(meters, "_held", {})
    monkeypatch.setattr(meters, "_holder", threading.Thread())  # in no test but one
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", meter)
    return found


def sums(told: Told, name: str) -> float:
    return sum(value for known, value, _ in told if known == name)


def test_names_follow_prometheus() -> None:
    for name, meter in meters.METERS.items():
        assert re.fullmatch(r"cranium_[a-z_]+", name)
        assert name.endswith("_total") == (meter.kind == "counter"), name
        assert meter.kind != "histogram" or name.endswith("_seconds")
        assert len(meter.labels) <= 4


def test_without_ray_nothing_is_told_or_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(meters, "_made", {})
    meters.put("cranium_pretrain_step_seconds", 1.0, LABELS)
    assert meters._made == {}


def test_a_loop_tells_all_steps_and_seconds_once(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    loop = meters.Loop(LABELS, {}, done=100, planned=150, stacks=8, attempts=2)
    for done in range(101, 151):
        now += 0.3
        loop.step(done, 0.3, {"step": 0.2 * (done - 100), "data_wait": 0.1 * (done - 100)})
    assert sum(name == "cranium_pretrain_step_seconds" for name, *_ in told) == 50
    assert sums(told, "cranium_pretrain_stacks") == 50 * 8
    assert sums(told, "cranium_pretrain_loop_seconds") == pytest.approx(15.0)
    assert [value for name, value, _ in told if name == "cranium_pretrain_steps_done"][-1] == 150
    assert ("cranium_pretrain_attempts", 2, {"experiment": "e", "run": "r"}) in told
    # a step in between tells its own time and no more
    assert sum(name == "cranium_pretrain_stacks" for name, *_ in told) < 12


def test_only_the_first_worker_tells_of_the_run(told: Told) -> None:
    loop = meters.Loop({**LABELS, "rank": "1"}, {}, done=0, planned=2, stacks=8, attempts=1)
    loop.step(1, 0.1, {"step": 0.1})
    assert {name for name, *_ in told} == {
        "cranium_pretrain_step_seconds",
        "cranium_pretrain_stacks",
        "cranium_pretrain_loop_seconds",
    }


def test_an_entry_of_the_journal_becomes_gauges(told: Told) -> None:
    loop = meters.Loop(LABELS, {"train/target_entropy": 4.0}, done=0, planned=2, stacks=8, attempts=1)
    told.clear()
    loop.entry({"train/loss": 9.0, "train/koleo": -1.0, "train/target_entropy": 3.0, "sys/other": 1.0})
    run = {"experiment": "e", "run": "r"}
    assert told == [
        ("cranium_pretrain_loss", 9.0, {**run, "term": "total"}),
        ("cranium_pretrain_loss", -1.0, {**run, "term": "koleo"}),
        ("cranium_pretrain_target_entropy_ratio", 0.75, run),
    ]


def test_a_stage_is_at_work_until_it_ends(told: Told) -> None:
    def work() -> None:
        with meters.running("pretrain", "e", "r"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert [value for _, value, _ in told] == [1.0, 0.0]


def test_a_gauge_is_set_again_until_ray_ends(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "EVERY", 0.02)
    monkeypatch.setattr(meters, "_holder", None)
    meters.put("cranium_pretrain_effective_rank", 7.0, {"experiment": "e", "run": "r"})
    meters.put("cranium_pretrain_stacks_total", 8, LABELS)
    time.sleep(0.3)
    assert told.count(("cranium_pretrain_effective_rank", 7.0, {"experiment": "e", "run": "r"})) > 3
    assert sums(told, "cranium_pretrain_stacks") == 8
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    time.sleep(0.1)
    assert meters._held == {}


def test_a_worker_that_waits_for_a_batch_is_counted(told: Told) -> None:
    asked = threading.Event()

    def batches() -> Iterator[stream.Batch]:
        for step in range(3):
            asked.wait(10)
            stacks = torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8)
            yield stream.Batch(step, stacks, torch.ones(2, 3).bool(), np.arange(2), np.arange(2))

    threading.Timer(0.2, asked.set).start()  # long after the first is asked for
    for _ in stream._prefetched(batches(), 4, LABELS):
        time.sleep(0.3)  # long enough for the others
    assert sums(told, "cranium_stream_late_batches") == 1
    assert sums(told, "cranium_stream_batches") == 3
    assert sums(told, "cranium_stream_pixels_bytes") == 3 * 2 * 3 * 4 * 4
    assert 0.1 < sums(told, "cranium_stream_busy_seconds") < 0.5
