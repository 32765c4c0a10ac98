"""CLIP (Radford et al., 2021, arXiv:2103.00020)."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from ..configuration.clip import VlpClipConfig
from ..configuration.text import VlpSiglipTextConfig
from ..configuration.towers import VlpTextTowerConfig, VlpVisionTowerConfig
from ..configuration.vision import VlpBlipViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpViTConfig
from .base import VlpPreTrainedModel
from .known_texts import KnownTexts
from .layers import make_projection
from .losses import clip_loss, siglip_loss
from .outputs import VlpClipOutput
from .resnet import ModifiedResNet
from .siglip import SiglipTextTransformer, SiglipViT
from .text import TextTransformer
from .towers import TextTower, VisionTower
from .vit import BlipViT, ViT

MAX_LOGIT_SCALE = math.log(100)
# By model type: if the code is loaded from a model's folder, a class can exist twice.
VISION_TOWERS = {VlpModifiedResNetConfig.model_type: ModifiedResNet, VlpSiglipViTConfig.model_type: SiglipViT,
                 VlpBlipViTConfig.model_type: BlipViT, VlpVisionTowerConfig.model_type: VisionTower}  # fmt: skip
TEXT_TOWERS = {VlpSiglipTextConfig.model_type: SiglipTextTransformer, VlpTextTowerConfig.model_type: TextTower}
VARIABLE = (VlpViTConfig.model_type, VlpSiglipViTConfig.model_type, VlpBlipViTConfig.model_type)  # read patches
PROJECTED = (VlpModifiedResNetConfig.model_type, VlpSiglipViTConfig.model_type)  # towers whose pooling projects

# Shapes: B images, T captions, N tokens, C channels, S image side, P patch side, E embedding


class VlpClipModel(VlpPreTrainedModel):
    """An image tower and a text tower that share one embedding space.

    Example:
        >>> model = AutoModel.from_pretrained("runs/clip-emoji")
        >>> model(**processor(text=["a cat", "a dog"], images=image, return_tensors="pt", padding=True))
    """

    config_class = VlpClipConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _no_split_modules = ["PatchEmbeddings", "TextEmbeddings", "Block", "Bottleneck", "AttentionPool2d",
                         "AttentionPooling"]  # fmt: skip

    def __init__(self, config: VlpClipConfig):
        super().__init__(config)
        vision, text, size = config.vision_config, config.text_config, config.projection_dim
        self.vision_model = VISION_TOWERS.get(vision.model_type, ViT)._from_config(vision)
        self.text_model = TEXT_TOWERS.get(text.model_type, TextTransformer)._from_config(text)
        self.visual_projection = nn.Identity()  # the ResNet and SigLIP need none after attention pooling
        if vision.model_type not in PROJECTED:
            self.visual_projection = make_projection(
                vision.hidden_size, size, config.visual_projection_hidden_size, config.projection_dropout, bias=False
            )
        has_bias = text.model_type == VlpSiglipTextConfig.model_type
        self.text_projection = make_projection(
            text.hidden_size, size, config.text_projection_hidden_size, config.projection_dropout, has_bias
        )
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.logit_bias = None
        if config.logit_bias_init_value is not None:
            self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias_init_value))
        self.known_texts = KnownTexts()
        self.post_init()

    def initialize(self) -> None:
        for projection in (self.visual_projection, self.text_projection):
            if isinstance(projection, nn.Linear):
                init.normal_(projection.weight, std=projection.in_features**-0.5)
                if projection.bias is not None:
                    init.zeros_(projection.bias)
        init.constant_(self.logit_scale, self.config.logit_scale_init_value)
        if self.logit_bias is not None:
            init.constant_(self.logit_bias, self.config.logit_bias_init_value)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp the scale to [1, 100], as in the paper, after each step (open_clip, train.py)."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        spatial_shapes: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed images.

        Args:
            pixel_values: (B, C, S, S), or patches (B, N, P * P * C) of images of any shape, for a vision transformer.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            pooled_only: skip the computation in the last layer that `pooler_output` does not need; its values are the
                same, and `last_hidden_state` is None.
            spatial_shapes: (B, 2), the rows and columns of the patches of each image.
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            kwargs: ignored, so that the processor's output can be passed as it is.

        Returns:
            `pooler_output` (B, E), projected but not normalised, as in transformers' CLIPModel, and
            `last_hidden_state`.

        Raises:
            ValueError: if the images do not have the required size, or the tower cannot embed patches.
        """
        kind = self.config.vision_config.model_type
        if pixel_values.ndim == 3 and kind not in VARIABLE:
            raise ValueError(f"Only a vision transformer embeds images of variable shape; the image tower is a {kind}.")
        output = self.vision_model(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            pooled_only=pooled_only,
            **({"spatial_shapes": spatial_shapes} if kind in VARIABLE else {}),
            **self.output_flags(output_hidden_states, output_attentions),
        )
        output.pooler_output = self.visual_projection(output.pooler_output)
        return output

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pooled_only: bool = False,
        pack: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed captions.

        Args:
            input_ids: (T, N), each with an end token.
            attention_mask: ignored: padding is on the right, where causal attention does not attend to it.
            position_ids: (T, N); if None, 0 to N - 1.
            pooled_only: as for `get_image_features`.
            pack: with `pooled_only`, skip the computation for padding if `attention.packs` (except for SigLIP, which
                attends to padding).
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            kwargs: ignored, so that the processor's output can be passed as it is.

        Returns:
            `pooler_output` (T, E), projected but not normalised, and `last_hidden_state`.
        """
        output = self.text_model(
            input_ids,
            position_ids=position_ids,
            pooled_only=pooled_only,
            pack=pack,
            **self.output_flags(output_hidden_states, output_attentions),
        )
        output.pooler_output = self.text_projection(output.pooler_output)
        return output

    def cached_text_features(
        self, input_ids: Tensor, position_ids: Tensor | None, pooled_only: bool, **flags: bool | None
    ) -> BaseModelOutputWithPooling:
        """Embed captions as `get_text_features` does, but reuse the output for captions that are repeated.

        Outputs are reused only in evaluation mode and without gradients. The zero-shot pipeline of transformers passes
        all labels again with every image.

        Args:
            input_ids, position_ids, pooled_only: as for `get_text_features`.
            flags: `output_hidden_states` and `output_attentions`.
        """

        def compute() -> BaseModelOutputWithPooling:
            options = flags | {"pooled_only": pooled_only, "return_dict": True}
            return self.get_text_features(input_ids, position_ids=position_ids, **options)

        if position_ids is not None or any(self.output_flags(**flags).values()):
            return compute()
        kernel = self.config.text_config._attn_implementation
        setting = pooled_only, torch.is_autocast_enabled(input_ids.device.type), kernel
        modules = [self.text_model, self.text_projection]
        return self.known_texts.get(input_ids, modules, self.get_input_embeddings(), setting, compute)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        spatial_shapes: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> VlpClipOutput:
        """Compare every image with every caption.

        Args:
            input_ids, attention_mask, position_ids: as for `get_text_features`.
            pixel_values, interpolate_pos_encoding, pooled_only, spatial_shapes: as for `get_image_features`.
            return_loss: also compute the loss of the batch, in which image i belongs to caption i: the sigmoid loss if
                the model has a `logit_bias`, else the softmax loss.
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            kwargs: ignored, such as `num_items_in_batch` of `Trainer`.

        Returns:
            The logits, embeddings and tower outputs, and the loss if requested.
        """
        flags = dict(
            pooled_only=pooled_only, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        vision = self.get_image_features(
            pixel_values, interpolate_pos_encoding, spatial_shapes=spatial_shapes, return_dict=True, **flags
        )
        text = self.cached_text_features(input_ids, position_ids, **flags)
        image_embeds = nn.functional.normalize(vision.pooler_output, dim=-1)
        text_embeds = nn.functional.normalize(text.pooler_output, dim=-1)
        scale, loss = self.logit_scale.exp(), None
        logits_per_image = scale * image_embeds @ text_embeds.T  # (B, T)
        if self.logit_bias is not None:
            logits_per_image = logits_per_image + self.logit_bias
        if return_loss and self.logit_bias is not None:
            loss = siglip_loss(image_embeds, text_embeds, scale, self.logit_bias)
        elif return_loss:
            loss = clip_loss(image_embeds, text_embeds, scale)
        return VlpClipOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )
