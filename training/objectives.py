"""One nn.Module for each objective: a batch in, named losses out. This is what Accelerate wraps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling_vlp.clip import VlpClipModel
from ..modeling_vlp.losses import clip_loss, same_pairs, siglip_loss
from .distributed import gather_with_gradient


class ClipObjective(nn.Module):
    """Tell the pairs of the joined batch of all processes apart.

    A ResNet's batch statistics are those of each process' own images; all else is as if one process had all of it.

    Args:
        exclude_duplicates: rows that share a caption or an image are not each other's negatives.
        lock_image_tower, lock_text_tower: leave a tower and its projection as they are (LiT, arXiv:2111.07991), its
            batch norm and dropout in evaluation mode.
    """

    def __init__(
        self,
        model: VlpClipModel,
        exclude_duplicates: bool = True,
        lock_image_tower: bool = False,
        lock_text_tower: bool = False,
    ):
        super().__init__()
        self.model = model
        self.exclude_duplicates = exclude_duplicates
        locked = (["vision_model", "visual_projection"] if lock_image_tower else []) + (
            ["text_model", "text_projection"] if lock_text_tower else []
        )
        self.locked = [getattr(model, name).requires_grad_(False) for name in locked]

    def train(self, mode: bool = True) -> "ClipObjective":
        super().train(mode)
        for module in self.locked:
            module.eval()
        return self

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            pixel_values: (B, C, S, S).
            input_ids: (T, N), the different texts; text_index: (B,), which of them belongs to each image.
            caption_ids, image_ids: (B,) integers that are equal where captions or images are.
        """
        image = self.model.get_image_features(pixel_values, pooled_only=True).pooler_output
        text = self.model.get_text_features(input_ids, pooled_only=True).pooler_output[text_index]
        with torch.autocast(image.device.type, enabled=False):  # the loss is computed in float32
            image, text = (gather_with_gradient(F.normalize(x.float(), dim=-1)) for x in (image, text))
            not_negative = None
            if self.exclude_duplicates:
                not_negative = same_pairs(gather_with_gradient(caption_ids), gather_with_gradient(image_ids))
            scale = self.model.logit_scale.float().exp()
            if self.model.logit_bias is not None:
                return {"sigmoid": siglip_loss(image, text, scale, self.model.logit_bias.float(), not_negative)}
            return {"contrastive": clip_loss(image, text, scale, not_negative)}
