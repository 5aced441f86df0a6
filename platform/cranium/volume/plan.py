"""The order rows are read in, computed from manifests alone: pure NumPy, no pixels, no Ray.

A *visit* is one reading of a session's rows; a session may be visited more than once in an epoch when its cohort is
weighted up. Visits are dealt to a fixed number of *lanes*. Every step takes the same number of rows from each lane,
drawn from a window of open visits. A rank executes whole lanes, so the global batch of a step is the same for any
number of workers that divides the lanes, and any position is found again by replaying indices, not pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class RowGroup:
    """A row group of a shard: a run of slices of one session."""

    file: str
    index: int
    rows: int


@dataclass(frozen=True)
class Session:
    cohort: str
    key: str  # unique over cohorts
    row_groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)


@dataclass(frozen=True)
class Order:
    """How rows are mixed. `rows_per_lane` rows of every lane make a step."""

    lanes: int
    rows_per_lane: int
    window: int = 8  # open visits in a lane
    max_rows_per_session: int = 2  # in one step, where the window allows
    min_slice_gap: int = 1  # between two rows of a session in one step
    weights: Mapping[str, float] = field(default_factory=dict)  # cohort -> share of an epoch's rows
    seed: int = 0


@dataclass(frozen=True)
class Visit:
    """Rows of one session, in the order they may be drawn: positions in the session's sorted slices."""

    session: int
    positions: np.ndarray  # int64 [n], a seeded permutation of (a part of) the session's rows


@dataclass(frozen=True)
class Epoch:
    lanes: tuple[tuple[Visit, ...], ...]
    steps: int


@dataclass(frozen=True)
class Draw:
    """One row of a step: which visit of the lane, and the position in its session."""

    visit: int
    position: int


@dataclass(frozen=True)
class LaneStep:
    opened: tuple[int, ...]  # visits to read before this step
    draws: tuple[Draw, ...]
    closed: tuple[int, ...]  # visits whose rows are spent after this step


def epoch(sessions: Sequence[Session], order: Order, number: int) -> Epoch:
    """Deal the visits of epoch `number` to lanes.

    Without weights every row is visited once. With weights, each cohort gets its share of as many rows as the corpus
    holds: small cohorts repeat, large ones are sampled, both to the row. The longest-waiting lane is filled first, and
    repeated visits of a session share a lane, so that a step never meets one session in two lanes.
    """
    if not sessions:
        raise ValueError("a plan needs at least one session")
    rng = np.random.default_rng([order.seed, number, 0])
    counts = _rows_per_session(sessions, order.weights, rng)
    visits: list[list[Visit]] = [[] for _ in range(order.lanes)]
    filled = np.zeros(order.lanes, np.int64)
    for index in rng.permutation(len(sessions)):
        if counts[index] == 0:
            continue
        lane = int(np.argmin(filled))
        filled[lane] += counts[index]
        rows = sessions[index].rows
        for start in range(0, int(counts[index]), rows):
            take = min(rows, int(counts[index]) - start)
            visits[lane].append(Visit(int(index), rng.permutation(rows)[:take]))
    shuffled = [[lane[i] for i in rng.permutation(len(lane))] for lane in visits]
    steps = int(filled.min()) // order.rows_per_lane
    if steps == 0:
        raise ValueError(
            f"{int(filled.sum())} rows in {len(sessions)} sessions do not fill one step of {order.lanes} lanes x "
            f"{order.rows_per_lane} rows; lower batch_size or stream.lanes"
        )
    return Epoch(tuple(tuple(lane) for lane in shuffled), steps)


def _rows_per_session(
    sessions: Sequence[Session], weights: Mapping[str, float], rng: np.random.Generator
) -> np.ndarray:
    rows = np.array([session.rows for session in sessions], np.int64)
    if not weights:
        return rows
    cohorts = np.array([session.cohort for session in sessions])
    if unknown := sorted(set(weights) - set(cohorts.tolist())):
        raise ValueError(f"stream.weights names {unknown}, which no shard set holds")
    counts = np.zeros_like(rows)
    share = sum(weights.values())
    for cohort, weight in weights.items():
        members = np.flatnonzero(cohorts == cohort)
        left = round(float(rows.sum()) * weight / share)
        whole, left = divmod(left, int(rows[members].sum()))
        counts[members] += whole * rows[members]
        for member in rng.permutation(members):
            take = min(left, int(rows[member]))
            counts[member] += take
            left -= take
    return counts


def lane_steps(
    visits: Sequence[Visit], steps: int, order: Order, number: int, lane: int
) -> Iterator[LaneStep]:
    """The steps of one lane of epoch `number`: what to open, which rows to take, what is spent.

    A row is drawn uniformly from the rows left in the window, so open visits drain evenly and are mixed to the end.
    A step takes at most `max_rows_per_session` rows of a session, `min_slice_gap` apart; only when the window cannot
    offer such a row (a corpus of few sessions, the tail of an epoch) is the rule relaxed.
    """
    rng = np.random.default_rng([order.seed, number, 1, lane])
    left: dict[int, list[int]] = {}
    upcoming = 0
    for _ in range(steps):
        opened: list[int] = []
        closed: list[int] = []
        draws: list[Draw] = []
        taken: dict[int, list[int]] = {}
        for _ in range(order.rows_per_lane):
            while upcoming < len(visits) and len(left) < order.window:
                left[upcoming] = visits[upcoming].positions.tolist()
                opened.append(upcoming)
                upcoming += 1
            visit = _pick(left, visits, taken, order, rng)
            position = _take(left[visit], taken.setdefault(visits[visit].session, []), order.min_slice_gap)
            draws.append(Draw(visit, position))
            if not left[visit]:
                del left[visit]
                closed.append(visit)
        yield LaneStep(tuple(opened), tuple(draws), tuple(closed))


def _pick(
    left: Mapping[int, list[int]],
    visits: Sequence[Visit],
    taken: Mapping[int, list[int]],
    order: Order,
    rng: np.random.Generator,
) -> int:
    def allowed(visit: int) -> bool:
        near = taken.get(visits[visit].session, [])
        return len(near) < order.max_rows_per_session and any(
            _apart(p, near, order.min_slice_gap) for p in left[visit]
        )

    candidates = [visit for visit in left if allowed(visit)] or list(left)
    weights = np.cumsum([len(left[visit]) for visit in candidates])
    return candidates[int(np.searchsorted(weights, rng.integers(weights[-1]), side="right"))]


def _take(positions: list[int], near: list[int], gap: int) -> int:
    index = next((i for i, p in enumerate(positions) if _apart(p, near, gap)), 0)
    position = positions.pop(index)
    near.append(position)
    return position


def _apart(position: int, near: Sequence[int], gap: int) -> bool:
    return all(abs(position - other) >= gap for other in near)


def locate(sessions: Sequence[Session], order: Order, step: int) -> tuple[int, int]:
    """The (epoch, step within it) of a global step. Epochs may differ in length, so their plans are walked."""
    number = 0
    while step >= (steps := epoch(sessions, order, number).steps):
        step -= steps
        number += 1
    return number, step
