"""The stream against its limits: a memory copy, a plain scan of the same shards, a torch DataLoader, the paper's way.

`cranium bench stream [rows= rounds= data= out=]`. Its stacks are generated once and kept under `data`; nothing of it is
brain, and nothing enters a store. Files lie in the page cache: this measures software, not disks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.dataset
import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from cranium import bench, bench_rows, cluster, corpora, stream
from cranium.config import Machine
from cranium.config import Stream as Mixing
from cranium.volume import plan

LANES, BATCH = 8, 64
LONG = 4  # epochs, where what a start costs is of less weight


class Spec(bench.Settings):
    rows: int = Field(10_000, ge=LANES * BATCH // 2)
    size: int = Field(224, ge=28)  # pixels in plane
    volume: tuple[int, int, int] = (197, 233, 189)  # voxels of the paper's scans: MNI at 1 mm
    slices: int = Field(8, ge=1)  # read the paper's way
    growth: int = Field(10, ge=2)  # times the corpus, for the memory


def run(spec: Spec, say: Callable[[str], None]) -> bench.Result:
    """Measure all cases in one run and compare; `docs/stream.md` says what each is."""
    machine = bench.machine()
    torch.set_num_threads(1)
    say("making the stacks")
    made = bench_rows.shard_set(spec.data, spec.rows, spec.size)
    memmap = bench_rows.memmap(made, spec.data)
    scans = bench_rows.scans(spec.data, spec.volume)
    with cluster.connect(Machine(store=spec.data)):
        corpus = corpora.corpus([made])
        mixed = stream.order(Mixing(lanes=LANES), BATCH, seed=0)
        in_order = stream.order(Mixing(lanes=LANES, window=1, max_rows_per_session=BATCH), BATCH, seed=0)
        steps = plan.steps(corpus.sessions, mixed, 0)
        there = np.ones((512, 3 * spec.size**2), np.uint8), np.ones((512, 3 * spec.size**2), np.uint8)
        cases = [
            bench.Case("stream", steps * BATCH, lambda: _streamed(corpus, mixed)),
            bench.Case("stream, no shuffle", steps * BATCH, lambda: _streamed(corpus, in_order)),
            bench.Case("stream, long", LONG * steps * BATCH, lambda: _streamed(corpus, mixed, LONG)),
            bench.Case(
                "stream, long, no shuffle", LONG * steps * BATCH, lambda: _streamed(corpus, in_order, LONG)
            ),
            bench.Case("torch DataLoader, 2 workers", spec.rows, lambda: _loaded(memmap)),
            bench.Case("pyarrow scan", spec.rows, lambda: _scanned(made.path / "shards")),
            bench.Case("memmap gather", spec.rows, lambda: _gathered(memmap)),
            bench.Case("memory copy", spec.rows, lambda: _copied(spec.rows, *there)),
            bench.Case(
                "the paper's way", spec.slices, lambda: _papers(scans, spec.slices), rounds=1, warm=False
            ),
        ]
        measured = bench.measure(cases, spec.rounds, say)
        say(f"memory over {spec.growth} times the rows")
        memory = _memory(corpus, corpora.corpus([bench_rows.repeated(made, spec.growth)]), mixed, spec.growth)
    return bench.Result(
        "stream",
        "cranium bench stream",
        spec.model_dump(mode="json", exclude={"data", "out"}),
        machine | {"load_after": bench.load()},
        measured,
        _targets({case.name: case for case in measured}, memory, spec.growth),
        _notes({case.name: case for case in measured}, memory, spec.growth),
    )


def _targets(
    measured: Mapping[str, bench.Measured], memory: Mapping[str, float], growth: int
) -> list[bench.Target]:
    own, plain = measured["stream"], measured["stream, no shuffle"]
    loader, paper = measured["torch DataLoader, 2 workers"], measured["the paper's way"]
    target = bench.Target
    return [
        target("stacks/s, start included", own.per_second, 7000, 11000),
        target("CPU s per 1,000 stacks, all processes", own.cpu_per_1000, 0.30, 0.20, at_least=False),
        target("first batch, s", own.fact("first_batch_s"), 0.5, at_least=False),
        target("CPU of shuffle over none", own.cpu_per_1000 / plain.cpu_per_1000, 1.05, at_least=False),
        target("the paper's way over ours, by CPU", paper.cpu_per_1000 / own.cpu_per_1000, 400, 1000),
        target("rate over torch DataLoader", own.per_second / loader.per_second, 1.7, 2.7),
        target(
            f"memory at {growth} times the rows, ratio",
            memory["large"] / memory["small"],
            1.1,
            at_least=False,
        ),
    ]


def _notes(measured: Mapping[str, bench.Measured], memory: Mapping[str, float], growth: int) -> list[str]:
    own, copy, scan = (measured[name] for name in ("stream", "memory copy", "pyarrow scan"))
    long, plain = (measured[name] for name in ("stream, long", "stream, long, no shuffle"))
    return [
        f"Over {LONG} epochs, one start: {long.per_second:,.0f} stacks/s, {long.cpu_per_1000:.3f} CPU s per 1,000; "
        f"shuffle costs {long.cpu_per_1000 / plain.cpu_per_1000:.2f} of none.",
        f"The limit: one memory copy costs {copy.cpu_per_1000:.3f} CPU s per 1,000 stacks, and the stream makes five "
        "(read, decode, hand over, hold, gather) and a CRC: "
        f"{own.cpu_per_1000 / copy.cpu_per_1000:.1f} copies' time in all, "
        f"{own.cpu_per_1000 / scan.cpu_per_1000:.1f} times a plain scan's.",
        f"Peak private memory of all processes: {memory['small']:,.0f} MB, and {memory['large']:,.0f} MB at {growth} "
        "times the rows.",
    ]


def _memory(small: corpora.Corpus, large: corpora.Corpus, order: plan.Order, growth: int) -> dict[str, float]:
    """Peak private memory (MB) of all processes while the same number of rows is streamed: epochs of the small corpus,
    then one of the large.
    """
    _streamed(large, order)  # what processes keep for themselves, they have by then
    found = {}
    for name, corpus, epochs in (("small", small, growth), ("large", large, 1)):
        with bench.peak_memory() as peak:
            _streamed(corpus, order, epochs)
        found[name] = peak["peak_mb"]
    return found


# ---- cases ----------------------------------------------------------------------------------------------------------


def _streamed(corpus: corpora.Corpus, order: plan.Order, epochs: int = 1) -> dict[str, float]:
    """Whole epochs for one worker: CRC of every row, order and exact counts included."""
    started, own = time.perf_counter(), time.process_time()
    first, rows = 0.0, 0
    steps = epochs * plan.steps(corpus.sessions, order, 0)
    for batch in stream.batches(corpus, order, start=0, stop=steps):
        first = first or time.perf_counter() - started
        rows += len(batch.stacks)
    return {"first_batch_s": first, "consumer_cpu_s_per_1000": 1000 * (time.process_time() - own) / rows}


@dataclass(frozen=True)
class _Rows(Dataset[torch.Tensor]):
    memmap: Path

    def __len__(self) -> int:
        return len(_opened(self.memmap))

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(_opened(self.memmap)[index]))


@lru_cache(maxsize=1)  # a worker of the loader opens it once
def _opened(path: Path) -> np.ndarray:
    opened: np.ndarray = np.load(path, mmap_mode="r")
    return opened


def _loaded(memmap: Path) -> None:
    loader = DataLoader(_Rows(memmap), BATCH, shuffle=True, num_workers=2, prefetch_factor=4)
    assert sum(len(batch) for batch in loader) == len(_opened(memmap))


def _scanned(folder: Path) -> None:
    """`pyarrow.dataset` over the pixels, each batch copied once into memory of its own; no CRC, no order."""
    scanner = pyarrow.dataset.dataset(folder).scanner(columns=["pixels"], batch_size=BATCH)
    for batch in scanner.to_batches():
        column = batch.column(0)
        if size := len(column) * column.type.byte_width:
            np.frombuffer(column.buffers()[1], np.uint8, size, column.offset * column.type.byte_width).copy()


def _gathered(memmap: Path) -> None:
    rows = np.load(memmap, mmap_mode="r")
    mixed = np.random.default_rng(0).permutation(len(rows))
    for start in range(0, len(rows), BATCH):
        torch.from_numpy(rows[np.sort(mixed[start : start + BATCH])])


def _copied(rows: int, source: np.ndarray, target: np.ndarray) -> None:
    """From and to memory that is there and larger than the caches."""
    for start in range(0, rows, 512):
        count = min(512, rows - start)
        target[:count] = source[:count]


def _papers(scans: list[Path], slices: int) -> None:
    """The way of the paper's repository, written from its description: slices of one subject in random order."""
    loader = DataLoader(_Slices(tuple(scans)), batch_size=min(10, slices), shuffle=True, num_workers=0)
    rows = 0
    for batch in loader:
        rows += len(batch)
        if rows >= slices:
            break


@dataclass(frozen=True)
class _Slices(Dataset[torch.Tensor]):
    """A sample is one axial slice of every contrast: each of its volumes is decoded whole, for every sample.

    At most 140 slices from the tenth on; float32 as it lies in the file; resized to 224; flipped both ways at random.
    """

    scans: tuple[Path, ...]

    def __len__(self) -> int:
        return 140

    def __getitem__(self, index: int) -> torch.Tensor:
        import SimpleITK as sitk

        planes = []
        for path in self.scans:
            volume = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            planes.append(volume[min(10 + index, len(volume) - 1)].astype(np.float32))
        image = torch.from_numpy(np.stack(planes))
        image = torch.nn.functional.interpolate(
            image[None], size=(224, 224), mode="bilinear", antialias=True
        )[0]
        for axis in (1, 2):
            image = image.flip(axis) if torch.rand(()) < 0.5 else image
        return image
