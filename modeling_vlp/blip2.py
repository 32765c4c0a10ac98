"""BLIP-2, stage 1 (Li et al., 2023, arXiv:2301.12597): trains the Q-Former on a frozen image tower.

Source: salesforce/LAVIS, models/blip2_models/blip2_qformer.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from ..configuration.blip2 import VlpBlip2Config
from ..configuration.towers import VlpVisionTowerConfig, states_size
from ..configuration.vision import VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpViTConfig
from .base import VlpPreTrainedModel
from .blip import MatchesPairs, compare_within_batch, three_losses
from .med import LMHead, Memory, begin_with, label_loss
from .outputs import VlpBlipPreTrainingOutput, VlpBlipRetrievalOutput, compared, with_pooled
from .qformer import QFormerModel
from .resnet import ModifiedResNet
from .siglip import SiglipViT
from .towers import VisionTower
from .vit import BlipViT, ViT

# Shapes: B images, T texts, Q queries, N tokens of a text, M tokens of an image, C channels, S image side, D width,
# E embedding


class VlpBlip2PreTrainedModel(VlpPreTrainedModel):
    """Base class of the BLIP-2 models: the image tower, and the Q-Former with its learned queries.

    The tower is frozen and stays in evaluation mode unless `config.freeze_vision` is False. Its output can be computed
    in advance, by `encode_image`, and passed as `vision_states` instead of `pixel_values`.
    """

    config_class = VlpBlip2Config
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _no_split_modules = ["PatchEmbeddings", "Block", "Bottleneck", "AttentionPool2d", "QFormerEmbeddings",
                         "QFormerLayer"]  # fmt: skip

    def __init__(self, config: VlpBlip2Config, text: bool):
        super().__init__(config)
        kinds = {VlpModifiedResNetConfig.model_type: ModifiedResNet, VlpViTConfig.model_type: ViT,
                 VlpSiglipViTConfig.model_type: SiglipViT, VlpVisionTowerConfig.model_type: VisionTower}  # fmt: skip
        kind = kinds.get(config.vision_config.model_type, BlipViT)
        self.vision_model = kind._from_config(config.vision_config)
        self.vision_norm = nn.LayerNorm(states_size(config.vision_config), eps=config.vision_norm_eps)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = QFormerModel._from_config(config.qformer_config, text=text)
        self.freeze()

    def freeze(self) -> None:
        """Freeze the image tower. Called again after loading, which replaces the parameters."""
        if self.config.freeze_vision:
            self.vision_model.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a model as transformers does, and freeze the image tower again."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def initialize(self) -> None:
        init.normal_(self.query_tokens, std=self.config.qformer_config.initializer_range)

    def train(self, mode: bool = True) -> "VlpBlip2PreTrainedModel":
        super().train(mode)
        if self.config.freeze_vision:
            self.vision_model.eval()
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        return self.qformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.qformer.set_input_embeddings(value)

    def encode_image(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Encode images (B, C, S, S) with the image tower; returns states (B, M, width of the tower)."""
        return self.tower_output(pixel_values, None, interpolate_pos_encoding).last_hidden_state

    def tower_output(
        self,
        pixel_values: Tensor | None,
        vision_states: Tensor | None,
        interpolate_pos_encoding: bool = False,
        **flags: bool,
    ) -> BaseModelOutputWithPooling:
        """Run the image tower on images, unless its states are given; `last_hidden_state` has the states.

        Args:
            pixel_values: (B, C, S, S); ignored if `vision_states` are given.
            vision_states: (B, M, width of the tower), from `encode_image`.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            flags: `output_hidden_states` and `output_attentions`.

        Raises:
            ValueError: if neither `pixel_values` nor `vision_states` is given.
        """
        if vision_states is not None:
            return BaseModelOutputWithPooling(last_hidden_state=vision_states)
        if pixel_values is None:
            raise ValueError(f"{type(self).__name__} needs pixel_values (the images) or their vision_states.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision):
            output = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **flags)
        if isinstance(self.vision_model, ModifiedResNet):
            output.last_hidden_state = output.as_sequence()
        return output

    def memory_of(self, vision_states: Tensor) -> Memory:
        """Compute the cross-attention keys and values once per image.

        The LayerNorm before them is computed in float32, as in LAVIS.

        Args:
            vision_states: (B, M, width of the tower), from `encode_image`.
        """
        with torch.autocast(vision_states.device.type, enabled=False):
            norm, dtype = self.vision_norm, torch.promote_types(vision_states.dtype, torch.float32)
            weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
            states = F.layer_norm(vision_states.to(dtype), norm.normalized_shape, weight, bias, norm.eps)
        return self.qformer.memory_of(states.to(norm.weight.dtype))

    def query(self, memory: Memory, **kwargs):
        """Run the Q-Former on the queries only.

        Args:
            memory: keys and values of B images.
            kwargs: options of `QFormerModel.forward`.

        Returns:
            The Q-Former's output, with `last_hidden_state` (B, Q, D).
        """
        return self.qformer(query_embeds=self.query_tokens.expand(len(memory), -1, -1), memory=memory, **kwargs)

    def padding_mask(self, input_ids: Tensor | None) -> Tensor:
        """The attention mask of texts (T, N): 0 for the padding token. Raises ValueError if there are no texts."""
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} needs input_ids, the texts.")
        return (input_ids != self.config.qformer_config.pad_token_id).long()


class VlpBlip2Matcher(MatchesPairs, VlpBlip2PreTrainedModel):
    """Base class of the models that compare queries and texts in a shared space (ITC) and match them (ITM)."""

    def __init__(self, config: VlpBlip2Config):
        super().__init__(config, text=True)
        width = config.qformer_config.hidden_size
        self.vision_proj = nn.Linear(width, config.image_text_hidden_size)
        self.text_proj = nn.Linear(width, config.image_text_hidden_size)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(config.temperature_init_value))

    def initialize(self) -> None:
        super().initialize()
        init.constant_(self.temp, self.config.temperature_init_value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_states: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed images.

        Args:
            pixel_values: (B, C, S, S); ignored if `vision_states` are given.
            vision_states: (B, M, width of the tower), from `encode_image`.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            output_hidden_states, output_attentions: also return these of the tower; if None, as the configuration says.
            kwargs: ignored, so that the processor's output can be passed as it is.

        Returns:
            `pooler_output` (B, Q, E), the queries' outputs, projected but not normalised, and `last_hidden_state` (B,
            M, width of the tower), the states of the tower.
        """
        flags = self.output_flags(output_hidden_states, output_attentions)
        output = self.tower_output(pixel_values, vision_states, interpolate_pos_encoding, **flags)
        output.pooler_output = self.vision_proj(self.query(self.memory_of(output.last_hidden_state)).last_hidden_state)
        return output

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pooled_only: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed texts.

        Args:
            input_ids: (T, N) texts that begin with [CLS].
            attention_mask: (T, N), 0 for padding; if None, derived from the padding token.
            pooled_only: compute only the first token in the last layer; `last_hidden_state` is then None.
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            kwargs: ignored, so that the processor's output can be passed as it is.

        Returns:
            `pooler_output` (T, E), projected but not normalised, and `last_hidden_state` (T, N, D).
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        flags = self.output_flags(output_hidden_states, output_attentions)
        output = self.qformer(input_ids=input_ids, attention_mask=mask, pooled_only=pooled_only, **flags)
        return with_pooled(output, self.text_proj, pooled_only)

    def match(self, input_ids: Tensor, attention_mask: Tensor | None, memory: Memory) -> Tensor:
        """Compute ITM logits of texts and images, averaged over the queries.

        Args:
            input_ids: (T, N) texts that begin with [CLS], grouped by image (see `QFormerModel.forward`).
            attention_mask: (T, N), 0 for padding; if None, derived from the padding token.
            memory: keys and values of the images.

        Returns:
            (T, 2): logits of "no match" and "match".
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        queries = self.query_tokens.expand(len(input_ids), -1, -1)
        output = self.qformer(queries, input_ids, mask, memory, pooled_only=True)
        return self.itm_head(output.last_hidden_state).mean(dim=1)


class VlpBlip2ForPreTraining(VlpBlip2Matcher):
    """BLIP-2 in stage 1: image-text contrast (ITC), matching (ITM) and image-grounded text generation (ITG).

    `forward` computes the three losses within the batch, for use with `Trainer`; `vlp.training` computes those of the
    joined batch of all processes.
    """

    loads = ()
    _tied_weights_keys = {"lm_head.decoder.weight": "qformer.embeddings.word_embeddings.weight"}

    def __init__(self, config: VlpBlip2Config):
        super().__init__(config)
        self.lm_head = LMHead(config.qformer_config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head.decoder = value

    def decode(self, input_ids: Tensor, cache: DynamicCache) -> Tensor:
        """Compute states (B, N, D) of texts with causal attention, after the cached queries.

        Args:
            input_ids: (B, N) texts that begin with [CLS], which is replaced by [DEC].
            cache: self-attention keys and values of the queries.
        """
        ids = begin_with(input_ids, self.config.qformer_config.bos_token_id)
        return self.qformer(input_ids=ids, past_key_values=cache, decode=True).last_hidden_state

    def lm_loss(self, input_ids: Tensor, cache: DynamicCache) -> Tensor:
        """Compute the text generation loss of all tokens but the first.

        Args:
            input_ids: (B, N) texts that begin with [CLS], padded on the right.
            cache: self-attention keys and values of the queries.
        """
        config = self.config.qformer_config
        labels = input_ids[:, 1:].masked_fill(input_ids[:, 1:] == config.pad_token_id, -100)
        # No mask is needed: with causal attention, no text token attends to the padding on its right.
        return label_loss(self.lm_head, self.decode(input_ids[:, :-1], cache), labels, config.label_smoothing)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vision_states: Tensor | None = None,
        caption_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        label_smoothing: float = 0.0,
        return_loss: bool = True,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> VlpBlipPreTrainingOutput:
        """Compute the three losses of B pairs; hard negatives come from the batch.

        Args:
            pixel_values: (B, C, S, S); ignored if `vision_states` are given.
            input_ids: (B, N) captions that begin with [CLS], padded on the right.
            attention_mask: (B, N), 0 for padding; if None, derived from the padding token.
            vision_states: (B, M, width of the tower), from `encode_image`.
            caption_ids: (B,) equal for equal captions, which are not used as negatives of each other; if None, captions
                with the same tokens are equal.
            image_ids: (B,) equal for equal images, which are not used as negatives of each other; if None, all images
                are different.
            label_smoothing: label smoothing of the ITC targets; 0.1 in LAVIS, not mentioned in the paper.
            return_loss: if False, return only the embeddings and their logits.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            kwargs: ignored, such as `num_items_in_batch` of `Trainer`.

        Returns:
            The losses, logits and embeddings.

        Raises:
            ValueError: if neither `pixel_values` nor `vision_states` is given.
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        flags = self.output_flags(output_hidden_states, output_attentions)
        vision = self.tower_output(pixel_values, vision_states, interpolate_pos_encoding, **flags)
        memory, cache = self.memory_of(vision.last_hidden_state), DynamicCache()
        vision.pooler_output = self.vision_proj(self.query(memory, past_key_values=cache).last_hidden_state)
        words = self.get_text_features(input_ids, mask, pooled_only=True, return_dict=True, **flags)
        image, text = F.normalize(vision.pooler_output, dim=-1), F.normalize(words.pooler_output, dim=-1)
        logits, losses = best_query(image, text) / self.temp, {}
        if return_loss:
            loss_itc, negatives, found = compare_within_batch(
                logits, input_ids, caption_ids, image_ids, self.training, label_smoothing
            )
            itm_logits = self.itm_logits(input_ids, mask, memory, *negatives)
            losses = three_losses(loss_itc, itm_logits, found, self.lm_loss(input_ids, cache))
        return compared(VlpBlipPreTrainingOutput, logits, image, text, vision, words, **losses)


def best_query(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Compute cosines (B, T) of images (B, Q, E) and texts (T, E): the maximum over the queries of an image."""
    return (image_embeds @ text_embeds.T).amax(dim=1)  # (B, Q, T) -> (B, T)


class VlpBlip2ForImageTextRetrieval(VlpBlip2Matcher):
    """BLIP-2 for image-text retrieval: ITC and ITM scores."""

    loads = ("VlpBlip2ForPreTraining",)
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: VlpBlip2Config):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vision_states: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> VlpBlipRetrievalOutput:
        """Compare every image with every text by ITC, and match each text with its image by ITM.

        Args:
            pixel_values: (B, C, S, S); ignored if `vision_states` are given.
            input_ids: (T, N) texts that begin with [CLS], T a multiple of B. The first T / B are matched with the first
                image, and so on; if T = B, text i is matched with image i.
            attention_mask: (T, N), 0 for padding; if None, derived from the padding token.
            vision_states: (B, M, width of the tower), from `encode_image`.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            kwargs: ignored.

        Returns:
            The scores and embeddings.

        Raises:
            ValueError: if neither `pixel_values` nor `vision_states` is given.
        """
        flags = self.output_flags(output_hidden_states, output_attentions)
        vision = self.tower_output(pixel_values, vision_states, interpolate_pos_encoding, **flags)
        memory = self.memory_of(vision.last_hidden_state)
        vision.pooler_output = self.vision_proj(self.query(memory).last_hidden_state)
        words = self.get_text_features(input_ids, attention_mask, pooled_only=True, return_dict=True, **flags)
        image_embeds, text_embeds = F.normalize(vision.pooler_output, dim=-1), F.normalize(words.pooler_output, dim=-1)
        logits = best_query(image_embeds, text_embeds) / self.temp  # (B, T)
        itm_logits = self.match(input_ids, attention_mask, memory)
        return compared(VlpBlipRetrievalOutput, logits, image_embeds, text_embeds, vision, words, itm_logits=itm_logits)
