"""BLIP-2's querying transformer. Source: salesforce/LAVIS, models/blip2_models/Qformer.py; paper, section 3.1.

Learned queries attend to an image by cross-attention; a text has the same self-attention but its own feed-forward
layers. The attention between queries and text differs between the three tasks (figure 2 of the paper):

    queries, then the text separately       ITC    neither attends to the other
    queries and text together               ITM    all attend to all
    queries, which are cached; then
    the text, causally                      ITG    the text attends to the queries and to its earlier tokens
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..configuration.text import VlpQFormerConfig
from .attention import padding_mask_for
from .base import VlpPreTrainedModel
from .layers import MLP
from .med import Memory, ResidualAttention, initialize_as_bert

# Shapes: B images, M tokens of an image, T rows (texts, a multiple of B; images where there is none), Q queries,
# N tokens of a text, D width


class QFormerEmbeddings(nn.Module):
    """Concatenates queries and word embeddings with positions, then applies LayerNorm and dropout.

    Queries have no positions.

    Args:
        text: include word embeddings.
    """

    def __init__(self, config: VlpQFormerConfig, text: bool):
        super().__init__()
        self.word_embeddings = self.position_embeddings = None
        if text:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, query_embeds: Tensor | None, input_ids: Tensor | None, start: int) -> Tensor:
        """Embed queries and texts.

        Args:
            query_embeds: (T, Q, D) or None.
            input_ids: (T, N) or None.
            start: position of the first token of the text.

        Returns:
            (T, Q + N, D).

        Raises:
            ValueError: if the text is too long.
        """
        parts = [] if query_embeds is None else [query_embeds]
        if input_ids is not None:
            stop, most = start + input_ids.shape[1], self.position_embeddings.num_embeddings
            if stop > most:
                raise ValueError(f"The texts have {stop} tokens, but the model supports at most {most}: truncate them.")
            parts.append(self.word_embeddings(input_ids) + self.position_embeddings.weight[start:stop])
        return self.dropout(self.layer_norm(torch.cat(parts, dim=1)))


class ResidualMLP(nn.Module):
    """A feed-forward layer followed by dropout, the residual connection and LayerNorm, as in BERT."""

    def __init__(self, config: VlpQFormerConfig):
        super().__init__()
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x + self.dropout(self.mlp(x)))


class QFormerLayer(GradientCheckpointingLayer):
    """Self-attention of queries and text, cross-attention of the queries in some layers, and feed-forward layers."""

    def __init__(self, config: VlpQFormerConfig, layer_index: int, text: bool):
        super().__init__()
        self.self_attention = ResidualAttention(config, layer_index)
        self.cross_attention = None
        if layer_index % config.cross_attention_frequency == 0:
            self.cross_attention = ResidualAttention(config, layer_index, key_value_size=config.encoder_hidden_size)
        self.query_mlp = ResidualMLP(config)
        self.text_mlp = ResidualMLP(config) if text else None

    def copy_text_mlp(self) -> None:
        """Initialise the queries' feed-forward layers from the text's (LAVIS, blip2_qformer.py)."""
        if self.text_mlp is not None:
            for own, other in zip(self.query_mlp.parameters(), self.text_mlp.parameters(), strict=True):
                init.copy_(own, other)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of images for this layer's cross-attention."""
        return self.cross_attention.keys_values(states)

    def forward(
        self, x: Tensor, queries: int, mask, image_keys: Tensor | None = None, image_values: Tensor | None = None,
        past_keys: Tensor | None = None, past_values: Tensor | None = None, rows: int | None = None,
    ):  # fmt: skip
        """Run the layer. All tensors are positional arguments, so that reentrant checkpointing finds their gradients.

        Args:
            x: (T, Q + N, D), queries first.
            queries: Q, the number of queries, which attend to the image.
            mask: mask of self-attention.
            image_keys, image_values: of the images; None for no cross-attention.
            past_keys, past_values: of self-attention at earlier positions; None if there are none.
            rows: compute only this many first rows; None for all.

        Returns:
            The output, (T, Q + N, D) or (T, rows, D); the weights of self-attention and of cross-attention;
            self-attention's keys and values of `x`.
        """
        own, cross_weights = self.self_attention.keys_values(x), None
        key_values = own
        if past_keys is not None:
            key_values = torch.cat([past_keys, own[0]], dim=2), torch.cat([past_values, own[1]], dim=2)
        x, weights = self.self_attention(x if rows is None else x[:, :rows], mask, key_values=key_values)
        query, text = x[:, :queries], x[:, queries:]
        if queries and image_keys is not None:
            query, cross_weights = self.cross_attention(query, key_values=(image_keys, image_values))
        parts = ([self.query_mlp(query)] if queries else []) + ([self.text_mlp(text)] if text.shape[1] else [])
        return torch.cat(parts, dim=1), weights, cross_weights, *own


class QFormerModel(VlpPreTrainedModel):
    """The stack of Q-Former layers.

    Args:
        text: whether the model also takes texts; in stage 2, it takes only queries.
    """

    config_class = VlpQFormerConfig
    main_input_name = "query_embeds"
    input_modalities = ("image", "text")
    _no_split_modules = ["QFormerEmbeddings", "QFormerLayer"]

    def __init__(self, config: VlpQFormerConfig, text: bool = True):
        super().__init__(config)
        self.embeddings = QFormerEmbeddings(config, text)
        self.layers = nn.ModuleList(QFormerLayer(config, index, text) for index in range(config.num_hidden_layers))
        self.post_init()

    def initialize(self) -> None:
        initialize_as_bert(self, self.config)
        for layer in self.layers:
            layer.copy_text_mlp()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def memory_of(self, states: Tensor) -> Memory:
        """Compute keys and values of images (B, M, encoder_hidden_size) for every layer with cross-attention."""
        layers = [layer for layer in self.layers if layer.cross_attention is not None]
        return Memory([layer.keys_values(states) for layer in layers], states)

    def forward(
        self,
        query_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory: Memory | None = None,
        past_key_values: DynamicCache | None = None,
        decode: bool = False,
        start: int = 0,
        pooled_only: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the model on queries, on a text, or on both.

        Args:
            query_embeds: (T, Q, D) or None.
            input_ids: (T, N) or None.
            attention_mask: (T, N), 0 for padding of the text; if None, there is no mask.
            memory: keys and values of B images, to which the queries attend; rows b * T / B to (b + 1) * T / B - 1
                attend to image b. If None, there is no cross-attention.
            past_key_values: self-attention's keys and values of earlier positions; the new ones are appended to it.
            decode: the text attends to itself causally, and to everything in the cache.
            start: position of the text's first token; queries have no positions and are not counted.
            pooled_only: compute only the pooled rows in the last layer: the queries, or the first token if there are no
                queries. `last_hidden_state` is then (T, Q, D) or (T, 1, D).
            output_hidden_states, output_attentions: also return these, of all rows; `pooled_only` then has no effect.
            kwargs: ignored.

        Returns:
            `last_hidden_state` (T, Q + N, D), queries first.
        """
        if output_hidden_states or output_attentions:
            pooled_only = False
        queries = 0 if query_embeds is None else query_embeds.shape[1]
        length = 0 if input_ids is None else input_ids.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        x = self.embeddings(query_embeds, input_ids, start)
        if attention_mask is not None and queries + past:
            attention_mask = torch.cat([attention_mask.new_ones(len(x), queries + past), attention_mask], dim=1)
        rows = (queries or 1) if pooled_only and queries + length > 1 else None
        mask = first_mask = self.mask(x, x, attention_mask, decode, past_key_values)
        if rows is not None and attention_mask is not None:
            first_mask = self.mask(x[:, :rows], x, attention_mask, False, None)
        hidden_states, attentions, cross_attentions = (x,), (), ()
        image_key_values = iter(memory.key_values) if memory is not None else None
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            crosses = layer.cross_attention is not None and image_key_values is not None
            before = None, None
            if past:
                before = past_key_values.layers[index].keys, past_key_values.layers[index].values
            x, weights, cross_weights, *key_values = layer(
                x, queries, first_mask if last else mask, *(next(image_key_values) if crosses else (None, None)),
                *before, rows if last else None,
            )  # fmt: skip
            if past_key_values is not None:  # here, not in the layer: its forward pass may run twice (checkpointing)
                past_key_values.update(*key_values, index)
            hidden_states += (x,)
            attentions += (weights,)
            cross_attentions += (cross_weights,)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            cross_attentions=cross_attentions if output_attentions and memory is not None else None,
        )

    def mask(self, x: Tensor, states: Tensor, attention_mask, decode: bool, cache) -> Tensor | None:
        """Return the mask of self-attention from `x` to `states`, or to the cache and `x` if `decode`."""
        if decode:
            return create_causal_mask(self.config, x, attention_mask, cache)
        if attention_mask is None:
            return None
        return padding_mask_for(self.config, x, attention_mask, states)
