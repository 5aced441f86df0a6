"""One of several processes of `test_method.py`: a share of a global batch through DDP, results to a file.

Run as `worker.py RANK WORLD RENDEZVOUS OUT`.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from setups import batch, build, run
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel


def reduce(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def gather(x: Tensor) -> Tensor:
    return torch.cat(all_gather(x))


def main() -> None:
    rank, world, rendezvous, out = sys.argv[1:]
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=int(rank), world_size=int(world))
    torch.set_num_threads(1)
    stacks, present, rows = batch()
    own = slice(int(rank), None, int(world))
    results = {}
    for centering in ("sinkhorn", "moving"):
        method = build(centering)
        method.student = DistributedDataParallel(method.plain_student)
        results[centering] = run(method, stacks[own], present[own], rows[own], reduce=reduce, gather=gather)
    if rank == "0":
        torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
