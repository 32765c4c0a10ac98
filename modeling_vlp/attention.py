"""The multi-head attention of all towers."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .linear import Linear

MOST_PLAIN = 512  # tokens up to which matrix products are faster

# Shapes: B batch, N tokens, M tokens of another sequence, D width, H heads


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs) -> tuple[Tensor, Tensor]:
    """Compute softmax attention; also return the weights (B, H, N, N). The softmax is in float32."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Compute softmax attention with PyTorch's kernel, or with plain matrix products where that kernel is slow.

    In bfloat16 on a CPU, the kernel's backward pass is slow: 384 texts of 8 tokens that attend to 25 patches take ten
    times as long as with matrix products, and 197 tokens twice as long (benchmarks/attention.py).

    Args:
        query: (B, H, N, D / H).
        key, value: (B, H, M, D / H).
        mask: boolean, broadcast to (B, H, N, M), False for what is not attended to; None: everything is.
        dropout: probability with which weights are dropped.
        is_causal: attend to earlier positions only; `mask` must be None.

    Returns:
        (B, H, N, D / H).
    """
    if not plain_is_faster(query, mask):
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)
    weights = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if is_causal:
        mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if mask is not None:
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
    return nn.functional.dropout(weights.softmax(dim=-1).to(value.dtype), p=dropout) @ value


def plain_is_faster(query: Tensor, mask: Tensor | None) -> bool:
    """Whether matrix products are faster than PyTorch's kernel for a query, and can be used."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and query.shape[-2] <= MOST_PLAIN
        and (mask is None or mask.dtype == torch.bool)
        and not torch.compiler.is_compiling()
    )


_packing: bool | None = None


def set_packing(packing: bool | None) -> None:
    """Choose whether training removes the padding of texts before it computes anything for their tokens.

    That saves the computation for the padding, but its amount must be known first: on a GPU, the host waits for it in
    every step.

    Args:
        packing: True or False for all devices; None: on CPUs only, which never wait.
    """
    global _packing
    _packing = packing


def packs(x: Tensor) -> bool:
    """Whether the padding of a tensor on its device is removed (see `set_packing`); not while it is compiled."""
    wanted = x.device.type == "cpu" if _packing is None else _packing
    return wanted and not torch.compiler.is_compiling()


def padding_mask_for(config, x: Tensor, attention_mask: Tensor, states: Tensor | None = None) -> Tensor | None:
    """The mask of attention from `x` to `states` (if None, to `x`), without causality, in the format of the kernel.

    transformers reads whether there is any padding at all, for which the host waits; without packing, this does not.

    Args:
        config: has the name of the kernel, `_attn_implementation`.
        x: (B, N, D).
        attention_mask: (B, M), 0 for padding.
        states: (B, M, D).
    """
    if config._attn_implementation == "sdpa" and not packs(x):
        return attention_mask.bool()[:, None, None].expand(-1, 1, x.shape[1], -1)
    return create_bidirectional_mask(config, x, attention_mask, encoder_hidden_states=states)


class Packing:
    """Removes the padding of texts (T, N) and keeps their P real tokens in one sequence (P, D).

    Operations on single tokens, which are most of the computation, then skip the padding.

    Args:
        mask: (T, N), 0 for padding; the first token of each text is not padding.
    """

    def __init__(self, mask: Tensor):
        self.shape = mask.shape
        self.index = mask.flatten().nonzero()[:, 0]  # (P,) positions in the flattened T * N
        self.first = mask.sum(dim=1).cumsum(dim=0) - mask.sum(dim=1)  # (T,) position of each text's first token in P

    def pack(self, x: Tensor) -> Tensor:
        """Remove the padding: (T, N, ...) -> (P, ...)."""
        return x.flatten(0, 1).index_select(0, self.index)

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Select token `index` (T,) of each text from (P, D), as (T, 1, D)."""
        return x.index_select(0, self.first + index)[:, None]

    def unpack(self, x: Tensor) -> Tensor:
        """Restore the padding, as zeros: (P, D) -> (T, N, D)."""
        return x.new_zeros(self.shape.numel(), x.shape[-1]).index_copy(0, self.index, x).unflatten(0, self.shape)


class Attention(nn.Module):
    """Multi-head attention with separate query, key and value projections, so that LoRA can adapt each one.

    `config._attn_implementation` selects the kernel: eager, sdpa, flash or flex.

    Args:
        is_causal: each token attends only to itself and to earlier tokens.
        key_value_size: width of the sequence to attend to, in cross-attention; if None, `hidden_size`.
        layer_index: index of the layer, under which a cache stores keys and values.
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
        """Initialise as OpenAI does: normal in the causal text tower, as nn.MultiheadAttention in the image tower."""
        width = self.config.hidden_size
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            if self.is_causal:
                init.normal_(linear.weight, std=width**-0.5)
            else:  # Xavier bound of the fused (3 * width, width) matrix
                init.uniform_(linear.weight, -((1.5 / width) ** 0.5), (1.5 / width) ** 0.5)
        if self.is_causal:
            init.normal_(self.out_proj.weight, std=width**-0.5 * (2 * self.config.num_hidden_layers) ** -0.5)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            init.zeros_(linear.bias)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, N, D) -> (B, H, N, D / H)

    def keys_values(self, x: Tensor, packing: "Packing | None" = None) -> tuple[Tensor, Tensor]:
        """Compute keys and values (B, H, M, D / H).

        Args:
            x: (B, M, `key_value_size`), or packed (P, `key_value_size`).
            packing: how `x` is packed; None if it is not.
        """
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
        """Attend from `hidden_states` to themselves or to another sequence.

        Args:
            hidden_states: (B, N, D), or packed (P, D).
            attention_mask: mask in the format of the kernel; None to attend to everything.
            key_values: precomputed keys and values, from `keys_values`; if None, those of `hidden_states`. They may
                come from fewer than B sequences, each of which is then shared by the same number of consecutive rows.
            past_key_values: a `Cache` with the keys and values of earlier tokens; the new ones are appended to it.
            packing: how `hidden_states` and the result are packed; None if they are not.

        Returns:
            (B, N, D) or packed (P, D), and the weights (B, H, N, M) of the eager kernel, else None.
        """
        key, value = self.keys_values(hidden_states, packing) if key_values is None else key_values
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)
        query = self.q_proj(hidden_states)
        if packing is not None:
            query = packing.unpack(query)
        shape = query.shape
        # Queries that share keys and values form one longer sequence, so that keys and values are not repeated.
        if query.shape[0] != key.shape[0]:
            query = query.reshape(key.shape[0], -1, shape[-1])
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        query, dropout = self.heads(query), self.config.attention_dropout if self.training else 0.0
        if self.config._attn_implementation == "sdpa" and plain_is_faster(query, attention_mask):
            causal = self.is_causal and attention_mask is None and query.shape[-2] > 1
            output = attention(query, key, value, attention_mask, dropout, causal).transpose(1, 2)
            weights = None
        else:
            output, weights = attend(
                self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, dropout=dropout,
                is_causal=self.is_causal, **kwargs,
            )  # fmt: skip
        output = output.reshape(shape)
        return self.out_proj(output if packing is None else packing.pack(output)), weights

    def forward_one(
        self, query_state: Tensor, hidden_states: Tensor, visible: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Attend from one token per sequence to the whole sequence.

        Args:
            query_state: (B, 1, D), the token.
            hidden_states: (B, N, D), or packed (P, D).
            visible: (B, 1, 1, N), True for tokens to attend to; None for all.
            packing: how `hidden_states` is packed; None if it is not.

        Returns:
            (B, 1, D).
        """
        query, (key, value) = self.heads(self.q_proj(query_state)), self.keys_values(hidden_states, packing)
        dropout = self.config.attention_dropout if self.training else 0.0
        return self.out_proj(attention(query, key, value, visible, dropout).transpose(1, 2).flatten(2))
