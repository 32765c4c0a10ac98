"""BLIP's fine-tuning objectives: captioning, question answering, reasoning over two images."""

from torch import Tensor

from ...modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from ...modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering, VlpBlipForVisualReasoning
from .base import Objective
from .distributed import weigh_by_count


class CaptioningObjective(Objective):
    """Generate the captions of images (salesforce/BLIP, models/blip.py, BLIP_Decoder).

    Args:
        model: the model to train.
        prompt_length: number of prompt tokens at the start of each caption, [DEC] included, which have no loss.
    """

    def __init__(self, model: VlpBlipForConditionalGeneration, prompt_length: int = 1):
        super().__init__()
        self.model, self.prompt_length = model, prompt_length

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            pixel_values, input_ids, text_index, caption_ids, image_ids: as in `ClipObjective.forward`.

        Returns:
            {"lm": the loss}.
        """
        input_ids = input_ids[text_index]
        labels = input_ids.masked_fill(input_ids == self.model.config.text_config.pad_token_id, -100)
        labels[:, : self.prompt_length] = -100
        loss = self.model.lm_loss(input_ids, self.model.image_memory(pixel_values), labels)
        return {"lm": weigh_by_count(loss, (labels[:, 1:] != -100).sum())}


class AnsweringObjective(Objective):
    """Answer questions about images (salesforce/BLIP, models/blip_vqa.py)."""

    def __init__(self, model: VlpBlipForQuestionAnswering):
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor,
        answer_ids: Tensor, answer_index: Tensor, answer_weights: Tensor, image_index: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Compute the loss of a batch.

        Args:
            pixel_values, input_ids, text_index, caption_ids, image_ids: as in `ClipObjective.forward`.
            answer_ids, answer_index, answer_weights: labels, answer_index and answer_weights of
                `VlpBlipForQuestionAnswering.forward`.
            image_index: the image of each question, if an image has several; see there.

        Returns:
            {"answer": the loss}.
        """
        output = self.model(
            input_ids[text_index], pixel_values, labels=answer_ids, answer_index=answer_index,
            answer_weights=answer_weights, image_index=image_index,
        )  # fmt: skip
        return {"answer": output.loss}


class ReasoningObjective(Objective):
    """Predict whether sentences are true of two images (salesforce/BLIP, models/blip_nlvr.py)."""

    def __init__(self, model: VlpBlipForVisualReasoning):
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor,
        labels: Tensor, image_index: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Compute the loss of a batch.

        Args:
            pixel_values: (2 B, C, S, S), left and right images alternating.
            input_ids, text_index, caption_ids, image_ids: as in `ClipObjective.forward`.
            labels: (T,), 1 if the sentence is true, else 0.
            image_index: the pair of images of each sentence, if a pair has several; see `AnsweringObjective.forward`.

        Returns:
            {"nlvr": the loss}.
        """
        pairs = pixel_values.unflatten(0, (-1, 2))
        return {"nlvr": self.model(input_ids[text_index], pairs, labels=labels, image_index=image_index).loss}
