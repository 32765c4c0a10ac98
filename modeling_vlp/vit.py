"""The vision transformers of CLIP and BLIP.

Sources: openai/CLIP, clip/model.py, VisionTransformer; salesforce/BLIP, models/vit.py, VisionTransformer.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration.vision import VlpBlipViTConfig, VlpViTConfig
from .base import VlpPreTrainedModel
from .layers import Encoder, interpolate_grid, require_image_size, resample_table
from .patches import encode_real, positions_of, real_patches, require_shapes

# Shapes: B batch, C channels, P patch side, G patches along a side, N tokens, D width


class PatchEmbeddings(nn.Module):
    """Patch embeddings, preceded by a class token if there is one, plus position embeddings."""

    def __init__(self, config: VlpViTConfig, bias: bool = False, class_token: bool = True):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if class_token else None
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=bias
        )
        grid = config.image_size // config.patch_size
        self.position_embedding = nn.Embedding(grid * grid + class_token, config.hidden_size)

    def initialize(self) -> None:
        if self.class_embedding is not None:
            init.normal_(self.class_embedding, std=self.config.hidden_size**-0.5)
        init.normal_(self.position_embedding.weight, std=self.config.hidden_size**-0.5)

    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, spatial_shapes: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Embed square images, or patches.

        Args:
            pixel_values: (B, C, S, S), or patches (B, N, P * P * C), see `patches.patches_of`.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            spatial_shapes: (B, 2), the rows and columns of the patches of each image.

        Returns:
            The tokens (B, N, D), and for patches, the mask (B, N) of those that are not padding.

        Raises:
            ValueError: if the images do not have the required size, or the patches do not fit their shapes.
        """
        if pixel_values.ndim == 3:
            patches, mask = self.embed_patches(pixel_values, spatial_shapes)
            return self.with_class_token(patches, mask)
        require_image_size(pixel_values, self.config.image_size, self.config.patch_size, interpolate_pos_encoding)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (B, D, G, G)
        position = interpolate_grid(self.position_embedding.weight, *patches.shape[-2:])[self.first :]
        patches, _ = self.drop_patches(patches.flatten(2).transpose(1, 2) + position, None)
        return self.with_class_token(patches, None)

    @property
    def first(self) -> int:
        """The number of the position of the first patch: 1 after a class token, else 0."""
        return int(self.class_embedding is not None)

    def embed_patches(self, pixel_values: Tensor, spatial_shapes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed patches (B, N, P * P * C); returns (B, N, D) and the mask (B, N) of those that are not padding."""
        weight = self.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P * P * C)
        require_shapes(pixel_values, spatial_shapes, weight.shape[1])
        patches = nn.functional.linear(pixel_values.to(weight.dtype), weight, self.patch_embedding.bias)
        table, most = self.position_embedding.weight[self.first :], pixel_values.shape[1]
        patches = patches + positions_of(table, spatial_shapes, most).to(table.dtype)
        return self.drop_patches(patches, real_patches(spatial_shapes, most))

    def with_class_token(self, patches: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Put the class token, if there is one, before patches (B, N, D) and their mask."""
        if self.class_embedding is None:
            return patches, mask
        token = (self.class_embedding + self.position_embedding.weight[0]).expand(patches.shape[0], 1, -1)
        mask = None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
        return torch.cat([token, patches], dim=1), mask

    def resize_images(self, image_size: int) -> None:
        table = self.position_embedding
        table.weight = resample_table(table.weight, image_size // self.config.patch_size)
        table.num_embeddings = len(table.weight)
        self.config.image_size = image_size

    def drop_patches(self, patches: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Keep a random share of the patches (B, N, D) of each image in training, and their mask (arXiv:2212.00794)."""
        if not self.training or not self.config.patch_dropout:
            return patches, mask
        share = 1 - self.config.patch_dropout
        keep = max(1, round(patches.shape[1] * share))
        order = torch.rand(patches.shape[:2], device=patches.device)
        if mask is not None:  # padding comes last
            order = order + ~mask
            mask = torch.arange(keep, device=mask.device) < (mask.sum(dim=1) * share).round().clamp(min=1)[:, None]
        order = order.argsort(dim=1)[:, :keep]
        return patches.gather(1, order[..., None].expand(-1, -1, patches.shape[-1])), mask


def final_norm(config: VlpViTConfig) -> nn.Module:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()


class ViT(VlpPreTrainedModel):
    """Vision transformer, pooled at the class token."""

    config_class = VlpViTConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["PatchEmbeddings", "Block"]

    def __init__(self, config: VlpViTConfig):
        super().__init__(config)
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic, as in transformers
        self.encoder = Encoder(config, is_causal=False)
        self.post_layernorm = final_norm(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        spatial_shapes: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (B, C, S, S), or patches (B, N, P * P * C) of images of any shape.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            pooled_only: compute only the class token in the last layer; `last_hidden_state` is then None.
            spatial_shapes: (B, 2), the rows and columns of the patches of each image.
            kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            `last_hidden_state` (B, N, D), before the final LayerNorm, and `pooler_output` (B, D), after it.

        Raises:
            ValueError: if the images do not have the required size.
        """
        x, mask = self.embeddings(pixel_values, interpolate_pos_encoding, spatial_shapes)
        encoded = encode_real(self.encoder, self.config, self.pre_layrnorm(x), mask, pooled_only, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else encoded.last_hidden_state,
            pooler_output=self.post_layernorm(encoded.last_hidden_state[:, 0]),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def resize_images(self, image_size: int) -> None:
        """Adapt the model to images of another size, in pixels, by resampling its position embeddings."""
        self.embeddings.resize_images(image_size)


class BlipViT(VlpPreTrainedModel):
    """BLIP's vision transformer; the final LayerNorm is applied to every token, because texts attend to all of them."""

    config_class = VlpBlipViTConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["PatchEmbeddings", "Block"]

    def __init__(self, config: VlpBlipViTConfig):
        super().__init__(config)
        self.embeddings = PatchEmbeddings(config, bias=True)
        self.encoder = Encoder(config, is_causal=False)
        self.post_layernorm = final_norm(config)
        self.post_init()

    def initialize(self) -> None:
        """Initialise as timm does: the patch embedding as a PyTorch convolution, the rest from a truncated normal."""
        std = self.config.initializer_range
        for table in (self.embeddings.class_embedding, self.embeddings.position_embedding.weight):
            init.trunc_normal_(table, std=std)
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):
                init.trunc_normal_(module.weight, std=std)
                init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        spatial_shapes: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (B, C, S, S), or patches (B, N, P * P * C) of images of any shape.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            pooled_only: compute only the class token in the last layer; `last_hidden_state` is then None.
            spatial_shapes: (B, 2), the rows and columns of the patches of each image.
            kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            `last_hidden_state` (B, N, D) and `pooler_output` (B, D), the class token.

        Raises:
            ValueError: if the images do not have the required size.
        """
        x, mask = self.embeddings(pixel_values, interpolate_pos_encoding, spatial_shapes)
        encoded = encode_real(self.encoder, self.config, x, mask, pooled_only, **kwargs)
        last = self.post_layernorm(encoded.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else last,
            pooler_output=last[:, 0],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def resize_images(self, image_size: int) -> None:
        """Adapt the model to images of another size, in pixels, by resampling its position embeddings."""
        self.embeddings.resize_images(image_size)
