"""BLIP-2, stage 1 (Li et al., 2023, arXiv:2301.12597): the Q-Former learns to read a frozen image tower.

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
from ..configuration.vision import VlpModifiedResNetConfig, VlpViTConfig
from .base import VlpPreTrainedModel
from .blip import MatchesPairs, compare_within_batch, matching_labels
from .losses import language_modelling_loss, matching_loss
from .med import LMHead, Memory, begin_with
from .outputs import VlpBlipPreTrainingOutput, VlpBlipRetrievalOutput
from .qformer import QFormerModel
from .resnet import ModifiedResNet
from .vit import BlipViT, ViT

# Shapes: B images, T texts, Q queries, N tokens of a text, M tokens of an image, C channels, S image side, D width,
# E embedding


class VlpBlip2PreTrainedModel(VlpPreTrainedModel):
    """What the models of the family share: the image tower, and the queries that read it.

    The tower is frozen and in evaluation mode, unless `config.freeze_vision` is False. What it gives may be computed
    beforehand, by `see`, and handed over as `vision_states` in the place of `pixel_values`.
    """

    config_class = VlpBlip2Config
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _no_split_modules = ["PatchEmbeddings", "Block", "Bottleneck", "AttentionPool2d", "QFormerEmbeddings",
                         "QFormerLayer"]  # fmt: skip

    def __init__(self, config: VlpBlip2Config, text: bool):
        super().__init__(config)
        kinds = {VlpModifiedResNetConfig: ModifiedResNet, VlpViTConfig: ViT}
        self.vision_model = kinds.get(type(config.vision_config), BlipViT)._from_config(config.vision_config)
        self.vision_norm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.vision_norm_eps)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = QFormerModel._from_config(config.qformer_config, text=text)
        self.freeze()

    def freeze(self) -> None:
        """Take what is frozen out of training; loading puts new parameters in the place of those that were."""
        if self.config.freeze_vision:
            self.vision_model.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        """As transformers'; what is frozen stays frozen."""
        loaded = super().from_pretrained(name, *args, **kwargs)
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

    def see(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """What the image tower gives for images (B, C, S, S): (B, M, its width)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision):
            output = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return output.as_sequence() if isinstance(self.vision_model, ModifiedResNet) else output.last_hidden_state

    def read(self, vision_states: Tensor) -> Memory:
        """What the queries attend to, computed once for each image: from (B, M, width of the tower).

        The LayerNorm before it is computed in float32, as in LAVIS.
        """
        with torch.autocast(vision_states.device.type, enabled=False):
            norm, dtype = self.vision_norm, torch.promote_types(vision_states.dtype, torch.float32)
            weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
            states = F.layer_norm(vision_states.to(dtype), norm.normalized_shape, weight, bias, norm.eps)
        return self.qformer.read(states.to(norm.weight.dtype))

    def query(self, memory: Memory, **kwargs):
        """The Q-Former's output for the queries alone: `last_hidden_state` (B, Q, D)."""
        return self.qformer(query_embeds=self.query_tokens.expand(len(memory), -1, -1), memory=memory, **kwargs)

    def padding_mask(self, input_ids: Tensor) -> Tensor:
        return (input_ids != self.config.qformer_config.pad_token_id).long()

    def states_of(self, pixel_values, vision_states, interpolate_pos_encoding: bool = False) -> Tensor:
        """The tower's states, as they were given, or of the images. Raises ValueError where neither is given."""
        if vision_states is None and pixel_values is None:
            raise ValueError(f"{type(self).__name__} needs pixel_values, the images, or their vision_states.")
        return self.see(pixel_values, interpolate_pos_encoding) if vision_states is None else vision_states


class VlpBlip2Matcher(MatchesPairs, VlpBlip2PreTrainedModel):
    """Queries and texts that meet in one space (ITC), and are matched together (ITM)."""

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
        self, pixel_values: Tensor | None = None, vision_states: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> BaseModelOutputWithPooling:  # fmt: skip
        """Images (B, C, S, S) -> `pooler_output` (B, Q, E), the queries, projected, not normalised, and
        `last_hidden_state` (B, M, width of the tower), what they read."""
        states = self.states_of(pixel_values, vision_states, interpolate_pos_encoding)
        read = self.query(self.read(states)).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.vision_proj(read))

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pooled_only: bool = True
    ) -> BaseModelOutputWithPooling:
        """Texts (T, N) that begin with [CLS] -> `pooler_output` (T, E), projected, not normalised.

        Args:
            attention_mask: (T, N), 0 where there is padding; from the padding token where not given.
            pooled_only: the last layer computes the first token alone; `last_hidden_state` is then None.
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        last = self.qformer(input_ids=input_ids, attention_mask=mask, pooled_only=pooled_only).last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else last, pooler_output=self.text_proj(last[:, 0])
        )

    def match(self, input_ids: Tensor, attention_mask: Tensor | None, memory: Memory) -> Tensor:
        """ITM logits (T, 2) of texts with the images that they are grouped under: the mean over the queries' logits."""
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        queries = self.query_tokens.expand(len(input_ids), -1, -1)
        output = self.qformer(queries, input_ids, mask, memory, pooled_only=True)
        return self.itm_head(output.last_hidden_state).mean(dim=1)


class VlpBlip2ForPreTraining(VlpBlip2Matcher):
    """BLIP-2 in stage 1: compare (ITC), match (ITM), write (ITG).

    Called with pairs alone, as `Trainer` does, it gives the three losses within the batch; `vlp.training` has those of
    all processes' joined batch.
    """

    _tied_weights_keys = {"lm_head.decoder.weight": "qformer.embeddings.word_embeddings.weight"}

    def __init__(self, config: VlpBlip2Config):
        super().__init__(config)
        self.lm_head = LMHead(config.qformer_config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head.decoder = value

    def write(self, input_ids: Tensor, cache: DynamicCache) -> Tensor:
        """States (B, N, D) of texts that begin with [CLS] (read as [DEC]), after the queries in a cache."""
        ids = begin_with(input_ids, self.config.qformer_config.bos_token_id)
        return self.qformer(input_ids=ids, past_key_values=cache, decode=True).last_hidden_state

    def lm_loss(self, input_ids: Tensor, cache: DynamicCache) -> Tensor:
        """Loss of writing texts (B, N) that begin with [CLS], padded on the right: every token but the first."""
        labels = input_ids[:, 1:]
        kept = labels != self.config.qformer_config.pad_token_id
        # Padding on the right is seen by nothing that is learnt from.
        logits = self.lm_head(self.write(input_ids[:, :-1], cache)[kept])
        with torch.autocast(logits.device.type, enabled=False):
            return language_modelling_loss(logits.float(), labels[kept], self.config.qformer_config.label_smoothing)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vision_states: Tensor | None = None,
        caption_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        label_smoothing: float = 0.0,
        return_loss: bool = True,
    ) -> VlpBlipPreTrainingOutput:
        """The three losses of B pairs; what does not match is looked for in the batch.

        Args:
            input_ids: (B, N) captions that begin with [CLS], padded on the right; pixel_values: (B, C, S, S), or
                `vision_states` (B, M, width of the tower) from `see`.
            caption_ids, image_ids: (B,) equal where captions or images are; such rows are not each other's negatives.
                Where not given, captions with the same tokens are the same.
            label_smoothing: of ITC's targets; 0.1 in LAVIS, not in the paper.
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        memory, cache = self.read(self.states_of(pixel_values, vision_states)), DynamicCache()
        image = F.normalize(self.vision_proj(self.query(memory, past_key_values=cache).last_hidden_state), dim=-1)
        text = F.normalize(self.get_text_features(input_ids, mask).pooler_output, dim=-1)
        logits = best_query(image, text) / self.temp  # (B, B)
        if not return_loss:
            return VlpBlipPreTrainingOutput(logits_per_image=logits, image_embeds=image, text_embeds=text)
        loss_itc, negatives, found = compare_within_batch(logits, input_ids, caption_ids, image_ids, label_smoothing)
        itm_logits = self.itm_logits(input_ids, mask, memory, *negatives)
        loss_itm = matching_loss(itm_logits.float(), *matching_labels(found, found))
        loss_lm = self.lm_loss(input_ids, cache)
        return VlpBlipPreTrainingOutput(
            loss=loss_itc + loss_itm + loss_lm,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_lm=loss_lm,
            logits_per_image=logits,
            itm_logits=itm_logits,
            image_embeds=image,
            text_embeds=text,
        )


def best_query(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """(B, T) cosines of images' queries (B, Q, E) and texts (T, E): that of the query that fits each text best."""
    return (image_embeds @ text_embeds.T).amax(dim=1)  # (B, Q, T) -> (B, T)


class VlpBlip2ForImageTextRetrieval(VlpBlip2Matcher):
    """ITC and ITM scores of images and texts."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: VlpBlip2Config):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vision_states: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> VlpBlipRetrievalOutput:
        """Compare every image with every text, and match each text with its image.

        Args:
            input_ids: (T, N) texts; the first T / B are matched with the first image, and so on: text i with image i
                where there are as many of both.
            pixel_values: (B, C, S, S), or `vision_states` (B, M, width of the tower) from `see`.
        """
        memory = self.read(self.states_of(pixel_values, vision_states, interpolate_pos_encoding))
        image_embeds = F.normalize(self.vision_proj(self.query(memory).last_hidden_state), dim=-1)
        text_embeds = F.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)
        logits = best_query(image_embeds, text_embeds) / self.temp  # (B, T)
        return VlpBlipRetrievalOutput(
            itm_logits=self.match(input_ids, attention_mask, memory),
            logits_per_image=logits,
            logits_per_text=logits.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )
