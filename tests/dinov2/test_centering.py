"""Sinkhorn-Knopp and the moving centre: marginals, loops, and equality over any split of the rows."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cranium.dinov2.centering import MovingCentre, sinkhorn


class Workers:
    """An all-reduce between threads, for callables that reduce in the same order."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=10)
        self.slots: list[Tensor] = [torch.empty(0)] * count

    def run(self, job: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
        results: list[Tensor] = [torch.empty(0)] * len(self.slots)

        def work(rank: int) -> None:
            def reduce(x: Tensor) -> Tensor:
                self.slots[rank] = x
                self.barrier.wait()
                total = torch.stack(self.slots).sum(0)
                self.barrier.wait()
                return total

            results[rank] = job(rank, reduce)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.slots))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def _logits(rows: int = 12, prototypes: int = 5) -> Tensor:
    return torch.randn(rows, prototypes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_rows_sum_to_one_and_prototypes_get_equal_mass() -> None:
    q = sinkhorn(_logits(), 0.5, iterations=200)
    torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(q.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64))
    torch.testing.assert_close(sinkhorn(_logits(), 0.5).sum(1), torch.ones(12, dtype=torch.float64))


def test_three_rounds_are_the_loop_of_the_paper() -> None:
    logits = _logits()
    q = torch.exp(logits / 0.3).T  # [K, B], as in SwAV
    q = q / q.sum()
    for _ in range(3):
        for k in range(5):
            q[k] = q[k] / q[k].sum() / 5
        for b in range(12):
            q[:, b] = q[:, b] / q[:, b].sum() / 12
    torch.testing.assert_close(sinkhorn(logits, 0.3), (q * 12).T)


def test_a_shift_of_all_scores_changes_nothing_and_large_ones_do_not_overflow() -> None:
    logits = _logits().float()
    torch.testing.assert_close(sinkhorn(logits + 64.0, 0.5), sinkhorn(logits, 0.5), rtol=0, atol=1e-4)
    assert sinkhorn(logits * 1e4, 0.01).isfinite().all()
    assert sinkhorn(logits.bfloat16(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("sizes", [(6, 6), (9, 3), (12, 0), (1, 4, 7)])
def test_sinkhorn_does_not_depend_on_where_the_rows_are(sizes: tuple[int, ...]) -> None:
    logits = _logits()
    parts = logits.split(list(sizes))
    got = Workers(len(sizes)).run(lambda rank, reduce: sinkhorn(parts[rank], 0.3, reduce=reduce))
    torch.testing.assert_close(torch.cat(got), sinkhorn(logits, 0.3))


@pytest.mark.parametrize("sizes", [(6, 6), (9, 3), (12, 0)])
def test_the_centre_is_the_weighted_mean_of_all_rows(sizes: tuple[int, ...]) -> None:
    logits = _logits().float()
    parts = logits.split(list(sizes))

    def job(rank: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        centre = MovingCentre(5, momentum=0.9)
        first = centre(parts[rank], 0.5, reduce)
        torch.testing.assert_close(first, torch.softmax(parts[rank] / 0.5, dim=-1))
        return torch.cat([centre.centre[None], centre(parts[rank], 0.5, reduce)])

    expected = 0.1 * logits.mean(0)
    for rank, got in enumerate(Workers(len(sizes)).run(job)):
        torch.testing.assert_close(got[0], expected)
        torch.testing.assert_close(got[1:], torch.softmax((parts[rank] - expected) / 0.5, dim=-1))


def test_no_row_anywhere_leaves_the_centre() -> None:
    centre = MovingCentre(3)
    centre.centre = torch.ones(3)
    assert centre(torch.zeros(0, 3), 0.1).shape == (0, 3)
    assert centre.centre.tolist() == [1.0, 1.0, 1.0]
