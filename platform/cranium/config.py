"""Every knob of Cranium, frozen and typed, in the order data flows; and what identifies a piece of work.

`reading.py` makes them from YAML. Nothing here imports torch, Ray or MLflow, so `cranium check` answers in seconds.
Fields under `compute:` say how fast work is done, never what comes out, and are left out of every fingerprint;
machine facts (`Machine`) are never part of a fingerprint at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Contrast = Literal["T1w", "T2w", "FLAIR", "T1ce", "PDw"]
Fill = Literal[
    "zero", "replicate"
]  # of absent contrasts: zero and marked, or a copy of the first that is there
Stack = Literal["contrasts", "neighbours", "both"]
Init = str  # one of INITS, or run:<id>
INITS = ("random", "imagenet", "dinov2", "scratch", "brainfound", "covariates", "volumes", "cnn")
Adaptation = Literal["linear", "knn", "attention", "finetune", "lora", "conv"]
# task -> what it can be learnt by from a backbone.
ADAPTATIONS: Mapping[str, tuple[Adaptation, ...]] = {
    "classification": ("linear", "knn", "attention", "finetune", "lora"),
    "segmentation": ("linear", "conv", "finetune", "lora"),
}
# On features that are computed once; the others train a network from the pixels.
FROZEN: frozenset[Adaptation] = frozenset({"linear", "knn", "attention", "conv"})
# Rows of the table without a backbone, and the one way each is learnt: they stand whatever `sweep.adaptation` says.
WITHOUT_BACKBONE: Mapping[str, Adaptation] = {"covariates": "linear", "volumes": "linear", "cnn": "finetune"}
# init -> what its pretraining starts from.
PRETRAINED_HERE: Mapping[str, str] = {"scratch": "random", "brainfound": "dinov2"}
RUN = r"run:[A-Za-z0-9][A-Za-z0-9._@-]*"  # an artefact's name or hex, an MLflow run id, or <model>@<alias>
NAME = r"^[a-z][a-z0-9_]*$"


class UserError(Exception):
    """Something the user can mend. Printed as one line `CODE: message`; the command ends with `exit_code`."""

    def __init__(self, code: str, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.code = code
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:  # crosses process borders (Ray) whole
        return (type(self), (self.code, str(self), self.exit_code))


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ---- stages, in the order data flows -------------------------------------------------------------------------------


class Compute(Frozen):
    """How a stage uses the machine. Never shapes a result, so never part of an identity."""

    num_workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    threads: int | None = Field(None, ge=1)  # torch threads a worker; None: cpus_per_worker


class Demo(Frozen):
    """The demo cohorts, simulated from real heads (`demo.py`)."""

    source: Literal["heads", "template"] = "heads"
    seed: int = 0
    subjects_per_cell: int = Field(2, ge=1)  # per head x site x condition x pattern of missing contrasts
    ssl_subjects_per_head: int = Field(12, ge=1)
    external_subjects_per_cell: int = Field(2, ge=1)
    sites: int = Field(2, ge=1, le=4)
    working_spacing_mm: float = Field(2.0, gt=0.5, le=4)
    conditions: tuple[Literal["control", "lesion", "atrophy"], ...] = ("control", "lesion", "atrophy")


MaskWay = Literal["supplied", "deepbet", "command", "otsu"]
MNI_SHA256 = (
    "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6"  # of nilearn's MNI152 2009a T1 brain
)


class Slices(Frozen):
    """Which slices of a session become rows, counted from the lowest slice with brain."""

    rule: Literal["brain", "range"] = "brain"  # brain: see min_brain; range: `count` at most, from `first` on
    first: int = Field(10, ge=0)
    count: int = Field(140, ge=1)
    every: int = Field(1, ge=1)  # of those, every n-th


class Preprocessing(Frozen):
    """How a scan becomes slice stacks. Travels in every manifest and checkpoint; a different one is refused."""

    contrasts: tuple[Contrast, ...] = ("T1w", "T2w", "FLAIR")
    # contrasts: a slice of each; neighbours: several slices of the one contrast; both: several of each.
    stack: Stack = "contrasts"
    neighbours: int = Field(3, ge=1)  # slices of each contrast, unless stack is contrasts
    size: int = Field(224, ge=28, multiple_of=2)  # pixels, in plane
    spacing_mm: float = Field(1.0, gt=0)  # in plane
    slice_spacing_mm: float = Field(1.0, gt=0)
    percentiles: tuple[float, float] = (0.5, 99.5)  # of the voxels inside the brain mask, per volume
    dtype: Literal["uint8", "uint16"] = "uint8"  # of a pixel; the models here take uint8
    orientation: Literal["agree", "sform", "qform", "assume_ras"] = (
        "agree"  # where a header contradicts itself
    )
    # Ways to a brain mask, the first that gives one: docs/preprocessing.md.
    mask: tuple[MaskWay, ...] = ("supplied", "deepbet", "otsu")
    mask_tool: str | None = None  # name and version of the program of mask: command
    mask_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")  # of its weights
    align: Literal["none", "grids_differ", "always"] = (
        "grids_differ"  # rigid, contrasts of a session onto the first
    )
    space: Literal["native", "mni"] = "native"  # mni: affine onto a template, on its axes
    template_sha256: str = Field(MNI_SHA256, pattern="^[0-9a-f]{64}$")
    bias_correction: Literal["none", "n4"] = "none"
    slices: Slices = Slices()
    min_brain: float = Field(0.05, ge=0, le=1)  # keep a slice when at least this share of its pixels is brain
    channel_map: dict[Contrast, Contrast] = {}  # e.g. {T1w: T1ce}: fill a T1w channel with T1ce, recorded
    missing: Literal["zero"] = "zero"

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.contrasts)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[C, S, H, W] of a stack."""
        return (len(self.contrasts), self.depth, self.size, self.size)

    @property
    def depth(self) -> int:
        """Slices of each contrast in a stack."""
        return 1 if self.stack == "contrasts" else self.neighbours

    @field_validator("mask", mode="before")
    @classmethod
    def _one_or_several(cls, ways: Any) -> Any:
        return (ways,) if isinstance(ways, str) else ways

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.mask or len(set(self.mask)) != len(self.mask):
            raise ValueError("mask needs one way or several different ones, e.g. [supplied, deepbet, otsu]")
        if ("command" in self.mask) != (self.mask_tool is not None):
            raise ValueError("mask: command and mask_tool (the program's name and version) go together")
        if self.stack == "neighbours" and len(self.contrasts) != 1:
            raise ValueError(
                "stack: neighbours takes exactly one contrast; name it in `contrasts`, or say stack: both"
            )
        if self.depth % 2 == 0:
            raise ValueError(
                f"neighbours: {self.neighbours} slices have no middle one, whose labels a stack has; make it odd"
            )
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("percentiles must be two rising numbers between 0 and 100")
        return self


class Ingest(Preprocessing):
    """`cranium ingest`: cohorts -> shards."""

    cohorts: tuple[str, ...] = ()
    identifiers: Literal["plain", "salted"] = "plain"  # of subjects in every output: see docs/privacy.md
    phi: Literal["note", "reject"] = "note"  # text beside a scan that may identify a person (PHI_SUSPECT)
    codec: Literal["none", "lz4", "zstd"] = "none"
    shard_mb: int = Field(96, ge=1, le=512)
    compute: Compute = Compute()

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(**{name: getattr(self, name) for name in Preprocessing.model_fields})


class Stream(Frozen):
    """The order rows are read in (`volume/plan.py`)."""

    lanes: int = Field(8, ge=1)  # the world size must divide it
    window: int = Field(8, ge=1)  # row groups a lane mixes at a time; more where a batch needs more sessions
    max_rows_per_session: int = Field(2, ge=1)  # in one global batch
    min_slice_gap: int = Field(1, ge=1)  # between rows of one session in one batch
    weights: dict[str, float] = {}  # cohort -> share of rows; default: by size
    temperature: float | None = Field(None, ge=1)  # shares proportional to size^(1/temperature); 1: by size
    cohorts: tuple[str, ...] = ()  # only these of the cohorts that are trained on
    contrasts: tuple[Contrast, ...] = ()  # only sessions that have all of these
    subjects: dict[str, tuple[str, ...]] = {}  # cohort -> the subjects of a split; cohorts not named: all
    fill: Fill = "zero"  # of absent contrasts

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.weights and self.temperature is not None:
            raise ValueError("give cohorts weights or a temperature, not both")
        if any(weight < 0 for weight in self.weights.values()) or (
            self.weights and not any(self.weights.values())
        ):
            raise ValueError("weights are shares: none below 0, and one above")
        return self


class Crops(Frozen):
    """Views of a stack. Sizes in pixels must be multiples of the patch size."""

    num_global: Literal[2] = 2
    global_size: int = 224
    global_scale: tuple[float, float] = (0.32, 1.0)
    num_local: int = Field(8, ge=0)
    local_size: int = 98
    local_scale: tuple[float, float] = (0.05, 0.32)
    flip_probability: float = Field(0.5, ge=0, le=1)
    gamma: float = Field(0.3, ge=0)
    contrast: float = Field(0.2, ge=0)
    bias_field: float = Field(0.2, ge=0)
    blur: float = Field(1.0, ge=0)  # largest sigma, pixels
    noise: float = Field(0.02, ge=0)  # largest standard deviation, of the full range
    contrast_dropout: float = Field(0.1, ge=0, lt=1)
    min_foreground: float = Field(0.3, ge=0, lt=1)


class Loss(Frozen):
    """Heads and terms of the DINOv2 objective (Oquab et al. 2023, arXiv 2304.07193)."""

    prototypes: int = Field(65536, ge=2)
    head_hidden: int = 2048
    head_bottleneck: int = 256
    shared_head: bool = True
    unit_prototypes: bool = (
        True  # false: their norms learn, as in the official code; less stable on small batches
    )
    ibot_weight: float = Field(1.0, ge=0)
    koleo_weight: float = Field(0.1, ge=0)
    centering: Literal["sinkhorn", "moving"] = "sinkhorn"
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_probability: float = 0.5


class Optimiser(Frozen):
    lr: float = Field(1e-3, gt=0)  # at a global batch of 1024, scaled by the square root of batch_size / 1024
    min_lr: float = 1e-6
    weight_decay: tuple[float, float] = (0.04, 0.4)
    momentum: tuple[float, float] = (0.992, 1.0)
    # The batch it was meant for: momentum ** (batch_size / this)
    momentum_batch: int | None = Field(None, ge=1)
    layer_decay: float = Field(0.9, gt=0, le=1)
    patch_embed_lr: float = 0.2
    warmup: float = Field(0.08, ge=0, lt=1)  # share of the steps
    freeze_last_layer: float = Field(0.01, ge=0, lt=1)  # share of the steps
    freeze_backbone: float = Field(0.0, ge=0, lt=1)  # share of the steps; warms the heads when continuing
    temperature_warmup: float = Field(0.24, ge=0, lt=1)
    clip: float = 3.0
    beta2: float = 0.999


Arch = Literal[
    "vit_tiny_patch14",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_large_patch14_reg4_dinov2",
]


class Monitor(Frozen):
    """A look at the teacher every so many steps of training, on a cohort that no task tests on."""

    cohort: str
    every: int = Field(1000, ge=1)  # steps
    stacks: int = Field(600, ge=50)  # at most, spread evenly over the sessions
    labels: tuple[str, ...] = ()  # of the cohort's card; slice position and contrast are always looked at
    cpus: float = Field(0.0, ge=0)  # of the cluster, kept for it; 0: beside the training, on what is left
    gpus: float = Field(0.0, ge=0)
    threads: int = Field(1, ge=1)


class PretrainCompute(Compute):
    tuned: bool = True  # False: the plain forms of the same sums, to compare with
    compile: bool = False
    keep_checkpoints: int = Field(2, ge=1)
    checkpoint_every: int = Field(500, ge=1)  # steps
    log_every: int = Field(10, ge=1)
    max_failures: int = Field(2, ge=0)
    stall_seconds: float = Field(600, gt=0)  # without a move of any worker: whoever holds them up is ended
    prefetch_batches: int = Field(2, ge=1)
    read_cpus: float = Field(1.0, ge=0)  # of a worker's node, held by the tasks that read for it
    monitor: Monitor | None = None  # it only looks: what comes out of the training does not depend on it


class Pretrain(Frozen):
    """`cranium pretrain`: DINOv2 distillation on the stacks of the named cohorts."""

    cohorts: tuple[str, ...] = Field(min_length=1)
    inits: tuple[Literal["scratch", "brainfound"], ...] = ("brainfound",)
    arch: Arch = "vit_large_patch14_dinov2"
    drop_path: float = Field(0.0, ge=0, lt=1)
    position: Literal["dinov2", "timm", "transformers"] | None = (
        None  # how position tables are resampled; None: as
    )
    # the architecture's released weights were made (docs/weights.md)
    steps: int = Field(10_000, ge=1)
    batch_size: int = Field(256, ge=1)  # global, over all workers
    # Parts a worker's share of a batch is worked in, their gradients added up. Sinkhorn, the centre and KoLeo then see
    # a part at a time, so this is not the loss of the whole batch, and is no setting of `compute`.
    accumulate: int = Field(1, ge=1)
    precision: Literal["fp32", "bf16"] = "bf16"  # of the networks; losses are in fp32
    nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite: docs/pretraining.md
    seed: int = 0
    # A folder of <store>/pretrain: its last checkpoint, under these settings.
    continue_from: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    crops: Crops = Crops()
    loss: Loss = Loss()
    optimiser: Optimiser = Optimiser()
    compute: PretrainCompute = PretrainCompute()

    @model_validator(mode="after")
    def _patches(self) -> Self:
        for name in ("global_size", "local_size"):
            if getattr(self.crops, name) % 14:
                raise ValueError(f"crops.{name} must be a multiple of the patch size 14")
        if self.batch_size % (self.compute.num_workers * self.accumulate):
            raise ValueError("batch_size must be a multiple of compute.num_workers x accumulate")
        return self


class Embed(Frozen):
    """`cranium embed`: the frozen backbone over every stack, once."""

    features: tuple[Literal["cls", "patch_mean"], ...] = ("cls", "patch_mean")
    batch_size: int = Field(64, ge=1)
    seed: int = 0  # of the random initialisation
    fill: Fill | None = None  # of absent and hidden contrasts, of fine-tuning too; None: as stream.fill
    compute: Compute = Compute()


class Classification(Frozen):
    """Subject-level disease detection from slices: `label` and `classes` are names in the cohort's card."""

    task: Literal["classification"]
    name: str = Field(pattern=NAME)
    cohort: str
    label: str
    classes: tuple[str, ...] = Field(min_length=2)
    external: tuple[str, ...] = ()
    pool: Literal["mean", "max", "attention"] = "mean"  # of slices; `linear` and `knn`: mean or max

    @model_validator(mode="after")
    def _external_is_external(self) -> Self:
        if self.cohort in self.external:
            raise ValueError(f"cohort {self.cohort} is named as its own external cohort")
        return self


class Segmentation(Frozen):
    """Label maps from slices: `classes` are names in the cohort's card; what is in none of them is background."""

    task: Literal["segmentation"]
    name: str = Field(pattern=NAME)
    cohort: str
    classes: dict[str, tuple[str, ...]] = Field(min_length=1)  # ours -> the card's, each in one class at most
    regions: dict[str, tuple[str, ...]] = {}  # unions of classes, scored beside them; they may overlap
    external: tuple[str, ...] = ()
    tolerance_mm: float = Field(2.0, gt=0)  # of surface Dice

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cohort in self.external:
            raise ValueError(f"cohort {self.cohort} is named as its own external cohort")
        if unknown := sorted({c for parts in self.regions.values() for c in parts} - set(self.classes)):
            raise ValueError(f"regions name {unknown}, which `classes` does not declare")
        if twice := sorted(set(self.regions) & set(self.classes)):
            raise ValueError(f"{twice} are classes and regions; give the regions other names")
        if len(self.classes) > 254:
            raise ValueError("more than 254 classes do not fit a label map of bytes")
        return self


Task = Annotated[Classification | Segmentation, Field(discriminator="task")]


class Augment(Frozen):
    """Changes of a subject's slices in fine-tuning, all its slices alike. Never a crop that is stretched to size."""

    flip: float = Field(0.5, ge=0, le=1)  # left and right; 0 where the side of a finding matters
    rotate: float = Field(10.0, ge=0, le=180)  # degrees, at most
    scale: float = Field(0.1, ge=0, lt=1)  # at most, as a share
    shift: float = Field(0.05, ge=0, lt=1)  # at most, as a share of the width
    gamma: float = Field(0.3, ge=0)
    contrast: float = Field(0.2, ge=0)
    bias_field: float = Field(0.2, ge=0)
    blur: float = Field(1.0, ge=0)
    noise: float = Field(0.02, ge=0)


class TunedDecoder(Frozen):
    """A segmentation learnt from the pixels: `finetune` and `lora` under the decoder of `conv`, `cnn` by a U-Net."""

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(8, ge=2)  # slices
    lr: float = Field(1e-4, gt=0)  # of the backbone's last layer; the decoder has its own
    lora_lr: float = Field(1e-3, gt=0)
    cnn_lr: float = Field(1e-3, gt=0)
    layer_decay: float = Field(0.65, gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)  # of finetune; the same in all blocks
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)  # updates are scaled by alpha / rank
    precision: Literal["bf16", "fp32"] = "bf16"  # on a GPU; the CPU takes fp32
    augment: Augment = Augment()  # of a slice and the labels drawn on it
    # What finetune and cnn learnt, for `cranium predict`: as adapt.finetune.keep. LoRA's is always kept.
    keep: bool = False


class Decoder(Frozen):
    """What turns patch tokens into label maps, and how it is trained: nothing of it is tuned on the test subjects."""

    # How many depths of the ViT, spread evenly, the last among them; None: 1 for linear, else 4.
    depths: int | None = Field(None, ge=1)
    width: int = Field(64, ge=8)  # of all but linear
    steps: int = Field(500, ge=1)
    batch_size: int = Field(16, ge=2)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    foreground: float = Field(0.5, gt=0, le=1)  # share of a batch drawn from slices that hold a class
    tuned: TunedDecoder = TunedDecoder()

    def num_depths(self, adaptation: Adaptation) -> int:
        return self.depths or (1 if adaptation == "linear" else 4)


class Probe(Frozen):
    """Linear probe; its regularisation is chosen inside the cell's own labelled subjects only."""

    c_grid: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    inner_folds: int = Field(3, ge=2)


class Knn(Frozen):
    """Weighted k-NN on standardised features; declared, so nothing is tuned."""

    k: int = Field(20, ge=1)  # cut to the number of labelled subjects
    temperature: float = Field(0.07, gt=0)


class Attention(Frozen):
    """Gated attention over cached slice features; weight decay and steps are chosen as the probe's regularisation."""

    hidden: int = Field(128, ge=1)
    lr: float = Field(5e-3, gt=0)
    weight_decay: tuple[float, ...] = Field((1e-2, 1e-1, 1.0), min_length=1)
    steps: int = Field(200, ge=1)  # at most
    look_every: int = Field(10, ge=1)  # steps
    batch_size: int = Field(64, ge=1)  # subjects
    inner_folds: int = Field(3, ge=2)


Setting = Literal[
    "epochs",
    "batch_size",
    "slices",
    "blr",
    "min_lr",
    "warmup",
    "layer_decay",
    "weight_decay",
    "drop_path",
    "label_smoothing",
    "class_weights",
    "rank",
    "alpha",
]
Choice = Annotated[float | str, Field(union_mode="left_to_right")]


class Range(Frozen):
    """From `low` to `high`, both included, in whole numbers where the setting is one."""

    low: float
    high: float
    log: bool = False  # even on a log scale

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high; these are {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError("log: true wants low above 0")
        return self


class Asha(Frozen):
    """Asynchronous successive halving (Li et al. 2020), in shares of a trial's own schedule.

    At `grace`, grace x reduction, ... a trial ends unless it is among the best 1 / reduction that came so far.
    """

    grace: float = Field(0.3, gt=0, le=1)
    reduction: int = Field(3, ge=2)


class Search(Frozen):
    """Better settings for each cell, found inside its own labelled subjects: docs/adapting.md."""

    trials: int = Field(ge=2)  # of every cell, those that ASHA ends early among them
    space: dict[Setting, Range | tuple[Choice, ...]] = Field(min_length=1)
    asha: Asha | None = Asha()  # null: every trial goes to its end
    seed: int = 0


class Finetune(Frozen):
    """All of the backbone, by the recipe of RETFound (Zhou et al. 2023); lengths in epochs over labelled subjects."""

    epochs: int = Field(50, ge=1)
    batch_size: int = Field(16, ge=1)  # subjects
    slices: int = Field(8, ge=1)  # of a subject in a step, drawn anew
    max_slices: int = Field(
        32, ge=1
    )  # of a subject that are used at all, spread evenly; its score pools them
    blr: float = Field(5e-3, gt=0)  # times batch_size / 256
    min_lr: float = Field(1e-6, ge=0)
    warmup: int = Field(10, ge=0)  # epochs
    layer_decay: float = Field(0.65, gt=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    drop_path: float = Field(0.2, ge=0, lt=1)  # the same in all blocks
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    class_weights: Literal["balanced", "none"] = (
        "balanced"  # of the loss: by the inverse of a class's subjects
    )
    validation: float = Field(0.25, gt=0, le=0.5)  # of the labelled subjects, to select the epoch
    precision: Literal["bf16", "fp32"] = "bf16"  # on a GPU; the CPU takes fp32
    # The trained weights, for `cranium predict`: of ViT-S 88 MB a cell, B 346, L 1,217, of the CNN 20.
    keep: bool = False
    augment: Augment = Augment()
    search: Search | None = None  # None: the settings above, as declared

    @model_validator(mode="after")
    def _warm(self) -> Self:
        if self.warmup >= self.epochs:
            raise ValueError("warmup must be below epochs; both are epochs")
        return self

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        for name, space in self.search.space.items() if self.search else ():
            key = f"search.space.{name}"
            if name not in type(self).model_fields:
                raise ValueError(f"{key}: only lora has a {name}")
            ends = [space.low, space.high] if isinstance(space, Range) else list(space)
            if len(set(ends)) < 2:
                raise ValueError(f"{key}: give two values at least; there is nothing to search")
            tried = [self.with_settings({name: end}, key) for end in ends]
            declared, values = getattr(self, name), [getattr(one, name) for one in tried]
            inside = values[0] <= declared <= values[1] if isinstance(space, Range) else declared in values
            if not inside:
                raise ValueError(
                    f"{key} leaves out the declared {name}, {declared}, which is the first trial; take it in, or "
                    f"declare another {name}"
                )
        return self

    @model_validator(mode="after")
    def _grace_is_warm(self) -> Self:
        if not self.search or not self.search.asha:
            return self
        grace = self.search.asha.grace
        shortest, longest = min(self._can_be("epochs")), max(self._can_be("warmup"))
        if longest > grace * shortest:
            raise ValueError(
                f"search.asha.grace: {grace:g} of {shortest:g} epochs is over before {longest:g} epochs of warm-up; "
                "raise grace or epochs, or lower warmup"
            )
        return self

    def _can_be(self, name: Literal["epochs", "warmup"]) -> tuple[float, ...]:
        space = self.search.space.get(name) if self.search else None
        if space is None:
            return (getattr(self, name),)
        return (space.low, space.high) if isinstance(space, Range) else tuple(map(float, space))

    def with_settings(self, settings: Mapping[str, Any], where: str = "settings") -> Self:
        """The same with these settings, and nothing left to search. Raises ValueError for a value that none can be."""
        try:
            return type(self).model_validate(self.model_dump() | {"search": None} | dict(settings))
        except ValidationError as error:
            raise ValueError(f"{where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


class Lora(Finetune):
    """Low-rank updates of the attention's projections (Hu et al. 2021), the backbone's own weights frozen."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)  # updates are scaled by alpha / rank
    blr: float = Field(1e-2, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    keep: bool = True  # of ViT-S 1 MB a cell, L 5


class Adapt(Frozen):
    tasks: tuple[Task, ...] = Field(min_length=1)
    probe: Probe = Probe()  # linear
    knn: Knn = Knn()
    attention: Attention = Attention()
    finetune: Finetune = Finetune()
    lora: Lora = Lora()
    decoder: Decoder = Decoder()  # of segmentation
    covariates: tuple[str, ...] = ("head", "site", "present")  # the covariates-only row
    accept_leakage: tuple[str, ...] = ()  # e.g. "head:ssl+test": accepted by name, stamped on every report


class SweepCompute(Compute):
    """Cells on cached features as in every stage; `tuned` for those that train a network."""

    tuned: Compute = Compute()


class Contrasts(Frozen):
    """Which contrasts a cell sees, of those that are ingested; the others are hidden, as if never scanned."""

    train: tuple[tuple[Contrast, ...] | Literal["all"], ...] = Field(
        ("all",), min_length=1
    )  # an axis of the grid
    # What every cell is judged on besides what it learnt from.
    test: tuple[tuple[Contrast, ...] | Literal["all"], ...] | Literal["all subsets"] = ()

    def trained(self, channels: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return tuple(_subset(given, channels) for given in self.train)

    def judged(self, channels: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Subsets of `channels`, the largest first, in their order."""
        if self.test == "all subsets":
            return tuple(s for k in range(len(channels), 0, -1) for s in itertools.combinations(channels, k))
        order = {channel: k for k, channel in enumerate(channels)}
        found = (_subset(given, channels) for given in self.test)
        return tuple(sorted(found, key=lambda subset: (-len(subset), [order[c] for c in subset])))

    @field_validator("train", "test")
    @classmethod
    def _different(cls, subsets: Any) -> Any:
        given = (
            []
            if isinstance(subsets, str)
            else [subset if subset == "all" else frozenset(subset) for subset in subsets]
        )
        if frozenset() in given or len(set(given)) != len(given):
            raise ValueError(
                "name different subsets, each of one contrast or more, e.g. [[T1w], [T1w, T2w], all]"
            )
        return subsets


def hiding(subset: Sequence[str], channels: Sequence[str]) -> tuple[str, ...]:
    """The subset where it hides something; () where it is all of the channels."""
    return () if set(channels) <= set(subset) else tuple(subset)


def _subset(given: tuple[str, ...] | Literal["all"], channels: Sequence[str]) -> tuple[str, ...]:
    return tuple(channel for channel in channels if given == "all" or channel in given)


class Sweep(Frozen):
    """`cranium sweep`: a declared grid. A cell is one Tune trial; no early stopping."""

    init: tuple[Init, ...] = ("random", "scratch")
    adaptation: tuple[Adaptation, ...] = Field(("linear",), min_length=1)
    contrasts: Contrasts = Contrasts()
    stack: tuple[Stack, ...] = ()  # an axis of the grid, in place of ingest.stack; none: that alone
    neighbours_of: Contrast | None = None  # the contrast of `neighbours`, where ingest.contrasts are several
    label_fractions: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    group_by: tuple[str, ...] = ("subject",)  # subject: k folds; a group column: leave one group out
    folds: int = Field(5, ge=2)
    seeds: tuple[int, ...] = (0,)
    compute: SweepCompute = SweepCompute()

    @field_validator("init")
    @classmethod
    def _known(cls, inits: tuple[str, ...]) -> tuple[str, ...]:
        for init in inits:
            if init not in INITS and not re.fullmatch(RUN, init):
                raise ValueError(f"unknown init {init!r}; expected one of {', '.join(INITS)} or run:<id>")
        return inits

    def adaptations(self, task: Task, init: Init) -> tuple[Adaptation, ...]:
        """How a task is learnt from an initialisation: of the declared ways those that it can be learnt by."""
        known = ADAPTATIONS[task.task]
        if init in WITHOUT_BACKBONE:
            way = WITHOUT_BACKBONE[init]
            return (way,) if isinstance(task, Classification) or init == "cnn" else ()
        return tuple(adaptation for adaptation in self.adaptation if adaptation in known)

    @field_validator("stack")
    @classmethod
    def _stacks_differ(cls, stacks: tuple[Stack, ...]) -> tuple[Stack, ...]:
        if len(set(stacks)) != len(stacks):
            raise ValueError(f"{list(stacks)} names one twice")
        return stacks

    @field_validator("label_fractions")
    @classmethod
    def _shares(cls, fractions: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < f <= 1 for f in fractions):
            raise ValueError("label_fractions are shares of the training subjects, above 0 and at most 1")
        return tuple(sorted(fractions))


class Report(Frozen):
    title: str | None = None
    bootstrap: int = Field(2000, ge=100)


class Experiment(Frozen):
    """One `experiments/*.yaml`."""

    name: str = Field(pattern=NAME)
    asks: str = ""  # the question, in a line
    cost: str = ""
    demo: Demo | None = None
    ingest: Ingest
    stream: Stream = Stream()
    pretrain: Pretrain | None = None
    embed: Embed = Embed()
    adapt: Adapt | None = None
    sweep: Sweep | None = None
    report: Report = Report()

    @property
    def fill(self) -> Fill:
        """Of contrasts that are absent, or hidden, where something is learnt and judged."""
        return self.embed.fill or self.stream.fill

    @property
    def arch(self) -> Arch:
        return self.pretrain.arch if self.pretrain else "vit_small_patch14_dinov2"

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The kinds of stack that it compares, or its only one."""
        return self.sweep.stack if self.sweep and self.sweep.stack else (self.ingest.stack,)

    def of_stack(self, stack: Stack) -> Experiment:
        """It with this kind of stack alone, as if nothing else had been asked for; itself where it has no such axis.

        `neighbours` sees one contrast: `sweep.contrasts` and `stream.contrasts` then have nothing left to choose from.
        Raises ValueError where that is no experiment.
        """
        if self.sweep is None or not self.sweep.stack:
            return self
        ingest: dict[str, Any] = {"stack": stack}
        sweep: dict[str, Any] = {"stack": (), "neighbours_of": None}
        stream: dict[str, Any] = {}
        if stack == "neighbours":
            kept = self.sweep.neighbours_of or self.ingest.contrasts[0]
            ingest["contrasts"] = (kept,)
            sweep["contrasts"] = Contrasts()
            stream["contrasts"] = tuple(c for c in self.stream.contrasts if c == kept)
        updated = {
            "ingest": self.ingest.model_dump() | ingest,
            "sweep": self.sweep.model_dump() | sweep,
            "stream": self.stream.model_dump() | stream,
        }
        try:
            return Experiment.model_validate(self.model_dump() | updated)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"sweep.stack: {stack}: {reason}") from None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.ingest.dtype != "uint8" and (self.pretrain or self.adapt):
            raise ValueError(
                "ingest.dtype: uint16 is for reading shards elsewhere; pretrain and adapt take uint8"
            )
        named = set(self.ingest.cohorts)
        wanted: dict[str, Iterable[str]] = {}
        if self.pretrain:
            if not self.ingest.min_brain:
                raise ValueError("pretraining wants ingest.min_brain above 0, or blank slices would be fed")
            wanted["pretrain.cohorts"] = self.pretrain.cohorts
            if self.stream.lanes % self.pretrain.compute.num_workers:
                raise ValueError("stream.lanes must be a multiple of pretrain.compute.num_workers")
            if self.pretrain.batch_size % self.stream.lanes:
                raise ValueError("pretrain.batch_size must be a multiple of stream.lanes")
            if monitor := self.pretrain.compute.monitor:
                wanted["pretrain.compute.monitor"] = (monitor.cohort,)
                tested = {
                    c
                    for task in (self.adapt.tasks if self.adapt else ())
                    for c in (task.cohort, *task.external)
                }
                if monitor.cohort in tested:
                    raise ValueError(
                        f"pretrain.compute.monitor looks at {monitor.cohort}, which a task tests on: what is chosen by "
                        "its numbers would be chosen on the test"
                    )
        for task in self.adapt.tasks if self.adapt else ():
            wanted[f"task {task.name}"] = (task.cohort, *task.external)
        for where, cohorts in wanted.items():
            if missing := sorted(set(cohorts) - named):
                raise ValueError(f"{where} names {missing}, which ingest.cohorts does not list")
        if self.sweep and not self.adapt:
            raise ValueError("a sweep needs `adapt.tasks`")
        if self.sweep:
            made = set(self.pretrain.inits) if self.pretrain else set()
            if absent := sorted(set(self.sweep.init) & set(PRETRAINED_HERE) - made):
                raise ValueError(f"sweep.init names {absent}, which pretrain.inits does not make")
            if "volumes" in self.sweep.init and "T1w" not in self.ingest.contrasts:
                raise ValueError(
                    "sweep.init: volumes are measured on T1w, which ingest.contrasts does not name"
                )
            assert self.adapt
            kinds = {task.task for task in self.adapt.tasks}
            for kind in sorted(kinds):
                if not set(ADAPTATIONS[kind]) & set(self.sweep.adaptation):
                    ways = ", ".join(ADAPTATIONS[kind])
                    raise ValueError(f"sweep.adaptation names no way to learn a {kind}: {ways}")
            pooled = sorted({"linear", "knn"} & set(self.sweep.adaptation))
            for task in self.adapt.tasks:
                if isinstance(task, Classification) and task.pool == "attention" and pooled:
                    raise ValueError(
                        f"task {task.name}: {pooled} pool slices by mean or max; for a probe that attends name "
                        "`attention` under sweep.adaptation"
                    )
            self._contrasts_exist(self.sweep.contrasts)
            self._stacks_exist(self.sweep)
            useful = {way for kind in kinds for way in ADAPTATIONS[kind]}
            if useless := sorted(set(self.sweep.adaptation) - useful):
                raise ValueError(f"sweep.adaptation names {useless}, by which no task here is learnt")
        return self

    def _stacks_exist(self, spec: Sweep) -> None:
        contrasts = list(self.ingest.contrasts)
        if spec.neighbours_of and "neighbours" not in spec.stack:
            raise ValueError(
                f"sweep.neighbours_of: {spec.neighbours_of} is of `neighbours`, which sweep.stack does not name"
            )
        if spec.neighbours_of and spec.neighbours_of not in contrasts:
            raise ValueError(
                f"sweep.neighbours_of: {spec.neighbours_of} is none of ingest.contrasts {contrasts}"
            )
        if "neighbours" in spec.stack and len(contrasts) > 1 and not spec.neighbours_of:
            raise ValueError(
                f"sweep.stack: neighbours takes one of ingest.contrasts {contrasts}; name it, e.g. "
                f"sweep.neighbours_of: {contrasts[0]}"
            )
        made: dict[tuple[object, ...], Stack] = {}
        for stack in spec.stack:
            ingest = self.of_stack(stack).ingest
            twin = made.setdefault((ingest.channels, ingest.shape), stack)
            if twin != stack:
                raise ValueError(
                    f"sweep.stack: {twin} and {stack} of {list(ingest.channels)} are the same stacks "
                    f"{list(ingest.shape)}; leave one out"
                )
        runs = [init for init in spec.init if init.startswith("run:")]
        if runs and len(spec.stack) > 1:
            raise ValueError(
                f"sweep.init: {runs[0]} was pretrained on stacks of one kind and fits no other; name that kind alone "
                f"in sweep.stack, or take scratch or brainfound, which are pretrained on each"
            )

    def _contrasts_exist(self, spec: Contrasts) -> None:
        if spec == Contrasts():
            return
        assert self.adapt
        channels = self.ingest.channels
        lists = (spec.train, () if isinstance(spec.test, str) else spec.test)
        named = {c for subsets in lists for subset in subsets if subset != "all" for c in subset}
        if unknown := sorted(named - set(channels)):
            raise ValueError(
                f"sweep.contrasts names {unknown}, which ingest.contrasts does not: {list(channels)}"
            )
        for name, subsets in (("train", spec.trained(channels)), ("test", spec.judged(channels))):
            if len(set(subsets)) != len(subsets):
                raise ValueError(
                    f"sweep.contrasts.{name}: `all` and {list(channels)} are the same; name one of them"
                )
        maps = [task.name for task in self.adapt.tasks if isinstance(task, Segmentation)]
        if maps:
            raise ValueError(
                f"sweep.contrasts is for classifications only, and task {maps[0]} is a segmentation; give it an "
                "experiment of its own, whose ingest.contrasts are those it may see"
            )


class Cell(Frozen):
    """One point of a declared grid; with its upstream artefacts it is the identity of a result."""

    task: str
    cohort: str
    init: Init
    adaptation: Adaptation
    label_fraction: float
    scheme: str  # what folds are grouped by: subject, or a group column (leave one group out)
    fold: int
    seed: int
    contrasts: tuple[str, ...]  # learnt from; its own test sees the same
    subsets: tuple[tuple[str, ...], ...] = ()  # of contrasts, that it is judged on besides
    fill: Fill = "zero"  # of contrasts that are absent or hidden
    stack: Stack = "contrasts"

    @property
    def name(self) -> str:
        made = f"{self.task}-{self.init.replace(':', '_')}-{self.adaptation}-{'_'.join(self.contrasts)}-{self.stack}"
        return f"{made}-{self.scheme}-f{round(self.label_fraction * 1000):04d}-k{self.fold}-s{self.seed}"


# ---- machine facts --------------------------------------------------------------------------------------------------


class Machine(Frozen, validate_default=True):
    """Where things are on this machine: from `key=value` or `CRANIUM_*` variables; never hashed."""

    store: Path = Path("cranium-store")
    shards: str | None = (
        None  # folder or s3://bucket/prefix that new shard sets are written to; default: the store
    )
    cache: Path = Path("~/.cache/cranium")
    tracking_uri: str | None = None  # default: sqlite below the store
    address: str | None = None  # of a running Ray cluster; default: a private local one
    weights: Path | None = None  # DINOv2 weights as a file, instead of timm's hub
    mask_command: str | None = (
        None  # program of ingest.mask: command, e.g. "mri_synthstrip -i {input} -m {output}"
    )
    mask_weights: Path | None = None  # its {weights}, under ingest.mask_sha256
    template: Path | None = None  # stripped head of ingest.space: mni, instead of nilearn's
    raw: dict[str, Path] = {}  # cohort -> folder of its files

    @field_validator("store", "cache", "weights", "mask_weights", "template")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        if "://" in str(path) or str(path).startswith("s3:/"):
            raise ValueError(
                f"{path}: only folders of a (shared) file system can be a store; shards= may be s3://..."
            )
        return path.expanduser().absolute()

    @field_validator("shards")
    @classmethod
    def _place(cls, place: str | None) -> str | None:
        if place is None or "://" not in place:
            return None if place is None else str(Path(place).expanduser().absolute())
        bucket = place.removeprefix("s3://").rstrip("/")
        if not place.startswith("s3://") or not bucket or bucket.startswith("/") or "//" in bucket:
            raise ValueError("give a folder or s3://bucket/prefix")
        if "@" in bucket:
            raise ValueError("no credentials here; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return f"s3://{bucket}"

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        # It is printed, logged and sent with a job.
        if uri and "://" in uri and "@" in uri.split("://", 1)[1].split("/")[0]:
            raise ValueError("no credentials here; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        return uri

    @property
    def tracking(self) -> str:
        return self.tracking_uri or f"sqlite:///{self.store / 'mlflow.db'}"


MACHINE_KEYS = tuple(Machine.model_fields)


# ---- identity -------------------------------------------------------------------------------------------------------


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of plain values or models, `compute` fields left out."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k != "compute"}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(v) for v in value)
    return str(value) if isinstance(value, Path) else value


def to_yaml(model: BaseModel) -> str:
    """The resolved config, every value written out, in the order of the fields."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
