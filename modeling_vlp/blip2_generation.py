"""BLIP-2, stage 2 (arXiv:2301.12597, section 3.3): the queries' outputs are a prefix for a frozen language model.

Sources: salesforce/LAVIS, models/blip2_models/blip2_opt.py and blip2_t5.py.
"""

import inspect
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.utils import ModelOutput, find_adapter_config_file
from transformers.utils.generic import can_return_tuple

from ..configuration.blip2 import VlpBlip2Config
from .attention import packs
from .base import adopt, loaded
from .blip2 import VlpBlip2ForPreTraining, VlpBlip2PreTrainedModel
from .language_model import load_language_model, plain_config, prefill, with_padding_first
from .med import Memory
from .prefix_words import PrefixWords

PREFIX = "language_model."

# Shapes: B images, T texts, Q queries, N tokens of a text, M tokens of an image, C channels, S image side, D width of
# the language model, V vocabulary


class VlpBlip2ForConditionalGeneration(VlpBlip2PreTrainedModel, GenerationMixin):
    """BLIP-2 with a language model that generates captions, and answers to prompts.

    The language model is frozen and keeps its own precision. Its weights are not part of the checkpoint unless
    `config.store_language_model` is set; `from_pretrained` loads them from the source that the configuration names.

    Args:
        language_model: a causal or sequence-to-sequence model of transformers. If None, a new one is created if
            `config.store_language_model` is set; otherwise there is none until `attach` is called.

    Raises:
        ValueError: if there is neither a language model nor a `text_config`.

    Example:
        >>> model = VlpBlip2ForConditionalGeneration.from_pretrained("runs/blip2-emoji-2")
        >>> model.generate(**processor(images=image, text="a drawing of", return_tensors="pt"), num_beams=5)
    """

    loads = ()
    accepts_loss_kwargs = True
    reads_instructions = False  # whether the Q-Former reads the prompt, too (InstructBLIP)
    _keys_to_ignore_on_load_unexpected = [
        r"^qformer\.embeddings\.(word|position)_embeddings\.",
        r"^qformer\..*\.text_mlp\.",
        r"^(itm_head|lm_head|vision_proj|text_proj)\.",
        r"^temp$",
    ]
    _keys_to_ignore_on_load_missing = [r"^prefix_words\.offsets$"]

    def __init__(self, config: VlpBlip2Config, language_model: PreTrainedModel | None = None):
        super().__init__(config, text=self.reads_instructions)
        if config.text_config is None and language_model is None:
            raise ValueError(f"{type(self).__name__} needs a language model or a text_config.")
        if config.text_config is None:
            config.text_config = plain_config(language_model)
            config.is_encoder_decoder = config.text_config.is_encoder_decoder
        self.language_projection = nn.Linear(
            config.qformer_config.hidden_size, config.text_config.get_text_config().hidden_size
        )
        self.prefix_words = None
        if config.num_prefix_words:
            sizes = config.num_prefix_words, config.num_prefix_pairs, config.num_prefix_repeats, config.num_query_tokens
            self.prefix_words = PrefixWords(*sizes, self.language_projection.out_features)
        self.language_model = None
        if config.store_language_model and language_model is None:
            kind = AutoModelForSeq2SeqLM if config.text_config.is_encoder_decoder else AutoModelForCausalLM
            language_model = kind.from_config(config.text_config)
        if language_model is not None:
            self.attach(language_model)
        self.post_init()

    @torch.no_grad()
    def initialize(self) -> None:
        """Scale the projection so that the prefix starts as large as the word embeddings; LAVIS does not do this."""
        super().initialize()
        if self.language_model is not None:
            scale = self.language_model.get_input_embeddings().weight.float().std().item()
            init.normal_(self.language_projection.weight, std=scale * self.language_projection.in_features**-0.5)
            init.zeros_(self.language_projection.bias)

    def attach(self, language_model: PreTrainedModel) -> None:
        """Attach a language model and freeze it.

        Raises:
            ValueError: if its width is not that of the projection.
        """
        width = language_model.get_input_embeddings().embedding_dim
        if width != self.language_projection.out_features:
            raise ValueError(
                f"The language model has width {width}, but the projection has {self.language_projection.out_features} "
                "outputs; use the language model that this checkpoint was trained with."
            )
        self.language_model = language_model
        self.generation_config = language_model.generation_config
        self.freeze()

    def freeze(self) -> None:
        super().freeze()
        if getattr(self, "language_model", None) is not None:
            self.language_model.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, language_model: PreTrainedModel | None = None, **kwargs
    ):
        """Load a model as transformers does, and its language model from the source that the configuration names.

        Args:
            pretrained_model_name_or_path: folder or hub name of a checkpoint, or of adapters.
            language_model: use this language model instead of loading one.
            args, kwargs: options of transformers' `from_pretrained`.

        Raises:
            OSError: if the language model cannot be loaded; the message says how to provide it.
        """
        name = pretrained_model_name_or_path
        if name is not None and (adapters := find_adapter_config_file(name)):  # they may adapt the language model
            base = json.loads(Path(adapters).read_text())["base_model_name_or_path"]
            model = cls.from_pretrained(base, *args, language_model=language_model, **kwargs)
            model.load_adapter(name)
            return model
        loaded = super().from_pretrained(name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.language_model is None:
            model.attach(language_model or load_language_model(model.config).to(model.device))
        return loaded

    @classmethod
    def from_pre_training(
        cls, name: str | VlpBlip2ForPreTraining, language_model: PreTrainedModel, language_model_name_or_path=None,
        language_model_file: str | None = None, language_model_revision: str | None = None,
        prefix_words: tuple[list[int], list[tuple[int, int]]] | None = None, num_prefix_repeats: int = 1, **kwargs,
    ) -> "VlpBlip2ForConditionalGeneration":  # fmt: skip
        """Initialise the model from a stage-1 model; the projection is newly initialised.

        Args:
            name: a `VlpBlip2ForPreTraining`, or the folder or hub name of one.
            language_model: the language model to attach.
            language_model_name_or_path, language_model_file, language_model_revision: where `from_pretrained` will load
                the language model from.
            prefix_words: the words that the prefix is made of, and pairs of them that may follow each other, as token
                ids; None: projected queries, as in the paper.
            num_prefix_repeats: how often the prefix is repeated.
            kwargs: options of `from_pretrained` of the stage-1 model.
        """
        source = loaded(VlpBlip2ForPreTraining, name, **kwargs)
        fields = source.config.to_dict()
        fields.pop("model_type", None)
        config = cls.config_class(**fields)
        config.text_config = plain_config(language_model)
        config.language_model_name_or_path = language_model_name_or_path
        config.language_model_file = language_model_file
        config.language_model_revision = language_model_revision
        config.num_prefix_words, config.num_prefix_pairs = map(len, prefix_words or ((), ()))
        config.num_prefix_repeats = num_prefix_repeats
        model = adopt(cls(config, language_model), source.state_dict().get)
        if prefix_words:
            model.prefix_words.fill(*prefix_words)
        return model

    def save_pretrained(self, save_directory, state_dict: dict | None = None, **kwargs):
        """Save as transformers does, without the language model unless `config.store_language_model` is set.

        Args:
            save_directory: the folder.
            state_dict: the weights to save; if None, those of the model.
            kwargs: options of transformers' `save_pretrained`.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        if not self.config.store_language_model and not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith(PREFIX)}
        return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    def train(self, mode: bool = True) -> "VlpBlip2ForConditionalGeneration":
        super().train(mode)
        if self.language_model is not None:
            self.language_model.eval()
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        return None if self.language_model is None else self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.language_model is None else self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """Resize the language model's word embeddings, which must then be saved (`config.store_language_model`)."""
        embeddings = self.language_model.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.get_text_config().vocab_size = self.vocab_size = embeddings.num_embeddings
        return embeddings

    def get_encoder(self, *args, **kwargs) -> nn.Module:
        return self.language_model.get_encoder(*args, **kwargs)

    def prefix(
        self, pixel_values=None, vision_states=None, interpolate_pos_encoding: bool = False,
        qformer_input_ids: Tensor | None = None, qformer_attention_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the prefix (B, R Q, D) of the language model's input: projected queries, or words; repeated.

        Args: as for `forward`.
        """
        vision = self.tower_output(pixel_values, vision_states, interpolate_pos_encoding)
        memory = self.memory_of(vision.last_hidden_state)
        prefix = self.language_projection(self.query_with(memory, qformer_input_ids, qformer_attention_mask))
        if self.prefix_words is not None:
            return self.prefix_words.embed(prefix, self.get_input_embeddings())
        return prefix.repeat(1, self.config.num_prefix_repeats, 1)

    def word_logits(self, vision_states: Tensor, qformer_input_ids=None, qformer_attention_mask=None) -> Tensor:
        """Compute the logits (B, Q, W) of the words of a prefix made of words. Args: as for `forward`."""
        queries = self.query_with(self.memory_of(vision_states), qformer_input_ids, qformer_attention_mask)
        return self.prefix_words.logits(self.language_projection(queries), self.get_input_embeddings())

    def query_with(self, memory: Memory, qformer_input_ids=None, qformer_attention_mask=None) -> Tensor:
        """Compute the outputs (B, Q, D) of the queries. BLIP-2's Q-Former does not read instructions."""
        return self.query(memory).last_hidden_state

    def join(
        self, prefix: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Concatenate prefixes (B, Q, D) and texts; other arguments: as for `forward`.

        Returns:
            Embeddings (B, Q + N, D) and their attention mask (B, Q + N).
        """
        prefix = prefix.to(self.language_model.dtype)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        if input_ids is None and inputs_embeds is None:
            return prefix, mask
        if inputs_embeds is None:
            inputs_embeds = self.language_model.get_input_embeddings()(input_ids)
        if attention_mask is None:
            attention_mask = mask.new_ones(inputs_embeds.shape[:2])
        embeds = torch.cat([prefix, inputs_embeds.to(prefix.dtype)], dim=1)
        return embeds, torch.cat([mask, attention_mask], dim=1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        vision_states: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | Seq2SeqLMOutput:
        """Compute the language model's logits, and its loss if there are labels.

        Args:
            pixel_values: (B, C, S, S); ignored if `vision_states` are given.
            input_ids: (B, N) texts: the prompt and its continuation; only the prompt for a sequence-to-sequence model.
            attention_mask: (B, N), 0 for padding; if None, there is no padding.
            labels: (B, N) like `input_ids`, -100 for tokens without a loss; (B, L) target texts of the decoder for a
                sequence-to-sequence model.
            vision_states: (B, M, width of the tower), from `encode_image`.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            inputs_embeds: (B, N, D) word embeddings, instead of `input_ids`.
            decoder_input_ids, decoder_attention_mask: (B, L) for a sequence-to-sequence model, as for transformers'
                model; if None, derived from `labels`.
            output_hidden_states, output_attentions: also return these of the language model; if None, as the
                configuration says.
            num_items_in_batch: divide the sum of the tokens' losses by this number, as `Trainer` does when it
                accumulates gradients; if None, by the number of tokens with a label.
            qformer_input_ids, qformer_attention_mask: (B, N') instructions as tokens of the Q-Former, for InstructBLIP;
                ignored by BLIP-2.
            kwargs: ignored.

        Returns:
            `logits` (B, N, V) for the token that follows each input token, or (B, L, V) of the decoder; and `loss`
            if `labels` are given.

        Raises:
            ValueError: if there are no images, or nothing for the decoder of a sequence-to-sequence model.
        """
        flags = self.output_flags(output_hidden_states, output_attentions)
        prefix = self.prefix(
            pixel_values, vision_states, interpolate_pos_encoding, qformer_input_ids, qformer_attention_mask
        )
        embeds, mask = self.join(prefix, input_ids, attention_mask, inputs_embeds)
        model = self.language_model
        if model.config.is_encoder_decoder:
            if labels is None and decoder_input_ids is None:
                raise ValueError(
                    f"{type(self).__name__} with a sequence-to-sequence language model needs labels or "
                    "decoder_input_ids; to write texts, call `generate`."
                )
            output = model(
                inputs_embeds=embeds, attention_mask=mask, labels=labels, decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask, use_cache=False, return_dict=True, **flags,
            )  # fmt: skip
            if num_items_in_batch is not None and labels is not None:
                output.loss = output.loss * (labels != -100).sum() / num_items_in_batch
            return output
        length = embeds.shape[1] - prefix.shape[1]
        keep = {"logits_to_keep": length + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        output = model(inputs_embeds=embeds, attention_mask=None if attention_mask is None else mask,
                       use_cache=False, return_dict=True, **flags, **keep)  # fmt: skip
        # The logits at the last query predict the first token of the text.
        logits, loss = output.logits[:, -length - 1 :], None
        if labels is not None:
            kept = labels != -100 if packs(logits) else ...
            reduction = "mean" if num_items_in_batch is None else "sum"
            with torch.autocast(logits.device.type, enabled=False):
                found = logits[:, :-1][kept].float().flatten(0, -2)
                loss = F.cross_entropy(found, labels[kept].flatten(), reduction=reduction)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return CausalLMOutputWithPast(
            loss=loss, logits=logits[:, 1:], hidden_states=output.hidden_states, attentions=output.attentions
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vision_states: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        inputs_embeds: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor | ModelOutput:
        """Generate text about images.

        Image and prompt are encoded once, whatever the number of beams and of sequences to return.

        Args:
            pixel_values: (B, C, S, S); ignored if `vision_states` are given.
            input_ids: (B, N) prompts, padded on either side; None for no prompt.
            attention_mask: (B, N), 0 for padding; if None, there is no padding.
            vision_states: (B, M, width of the tower), from `encode_image`.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            inputs_embeds: (B, N, D) word embeddings of prompts; if `input_ids` are given too, the result begins with
                them.
            qformer_input_ids, qformer_attention_mask: as for `forward`.
            kwargs: options of `generate` of the language model. As in transformers' Blip2, `max_length` counts the
                queries and the prompt, and `max_new_tokens` does not.

        Returns:
            Token ids (B, length); with a causal language model, they include the prompt. With
            `return_dict_in_generate`, transformers' output, whose `sequences` are these token ids.

        Raises:
            ValueError: if neither `pixel_values` nor `vision_states` is given.
        """
        model = self.language_model
        prefix = self.prefix(
            pixel_values, vision_states, interpolate_pos_encoding, qformer_input_ids, qformer_attention_mask
        )
        model.generation_config = self.generation_config
        if attention_mask is not None and (input_ids is not None or inputs_embeds is not None):
            # Generated tokens directly follow the prompt; an encoder has the padding at the end.
            attention_mask, input_ids, inputs_embeds = with_padding_first(
                attention_mask, input_ids, inputs_embeds, last=model.config.is_encoder_decoder
            )
        embeds, mask = self.join(prefix, input_ids, attention_mask, inputs_embeds)
        if model.config.is_encoder_decoder:
            return model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        if "past_key_values" not in kwargs and (cache := prefill(model, embeds, mask, kwargs)) is not None:
            kwargs["past_key_values"] = cache
        generated = model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        if input_ids is None:
            return generated
        sequences = generated if isinstance(generated, Tensor) else generated.sequences
        prompt = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([prompt, sequences], dim=1)
        if isinstance(generated, Tensor):
            return sequences
        generated.sequences = sequences
        return generated
