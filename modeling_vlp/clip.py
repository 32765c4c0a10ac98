"""CLIP (Radford et al., 2021, arXiv:2103.00020)."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from ..configuration.clip import VlpClipConfig
from ..configuration.text import VlpSiglipTextConfig
from ..configuration.vision import VlpModifiedResNetConfig, VlpSiglipViTConfig
from .base import VlpPreTrainedModel
from .known_texts import KnownTexts
from .losses import clip_loss, siglip_loss
from .outputs import VlpClipOutput
from .resnet import ModifiedResNet
from .siglip import SiglipTextTransformer, SiglipViT
from .text import TextTransformer
from .vit import ViT

MAX_LOGIT_SCALE = math.log(100)

# Shapes: B images, T captions, N tokens, C channels, S image side, E embedding


class VlpClipModel(VlpPreTrainedModel):
    """An image tower and a text tower that meet in one embedding space.

    Example:
        >>> model = AutoModel.from_pretrained("runs/clip-emoji")
        >>> model(**processor(text=["a cat", "a dog"], images=image, return_tensors="pt", padding=True))
    """

    config_class = VlpClipConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _no_split_modules = ["PatchEmbeddings", "TextEmbeddings", "Block", "Bottleneck", "AttentionPool2d",
                         "AttentionPooling"]  # fmt: skip

    def __init__(self, config: VlpClipConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        towers = {VlpModifiedResNetConfig: ModifiedResNet, VlpSiglipViTConfig: SiglipViT}
        is_siglip = isinstance(text, VlpSiglipTextConfig)
        self.vision_model = towers.get(type(vision), ViT)._from_config(vision)
        self.text_model = (SiglipTextTransformer if is_siglip else TextTransformer)._from_config(text)
        self.visual_projection = nn.Identity()  # attention pooling, the ResNet's and SigLIP's, projects already
        if type(vision) not in towers:
            self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=is_siglip)
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
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.embeddings.token_embedding = value

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale between 1 and 100, as the paper does after each step (open_clip, train.py)."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Embed images (B, C, S, S): `pooler_output` (B, E) is projected, not normalised, as transformers' CLIPModel.

        Args:
            interpolate_pos_encoding: resample the positions for images of another size than the model was made for.
            pooled_only: skip what the pooled output does not need in the last layer (the same values, less work);
                `last_hidden_state` is then None.
        """
        output = self.vision_model(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            pooled_only=pooled_only,
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
    ) -> BaseModelOutputWithPooling:
        """Embed captions (T, N), each with an end token: `pooler_output` (T, E) is projected, not normalised.

        Args:
            attention_mask: accepted and not needed: padding goes on the right, where causal attention never looks.
            pooled_only: as for `get_image_features`.
            pack: where pooled only, leave padding out (but of SigLIP, which attends to it); a GPU's host then waits.
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

    def read_texts(
        self, input_ids: Tensor, position_ids: Tensor | None, pooled_only: bool, **flags: bool | None
    ) -> BaseModelOutputWithPooling:
        """`get_text_features`; what comes again to a model in evaluation, without gradients, is not read again.

        The stock zero-shot pipeline asks about all labels anew for each image.
        """

        def compute() -> BaseModelOutputWithPooling:
            return self.get_text_features(input_ids, position_ids=position_ids, pooled_only=pooled_only, **flags)

        if position_ids is not None or any(self.output_flags(**flags).values()):
            return compute()
        kernel = self.config.text_config._attn_implementation
        setting = pooled_only, torch.is_autocast_enabled(input_ids.device.type), kernel
        modules = [self.text_model, self.text_projection]
        return self.known_texts.read(input_ids, modules, self.get_input_embeddings(), setting, compute)

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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> VlpClipOutput:
        """Compare every image with every caption.

        Args: as `get_image_features` and `get_text_features`;
            return_loss: also the loss over the batch, image i belonging to caption i: the sigmoid loss where the
                model has a `logit_bias`, else the softmax loss.
        """
        flags = dict(
            pooled_only=pooled_only, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        vision = self.get_image_features(pixel_values, interpolate_pos_encoding, **flags)
        text = self.read_texts(input_ids, position_ids, **flags)
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
