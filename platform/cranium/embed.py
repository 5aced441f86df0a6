"""A frozen backbone over a shard set, once: slice features every probe, fold and fraction then shares.

In: a finished shard set and an initialisation. Out: `<store>/embed/<init>_<cohort>-<hex>/features.parquet`, one row
per slice stack in the shard set's order, and `<init>_<cohort>_only_<contrasts>-<hex>` for each subset of contrasts that
alone is to be seen; `present` says what a row shows. `features` is float32, raw, [D] for `cls` and [D] for
`patch_mean`. Not float16: the CLS tokens of a random DINOv2 backbone differ by 1e-5 only, and halving would turn them
into noise.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from cranium import checkpoint, sessions, shardset, store, stream
from cranium.config import Experiment, Fill, Machine, UserError
from cranium.models import vit
from cranium.store import Artefact
from cranium.volume import shard

RECIPE = (
    3  # 3: the manifest says how; 2: position tables are resampled by the rule of the weights, not by timm's
)
FEATURES = "features.parquet"
IDENTITY = ["cohort", "subject", "session", "slice", "present"]

Progress = Callable[[int, int, str], None]
Subset = tuple[str, ...]  # of contrasts; (): whatever is there


def artefact(
    exp: Experiment,
    machine: Machine,
    init: str,
    shard_set: Artefact,
    pretrained: Artefact | None,
    subset: Subset = (),
) -> Artefact:
    """Where the features of this initialisation and shard set lie, of `subset` alone if one is given."""
    key = {
        "recipe": RECIPE,
        "embed": exp.embed.model_dump(exclude={"compute", "fill"}),
        "subset": subset,
        **origin(exp, machine, init, shard_set, pretrained),
    }
    name = f"{init.replace(':', '_')}_{shard_set.manifest()['cohort']}"
    if subset:
        name += f"_only_{'_'.join(subset)}"
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
        "fill": exp.fill,
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
    subsets: Sequence[Subset] = ((),),
) -> list[Artefact]:
    """Features of every stack of `shard_set` under `init`, for each subset of contrasts that alone is to be seen.

    Those that are there are not made again; what is missing takes one pass over the shards.
    """
    wanted = {subset: artefact(exp, machine, init, shard_set, pretrained, subset) for subset in subsets}
    missing = {subset: made for subset, made in wanted.items() if not made.done}
    if missing:
        _make(exp, machine, init, shard_set, pretrained, missing, progress)
    return list(wanted.values())


def _make(
    exp: Experiment,
    machine: Machine,
    init: str,
    shard_set: Artefact,
    pretrained: Artefact | None,
    wanted: Mapping[Subset, Artefact],
    progress: Progress | None,
) -> None:
    started = time.monotonic()
    manifest = shard_set.manifest()
    backbone, source = load(exp, machine, init, manifest, pretrained)
    with contextlib.ExitStack() as locks:
        for _, made in sorted((made.id, made) for made in wanted.values()):
            locks.enter_context(store.lock(machine.store, made.id))
            made.path.mkdir(parents=True, exist_ok=True)
        rows = _write(wanted, backbone, shard_set, manifest, exp, progress)
        if rows != manifest["counts"]["stacks"]:
            raise RuntimeError(f"{shard_set.id}: {rows} features for {manifest['counts']['stacks']} stacks")
        for subset, made in wanted.items():
            store.commit(
                made.path,
                {
                    **provenance(exp, init, shard_set, manifest, source),
                    "subset": list(subset),
                    "features": list(exp.embed.features),
                    "batch_size": exp.embed.batch_size,
                    "dim": backbone.embed_dim * len(exp.embed.features),
                    "rows": rows,
                    "seconds": round(time.monotonic() - started, 3),
                },
            )


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
        "fill": exp.fill,
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
        require_same_preprocessing(pretrained, manifest)
    return found


def require_same_preprocessing(pretrained: Artefact, manifest: dict[str, Any]) -> None:
    """Raises `UserError(PREPROCESSING)` unless a shard set was made as that which a backbone was pretrained on."""
    card = checkpoint.read_card(pretrained.path)
    for key in ("preprocessing_hash", "channels"):
        if card[key] != manifest[key]:
            raise UserError(
                "PREPROCESSING",
                f"{pretrained.id} was trained on {key} {card[key]}, cohort {manifest['cohort']} has {manifest[key]}; "
                "ingest it with the same settings",
            )


def _write(
    wanted: Mapping[Subset, Artefact],
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
    channels = manifest["channels"]
    shown = tuple(sessions.bits(subset or channels, channels) for subset in wanted)
    total, rows = manifest["counts"]["stacks"], 0
    writers: list[pq.ParquetWriter] = []
    with contextlib.ExitStack() as files:
        for table in mapped(items, Encoder, backbone, exp.embed.features, exp, shown):
            parts = [table.filter(pc.field("subset") == n).drop_columns("subset") for n in range(len(shown))]
            writers = writers or [
                files.enter_context(
                    pq.ParquetWriter(
                        made.path / FEATURES, parts[0].schema, compression="none", use_dictionary=False
                    )
                )
                for made in wanted.values()
            ]
            for writer, part in zip(writers, parts, strict=True):
                writer.write_table(part)
            rows += parts[0].num_rows
            if progress:
                progress(rows, total, manifest["cohort"])
    return rows


def mapped(
    items: list[dict[str, Any]],
    encoder: type[Encoder],
    backbone: torch.nn.Module,
    what: Any,
    exp: Experiment,
    *more: Any,
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
            exp.fill,
            *more,
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
    """A Ray Data actor: row groups in, feature rows out, for each of `shown` (bits of contrasts that are seen)."""

    def __init__(
        self,
        backbone: Any,
        features: tuple[str, ...],
        batch_size: int,
        threads: int | None,
        fill: Fill = "zero",
        shown: Sequence[int] = (sessions.EVERY,),
    ) -> None:
        import ray

        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(backbone, ray.ObjectRef):
            backbone = ray.get(backbone)
        self.backbone = backbone.to(self.device).eval()
        self.features, self.batch_size, self.fill, self.shown = features, batch_size, fill, shown

    def __call__(self, items: pa.Table) -> pa.Table:
        return pa.concat_tables(self._row_group(item["file"], item["index"]) for item in items.to_pylist())

    def read(self, file: str, index: int) -> tuple[pa.Table, torch.Tensor]:
        """Rows of a row group, checked, and their stacks as they were written."""
        table = shard.read_row_group(file, index, [*IDENTITY, "pixels", "crc"])
        shard.check_rows(table, f"{file}, row group {index}")
        return table, torch.from_numpy(shard.pixels(table).copy())

    def _row_group(self, file: str, index: int) -> pa.Table:
        table, stacks = self.read(file, index)
        present, parts = table["present"].to_numpy(), []
        made: dict[bytes, pa.Array] = {}  # by what is seen: hiding what a row lacks changes nothing
        for number, shown in enumerate(self.shown):
            there = (present & shown).astype(np.uint32)
            if there.tobytes() not in made:
                stacks_seen = sessions.seen(stacks, present, shown, self.fill).numpy()
                features = encode(self.backbone, stacks_seen, self.features, self.batch_size, self.device)
                raw = pa.array([row.tobytes() for row in features], pa.binary(features.shape[1] * 4))
                made[there.tobytes()] = raw
            part = table.select(IDENTITY).set_column(IDENTITY.index("present"), "present", pa.array(there))
            part = part.append_column("features", made[there.tobytes()])
            parts.append(part.append_column("subset", pa.array(np.full(len(part), number, np.int16))))
        return pa.concat_tables(parts)


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
