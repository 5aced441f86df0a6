from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cranium.volume import plan, window
from cranium.volume.plan import Order, RowGroup, Session


def corpus(sizes: dict[str, list[int]], group: int = 64) -> list[Session]:
    """Sessions of these many rows, cut into row groups of at most `group`."""
    return [
        Session(
            cohort,
            str(i),
            "",
            tuple(
                RowGroup(f"{cohort}-{i}.parquet", n, min(group, rows - start))
                for n, start in enumerate(range(0, rows, group))
            ),
        )
        for cohort, counts in sizes.items()
        for i, rows in enumerate(counts)
    ]


def rows_of(sessions: list[Session], order: Order, number: int = 0) -> list[list[list[tuple[str, int]]]]:
    """[lane][step] -> (session key, position) of every row."""
    epoch = plan.epoch(sessions, order, number)
    lanes = []
    for index, lane in enumerate(epoch.lanes):
        steps = []
        for step in window.lane_steps(sessions, lane, order, number, index):
            found = []
            for visit, row in zip(step.visits, step.rows, strict=True):
                session = sessions[lane.session[visit]]
                before = sum(g.rows for g in session.row_groups[: lane.group[visit]])
                found.append((session.key, before + row))
            steps.append(found)
        lanes.append(steps)
    return lanes


def flat(sessions: list[Session], order: Order, number: int = 0) -> list[tuple[str, int]]:
    return [row for lane in rows_of(sessions, order, number) for step in lane for row in step]


ORDER = Order(lanes=4, rows_per_lane=4, window=4, max_rows_per_session=2, min_slice_gap=3)


def test_every_row_at_most_once_and_few_left_over():
    sessions = corpus({"a": [30] * 41}, group=16)
    drawn = Counter(flat(sessions, ORDER))
    assert max(drawn.values()) == 1
    assert len(drawn) == plan.steps(sessions, ORDER, 0) * ORDER.batch >= 41 * 30 - ORDER.lanes * (30 + 4)


def test_all_rows_where_lanes_are_even():
    sessions = corpus({"a": [32] * 40}, group=16)
    assert set(flat(sessions, ORDER)) == {(s.key, row) for s in sessions for row in range(32)}


@pytest.mark.parametrize("window", [4, 1])
def test_a_step_keeps_rows_of_a_session_few_and_apart(window):
    """Also where the window alone is too small: then more visits are opened."""
    sessions = corpus({"a": [30] * 60}, group=16)
    lanes = rows_of(sessions, replace(ORDER, window=window))
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


# ---- shares ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sessions_of=st.lists(st.integers(10, 120), min_size=2, max_size=4),
    raw=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    seed=st.integers(0, 999),
)
def test_weights_hold_within_one_per_cent(sessions_of, raw, seed):
    """Of any epoch whose lanes hold 20 sessions and more; what levels the lanes is taken from cohorts in proportion."""
    sizes = np.random.default_rng(seed)
    cohorts = {f"c{i}": sizes.integers(5, 40, max(n, 40)).tolist() for i, n in enumerate(sessions_of)}
    sessions = corpus(cohorts, group=16)
    weights = {cohort: float(raw[i]) for i, cohort in enumerate(cohorts)}
    order = replace(ORDER, weights=weights, seed=seed)
    epoch = plan.epoch(sessions, order, 1)
    rows = Counter()
    for lane in epoch.lanes:
        assert lane.rows == epoch.steps * order.rows_per_lane
        for owner, take in zip(lane.session.tolist(), lane.take.tolist(), strict=True):
            rows[sessions[owner].cohort] += take
    for cohort, weight in weights.items():
        wanted = weight / sum(weights.values())
        assert rows[cohort] / sum(rows.values()) == pytest.approx(wanted, abs=0.01)


def test_small_cohorts_repeat_and_large_ones_are_sampled():
    sessions = corpus({"large": [40] * 200, "small": [25] * 8})
    drawn = flat(sessions, replace(ORDER, weights={"large": 0.5, "small": 0.5}))
    times = Counter(drawn)
    assert {n for (key, _), n in times.items() if key.startswith("large")} == {1}
    assert (
        min(n for (key, _), n in times.items() if key.startswith("small")) >= 17
    )  # 4,100 rows of 200: 20.5 times
    assert len({key for key, _ in drawn if key.startswith("small")}) == 8


def test_a_temperature_is_a_power_of_the_sizes():
    sessions = corpus({"large": [40] * 160, "small": [25] * 4})  # 6,400 and 100 rows
    assert plan.shares(sessions, replace(ORDER, temperature=1.0))["small"] == pytest.approx(100 / 6500)
    assert plan.shares(sessions, replace(ORDER, temperature=2.0))["small"] == pytest.approx(10 / 90)
    assert plan.shares(sessions, replace(ORDER, temperature=1e9))["small"] == pytest.approx(0.5)
    drawn = flat(sessions, replace(ORDER, temperature=2.0))
    assert np.mean([key.startswith("small") for key, _ in drawn]) == pytest.approx(1 / 9, abs=0.01)


def test_an_unknown_cohort_in_the_weights_is_named():
    with pytest.raises(ValueError, match="nobody"):
        plan.epoch(corpus({"a": [20] * 20}), replace(ORDER, weights={"nobody": 1.0}), 0)


# ---- filters --------------------------------------------------------------------------------------------------------


def test_filters_admit_by_cohort_contrast_and_subject():
    sessions = [
        Session(cohort, subject, "", (RowGroup("f", 0, 5),), present)
        for cohort, subject, present in [("a", "1", 7), ("a", "2", 5), ("b", "1", 3), ("b", "2", 7)]
    ]

    def kept(**filters):
        return [f"{s.cohort}{s.subject}" for s in plan.select(sessions, **filters)]

    assert kept() == ["a1", "a2", "b1", "b2"]
    assert kept(cohorts=["b"]) == ["b1", "b2"]
    assert kept(present=0b110) == ["a1", "b2"]
    assert kept(subjects={"a": ["2"]}) == ["a2", "b1", "b2"]
    with pytest.raises(ValueError, match="nobody"):
        kept(subjects={"a": ["nobody"]})
    with pytest.raises(ValueError, match="nowhere"):
        kept(cohorts=["nowhere"])


# ---- lanes and windows ----------------------------------------------------------------------------------------------


def test_all_visits_of_a_session_share_a_lane():
    sessions = corpus({"large": [100] * 100, "small": [10] * 4})
    epoch = plan.epoch(sessions, replace(ORDER, weights={"large": 0.8, "small": 0.2}), 0)
    lanes_of: dict[int, set[int]] = {}
    for number, lane in enumerate(epoch.lanes):
        for owner in lane.session.tolist():
            lanes_of.setdefault(owner, set()).add(number)
    assert len(lanes_of) > 70 and all(len(lanes) == 1 for lanes in lanes_of.values())


def test_rows_come_only_from_open_visits_and_the_window_is_bounded():
    sessions = corpus({"a": [20] * 60}, group=10)
    epoch = plan.epoch(sessions, ORDER, 0)
    for number, lane in enumerate(epoch.lanes):
        is_open: set[int] = set()
        for step in window.lane_steps(sessions, lane, ORDER, 0, number):
            is_open |= set(step.opened)
            assert set(step.visits) <= is_open
            assert len(is_open) <= ORDER.window + 2  # two more where sessions are nearly spent
            is_open -= set(step.closed)
        assert not is_open


def test_the_first_step_waits_for_few_reads():
    sessions = corpus({"a": [64] * 100})
    order = Order(lanes=1, rows_per_lane=8, window=32)
    opened = [
        len(s.opened)
        for s in window.lane_steps(sessions, plan.epoch(sessions, order, 0).lanes[0], order, 0, 0)
    ]
    assert opened[0] == 4 and max(opened[1:40]) == 1 and sum(opened[:29]) == 32


def test_mixing_draws_every_open_row_alike():
    """Over many seeds the first row of a lane is uniform over the rows of the window, long and short visits alike."""
    sessions = corpus({"a": [10, 30]})
    order = Order(lanes=1, rows_per_lane=4, window=2, max_rows_per_session=4)
    second = [
        rows_of(sessions, replace(order, seed=seed))[0][1] for seed in range(300)
    ]  # both are open by then
    share = np.mean([key == "a/1/" for step in second for key, _ in step])
    assert share == pytest.approx(0.75, abs=0.08)


# ---- positions ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(5, 60), min_size=12, max_size=60), seed=st.integers(0, 99))
def test_epochs_without_weights_are_of_one_length(sizes, seed):
    """So a position is found without walking epochs: the closed form is what walking gives."""
    sessions, order = corpus({"a": sizes}, group=24), replace(ORDER, rows_per_lane=2, seed=seed)
    lengths = [plan.epoch(sessions, order, n).steps for n in range(4)]
    assert len(set(lengths)) == 1
    assert plan.locate(sessions, order, 3 * lengths[0] + 1) == (3, 1)


def test_locate_sums_epochs_of_unequal_length():
    sessions = corpus({"a": list(range(5, 45)), "b": [30] * 10})
    order = replace(ORDER, weights={"a": 0.3, "b": 0.7})
    lengths = [plan.epoch(sessions, order, n).steps for n in range(3)]
    assert lengths == [plan.steps(sessions, order, n) for n in range(3)]
    assert plan.locate(sessions, order, 0) == (0, 0)
    assert plan.locate(sessions, order, lengths[0]) == (1, 0)
    assert plan.locate(sessions, order, lengths[0] + lengths[1] + 2) == (2, 2)


def test_too_few_rows_say_what_to_lower():
    with pytest.raises(ValueError, match="batch_size"):
        plan.epoch(corpus({"a": [3]}), ORDER, 0)


def test_the_plan_of_a_corpus_ten_times_larger_stays_small():
    """A visit costs three integers, and rows are drawn from the window alone."""

    def size(sessions: int) -> tuple[int, int]:
        made = corpus({"a": [140] * sessions})
        epoch = plan.epoch(made, ORDER, 0)
        opened = window._Window(made, epoch.lanes[0], ORDER, np.random.default_rng(0))
        for _ in range(20):
            opened.step()
        held = sum(len(left) for left in opened.left.values())
        return sum(c.nbytes for lane in epoch.lanes for c in (lane.session, lane.group, lane.take)), held

    (small, held), (large, held_of_large) = size(400), size(4000)
    assert large == pytest.approx(10 * small, rel=0.01) and large <= 4000 * 3 * 24
    assert max(held, held_of_large) <= ORDER.window * 64
