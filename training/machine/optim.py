"""The optimiser, its groups of parameters, and the schedule."""

import math
import re

import torch
from torch import nn

# Positions and the class token are added to activations, as biases are; they are not decayed.
NO_DECAY = re.compile(r"position(al)?_embedding|class_embedding|logit_scale|logit_bias")

MAX_TEMPERATURE_RATE = 3e-4  # the peak rate of BLIP's pre-training


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Groups for AdamW: decay for matrices alone, and a learning rate that falls from layer to layer downwards.

    The paper (2.5) decays "all weights that are not gains or biases"; like open_clip 4, vlp leaves out positions too.
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim < 2 or NO_DECAY.search(name) else weight_decay
        rate = learning_rate * layer_decay ** levels_below_top(model, name)
        if name == "temp":  # a temperature, not its logarithm: at a higher rate it jumps over its whole range
            rate = min(rate, MAX_TEMPERATURE_RATE)
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "peak_lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def levels_below_top(model: nn.Module, name: str) -> int:
    """How many layers stand between a parameter and its tower's end: 0 for heads, most for embeddings and stem."""
    if match := re.search(r"(\w+_model)\.(?:encoder\.)?layers\.(\d+)\.", name):
        return depth(model.get_submodule(name[: match.end(1)])) - int(match[2])
    if match := re.search(r"_model(?=\.(embeddings|pre_layrnorm)\.)", name):
        return depth(model.get_submodule(name[: match.end()])) + 1
    if match := re.search(r"vision_model\.(layer(\d+)|conv\d|bn\d)\.", name):
        stages = len(model.get_submodule(name[: name.index("vision_model") + 12]).config.depths)
        return stages + 1 - int(match[2] or 0)
    return 0


def depth(tower: nn.Module) -> int:
    """Layers of a transformer."""
    return len(getattr(tower, "encoder", tower).layers)


def make_optimizer(groups: list[dict], beta1: float, beta2: float, epsilon: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=(beta1, beta2), eps=epsilon, fused=True)


def learning_rate_factor(step: int, warmup_steps: int, progress: float) -> float:
    """Linear warm-up in optimiser steps, then a cosine to zero over `progress`, from 0 to 1."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warm * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
