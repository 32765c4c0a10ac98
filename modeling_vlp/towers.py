"""Towers that are models of transformers: an adapter to the interface of vlp's own towers."""

import inspect
import re

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration.towers import VlpTextTowerConfig, VlpTowerConfig, VlpVisionTowerConfig
from .base import VlpPreTrainedModel
from .layers import masked_mean

# Shapes: B batch, C channels, S image side, N tokens or patches, H x W cells of a grid, D width


class Tower(VlpPreTrainedModel):
    """What both towers share: the model of transformers, without its pooling layer unless that is used."""

    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []

    def __init__(self, config: VlpTowerConfig):
        super().__init__(config)
        self.model = AutoModel.from_config(config.tower, **pooling_option(config.tower, config.pooling))
        self.post_init()

    def run(self, inputs: dict, flags: dict) -> BaseModelOutputWithPooling:
        """Run the model with the flags that it knows; hidden states and attentions it may not have."""
        known = {name: value for name, value in flags.items() if value}
        return self.model(**inputs, **known, return_dict=True)


class VisionTower(Tower):
    """An image tower of transformers, timm included (through `TimmWrapperModel`)."""

    config_class = VlpVisionTowerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, pooled_only: bool = False, **flags: bool
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (B, C, S, S).
            interpolate_pos_encoding: accept images of another size, if the model can.
            pooled_only: ignored, because the whole model runs.
            flags: `output_hidden_states` and `output_attentions`.

        Returns:
            `last_hidden_state` (B, N, D), of a grid row by row, and `pooler_output` (B, D).

        Raises:
            ValueError: if the images do not have the required size.
        """
        side, resample = self.config.image_size, interpolate_pos_encoding
        if pixel_values.shape[-2:] != (side, side) and not interpolate_pos_encoding:
            raise ValueError(
                f"The images have {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels, but the model expects "
                f"{side} x {side}: use its processor, or pass interpolate_pos_encoding=True."
            )
        inputs = {"pixel_values": pixel_values.to(self.dtype)}
        resample = resample or side != getattr(self.config.tower, "image_size", side)
        if resample and "interpolate_pos_encoding" in parameters_of(type(self.model).forward):
            inputs["interpolate_pos_encoding"] = True
        if self.config.pooling == "stages":
            flags = flags | {"output_hidden_states": True}
        output = self.run(inputs, flags)
        states = output.last_hidden_state
        cells = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states  # (B, D, H, W) -> (B, N, D)
        return BaseModelOutputWithPooling(
            last_hidden_state=cells,
            pooler_output=self.pool(output, cells, pixel_values.shape[-2:]),
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    def pool(self, output, cells: Tensor, size: torch.Size) -> Tensor:
        """Pool the outputs of all positions (B, N, D) to (B, D); `size` is that of the images."""
        if self.config.pooling in ("pooler", "stages"):
            if getattr(output, "pooler_output", None) is None:
                raise ValueError(f"A {self.config.tower.model_type} has no pooled output: choose another pooling.")
            pooled = output.pooler_output.flatten(1)
            if self.config.pooling == "pooler":
                return pooled
            means = [x.mean(dim=(2, 3)) if x.ndim == 4 else x.mean(dim=1) for x in output.hidden_states]
            return torch.cat([*means, pooled], dim=1)
        if self.config.pooling == "cls":
            return cells[:, 0]
        patches = cells[:, tokens_before(self.config.tower, cells.shape[1], size) :]
        return patches.mean(dim=1) if self.config.pooling == "mean" else patches.amax(dim=1)

    def resize_images(self, image_size: int) -> None:
        """Accept images of another size, in pixels; position embeddings are resampled each time, if there are any."""
        self.config.image_size = image_size


class TextTower(Tower):
    """A text encoder of transformers. Tokens do not attend to padding."""

    config_class = VlpTextTowerConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        pooled_only: bool = False,
        pack: bool = False,
        **flags: bool,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Args:
            input_ids: (B, N), padded on the right.
            position_ids: (B, N); if None, those of the model.
            pooled_only, pack: ignored, because the whole model runs.
            flags: `output_hidden_states` and `output_attentions`.

        Returns:
            `last_hidden_state` (B, N, D) and `pooler_output` (B, D).

        Raises:
            ValueError: if the texts are too long.
        """
        most = self.config.max_position_embeddings
        if input_ids.shape[1] > most:
            raise ValueError(
                f"The texts have {input_ids.shape[1]} tokens, but the model supports at most {most}: truncate them."
            )
        mask = text_mask(input_ids, self.config.pad_token_id, getattr(self.config.tower, "eos_token_id", None))
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        output = self.run(inputs, flags)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.pool(output, mask),
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    def pool(self, output, mask: Tensor) -> Tensor:
        """Pool the outputs of the tokens (B, N, D) that a mask (B, N) selects to (B, D)."""
        states = output.last_hidden_state
        if self.config.pooling == "pooler":
            return output.pooler_output
        if self.config.pooling == "cls":
            return states[:, 0]
        if self.config.pooling == "eos":
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
            return states[torch.arange(len(states), device=states.device), last]
        if self.config.pooling == "mean":
            return masked_mean(states, mask)
        return states.masked_fill(mask[..., None] == 0, -torch.inf).amax(dim=1)


def text_mask(input_ids: Tensor, pad_token_id: int, eos_token_id: int | None) -> Tensor:
    """The mask (B, N) of the tokens that are not padding. An end token that also pads counts once in each text."""
    mask = (input_ids != pad_token_id).long()
    if eos_token_id == pad_token_id:
        mask[:, 1:] |= mask[:, :-1].clone()
    mask[:, 0] = 1  # a text has at least one token
    return mask


def layers_of(tower: nn.Module) -> list[nn.Module]:
    """The repeated layers, or the stages, of any tower, from first to last.

    They are the children of that container of the tower that has the most parameters.
    """
    stages = [module for name, module in tower.named_children() if re.fullmatch(r"layer\d+", name)]
    if stages:  # vlp's ResNet
        return stages
    found = [module for module in tower.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    found = [module for module in found if len(module) > 1]
    # The first of equals is the outermost one.
    return list(max(found, key=size_of)) if found else []


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def lock(tower: nn.Module, unlocked_layers: int = 0) -> None:
    """Freeze a tower, except for its last layers and what follows them, such as a final normalisation.

    Args:
        tower: the tower.
        unlocked_layers: number of layers, or of stages, to leave as they are.

    Raises:
        ValueError: if the tower has fewer layers.
    """
    tower.requires_grad_(False)
    if not unlocked_layers:
        return
    layers = layers_of(tower)
    if unlocked_layers > len(layers):
        raise ValueError(f"the tower has {len(layers)} layers, so {unlocked_layers} cannot be unlocked")
    first, reached = next(layers[-unlocked_layers].parameters()), False
    for parameter in tower.parameters():
        reached = reached or parameter is first
        parameter.requires_grad_(reached)


def frozen_parts(module: nn.Module) -> list[nn.Module]:
    """The largest parts of a module that have parameters, none of which is trained."""
    parameters = list(module.parameters())
    if not parameters:
        return []
    if not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [part for child in module.children() for part in frozen_parts(child)]


def pooling_option(config: PreTrainedConfig, pooling: str) -> dict[str, bool]:
    """The option that builds transformers' model without a pooling layer; empty if it is used or there is none."""
    kind = AutoModel._model_mapping[type(config)]
    can = isinstance(kind, type) and "add_pooling_layer" in parameters_of(kind.__init__)
    return {"add_pooling_layer": False} if can and pooling not in ("pooler", "stages") else {}


def parameters_of(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def tokens_before(config: PreTrainedConfig, count: int, size: torch.Size) -> int:
    """The number of tokens before those of the patches, such as a class token and registers.

    Args:
        config: configuration of transformers' model.
        count: number of its outputs.
        size: height and width of the images.
    """
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        return 0
    return max(0, count - (size[0] // patch) * (size[1] // patch))
