"""SigLIP's towers (Zhai et al., 2023, arXiv:2303.15343), for `VlpClipModel`.

Sources: google-research/big_vision, models/vit.py, models/proj/image_text/two_towers.py; transformers' SiglipModel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration.text import VlpSiglipTextConfig
from ..configuration.vision import VlpSiglipViTConfig
from .attention import Attention
from .base import VlpPreTrainedModel
from .layers import MLP, Encoder
from .patches import encode_real
from .text import TextTransformer
from .vit import PatchEmbeddings

# Shapes: B batch, C channels, S image side, N tokens, D width


class AttentionPooling(nn.Module):
    """A learned query that pools the patches (multi-head attention pooling), followed by an MLP."""

    def __init__(self, config: VlpSiglipViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = Attention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def initialize(self) -> None:
        init.normal_(self.probe, std=self.probe.shape[-1] ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool the patches: (B, N, D) -> (B, D), without those that a mask (B, N) has False for."""
        visible = None if mask is None else mask[:, None, None]
        pooled = self.attention.forward_one(self.probe.expand(x.shape[0], -1, -1), x, visible)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


def initialize_blocks(encoder: nn.Module) -> None:
    """Initialise every projection with Xavier uniform, as big_vision does."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)


class SiglipViT(VlpPreTrainedModel):
    """Vision transformer without a class token, pooled by attention."""

    config_class = VlpSiglipViTConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["PatchEmbeddings", "Block", "AttentionPooling"]

    def __init__(self, config: VlpSiglipViTConfig):
        super().__init__(config)
        self.embeddings = PatchEmbeddings(config, bias=True, class_token=False)
        self.encoder = Encoder(config, is_causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = AttentionPooling(config)
        self.post_init()

    def initialize(self) -> None:
        initialize_blocks(self.encoder)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        spatial_shapes: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (B, C, S, S), or patches (B, N, P * P * C) of images of any shape.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            pooled_only: ignored, because pooling needs all patches.
            spatial_shapes: (B, 2), the rows and columns of the patches of each image.
            kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            `last_hidden_state` (B, N, D) and `pooler_output` (B, D).

        Raises:
            ValueError: if the images do not have the required size.
        """
        x, mask = self.embeddings(pixel_values, interpolate_pos_encoding, spatial_shapes)
        encoded = encode_real(self.encoder, self.config, x, mask, **kwargs)
        last = self.post_layernorm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=self.head(last, mask),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def resize_images(self, image_size: int) -> None:
        """Adapt the model to images of another size, in pixels, by resampling its position embeddings."""
        self.embeddings.resize_images(image_size)


class SiglipTextTransformer(TextTransformer):
    """Bidirectional transformer, pooled at the last position of texts padded to their full length.

    Tokens attend to padding, as in the original, so shorter inputs are padded to the full length.
    """

    config_class = VlpSiglipTextConfig
    is_causal = False

    def initialize(self) -> None:
        initialize_blocks(self.encoder)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        pooled_only: bool = False,
        pack: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Args:
            input_ids: (B, N), N at most the full length.
            position_ids: (B, full length); if None, 0 to the full length - 1.
            pooled_only: compute only the last position in the last layer; `last_hidden_state` is then None.
            pack: ignored, because texts attend to padding.
            kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            `last_hidden_state` (B, full length, D) and `pooler_output` (B, D).

        Raises:
            ValueError: if the texts are too long.
        """
        most = self.config.max_position_embeddings
        missing = max(0, most - input_ids.shape[1])
        x = self.embeddings(F.pad(input_ids, (0, missing), value=self.config.pad_token_id), position_ids)
        last_row = x.new_full((x.shape[0],), most - 1, dtype=torch.long) if pooled_only else None
        encoded = self.encoder(x, pool_at=last_row, **kwargs)
        last = self.final_layer_norm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else last,
            pooler_output=last[:, -1],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
