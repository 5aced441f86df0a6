"""What a worker does within a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cranium import capture, corpora, journals, meters, restart, stream, training, update
from cranium.config import Loss, Optimiser, Pretrain, Stream
from cranium.dinov2.method import DINOv2, Student, parameter_groups
from cranium.dinov2.schedules import scaled_momentum
from cranium.models import vit
from cranium.restart import Position
from shards import shard_set


def build(accumulate: int, centering: str = "sinkhorn") -> tuple[Pretrain, DINOv2]:
    spec = Pretrain.model_validate(
        {
            "cohorts": ["tiny"],
            "arch": "vit_tiny_patch14",
            "batch_size": 8,
            "accumulate": accumulate,
            "crops": {"global_size": 28, "local_size": 14, "num_local": 2},
            "loss": {"prototypes": 32, "head_hidden": 32, "head_bottleneck": 16, "centering": centering},
            "precision": "fp32",
        }
    )
    torch.manual_seed(0)
    objective = training.method_spec(spec.crops, spec.loss)
    return spec, DINOv2(Student(vit.build("vit_tiny_patch14", image_size=28).train(), objective), objective)


def batch(rows: slice = slice(0, 8)) -> stream.Batch:
    rng = np.random.default_rng(0)
    stacks = torch.from_numpy(rng.integers(1, 255, (8, 3, 1, 28, 28), dtype=np.uint8))
    return stream.Batch(
        0, stacks[rows], torch.ones(8, 3, dtype=torch.bool)[rows], np.arange(8)[rows], np.arange(8)[rows]
    )


def gradients(method: DINOv2) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in method.plain_student.named_parameters() if p.grad is not None}


def test_accumulated_gradients_are_the_mean_of_those_of_the_parts() -> None:
    spec, method = build(2)
    terms = update.backward(spec, method, batch(), 0.05)
    together = gradients(method)
    alone, parts = [], []
    for rows in (slice(0, 4), slice(4, 8)):
        whole, method = build(1)
        parts.append(update.backward(whole, method, batch(rows), 0.05))
        alone.append(gradients(method))
    assert together.keys() == alone[0].keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["loss"], (parts[0]["loss"] + parts[1]["loss"]) / 2)
    assert len(terms["teacher_cls"]) == 16


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace(accumulate: int) -> None:
    """Student, teacher, centres and moments are bit for bit as before it, and go on from there."""
    spec, method = build(accumulate, "moving")
    optimiser = torch.optim.AdamW(parameter_groups(method.plain_student, 0.04, 0.9, 0.2), fused=True)
    schedule = training.rates(spec.optimiser, spec.loss, 10, 8)

    def step(number: int) -> update.Terms:
        return update.update(spec, method, optimiser, batch(), schedule.at(number))

    def state() -> list[torch.Tensor]:
        moments = [t for s in optimiser.state_dict()["state"].values() for t in s.values()]
        return [t.clone() for t in (*method.state_dict().values(), *moments)]

    assert step(1).finite
    with torch.no_grad():
        sound, weight = state(), method.plain_student.dino_head.mlp[0].weight
        kept = weight[0, 0].clone()
        weight[0, 0] = float("inf")
    spoilt = step(2)
    with torch.no_grad():
        weight[0, 0] = kept
    assert all(torch.equal(a, b) for a, b in zip(state(), sound, strict=True))
    assert not spoilt.finite and not np.isfinite(spoilt.scalars()["loss"])
    assert all(np.isfinite(value) for value in spoilt.metrics().values())
    assert "train/loss" not in spoilt.metrics() and "train/effective_rank" not in spoilt.metrics()
    assert step(2).finite
    assert not all(torch.equal(a, b) for a, b in zip(state(), sound, strict=True))


def test_a_gradient_alone_that_is_not_finite_counts() -> None:
    spec, method = build(1)
    optimiser = torch.optim.AdamW(parameter_groups(method.plain_student, 0.04, 0.9, 0.2), fused=True)
    method.plain_student.dino_head.mlp[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    now = training.rates(spec.optimiser, spec.loss, 10, 8).at(1)
    terms = update.update(spec, method, optimiser, batch(), now)
    assert np.isfinite(terms.scalars()["loss"]) and not terms.finite
    assert not np.isfinite(terms.scalars()["grad_norm_dino_head"])
    assert np.isfinite(terms.scalars()["grad_norm_backbone"])


def looped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spoilt: range, **changed: object
) -> tuple[Path | None, Position, list[tuple[int, bool]], list[dict[str, float]]]:
    """Eight steps of a worker alone, Ray's part left out; in `spoilt` ones the loss is not finite."""
    spec, method = build(1)
    spec = spec.model_copy(update={"steps": 8, **changed})
    spec = spec.model_copy(
        update={"compute": spec.compute.model_copy(update={"log_every": 1, "checkpoint_every": 4})}
    )
    corpus = corpora.corpus([shard_set(folder)])
    saved: list[tuple[int, bool]] = []
    monkeypatch.setattr(training, "_asked", lambda *_: None)
    monkeypatch.setattr(
        restart, "save", lambda m, o, position, writes, awaited: saved.append((position.step, awaited))
    )
    plain = update.backward

    def backward(*given: Any) -> dict[str, torch.Tensor]:
        terms = plain(*given)
        return terms | {"loss": terms["loss"] * (float("nan") if given[2].step in spoilt else 1.0)}

    monkeypatch.setattr(update, "backward", backward)
    optimiser = torch.optim.AdamW(parameter_groups(method.plain_student, 0.04, 0.9, 0.2), fused=True)
    position = Position()
    with journals.Journal(folder / "journal") as journal:
        run = training.Run(
            folder, torch.device("cpu"), 1, corpus, stream.order(Stream(lanes=4, window=3), 8, 0), journal
        )
        batches = iter([dataclasses.replace(batch(), step=number) for number in range(8)])
        clock, meter = (
            training.Stopwatch(),
            training._meter(spec, dict.fromkeys(meters.WORKER, "x"), 0, 1, folder / "journal"),
        )
        captured = training._loop(spec, method, optimiser, batches, position, run, clock, meter)
    assert clock.spent["step"] > 0.9 * sum(clock.spent.values()) - clock.spent["data_wait"] > 0
    return captured, position, saved, [dict(e.metrics) for e in journals.read(folder / "journal")]


def test_a_step_that_is_not_finite_ends_the_loop_after_a_checkpoint_of_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, position, saved, entries = looped(tmp_path, monkeypatch, range(6, 7))
    assert path and capture.read(path).step == 6 and capture.read(path).checkpoint == 6
    assert position == Position(6) and saved == [(4, False), (6, True)] and len(entries) == 6


def test_a_checkpoint_that_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, position, saved, _ = looped(tmp_path, monkeypatch, range(4, 5))
    assert position == Position(4) and saved == [(4, False)]


def test_steps_that_are_not_finite_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, position, saved, entries = looped(tmp_path, monkeypatch, range(5, 7), nonfinite="skip")
    assert path is None and position == Position(8, 2, 0) and saved == [(4, False), (8, True)]
    assert [entry["train/skipped"] for entry in entries] == [0, 0, 0, 0, 0, 1, 2, 2]
    assert ["train/loss" in entry for entry in entries] == [True] * 5 + [False] * 2 + [True]
    found = [capture.read(file) for file in sorted((tmp_path / capture.FOLDER).iterdir())]
    assert [(one.step, one.checkpoint, one.skipped) for one in found] == [(5, 4, True), (6, 4, True)]


def test_too_many_in_a_row_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, position, saved, _ = looped(tmp_path, monkeypatch, range(1, 8), nonfinite="skip")
    assert path and capture.read(path).step == 6 and not capture.read(path).skipped
    assert position == Position(6, 5, 5) and saved[-1] == (6, True)


def test_a_batch_that_the_parts_do_not_share_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulate"):
        Pretrain.model_validate({"cohorts": ["a"], "batch_size": 6, "accumulate": 4})


def test_momentum_follows_the_batch() -> None:
    """Averaging over as many stacks: two steps of half the batch forget what one step forgets."""
    half = scaled_momentum(0.99, 32, 64)
    assert half**2 == pytest.approx(0.99) and scaled_momentum(1.0, 32, 64) == 1.0
    spec = Optimiser(momentum=(0.99, 1.0), momentum_batch=64)
    assert training.rates(spec, Loss(), 10, 32).at(0).momentum == pytest.approx(half)
    assert training.rates(Optimiser(momentum=(0.99, 1.0)), Loss(), 10, 32).at(0).momentum == 0.99
