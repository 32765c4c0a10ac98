"""Layers shared by the transformer towers: MLP, block, encoder, pooling, position tables."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .attention import Attention, Packing
from .linear import Linear

# Shapes: B batch, N tokens, D width, H heads


def quick_gelu(x: Tensor) -> Tensor:
    """Compute CLIP's activation x sigmoid(1.702 x) with fewer passes over memory, forward and backward."""
    return nn.functional.silu(1.702 * x).mul_(1 / 1.702)


class MLP(nn.Module):
    """The feed-forward layer of a transformer block."""

    def __init__(self, config):
        super().__init__()
        self.activation_fn = quick_gelu if config.hidden_act == "quick_gelu" else ACT2FN[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config, is_causal: bool, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.self_attn = Attention(config, is_causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def initialize(self) -> None:
        if self.self_attn.is_causal:  # as OpenAI; the image tower is initialised as in PyTorch
            config = self.self_attn.config
            init.normal_(self.mlp.fc1.weight, std=(2 * config.hidden_size) ** -0.5)
            init.normal_(self.mlp.fc2.weight, std=(config.hidden_size * 2 * config.num_hidden_layers) ** -0.5)

    def forward(
        self, x: Tensor, attention_mask=None, pool_at: Tensor | None = None, packing: Packing | None = None, **kwargs
    ):
        """Run the block.

        Args:
            x: (B, N, D), or packed (P, D).
            attention_mask: as for `Attention.forward`.
            pool_at: (B,) index of the only token to compute; None for all.
            packing: how `x` is packed; None if it is not.

        Returns:
            The output, of the shape of `x`, or (B, 1, D) with `pool_at`; and the attention weights, see
            `Attention.forward`.
        """
        normed, weights = self.layer_norm1(x), None
        if pool_at is None:
            attended, weights = self.self_attn(normed, attention_mask, packing=packing, **kwargs)
        else:
            visible = None
            if self.self_attn.is_causal:
                length = x.shape[1] if packing is None else packing.shape[1]
                visible = torch.arange(length, device=x.device) <= pool_at[:, None]  # (B, N)
                visible = visible[:, None, None]
            elif attention_mask is not None:  # the same for all rows
                visible = attention_mask[..., :1, :] if attention_mask.ndim == 4 else attention_mask[:, None, None] > 0
            row, x = (take_rows(part, pool_at) if packing is None else packing.take_rows(part, pool_at)
                      for part in (normed, x))  # fmt: skip
            attended = self.self_attn.forward_one(row, normed, visible, packing)
        x = x + self.drop(attended)
        return x + self.drop(self.mlp(self.layer_norm2(x))), weights

    def drop(self, branch: Tensor) -> Tensor:
        """Leave out a branch (B, N, D) for random images in training, with probability `drop_path`."""
        if not self.training or not self.drop_path:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)


class Encoder(nn.Module):
    """A stack of blocks."""

    def __init__(self, config, is_causal: bool):
        super().__init__()
        rate, count = getattr(config, "drop_path_rate", 0.0), config.num_hidden_layers
        self.layers = nn.ModuleList(
            Block(config, is_causal, rate * index / max(1, count - 1)) for index in range(count)
        )

    def forward(
        self,
        x: Tensor,
        attention_mask=None,
        pool_at: Tensor | None = None,
        packing: Packing | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **kwargs,
    ) -> BaseModelOutput:
        """Run the blocks.

        Args:
            x: (B, N, D), or packed (P, D).
            attention_mask: as for `Attention.forward`.
            pool_at: (B,) index of the token to pool. The last block then computes only this token, with the same
                values, and `last_hidden_state` is (B, 1, D).
            packing: how `x` is packed; None if it is not.
            output_hidden_states, output_attentions: also return these.
        """
        hidden_states, attentions = (x,), ()
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            x, weights = layer(x, attention_mask, pool_at if last else None, packing, **kwargs)
            hidden_states += (x,)
            attentions += (weights,)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Select token `index` (B,) of each sequence in (B, N, D), as (B, 1, D), without a host-device synchronisation."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[-1]))


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean (B, D) of the states (B, N, D) of the tokens that a mask (B, N) selects, 0 for padding."""
    weights = mask[..., None].to(states.dtype)  # (B, N, 1); not a matrix product, which autocast would make in bf16
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def interpolate_grid(table: Tensor, height: int, width: int) -> Tensor:
    """Resample a position table to another grid, by bicubic interpolation, as transformers' `interpolate_pos_encoding`.

    Args:
        table: (1 + G * G, D) with a row for the class token, or (G * G, D) without.
        height: height of the new grid, in patches.
        width: width of the new grid, in patches.

    Returns:
        (1 + height * width, D) or (height * width, D).
    """
    side = int(table.shape[0] ** 0.5)
    if (side, side) == (height, width):
        return table
    first = table.shape[0] - side * side
    grid = table[first:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, G, G)
    grid = nn.functional.interpolate(grid.float(), size=(height, width), mode="bicubic", align_corners=False)
    return torch.cat([table[:first], grid[0].flatten(1).T.to(table.dtype)])


def resample_table(table: Tensor, side: int) -> nn.Parameter:
    """Resample a position table to a grid of `side` x `side` patches; returns a new parameter."""
    return nn.Parameter(interpolate_grid(table.detach(), side, side).clone())


def require_image_size(pixel_values: Tensor, image_size: int, multiple: int, interpolate: bool) -> None:
    """Check the size of images.

    Args:
        pixel_values: (B, C, S, S).
        image_size: the side, in pixels, that the position table is made for.
        multiple: both sides must be multiples of this number of pixels.
        interpolate: allow other sizes than `image_size`.

    Raises:
        ValueError: if the images do not have the required size.
    """
    height, width = pixel_values.shape[-2:]
    if not interpolate and (height, width) != (image_size, image_size):
        raise ValueError(
            f"The images are {height} x {width} pixels, but the model expects {image_size} x {image_size}: resize the "
            "images, or pass interpolate_pos_encoding=True to resample the position embeddings."
        )
    if height % multiple or width % multiple:
        raise ValueError(f"The images are {height} x {width} pixels; both sides must be multiples of {multiple}.")


class ProjectionHead(nn.Sequential):
    """A projection with a LayerNorm, dropout, and a hidden layer if one is wanted: (..., width) -> (..., size).

    It is computed in the precision of its weights, without autocast: trained in bfloat16, it learnt next to nothing
    that held for new pictures (13 % instead of 49 % of the drawings in the recipe clip-emoji-towers).
    """

    def __init__(self, width: int, hidden_size: int | None, size: int, dropout: float):
        hidden = [nn.Linear(width, hidden_size), nn.GELU()] if hidden_size else []
        super().__init__(
            nn.LayerNorm(width), *hidden, nn.Dropout(dropout), nn.Linear(hidden_size or width, size, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self[-1].weight.dtype))


def make_projection(width: int, size: int, hidden_size: int | None, dropout: float, bias: bool = True) -> nn.Module:
    """Build a projection from a tower's width to a shared space: linear, or a `ProjectionHead`."""
    if hidden_size is None and not dropout:
        return nn.Linear(width, size, bias=bias)
    return ProjectionHead(width, hidden_size, size, dropout)
