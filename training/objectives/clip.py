"""CLIP's objective, and SigLIP's."""

import math

import torch
from torch import Tensor

from ...modeling_vlp.clip import VlpClipModel
from ...modeling_vlp.losses import unit_length
from ...modeling_vlp.towers import frozen_parts
from ..machine.sharding import gathered, number
from .base import Objective
from .contrastive import contrastive_loss, sigmoid_loss
from .distributed import JoinedBatch


class ClipObjective(Objective):
    """Contrastive loss over the joined batch of all processes: softmax (CLIP), or sigmoid if the model has a bias.

    If the model has `embedding_sizes`, the loss is the mean over these sizes and the whole embedding (Matryoshka
    representation learning, Kusupati et al., 2022, arXiv:2205.13147).

    The result is that of one process with the joined batch, except that a ResNet's batch norm uses the statistics of
    each process's own images, unless it is joined (`--sync_batch_norm`).

    Args:
        model: the model to train.
        exclude_duplicates: rows that share a caption or an image are not negatives of each other.
        cached_images: `pixel_values` are the pooled outputs of the image tower, (B, D), which is locked.
        cached_texts: `input_ids` are the pooled outputs of the text tower, (T, D), which is locked.
        micro_batch_size: see `Objective`.
    """

    def __init__(
        self,
        model: VlpClipModel,
        exclude_duplicates: bool = True,
        cached_images: bool = False,
        cached_texts: bool = False,
        micro_batch_size: int | None = None,
    ):
        super().__init__()
        self.model = model
        self.exclude_duplicates, self.micro_batch_size = exclude_duplicates, micro_batch_size
        self.cached_images, self.cached_texts = cached_images, cached_texts
        self.frozen = frozen_parts(model)
        self.sizes = [*(model.config.embedding_sizes or ()), model.config.projection_dim]

    def after_step(self) -> None:
        """Clamp the scale."""
        with gathered([self.model.logit_scale], changed=True):
            self.model.clamp_logit_scale()

    def facts(self) -> dict[str, float]:
        """Values to log in addition to the losses."""
        return {"logit_scale": math.exp(number(self.model.logit_scale))}

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        text_index: Tensor,
        caption_ids: Tensor,
        image_ids: Tensor,
        spatial_shapes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            pixel_values: (B, C, S, S), patches (B, N, P * P * C) of images of any shape, or cached features (B, D).
            input_ids: (T, N), the distinct texts, or cached features (T, D).
            text_index: (B,), the row of `input_ids` that belongs to each image.
            caption_ids: (B,) integers that are equal for equal captions.
            image_ids: (B,) integers that are equal for equal images.
            spatial_shapes: (B, 2), the rows and columns of patches of each image; None for square images.

        Returns:
            {"contrastive": the loss}, or {"sigmoid": the loss} if the model has a bias.
        """
        image, text = self.embed(pixel_values, input_ids, text_index, spatial_shapes)
        batch = JoinedBatch.of(text_index, self.even_batches)
        return self.contrast(image, text, batch, caption_ids, image_ids)

    def embed(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, spatial_shapes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed the images and the texts of a batch as (B, E) each, of unit length."""
        most = len(text_index)
        text = self.in_parts(self.embed_texts, input_ids, most=most)[text_index]
        images = (pixel_values,) if spatial_shapes is None else (pixel_values, spatial_shapes)
        return self.in_parts(self.embed_images, *images, most=most), text

    def contrast(
        self, image: Tensor, text: Tensor, batch: JoinedBatch, caption_ids: Tensor, image_ids: Tensor
    ) -> dict[str, Tensor]:
        """The contrastive loss of embeddings (B, E) by its name; the mean over the sizes of Matryoshka embeddings."""
        losses = [self.contrast_size(size, image, text, batch, caption_ids, image_ids) for size in self.sizes]
        return {name: sum(each[name] for each in losses) / len(losses) for name in losses[0]}

    def contrast_size(
        self, size: int, image: Tensor, text: Tensor, batch: JoinedBatch, caption_ids: Tensor, image_ids: Tensor
    ) -> dict[str, Tensor]:
        """The contrastive loss of the first `size` dimensions of embeddings, normalised again, by its name."""
        if size < image.shape[1]:
            image, text = unit_length(image[:, :size]), unit_length(text[:, :size])
        ids = (caption_ids, image_ids) if self.exclude_duplicates else ()
        with torch.autocast(image.device.type, enabled=False):  # the loss is computed in float32
            scale = self.model.logit_scale.to(image.dtype).exp()
            if self.model.logit_bias is not None:
                return {"sigmoid": sigmoid_loss(image, text, scale, self.model.logit_bias.to(image.dtype), batch, ids)}
            return {"contrastive": contrastive_loss(image, text, scale, batch, ids)}

    def embed_images(self, pixel_values: Tensor, spatial_shapes: Tensor | None = None) -> Tensor:
        """Embed images, patches or cached features (see `forward`) as (B, E) of unit length."""
        if self.cached_images:
            return unit_length(self.model.visual_projection(pixel_values))
        return unit_length(
            self.model.get_image_features(pixel_values, spatial_shapes=spatial_shapes, pooled_only=True).pooler_output
        )

    def embed_texts(self, input_ids: Tensor) -> Tensor:
        """Embed texts (T, N), or their cached features (T, D), as (T, E) of unit length."""
        if self.cached_texts:
            return unit_length(self.model.text_projection(input_ids))
        return unit_length(self.model.get_text_features(input_ids, pooled_only=True, pack=True).pooler_output)
