"""A frozen backbone over a shard set, once: slice features every probe, fold and fraction then shares.

In: a finished shard set and an initialisation. Out: `<store>/embed/<init>_<cohort>-<hex>/features.parquet`, one row
per slice stack in the shard set's order; `features` is float32, raw, [D] for `cls` and [D] for `patch_mean`. Not
float16: the CLS tokens of a random DINOv2 backbone differ by 1e-5 only, and halving would turn them into noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cranium import checkpoint, sessions, shardset, store, stream
from cranium.config import Experiment, Machine, UserError
from cranium.models import vit
from cranium.store import Artefact
from cranium.volume import shard

RECIPE = (
    3  # 3: the manifest says how; 2: position tables are resampled by the rule of the weights, not by timm's
)
FEATURES = "features.parquet"
IDENTITY = ["cohort", "subject", "session", "slice", "present"]

Progress = Callable[[int, int, str], None]


def artefact(
    exp: Experiment, machine: Machine, init: str, shard_set: Artefact, pretrained: Artefact | None
) -> Artefact:
    """Where the features of this initialisation and shard set lie."""
    key = {"recipe": RECIPE, "embed": exp.embed, **origin(exp, machine, init, shard_set, pretrained)}
    name = f"{init.replace(':', '_')}_{shard_set.manifest()['cohort']}"
    return store.artefact(machine.store, "embed", name, key)


def origin(
    exp: Experiment, machine: Machine, init: str, shard_set: Artefact, pretrained: Artefact | None
) -> dict[str, Any]:
    """What shapes the tokens of this initialisation on this shard set: its part of an identity."""
    return {
        "arch": checkpoint.architecture(init, exp.arch, pretrained),
        "init": init,
        "weights": pretrained.id if pretrained else _weights(machine),
        "shards": [entry["sha256"] for entry in shard_set.manifest()["shards"]],
        **({"fill": exp.stream.fill} if exp.stream.fill != "zero" else {}),
    }


def _weights(machine: Machine) -> str | None:
    return checkpoint.identity(machine.weights) if machine.weights else None


def embed(
    exp: Experiment,
    machine: Machine,
    init: str,
    shard_set: Artefact,
    pretrained: Artefact | None = None,
    progress: Progress | None = None,
) -> Artefact:
    """Features of every stack of `shard_set` under `init`; returns at once when they are there."""
    made = artefact(exp, machine, init, shard_set, pretrained)
    if made.done:
        return made
    started = time.monotonic()
    manifest = shard_set.manifest()
    backbone, source = load(exp, machine, init, manifest, pretrained)
    with store.lock(machine.store, made.id):
        made.path.mkdir(parents=True, exist_ok=True)
        rows = _write(made.path / FEATURES, backbone, shard_set, manifest, exp, progress)
        if rows != manifest["counts"]["stacks"]:
            raise RuntimeError(f"{made.path}: {rows} features for {manifest['counts']['stacks']} stacks")
        store.commit(
            made.path,
            {
                **provenance(exp, init, shard_set, manifest, source),
                "features": list(exp.embed.features),
                "batch_size": exp.embed.batch_size,
                "dim": backbone.embed_dim * len(exp.embed.features),
                "rows": rows,
                "seconds": round(time.monotonic() - started, 3),
            },
        )
    return made


def provenance(
    exp: Experiment, init: str, shard_set: Artefact, manifest: dict[str, Any], source: checkpoint.Source
) -> dict[str, Any]:
    """What a manifest of embedded stacks says of where they come from: enough to embed another scan alike."""
    return {
        "stage": "embed",
        "init": init,
        "cohort": manifest["cohort"],
        "shard_set": shard_set.id,
        "channels": manifest["channels"],
        "source": asdict(source),
        "seed": exp.embed.seed,
        "fill": exp.stream.fill,
    }


def load(
    exp: Experiment, machine: Machine, init: str, manifest: dict[str, Any], pretrained: Artefact | None
) -> tuple[vit.Backbone, checkpoint.Source]:
    """The backbone of an initialisation for the stacks of a shard set, whose preprocessing must be its own."""
    channels, slices, size, _ = manifest["shape"]
    found = checkpoint.load_backbone(
        init,
        arch=exp.arch,
        in_channels=channels * slices,
        image_size=size,
        seed=exp.embed.seed,
        weights_file=machine.weights,
        pretrained=pretrained,
    )
    if pretrained:
        _same_preprocessing(pretrained, manifest)
    return found


def _same_preprocessing(pretrained: Artefact, manifest: dict[str, Any]) -> None:
    card = checkpoint.read_card(pretrained.path)
    for key in ("preprocessing_hash", "channels"):
        if card[key] != manifest[key]:
            raise UserError(
                "PREPROCESSING",
                f"{pretrained.id} was trained on {key} {card[key]}, cohort {manifest['cohort']} has {manifest[key]}; "
                "ingest it with the same settings",
            )


def _write(
    path: Path,
    backbone: torch.nn.Module,
    shard_set: Artefact,
    manifest: dict[str, Any],
    exp: Experiment,
    progress: Progress | None,
) -> int:
    items = [
        {"file": file, "index": index}
        for file, entry in zip(shardset.files(shard_set, manifest), manifest["shards"], strict=True)
        for index in range(len(entry["row_groups"]))
    ]
    total, rows = manifest["counts"]["stacks"], 0
    writer: pq.ParquetWriter | None = None
    try:
        for table in mapped(items, Encoder, backbone, exp.embed.features, exp):
            writer = writer or pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False)
            writer.write_table(table)
            rows += table.num_rows
            if progress:
                progress(rows, total, manifest["cohort"])
    finally:
        if writer:
            writer.close()
    return rows


def mapped(
    items: list[dict[str, Any]], encoder: type[Encoder], backbone: torch.nn.Module, what: Any, exp: Experiment
) -> Iterator[pa.Table]:
    """What actors of `encoder`, each with the backbone, make of the row groups `items`, in their order."""
    from ray.data import ExecutionOptions

    import ray

    compute = exp.embed.compute
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        encoder,
        fn_constructor_args=(
            ray.put(backbone),
            what,
            exp.embed.batch_size,
            compute.threads,
            exp.stream.fill,
        ),
        batch_size=None,
        batch_format="pyarrow",
        concurrency=compute.num_workers,
        num_cpus=compute.cpus_per_worker,
        num_gpus=compute.gpus_per_worker,
    )
    dataset.context.execution_options = ExecutionOptions(preserve_order=True)
    dataset.context.enable_progress_bars = False
    # Or what is found wrong with a shard comes wrapped, without its code.
    dataset.context.raise_original_map_exception = True
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except Exception as error:
        raise stream.explained(error) from error


class Encoder:
    """A Ray Data actor: row groups in, feature rows out."""

    def __init__(
        self,
        backbone: Any,
        features: tuple[str, ...],
        batch_size: int,
        threads: int | None,
        fill: sessions.Fill = "zero",
    ) -> None:
        import ray

        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(backbone, ray.ObjectRef):
            backbone = ray.get(backbone)
        self.backbone = backbone.to(self.device).eval()
        self.features, self.batch_size, self.fill = features, batch_size, fill

    def __call__(self, items: pa.Table) -> pa.Table:
        return pa.concat_tables(self._row_group(item["file"], item["index"]) for item in items.to_pylist())

    def read(self, file: str, index: int) -> tuple[pa.Table, NDArray[Any]]:
        """Rows of a row group, checked, and their stacks with absent contrasts filled."""
        table = shard.read_row_group(file, index, [*IDENTITY, "pixels", "crc"])
        shard.check_rows(table, f"{file}, row group {index}")
        stacks = shard.pixels(table)
        if self.fill == "replicate":  # as the stream filled them when the backbone was trained
            stacks = sessions.filled(
                torch.from_numpy(stacks.copy()), table["present"].to_numpy(), self.fill
            ).numpy()
        return table, stacks

    def _row_group(self, file: str, index: int) -> pa.Table:
        table, stacks = self.read(file, index)
        features = encode(self.backbone, stacks, self.features, self.batch_size, self.device)
        raw = pa.array([row.tobytes() for row in features], pa.binary(features.shape[1] * 4))
        return table.select(IDENTITY).append_column("features", raw)


@torch.inference_mode()
def encode(
    backbone: torch.nn.Module,
    stacks: np.ndarray,
    features: tuple[str, ...],
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    """Features float32 [n, len(features) * D] of stacks uint8 [n, C, S, H, W]."""
    out = []
    for begin in range(0, len(stacks), batch_size):
        part = torch.from_numpy(np.array(stacks[begin : begin + batch_size])).to(device)
        part = fit(part.flatten(1, 2), backbone.patch_size)  # type: ignore[arg-type]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = backbone(part.float() / 255)
        named = {"cls": tokens.cls, "patch_mean": tokens.patches.mean(1)}
        out.append(torch.cat([named[name].float() for name in features], 1).cpu().numpy())
    return np.concatenate(out)


def fit(stacks: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Centre-crop [B, C, H, W] to a multiple of the patch size (224 is one of 14 and of 16: then unchanged)."""
    size = stacks.shape[-1]
    cut = (size % patch_size) // 2
    keep = size - size % patch_size
    return stacks[..., cut : cut + keep, cut : cut + keep] if cut or keep != size else stacks


def read(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Identity columns and features float32 [rows, dim] of a finished artefact."""
    table = pq.read_table(folder / FEATURES)
    columns = {name: np.array(table[name].to_pylist()) for name in IDENTITY}
    raw = b"".join(table["features"].to_pylist())
    return columns, np.frombuffer(raw, np.float32).reshape(table.num_rows, -1)
