"""CLIP's causal text transformer. Source: openai/CLIP, clip/model.py, CLIP.encode_text."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration.text import VlpClipTextConfig
from .attention import Packing, packs
from .base import VlpPreTrainedModel
from .layers import Encoder, take_rows

# Shapes: B batch, N tokens, D width


class TextEmbeddings(nn.Module):
    """Word and position embeddings."""

    def __init__(self, config: VlpClipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def initialize(self) -> None:
        init.normal_(self.token_embedding.weight, std=0.02)
        init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        length, most = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > most:
            raise ValueError(
                f"The captions have {length} tokens, but the model supports at most {most}: truncate them."
            )
        position = self.position_embedding.weight[:length]
        if position_ids is not None:
            position = self.position_embedding(position_ids)
        return self.token_embedding(input_ids) + position  # (B, N, D)


class TextTransformer(VlpPreTrainedModel):
    """Causal transformer, pooled at the first end token.

    Padding is on the right, where the end token does not attend to it. No mask is needed, the length may vary between
    calls, and with `pooled_only` the tokens after the end token can be skipped.
    """

    config_class = VlpClipTextConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _no_split_modules = ["TextEmbeddings", "Block"]
    is_causal = True

    def __init__(self, config: VlpClipTextConfig):
        super().__init__(config)
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, is_causal=self.is_causal)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.token_embedding = value

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
            input_ids: (B, N), each with an end token.
            position_ids: (B, N); if None, 0 to N - 1.
            pooled_only: compute only the end token in the last layer; `last_hidden_state` is then None.
            pack: with `pooled_only`, skip the tokens after the end token, if `attention.packs`.
            kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            `last_hidden_state` (B, N, D) and `pooler_output` (B, D), both after the final LayerNorm.

        Raises:
            ValueError: if the texts are too long.
        """
        x = self.embeddings(input_ids, position_ids)
        end = (input_ids == self.config.eos_token_id).int().argmax(dim=-1)  # the first: it may also be the pad token
        mask = create_causal_mask(self.config, inputs_embeds=x, attention_mask=None, past_key_values=None)
        packing = None
        if pack and pooled_only and not any(kwargs.values()) and packs(x):
            packing = Packing(torch.arange(x.shape[1], device=x.device) <= end[:, None])
            x = packing.pack(x)
        encoded = self.encoder(x, mask, pool_at=end if pooled_only else None, packing=packing, **kwargs)
        last = self.final_layer_norm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else last,
            pooler_output=last[:, 0] if pooled_only else take_rows(last, end)[:, 0],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
