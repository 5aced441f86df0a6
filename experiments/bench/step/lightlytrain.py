"""Steps of LightlyTrain (AGPL-3.0): run as a process of its own, in an environment of its own, and nowhere else.

`lightlytrain.py BATCH THREADS PRECISION`. Its method, losses, optimiser and teacher's update by its own code with a
stand-in for Lightning's trainer, so that Lightning's loop costs nothing here; the masks are the benchmark's. Drop path
off.
"""

from __future__ import annotations

import sys
import types

import torch
from lightly_train._methods.dinov2 import dinov2 as theirs
from lightly_train._methods.dinov2.utils import get_optimizer_with_decay
from lightly_train._models.dinov2_vit.dinov2_vit import DINOv2ViTModelWrapper
from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import vit_small
from lightly_train._models.embedding_model import EmbeddingModel
from lightly_train._torch_helpers import update_momentum
from serve import batch, serve

path, threads, precision = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
MOMENTUM, CLIP = 0.994, 3.0
given = {name: torch.from_numpy(array) for name, array in batch(path).items()}
masks = given["masks"]
weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
made = {
    "collated_masks": masks,
    "mask_indices_list": masks.flatten().nonzero().flatten(),
    "masks_weight": weights,
}
theirs.create_collated_masks = lambda **asked: made
network = vit_small(
    patch_size=14, img_size=224, init_values=1e-5, ffn_layer="mlp", block_chunks=0, drop_path_rate=0.0
)
arguments, optimiser_arguments = theirs.DINOv2Args(output_dim=65536), theirs.DINOv2AdamWViTArgs()
wrapper = DINOv2ViTModelWrapper(network)
arguments.resolve_auto(scaling_info=None, optimizer_args=optimiser_arguments, wrapped_model=wrapper)
count = len(given["global"]) // 2
method = theirs.DINOv2(
    arguments, optimiser_arguments, EmbeddingModel(wrapper), global_batch_size=count, num_input_channels=3
)
method.train()
method.teacher_embedding_model.eval()
method.teacher_head.eval()
method._trainer = types.SimpleNamespace(global_step=2000, estimated_stepping_batches=100_000, max_epochs=10)
optimiser = get_optimizer_with_decay(
    optim_args=optimiser_arguments,
    trainable_modules=method.trainable_modules(),
    layerwise_decay=0.9,
    patch_embed_lr_multiplier=0.2,
)
views = [*given["global"].split(count), *given["local"].split(count)]
parameters = [p for group in optimiser.param_groups for p in group["params"]]


def step() -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        result = method.training_step_impl({"views": views, "filename": []}, 0)
    optimiser.zero_grad()
    result.loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    method.on_before_optimizer_step(optimiser)
    optimiser.step()
    update_momentum(method.student_embedding_model, method.teacher_embedding_model, m=MOMENTUM)
    update_momentum(method.student_head, method.teacher_head, m=MOMENTUM)
    return float(result.loss)


serve(step)
