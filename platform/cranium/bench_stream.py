"""The stream against its limits: memory copies, a plain scan of the same shards, other loaders, the paper's way."""

from __future__ import annotations

from collections.abc import Callable

from cranium import bench


class Spec(bench.Settings):
    rows: int = 10_000


def run(spec: Spec, say: Callable[[str], None]) -> bench.Result:
    """Measure and compare; see `docs/stream.md` for what each case is."""
    raise NotImplementedError
