"""Executes a plan: shards -> batches of slice stacks for one worker, at a position that can be found again.

In: finished shard sets and an `Order`. Out: `Batch` after `Batch`, uint8, the same for every run and any number of
workers. Ray Data reads the row groups in the plan's order on the worker's own node; the consumer draws rows from them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from cranium import meters
from cranium.config import Stream, UserError
from cranium.corpora import Corpus
from cranium.volume import plan, shard, window
from cranium.volume.visit import read

SEGMENT = 2048  # row groups given to one Ray Data execution: its start costs 0.2 s, its plan a little memory
# Read by one task: below Ray's 128 MiB, so that it makes one block.
BLOCK_BYTES, BLOCK_GROUPS = (100_000_000, 16)
READERS = 2  # tasks of one worker at a time; they share its `read_cpus`


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step.

    stacks: uint8 [B, C, S, H, W]; present: bool [B, C]; rows: int64 [B], each row's place in the global batch, which
    seeds every random draw made for it; sessions: int64 [B], its place in `Corpus.sessions`.
    """

    step: int
    stacks: torch.Tensor
    present: torch.Tensor
    rows: np.ndarray
    sessions: np.ndarray


def order(spec: Stream, batch_size: int, seed: int) -> plan.Order:
    return plan.Order(
        lanes=spec.lanes,
        rows_per_lane=batch_size // spec.lanes,
        window=spec.window,
        max_rows_per_session=spec.max_rows_per_session,
        min_slice_gap=spec.min_slice_gap,
        weights=spec.weights,
        temperature=spec.temperature,
        seed=seed,
    )


# ---- batches --------------------------------------------------------------------------------------------------------


def batches(
    corpus: Corpus,
    order: plan.Order,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    prefetch: int = 2,
    read_cpus: float = 1.0,
    fill: Literal["zero", "replicate"] = "zero",
    labels: Mapping[str, str] | None = None,
) -> Iterator[Batch]:
    """The batches of steps `start` (included) to `stop` for one of `world` workers; `labels` are those of its meters.

    At most `READERS` tasks read at a time, on this node, and hold `read_cpus` of its logical CPUs together. Raises
    `UserError(SHARD_CORRUPT)` when a row's CRC does not match, SHARD_MISSING for a shard that is gone, SHARD_ROWS when
    a row group does not have the manifest's rows: a changed row is never handed out.
    """
    if order.lanes % world:
        raise UserError(
            "LANES",
            f"{order.lanes} lanes cannot be shared by {world} workers; set stream.lanes to a multiple",
        )
    share = order.lanes // world
    lanes = range(rank * share, (rank + 1) * share)
    made = _assembled(corpus, order, lanes, start, stop, read_cpus)
    return _prefetched(map(replicated, made) if fill == "replicate" else made, prefetch, labels)


def replicated(batch: Batch) -> Batch:
    """Absent contrasts filled by `replicate`, and called present."""
    present = batch.present | batch.present.any(1, keepdim=True)
    return replace(batch, stacks=replicate(batch.stacks, batch.present), present=present)


def replicate(stacks: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Stacks [B, C, S, H, W] with each absent contrast (`present` [B, C]) a copy of the row's first present one."""
    filled = stacks.clone()
    rows, channels = (~present & present.any(1, keepdim=True)).nonzero(as_tuple=True)
    filled[rows, channels] = stacks[rows, present.int().argmax(1)[rows]]
    return filled


class _Key(NamedTuple):
    epoch: int
    lane: int
    visit: int


# Row bytes -> memory of spent visits, kept for those to come, also of the next stream of this process: memory that is
# fresh costs the kernel up to five times the copy into it.
_SPARE: dict[int, list[np.ndarray]] = {}


@dataclass(frozen=True, slots=True)
class _Visit:
    """A row group in this process's own memory, until the last of its rows is drawn.

    Copied, because a window of views would pin Ray's object store until it spills: ten times slower than the copy.
    """

    session: int
    pixels: np.ndarray  # uint8 [rows, C * S * H * W]
    present: np.ndarray  # uint32 [rows]


def _assembled(
    corpus: Corpus, order: plan.Order, lanes: range, start: int, stop: int, read_cpus: float
) -> Iterator[Batch]:
    number, skip = plan.locate(corpus.sessions, order, start)
    held: dict[_Key, _Visit] = {}
    buffers = _SPARE.setdefault(size := int(np.prod(corpus.shape)), [])
    arrivals: Iterator[tuple[_Key, _Visit]] | None = None
    bits = torch.arange(len(corpus.channels))
    rows = np.arange(lanes.start * order.rows_per_lane, lanes.stop * order.rows_per_lane)
    pinned, step = torch.cuda.is_available(), start
    while step < stop:
        epoch = plan.epoch(corpus.sessions, order, number)
        walks = [window.lane_steps(corpus.sessions, epoch.lanes[n], order, number, n) for n in lanes]
        moves = enumerate(zip(*walks, strict=True))
        spent = {
            _Key(number, lane, visit)
            for _, parts in islice(moves, skip)
            for lane, part in zip(lanes, parts, strict=True)
            for visit in part.closed
        }
        if arrivals is None:
            arrivals = _arrivals(
                corpus, order, lanes, (number, stop - start + skip), spent, buffers, read_cpus
            )
        for _, parts in islice(moves, stop - step):
            stacks, present = _empty(len(rows), size, pinned), np.empty(len(rows), np.int64)
            out, sessions = stacks.numpy(), np.empty(len(rows), np.int64)
            place = 0
            for lane, part in zip(lanes, parts, strict=True):
                for visit, row in zip(part.visits, part.rows, strict=True):
                    key = _Key(number, lane, visit)
                    while key not in held:
                        arrived, found = next(arrivals)
                        held[arrived] = found
                    source = held[key]
                    out[place] = source.pixels[row]
                    present[place] = source.present[row]
                    sessions[place] = source.session
                    place += 1
                for visit in part.closed:
                    buffers.append(held.pop(_Key(number, lane, visit)).pixels)
            channels = (torch.from_numpy(present)[:, None] >> bits & 1).bool()
            yield Batch(step, stacks.view(-1, *corpus.shape), channels, rows, sessions)
            step += 1
        if step < stop and (over := [key for key in held if key.epoch == number]):
            raise RuntimeError(f"epoch {number} ended with rows of {len(over)} row groups not handed out")
        number, skip = number + 1, 0


def _empty(rows: int, size: int, pinned: bool) -> torch.Tensor:
    """uint8 [rows, size]. NumPy asks for large pages, which torch does not: a quarter of the page faults' time."""
    if pinned:
        return torch.empty((rows, size), dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.empty((rows, size), np.uint8))


# ---- reading --------------------------------------------------------------------------------------------------------


def _arrivals(
    corpus: Corpus,
    order: plan.Order,
    lanes: range,
    ahead: tuple[int, int],
    spent: Collection[_Key],
    buffers: list[np.ndarray],
    read_cpus: float,
) -> Iterator[tuple[_Key, _Visit]]:
    """Visits in about the order they will open, each with its rows, in `buffers` where there are some.

    `ahead`: first epoch, steps from its beginning.
    """
    nbytes = int(np.prod(corpus.shape))
    wanted = _upcoming(corpus, order, lanes, *ahead, spent)
    form = shard.schema(corpus.shape, corpus.channels).metadata  # blocks of Ray Data lose it
    while segment := list(islice(wanted, SEGMENT)):
        tables = _read_in_order([group for *_, group in segment], nbytes, read_cpus)
        for (key, owner, group), table in zip(segment, tables, strict=True):
            if table.num_rows != group.rows:
                raise UserError(
                    "SHARD_ROWS",
                    f"{group.file}, row group {group.index}: {table.num_rows} rows read, the manifest says "
                    f"{group.rows}; restore the shard or ingest again",
                )
            rows = shard.pixels(table.replace_schema_metadata(form)).reshape(group.rows, -1)
            try:
                pixels = buffers.pop()
            except IndexError:
                pixels = np.empty((shard.MAX_ROWS, rows.shape[1]), np.uint8)
            pixels[: group.rows] = rows
            yield key, _Visit(owner, pixels, table["present"].to_numpy().copy())


def _upcoming(
    corpus: Corpus, order: plan.Order, lanes: range, number: int, steps: int, spent: Collection[_Key]
) -> Iterator[tuple[_Key, int, plan.RowGroup]]:
    """What `steps` steps from the start of epoch `number` need and `spent` does not name.

    Lanes spend rows at one rate, so a visit is due about when the rows before it in its lane are spent. The draws
    decide its exact step, and need not be known here.
    """
    while steps > 0:
        epoch = plan.epoch(corpus.sessions, order, number)
        due = np.concatenate([np.cumsum(epoch.lanes[n].take) - epoch.lanes[n].take for n in lanes])
        lane = np.concatenate([np.full(len(epoch.lanes[n].take), n) for n in lanes])
        visit = np.concatenate([np.arange(len(epoch.lanes[n].take)) for n in lanes])
        for place in np.lexsort((lane, due)).tolist():
            key = _Key(number, int(lane[place]), int(visit[place]))
            if key not in spent:
                owner = int(epoch.lanes[key.lane].session[key.visit])
                group = int(epoch.lanes[key.lane].group[key.visit])
                yield key, owner, corpus.sessions[owner].row_groups[group]
        steps, number = steps - epoch.steps, number + 1


def _read_in_order(groups: Sequence[plan.RowGroup], nbytes: int, read_cpus: float) -> Iterator[pa.Table]:
    """One table a row group, in order, read by tasks on this node. `nbytes`: of a row."""
    import ray

    items = [
        {"files": [g.file for g in block], "indices": [g.index for g in block]}
        for block in _blocks(groups, nbytes)
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=read_cpus / READERS,
        compute=ray.data.TaskPoolStrategy(READERS),
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},  # read where it is used
    )
    context = dataset.context
    context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
    context.execution_no_progress_timeout_s = -1  # a checkpoint or a slow step may pause the consumer
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # or every task starts a thread for it
    parts: list[pa.Table] = []
    try:
        # Whole blocks, without the batching and formatting threads of `iter_batches`: a third of the driver's work.
        for bundle in dataset.iter_internal_ref_bundles():
            for ref in bundle.block_refs:
                block = ray.get(ref)
                ends = set((block["last"].to_numpy().nonzero()[0] + 1).tolist())
                for begin, end in pairwise(sorted({0, *ends, block.num_rows})):
                    parts.append(block.slice(begin, end - begin))
                    if end in ends:
                        yield pa.concat_tables(parts)
                        parts = []
    except Exception as error:
        raise explained(error) from error


def _blocks(groups: Sequence[plan.RowGroup], nbytes: int) -> Iterator[Sequence[plan.RowGroup]]:
    """Row groups for one task each: few at first, so that the first batch is soon there, then `BLOCK_BYTES`."""
    done, size = 0, 2
    while done < len(groups):
        count, held = 0, 0
        while count < min(size, len(groups) - done) and held < BLOCK_BYTES:
            held += groups[done + count].rows * nbytes
            count += 1
        yield groups[done : done + count]
        done, size = done + count, min(2 * size, BLOCK_GROUPS)


def explained(error: BaseException) -> BaseException:
    """What a reading task found wrong with a shard, behind Ray's wrapping; else the error as it is."""
    current: BaseException | None = error
    found: shard.ShardError | None = None
    while current is not None:
        if isinstance(current, shard.ShardError):
            found = current  # Ray's wrapping is one too, with a traceback for its message
        cause = getattr(current, "cause", None)
        current = cause if isinstance(cause, BaseException) else current.__cause__
    return error if found is None else UserError(found.code, str(found), 1)


def _prefetched(batches: Iterator[Batch], depth: int, labels: Mapping[str, str] | None) -> Iterator[Batch]:
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
            begun = time.perf_counter()
            for batch in batches:
                if labels:
                    meters.batch(labels, batch.stacks.nbytes, time.perf_counter() - begun)
                if not put(batch):
                    return
                begun = time.perf_counter()
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=fill, daemon=True, name="stream-prefetch")
    thread.start()
    try:
        while True:
            late = ready.empty()
            if (item := ready.get()) is None:
                break
            if isinstance(item, BaseException):
                raise item
            if late and labels:
                meters.put("cranium_stream_late_batches_total", 1, labels)
            yield item
    finally:
        stopped.set()
