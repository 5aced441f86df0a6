"""The steps of a lane: which row groups are open, and which of their rows a batch takes. Pure NumPy, no pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cranium.volume.plan import Lane, Order, Session


@dataclass(frozen=True, slots=True)
class LaneStep:
    """What a lane does in one step. Row i of its part of the batch is row `rows[i]` of the row group of `visits[i]`."""

    opened: list[int]  # visits to read before this step
    visits: list[int]
    rows: list[int]
    closed: list[int]  # visits whose rows are spent after this step


def lane_steps(
    sessions: Sequence[Session], lane: Lane, order: Order, number: int, index: int
) -> Iterator[LaneStep]:
    """The steps of lane `index` of epoch `number`: what to open, which rows to take, what is spent.

    A row is drawn uniformly from the rows left in the window, so open visits drain evenly and are mixed to the end.
    A step takes at most `max_rows_per_session` rows of a session, `min_slice_gap` apart; only when no visit is left
    that could offer such a row (a corpus of few sessions, the tail of an epoch) is the rule relaxed. Visits are opened
    when a step needs them, and one a step until the window is full: so the first batch waits for few reads.
    """
    window = _Window(sessions, lane, order, np.random.default_rng([order.seed, number, 1, index]))
    for _ in range(lane.rows // order.rows_per_lane):
        yield window.step()


class _Window:
    """The open visits of a lane and the rows that are left in them."""

    def __init__(
        self, sessions: Sequence[Session], lane: Lane, order: Order, rng: np.random.Generator
    ) -> None:
        self.sessions, self.lane, self.order, self.rng = sessions, lane, order, rng
        self.upcoming = 0
        self.left: dict[int, list[int]] = {}  # visit -> its rows, in the order they will be drawn
        self.session: dict[int, int] = {}
        self.first: dict[int, int] = {}  # visit -> position of its row 0 in the session

    def step(self) -> LaneStep:
        done = LaneStep([], [], [], [])
        if len(self.left) < self.order.window and self.upcoming < len(self.lane.take):
            done.opened.append(self._open())
        near: dict[int, list[int]] = {}  # session -> positions taken in this step
        strict, candidates = True, list(self.left)
        while wanted := self.order.rows_per_lane - len(done.rows):
            if candidates:
                candidates = self._draw(candidates, wanted, near, strict, done)
            elif self.upcoming < len(self.lane.take):  # no open visit may give more
                done.opened.append(self._open())
                candidates = done.opened[-1:]
            else:
                strict, candidates = False, list(self.left)
        done.closed.extend(visit for visit, left in self.left.items() if not left)
        for visit in done.closed:
            del self.left[visit], self.session[visit], self.first[visit]
        return done

    def _open(self) -> int:
        visit, self.upcoming = self.upcoming, self.upcoming + 1
        owner, group = int(self.lane.session[visit]), int(self.lane.group[visit])
        groups = self.sessions[owner].row_groups
        self.left[visit] = self.rng.permutation(groups[group].rows)[: self.lane.take[visit]].tolist()
        self.session[visit] = owner
        self.first[visit] = sum(g.rows for g in groups[:group])
        return visit

    def _draw(
        self, candidates: list[int], wanted: int, near: dict[int, list[int]], strict: bool, done: LaneStep
    ) -> list[int]:
        """Draw up to `wanted` rows; returns the visits that may give more."""
        left = [len(self.left[visit]) for visit in candidates]
        counts = self.rng.multivariate_hypergeometric(left, min(wanted, sum(left)), method="marginals")
        going: list[int] = []
        for visit, count in zip(candidates, counts.tolist(), strict=True):
            if count:
                taken = self._take(visit, count, near, strict)
                done.rows.extend(taken)
                done.visits.extend([visit] * len(taken))
                if len(taken) < count or not self.left[visit]:
                    continue
            going.append(visit)
        return going

    def _take(self, visit: int, count: int, near: dict[int, list[int]], strict: bool) -> list[int]:
        """Up to `count` rows of a visit, in its order, skipping what the rules forbid."""
        taken: list[int] = []
        left, first = self.left[visit], self.first[visit]
        others = near.setdefault(self.session[visit], [])
        gap, most = self.order.min_slice_gap, self.order.max_rows_per_session
        while len(taken) < count and not (strict and len(others) >= most):
            place = 0 if left else -1
            if strict and others:
                apart = (i for i, row in enumerate(left) if all(abs(first + row - o) >= gap for o in others))
                place = next(apart, -1)
            if place < 0:
                break
            row = left.pop(place)
            others.append(first + row)
            taken.append(row)
        return taken
