"""Patch tokens of a frozen backbone at chosen depths, once: what every decoder, fold and fraction then shares.

In: a finished shard set and an initialisation. Out: `<store>/embed/<init>_<cohort>_tokens-<hex>/`: `tokens.npy`,
float16 [rows, L, N, D] (L depths, N patches), which a fit maps into memory, and `rows.parquet`, which slice each row
is. Only sessions with a label map have rows. Tokens went through a layer norm, so float16 keeps three digits of each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cranium import checkpoint, embed, sessions, shardset, store
from cranium.config import Adaptation, Experiment, Machine, UserError
from cranium.embed import Progress
from cranium.models import decoder
from cranium.models.architectures import ARCHITECTURES
from cranium.store import Artefact

RECIPE = 2  # 2: the manifest says how absent contrasts are filled
TOKENS = "tokens.npy"
ROWS = "rows.parquet"
IDENTITY = ["subject", "session", "slice", "present"]


def artefact(
    exp: Experiment,
    machine: Machine,
    init: str,
    shard_set: Artefact,
    pretrained: Artefact | None,
    adaptation: Adaptation,
) -> Artefact:
    """Where the tokens of this initialisation and shard set lie, of the depths that this adaptation looks at."""
    key = {
        "recipe": RECIPE,
        "of": embed.origin(exp, machine, init, shard_set, pretrained),
        "seed": exp.embed.seed,
        "depths": depths(exp, init, pretrained, adaptation),
    }
    name = f"{init.replace(':', '_')}_{shard_set.manifest()['cohort']}_tokens"
    return store.artefact(machine.store, "embed", name, key)


def depths(
    exp: Experiment, init: str, pretrained: Artefact | None, adaptation: Adaptation
) -> tuple[int, ...]:
    """The blocks (from 1) of an initialisation's backbone that the decoder of an adaptation looks at."""
    assert exp.adapt
    arch = checkpoint.architecture(init, exp.arch, pretrained)
    try:
        return decoder.depths(exp.adapt.decoder.num_depths(adaptation), ARCHITECTURES[arch].depth)
    except ValueError as error:
        raise UserError("CONFIG", f"adapt.decoder.depths: {error} ({arch})") from None


def embed_tokens(
    exp: Experiment,
    machine: Machine,
    init: str,
    shard_set: Artefact,
    pretrained: Artefact | None,
    adaptation: Adaptation,
    progress: Progress | None = None,
) -> Artefact:
    """Tokens of every labelled session's stacks; returns at once when they are there."""
    made = artefact(exp, machine, init, shard_set, pretrained, adaptation)
    if made.done:
        return made
    started = time.monotonic()
    manifest = shard_set.manifest()
    backbone, source = embed.load(exp, machine, init, manifest, pretrained)
    labelled = pd.read_parquet(shard_set.path / "sessions.parquet")
    labelled = labelled[labelled["label_ml"].notna()]
    keys = set(zip(labelled["subject"], labelled["session"], strict=True))
    items = [
        {"file": file, "index": index, "rows": group["rows"]}
        for file, entry in zip(shardset.files(shard_set, manifest), manifest["shards"], strict=True)
        for index, group in enumerate(entry["row_groups"])
        if (group["subject"], group["session"]) in keys
    ]
    with store.lock(machine.store, made.id):
        made.path.mkdir(parents=True, exist_ok=True)
        wanted = depths(exp, init, pretrained, adaptation)
        shape = _write(made.path, backbone, items, exp, wanted, progress)
        store.commit(
            made.path,
            {
                **embed.provenance(exp, init, shard_set, manifest, source),
                "depths": list(wanted),
                "pixels": exp.ingest.size
                - exp.ingest.size % backbone.patch_size,  # a side that patches cover
                "shape": list(shape),
                "rows": shape[0],
                "seconds": round(time.monotonic() - started, 3),
            },
        )
    return made


def _write(
    folder: Path,
    backbone: Any,
    items: list[dict[str, Any]],
    exp: Experiment,
    depths: tuple[int, ...],
    progress: Progress | None,
) -> tuple[int, ...]:
    total = sum(item["rows"] for item in items)
    side = exp.ingest.size // backbone.patch_size
    shape = (total, len(depths), side * side, backbone.embed_dim)
    into = np.lib.format.open_memmap(folder / TOKENS, "w+", np.float16, shape)
    tables, row = [], 0
    for table in embed.mapped(items, Encoder, backbone, depths, exp):
        values = np.frombuffer(b"".join(table["tokens"].to_pylist()), np.float16)
        into[row : row + table.num_rows] = values.reshape(-1, *shape[1:])
        row += table.num_rows
        tables.append(table.select(IDENTITY))
        if progress:
            progress(row, total, "slices")
    into.flush()
    if row != total:
        raise RuntimeError(f"{folder}: {row} rows of tokens for {total} stacks")
    pq.write_table(pa.concat_tables(tables), folder / ROWS)
    return shape


class Encoder(embed.Encoder):
    """A Ray Data actor: row groups in, rows of tokens out."""

    def __init__(self, backbone: Any, depths: tuple[int, ...], *rest: Any) -> None:
        super().__init__(backbone, (), *rest)
        self.depths = depths

    def _row_group(self, file: str, index: int) -> pa.Table:
        table, stacks = self.read(file, index)
        filled = sessions.seen(stacks, table["present"].to_numpy(), sessions.EVERY, self.fill)
        tokens = encode(self.backbone, filled.numpy(), self.depths, self.batch_size, self.device)
        raw = pa.array([row.tobytes() for row in tokens], pa.large_binary())
        return table.select(IDENTITY).append_column("tokens", raw)


@torch.inference_mode()
def encode(
    backbone: Any, stacks: NDArray[Any], depths: Sequence[int], batch_size: int, device: torch.device
) -> NDArray[np.float16]:
    """Tokens float16 [n, L, N, D] of stacks uint8 [n, C, S, H, W]."""
    out = []
    for begin in range(0, len(stacks), batch_size):
        part = torch.from_numpy(np.array(stacks[begin : begin + batch_size])).to(device)
        part = embed.fit(part.flatten(1, 2), backbone.patch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            levels = backbone.at_depths(part.float() / 255, depths)
        out.append(torch.stack([level.patches for level in levels], 1).half().cpu().numpy())
    return np.concatenate(out)


def read(folder: Path) -> tuple[pd.DataFrame, NDArray[np.float16]]:
    """Which slice each row is, and the rows [n, L, N, D], mapped into memory."""
    rows = pd.read_parquet(folder / ROWS)
    tokens = np.load(folder / TOKENS, mmap_mode="r")
    return rows, tokens
