"""Ingest against its limits: inflating and resampling the same scans and nothing else; one worker against two.

`cranium bench ingest [sessions= rounds= data= out=]`. Heads are generated once and kept under `data`: noise in an
ellipsoid, three contrasts and one mask a session, 240 x 240 x 155 voxels of 1 mm. Scans are on one grid, so none is
registered. What is compared by CPU seconds works on the first `ALONE` sessions in this process, the whole stage on all.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from pydantic import Field

from cranium import bench, cluster, cohort, conform, ingest
from cranium.bench_rows import CHANNELS
from cranium.cards import Card
from cranium.config import Compute, Ingest, Machine
from cranium.volume import slices

ALONE = 6  # sessions; further ones have their voxels, under another stamp in the gzip header
HEADER = 352  # bytes before the voxels
WHERE = "sub-{subject}/sub-{subject}"
CARD = Card.model_validate(
    {
        "name": "bench",
        "title": "Generated heads",
        "access": "generated",
        "licence": "CC0-1.0",
        "citation": "none",
        "role": "benchmarks",
        "contrasts": list(CHANNELS),
        "layouts": [
            {
                "files": {contrast: [f"{WHERE}_{contrast}.nii.gz"] for contrast in CHANNELS},
                "mask": f"{WHERE}_mask.nii.gz",
                "source": "generated",
            }
        ],
        "simulated": True,
    }
)


class Spec(bench.Settings):
    sessions: int = Field(24, ge=1)
    volume: tuple[int, int, int] = (240, 240, 155)  # voxels
    size: int = Field(224, ge=28)  # pixels in plane


def run(spec: Spec, say: Callable[[str], None]) -> bench.Result:
    """Measure all cases in one run and compare; `docs/storage.md` says what each is."""
    machine = bench.machine()
    say("making the heads")
    raw = heads(spec.data, spec.sessions, spec.volume)
    table = cohort.scan(CARD, raw)
    settings = Ingest(size=spec.size, align="none", mask=("supplied",), compute=Compute(num_workers=1))
    scans = len(CHANNELS) * spec.sessions
    few = table.sessions[:ALONE]
    alone = len(CHANNELS) * len(few)
    job = conform.Job(CARD.name, table.root, spec.data / "bench-work", settings)
    slices.limit_threads(1)

    def sessions() -> dict[str, float]:
        shutil.rmtree(job.folder, ignore_errors=True)
        Path(job.work).mkdir(parents=True)
        stacks = 0
        for index, one in enumerate(few):
            asked = conform.wanted(one, settings, dict(table.files))
            row = {"index": index, "session": json.dumps(asked)}
            stacks += conform.session(row, job)["stacks"]
        return {"stacks": stacks}

    with cluster.connect(Machine(store=spec.data)):
        cases = [
            bench.Case("inflate and resample", alone, lambda: _bare(raw, few, spec, CHANNELS), "scans"),
            bench.Case(
                "the same, the brain's box",
                alone,
                lambda: _bare(raw, few, spec, CHANNELS, boxed=True),
                "scans",
            ),
            bench.Case("the masks alone", alone, lambda: _bare(raw, few, spec, ("mask",)), "scans"),
            bench.Case("sessions, in one process", alone, sessions, "scans"),
            bench.Case("ingest, 1 worker", scans, lambda: _whole(raw, spec, settings, 1), "scans"),
            bench.Case("ingest, 2 workers", scans, lambda: _whole(raw, spec, settings, 2), "scans"),
        ]
        measured = bench.measure(cases, spec.rounds, say)
    shutil.rmtree(job.folder, ignore_errors=True)
    named = {case.name: case for case in measured}
    return bench.Result(
        "ingest",
        "cranium bench ingest",
        spec.model_dump(mode="json", exclude={"data", "out"}),
        machine | {"load_after": bench.load()},
        measured,
        _targets(named),
        _notes(named),
    )


def _targets(measured: Mapping[str, bench.Measured]) -> list[bench.Target]:
    bare, mask, whole = (
        measured[name].cpu_per_1000
        for name in ("inflate and resample", "the masks alone", "sessions, in one process")
    )
    one, two = measured["ingest, 1 worker"], measured["ingest, 2 workers"]
    return [
        bench.Target(
            "CPU without the mask, over inflate and resample", (whole - mask) / bare, 1.5, at_least=False
        ),
        bench.Target("rate of 2 workers over 1", two.per_second / one.per_second, 1.7),
    ]


def _notes(measured: Mapping[str, bench.Measured]) -> list[str]:
    two = measured["ingest, 2 workers"]
    rate = two.per_second * two.fact("stacks") / two.items
    boxed, mask, whole = (
        measured[name].cpu_per_1000
        for name in ("the same, the brain's box", "the masks alone", "sessions, in one process")
    )
    return [
        f"Over inflating and resampling no more than the brain's box: {(whole - mask) / boxed:.2f}.",
        f"Two workers make {rate:,.0f} stacks/s of {two.fact('stacks'):,.0f}, shards and manifest included.",
    ]


# ---- cases ----------------------------------------------------------------------------------------------------------


def _bare(
    raw: Path, sessions: Sequence[cohort.Session], spec: Spec, names: tuple[str, ...], boxed: bool = False
) -> None:
    """Inflate every file, resample its voxels onto the session's grid: masks by the nearest voxel, scans linearly.

    `boxed`: scans only where the grid has brain, as ingest does.
    """
    affine = _affine(spec.volume)
    brain = _ellipsoid(spec.volume)
    grid = slices.session_grid(brain, affine, spec.size, 1.0, 1.0)
    part = slices.box(slices.onto_grid(brain.view(np.uint8), affine, grid, labels=True)) if boxed else None
    for session in sessions:
        for name in names:
            path = raw / f"sub-{session.subject}/sub-{session.subject}_{name}.nii.gz"
            content = isal_zlib.decompress(path.read_bytes(), wbits=31)
            kind = np.uint8 if name == "mask" else np.int16
            data = np.frombuffer(content, kind, offset=HEADER).reshape(spec.volume, order="F")
            slices.onto_grid(data, affine, grid, labels=name == "mask", part=part)


def _whole(raw: Path, spec: Spec, settings: Ingest, workers: int) -> dict[str, float]:
    """Everything that `cranium ingest` does on a cluster that is there: tasks, shards, tables, manifest."""
    store = spec.data / "bench-store"
    shutil.rmtree(store, ignore_errors=True)
    of = settings.model_copy(update={"compute": Compute(num_workers=workers)})
    made = ingest.ingest(CARD, raw, of, Machine(store=store))
    stacks = made.manifest()["counts"]["stacks"]
    shutil.rmtree(store)
    return {"stacks": float(stacks)}


# ---- input ----------------------------------------------------------------------------------------------------------


def heads(folder: Path, sessions: int, volume: tuple[int, int, int]) -> Path:
    """`sub-NNN/sub-NNN_{contrast,mask}.nii.gz` of so many sessions; made once."""
    root = folder / f"heads-{sessions}x{'x'.join(map(str, volume))}"
    if (root / "done").exists():
        return root
    inside = _ellipsoid(volume)
    for number in range(sessions):
        rng = np.random.default_rng(number)
        stem = root / f"sub-{number:03d}" / f"sub-{number:03d}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        for mean, name in enumerate((*CHANNELS, "mask"), 1):
            path = Path(f"{stem}_{name}.nii.gz")
            if number >= ALONE:  # other bytes, as of another scan: equal files would be refused as copies
                first = f"sub-{number % ALONE:03d}"
                made = (root / first / f"{first}_{name}.nii.gz").read_bytes()
                path.write_bytes(made[:4] + number.to_bytes(4, "little") + made[8:])
            elif name == "mask":
                _write(path, inside.astype(np.uint8))
            else:
                voxels = np.rint(rng.normal(300 * mean, 60, volume) / 4) * 4
                _write(path, np.where(inside, voxels, 0).astype(np.int16))
    (root / "done").touch()
    return root


def _ellipsoid(volume: tuple[int, int, int]) -> NDArray[np.bool_]:
    x, y, z = np.ogrid[-1 : 1 : volume[0] * 1j, -1 : 1 : volume[1] * 1j, -1 : 1 : volume[2] * 1j]
    found: NDArray[np.bool_] = (x / 0.6) ** 2 + (y / 0.75) ** 2 + (z / 0.85) ** 2 < 1
    return found


def _affine(volume: tuple[int, int, int]) -> NDArray[np.float64]:
    grid = np.eye(4)
    grid[:3, 3] = [-(count - 1) / 2 for count in volume]
    return grid


def _write(path: Path, voxels: NDArray[Any]) -> None:
    import nibabel as nib

    image = nib.Nifti1Image(voxels, _affine(voxels.shape))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    path.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))
