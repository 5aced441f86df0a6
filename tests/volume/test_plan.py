from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cranium.volume import plan
from cranium.volume.plan import Order, RowGroup, Session


def corpus(sizes: dict[str, list[int]]) -> list[Session]:
    return [
        Session(cohort, f"{cohort}/{i}", (RowGroup(f"{cohort}.parquet", i, rows),))
        for cohort, counts in sizes.items()
        for i, rows in enumerate(counts)
    ]


def rows_of(sessions: list[Session], order: Order, number: int = 0) -> list[list[list[tuple[str, int]]]]:
    """[lane][step] -> (session key, position) of every row."""
    epoch = plan.epoch(sessions, order, number)
    return [
        [
            [(sessions[visits[d.visit].session].key, d.position) for d in step.draws]
            for step in plan.lane_steps(visits, epoch.steps, order, number, lane)
        ]
        for lane, visits in enumerate(epoch.lanes)
    ]


ORDER = Order(lanes=4, rows_per_lane=4, window=4, max_rows_per_session=2, min_slice_gap=3)


def test_every_row_at_most_once_and_few_left_over():
    sessions = corpus({"a": [30] * 40})
    drawn = Counter(row for lane in rows_of(sessions, ORDER) for step in lane for row in step)
    assert max(drawn.values()) == 1
    assert len(drawn) >= 1200 - ORDER.lanes * 30 - ORDER.lanes * ORDER.rows_per_lane


def test_a_step_keeps_rows_of_a_session_few_and_apart():
    sessions = corpus({"a": [30] * 60})
    lanes = rows_of(sessions, ORDER)
    steps = len(lanes[0])
    for step in range(steps - 8):  # the tail of an epoch may run out of sessions
        batch = [row for lane in lanes for row in lane[step]]
        for key, count in Counter(key for key, _ in batch).items():
            assert count <= ORDER.max_rows_per_session
            positions = sorted(p for k, p in batch if k == key)
            assert all(b - a >= ORDER.min_slice_gap for a, b in pairwise(positions))


def test_same_seed_same_order_and_other_epoch_another():
    sessions = corpus({"a": [20] * 20})
    assert rows_of(sessions, ORDER, 3) == rows_of(sessions, ORDER, 3)
    assert rows_of(sessions, ORDER, 3) != rows_of(sessions, ORDER, 4)
    assert rows_of(sessions, ORDER, 3) != rows_of(sessions, replace(ORDER, seed=1), 3)


def test_weights_hold_within_one_per_cent_and_small_cohorts_repeat():
    sessions = corpus({"large": [40] * 200, "small": [25] * 8})
    order = replace(ORDER, weights={"large": 0.5, "small": 0.5})
    drawn = [row for lane in rows_of(sessions, order) for step in lane for row in step]
    share = sum(key.startswith("small") for key, _ in drawn) / len(drawn)
    assert share == pytest.approx(0.5, abs=0.01)
    assert max(Counter(drawn).values()) > 1


def test_an_unknown_cohort_in_the_weights_is_named():
    with pytest.raises(ValueError, match="nobody"):
        plan.epoch(corpus({"a": [20] * 20}), replace(ORDER, weights={"nobody": 1.0}), 0)


def test_repeated_visits_of_a_session_share_a_lane():
    sessions = corpus({"large": [40] * 100, "small": [10] * 4})
    epoch = plan.epoch(sessions, replace(ORDER, weights={"large": 0.8, "small": 0.2}), 0)
    lanes_of: dict[int, set[int]] = {}
    for lane, visits in enumerate(epoch.lanes):
        for visit in visits:
            lanes_of.setdefault(visit.session, set()).add(lane)
    assert all(len(lanes) == 1 for lanes in lanes_of.values())


def test_rows_come_only_from_open_visits_and_the_window_is_bounded():
    sessions = corpus({"a": [20] * 30})
    epoch = plan.epoch(sessions, ORDER, 0)
    for lane, visits in enumerate(epoch.lanes):
        is_open: set[int] = set()
        for step in plan.lane_steps(visits, epoch.steps, ORDER, 0, lane):
            is_open |= set(step.opened)
            assert {draw.visit for draw in step.draws} <= is_open
            is_open -= set(step.closed)
            assert len(is_open) <= ORDER.window


def test_mixing_draws_every_open_row_alike():
    """Over many seeds the first row of a lane is uniform over the rows of the window, long and short visits alike."""
    sessions = corpus({"a": [10, 30]})
    order = Order(lanes=1, rows_per_lane=1, window=2)
    first = [rows_of(sessions, replace(order, seed=seed))[0][0][0][0] for seed in range(400)]
    assert np.mean([key == "a/1" for key in first]) == pytest.approx(0.75, abs=0.08)


def test_locate_walks_epochs_of_unequal_length():
    sessions = corpus({"a": list(range(5, 45))})
    lengths = [plan.epoch(sessions, ORDER, n).steps for n in range(3)]
    assert plan.locate(sessions, ORDER, 0) == (0, 0)
    assert plan.locate(sessions, ORDER, lengths[0]) == (1, 0)
    assert plan.locate(sessions, ORDER, lengths[0] + lengths[1] + 2) == (2, 2)


def test_too_few_rows_say_what_to_lower():
    with pytest.raises(ValueError, match="batch_size"):
        plan.epoch(corpus({"a": [3]}), ORDER, 0)
