"""FSDP2 and DeepSpeed: prepare a model and its objective for sharding, and gather the model again."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
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


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Gather the parameters that DeepSpeed's ZeRO-3 divides; every process must call this.

    Args:
        parameters: parameters to read or change. Without ZeRO-3, nothing is done.
        changed: whether the block changes them, in the same way in each process.

    Yields:
        Once; until the end of the block, each process has all values.
    """
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    # DeepSpeed keeps small parameters whole between steps, and expects to find them so.
    kept = [parameter for parameter in divided if parameter.ds_status.name == "AVAILABLE"]
    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if changed else None):
        yield
    if kept:
        kept[0].all_gather(param_list=kept)


def size_of(model: nn.Module) -> int:
    """Return the number of parameters of a model, divided or not."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """Gather a sharded model; every process must call this.

    Args:
        model: model that FSDP2 or DeepSpeed may divide, or a whole one that was prepared for them.

    Returns:
        A copy with all parameters, in evaluation mode, to evaluate or save.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    else:
        with gathered(model.parameters()):
            state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    language_model = getattr(model, "language_model", None)
    extra = [] if language_model is None else [type(language_model)(language_model.config)]
    copy = type(model)(model.config, *extra).eval()
    own = copy.state_dict()
    copy.load_state_dict({name: value.reshape(own[name].shape) for name, value in state.items()})
    return copy.to(next(iter(state.values())).device)


def number(parameter: nn.Parameter) -> float:
    """Convert a parameter with one element, sharded or not, to a float; every process must call this."""
    with torch.no_grad(), gathered([parameter]):
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).item()
