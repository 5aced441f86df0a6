"""A session's stacks in memory, for what looks at people one by one: every row is checked, as in a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cranium import corpora, stream
from cranium.config import UserError
from cranium.store import Artefact
from cranium.volume import plan, shard, visit

Fill = Literal["zero", "replicate"]  # of absent contrasts


def read(
    shard_set: Path, keys: Iterable[tuple[str, str]], *, most: int | None = None, fill: Fill = "zero"
) -> Iterator[Tensor]:
    """Stacks uint8 [k, C, S, H, W] of each (subject, session), in their order: at most `most`, spread evenly.

    Raises `UserError(SHARD_CORRUPT | SHARD_MISSING | NO_ROWS)`.
    """
    corpus = corpora.corpus([Artefact(shard_set)])
    of = {(session.subject, session.session): session for session in corpus.sessions}
    for key in keys:
        if key not in of:
            raise UserError("NO_ROWS", f"{shard_set} holds no stack of {key}; ingest it again")
        yield _session(of[key], most or of[key].rows, fill)


def _session(session: plan.Session, most: int, fill: Fill) -> Tensor:
    wanted = spread(session.rows, most)
    groups = session.row_groups
    items = [{"files": [g.file for g in groups], "indices": [g.index for g in groups]}]
    try:
        tables = list(visit.read(pa.Table.from_pylist(items)))
    except shard.ShardError as error:
        raise UserError(error.code, str(error), 1) from error
    pixels = torch.from_numpy(np.concatenate([shard.pixels(table) for table in tables])[wanted])
    bits = np.concatenate([table["present"].to_numpy() for table in tables])[wanted]
    return filled(pixels, bits, fill)


def spread(rows: int, most: int) -> NDArray[np.int64]:
    """Which of a session's `rows` are used, at most `most`, spread evenly, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, min(most, rows)).round().astype(np.int64))


def filled(stacks: Tensor, bits: NDArray[Any], fill: Fill) -> Tensor:
    """Stacks [B, C, S, H, W] with absent contrasts as training saw them; `bits` [B] of `present`, as shards have it."""
    if fill == "zero":
        return stacks
    present = torch.from_numpy(bits[:, None] >> np.arange(stacks.shape[1]) & 1).bool()
    return stream.replicate(stacks, present)
