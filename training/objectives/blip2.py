"""The objectives of BLIP-2: stage 1 (compare, match and write by the Q-Former), stage 2 (write by a language model)."""

import torch
from torch import Tensor
from transformers import DynamicCache

from ...modeling_vlp.blip import matching_labels
from ...modeling_vlp.blip2 import VlpBlip2ForPreTraining, VlpBlip2PreTrainedModel, best_query
from ...modeling_vlp.blip2_writer import VlpBlip2ForConditionalGeneration
from ...modeling_vlp.losses import (
    draw_hard_negatives,
    matching_loss,
    same_pairs,
    smooth_targets,
    soft_contrastive_loss,
    unit_length,
)
from ...modeling_vlp.med import Memory
from ..machine.sharding import number
from .base import Objective
from .distributed import JoinedBatch, weigh_by_count


def vision_states(model: VlpBlip2PreTrainedModel, images: Tensor) -> Tensor:
    """What the image tower gives for images (B, C, S, S); what it gave before, (B, M, D), as it is."""
    return images if images.ndim == 3 else model.see(images)


class Blip2Objective(Objective):
    """BLIP-2's stage 1 (section 3.2 of the paper; LAVIS, blip2_qformer.py).

    Negatives are those of all processes' joined batch, for ITC with the gradient of both sides (LAVIS gathers without);
    pairs that share a caption or an image belong together.

    Args:
        exclude_duplicates: pairs that share a caption or an image belong together: no negatives to each other.
        label_smoothing: of ITC's targets: 0.1 in LAVIS, not in the paper.
        contrastive_share: share of the run (0 to 1), at its start, that compares alone: the paper begins with BERT.
        seed: of the draws, which depend on it and on the step alone.
    """

    def __init__(
        self, model: VlpBlip2ForPreTraining, exclude_duplicates: bool = True, label_smoothing: float = 0.1,
        contrastive_share: float = 0.0, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.model = model
        self.exclude_duplicates, self.label_smoothing, self.seed = exclude_duplicates, label_smoothing, seed
        self.contrastive_share, self.contrastive_alone = contrastive_share, False
        self.draws = torch.Generator()

    def before_step(self, step: int, share_done: float = 1.0) -> None:
        """Keep the temperature in its bounds, and let the draws be this step's."""
        self.contrastive_alone = share_done < self.contrastive_share
        self.model.clamp_temperature()
        self.draws.manual_seed(self.seed * 1_000_003 + step)

    def facts(self) -> dict[str, float]:
        """What is worth logging beside the losses."""
        return {"temperature": number(self.model.temp.detach())}

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        text_index: Tensor,
        caption_ids: Tensor,
        image_ids: Tensor,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The three losses of a batch; ITC alone where the run is not past `contrastive_share`.

        Args: as `ClipObjective`; pixel_values may be the image tower's states (B, M, D);
            negatives: (B,) numbers, in the joined batch, of each text's negative image and of each image's negative
                text; drawn where not given.
        """
        model, cache = self.model, DynamicCache()
        states = vision_states(model, pixel_values)
        memory = model.read(states)
        queries = model.query(memory, past_key_values=cache).last_hidden_state
        image = unit_length(model.vision_proj(queries))
        text = unit_length(model.get_text_features(input_ids).pooler_output)[text_index]
        batch = JoinedBatch.of(text_index)
        with torch.autocast(image.device.type, enabled=False):
            image_logits, text_logits, same, loss_itc = self.compare(batch, image, text, caption_ids, image_ids)
        if self.contrastive_alone:
            return {"itc": loss_itc}
        input_ids = input_ids[text_index]
        found = torch.ones_like(caption_ids, dtype=torch.bool), torch.ones_like(caption_ids, dtype=torch.bool)
        if negatives is None:
            uniform = batch.own(torch.rand(batch.size, 2, generator=self.draws).to(same.device))
            image_negatives, image_found = draw_hard_negatives(text_logits.detach(), same, uniform[:, 0])
            text_negatives, text_found = draw_hard_negatives(image_logits.detach(), same, uniform[:, 1])
            negatives, found = (image_negatives, text_negatives), (image_found, text_found)
        itm_logits = self.match(batch, input_ids, states, memory, *negatives)
        matches, counted = matching_labels(*found)
        with torch.autocast(image.device.type, enabled=False):
            loss_itm = weigh_by_count(matching_loss(itm_logits.float(), matches, counted), counted.sum())
        tokens = (input_ids[:, 1:] != model.config.qformer_config.pad_token_id).sum()
        return {"itc": loss_itc, "itm": loss_itm, "itg": weigh_by_count(model.lm_loss(input_ids, cache), tokens)}

    def compare(self, batch: JoinedBatch, image: Tensor, text: Tensor, caption_ids: Tensor, image_ids: Tensor):
        """ITC: similarities (B, joined batch) over the temperature, which of those pairs are the same, and the loss.

        Args:
            image: (B, Q, E) and text: (B, E), of unit length.
        """
        all_images, all_texts = batch.gather(image), batch.gather(text)
        temperature = self.model.temp.float()
        image_logits = best_query(image, all_texts) / temperature
        text_logits = best_query(all_images, text).T / temperature
        same = torch.eye(batch.size, dtype=torch.bool, device=image.device)
        if self.exclude_duplicates:
            same = same_pairs(batch.gather(caption_ids), batch.gather(image_ids))
        same = batch.own(same)
        targets = smooth_targets(same, self.label_smoothing)
        loss = (soft_contrastive_loss(image_logits, targets) + soft_contrastive_loss(text_logits, targets)) / 2
        return image_logits, text_logits, same, batch.weigh(loss)

    def match(
        self, batch: JoinedBatch, input_ids, states, memory: Memory, image_negatives: Tensor, text_negatives: Tensor
    ) -> Tensor:
        """ITM logits (3 B, 2); keys and values of this process' images are computed once, those of others' here."""
        model = self.model
        if len(batch.counts) == 1:
            return model.itm_logits(
                input_ids, model.padding_mask(input_ids), memory, image_negatives, text_negatives
            )  # fmt: skip
        others = model.read(batch.gather(states)[image_negatives])
        texts = batch.gather_texts(input_ids, model.config.qformer_config.pad_token_id)
        own = batch.own(texts)
        return model.match(torch.cat([own, own, texts[text_negatives]]), None, Memory.join([memory, others, memory]))


class LanguageObjective(Objective):
    """BLIP-2's stage 2: a frozen language model writes about images (section 3.3; LAVIS, blip2_opt.py, blip2_t5.py).

    Args:
        prompt: token ids that texts begin with and that are not to be learnt; a sequence-to-sequence model reads them,
            and its texts do not begin with them.
    """

    def __init__(self, model: VlpBlip2ForConditionalGeneration, prompt: list[int], end_token_id: int):
        super().__init__()
        self.model, self.prompt, self.end_token_id = model, prompt, end_token_id
        # States to resume from need not hold what never changes, and is large.
        self.register_state_dict_post_hook(leave_language_model_out)
        self.register_load_state_dict_pre_hook(put_language_model_in)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor
    ) -> dict[str, Tensor]:
        """The loss of a batch. Args: as `Blip2Objective`; texts end with the end token, padded on the right."""
        input_ids = input_ids[text_index]
        real = self.until_the_end(input_ids)
        labels = input_ids.masked_fill(~real, -100)
        states = vision_states(self.model, pixel_values)
        if self.model.language_model.config.is_encoder_decoder:
            prompt = torch.tensor(self.prompt, device=input_ids.device).expand(len(input_ids), -1)
            output = self.model(prompt if self.prompt else None, vision_states=states, labels=labels)
        else:
            labels[:, : len(self.prompt)] = -100
            output = self.model(input_ids, attention_mask=real.long(), vision_states=states, labels=labels)
        return {"lm": weigh_by_count(output.loss, (labels != -100).sum())}

    def until_the_end(self, input_ids: Tensor) -> Tensor:
        """(B, N) bool: tokens up to the first end token, and it. Padding may be the same token."""
        ends = (input_ids == self.end_token_id).long().cumsum(dim=1)
        return (ends == 0) | ((ends == 1) & (input_ids == self.end_token_id))


def leave_language_model_out(objective: LanguageObjective, state: dict, prefix: str, metadata) -> None:
    """Take the frozen weights of the language model out of a state dict; adapters on it stay."""
    for name in [name for name in state if name.startswith(f"{prefix}model.language_model.") and "lora_" not in name]:
        del state[name]


def put_language_model_in(objective: LanguageObjective, state: dict, prefix: str, *others) -> None:
    """Let a state dict that is loaded have them again, as they are."""
    for name, value in objective.model.language_model.state_dict().items():
        state.setdefault(f"{prefix}model.language_model.{name}", value)
