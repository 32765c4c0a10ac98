"""BLIP-2's querying transformer. Source: salesforce/LAVIS, models/blip2_models/Qformer.py; paper, section 3.1.

Learned queries read an image by cross-attention; a text goes through the same self-attention, and its own feed-forward
layers. Who sees whom makes three tasks of one stack (figure 2 of the paper):

    queries alone, then the text alone      ITC    neither sees the other
    queries and text together               ITM    everyone sees everyone
    queries alone, kept in a cache; then
    the text after them, causally           ITG    the text sees the queries, and of itself what is before
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..configuration.text import VlpQFormerConfig
from .base import VlpPreTrainedModel
from .layers import MLP
from .med import Memory, ResidualAttention, initialize_as_bert

# Shapes: B images, M tokens of an image, T rows (texts, a multiple of B; images where there is none), Q queries,
# N tokens of a text, D width


class QFormerEmbeddings(nn.Module):
    """Queries as they are, words with their positions after them; then LayerNorm and dropout over all.

    Args:
        text: whether there are words.
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
        """Queries (T, Q, D) and token ids (T, N), whose first has the position `start`, -> (T, Q + N, D)."""
        parts = [] if query_embeds is None else [query_embeds]
        if input_ids is not None:
            stop, most = start + input_ids.shape[1], self.position_embeddings.num_embeddings
            if stop > most:
                raise ValueError(f"The texts are {stop} tokens long, the model reads at most {most}: truncate them.")
            parts.append(self.word_embeddings(input_ids) + self.position_embeddings.weight[start:stop])
        return self.dropout(self.layer_norm(torch.cat(parts, dim=1)))


class ResidualMLP(nn.Module):
    """A feed-forward layer with BERT's surroundings: dropout, the residual, and the LayerNorm after them."""

    def __init__(self, config: VlpQFormerConfig):
        super().__init__()
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x + self.dropout(self.mlp(x)))


class QFormerLayer(GradientCheckpointingLayer):
    """Self-attention of all; cross-attention of the queries, in some layers; feed-forward layers of each kind."""

    def __init__(self, config: VlpQFormerConfig, layer_index: int, text: bool):
        super().__init__()
        self.self_attention = ResidualAttention(config, layer_index)
        self.cross_attention = None
        if layer_index % config.cross_attention_frequency == 0:
            self.cross_attention = ResidualAttention(config, layer_index, key_value_size=config.encoder_hidden_size)
        self.query_mlp = ResidualMLP(config)
        self.text_mlp = ResidualMLP(config) if text else None

    def copy_text_mlp(self) -> None:
        """The queries' feed-forward layers start as the text's (LAVIS, blip2_qformer.py)."""
        if self.text_mlp is not None:
            for own, other in zip(self.query_mlp.parameters(), self.text_mlp.parameters(), strict=True):
                init.copy_(own, other)

    def read(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of images, for this layer's cross-attention."""
        return self.cross_attention.read(states)

    def forward(self, x: Tensor, queries: int, mask, image_key_values=None, before=None, rows: int | None = None):
        """(T, Q + N, D) -> the same; the weights of both attentions; self-attention's keys and values.

        Args:
            queries: Q, the rows that stand first and read the image.
            before: self-attention's keys and values of what stands before `x`.
            rows: where given, so many of the first rows alone come out.
        """
        own, cross_weights = self.self_attention.read(x), None
        key_values = own if before is None else tuple(torch.cat(pair, dim=2) for pair in zip(before, own, strict=True))
        x, weights = self.self_attention(x if rows is None else x[:, :rows], mask, key_values=key_values)
        reading, text = x[:, :queries], x[:, queries:]
        if queries and image_key_values is not None:
            reading, cross_weights = self.cross_attention(reading, key_values=image_key_values)
        parts = ([self.query_mlp(reading)] if queries else []) + ([self.text_mlp(text)] if text.shape[1] else [])
        return torch.cat(parts, dim=1), weights, cross_weights, own


class QFormerModel(VlpPreTrainedModel):
    """The stack.

    Args:
        text: whether it reads texts, too; in stage 2 queries are all that it takes.
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

    def read(self, states: Tensor) -> Memory:
        """Keys and values of images (B, M, encoder_hidden_size), for every layer that attends to them."""
        crossing = [layer for layer in self.layers if layer.cross_attention is not None]
        return Memory([layer.read(states) for layer in crossing], states)

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
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Queries (T, Q, D), a text (T, N) or both -> `last_hidden_state` (T, Q + N, D), the queries first.

        Args:
            attention_mask: (T, N) of the text, 0 where there is padding; there is none where it is not given.
            memory: what the queries read, of B images; rows b * T / B to (b + 1) * T / B read image b.
            past_key_values: what was before: self-attention's keys and values are taken from it, and put into it.
            decode: the text attends to itself causally, and to all that the cache holds.
            start: position of the text's first token; queries have none, and are not counted.
            pooled_only: the last layer computes alone what is pooled, the queries, or where there are none the first
                token: `last_hidden_state` is (T, Q, D) or (T, 1, D).
        """
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
            before = None
            if past:
                before = past_key_values.layers[index].keys, past_key_values.layers[index].values
            x, weights, cross_weights, key_values = layer(
                x, queries, first_mask if last else mask, next(image_key_values) if crosses else None, before,
                rows if last else None,
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
        """The mask of self-attention from `x` to `states`, or to the cache and `x`."""
        if decode:
            return create_causal_mask(self.config, x, attention_mask, cache)
        if attention_mask is None:
            return None
        return create_bidirectional_mask(self.config, x, attention_mask, encoder_hidden_states=states)
