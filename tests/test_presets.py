"""The pretraining presets: they validate, say what they cost, and continue gently."""

from __future__ import annotations

from pathlib import Path

import pytest

from cranium import config, costs, reading
from cranium.cards import load_card
from cranium.config import Experiment
from cranium.target import read_target

FOLDER = Path(__file__).parents[1] / "experiments" / "pretrain"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset(name: str) -> Experiment:
    return read_target(FOLDER / f"{name}.yaml", []).exp


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_states_the_cost_that_its_shapes_have(name: str) -> None:
    exp = preset(name)
    assert exp.name == name
    assert str(costs.pretraining(exp)) in exp.cost


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_there_is_each_size_from_scratch_and_continued(size: str) -> None:
    scratch, continued = (preset(f"vit{size}14_{kind}").pretrain for kind in ("scratch", "continued"))
    assert scratch and continued
    assert scratch.inits == ("scratch",) and continued.inits == ("brainfound",)
    assert scratch.arch == continued.arch and scratch.arch.startswith(
        {"s": "vit_small", "b": "vit_base"}.get(size, "vit_large")
    )
    assert scratch.optimiser.freeze_backbone == 0.0
    # Heads are warmed while the backbone stands still, and then it moves at a lower rate than from scratch.
    assert (
        continued.optimiser.freeze_backbone >= 0.05
        and continued.optimiser.warmup > continued.optimiser.freeze_backbone
    )
    assert continued.optimiser.lr <= scratch.optimiser.lr / 5
    assert continued.optimiser.momentum[0] > scratch.optimiser.momentum[0]
    assert set(continued.cohorts) == set(scratch.cohorts)


def test_show_says_steps_images_operations_and_hours() -> None:
    facts = costs.estimate(preset("vits14_brainfound_clean"))
    assert facts["steps"] == 60_000 and facts["stacks seen"] == 60_000 * 256
    each = costs.pretraining(preset("vits14_brainfound_clean"))
    assert facts["FLOPs"].startswith(f"{2 * each.flops:.2e} (157 GFLOPs")  # 16,384 prototypes: 166 at 65,536
    assert (
        "A100" in facts["GPU-hours"]
        and "H100" in facts["GPU-hours"]
        and "40% of its peak" in facts["GPU-hours"]
    )


def test_more_channels_cost_a_wider_patch_embedding_and_nothing_else() -> None:
    """Of each slice of a contrast, one product of a patch's pixels with its weights; twice that forwards."""
    alone, both = (
        costs.pretraining(reading.load_experiment(FOLDER / "vits14_scratch.yaml", [f"ingest.stack={stack}"]))
        for stack in ("contrasts", "both")
    )
    spec = preset("vits14_scratch")
    assert spec.pretrain
    crops, per_patch = spec.pretrain.crops, 2 * 6 * 14**2 * 384  # 9 channels instead of 3
    large, small = ((side // 14) ** 2 for side in (crops.global_size, crops.local_size))
    more = both.flops_per_image - alone.flops_per_image
    # The teacher sees the global views; the student all of them, forwards and twice that backwards.
    assert more == pytest.approx(per_patch * (2 * large + 3 * (2 * large + crops.num_local * small)))


def test_costs_are_those_of_every_kind_of_stack() -> None:
    kinds = ["sweep.stack=[contrasts,neighbours,both]", "sweep.neighbours_of=T1w"]
    exp = reading.load_experiment(FOLDER / "vits14_brainfound_clean.yaml", kinds)
    alone = [
        costs.estimate(reading.load_experiment(FOLDER / "vits14_brainfound_clean.yaml", keys))
        for keys in (
            [],
            ["ingest.stack=neighbours", "ingest.contrasts=[T1w]"],
            ["ingest.stack=both"],
        )
    ]
    facts = costs.estimate(exp)
    for key in ("steps", "stacks seen", "cells"):
        assert int(facts[key]) == sum(int(one[key]) for one in alone)
    flops = [float(one["FLOPs"].split(" (")[0]) for one in (facts, *alone)]
    assert flops[0] == pytest.approx(sum(flops[1:]), rel=0.01)
    assert facts["kinds of stack"].endswith("neighbours 1 x 3 x 224 x 224, both 3 x 3 x 224 x 224")
    assert "kinds of stack" not in alone[0]


def test_pretraining_on_blank_slices_is_refused() -> None:
    with pytest.raises(config.UserError, match="min_brain"):
        reading.load_experiment(FOLDER / "vits14_scratch.yaml", ["ingest.min_brain=0"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_looks_at_its_teacher_on_a_cohort_of_its_corpus(name: str) -> None:
    """A cohort that a task tests on is refused by `Experiment` itself."""
    spec = preset(name).pretrain
    assert spec and spec.compute.monitor
    looks = spec.compute.monitor
    assert looks.cohort in spec.cohorts and 5 <= spec.steps / looks.every <= 30
    assert set(looks.labels) <= set(load_card(looks.cohort).labels)
