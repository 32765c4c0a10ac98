"""One multi-head attention for every tower."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Shapes: B batch, N tokens, D width, H heads


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs) -> tuple[Tensor, Tensor]:
    """Softmax attention that also returns its weights (B, H, N, N), computed in float32."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Multi-head attention with separate query, key and value projections, so that LoRA can be put on each.

    The kernel is the one that `config._attn_implementation` names: eager, sdpa, flash or flex.
    """

    def __init__(self, config, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

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

    def forward(self, hidden_states: Tensor, attention_mask=None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attend over all of `hidden_states` (B, N, D); returns (B, N, D) and, where eager, weights (B, H, N, N)."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            self.heads(self.q_proj(hidden_states)),
            self.heads(self.k_proj(hidden_states)),
            self.heads(self.v_proj(hidden_states)),
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=self.is_causal,
            **kwargs,
        )
        return self.out_proj(output.flatten(2)), weights

    def forward_one(self, query_state: Tensor, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend from one token (B, 1, D) to `hidden_states` (B, N, D), or to those `visible` (B, 1, 1, N; bool)."""
        output = nn.functional.scaled_dot_product_attention(
            self.heads(self.q_proj(query_state)),
            self.heads(self.k_proj(hidden_states)),
            self.heads(self.v_proj(hidden_states)),
            attn_mask=visible,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
        )
        return self.out_proj(output.transpose(1, 2).flatten(2))
