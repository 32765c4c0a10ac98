"""What the models return."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class VlpClipOutput(ModelOutput):
    """Fields and order of transformers' CLIPOutput.

    Attributes:
        loss: scalar, where asked for.
        logits_per_image: (images, captions), the scaled cosine similarities.
        logits_per_text: (captions, images), their transpose.
        text_embeds, image_embeds: (captions, E) and (images, E), of unit length.
        text_model_output, vision_model_output: what the towers gave, `pooler_output` projected.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


@dataclass
class ResNetOutput(BaseModelOutputWithPooling):
    """A ModifiedResNet's.

    Attributes:
        last_hidden_state: (B, D, G, G), the cells. pooler_output: (B, E), projected.
        attended: (B, D), what attention pooling gave before its projection.
    """

    attended: Tensor | None = None

    def as_sequence(self) -> Tensor:
        """(B, 1 + G * G, D), as a vision transformer's: a summary, then the cells."""
        return torch.cat([self.attended[:, None], self.last_hidden_state.flatten(2).transpose(1, 2)], dim=1)


@dataclass
class VlpBlipPreTrainingOutput(ModelOutput):
    """The three losses of a batch, and what they were computed from.

    Attributes:
        loss: scalar, the sum of the others.
        loss_itc, loss_itm, loss_lm: scalars: contrastive, matching, language modelling.
        logits_per_image: (B, B) similarities of images and texts over the temperature.
        itm_logits: (3 B, 2) of the pairs, of texts with a hard negative image, and of images with a hard negative text.
        image_embeds, text_embeds: (B, E) of unit length; BLIP-2's images have an embedding for each query, (B, Q, E).
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_lm: Tensor | None = None
    logits_per_image: Tensor | None = None
    itm_logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


@dataclass
class VlpBlipRetrievalOutput(ModelOutput):
    """How well texts fit images.

    Attributes:
        itm_logits: (T, 2) of each text with its image; softmax gives the probabilities of "no match" and "match".
        logits_per_image: (B, T) cosine similarities over the temperature; logits_per_text: their transpose.
        image_embeds, text_embeds: (B, E), in BLIP-2 (B, Q, E), and (T, E) of unit length.
    """

    itm_logits: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
