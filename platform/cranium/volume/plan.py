"""The order rows are read in, computed from manifests alone: pure NumPy, no pixels, no Ray.

A *visit* is one reading of a row group; it may be visited more than once in an epoch when its cohort is weighted up.
Sessions are dealt to a fixed number of *lanes*, so that a session is in one lane only. Every step takes the same number
of rows from each lane, drawn from a window of open visits (`window.py`). A rank executes whole lanes, so the global
batch of a step is the same for any number of workers that divides the lanes, and any position is found again by
replaying indices, not pixels.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a shard: a run of slices of one session."""

    file: str
    index: int
    rows: int


@dataclass(frozen=True, slots=True)
class Session:
    cohort: str
    subject: str
    session: str
    row_groups: tuple[RowGroup, ...]
    present: int = 0  # bit i: channel i holds an image

    @property
    def key(self) -> str:
        return f"{self.cohort}/{self.subject}/{self.session}"

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)


@dataclass(frozen=True)
class Order:
    """How rows are mixed. `rows_per_lane` rows of every lane make a step.

    Without `weights` and `temperature` every row is met once an epoch. `weights` are cohorts' shares of an epoch's
    rows; with `temperature` T a cohort of n rows has a share proportional to n^(1/T): 1 is by size, large is even
    (Conneau & Lample 2019, arXiv 1901.07291, with alpha = 1/T; Arivazhagan et al. 2019, arXiv 1907.05019).
    """

    lanes: int
    rows_per_lane: int
    window: int = 8  # open visits in a lane; more where a step needs more sessions
    max_rows_per_session: int = 2  # in one step
    min_slice_gap: int = 1  # between two rows of a session in one step
    weights: Mapping[str, float] = field(default_factory=dict)
    temperature: float | None = None
    seed: int = 0

    @property
    def batch(self) -> int:
        return self.lanes * self.rows_per_lane


@dataclass(frozen=True)
class Lane:
    """Visits in the order they open, as columns [n]: session, row group in the session, rows to draw from it."""

    session: Ints
    group: Ints
    take: Ints

    @property
    def rows(self) -> int:
        return int(self.take.sum())


@dataclass(frozen=True)
class Epoch:
    """Every lane holds exactly `steps` x `rows_per_lane` rows."""

    lanes: tuple[Lane, ...]
    steps: int


# ---- what is admitted -----------------------------------------------------------------------------------------------


def select(
    sessions: Sequence[Session],
    *,
    cohorts: Collection[str] = (),
    present: int = 0,
    subjects: Mapping[str, Collection[str]] | None = None,
) -> tuple[Session, ...]:
    """The sessions of these cohorts (none named: all) whose `present` has all these bits, and of cohorts named in
    `subjects` only those subjects. Raises ValueError for a cohort or subject that no session has.
    """
    chosen = {cohort: set(names) for cohort, names in (subjects or {}).items()}
    known = {session.cohort for session in sessions}
    if unknown := sorted((set(cohorts) | set(chosen)) - known):
        raise ValueError(f"cohorts {unknown} are in no shard set; there are {sorted(known)}")
    for cohort, names in chosen.items():
        if absent := sorted(names - {s.subject for s in sessions if s.cohort == cohort}):
            raise ValueError(f"subjects {absent[:5]} are not in the shard set of {cohort}")
    return tuple(
        session
        for session in sessions
        if (not cohorts or session.cohort in cohorts)
        and session.present & present == present
        and (session.cohort not in chosen or session.subject in chosen[session.cohort])
    )


def shares(sessions: Sequence[Session], order: Order) -> dict[str, float]:
    """Each cohort's share of an epoch's rows; they sum to 1."""
    rows: dict[str, int] = {}
    for session in sessions:
        rows[session.cohort] = rows.get(session.cohort, 0) + session.rows
    if unknown := sorted(set(order.weights) - set(rows)):
        raise ValueError(f"stream.weights names {unknown}, which no shard set holds")
    if order.weights:
        raw = {cohort: float(order.weights.get(cohort, 0.0)) for cohort in rows}
    else:
        raw = {cohort: count ** (1 / (order.temperature or 1.0)) for cohort, count in rows.items()}
    return {cohort: value / sum(raw.values()) for cohort, value in raw.items()}


# ---- an epoch -------------------------------------------------------------------------------------------------------


def epoch(sessions: Sequence[Session], order: Order, number: int) -> Epoch:
    """Deal the visits of epoch `number` to lanes.

    Each cohort gets its share of as many rows as the corpus holds: small cohorts repeat, large ones are sampled, both
    to the row. All visits of a session share a lane, so that a step never meets one session in two lanes. Lanes are
    levelled by leaving out a few rows, other ones in every epoch and from cohorts in proportion.
    """
    if not sessions:
        raise ValueError("a plan needs at least one session")
    rng = np.random.default_rng([order.seed, number, 0])
    counts = _rows_per_session(sessions, order, rng)
    lane_of, filled = _deal(counts, order.lanes, rng)
    steps = _steps(filled, order)
    session, group, take = _visits(sessions, counts, rng)
    shuffled = rng.permutation(len(session))
    lanes = [shuffled[lane_of[session[shuffled]] == lane] for lane in range(order.lanes)]
    _level(lanes, take, session, sessions, shares(sessions, order), steps * order.rows_per_lane)
    kept = [visits[take[visits] > 0] for visits in lanes]
    return Epoch(tuple(Lane(session[v], group[v], take[v]) for v in kept), steps)


def _rows_per_session(sessions: Sequence[Session], order: Order, rng: np.random.Generator) -> Ints:
    """How many rows each session gives: all of them, or its cohort's share dealt to sessions in a random order."""
    rows = np.array([session.rows for session in sessions], np.int64)
    if not order.weights and order.temperature is None:
        return rows
    cohorts = np.array([session.cohort for session in sessions])
    counts = np.zeros_like(rows)
    for cohort, share in shares(sessions, order).items():
        members = rng.permutation(np.flatnonzero(cohorts == cohort))
        whole, left = divmod(round(float(rows.sum()) * share), int(rows[members].sum()))
        before = np.cumsum(rows[members]) - rows[members]
        counts[members] = whole * rows[members] + np.clip(left - before, 0, rows[members])
    return counts


def _deal(counts: Ints, lanes: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """The lane of each session, and the rows of each lane: the largest first, each to the emptiest lane.

    The rows of the lanes depend on the counts only, not on their order: equal sessions are dealt alike.
    """
    lane_of = np.zeros(len(counts), np.int64)
    heap = [(0, lane) for lane in range(lanes)]
    mixed = rng.permutation(len(counts))
    for index in mixed[np.argsort(-counts[mixed], kind="stable")].tolist():
        filled, lane = heap[0]
        lane_of[index] = lane
        heapq.heapreplace(heap, (filled + int(counts[index]), lane))
    rows = np.zeros(lanes, np.int64)
    for filled, lane in heap:
        rows[lane] = filled
    return lane_of, rows


def _visits(sessions: Sequence[Session], counts: Ints, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """Columns session, row group, rows to take: each row group as often as its session is whole, and then a part."""
    sizes = np.array([len(session.row_groups) for session in sessions], np.int64)
    owner = np.repeat(np.arange(len(sessions)), sizes)
    group = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = np.array([g.rows for session in sessions for g in session.row_groups], np.int64)
    total = np.bincount(owner, rows, len(sessions)).astype(np.int64)
    whole, part = np.divmod(counts, total)
    repeated = np.repeat(np.arange(len(owner)), whole[owner])
    extra: list[tuple[int, int, int]] = []
    for index in np.flatnonzero(part).tolist():
        left = int(part[index])
        for number in rng.permutation(sizes[index]).tolist():
            if taken := min(left, sessions[index].row_groups[number].rows):
                extra.append((index, number, taken))
                left -= taken
    more = np.array(extra, np.int64).reshape(-1, 3)
    return (
        np.concatenate([owner[repeated], more[:, 0]]),
        np.concatenate([group[repeated], more[:, 1]]),
        np.concatenate([rows[repeated], more[:, 2]]),
    )


def _level(
    lanes: Sequence[Ints],
    take: Ints,
    session: Ints,
    sessions: Sequence[Session],
    share: Mapping[str, float],
    rows: int,
) -> None:
    """Lower `take` in place until every lane holds `rows`, taking from the cohort that is furthest over its share."""
    names = list(share)
    numbers = {name: number for number, name in enumerate(names)}
    cohort = np.array([numbers[s.cohort] for s in sessions])[session]
    over = np.bincount(cohort, take, len(names)) - np.array([share[n] for n in names]) * rows * len(lanes)
    for visits in lanes:
        excess = int(take[visits].sum()) - rows
        last = {number: visits[cohort[visits] == number].tolist() for number in range(len(names))}
        while excess:
            number = max((n for n in last if last[n]), key=lambda n: over[n])
            visit = last[number][-1]
            taken = min(excess, int(take[visit]))
            take[visit] -= taken
            over[number] -= taken
            excess -= taken
            if not take[visit]:
                last[number].pop()


# ---- positions ------------------------------------------------------------------------------------------------------


def steps(sessions: Sequence[Session], order: Order, number: int) -> int:
    """How many steps epoch `number` has, without planning it."""
    rng = np.random.default_rng([order.seed, number, 0])
    return _steps(_deal(_rows_per_session(sessions, order, rng), order.lanes, rng)[1], order)


def _steps(rows_of_lanes: Ints, order: Order) -> int:
    count = int(rows_of_lanes.min()) // order.rows_per_lane
    if count == 0:
        raise ValueError(
            f"{int(rows_of_lanes.sum())} rows do not fill one step of {order.lanes} lanes x {order.rows_per_lane} rows "
            "by whole sessions; lower batch_size or stream.lanes"
        )
    return count


def locate(sessions: Sequence[Session], order: Order, step: int) -> tuple[int, int]:
    """The (epoch, step within it) of a global step.

    Without weights all epochs are of one length, because how far lanes are filled depends on the sizes of sessions
    alone. With them the lengths differ a little with what is sampled, and are summed up.
    """
    if not order.weights and order.temperature is None:
        return divmod(step, steps(sessions, order, 0))
    number = 0
    while step >= (length := steps(sessions, order, number)):
        step -= length
        number += 1
    return number, step
