"""DINOv2 (Oquab et al., 2023): student, teacher and their losses on one batch of slice stacks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Required, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from cranium.dinov2 import centering, crops, draw, losses, masking
from cranium.dinov2.centering import MovingCentre, Reduce, identity
from cranium.dinov2.head import Head
from cranium.models import packed
from cranium.models.vit import Backbone


@dataclass(frozen=True)
class MethodSpec:
    """What defines the objective; schedules are apart."""

    crops: crops.CropSpec = field(default_factory=crops.CropSpec)
    prototypes: int = 65536
    head_hidden: int = 2048
    head_bottleneck: int = 256
    shared_head: bool = True
    unit_prototypes: bool = True
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    centering: Literal["sinkhorn", "moving"] = "sinkhorn"
    student_temperature: float = 0.1
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_probability: float = 0.5


class StudentOutput(NamedTuple):
    """All that the losses need from a student or teacher."""

    global_logits: Tensor
    """[V_g, B, K]"""
    local_logits: Tensor
    """[V_l, B, K]"""
    masked_logits: Tensor
    """[M, K] of the masked patches, in the order of the flat indices."""
    global_cls: Tensor
    """[V_g, B, D]"""


class Student(nn.Module):
    """Backbone and heads; one forward gives everything, so that data parallelism wraps just this.

    `tuned`: by `models/packed.py`; else view size by view size through `Backbone.forward`, with all its tokens. The
    same numbers up to rounding.
    """

    def __init__(self, backbone: Backbone, spec: MethodSpec, *, tuned: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.tuned = tuned
        shape = (backbone.embed_dim, spec.head_hidden, spec.head_bottleneck, spec.prototypes)
        self.dino_head = Head(*shape, unit_prototypes=spec.unit_prototypes)
        apart = spec.ibot_weight and not spec.shared_head
        self.ibot_head = Head(*shape, unit_prototypes=spec.unit_prototypes) if apart else None
        # Without masked patches nothing reaches the token, and data parallelism wants a gradient for all that
        # learns.
        backbone.mask_token.requires_grad_(spec.ibot_weight > 0)

    def forward(
        self,
        global_views: Tensor,
        local_views: Tensor | None = None,
        masks: Tensor | None = None,
        masked: Tensor | None = None,
        global_keep: Tensor | None = None,
        local_keep: Tensor | None = None,
    ) -> StudentOutput:
        """Scores of `global_views` [V_g, B, C*S, g, g] and `local_views` [V_l, B, C*S, l, l].

        `masks` [V_g*B, N] bool are hidden from the backbone (None: nothing is); `masked` [M] int64 are the
        flat indices into [V_g*B*N] whose patch scores are wanted. Keep masks: see `Backbone.forward`, with
        V*B rows.
        """
        views, batch = global_views.shape[:2]
        local_views = None if local_views is None or not len(local_views) else local_views
        masked = torch.zeros(0, dtype=torch.int64, device=global_views.device) if masked is None else masked
        embedded = self._packed if self.tuned else self._plain
        cls, local_cls, patches = embedded(global_views, local_views, masks, masked, global_keep, local_keep)
        if self.ibot_head is None:
            joint = self.dino_head(torch.cat([cls, local_cls, patches]))
            logits, local_logits, masked_logits = joint.split([len(cls), len(local_cls), len(patches)])
        else:
            logits, local_logits = self.dino_head(torch.cat([cls, local_cls])).split(
                [len(cls), len(local_cls)]
            )
            masked_logits = self.ibot_head(patches)
        return StudentOutput(
            logits.view(views, batch, -1),
            local_logits.view(len(local_logits) // batch, batch, logits.shape[-1]),
            masked_logits,
            cls.view(views, batch, -1),
        )

    def _plain(
        self,
        global_views: Tensor,
        local_views: Tensor | None,
        masks: Tensor | None,
        masked: Tensor,
        global_keep: Tensor | None,
        local_keep: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CLS tokens of the global and the local views, and the masked patches' tokens."""
        tokens = self.backbone(global_views.flatten(0, 1), masks, global_keep)
        patches = tokens.patches.flatten(0, 1)[masked]
        if local_views is None:
            return tokens.cls, tokens.cls[:0], patches
        return tokens.cls, self.backbone(local_views.flatten(0, 1), None, local_keep).cls, patches

    def _packed(
        self,
        global_views: Tensor,
        local_views: Tensor | None,
        masks: Tensor | None,
        masked: Tensor,
        global_keep: Tensor | None,
        local_keep: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, all at once."""
        images, keep = [global_views.flatten(0, 1)], [global_keep]
        if local_views is not None:
            images.append(local_views.flatten(0, 1))
            keep.append(local_keep)
        starts, start = [], 0
        prefix = int(self.backbone.vit.num_prefix_tokens)
        for x in images:
            length = prefix + self.backbone.num_patches(x.shape[-1])
            starts.append(start + length * torch.arange(len(x), device=masked.device))
            start += length * len(x)
        patches = self.backbone.num_patches(images[0].shape[-1])
        rows = starts[0][masked // patches] + prefix + masked % patches
        counts = [len(images[0]), sum(len(x) for x in images[1:]), len(masked)]
        tokens = packed.tokens(self.backbone, images, masks, keep, torch.cat([*starts, rows]))
        cls, local_cls, hidden = torch.split(tokens, counts)
        return cls, local_cls, hidden


class How(TypedDict, total=False):
    """How the losses of a step are made; see `losses`, and `losses_of` for the defaults."""

    seed: Required[int]
    teacher_temperature: Required[float]
    reduce: Reduce
    gather: Callable[[Tensor], Tensor]
    precision: torch.dtype | None


class DINOv2:
    """Student, EMA teacher and centres. The caller may replace `student` by a data-parallel wrap of it."""

    def __init__(self, student: Student, spec: MethodSpec) -> None:
        self.student: nn.Module = student
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)
        self.spec = spec
        device = student.dino_head.prototypes.device
        self.centres = {name: MovingCentre(spec.prototypes, device=device) for name in ("dino", "ibot")}

    @property
    def plain_student(self) -> Student:
        """The student without its data-parallel wrap."""
        student = getattr(self.student, "module", self.student)
        assert isinstance(student, Student)
        return student

    def losses(
        self,
        stacks: Tensor,
        present: Tensor,
        rows: draw.Rows,
        step: int,
        **how: Unpack[How],
    ) -> dict[str, Tensor]:
        """Losses of this worker's `stacks` [B, C, S, H, W] uint8, `present` [B, C], global rows `rows` [B].

        `total` is to be differentiated; its gradients, averaged over workers, are those of the whole batch.
        The rest is detached and already that of the whole batch: `loss`, `dino_global`, `dino_local`, `ibot`,
        `koleo` (before their weights), and the health numbers `target_entropy` (nats), `prototypes_used`
        (share), `feature_std` (1 / sqrt(D) for spread features, 0 for collapsed ones), and this worker's
        `teacher_cls` [V_g * B, D]. `reduce` sums a tensor
        over workers; `gather` concatenates rows over workers and is differentiable (see `losses.koleo`).
        `precision`: autocast of the networks only.
        """
        size = (stacks.shape[3], stacks.shape[4])
        spec = self.spec.crops
        params = crops.sample(rows, step, how["seed"], spec, contrasts=stacks.shape[1], size=size)
        return self.losses_of(crops.apply(stacks, present, params, spec), rows, step, **how)

    def losses_of(
        self,
        views: tuple[Tensor, Tensor],
        rows: draw.Rows,
        step: int,
        *,
        seed: int,
        teacher_temperature: float,
        reduce: Reduce = identity,
        gather: Callable[[Tensor], Tensor] = identity,
        precision: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """The `losses` of `views` that `crops.apply` made of these rows."""
        spec, device = self.spec, views[0].device
        masks, masked, weights = self._masks(rows, step, seed, device)
        global_keep, local_keep = self._keep(rows, step, seed)
        with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
            with torch.no_grad():
                teacher = self.teacher(views[0], None, None, masked)
            student: StudentOutput = self.student(views[0], views[1], masks, masked, global_keep, local_keep)
        targets = self._centre("dino", teacher.global_logits.flatten(0, 1), teacher_temperature, reduce)
        targets = targets.view(spec.crops.num_global, len(rows), -1)
        pairs = spec.crops.num_global * (spec.crops.num_global - 1 + spec.crops.num_local)
        warmth = spec.student_temperature
        crossed = losses.dino(student.global_logits, targets, temperature=warmth, ignore_diagonal=True)
        terms = {
            "dino_global": crossed / pairs,
            "dino_local": losses.dino(student.local_logits, targets, temperature=warmth) / pairs,
        }
        if spec.ibot_weight:
            patch_targets = self._centre("ibot", teacher.masked_logits, teacher_temperature, reduce)
            terms["ibot"] = losses.ibot(
                student.masked_logits, patch_targets, weights, len(masks), temperature=warmth
            )
        if spec.koleo_weight:
            # Views apart: the nearest neighbour would else be the other view of the same image.
            terms["koleo"] = torch.stack([losses.koleo(cls, gather) for cls in student.global_cls]).sum()
        return self._total(terms, targets, teacher.global_cls, len(rows), reduce)

    def _total(
        self, terms: dict[str, Tensor], targets: Tensor, cls: Tensor, rows: int, reduce: Reduce
    ) -> dict[str, Tensor]:
        factors = {"ibot": self.spec.ibot_weight, "koleo": self.spec.koleo_weight}
        total = torch.stack([factors.get(name, 1.0) * term for name, term in terms.items()]).sum()
        detached = torch.stack([total.detach(), *(term.detach() for term in terms.values())])
        probs = targets.flatten(0, 1)
        used = probs.new_zeros(probs.shape[-1]).scatter_(0, probs.argmax(dim=-1), 1.0)
        entropy = torch.special.entr(probs).sum()
        unit = torch.nn.functional.normalize(cls.flatten(0, 1).float(), dim=-1)
        pieces = [detached * rows, entropy[None], unit.sum(dim=0), unit.square().sum(dim=0), used]
        count = torch.tensor([float(rows), 1.0], device=used.device)
        shared = reduce(torch.cat([count, *pieces]))
        all_rows, workers = shared[0], shared[1]
        means, entropy, sums, squares, used = shared[2:].split_with_sizes([len(piece) for piece in pieces])
        images = all_rows * targets.shape[0]
        std = (squares / images - (sums / images).square()).clamp(min=0.0).sqrt().mean()
        report = dict(zip(["loss", *terms], means / all_rows, strict=True))
        return {
            # Workers with more rows weigh more: the plain average over workers is then the mean over all
            # rows.
            "total": total * (rows * workers / all_rows),
            **report,
            "target_entropy": entropy[0] / images,
            "prototypes_used": (used > 0).float().mean(),
            "feature_std": std,
            "teacher_cls": cls.flatten(0, 1).detach(),
        }

    def _masks(
        self, rows: draw.Rows, step: int, seed: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks [V*B, N], flat indices [M] of their patches, weights [M] that add up to 1 in an image."""
        spec = self.spec
        grid = math.isqrt(self.plain_student.backbone.num_patches(spec.crops.global_size))
        masks = masking.sample(
            rows,
            step,
            seed,
            grid,
            views=spec.crops.num_global,
            ratio=spec.mask_ratio,
            probability=spec.mask_probability if spec.ibot_weight else 0.0,
        ).reshape(-1, grid * grid)
        masked = np.flatnonzero(masks)
        weights = 1.0 / masks.sum(axis=1)[masked // (grid * grid)]
        tensors = (
            torch.from_numpy(masks),
            torch.from_numpy(masked),
            torch.from_numpy(weights.astype(np.float32)),
        )
        moved = [tensor.to(device, non_blocking=True) for tensor in tensors]
        return moved[0], moved[1], moved[2]

    def _keep(self, rows: draw.Rows, step: int, seed: int) -> tuple[Tensor | None, Tensor | None]:
        backbone, count = self.plain_student.backbone, self.spec.crops.num_global
        if not backbone.drop_path:
            return None, None
        views = count + self.spec.crops.num_local
        keep = draw.keep_rows(
            rows, step, seed, num_blocks=backbone.num_blocks, rate=backbone.drop_path, views=views
        ).transpose(0, 1)
        return keep[:, :count].flatten(1), keep[:, count:].flatten(1)

    def _centre(self, name: str, logits: Tensor, temperature: float, reduce: Reduce) -> Tensor:
        if self.spec.centering == "sinkhorn":
            return centering.sinkhorn(logits, temperature, reduce=reduce)
        return self.centres[name](logits, temperature, reduce)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student."""
        student = [parameter.detach() for parameter in self.plain_student.parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), student, 1.0 - momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything to checkpoint, as plain tensors: student, teacher, centres."""
        state = {f"student.{name}": tensor for name, tensor in self.plain_student.state_dict().items()}
        state |= {f"teacher.{name}": tensor for name, tensor in self.teacher.state_dict().items()}
        return state | {f"centre.{name}": centre.centre for name, centre in self.centres.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. RuntimeError or KeyError if anything is missing or does not fit."""
        for part, module in (("student.", self.plain_student), ("teacher.", self.teacher)):
            own = {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
            module.load_state_dict(own)
        for name, centre in self.centres.items():
            centre.centre = state[f"centre.{name}"].to(centre.centre.device, copy=True)


def clip_gradients(student: Student, limit: float) -> dict[str, Tensor]:
    """Scale down the gradients of each module (backbone, DINO head, iBOT head) to a norm of `limit` at most.

    Apart, as in the official code: a head's burst leaves the backbone's step alone. Returns the norms before.
    """
    modules = {"backbone": student.backbone, "dino_head": student.dino_head, "ibot_head": student.ibot_head}
    return {
        name: nn.utils.clip_grad_norm_(module.parameters(), limit)
        for name, module in modules.items()
        if module
    }


def parameter_groups(
    student: Student, weight_decay: float, layer_decay: float, patch_embed_lr: float
) -> list[dict[str, Any]]:
    """Optimiser groups for `schedules.apply`: layer-wise learning rates; no decay on biases, norms and LayerScale.

    A layer's rate is layer_decay ** (layers above it), embeddings lowest and heads at 1; the patch embedding
    is multiplied by `patch_embed_lr` as well. `weight_decay` is the starting value.
    """
    depth = student.backbone.num_blocks
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "backbone" if name.startswith("backbone.") else "head"
        part = "last_layer" if "head.prototype" in name else part
        multiplier = layer_decay ** (depth + 1 - _layer(name, depth))
        if ".patch_embed." in name:
            multiplier *= patch_embed_lr
        # The mask token is a vector, but an embedding: it decays like the others, as in the official code.
        decay = 1.0 if parameter.ndim > 1 or name.endswith(".mask_token") else 0.0
        group = groups.setdefault(
            (part, multiplier, decay),
            {"params": [], "part": part, "lr_multiplier": multiplier, "decay_multiplier": decay},
        )
        group["params"].append(parameter)
        group["weight_decay"] = weight_decay * decay
    return list(groups.values())


def _layer(name: str, depth: int) -> int:
    """0 for embeddings, 1..depth for blocks, depth + 1 for the final norm and the heads."""
    if not name.startswith("backbone."):
        return depth + 1
    if ".blocks." in name:
        return int(name.split(".blocks.")[1].split(".")[0]) + 1
    return depth + 1 if ".vit.norm." in name else 0
