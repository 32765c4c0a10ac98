"""The base class of all models: loading, saving and weight initialisation."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .publishing import PublishesCode


class VlpPreTrainedModel(PublishesCode, PreTrainedModel):
    """A PreTrainedModel whose modules define their own initialisation, in a method `initialize`.

    Linear and convolution layers without one are initialised as in PyTorch. Children are initialised before their
    parents, so a parent's `initialize` overrides its layers' own.
    """

    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means over the batch; `Trainer` divides them by the accumulated steps
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    # The other architectures whose checkpoints have all weights of this class; None: any.
    loads: tuple[str, ...] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a model as transformers does.

        Raises:
            ValueError: if the checkpoint is one of another class of vlp that lacks weights of this class, as when an
                Auto class of transformers is not the one for the model.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        saved = (getattr(model.config, "architectures", None) or [cls.__name__])[0]
        fits = {kind.__name__ for kind in cls.__mro__} | set(cls.loads or ())
        if cls.loads is not None and str(saved).startswith("Vlp") and saved not in fits:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a {saved}, which lacks weights of {cls.__name__}: load it with "
                f"{saved}.from_pretrained."
            )
        return loaded

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # attention.py dispatches for all models; transformers expects this in each model's file

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For custom code, transformers skips modules that own no parameter, to protect loaded weights from plain
        # `torch.nn.init`. Our modules use `transformers.initialization`, which protects loaded weights itself.
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

    def output_flags(self, output_hidden_states: bool | None, output_attentions: bool | None) -> dict:
        """Return the flags that the caller set; those that are None come from the configuration."""
        flags = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        return {name: getattr(self.config, name) if flag is None else flag for name, flag in flags.items()}


def loaded(kind: type[PreTrainedModel], source: "str | PreTrainedModel", **kwargs) -> PreTrainedModel:
    """A model that is given, or that of a folder or hub name; `kwargs` are options of `from_pretrained`."""
    return source if isinstance(source, PreTrainedModel) else kind.from_pretrained(source, **kwargs)


def adopt(model: PreTrainedModel, find) -> PreTrainedModel:
    """Initialise a model from the tensors of another checkpoint.

    Args:
        model: the model to change in place.
        find: maps a name of the model's state dict to a tensor, or to None. A tensor of another shape is skipped.

    Returns:
        The model.
    """
    state = {}
    for name, value in model.state_dict().items():
        found = find(name)
        if found is not None and found.shape == value.shape:
            state[name] = found
    model.load_state_dict(state, strict=False)
    return model
