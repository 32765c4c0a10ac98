"""What the models return."""

from dataclasses import dataclass

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
