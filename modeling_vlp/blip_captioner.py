"""BLIP's image-grounded decoder by itself: captions. Source: salesforce/BLIP, models/blip.py, BLIP_Decoder."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils.generic import can_return_tuple

from ..configuration.blip import VlpBlipConfig
from .blip import VlpBlipForPreTraining, VlpBlipPreTrainedModel
from .med import LMHead, Memory, decode, next_token_loss

# Shapes: B images, T texts, N tokens of a text, C channels, S image side, V vocabulary


class VlpBlipForConditionalGeneration(VlpBlipPreTrainedModel, GenerationMixin):
    """The image-grounded decoder: captions, with all of transformers' `generate`.

    Example:
        >>> model = VlpBlipForConditionalGeneration.from_pretrained("runs/blip-emoji")
        >>> model.generate(**processor(images=image, return_tensors="pt"), num_beams=3)
    """

    _keys_to_ignore_on_load_unexpected = [
        r"encoder_attention\.",
        r"^itm_head\.",
        r"^temp$",
        r"^(vision|text)_proj\.",
    ]
    _tied_weights_keys = {"lm_head.decoder.weight": "text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: VlpBlipConfig):
        super().__init__(config, encoder=False, decoder=True)
        self.lm_head = LMHead(config.text_config)
        self.post_init()

    @classmethod
    def sharing(cls, model: VlpBlipForPreTraining) -> "VlpBlipForConditionalGeneration":
        """The decoder of a pre-training model, on the same weights in memory; for generation, not for training."""
        with torch.device("meta"):
            decoder = cls(model.config)
            for name, adapter in getattr(model, "peft_config", {}).items():
                decoder.add_adapter(adapter, name)
        decoder.load_state_dict(model.state_dict(), strict=False, assign=True)
        return decoder.eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory: Memory | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits (T, N, V) of the token after each of the texts (T, N), which begin with [DEC].

        Args:
            pixel_values: (B, C, S, S), or `memory`, what `read_image` made of them before; texts are grouped by image.
            labels: (T, N) as `input_ids`, -100 where there is nothing to learn. While training, the loss is all that is
                computed, at the labels' positions; `logits` is then None.
            logits_to_keep: compute the logits of so many last tokens alone; 0 for all.
        """
        if memory is None:
            if pixel_values is None:
                raise ValueError("VlpBlipForConditionalGeneration needs pixel_values, the images to write about.")
            memory = self.read_image(pixel_values, interpolate_pos_encoding)
        loss = None
        if labels is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            loss = next_token_loss(self.text_model, self.lm_head, input_ids, mask, memory, labels)
            if self.training:
                return CausalLMOutputWithCrossAttentions(loss=loss)
        output = decode(
            self,
            input_ids,
            attention_mask,
            memory,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **self.output_flags(output_hidden_states, output_attentions),
        )
        output.loss = loss
        return output

    def lm_loss(self, input_ids: Tensor, memory: Memory, labels: Tensor | None = None) -> Tensor:
        """Loss of writing texts (T, N) that begin with [CLS], padded on the right; see `next_token_loss`."""
        return next_token_loss(self.text_model, self.lm_head, input_ids, None, memory, labels)

    def read_image(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Memory:
        """What the decoder attends to, computed once however many texts, beams and tokens follow."""
        vision = self.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.text_model.read(vision.last_hidden_state)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        memory: Memory | None = None,
        **kwargs,
    ) -> Tensor:
        """Write about images; everything else is transformers' `GenerationMixin.generate`.

        Args:
            pixel_values: (B, C, S, S), or `memory` from `read_image`.
            input_ids: (B, N) prompts such as "a picture of" as the tokenizer gives them, of any lengths: [CLS] is
                replaced by [DEC], and the end token and padding after it taken off; none where not given.

        Returns token ids (B, length), [DEC] and the prompt included.
        """
        if memory is None:
            memory = self.read_image(pixel_values, interpolate_pos_encoding)
        config = self.config.text_config
        if input_ids is None:
            input_ids = torch.full((len(memory), 1), config.bos_token_id, device=memory.states.device)
            attention_mask = torch.ones_like(input_ids)
        else:
            mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
            input_ids, attention_mask = as_prompts(input_ids, mask, config)
        kwargs = with_length(kwargs, self.generation_config)
        return super().generate(input_ids=input_ids, attention_mask=attention_mask, memory=memory, **kwargs)


def with_length(options: dict, settings: GenerationConfig) -> dict:
    """Options of `generate`, with its usual 20 new tokens where nothing says how many; it would warn of them."""
    told = "generation_config" in options or settings.max_length is not None or settings.max_new_tokens is not None
    if told or "max_length" in options or "max_new_tokens" in options:
        return options
    return options | {"max_new_tokens": 20}


def as_prompts(input_ids: Tensor, attention_mask: Tensor, config) -> tuple[Tensor, Tensor]:
    """Texts (T, N) padded on the right -> prompts to go on from: [DEC] first, no end token, padded on the left."""
    kept = attention_mask.bool() & (input_ids != config.eos_token_id)
    order = kept.long().argsort(dim=1, stable=True)  # what is dropped to the left, what is kept in its order
    ids, mask = input_ids.gather(1, order), kept.gather(1, order).long()
    ids = ids.masked_fill(mask == 0, config.pad_token_id)
    first = mask.argmax(dim=1, keepdim=True)
    ids = ids.scatter(1, first, config.bos_token_id)
    used = int(mask.sum(dim=1).max())
    return ids[:, -used:], mask[:, -used:]
