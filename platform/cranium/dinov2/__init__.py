"""DINOv2 self-distillation (Oquab et al., 2023) re-implemented from its equations, for stacks of MRI slices.

Every random draw is a function of (seed, step, global row), so a global batch gives the same losses however
its rows are spread over workers.
"""
