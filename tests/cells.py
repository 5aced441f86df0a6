"""Stages in this process, for tests that need a store with cells and no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest

from cranium import embed, ingest
from cranium.config import Experiment


@contextmanager
def in_place() -> Iterator[None]:
    """Tasks of ingest and actors of embed run here, one after another."""

    def sessions(items: list[dict[str, Any]], work: Callable[..., Any], job: Any) -> Iterator[dict[str, Any]]:
        return (work(item, job) for item in items)

    def row_groups(
        items: list[dict[str, Any]], encoder: Any, backbone: Any, what: Any, exp: Experiment, *more: Any
    ) -> Iterator[pa.Table]:
        made = encoder(backbone, what, exp.embed.batch_size, None, exp.fill, *more)
        return (made._row_group(item["file"], item["index"]) for item in items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "_on_ray", sessions)
        patch.setattr(embed, "mapped", row_groups)
        yield
