"""What every model of the package shares: loading, saving, and how weights start."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .publishing import PublishesCode


class VlpPreTrainedModel(PublishesCode, PreTrainedModel):
    """A PreTrainedModel whose modules say themselves how their weights start, in a method `initialize`.

    Without one, linear and convolution layers start as PyTorch's own. Children come before their parents, so a parent's
    `initialize` overrides what its layers got.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # attention.py dispatches for all; transformers looks for that in each model's own file

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside transformers it passes over modules that own no parameter themselves, to protect loaded
        # weights from plain `torch.nn.init`. Ours all go through `transformers.initialization`, which does so too.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "initialize"):
            module.initialize()
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, nn.Embedding)):
            super()._init_weights(module)

    def output_flags(self, output_hidden_states: bool | None, output_attentions: bool | None) -> dict[str, bool]:
        """What the caller asked for, else what the configuration says."""
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        return {name: bool(getattr(self.config, name) if flag is None else flag) for name, flag in asked.items()}


def adopt(model: PreTrainedModel, find) -> PreTrainedModel:
    """Give each tensor of a model what `find` gives for its name, where there is such a tensor of the same shape."""
    state = {}
    for name, value in model.state_dict().items():
        found = find(name)
        if found is not None and found.shape == value.shape:
            state[name] = found
    model.load_state_dict(state, strict=False)
    return model
