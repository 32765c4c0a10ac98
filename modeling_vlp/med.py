"""BLIP's multimodal mixture of encoder and decoder (MED). Source: salesforce/BLIP, models/med.py; paper, section 3.1.

One stack of layers has three modes, which differ in the first token and in attention:

    text        [CLS]  bidirectional self-attention                     -> FFN     unimodal encoder
    multimodal  [ENC]  bidirectional self-attention -> cross-attention -> FFN     image-grounded encoder
    decoder     [DEC]  causal self-attention        -> cross-attention -> FFN     image-grounded decoder

Encoder and decoder share all parameters except those of self-attention (the paper's Table 3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions

from ..configuration.text import VlpBlipTextConfig
from .attention import Attention, Packing, packs, padding_mask_for
from .base import VlpPreTrainedModel
from .layers import MLP
from .linear import Linear
from .losses import language_modelling_loss

# Shapes: B images, M tokens of an image, T texts (a multiple of B), N tokens of a text, D width, H heads, V vocabulary


@dataclass
class Memory:
    """Cross-attention keys and values of images, computed once per layer and shared by any number of texts.

    Attributes:
        key_values: for each layer, keys and values (B, H, M, D / H).
        states: (B, M, width of the image tower), from which they were computed.
        mask: (B, M), 0 for padding; None if there is no padding.
    """

    key_values: list[tuple[Tensor, Tensor]]
    states: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def select(self, index: Tensor) -> "Memory":
        """Return the memory of the images `index` (T,), in which images may repeat."""
        mask = None if self.mask is None else self.mask[index]
        return Memory([(key[index], value[index]) for key, value in self.key_values], self.states[index], mask)

    @staticmethod
    def join(parts: list["Memory"]) -> "Memory":
        """Concatenate the memories of several groups of images, none of which has a mask."""
        layers = zip(*(part.key_values for part in parts), strict=True)
        key_values = [tuple(torch.cat(tensors) for tensors in zip(*layer, strict=True)) for layer in layers]
        return Memory(key_values, torch.cat([part.states for part in parts]))


class MedEmbeddings(nn.Module):
    """Word and position embeddings, followed by LayerNorm and dropout."""

    def __init__(self, config: VlpBlipTextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        return self.dropout(self.layer_norm(inputs_embeds + self.position_embeddings(position_ids)))  # (T, N, D)


class ResidualAttention(nn.Module):
    """Attention followed by dropout, the residual connection and LayerNorm, as in BERT."""

    def __init__(self, config: VlpBlipTextConfig, layer_index: int, is_causal=False, key_value_size=None):
        super().__init__()
        self.attention = Attention(config, is_causal, key_value_size, layer_index)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of the states to attend to."""
        return self.attention.keys_values(states)

    def forward(self, x: Tensor, mask=None, **kwargs) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(x, mask, **kwargs)
        return self.layer_norm(x + self.dropout(attended)), weights


class MedLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention and a feed-forward layer, with only the parts that the needed modes use."""

    def __init__(self, config: VlpBlipTextConfig, layer_index: int, encoder: bool, decoder: bool, cross: bool):
        super().__init__()
        self.encoder_attention = ResidualAttention(config, layer_index) if encoder else None
        self.decoder_attention = ResidualAttention(config, layer_index, is_causal=True) if decoder else None
        self.cross_attention = None
        if cross:
            self.cross_attention = ResidualAttention(config, layer_index, key_value_size=config.encoder_hidden_size)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of images for this layer's cross-attention."""
        return self.cross_attention.keys_values(states)

    def forward(
        self, x: Tensor, self_mask, image_keys: Tensor | None, image_values: Tensor | None, image_mask, decode: bool,
        pooled_only: bool, cache=None, packing: Packing | None = None,
    ):  # fmt: skip
        """Run the layer. All tensors are positional arguments, so that reentrant checkpointing finds their gradients.

        Args:
            x: (T, N, D), or packed (P, D).
            self_mask: mask of self-attention.
            image_keys, image_values: of the images; None for no cross-attention.
            image_mask: mask of cross-attention.
            decode: use the decoder's causal self-attention instead of the encoder's.
            pooled_only: compute only the first token of each text.
            cache: a `Cache` of self-attention.
            packing: how `x` is packed; None if it is not.

        Returns:
            The output, of the shape of `x`, or (T, 1, D) with `pooled_only`; the weights of self-attention and of
            cross-attention.
        """
        self_attention = self.decoder_attention if decode else self.encoder_attention
        if pooled_only:
            key_values = self_attention.attention.keys_values(x, packing)
            x, packing = x[:, :1] if packing is None else x[packing.first, None], None
            x, self_weights = self_attention(x, self_mask, key_values=key_values)
        else:
            x, self_weights = self_attention(x, self_mask, past_key_values=cache, packing=packing)
        cross_weights = None
        if image_keys is not None:
            key_values = image_keys, image_values
            x, cross_weights = self.cross_attention(x, image_mask, key_values=key_values, packing=packing)
        return self.layer_norm(x + self.dropout(self.mlp(x))), self_weights, cross_weights


class MedModel(VlpPreTrainedModel):
    """The stack of MED layers, with only the parts that the needed modes use.

    Args:
        encoder: include bidirectional self-attention.
        decoder: include causal self-attention.
        cross: include cross-attention, for the multimodal and decoder modes.
    """

    config_class = VlpBlipTextConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _no_split_modules = ["MedEmbeddings", "MedLayer"]

    def __init__(self, config: VlpBlipTextConfig, encoder: bool = True, decoder: bool = True, cross: bool = True):
        super().__init__(config)
        self.embeddings = MedEmbeddings(config)
        self.layers = nn.ModuleList(
            MedLayer(config, index, encoder, decoder, cross) for index in range(config.num_hidden_layers)
        )
        self.post_init()

    def initialize(self) -> None:
        initialize_as_bert(self, self.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def memory_of(self, states: Tensor, mask: Tensor | None = None) -> Memory:
        """Compute the cross-attention keys and values of images (or of questions) for every layer.

        Args:
            states: (B, M, encoder_hidden_size).
            mask: (B, M), 0 for padding; None if there is no padding.
        """
        return Memory([layer.keys_values(states) for layer in self.layers], states, mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory: Memory | None = None,
        decode: bool = False,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values=None,
        pooled_only: bool = False,
        pack: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the model on texts.

        Args:
            input_ids: (T, N).
            attention_mask: (T, N), 0 for padding; with a cache, it also covers the cached tokens. If None, there is no
                mask. The decoder needs none for padding on the right, because earlier tokens do not attend to it.
            memory: keys and values of B images, to which texts cross-attend; texts b * T / B to (b + 1) * T / B - 1
                attend to image b. If None, there is no cross-attention.
            decode: use the decoder's causal self-attention instead of the encoder's bidirectional one.
            position_ids: (T, N); if None, they count from the length of the cache.
            inputs_embeds: (T, N, D), instead of `input_ids`.
            past_key_values: a `Cache` of the decoder's self-attention.
            pooled_only: compute only the first token in the last layer; `last_hidden_state` is (T, 1, D).
            pack: skip the computation for padding, which must be on the right. The other outputs are the same; the
                outputs for padding are zero.
            output_hidden_states, output_attentions: also return these, of all tokens; `pooled_only` and `pack` then
                have no effect.
            kwargs: ignored.

        Returns:
            `last_hidden_state` (T, N, D).

        Raises:
            ValueError: if there are no texts, they are too long, or T is not a multiple of B.
        """
        if inputs_embeds is None and input_ids is None:
            raise ValueError("The text model needs input_ids or inputs_embeds: pass the texts, or call `generate`.")
        if output_hidden_states or output_attentions:
            pooled_only = pack = False
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        texts, length = inputs_embeds.shape[:2]
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + start
        most = self.config.max_position_embeddings
        if length > most or (start and start + length > most and not torch.compiler.is_compiling()):
            raise ValueError(
                f"The texts have {start + length} tokens, but the model supports at most {most}: truncate them, or "
                "generate fewer tokens."
            )
        if memory is not None and texts % memory.states.shape[0]:
            raise ValueError(
                f"{texts} texts cannot be divided evenly among {len(memory)} images: pass the same number for each."
            )
        # A decoder's tokens do not attend to padding on the right, so it needs no mask.
        mask = None if pack and decode else attention_mask
        masks = first_masks = self.masks(inputs_embeds, mask, memory, decode, past_key_values, position_ids)
        if pooled_only:
            first_masks = self.masks(inputs_embeds[:, :1], attention_mask, memory, states=inputs_embeds)
        packing = None
        if pack and attention_mask is not None and packs(inputs_embeds):
            packing = Packing(attention_mask)
            inputs_embeds = packing.pack(inputs_embeds)
            position_ids = packing.pack(position_ids.expand(texts, length))
        x = self.embeddings(inputs_embeds, position_ids)
        hidden_states, attentions, cross_attentions = (x,), (), ()
        for index, layer in enumerate(self.layers):
            first = pooled_only and index == len(self.layers) - 1
            self_mask, image_mask = first_masks if first else masks
            keys, values = memory.key_values[index] if memory is not None else (None, None)
            x, weights, cross_weights = layer(
                x, self_mask, keys, values, image_mask, decode, first, past_key_values, packing
            )
            hidden_states += (x,)
            attentions += (weights,)
            cross_attentions += (cross_weights,)
        if packing is not None and not pooled_only:
            x = packing.unpack(x)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            cross_attentions=cross_attentions if output_attentions and memory is not None else None,
        )

    def masks(self, x, attention_mask, memory, decode=False, past_key_values=None, position_ids=None, states=None):
        """Return the masks of self-attention, from `x` to `states` (if None, `x`), and of cross-attention."""
        self_mask = image_mask = None
        if decode:
            # Without a cache, positions are of no use; transformers would look for packed sequences in them.
            positions = position_ids if past_key_values is not None else None
            self_mask = create_causal_mask(self.config, x, attention_mask, past_key_values, positions)
        elif attention_mask is not None:
            self_mask = padding_mask_for(self.config, x, attention_mask, states)
        if memory is not None and memory.mask is not None:
            grouped = x.reshape(memory.states.shape[0], -1, x.shape[-1])
            image_mask = padding_mask_for(self.config, grouped, memory.mask, memory.states)
        return self_mask, image_mask


class LMHead(nn.Module):
    """Language modelling head as in BERT: a dense layer, then the (tied) word embeddings."""

    def __init__(self, config: VlpBlipTextConfig):
        super().__init__()
        self.config = config
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = Linear(config.hidden_size, config.vocab_size)

    def initialize(self) -> None:
        initialize_as_bert(self, self.config)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits: (..., D) -> (..., V)."""
        return self.decoder(self.layer_norm(self.activation_fn(self.dense(x))))


def next_token_loss(text_model: MedModel, lm_head: LMHead, input_ids, attention_mask, memory, labels=None) -> Tensor:
    """Compute the decoder's loss on texts, only at the positions that have a label.

    Args:
        text_model, lm_head: the decoder.
        input_ids: (T, N). If `attention_mask` is None, texts begin with [CLS], which is replaced by [DEC].
        attention_mask: (T, N), 0 for padding; only needed for padding on the left.
        memory: keys and values of the images.
        labels: (T, N) like `input_ids`, -100 for tokens without a loss; if None, all tokens but padding have one.
    """
    config = text_model.config
    pack = attention_mask is None
    if pack:  # the last position predicts nothing: drop it, and the padding
        input_ids, attention_mask = begin_with(input_ids, config.bos_token_id), input_ids != config.pad_token_id
        attention_mask = attention_mask[:, 1:]
    else:
        attention_mask = attention_mask[:, :-1]
    if labels is None:
        labels = input_ids.masked_fill(input_ids == config.pad_token_id, -100)
    labels = labels[:, 1:]
    states = text_model(input_ids[:, :-1], attention_mask, memory, decode=True, pack=pack).last_hidden_state
    return label_loss(lm_head, states, labels, config.label_smoothing)


def text_losses(writer, input_ids: Tensor, memory: Memory, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross entropy (T,) of each text, summed over its tokens, with its end token.

    Without label smoothing, it is the negative logarithm of the probability that the decoder gives to the text.

    Args:
        writer: a model with a `text_model` and an `lm_head`.
        input_ids: (T, N) texts that begin with [CLS], which is replaced by [DEC], padded on the right.
        memory: keys and values of the image of each text.
        label_smoothing: share that is distributed evenly over the vocabulary.
    """
    config = writer.text_model.config
    ids, real = begin_with(input_ids, config.bos_token_id), input_ids[:, 1:] != config.pad_token_id
    states = writer.text_model(ids[:, :-1], real, memory, decode=True, pack=True).last_hidden_state
    labels = input_ids[:, 1:].masked_fill(~real, -100)
    logits = writer.lm_head(states).float().transpose(1, 2)  # (T, V, N)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return losses.sum(dim=1)


def label_loss(lm_head: nn.Module, states: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Compute the language modelling loss from states (T, N, D) and labels (T, N), of which -100 have no loss."""
    if packs(states):  # logits of the other positions are not needed
        states, labels = states[labels != -100], labels[labels != -100]
    logits = lm_head(states).flatten(0, -2)
    with torch.autocast(states.device.type, enabled=False):
        return language_modelling_loss(logits.float(), labels.flatten(), label_smoothing)


def decode(
    writer, input_ids, attention_mask, memory: Memory, logits_to_keep: int = 0, **kwargs
) -> CausalLMOutputWithCrossAttentions:
    """Compute next-token logits of texts.

    Args:
        writer: a model with a `text_model` and an `lm_head`.
        input_ids: (T, N).
        attention_mask: (T, N), 0 for padding.
        memory: keys and values of the images.
        logits_to_keep: compute the logits of only the last tokens, this many; 0 for all.
        kwargs: options of `MedModel.forward`.

    Returns:
        `logits` (T, N, V) for the token that follows each input token.
    """
    output = writer.text_model(input_ids, attention_mask, memory, decode=True, **kwargs)
    return CausalLMOutputWithCrossAttentions(
        logits=writer.lm_head(output.last_hidden_state[:, -logits_to_keep:]),
        past_key_values=output.past_key_values,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
        cross_attentions=output.cross_attentions,
    )


def initialize_as_bert(parent: nn.Module, config: VlpBlipTextConfig) -> None:
    """Initialise weights from a normal distribution; biases and the padding embedding are zero."""
    for module in parent.modules():
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])


def begin_with(input_ids: Tensor, token_id: int) -> Tensor:
    """Replace the first token of texts (T, N), [CLS], by the first token of another mode."""
    return torch.cat([torch.full_like(input_ids[:, :1], token_id), input_ids[:, 1:]], dim=1)
