"""BLIP (Li et al., 2022, arXiv:2201.12086)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from ..configuration.blip import VlpBlipConfig
from ..configuration.towers import VlpVisionTowerConfig
from ..configuration.vision import VlpModifiedResNetConfig
from .base import VlpPreTrainedModel
from .layers import make_projection, masked_mean
from .losses import draw_hard_negatives, matching_loss, same_pairs, smooth_targets, soft_contrastive_loss
from .med import LMHead, MedModel, Memory, begin_with, next_token_loss, text_losses
from .outputs import VlpBlipPreTrainingOutput, VlpBlipRetrievalOutput, compared, with_pooled
from .resnet import ModifiedResNet
from .towers import VisionTower
from .vit import BlipViT

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5

# Shapes: B images, T texts, N tokens of a text, M tokens of an image, C channels, S image side, E embedding


class VlpBlipPreTrainedModel(VlpPreTrainedModel):
    """Base class of the BLIP models: the image tower, and the text model that cross-attends to its output."""

    config_class = VlpBlipConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _no_split_modules = ["PatchEmbeddings", "Block", "Bottleneck", "AttentionPool2d", "MedEmbeddings", "MedLayer"]

    def __init__(self, config: VlpBlipConfig, encoder: bool = True, decoder: bool = True, cross: bool = True):
        super().__init__(config)
        kinds = {VlpModifiedResNetConfig.model_type: ModifiedResNet, VlpVisionTowerConfig.model_type: VisionTower}
        kind = kinds.get(config.vision_config.model_type, BlipViT)
        self.is_resnet = kind is ModifiedResNet
        self.vision_model = kind._from_config(config.vision_config)
        self.text_model = MedModel._from_config(config.text_config, encoder=encoder, decoder=decoder, cross=cross)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def encode_image(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images with the image tower.

        Args:
            pixel_values: (B, C, S, S).
            kwargs: options of the image tower, such as `interpolate_pos_encoding`.

        Returns:
            `last_hidden_state` (B, M, D), which texts cross-attend to, and `pooler_output` (B, D), or (B, E) of a
            ResNet.
        """
        output = self.vision_model(pixel_values, **kwargs)
        if self.is_resnet and output.last_hidden_state is not None:
            output.last_hidden_state = output.as_sequence()
        return output

    def memory_of(self, states: Tensor) -> Memory:
        """Compute the cross-attention keys and values once per image, from the states (B, M, D) of `encode_image`."""
        return self.text_model.memory_of(states)

    def padding_mask(self, input_ids: Tensor) -> Tensor:
        return (input_ids != self.config.text_config.pad_token_id).long()


class VlpBlipDualEncoder(VlpBlipPreTrainedModel):
    """The image tower and the unimodal text encoder, projected to a shared space.

    ITC trains these parts, and the momentum teacher consists of them.
    """

    def __init__(self, config: VlpBlipConfig, encoder: bool = True, decoder: bool = False, cross: bool = False):
        super().__init__(config, encoder, decoder, cross)
        self.vision_proj = nn.Identity()  # the ResNet's attention pooling includes the projection
        if not self.is_resnet:
            sizes = config.vision_config.hidden_size, config.image_text_hidden_size
            self.vision_proj = make_projection(*sizes, config.vision_projection_hidden_size, config.projection_dropout)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.image_text_hidden_size)
        if type(self) is VlpBlipDualEncoder:
            self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed images.

        Args: as for `VlpClipModel.get_image_features`.

        Returns:
            `pooler_output` (B, E), projected but not normalised, and `last_hidden_state` (B, M, D).
        """
        output = self.encode_image(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            pooled_only=pooled_only,
            **self.output_flags(output_hidden_states, output_attentions),
        )
        output.pooler_output = self.vision_proj(output.pooler_output)
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
        """Embed texts with the unimodal encoder.

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
        output = self.text_model(input_ids, mask, pooled_only=pooled_only, pack=pooled_only, **flags)
        return with_pooled(output, self.text_proj, pooled_only)


class MatchesPairs:
    """Mixin for the BLIP and BLIP-2 models that have a temperature `temp` and a method `match`."""

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Clamp the temperature, as salesforce/BLIP does before each step; LAVIS does not clamp that of BLIP-2."""
        self.temp.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)

    def itm_logits(
        self, input_ids: Tensor, attention_mask: Tensor, memory: Memory, image_negatives: Tensor,
        text_negatives: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute the ITM logits of B pairs and their hard negatives, K for each text and K for each image.

        Args:
            input_ids: (B, N) texts that begin with [CLS].
            attention_mask: (B, N), 0 for padding.
            memory: keys and values of the B images.
            image_negatives: (K B,) index of the negative images of each text: the first of all texts, the second, ...
            text_negatives: (K B,) index of the negative texts of each image, likewise.

        Returns:
            ((1 + 2 K) B, 2): the pairs, the texts with their negative images, the images with their negative texts.
        """
        own = torch.arange(len(input_ids), device=input_ids.device)
        again = own.repeat(len(image_negatives) // len(own))
        texts = torch.cat([own, again, text_negatives])
        images = torch.cat([own, image_negatives, again])
        return self.match(input_ids[texts], attention_mask[texts], memory.select(images))


class VlpBlipMatcher(MatchesPairs, VlpBlipDualEncoder):
    """A dual encoder that also predicts, by cross-attention, whether a text matches an image (ITM)."""

    def __init__(self, config: VlpBlipConfig, decoder: bool):
        super().__init__(config, encoder=True, decoder=decoder, cross=True)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(config.temperature_init_value))

    def initialize(self) -> None:
        init.constant_(self.temp, self.config.temperature_init_value)

    def match(self, input_ids: Tensor, attention_mask: Tensor | None, memory: Memory, pack: bool = True) -> Tensor:
        """Compute ITM logits of texts and images.

        Args:
            input_ids: (T, N) texts that begin with [CLS], grouped by image (see `MedModel.forward`).
            attention_mask: (T, N), 0 for padding; if None, derived from the padding token.
            memory: keys and values of the images.
            pack: skip the computation for padding, which must be on the right.

        Returns:
            (T, 2): logits of "no match" and "match".
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        ids = begin_with(input_ids, self.config.text_config.enc_token_id)
        pooled_only = self.config.itm_pooling == "cls"
        states = self.text_model(ids, mask, memory, pooled_only=pooled_only, pack=pack).last_hidden_state
        return self.match_logits(states, mask)

    def match_logits(self, states: Tensor, mask: Tensor) -> Tensor:
        """Compute ITM logits (T, 2) from the states of the image-grounded text encoder.

        Args:
            states: (T, N, D).
            mask: (T, N), 0 for padding.
        """
        if self.config.itm_pooling == "cls":
            return self.itm_head(states[:, 0])
        return self.itm_head(masked_mean(states, mask))


class VlpBlipForPreTraining(VlpBlipMatcher):
    """BLIP in pre-training: image-text contrast (ITC), matching (ITM) and language modelling (LM).

    `forward` computes the three losses within the batch, for use with `Trainer`. The momentum teacher and its queue are
    training state, not part of the model; `vlp.training` implements them.
    """

    loads = ()
    _tied_weights_keys = {"lm_head.decoder.weight": "text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: VlpBlipConfig):
        super().__init__(config, decoder=True)
        self.lm_head = LMHead(config.text_config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head.decoder = value

    def caption_log_probabilities(self, input_ids: Tensor, memory: Memory) -> Tensor:
        """Compute the log-probability (T,) that the decoder gives to each text (see `med.text_losses`)."""
        return -text_losses(self, input_ids, memory)

    def lm_loss(self, input_ids: Tensor, memory: Memory, labels: Tensor | None = None) -> Tensor:
        """Compute the language modelling loss.

        Args:
            input_ids: (T, N) texts that begin with [CLS], padded on the right.
            memory: keys and values of the images.
            labels: (T, N), see `next_token_loss`.
        """
        return next_token_loss(self.text_model, self.lm_head, input_ids, None, memory, labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        caption_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        return_loss: bool = True,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> VlpBlipPreTrainingOutput:
        """Compute the three losses of B pairs without a teacher; hard negatives come from the batch.

        Args:
            input_ids: (B, N) captions that begin with [CLS], padded on the right.
            pixel_values: (B, C, S, S).
            attention_mask: (B, N), 0 for padding; if None, derived from the padding token.
            caption_ids: (B,) equal for equal captions, which are not used as negatives of each other; if None, captions
                with the same tokens are equal.
            image_ids: (B,) equal for equal images, which are not used as negatives of each other; if None, all images
                are different.
            return_loss: if False, return only the embeddings and their logits.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            kwargs: ignored, such as `num_items_in_batch` of `Trainer`.

        Returns:
            The losses, logits and embeddings.
        """
        mask = self.padding_mask(input_ids) if attention_mask is None else attention_mask
        flags = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        vision = self.get_image_features(pixel_values, interpolate_pos_encoding, return_dict=True, **flags)
        words = self.get_text_features(input_ids, mask, pooled_only=True, return_dict=True, **flags)
        image, text = F.normalize(vision.pooler_output, dim=-1), F.normalize(words.pooler_output, dim=-1)
        logits, losses = image @ text.T / self.temp, {}
        if return_loss:
            loss_itc, negatives, found = compare_within_batch(logits, input_ids, caption_ids, image_ids, self.training)
            memory = self.text_model.memory_of(vision.last_hidden_state)
            itm_logits = self.itm_logits(input_ids, mask, memory, *negatives)
            losses = three_losses(loss_itc, itm_logits, found, self.lm_loss(input_ids, memory))
        return compared(VlpBlipPreTrainingOutput, logits, image, text, vision, words, **losses)


def compare_within_batch(
    logits: Tensor,
    input_ids: Tensor,
    caption_ids: Tensor | None,
    image_ids: Tensor | None,
    training: bool,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Compute the ITC loss within a batch, and draw hard negatives from it.

    Args:
        logits: (B, B) similarities of images and texts, divided by the temperature.
        input_ids, caption_ids, image_ids: as for `VlpBlipForPreTraining.forward`.
        training: draw the negatives at random; otherwise the same ones in every call.
        label_smoothing: label smoothing of the ITC targets.

    Returns:
        The loss; the indices (B,) of the negative image of each text and of the negative text of each image; and a mask
        (B,), True if a row has a negative.
    """
    if caption_ids is None:
        caption_ids = (
            (input_ids[:, None] == input_ids).all(dim=-1).int().argmax(dim=1)
        )  # the index of the first equal caption
    same = same_pairs(caption_ids) if image_ids is None else same_pairs(caption_ids, image_ids)
    targets = smooth_targets(same, label_smoothing)
    loss = (soft_contrastive_loss(logits, targets) + soft_contrastive_loss(logits.T, targets)) / 2
    with torch.no_grad():
        uniform = (
            torch.rand(2, len(logits), device=logits.device) if training else logits.new_full((2, len(logits)), 0.5)
        )
        image_negatives, found = draw_hard_negatives(logits.T.float(), same, uniform[0])
        text_negatives, _ = draw_hard_negatives(logits.float(), same, uniform[1])
    return loss, (image_negatives, text_negatives), found


def three_losses(loss_itc: Tensor, itm_logits: Tensor, found: Tensor, loss_lm: Tensor) -> dict[str, Tensor]:
    """The losses and the ITM logits, as fields of `VlpBlipPreTrainingOutput`.

    Args:
        loss_itc: the ITC loss.
        itm_logits: (3 B, 2), see `MatchesPairs.itm_logits`.
        found: (B,) bool, True if a row has a negative.
        loss_lm: the language modelling loss.
    """
    loss_itm = matching_loss(itm_logits.float(), *matching_labels(len(found), found, found))
    return {
        "loss": loss_itc + loss_itm + loss_lm,
        "loss_itc": loss_itc,
        "loss_itm": loss_itm,
        "loss_lm": loss_lm,
        "itm_logits": itm_logits[: len(found)],
    }


def matching_labels(pairs: int, image_found: Tensor, text_found: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the labels of `itm_logits`, and a mask of the rows that count in the loss.

    Args:
        pairs: B, the number of pairs.
        image_found: (K B,) bool, True if a negative image was found for the text.
        text_found: (K B,) bool, True if a negative text was found for the image.

    Returns:
        ((1 + 2 K) B,) bool, True for matching rows; and the same, False for rows whose negative was not found.
    """
    counted = torch.cat([image_found.new_ones(pairs), image_found, text_found])
    return torch.arange(len(counted), device=counted.device) < pairs, counted


class VlpBlipForImageTextRetrieval(VlpBlipMatcher):
    """BLIP for image-text retrieval: ITC and ITM scores."""

    loads = ("VlpBlipForPreTraining",)
    _keys_to_ignore_on_load_unexpected = [r"decoder_attention\.", r"^lm_head\."]

    def __init__(self, config: VlpBlipConfig):
        super().__init__(config, decoder=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> VlpBlipRetrievalOutput:
        """Compare every image with every text by ITC, and match each text with its image by ITM.

        Args:
            input_ids: (T, N) texts that begin with [CLS], T a multiple of B. The first T / B are matched with the first
                image, and so on; if T = B, text i is matched with image i.
            pixel_values: (B, C, S, S).
            attention_mask: (T, N), 0 for padding; if None, derived from the padding token.
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            output_hidden_states, output_attentions: also return these; if None, as the configuration says.
            kwargs: ignored.

        Returns:
            The scores and embeddings.
        """
        flags = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        vision = self.get_image_features(pixel_values, interpolate_pos_encoding, return_dict=True, **flags)
        words = self.get_text_features(input_ids, attention_mask, pooled_only=True, return_dict=True, **flags)
        image_embeds, text_embeds = F.normalize(vision.pooler_output, dim=-1), F.normalize(words.pooler_output, dim=-1)
        logits = image_embeds @ text_embeds.T / self.temp  # (B, T)
        itm_logits = self.match(input_ids, attention_mask, self.text_model.memory_of(vision.last_hidden_state))
        return compared(VlpBlipRetrievalOutput, logits, image_embeds, text_embeds, vision, words, itm_logits=itm_logits)
