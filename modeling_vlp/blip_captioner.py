"""BLIP's image-grounded decoder, for captioning. Source: salesforce/BLIP, models/blip.py, BLIP_Decoder."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.blip import VlpBlipConfig
from .base import adopt
from .blip import VlpBlipForPreTraining, VlpBlipPreTrainedModel
from .med import LMHead, Memory, decode, next_token_loss

# Shapes: B images, T texts, N tokens of a text, C channels, S image side, V vocabulary


class VlpBlipForConditionalGeneration(VlpBlipPreTrainedModel, GenerationMixin):
    """BLIP's image-grounded decoder: generates captions with transformers' `generate`.

    Example:
        >>> model = VlpBlipForConditionalGeneration.from_pretrained("runs/blip-emoji")
        >>> model.generate(**processor(images=image, return_tensors="pt"), num_beams=3)
    """

    loads = ("VlpBlipForPreTraining",)
    main_input_name = "pixel_values"
    accepts_loss_kwargs = True
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
        """Create the decoder of a pre-training model on the same weights in memory.

        The result is for generation, not for training.
        """
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
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
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
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """Compute next-token logits of texts, or the loss.

        Args:
            pixel_values: (B, C, S, S); ignored if `memory` is given.
            input_ids: (T, N) texts that begin with [DEC], grouped by image (see `MedModel.forward`).
            attention_mask: (T, N), 0 for padding.
            memory: keys and values of the images, from `image_memory`.
            position_ids, inputs_embeds, past_key_values: as for `MedModel.forward`.
            use_cache: accepted for `generate`; the cache is `past_key_values`.
            labels: (T, N) like `input_ids`, -100 for tokens without a loss. In training, only the loss is computed, and
                `logits` is None.
            logits_to_keep: compute the logits of only the last tokens, this many; 0 for all.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            num_items_in_batch: divide the sum of the tokens' losses by this number, as `Trainer` does when it
                accumulates gradients; if None, by the number of tokens with a label.
            kwargs: ignored.

        Returns:
            `logits` (T, N, V) for the token that follows each input token, and `loss` if `labels` are given.

        Raises:
            ValueError: if neither `pixel_values` nor `memory` is given.
        """
        if memory is None:
            if pixel_values is None:
                raise ValueError(
                    "VlpBlipForConditionalGeneration needs pixel_values (the images to caption) or memory."
                )
            memory = self.image_memory(pixel_values, interpolate_pos_encoding)
        loss = None
        if labels is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            loss = next_token_loss(self.text_model, self.lm_head, input_ids, mask, memory, labels)
            if num_items_in_batch is not None:
                loss = loss * (labels[:, 1:] != -100).sum() / num_items_in_batch
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
        """Compute the language modelling loss.

        Args:
            input_ids: (T, N) texts that begin with [CLS], padded on the right.
            memory: keys and values of the images.
            labels: (T, N), see `next_token_loss`.
        """
        return next_token_loss(self.text_model, self.lm_head, input_ids, None, memory, labels)

    def to_pre_training(self) -> VlpBlipForPreTraining:
        """Make a model to pre-train that starts from this one.

        The encoder's self-attention starts from the decoder's; the heads of ITC and ITM are newly initialised.
        """
        given = self.state_dict()
        return adopt(
            VlpBlipForPreTraining(self.config),
            lambda own: given.get(own.replace("encoder_attention", "decoder_attention")),
        )

    def image_memory(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Memory:
        """Compute the cross-attention keys and values of images (B, C, S, S), once for all texts, beams and tokens."""
        vision = self.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.text_model.memory_of(vision.last_hidden_state)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs: dict) -> tuple[Tensor, str, dict]:
        """Tell transformers what the decoder reads: the texts, because the images are in `memory`."""
        embeds, ids = model_kwargs.get("inputs_embeds"), model_kwargs.pop("input_ids", None)
        if embeds is None:
            return ids, "input_ids", model_kwargs
        ids = torch.ones(len(embeds), 0, dtype=torch.long, device=embeds.device) if ids is None else ids
        return embeds, "inputs_embeds", model_kwargs | {"input_ids": ids}

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        memory: Memory | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> Tensor | ModelOutput:
        """Generate captions.

        Args:
            pixel_values: (B, C, S, S); ignored if `memory` is given.
            input_ids: (B, N) prompts such as "a picture of", as the tokenizer returns them, of any lengths; None for no
                prompt. [CLS] is replaced by [DEC]; the end token and padding are removed.
            attention_mask: (B, N), 0 for padding; if None, derived from the padding token.
            inputs_embeds: (B, N, D) word embeddings of prompts without an end token, instead of `input_ids`; that of
                [CLS] is replaced by that of [DEC]. If `input_ids` are given too, the result begins with them.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            memory: keys and values of the images, from `image_memory`.
            kwargs: options of transformers' `GenerationMixin.generate`.

        Returns:
            Token ids (B, length), including [DEC] and the prompt; transformers' output with `return_dict_in_generate`.

        Raises:
            ValueError: if there is no image, or the text would exceed the model's positions.
        """
        if memory is None and pixel_values is None:
            raise ValueError("VlpBlipForConditionalGeneration.generate needs pixel_values, the images to caption.")
        if memory is None:
            memory = self.image_memory(pixel_values, interpolate_pos_encoding)
        config = self.config.text_config
        if inputs_embeds is not None:
            shape = inputs_embeds.shape[:2]
            mask = inputs_embeds.new_ones(shape, dtype=torch.long) if attention_mask is None else attention_mask
            first = torch.arange(shape[1], device=mask.device) == mask.argmax(dim=1, keepdim=True)  # (B, N)
            begin = self.get_input_embeddings().weight[config.bos_token_id]
            kwargs["inputs_embeds"] = torch.where(first[..., None], begin, inputs_embeds)
            attention_mask = mask
            if input_ids is not None:
                input_ids = input_ids.masked_fill(first, config.bos_token_id)
        elif input_ids is None:
            input_ids = torch.full((len(memory), 1), config.bos_token_id, device=memory.states.device)
            attention_mask = torch.ones_like(input_ids)
        else:
            mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
            input_ids, attention_mask = as_prompts(input_ids, mask, config)
        kwargs = with_length(kwargs, self.generation_config)
        return super().generate(input_ids=input_ids, attention_mask=attention_mask, memory=memory, **kwargs)


def with_length(options: dict, settings: GenerationConfig) -> dict:
    """Set the default of 20 new tokens if no length is given; transformers would do the same, with a warning."""
    configured = settings.max_length is not None or settings.max_new_tokens is not None
    if configured or "generation_config" in options or "max_length" in options or "max_new_tokens" in options:
        return options
    return options | {"max_new_tokens": 20}


def as_prompts(input_ids: Tensor, attention_mask: Tensor, config) -> tuple[Tensor, Tensor]:
    """Turn texts (T, N) padded on the right into prompts: [DEC] first, no end token, padded on the left."""
    kept = attention_mask.bool() & (input_ids != config.eos_token_id)
    order = kept.long().argsort(dim=1, stable=True)  # dropped tokens to the left; kept tokens stay in order
    ids, mask = input_ids.gather(1, order), kept.gather(1, order).long()
    ids = ids.masked_fill(mask == 0, config.pad_token_id)
    first = mask.argmax(dim=1, keepdim=True)
    ids = ids.scatter(1, first, config.bos_token_id)
    used = int(mask.sum(dim=1).max())
    return ids[:, -used:], mask[:, -used:]
