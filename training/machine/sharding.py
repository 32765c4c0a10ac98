"""FSDP2: prepare a model and its objective for sharding, and gather the model again."""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def make_shardable(objective: nn.Module) -> None:
    """Turn scalar parameters into vectors of one element, and make convolutions contiguous, as FSDP2 requires.

    The computation stays the same; `whole_model` restores the scalars.

    Args:
        objective: objective to change, with its model.
    """
    objective.to(memory_format=torch.contiguous_format)
    for module in objective.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach()[None], parameter.requires_grad))


def repeated_layers(model: nn.Module) -> list[str]:
    """Return the class names of the repeated layers of a model; each layer becomes one FSDP unit."""
    return sorted({type(module).__name__ for module in model.modules() if is_layer(module)})


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def let_layers_precompute(objective: nn.Module) -> None:
    """Gather a layer's weights for its `keys_values` too, which is called before `forward`."""
    for module in objective.modules():
        if isinstance(module, FSDPModule) and is_layer(module) and hasattr(module, "keys_values"):
            register_fsdp_forward_method(module, "keys_values")


def whole_model(model: PreTrainedModel, by_deepspeed: bool = False) -> PreTrainedModel:
    """Gather a sharded model; every process must call this.

    Args:
        model: sharded model.
        by_deepspeed: whether DeepSpeed divides it, and not FSDP2.

    Returns:
        A copy with all parameters, in evaluation mode, to evaluate or save.
    """
    if not by_deepspeed:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    else:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):  # does nothing unless ZeRO-3 divides them
            state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    language_model = getattr(model, "language_model", None)
    extra = [] if language_model is None else [type(language_model)(language_model.config)]
    copy = type(model)(model.config, *extra).eval()
    own = copy.state_dict()
    copy.load_state_dict({name: value.reshape(own[name].shape) for name, value in state.items()})
    return copy.to(next(iter(state.values())).device)


def number(value: Tensor) -> float:
    """Convert a tensor with one element, sharded or not, to a float; every process must call this."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()
