"""Patches of images of variable resolution and shape, as NaFlex has them.

Sources: Dehghani et al., 2023 (NaViT, arXiv:2307.06304); Tschannen et al., 2025 (SigLIP 2, arXiv:2502.14786).
"""

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from .attention import Packing, packs, padding_mask_for
from .layers import Encoder

# Shapes: B images, C channels, P patch side, N patches of the largest image, G patches along a side of the table


def patches_of(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut an image into patches, row by row.

    Args:
        pixels: (C, H, W); both sides are multiples of `patch_size`.
        patch_size: P, in pixels.

    Returns:
        (H / P * W / P, P * P * C), with the channels of a pixel side by side, as in transformers' Siglip2.
    """
    channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    cut = pixels.reshape(channels, rows, patch_size, columns, patch_size)
    return cut.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)


def require_shapes(pixel_values: Tensor, spatial_shapes: Tensor | None, width: int) -> None:
    """Check patches and their shapes.

    Args:
        pixel_values: (B, N, P * P * C).
        spatial_shapes: (B, 2); their values are checked only if `attention.packs`, where the host does not wait for
            them.
        width: P * P * C of the model.

    Raises:
        ValueError: if they do not fit each other or the model.
    """
    if spatial_shapes is None:
        raise ValueError("Patches (B, N, P * P * C) need spatial_shapes (B, 2): rows and columns of each image.")
    if spatial_shapes.shape != (len(pixel_values), 2):
        raise ValueError(f"spatial_shapes must be ({len(pixel_values)}, 2), got {tuple(spatial_shapes.shape)}.")
    if pixel_values.shape[-1] != width:
        raise ValueError(f"The patches have {pixel_values.shape[-1]} values, but the model expects {width}.")
    if packs(spatial_shapes):
        counts = spatial_shapes.prod(dim=1)
        if len(counts) and (spatial_shapes.min() < 1 or counts.max() > pixel_values.shape[1]):
            raise ValueError(
                f"spatial_shapes have up to {int(counts.max())} patches, at least {int(spatial_shapes.min())} along a "
                f"side; the images have room for {pixel_values.shape[1]}."
            )


def real_patches(spatial_shapes: Tensor, most: int) -> Tensor:
    """The mask (B, N) of the patches that are not padding, for N = `most`."""
    return torch.arange(most, device=spatial_shapes.device) < spatial_shapes.prod(dim=1)[:, None]


def positions_of(table: Tensor, spatial_shapes: Tensor, most: int) -> Tensor:
    """Resample a table of positions to the grid of each image, by bilinear interpolation with antialiasing.

    The result is that of `torch.nn.functional.interpolate`, image by image, as in transformers' Siglip2. Here it is one
    matrix product, so the host does not wait for the shapes. An image of G x G patches gets the table itself.

    Args:
        table: (G * G, D).
        spatial_shapes: (B, 2) integers, rows and columns of each image.
        most: N.

    Returns:
        (B, N, D), at least in float32; what stands at padding has no meaning.
    """
    side = int(table.shape[0] ** 0.5)
    dtype = torch.promote_types(table.dtype, torch.float32)
    number = torch.arange(most, device=table.device)
    rows, columns = spatial_shapes[:, :1], spatial_shapes[:, 1:]
    vertical = weights_along(number // columns, rows, side, dtype)  # (B, N, G)
    horizontal = weights_along(number % columns, columns, side, dtype)
    both = (vertical[..., :, None] * horizontal[..., None, :]).flatten(2)  # (B, N, G * G)
    with torch.autocast(table.device.type, enabled=False):
        return both @ table.to(dtype)


def weights_along(index: Tensor, length: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Weights of the cells of a table for positions along one axis, each a triangle around the position.

    Args:
        index: (B, N), positions in a grid.
        length: (B, 1), the number of positions of that grid along the axis.
        side: G, that of the table.
        dtype: that of the result.

    Returns:
        (B, N, G), which sum to 1.
    """
    step = side / length.to(dtype)  # cells of the table per position
    centre = (index + 0.5) * step
    cells = torch.arange(side, device=index.device) + 0.5
    weights = (1 - (cells - centre[..., None]).abs() / step.clamp(min=1)[..., None]).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)


def encode_real(
    encoder: Encoder, config, x: Tensor, mask: Tensor | None, pool_first: bool = False, **flags: bool
) -> BaseModelOutput:  # fmt: skip
    """Run the blocks of an image tower on real patches alone.

    Nothing attends to padding, and if `attention.packs`, nothing is computed for it.

    Args:
        encoder: the blocks.
        config: that of the tower.
        x: (B, N, D).
        mask: (B, N), False for padding; None if there is none.
        pool_first: compute only the first token in the last block.
        flags: `output_hidden_states` and `output_attentions`.

    Returns:
        The states (B, N, D), or (B, 1, D) with `pool_first`.
    """
    first = x.new_zeros(x.shape[0], dtype=torch.long) if pool_first else None
    if mask is None:
        return encoder(x, pool_at=first, **flags)
    visible = padding_mask_for(config, x, mask)
    if not isinstance(visible, Tensor) and visible is not None:  # the mask of flex attention has no rows to take
        first, pool_first = None, False
    if not packs(x) or any(flags.values()) or (encoder.training and config.drop_path_rate):
        return encoder(x, visible, pool_at=first, **flags)
    packing = Packing(mask)
    encoded = encoder(packing.pack(x), visible, pool_at=first, packing=packing)
    if not pool_first:
        encoded.last_hidden_state = packing.unpack(encoded.last_hidden_state)
    return encoded
