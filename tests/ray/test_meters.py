"""What the numbers for Prometheus cost the thread that trains."""

from __future__ import annotations

import time

import pytest

from cranium import cluster, meters, training

pytestmark = pytest.mark.ray

LABELS = {"experiment": "e", "run": "r", "rank": "0"}
STEPS = 2000


def test_a_step_costs_less_than_a_tenth_of_a_millisecond(ray_cluster: cluster.Connection) -> None:
    loop = meters.Loop(LABELS, {}, done=0, planned=STEPS, stacks=8, attempts=1)
    entry = dict.fromkeys(meters.GAUGES, 1.0)
    spent = dict.fromkeys(training.PARTS, 0.0)
    begun = time.thread_time()
    for done in range(1, STEPS + 1):
        spent["step"] += 0.1
        loop.step(done, 0.1, spent)
        if done % 10 == 0:  # as `compute.log_every` has it
            loop.entry(entry)
    assert (time.thread_time() - begun) / STEPS < 1e-4
