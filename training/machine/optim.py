"""The optimiser, its parameter groups and the learning rate schedule."""

import math
import re

import torch
from torch import nn

from ...modeling_vlp.towers import layers_of
from .muon import Muon

# Position embeddings and the class token are added to activations like biases, so they are not decayed.
NO_DECAY = re.compile(r"position(al)?_embedding|class_embedding|logit_scale|logit_bias|prefix_words\.offsets")
TOWER = re.compile(r"(vision|text)_model\.")
# Embeddings, which are tables, and heads, the last matrices.
NO_MUON = re.compile(r"embed|query_tokens|(^|\.)((visual|vision|text|language)_proj(ection)?|(lm|itm|cls)_head)\.")

MAX_TEMPERATURE_RATE = 3e-4  # the peak learning rate of BLIP's pre-training
# With --spelling_share, the offsets of a prefix of words learn from the language model, which is run in the last steps
# only, when the learning rate of the schedule is near 0.
OFFSETS_RATE = 5e-3


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    tower_learning_rate: float | None = None,
    offsets_rate: float | None = None,
    muon: bool = False,
) -> list[dict]:
    """Group the trainable parameters by learning rate and weight decay, and by optimiser.

    The paper (2.5) decays "all weights that are not gains or biases"; like open_clip 4, vlp also excludes positions.

    Args:
        model: model to train.
        learning_rate: peak learning rate of the top layers.
        weight_decay: weight decay of matrices.
        layer_decay: factor on the learning rate from each layer to the one below.
        tower_learning_rate: peak learning rate of the towers, cross-attention excepted; None: `learning_rate`.
        offsets_rate: constant learning rate of the offsets of a prefix of words; None: `learning_rate`.
        muon: mark the groups of matrices and convolutions with "muon": True, for `Muon`. Embeddings and heads keep
            AdamW, as its author recommends.

    Returns:
        Parameter groups; "peak_lr" is the learning rate before the schedule, which does not apply to groups that are
        "constant".
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim < 2 or NO_DECAY.search(name) else weight_decay
        is_old = TOWER.match(name) and "cross_attention" not in name
        peak = tower_learning_rate if tower_learning_rate and is_old else learning_rate
        rate = peak * layer_decay ** levels_below_top(model, name)
        if name == "temp":  # not a logarithm: a higher rate would make it jump across its whole range
            rate = min(rate, MAX_TEMPERATURE_RATE)
        constant = offsets_rate is not None and name.endswith("prefix_words.offsets")
        rate = offsets_rate if constant else rate
        fields = {"lr": rate, "peak_lr": rate, "weight_decay": decay, "constant": constant}
        if muon:
            fields["muon"] = is_hidden_matrix(name, parameter)
        groups.setdefault(tuple(fields.values()), fields | {"params": []})["params"].append(parameter)
    return list(groups.values())


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or a convolution inside a model; one over single channels is no matrix."""
    is_matrix = parameter.ndim >= 2 and parameter.shape[1] > 1
    return is_matrix and not NO_MUON.search(name) and not NO_DECAY.search(name)


def levels_below_top(model: nn.Module, name: str) -> int:
    """Return a parameter's distance from the top of its tower, in layers: 0 for heads, most for embeddings and stem."""
    if match := re.search(r"(\w+_model)\.(?:encoder\.)?layers\.(\d+)\.", name):
        return depth(model.get_submodule(name[: match.end(1)])) - int(match[2])
    if match := re.search(r"_model(?=\.(embeddings|pre_layrnorm)\.)", name):
        return depth(model.get_submodule(name[: match.end()])) + 1
    if match := re.search(r"vision_model\.(layer(\d+)|conv\d|bn\d)\.", name):
        stages = len(model.get_submodule(name[: name.index("vision_model") + 12]).config.depths)
        return stages + 1 - int(match[2] or 0)
    if match := re.match(r"(vision|text)_model(?=\.model\.)", name):  # a tower of transformers
        return levels_in(model.get_submodule(match[0]), model.get_parameter(name))
    return 0


def levels_in(tower: nn.Module, parameter: nn.Parameter) -> int:
    """Return a parameter's distance from the top of a tower whose layers are found by their size."""
    layers = layers_of(tower)
    for number, layer in enumerate(layers):
        if any(parameter is own for own in layer.parameters()):
            return len(layers) - number
    first = next((own for layer in layers for own in layer.parameters()), None)
    before = next((own for own in tower.parameters() if own is parameter or own is first), None)
    return len(layers) + 1 if before is parameter else 0


def depth(tower: nn.Module) -> int:
    """Return the number of layers of a transformer."""
    return len(getattr(tower, "encoder", tower).layers)


def make_optimizer(groups: list[dict], beta1: float, beta2: float, epsilon: float) -> torch.optim.AdamW:
    """AdamW, or Muon if the groups say which of them it is for."""
    kind = Muon if "muon" in groups[0] else torch.optim.AdamW
    return kind(groups, betas=(beta1, beta2), eps=epsilon, fused=True)


def learning_rate_factor(step: int, warmup_steps: int, progress: float) -> float:
    """Return the factor on the peak learning rate: linear warm-up times cosine decay to zero.

    Args:
        step: optimiser steps done.
        warmup_steps: steps of the warm-up; 0: none.
        progress: completed share of the run, from 0 to 1.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warm * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
