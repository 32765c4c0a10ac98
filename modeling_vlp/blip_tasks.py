"""BLIP fine-tuned for visual question answering (VQA) and for reasoning about two images (NLVR2).

Sources: salesforce/BLIP, models/blip_vqa.py, models/blip_nlvr.py, models/nlvr_encoder.py; paper, sections 5.3 and 5.4.
"""

import copy
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, SequenceClassifierOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.blip import VlpBlipConfig
from ..configuration.text import VlpBlipTextConfig
from .attention import Attention
from .base import VlpPreTrainedModel, adopt, loaded
from .blip import VlpBlipForPreTraining, VlpBlipPreTrainedModel
from .blip_captioner import with_length
from .losses import weighted_answer_loss
from .med import LMHead, MedModel, Memory, ResidualAttention, begin_with, decode, initialize_as_bert, text_losses

# Shapes: B images, Q questions, N tokens of a text, M tokens of an image, A answers, D width, V vocabulary


class AnswerDecoder(VlpPreTrainedModel, GenerationMixin):
    """A text decoder that cross-attends to the states of a question, as the captioner does to those of an image."""

    config_class = VlpBlipTextConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _no_split_modules = ["MedEmbeddings", "MedLayer"]
    _tied_weights_keys = {"lm_head.decoder.weight": "text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: VlpBlipTextConfig):
        super().__init__(config)
        self.text_model = MedModel._from_config(config, encoder=False, decoder=True, cross=True)
        self.lm_head = LMHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: Memory | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """Compute next-token logits.

        Args:
            input_ids: (T, N) texts that begin with [DEC].
            attention_mask: (T, N), 0 for padding.
            memory: keys and values of the questions.
            position_ids, past_key_values: as for `MedModel.forward`.
            use_cache: accepted for `generate`; the cache is `past_key_values`.
            logits_to_keep: compute the logits of only the last tokens, this many; 0 for all.
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            kwargs: ignored.

        Returns:
            `logits` (T, N, V) for the token that follows each input token.
        """
        return decode(
            self,
            input_ids,
            attention_mask,
            memory,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **self.output_flags(output_hidden_states, output_attentions),
        )


class VlpBlipForQuestionAnswering(VlpBlipPreTrainedModel, GenerationMixin):
    """BLIP for visual question answering: encodes a question with [ENC], then generates or ranks answers.

    Differences from transformers' BlipForQuestionAnswering: answers begin with [DEC] in training too, padding is masked
    in attention and in the loss, and each answer has a weight.
    """

    loads = ()
    _tied_weights_keys = {
        "answer_decoder.lm_head.decoder.weight": "answer_decoder.text_model.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: VlpBlipConfig):
        super().__init__(config, encoder=True, decoder=False)
        text = copy.deepcopy(config.text_config)
        text.encoder_hidden_size = text.hidden_size  # it attends to a question, not to an image
        text.tie_word_embeddings = True
        self.answer_decoder = AnswerDecoder._from_config(text)
        self.post_init()
        self.generation_config = self.answer_decoder.generation_config

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """Resize the word embeddings of questions and those of answers, as transformers does."""
        self.answer_decoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @classmethod
    def from_pre_training(cls, name: str | VlpBlipForPreTraining, **kwargs) -> "VlpBlipForQuestionAnswering":
        """Initialise the model from a pre-trained model: the encoder from its encoder, the decoder from its decoder.

        The decoder's cross-attention is newly initialised if the image tower and the text model have different widths.

        Args:
            name: a `VlpBlipForPreTraining`, or the folder or hub name of one.
            kwargs: options of `from_pretrained`.
        """
        source = loaded(VlpBlipForPreTraining, name, **kwargs)
        model, given = cls(source.config), source.state_dict()
        return adopt(model, lambda own: given.get(own.removeprefix("answer_decoder.")))

    def question_memory(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_index: Tensor | None = None,
    ) -> Memory:
        """Encode questions, and compute the keys and values that the answer decoder cross-attends to.

        Args:
            pixel_values: (B, C, S, S).
            input_ids: (Q, N) questions that begin with [CLS], padded on the right, grouped by image (see
                `MedModel.forward`).
            attention_mask: (Q, N), 0 for padding; if None, derived from the padding token.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            image_index: (Q,) the image of each question, which are then in any order; None: they are grouped by image.
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        vision = self.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        images = self.text_model.memory_of(vision.last_hidden_state)
        images = images if image_index is None else images.select(image_index)
        ids = begin_with(input_ids, self.config.text_config.enc_token_id)
        states = self.text_model(ids, mask, images, pack=True).last_hidden_state
        return self.answer_decoder.text_model.memory_of(states, mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        answer_index: Tensor | None = None,
        answer_weights: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        image_index: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """Compute the loss of answers, or the logits of their first token if there are no labels.

        The loss of an answer is the sum over its tokens. The loss is the weighted sum over the answers, divided by the
        number of questions.

        Args:
            input_ids, pixel_values, attention_mask, image_index: as for `question_memory`.
            labels: (A, L) answers that begin with [CLS], padded on the right with the padding token.
            answer_index: (A,) index of the question of each answer; if None, one answer per question, in order.
            answer_weights: (A,) weight of each answer; if None, 1.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            output_hidden_states, output_attentions: also return these of the answer decoder, without `labels`; if None,
                as the configuration says.
            kwargs: ignored, such as `num_items_in_batch` of `Trainer`.

        Returns:
            `loss`, or `logits` (Q, 1, V) if `labels` is None.
        """
        memory = self.question_memory(pixel_values, input_ids, attention_mask, interpolate_pos_encoding, image_index)
        config = self.config.text_config
        if labels is None:
            begin = input_ids.new_full((len(input_ids), 1), config.bos_token_id)
            flags = self.output_flags(output_hidden_states, output_attentions)
            return decode(self.answer_decoder, begin, None, memory, **flags)
        if answer_index is not None:
            memory = memory.select(answer_index)
        if answer_weights is None:
            answer_weights = torch.ones(len(labels), device=labels.device)
        losses = text_losses(self.answer_decoder, labels, memory, config.label_smoothing)
        return CausalLMOutputWithCrossAttentions(loss=weighted_answer_loss(losses, answer_weights, len(input_ids)))

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> Tensor | ModelOutput:
        """Generate answers.

        Args:
            pixel_values, input_ids, attention_mask, interpolate_pos_encoding: as for `question_memory`.
            kwargs: options of transformers' `GenerationMixin.generate`.

        Returns:
            Token ids (Q, length), beginning with [DEC]; transformers' output with `return_dict_in_generate`.

        Raises:
            ValueError: if there is no image or no question, or `inputs_embeds` are given.
        """
        if pixel_values is None or input_ids is None:
            raise ValueError(
                "VlpBlipForQuestionAnswering.generate needs pixel_values (the images) and input_ids (the questions)."
            )
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("VlpBlipForQuestionAnswering.generate takes questions as input_ids, not as inputs_embeds.")
        memory = self.question_memory(pixel_values, input_ids, attention_mask, interpolate_pos_encoding)
        begin = input_ids.new_full((len(input_ids), 1), self.config.text_config.bos_token_id)
        self.answer_decoder.generation_config = self.generation_config
        kwargs = with_length(kwargs, self.generation_config)
        return self.answer_decoder.generate(
            input_ids=begin, attention_mask=torch.ones_like(begin), memory=memory, **kwargs
        )

    @torch.no_grad()
    def rank(self, pixel_values: Tensor, input_ids: Tensor, answers: Tensor, top_k: int = 128) -> Tensor:
        """Select the most likely of the given answers for each question.

        As in salesforce/BLIP's `rank_answer`, only the answers with the most likely first tokens are scored in full.
        Unlike the original, the scores do not include label smoothing, which is only for training.

        Args:
            pixel_values: (B, C, S, S).
            input_ids: (Q, N), as for `question_memory`.
            answers: (A, L) candidates that begin with [CLS], padded on the right with the padding token.
            top_k: number of answers to score in full per question.

        Returns:
            (Q,) index of the best answer.
        """
        memory = self.question_memory(pixel_values, input_ids)
        begin = input_ids.new_full((len(input_ids), 1), self.config.text_config.bos_token_id)
        first = decode(self.answer_decoder, begin, None, memory).logits[:, 0]  # (Q, V)
        count = min(top_k, len(answers))
        candidates = first[:, answers[:, 1]].topk(count, dim=1).indices  # (Q, count)
        # Candidates of the same question are consecutive, so they share its memory.
        losses = text_losses(self.answer_decoder, answers[candidates.flatten()], memory).view(-1, count)
        return candidates.gather(1, losses.argmin(dim=1, keepdim=True))[:, 0]


class PairAttention(ResidualAttention):
    """Cross-attention to two images with separate projections; the two outputs are averaged or merged.

    Args:
        merge: merge the two outputs with a linear layer (in the upper half of the layers) instead of averaging them.
    """

    def __init__(self, config: VlpBlipTextConfig, layer_index: int, merge: bool):
        super().__init__(config, layer_index, key_value_size=config.encoder_hidden_size)
        del self.attention
        self.attention0 = Attention(config, key_value_size=config.encoder_hidden_size)
        self.attention1 = Attention(config, key_value_size=config.encoder_hidden_size)
        self.merge = nn.Linear(2 * config.hidden_size, config.hidden_size) if merge else None

    @torch.no_grad()
    def merge_as_mean(self) -> None:
        """Add the mean of the two outputs to what a merging layer with random weights gives, if there is one."""
        if self.merge is not None:
            half = torch.eye(self.merge.out_features) / 2
            self.merge.weight.add_(torch.cat([half, half], dim=1))

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of the two images, concatenated in `states` (B, 2 M, D)."""
        halves = states.chunk(2, dim=1)
        parts = [self.attention0.keys_values(halves[0]), self.attention1.keys_values(halves[1])]
        return tuple(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))

    def forward(self, x: Tensor, mask=None, key_values=None, packing=None) -> tuple[Tensor, None]:
        keys, values = (tensor.chunk(2, dim=2) for tensor in key_values)
        outputs = [
            attention(x, None, key_values=(key, value), packing=packing)[0]
            for attention, key, value in zip((self.attention0, self.attention1), keys, values, strict=True)
        ]
        attended = (outputs[0] + outputs[1]) / 2 if self.merge is None else self.merge(torch.cat(outputs, dim=-1))
        return self.layer_norm(x + self.dropout(attended)), None


class VlpBlipForVisualReasoning(VlpBlipPreTrainedModel):
    """BLIP for visual reasoning (NLVR2): classifies whether a sentence is true of two images."""

    loads = ()

    def __init__(self, config: VlpBlipConfig):
        super().__init__(config, encoder=True, decoder=False)
        text = config.text_config
        for index, layer in enumerate(self.text_model.layers):
            layer.cross_attention = PairAttention(text, index, merge=index >= text.num_hidden_layers // 2)
        self.cls_head = nn.Sequential(
            nn.Linear(text.hidden_size, text.hidden_size), nn.ReLU(), nn.Linear(text.hidden_size, 2)
        )
        self.post_init()

    def initialize(self) -> None:
        for layer in self.text_model.layers:
            initialize_as_bert(layer.cross_attention, self.config.text_config)

    @classmethod
    def from_pre_training(
        cls, name: str | VlpBlipForPreTraining | VlpBlipForQuestionAnswering, **kwargs
    ) -> "VlpBlipForVisualReasoning":
        """Initialise the model from a pre-trained model, or from one that answers questions.

        The cross-attentions to the two images start from the same weights. The layers that merge them start near their
        mean, which keeps what the model knows; in salesforce/BLIP, they start from random weights.

        Args:
            name: a `VlpBlipForPreTraining`, the folder or hub name of one, or a `VlpBlipForQuestionAnswering`.
            kwargs: options of `from_pretrained`.
        """
        source = loaded(VlpBlipForPreTraining, name, **kwargs)
        model, given = cls(source.config), source.state_dict()
        adopt(model, lambda own: given.get(re.sub(r"\.attention[01]\.", ".attention.", own)))
        for layer in model.text_model.layers:
            layer.cross_attention.merge_as_mean()
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        image_index: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Classify sentences as false or true.

        Args:
            input_ids: (T, N) sentences that begin with [CLS], padded on the right, grouped by pair of images (see
                `MedModel.forward`).
            pixel_values: (B, 2, C, S, S), the left and the right image.
            attention_mask: (T, N), 0 for padding; if None, derived from the padding token.
            labels: (T,) 1 for true sentences, 0 for false ones.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            output_hidden_states, output_attentions: also return these of the text encoder; if None, as the
                configuration says.
            image_index: (T,) the pair of images of each sentence, in any order; None: they are grouped by pair.
            kwargs: ignored, such as `num_items_in_batch` of `Trainer`.

        Returns:
            `logits` (T, 2) of "false" and "true", and `loss` if `labels` are given.
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        vision = self.encode_image(pixel_values.flatten(0, 1), interpolate_pos_encoding=interpolate_pos_encoding)
        states = vision.last_hidden_state  # (2 B, M, D)
        memory = self.text_model.memory_of(states.unflatten(0, (-1, 2)).flatten(1, 2))
        memory = memory if image_index is None else memory.select(image_index)
        ids = begin_with(input_ids, self.config.text_config.enc_token_id)
        flags = self.output_flags(output_hidden_states, output_attentions)
        output = self.text_model(ids, mask, memory, pooled_only=True, pack=True, **flags)
        logits = self.cls_head(output.last_hidden_state[:, 0])
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
