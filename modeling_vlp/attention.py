"""One multi-head attention for every tower."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .linear import Linear

# Shapes: B batch, N tokens, M tokens of another sequence, D width, H heads


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs) -> tuple[Tensor, Tensor]:
    """Softmax attention that also returns its weights (B, H, N, N), computed in float32."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class Packing:
    """Texts (T, N) without their padding: (P, D), the tokens that there are, one after the other.

    What a layer does to each token alone (nearly all that it computes) is then not done to padding.

    Args:
        mask: (T, N), 0 where there is padding; the first token of each text is real.
    """

    def __init__(self, mask: Tensor):
        self.shape = mask.shape
        self.index = mask.flatten().nonzero()[:, 0]  # (P,) places in T * N
        self.first = mask.sum(dim=1).cumsum(dim=0) - mask.sum(dim=1)  # (T,) places in P

    def pack(self, x: Tensor) -> Tensor:
        """(T, N, ...) -> (P, ...)"""
        return x.flatten(0, 1).index_select(0, self.index)

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Row `index` (T,) of each text in (P, D), as (T, 1, D)."""
        return x.index_select(0, self.first + index)[:, None]

    def unpack(self, x: Tensor) -> Tensor:
        """(P, D) -> (T, N, D), zeros where there is padding."""
        return x.new_zeros(self.shape.numel(), x.shape[-1]).index_copy(0, self.index, x).unflatten(0, self.shape)


class Attention(nn.Module):
    """Multi-head attention with separate query, key and value projections, so that LoRA can be put on each.

    The kernel is the one that `config._attn_implementation` names: eager, sdpa, flash or flex.

    Args:
        is_causal: each token sees those before it, and itself.
        key_value_size: width of the sequence that is attended to, where it is another one (cross-attention).
        layer_index: number of the layer, under which a cache keeps keys and values.
    """

    def __init__(
        self, config, is_causal: bool = False, key_value_size: int | None = None, layer_index: int | None = None
    ):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.layer_index = layer_index
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(key_value_size or config.hidden_size, config.hidden_size)
        self.v_proj = Linear(key_value_size or config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def initialize(self) -> None:
        """As OpenAI's: normal in the causal text tower; in the image tower, what nn.MultiheadAttention starts with."""
        width = self.config.hidden_size
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            if self.is_causal:
                init.normal_(linear.weight, std=width**-0.5)
            else:  # Xavier over the one (3 * width, width) matrix
                init.uniform_(linear.weight, -((1.5 / width) ** 0.5), (1.5 / width) ** 0.5)
        if self.is_causal:
            init.normal_(self.out_proj.weight, std=width**-0.5 * (2 * self.config.num_hidden_layers) ** -0.5)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            init.zeros_(linear.bias)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, N, D) -> (B, H, N, D / H)

    def keys_values(self, x: Tensor, packing: "Packing | None" = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, M, D / H) of a sequence (B, M, its width), or of packed ones."""
        unpack = packing.unpack if packing else nn.Identity()
        return self.heads(unpack(self.k_proj(x))), self.heads(unpack(self.v_proj(x)))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask=None,
        key_values: tuple[Tensor, Tensor] | None = None,
        past_key_values=None,
        packing: "Packing | None" = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden_states` (B, N, D); returns (B, N, D) and, where eager, weights (B, H, N, M).

        Args:
            key_values: what to attend to, computed beforehand by `keys_values`; `hidden_states` where not given. It may
                be of fewer sequences: those of `hidden_states` then share it, as many each as stand together.
            past_key_values: a `Cache` of the tokens before, which these are added to.
            packing: `hidden_states` and the result are packed (P, D).
        """
        key, value = self.keys_values(hidden_states, packing) if key_values is None else key_values
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)
        query = self.q_proj(hidden_states)
        if packing is not None:
            query = packing.unpack(query)
        shape = query.shape
        # Sequences that attend to the same do it as one longer sequence, so that nothing is repeated for them.
        if query.shape[0] != key.shape[0]:
            query = query.reshape(key.shape[0], -1, shape[-1])
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            self.heads(query),
            key,
            value,
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=self.is_causal,
            **kwargs,
        )
        output = output.reshape(shape)
        return self.out_proj(output if packing is None else packing.pack(output)), weights

    def forward_one(
        self, query_state: Tensor, hidden_states: Tensor, visible: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Attend from one token (B, 1, D) to `hidden_states` (B, N, D; or packed), where `visible` (B, 1, 1, N)."""
        output = nn.functional.scaled_dot_product_attention(
            self.heads(self.q_proj(query_state)),
            *self.keys_values(hidden_states, packing),
            attn_mask=visible,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
        )
        return self.out_proj(output.transpose(1, 2).flatten(2))
