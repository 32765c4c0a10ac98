"""BLIP fine-tuned to answer questions (VQA) and to reason about two images (NLVR2).

Sources: salesforce/BLIP, models/blip_vqa.py, models/blip_nlvr.py, models/nlvr_encoder.py; paper, section 5.3 and 5.4.
"""

import copy
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.blip import VlpBlipConfig
from ..configuration.text import VlpBlipTextConfig
from .attention import Attention
from .base import VlpPreTrainedModel, adopt
from .blip import VlpBlipForPreTraining, VlpBlipPreTrainedModel
from .blip_captioner import with_length
from .losses import weighted_answer_loss
from .med import LMHead, MedModel, Memory, ResidualAttention, begin_with, decode, initialize_as_bert

# Shapes: B images, Q questions, N tokens of a text, M tokens of an image, A answers, D width, V vocabulary


class AnswerDecoder(VlpPreTrainedModel, GenerationMixin):
    """A text decoder that reads the states of a question, as the captioner reads those of an image."""

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
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: Memory | None = None,
                position_ids: Tensor | None = None, past_key_values=None, use_cache: bool | None = None,
                logits_to_keep: int = 0) -> CausalLMOutputWithCrossAttentions:  # fmt: skip
        """Logits (T, N, V) of the token after each of the texts (T, N), which begin with [DEC]."""
        return decode(self, input_ids, attention_mask, memory, position_ids=position_ids,
                      past_key_values=past_key_values, logits_to_keep=logits_to_keep)  # fmt: skip


class VlpBlipForQuestionAnswering(VlpBlipPreTrainedModel):
    """A question about an image is encoded with [ENC]; an answer is decoded from its states, or ranked.

    Otherwise than in transformers' BlipForQuestionAnswering, answers begin with [DEC] in training too, padding is
    neither attended to nor learnt, and answers have their weights.
    """

    _tied_weights_keys = {
        "answer_decoder.lm_head.decoder.weight": "answer_decoder.text_model.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: VlpBlipConfig):
        super().__init__(config, encoder=True, decoder=False)
        text = copy.deepcopy(config.text_config)
        text.encoder_hidden_size = text.hidden_size  # it reads a question, not an image
        text.tie_word_embeddings = True
        self.answer_decoder = AnswerDecoder._from_config(text)
        self.post_init()

    @classmethod
    def from_pre_training(cls, name: str, **kwargs) -> "VlpBlipForQuestionAnswering":
        """Start from a pre-trained folder: the encoder from its encoder, the decoder from its decoder.

        Where the image tower is not as wide as the text model, the decoder's cross-attention starts anew.
        """
        source = VlpBlipForPreTraining.from_pretrained(name, **kwargs)
        model, given = cls(source.config), source.state_dict()
        return adopt(model, lambda own: given.get(own.removeprefix("answer_decoder.")))

    def read_question(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Memory:
        """What an answer is decoded from; questions are grouped by image (see `MedModel.forward`).

        Args:
            pixel_values: (B, C, S, S); input_ids: (Q, N) questions that begin with [CLS], padded on the right.
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        images = self.text_model.read(self.encode_image(pixel_values).last_hidden_state)
        ids = begin_with(input_ids, self.config.text_config.enc_token_id)
        states = self.text_model(ids, mask, images, pack=True).last_hidden_state
        return self.answer_decoder.text_model.read(states, mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        answer_index: Tensor | None = None,
        answer_weights: Tensor | None = None,
    ) -> CausalLMOutputWithCrossAttentions:
        """The loss of answers, or the logits of their first token.

        Args: as `read_question`;
            labels: (A, L) answers that begin with [CLS], padded on the right with the padding token.
            answer_index: (A,) the question of each answer; one each, in order, where not given.
            answer_weights: (A,) how much each counts; 1 where not given.

        The loss is the weighted sum of the answers' losses, each a sum over its tokens, over the number of questions.
        """
        memory = self.read_question(pixel_values, input_ids, attention_mask)
        config = self.config.text_config
        if labels is None:
            begin = input_ids.new_full((len(input_ids), 1), config.bos_token_id)
            return decode(self.answer_decoder, begin, None, memory)
        if answer_index is not None:
            memory = memory.select(answer_index)
        if answer_weights is None:
            answer_weights = torch.ones(len(labels), device=labels.device)
        losses = answer_losses(self.answer_decoder, labels, memory, config.label_smoothing)
        return CausalLMOutputWithCrossAttentions(loss=weighted_answer_loss(losses, answer_weights, len(input_ids)))

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """Answers (Q, length) as token ids; all else is transformers' `GenerationMixin.generate`. Args: as above."""
        memory = self.read_question(pixel_values, input_ids, attention_mask)
        begin = input_ids.new_full((len(input_ids), 1), self.config.text_config.bos_token_id)
        kwargs = with_length(kwargs, self.answer_decoder.generation_config)
        return self.answer_decoder.generate(
            input_ids=begin, attention_mask=torch.ones_like(begin), memory=memory, **kwargs
        )

    @torch.no_grad()
    def rank(self, pixel_values: Tensor, input_ids: Tensor, answers: Tensor, top_k: int = 128) -> Tensor:
        """(Q,) the number of the likeliest of `answers` (A, L) for each question.

        As salesforce/BLIP's `rank_answer`: the answers whose first token is likeliest are scored in full. Label
        smoothing is for training alone: otherwise than there, it does not enter the scores.
        """
        memory = self.read_question(pixel_values, input_ids)
        begin = input_ids.new_full((len(input_ids), 1), self.config.text_config.bos_token_id)
        first = decode(self.answer_decoder, begin, None, memory).logits[:, 0]  # (Q, V)
        count = min(top_k, len(answers))
        candidates = first[:, answers[:, 1]].topk(count, dim=1).indices  # (Q, count)
        # Candidates of one question stand together, and so share its memory.
        losses = answer_losses(self.answer_decoder, answers[candidates.flatten()], memory, 0.0).view(-1, count)
        return candidates.gather(1, losses.argmin(dim=1, keepdim=True))[:, 0]


def answer_losses(decoder: AnswerDecoder, answers: Tensor, memory: Memory, label_smoothing: float) -> Tensor:
    """(A,) the cross entropy of each answer (A, L), summed over its tokens after [DEC]."""
    config = decoder.config
    ids = begin_with(answers, config.bos_token_id)
    states = decoder.text_model(ids[:, :-1], ids[:, 1:] != config.pad_token_id, memory, decode=True, pack=True)
    labels = answers[:, 1:].masked_fill(answers[:, 1:] == config.pad_token_id, -100)
    logits = decoder.lm_head(states.last_hidden_state).float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=label_smoothing)
    return losses.sum(dim=1)


class PairAttention(ResidualAttention):
    """Cross-attention to two images, each by projections of its own, whose answers are averaged or merged.

    Args:
        merge: a linear layer makes one answer of two (in the upper half of the layers), not their mean.
    """

    def __init__(self, config: VlpBlipTextConfig, layer_index: int, merge: bool):
        super().__init__(config, layer_index, key_value_size=config.encoder_hidden_size)
        del self.attention
        self.attention0 = Attention(config, key_value_size=config.encoder_hidden_size)
        self.attention1 = Attention(config, key_value_size=config.encoder_hidden_size)
        self.merge = nn.Linear(2 * config.hidden_size, config.hidden_size) if merge else None

    def read(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of two images, one after the other in (B, 2 M, D), each by its projections."""
        halves = states.chunk(2, dim=1)
        parts = [self.attention0.keys_values(halves[0]), self.attention1.keys_values(halves[1])]
        return tuple(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))

    def forward(self, x: Tensor, mask=None, key_values=None, packing=None) -> tuple[Tensor, None]:
        keys, values = (tensor.chunk(2, dim=2) for tensor in key_values)
        answers = [
            attention(x, None, key_values=(key, value), packing=packing)[0]
            for attention, key, value in zip((self.attention0, self.attention1), keys, values, strict=True)
        ]
        attended = (answers[0] + answers[1]) / 2 if self.merge is None else self.merge(torch.cat(answers, dim=-1))
        return self.layer_norm(x + self.dropout(attended)), None


class VlpBlipForVisualReasoning(VlpBlipPreTrainedModel):
    """Whether a sentence is true of two images (NLVR2)."""

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
    def from_pre_training(cls, name: str, **kwargs) -> "VlpBlipForVisualReasoning":
        """Start from a pre-trained folder; both images are read by what read one."""
        source = VlpBlipForPreTraining.from_pretrained(name, **kwargs)
        model, given = cls(source.config), source.state_dict()
        return adopt(model, lambda own: given.get(re.sub(r"\.attention[01]\.", ".attention.", own)))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (B, 2) of "false" and "true".

        Args:
            input_ids: (B, N) sentences that begin with [CLS]; pixel_values: (B, 2, C, S, S), left and right.
            labels: (B,) 1 where the sentence is true.
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        states = self.encode_image(pixel_values.flatten(0, 1)).last_hidden_state  # (2 B, M, D)
        memory = self.text_model.read(states.unflatten(0, (-1, 2)).flatten(1, 2))
        ids = begin_with(input_ids, self.config.text_config.enc_token_id)
        pooled = self.text_model(ids, mask, memory, pooled_only=True, pack=True).last_hidden_state[:, 0]
        logits = self.cls_head(pooled)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
