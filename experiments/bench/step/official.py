"""Steps of facebookresearch/dinov2. `official.py CHECKOUT BATCH THREADS PRECISION`, with torch, omegaconf and fvcore.

Its own networks, losses and optimiser groups by its own code, on a CPU: `.cuda()` does nothing; no FSDP, so that the
teacher's update is its foreach pair over plain parameters, and the clipping torch's; bf16 by autocast in place of fp16
and its scaler; attention by torch in place of xformers (the folder beside this file). Its defaults else, with drop path
off and local views of 98 pixels, as everywhere in this benchmark.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from serve import batch, serve

checkout, path, threads, precision = sys.argv[1:]
sys.path[:0] = [str(Path(__file__).parent), checkout]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
logging.disable(logging.INFO)

import dinov2.train.ssl_meta_arch as official  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
official.SSLMetaArch.fsdp_synchronize_streams = lambda self: None
MOMENTUM, TEMPERATURE, CLIP = 0.994, 0.07, 3.0
given = {name: torch.from_numpy(array) for name, array in batch(path).items()}
masks = given["masks"]
weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
hidden = int(masks.sum())
images = {
    "collated_global_crops": given["global"],
    "collated_local_crops": given["local"],
    "collated_masks": masks,
    "mask_indices_list": masks.flatten().nonzero().flatten(),
    "masks_weight": weights,
    "upperbound": hidden,
    "n_masked_patches": torch.full((1,), hidden, dtype=torch.long),
}
settings = OmegaConf.merge(
    OmegaConf.load(Path(checkout) / "dinov2" / "configs" / "ssl_default_config.yaml"),
    {
        "student": {"arch": "vit_small", "patch_size": 14, "drop_path_rate": 0.0},
        "crops": {"local_crops_size": 98},
        "compute_precision": {"grad_scaler": False},
        "dino": {"head_n_prototypes": 65536},
        "ibot": {"head_n_prototypes": 65536},
    },
)
model = official.SSLMetaArch(settings)
for name in model.student:
    model.teacher[name].load_state_dict(model.student[name].state_dict())
model.train()
optimiser = torch.optim.AdamW(model.get_params_groups(), betas=(0.9, 0.999))
student = [p for name in model.student for p in model.student[name].parameters()]
teacher = [p for name in model.student for p in model.teacher[name].parameters()]


def step() -> float:
    for group in optimiser.param_groups:
        group["weight_decay"] = 0.04 * group["wd_multiplier"]
        group["lr"] = 1e-4 * group["lr_multiplier"]
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        terms = model.forward_backward(images, teacher_temp=TEMPERATURE)
    for module in model.student.values():
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
    optimiser.step()
    with torch.no_grad():
        torch._foreach_mul_(teacher, MOMENTUM)
        torch._foreach_add_(teacher, student, alpha=1 - MOMENTUM)
    return float(sum(term.item() for term in terms.values()))


serve(step)
