"""FSDP2: what a model and its objective need for their parameters to be spread over processes."""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def make_shardable(objective: nn.Module) -> None:
    """Let scalars (a scale, a temperature) be vectors of one entry, and convolutions be contiguous, as FSDP2 needs.

    What is computed with them is the same; `whole_model` gives scalars back as they were.
    """
    objective.to(memory_format=torch.contiguous_format)
    for module in objective.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach()[None], parameter.requires_grad))


def repeated_layers(model: nn.Module) -> list[str]:
    """Names of the classes of which each instance is sharded by itself: the layers that a tower repeats."""
    return sorted({type(module).__name__ for module in model.modules() if is_layer(module)})


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def let_layers_be_read(objective: nn.Module) -> None:
    """Have a layer's weights there for its `read`, too, which computes keys and values of images before `forward`."""
    for module in objective.modules():
        if isinstance(module, FSDPModule) and is_layer(module) and hasattr(module, "read"):
            register_fsdp_forward_method(module, "read")


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with all parameters, in evaluation mode, to evaluate and to save; every process calls this."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    writer = getattr(model, "language_model", None)
    copy = type(model)(model.config, *([type(writer)(writer.config)] if writer is not None else [])).eval()
    own = copy.state_dict()
    copy.load_state_dict({name: value.reshape(own[name].shape) for name, value in state.items()})
    return copy.to(next(iter(state.values())).device)


def number(value: Tensor) -> float:
    """A tensor of one entry as a number, sharded or not; every process calls this."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()
