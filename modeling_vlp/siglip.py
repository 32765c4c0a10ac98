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
from .text import TextTransformer
from .vit import PatchEmbeddings

# Shapes: B batch, C channels, S image side, N tokens, D width


class AttentionPooling(nn.Module):
    """A learned query that pools the patches (multi-head attention pooling), and an MLP after it."""

    def __init__(self, config: VlpSiglipViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = Attention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def initialize(self) -> None:
        init.normal_(self.probe, std=self.probe.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)"""
        pooled = self.attention.forward_one(self.probe.expand(x.shape[0], -1, -1), x)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


def initialize_blocks(encoder: nn.Module) -> None:
    """Xavier's start for every projection, as big_vision's."""
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
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, pooled_only: bool = False, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Images (B, C, S, S) -> `last_hidden_state` (B, N, D) and `pooler_output` (B, D); all patches are needed."""
        encoded = self.encoder(self.embeddings(pixel_values, interpolate_pos_encoding), **kwargs)
        last = self.post_layernorm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=self.head(last),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def resize_images(self, image_size: int) -> None:
        """Let the model take images of another size: its positions are resampled."""
        self.embeddings.resize_images(image_size)


class SiglipTextTransformer(TextTransformer):
    """Bidirectional transformer, pooled at the last place of texts padded to their full length.

    Padding is attended to, as in the original: whatever length texts come in, they are padded on to the full one.
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
        """Token ids (B, up to the full length) -> `last_hidden_state` (B, full length, D), `pooler_output` (B, D).

        Args:
            pack: accepted and not needed: padding is attended to.
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
