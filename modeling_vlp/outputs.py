"""The outputs of the models."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


def nested_tuple(output: ModelOutput) -> tuple:
    """Convert an output that contains outputs to a tuple of tuples, without the values that are None."""
    return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in output.values())


@dataclass
class VlpClipOutput(ModelOutput):
    """Output of `VlpClipModel`, with the fields of transformers' CLIPOutput in the same order.

    Attributes:
        loss: scalar; None if not requested.
        logits_per_image: (images, captions), the scaled cosine similarities, plus the bias if there is one.
        logits_per_text: (captions, images), the transpose.
        text_embeds: (captions, E), of unit length.
        image_embeds: (images, E), of unit length.
        text_model_output, vision_model_output: outputs of the towers, with `pooler_output` projected.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return nested_tuple(self)


@dataclass
class ResNetOutput(BaseModelOutputWithPooling):
    """Output of `ModifiedResNet`.

    Attributes:
        last_hidden_state: (B, D, G, G), the cells.
        pooler_output: (B, E), projected.
        attended: (B, D), the output of attention pooling before the projection.
    """

    attended: Tensor | None = None

    def as_sequence(self) -> Tensor:
        """Return a sequence (B, 1 + G * G, D) like that of a vision transformer: the pooled vector, then the cells."""
        return torch.cat([self.attended[:, None], self.last_hidden_state.flatten(2).transpose(1, 2)], dim=1)


@dataclass
class VlpBlipPreTrainingOutput(ModelOutput):
    """Losses of a batch, with the logits and embeddings.

    Attributes:
        loss: scalar, the sum of the three losses.
        loss_itc, loss_itm, loss_lm: scalars: contrastive, matching and language modelling loss.
        logits_per_image: (B, B) similarities of images and texts, divided by the temperature.
        logits_per_text: (B, B), the transpose.
        itm_logits: (B, 2) of each text with its image; softmax gives the probabilities of "no match" and "match".
        image_embeds, text_embeds: (B, E), of unit length; BLIP-2 has an image embedding for each query, (B, Q, E).
        text_model_output, vision_model_output: outputs for the embeddings, with hidden states and attentions if
            requested.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_lm: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    itm_logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return nested_tuple(self)


@dataclass
class VlpBlipRetrievalOutput(ModelOutput):
    """Scores of texts and images.

    Attributes:
        itm_logits: (T, 2) of each text with its image; softmax gives the probabilities of "no match" and "match".
        logits_per_image: (B, T) cosine similarities, divided by the temperature.
        logits_per_text: (T, B), the transpose.
        image_embeds: (B, E), of unit length; (B, Q, E) in BLIP-2.
        text_embeds: (T, E), of unit length.
        text_model_output, vision_model_output: outputs for the embeddings, with hidden states and attentions if
            requested.
    """

    itm_logits: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return nested_tuple(self)


def with_pooled(output: ModelOutput, projection: nn.Module, pooled_only: bool) -> BaseModelOutputWithPooling:
    """The output of a text encoder, with its first token projected as `pooler_output` (T, E).

    Args:
        output: has the `last_hidden_state` (T, N, D); (T, 1, D) if `pooled_only`, which is then left out.
        projection: from D to E.
        pooled_only: whether the encoder computed only the first token in its last layer.
    """
    return BaseModelOutputWithPooling(
        last_hidden_state=None if pooled_only else output.last_hidden_state,
        pooler_output=projection(output.last_hidden_state[:, 0]),
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )


def compared(
    kind: type[ModelOutput], logits: Tensor, image: Tensor, text: Tensor, vision, words, **more: Tensor
) -> ModelOutput:
    """The output of a model that compares B images with T texts.

    Args:
        kind: the class of the output.
        logits: (B, T) similarities, divided by the temperature.
        image, text: the embeddings, of unit length.
        vision, words: the outputs of `get_image_features` and `get_text_features`.
        more: further fields.
    """
    return kind(
        logits_per_image=logits,
        logits_per_text=logits.T,
        image_embeds=image,
        text_embeds=text,
        text_model_output=words,
        vision_model_output=vision,
        **more,
    )
