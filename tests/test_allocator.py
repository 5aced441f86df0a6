"""A process that keeps its memory faults once, not in every step."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS, MIB = 20, 64
CODE = f"""
import resource, sys, torch
from cranium import allocator
if sys.argv[1] == "keep":
    assert allocator.keep_freed()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({MIB} << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(10):  # the heap finds its size
    faults()
print(sum(faults() for _ in range({STEPS})))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's switch")
def test_a_block_that_is_asked_for_again_is_made_once() -> None:
    asked = {
        how: int(subprocess.check_output([sys.executable, "-c", CODE, how], text=True))
        for how in ("keep", "plain")
    }
    pages = STEPS * MIB * 256  # of 4 KiB; fewer faults than pages where the kernel makes several at once
    assert asked["keep"] < pages / 100
    assert asked["plain"] > 4 * asked["keep"] + STEPS  # the test would see it
