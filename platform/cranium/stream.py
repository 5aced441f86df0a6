"""Executes a plan: shards -> batches of slice stacks for one worker, at a position that can be found again.

In: finished shard sets and an `Order`. Out: `Batch` after `Batch`, uint8, the same for every run and any number of
workers. Ray Data reads the row groups in the plan's order on the worker's own node; the consumer draws rows from them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from cranium.config import Stream, UserError
from cranium.store import Artefact
from cranium.volume import plan, shard

SEGMENT_VISITS = (
    4096  # visits given to one Ray Data execution: its start costs 0.3 s, its plan a little memory
)
READ_CPUS = 0.5  # a read is mostly memory traffic; two fit beside one core of training


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step.

    stacks: uint8 [B, C, S, H, W]; present: bool [B, C]; rows: int64 [B], each row's place in the global batch, which
    seeds every random draw made for it.
    """

    step: int
    stacks: torch.Tensor
    present: torch.Tensor
    rows: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """What a plan is made from: the sessions of some shard sets, and the form of their stacks."""

    sessions: tuple[plan.Session, ...]
    shape: tuple[int, int, int, int]
    channels: tuple[str, ...]

    @property
    def rows(self) -> int:
        return sum(session.rows for session in self.sessions)


def corpus(shard_sets: Sequence[Artefact]) -> Corpus:
    """The sessions of finished shard sets. Refuses sets of different channels, shapes or preprocessing."""
    manifests = [artefact.manifest() for artefact in shard_sets]
    for key in ("channels", "shape", "preprocessing_hash"):
        values = {str(m[key]): m["cohort"] for m in manifests}
        if len(values) > 1:
            raise UserError(
                "SHARDS_DIFFER", f"cohorts {sorted(values.values())} differ in {key}; ingest them alike"
            )
    sessions: list[plan.Session] = []
    for artefact, manifest in zip(shard_sets, manifests, strict=True):
        groups: dict[str, list[plan.RowGroup]] = {}
        for entry in manifest["shards"]:
            file = str(artefact.path / entry["file"])
            for index, group in enumerate(entry["row_groups"]):
                key = f"{manifest['cohort']}/{group['subject']}/{group['session']}"
                groups.setdefault(key, []).append(plan.RowGroup(file, index, group["rows"]))
        sessions += [plan.Session(manifest["cohort"], key, tuple(groups[key])) for key in sorted(groups)]
        if (rows := sum(g.rows for gs in groups.values() for g in gs)) != manifest["counts"]["stacks"]:
            raise UserError(
                "SHARD_ROWS", f"{artefact.path}: {rows} rows listed, {manifest['counts']['stacks']} counted"
            )
    if not sessions:
        raise UserError("NO_ROWS", f"no stacks in {[str(a.path) for a in shard_sets]}")
    return Corpus(tuple(sessions), tuple(manifests[0]["shape"]), tuple(manifests[0]["channels"]))


def order(spec: Stream, batch_size: int, seed: int) -> plan.Order:
    return plan.Order(
        lanes=spec.lanes,
        rows_per_lane=batch_size // spec.lanes,
        window=spec.window_sessions,
        max_rows_per_session=spec.max_rows_per_session,
        min_slice_gap=spec.min_slice_gap,
        weights=spec.weights,
        seed=seed,
    )


class _Key(NamedTuple):
    epoch: int
    lane: int
    visit: int


@dataclass
class _Step:
    opened: dict[_Key, plan.Session]
    draws: list[tuple[_Key, int, int]]  # visit, position in its session, place in the global batch
    closed: list[_Key]
    index: int


def _steps(
    sessions: Sequence[plan.Session], order: plan.Order, lanes: range, start: int, stop: int
) -> Iterator[_Step]:
    """The steps `start` to `stop` of some lanes. Visits opened before `start` and still alive open with the first."""
    number, skip = plan.locate(sessions, order, start)
    step = start
    while step < stop:
        epoch = plan.epoch(sessions, order, number)
        walks = [plan.lane_steps(epoch.lanes[lane], epoch.steps, order, number, lane) for lane in lanes]
        carried: dict[_Key, plan.Session] = {}
        alive: set[_Key] = set()
        for index, moves in enumerate(zip(*walks, strict=True)):
            opened: dict[_Key, plan.Session] = {}
            draws: list[tuple[_Key, int, int]] = []
            closed: list[_Key] = []
            for lane, move in zip(lanes, moves, strict=True):
                for visit in move.opened:
                    opened[_Key(number, lane, visit)] = sessions[epoch.lanes[lane][visit].session]
                closed += [_Key(number, lane, visit) for visit in move.closed]
                for place, draw in enumerate(move.draws, start=lane * order.rows_per_lane):
                    draws.append((_Key(number, lane, draw.visit), draw.position, place))
            carried |= opened
            alive = (alive | set(opened)) - set(closed)
            if index < skip:
                carried = {key: session for key, session in carried.items() if key in alive}
                continue
            if index == epoch.steps - 1:
                closed += sorted(alive)  # the tail that fills no step is not kept
            yield _Step(carried, draws, closed, step)
            carried = {}
            step += 1
            if step == stop:
                return
        number, skip = number + 1, 0


def batches(
    corpus: Corpus,
    order: plan.Order,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """The batches of steps `start` (included) to `stop` for one of `world` workers.

    Raises `UserError(SHARD_CORRUPT)` when a row's CRC does not match: a changed row is never handed out.
    """
    if order.lanes % world:
        raise UserError(
            "LANES",
            f"{order.lanes} lanes cannot be shared by {world} workers; set stream.lanes to a multiple",
        )
    share = order.lanes // world
    lanes = range(rank * share, (rank + 1) * share)
    return _prefetched(_assemble(corpus, order, lanes, start, stop), prefetch)


def _assemble(corpus: Corpus, order: plan.Order, lanes: range, start: int, stop: int) -> Iterator[Batch]:
    arrivals = _arrivals(_steps(corpus.sessions, order, lanes, start, stop))
    held: dict[_Key, tuple[np.ndarray, np.ndarray]] = {}
    form = shard.schema(corpus.shape, corpus.channels).metadata  # blocks of Ray Data lose it
    for step in _steps(corpus.sessions, order, lanes, start, stop):
        for key, session in step.opened.items():
            arrived, table = next(arrivals)
            if arrived != key or table.num_rows != session.rows:
                raise RuntimeError(
                    f"the stream is out of step: wanted {key} with {session.rows} rows, got {arrived}"
                )
            held[key] = (shard.pixels(table.replace_schema_metadata(form)), table["present"].to_numpy())
        stacks = torch.empty(
            (len(step.draws), *corpus.shape), dtype=torch.uint8, pin_memory=torch.cuda.is_available()
        )
        out = stacks.numpy()
        present = np.empty(len(step.draws), np.int64)
        for i, (key, position, _) in enumerate(step.draws):
            pixels, bits = held[key]
            out[i] = pixels[position]
            present[i] = bits[position]
        for key in step.closed:
            del held[key]
        channels = torch.from_numpy(present)[:, None] >> torch.arange(len(corpus.channels)) & 1
        yield Batch(
            step.index, stacks, channels.bool(), np.array([place for *_, place in step.draws], np.int64)
        )


def _arrivals(steps: Iterator[_Step]) -> Iterator[tuple[_Key, pa.Table]]:
    """Visits in the order they open, each with its rows, read ahead by Ray Data segment by segment."""
    opened = ((key, session) for step in steps for key, session in step.opened.items())
    while segment := [pair for _, pair in zip(range(SEGMENT_VISITS), opened, strict=False)]:
        keys = [key for key, _ in segment]
        yield from zip(keys, _read_in_order([session.row_groups for _, session in segment]), strict=True)


def _read_in_order(visits: Sequence[Sequence[plan.RowGroup]]) -> Iterator[pa.Table]:
    from ray.data import ExecutionOptions

    import ray

    items = [
        {"visit": number, "files": [g.file for g in groups], "indices": [g.index for g in groups]}
        for number, groups in enumerate(visits)
    ]
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # rows are read where they are used
    dataset = ray.data.from_items(items, override_num_blocks=max(1, len(items) // 4)).map_batches(
        _read, batch_size=None, batch_format="pyarrow", num_cpus=READ_CPUS, label_selector=here
    )
    dataset.context.execution_options = ExecutionOptions(preserve_order=True)
    dataset.context.execution_no_progress_timeout_s = -1  # a checkpoint or a slow step may pause the consumer
    dataset.context.enable_progress_bars = False
    number, parts = 0, list[pa.Table]()
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        numbers = block["visit"].to_numpy()
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        for begin, end in pairwise(edges):
            if numbers[begin] != number:
                yield pa.concat_tables(parts)
                number, parts = number + 1, []
            parts.append(block.slice(begin, end - begin))
    yield pa.concat_tables(parts)


def _read(items: pa.Table) -> Iterator[pa.Table]:
    """Row groups of visits, checked row by row against their CRC."""
    for item in items.to_pylist():
        tables = []
        for file, index in zip(item["files"], item["indices"], strict=True):
            table = shard.read_row_group(Path(file), index, columns=["pixels", "present", "crc"])
            shard.check_rows(table, f"{file}, row group {index}")
            tables.append(table.select(["pixels", "present"]))
        table = pa.concat_tables(tables)
        yield table.append_column("visit", pa.array(np.full(table.num_rows, item["visit"], np.int64)))


def _prefetched(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Assemble ahead in a thread, at most `depth` batches; an error there is raised here."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=fill, daemon=True, name="stream-prefetch")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
