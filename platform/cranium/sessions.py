"""A session's stacks in memory, for what looks at people one by one: every row is checked, as in a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cranium import corpora, stream
from cranium.config import Fill, UserError
from cranium.store import Artefact
from cranium.volume import plan, shard, visit

EVERY = 2**32 - 1  # bits of `present`: whatever is there is seen


def bits(contrasts: Sequence[str], channels: Sequence[str]) -> int:
    """The bits of `present` that are these contrasts."""
    return sum(1 << channels.index(contrast) for contrast in contrasts)


def seen(stacks: Tensor, present: NDArray[Any], shown: int, fill: Fill) -> Tensor:
    """Stacks [B, C, S, H, W], of which only the contrasts in the bits `shown` are seen.

    `present` [B]: bits of what each row has. The others are filled as if they had never been scanned, so nothing of
    their pixels is left.
    """
    there = torch.from_numpy((present[:, None] & shown) >> np.arange(stacks.shape[1]) & 1).bool()
    if (present & (EVERY ^ shown)).any():
        stacks = stacks * there[:, :, None, None, None]
    return stream.replicate(stacks, there) if fill == "replicate" else stacks


def read(
    shard_set: Path,
    keys: Iterable[tuple[str, str]],
    *,
    most: int | None = None,
    fill: Fill = "zero",
    contrasts: Sequence[str] | None = None,
) -> Iterator[Tensor]:
    """Stacks uint8 [k, C, S, H, W] of each (subject, session), in their order: at most `most`, spread evenly.

    Only `contrasts` are seen; None: all that is there. Raises `UserError(SHARD_CORRUPT | SHARD_MISSING | NO_ROWS)`.
    """
    corpus = corpora.corpus([Artefact(shard_set)])
    shown = EVERY if contrasts is None else bits(contrasts, corpus.channels)
    of = {(session.subject, session.session): session for session in corpus.sessions}
    for key in keys:
        if key not in of:
            raise UserError("NO_ROWS", f"{shard_set} holds no stack of {key}; ingest it again")
        yield _session(of[key], most or of[key].rows, fill, shown)


def _session(session: plan.Session, most: int, fill: Fill, shown: int) -> Tensor:
    wanted = spread(session.rows, most)
    groups = session.row_groups
    items = [{"files": [g.file for g in groups], "indices": [g.index for g in groups]}]
    try:
        tables = list(visit.read(pa.Table.from_pylist(items)))
    except shard.ShardError as error:
        raise UserError(error.code, str(error), 1) from error
    pixels = torch.from_numpy(np.concatenate([shard.pixels(table) for table in tables])[wanted])
    present = np.concatenate([table["present"].to_numpy() for table in tables])[wanted]
    return seen(pixels, present, shown, fill)


def spread(rows: int, most: int) -> NDArray[np.int64]:
    """Which of a session's `rows` are used, at most `most`, spread evenly, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, min(most, rows)).round().astype(np.int64))
