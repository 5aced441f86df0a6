"""A training step against its limits: the official DINOv2 step, LightlyTrain's, a plain form of ours, the matmul peak.

`cranium bench step [batch_size= threads= steps= rounds= official=DIR peers=VENV out=]`. Every case is a process of its
own (`experiments/bench/step/`), told in turn to work so many steps; the peers run in the environment `peers`, official
DINOv2 from the checkout `official`. A peer that is not given is left out, and said to be. The work is the same for all:
ViT-S/14, 2 views of 224 and 8 of 98 pixels, 65,536 prototypes, the same masks, AdamW.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from cranium import bench
from cranium.config import UserError
from cranium.dinov2 import cost, masking
from cranium.reading import share

ARCH, PATCHES, GLOBAL, LOCAL = "vit_small_patch14_dinov2", 256, 2, 8
PEAK_FLOPS = 40 * 2 * 2048**3
"""Of one `step` of `own.py peak`."""
CROPS = 64
"""Stacks in one `step` of `own.py crops`."""
OFFICIAL, LIGHTLY = "official DINOv2", "LightlyTrain"
ALONE = "official DINOv2, its own allocator"
PLAIN, TUNED, SHIPPED = "ours, plain", "ours, tuned", "ours, as shipped"
PEAK, CROPPING = "matrix products", "multi-crop, one thread"


class Spec(bench.Settings):
    batch_size: int = Field(4, ge=2)
    threads: int = Field(2, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"  # targets are those of bf16
    steps: int = Field(2, ge=1)  # in one round
    official: Path | None = None  # a checkout of facebookresearch/dinov2
    peers: Path | None = None  # a virtual environment with torch, omegaconf, fvcore and lightly-train


@dataclass(frozen=True)
class Stepper:
    """A case's process. `work` is what `bench.Case` wants."""

    process: subprocess.Popen[str]
    steps: int
    said: Path

    def work(self) -> Mapping[str, float]:
        return self.ask(f"{self.steps}\n")

    def ask(self, line: str) -> dict[str, Any]:
        """Its next answer, after a line of input. RuntimeError when it has ended instead."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(self.said.read_text().strip().rpartition("\n")[2] or "ended without a word")
        found: dict[str, Any] = json.loads(answer)
        return found


def run(spec: Spec, say: Callable[[str], None]) -> bench.Result:
    """Measure all cases in one run and compare; `docs/pretraining.md` says what is asked."""
    if spec.precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        message = "this CPU has no bf16 instructions and takes a hundred times as long; give precision=fp32"
        raise UserError("NO_BF16", message)
    machine = bench.machine()
    spec.data.mkdir(parents=True, exist_ok=True)
    row_step = _masked_as_usual(spec.batch_size)
    batch = _batch(spec.data, spec.batch_size, row_step)
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        cases = []
        for name, items, unit, command, own_memory in _cases(spec, batch, row_step):
            environment = {} if own_memory else allocator()
            try:
                stepper, versions = stack.enter_context(_started(spec, name, command, environment))
                stepper.ask("1\n")
            except RuntimeError as error:
                if name in (PLAIN, TUNED, SHIPPED, PEAK, CROPPING):
                    raise
                notes.append(f"{name}: absent, its process ended with: {error}")
                continue
            say(f"{name}: torch {versions['torch']}")
            # Its process is its own: what others did before leaves it as it was.
            cases.append(bench.Case(name, spec.steps * items, stepper.work, unit, warm=False))
        measured = bench.measure(cases, spec.rounds, say)
    named = {case.name: case for case in measured}
    for absent, wants in ((OFFICIAL, "official=DIR peers=VENV"), (LIGHTLY, "peers=VENV")):
        if absent not in named and not any(note.startswith(absent) for note in notes):
            notes.append(f"{absent}: absent, not given ({wants}).")
    return bench.Result(
        "step",
        "cranium bench step",
        spec.model_dump(mode="json", exclude={"data", "out", "official", "peers"}),
        machine | {"load_after": bench.load()},
        measured,
        _targets(spec, named),
        [*notes, *_notes(spec, named)],
    )


def _cases(spec: Spec, batch: Path, row_step: int) -> Iterator[tuple[str, int, str, list[str], bool]]:
    """Name, items of a step, their unit, command, and whether it keeps the system's allocator."""
    folder, threads = share() / "experiments" / "bench" / "step", str(spec.threads)
    python = str(spec.peers / "bin" / "python") if spec.peers else ""
    own = [sys.executable, str(folder / "own.py")]
    if spec.official and spec.peers:
        if not (spec.official / "dinov2").is_dir():
            raise UserError("NO_FILE", f"official={spec.official} holds no dinov2/; give a checkout of it")
        checkout = str(spec.official.absolute())
        command = [python, str(folder / "official.py"), checkout, str(batch), threads, spec.precision]
        yield ALONE, spec.batch_size, "images", command, True
        yield OFFICIAL, spec.batch_size, "images", command, False
    if spec.peers:
        command = [python, str(folder / "lightlytrain.py"), str(batch), threads, spec.precision]
        yield LIGHTLY, spec.batch_size, "images", command, False
    for name, kind in ((PLAIN, "plain"), (TUNED, "tuned"), (SHIPPED, "shipped")):
        command = [*own, kind, str(batch), str(row_step), threads, spec.precision]
        yield name, spec.batch_size, "images", command, kind == "shipped"
    yield CROPPING, CROPS, "stacks", [*own, "crops", str(batch), "0", "1", spec.precision], False
    yield PEAK, PEAK_FLOPS // 10**9, "GFLOP", [*own, "peak", str(batch), "0", threads, spec.precision], False


def allocator() -> dict[str, str]:
    """Variables under which a process keeps the memory it was once given: jemalloc, which Ray brings, where it is.

    A step frees and asks again for the same large blocks; the system's allocator gives them back each time, and every
    page is then made anew.
    """
    import ray

    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not library.is_file():
        return {}
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"}


@contextlib.contextmanager
def _started(
    spec: Spec, name: str, command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[Stepper, Mapping[str, str]]]:
    """A process that is ready to step, and what it says of itself. RuntimeError when it cannot."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    # A script's own folder is where it finds what stands beside it.
    inherited.pop("PYTHONSAFEPATH", None)
    if command[0] != sys.executable:
        inherited.pop("PYTHONPATH", None)
    said = spec.data / f"step-{name.replace(' ', '-').replace(',', '')}.log"
    with said.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=inherited | dict(environment) | {"OMP_NUM_THREADS": str(spec.threads)},
        )
    try:
        stepper = Stepper(process, spec.steps, said)
        yield stepper, stepper.ask("")
    finally:
        process.kill()
        process.communicate()


def _masked_as_usual(batch_size: int) -> int:
    """A step whose masks hide about as many patches as steps do on average."""
    usual = GLOBAL * batch_size * PATCHES * 0.5 * 0.3

    def off(step: int) -> float:
        return abs(int(_masks(batch_size, step).sum()) - usual)

    return min(range(32), key=off)


def _masks(batch_size: int, step: int) -> np.ndarray:
    return masking.sample(np.arange(batch_size), step, 0, 16).reshape(-1, PATCHES)


def _batch(folder: Path, batch_size: int, step: int) -> Path:
    """What every case is given: views of noise, and masks."""
    random, path = np.random.default_rng(0), folder / f"step-{batch_size}.npz"
    arrays: dict[str, Any] = {
        "global": random.random((GLOBAL * batch_size, 3, 224, 224), np.float32),
        "local": random.random((LOCAL * batch_size, 3, 98, 98), np.float32),
        "masks": _masks(batch_size, step),
    }
    np.savez(path, **arrays)
    return path


def _targets(spec: Spec, measured: Mapping[str, bench.Measured]) -> list[bench.Target]:
    found, tuned, target = [], measured[TUNED], bench.Target
    for name, peer, ours, required in (
        ("tuned over official, same allocator", OFFICIAL, TUNED, 1.3),
        ("tuned over LightlyTrain, same allocator", LIGHTLY, TUNED, 1.3),
        ("as shipped over official as it is", ALONE, SHIPPED, 1.6),
    ):
        if peer in measured:
            rate = measured[ours].per_second / measured[peer].per_second
            found.append(target(name, rate, required, 2.0 if peer != LIGHTLY else None))
    crop = measured[CROPPING].cpu_per_1000
    share = tuned.per_second * _flops_per_image() / (measured[PEAK].per_second * 1e9)
    return [
        *found,
        target("share of the matmul peak, tuned", share, 0.69, 0.85),
        target("multi-crop, CPU ms a sample", crop, 9.0, at_least=False),
        target("multi-crop, share of a step's CPU", crop / tuned.cpu_per_1000, 0.02, at_least=False),
    ]


def _flops_per_image() -> float:
    return cost.of_pretraining(ARCH, images=1).flops_per_image


def _notes(spec: Spec, measured: Mapping[str, bench.Measured]) -> list[str]:
    plain, tuned = measured[PLAIN].per_second, measured[TUNED].per_second
    return [
        f"Tuned over plain: {tuned / plain:.2f}. One image is {_flops_per_image() / 1e9:.1f} GFLOP by "
        "`cranium show`'s formula; the last block's trim is not credited."
    ]
