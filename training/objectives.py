"""One nn.Module for each objective: a batch in, named losses out. This is what Accelerate wraps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling_vlp.blip import VlpBlipMatcher, matching_labels
from ..modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from ..modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering, VlpBlipForVisualReasoning
from ..modeling_vlp.clip import VlpClipModel
from ..modeling_vlp.losses import (
    clip_loss,
    draw_hard_negatives,
    matching_loss,
    same_pairs,
    siglip_loss,
    soft_contrastive_loss,
    soft_targets,
)
from ..modeling_vlp.med import Memory
from .distributed import gather_padded, gather_with_gradient, own_rows, processes, weigh_by_count
from .momentum import Teacher


class Objective(nn.Module):
    """What the loop calls around the steps; by itself it does nothing."""

    def before_step(self, step: int, share_done: float = 1.0) -> None:
        """Called before the first backward pass of an optimiser step, `share_done` of the run (0 to 1) behind it."""

    def after_step(self) -> None:
        """Called after an optimiser step."""

    def facts(self) -> dict[str, float]:
        """What is worth logging beside the losses."""
        return {}


def same_in_joined_batch(caption_ids: Tensor, image_ids: Tensor) -> Tensor:
    """(B, B) which pairs of the batch of all processes share a caption or an image."""
    return same_pairs(gather_with_gradient(caption_ids), gather_with_gradient(image_ids))


class ClipObjective(Objective):
    """Tell the pairs of the joined batch of all processes apart.

    A ResNet's batch statistics are those of each process' own images; all else is as if one process had all of it.

    Args:
        exclude_duplicates: rows that share a caption or an image are not each other's negatives.
        lock_image_tower, lock_text_tower: leave a tower and its projection as they are (LiT, arXiv:2111.07991), its
            batch norm and dropout in evaluation mode.
    """

    def __init__(
        self,
        model: VlpClipModel,
        exclude_duplicates: bool = True,
        lock_image_tower: bool = False,
        lock_text_tower: bool = False,
    ):
        super().__init__()
        self.model = model
        self.exclude_duplicates = exclude_duplicates
        locked = (["vision_model", "visual_projection"] if lock_image_tower else []) + (
            ["text_model", "text_projection"] if lock_text_tower else []
        )
        self.locked = [getattr(model, name).requires_grad_(False) for name in locked]

    def train(self, mode: bool = True) -> "ClipObjective":
        super().train(mode)
        for module in self.locked:
            module.eval()
        return self

    def after_step(self) -> None:
        """Called after an optimiser step."""
        self.model.clamp_logit_scale()

    def facts(self) -> dict[str, float]:
        """What is worth logging beside the losses."""
        return {"logit_scale": self.model.logit_scale.exp().item()}

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            pixel_values: (B, C, S, S).
            input_ids: (T, N), the different texts; text_index: (B,), which of them belongs to each image.
            caption_ids, image_ids: (B,) integers that are equal where captions or images are.
        """
        image = self.model.get_image_features(pixel_values, pooled_only=True).pooler_output
        text = self.model.get_text_features(input_ids, pooled_only=True).pooler_output[text_index]
        with torch.autocast(image.device.type, enabled=False):  # the loss is computed in float32
            image, text = (gather_with_gradient(F.normalize(x.float(), dim=-1)) for x in (image, text))
            not_negative = same_in_joined_batch(caption_ids, image_ids) if self.exclude_duplicates else None
            scale = self.model.logit_scale.float().exp()
            if self.model.logit_bias is not None:
                return {"sigmoid": siglip_loss(image, text, scale, self.model.logit_bias.float(), not_negative)}
            return {"contrastive": clip_loss(image, text, scale, not_negative)}


class CaptioningObjective(Objective):
    """Write the captions of images (salesforce/BLIP, models/blip.py, BLIP_Decoder).

    Args:
        prompt_length: tokens, [DEC] included, that captions begin with and that are not to be learnt.
    """

    def __init__(self, model: VlpBlipForConditionalGeneration, prompt_length: int = 1):
        super().__init__()
        self.model, self.prompt_length = model, prompt_length

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor
    ) -> dict[str, Tensor]:
        """The loss of a batch. Args: as `ClipObjective`."""
        input_ids = input_ids[text_index]
        labels = input_ids.masked_fill(input_ids == self.model.config.text_config.pad_token_id, -100)
        labels[:, : self.prompt_length] = -100
        loss = self.model.lm_loss(input_ids, self.model.read_image(pixel_values), labels)
        return {"lm": weigh_by_count(loss, (labels[:, 1:] != -100).sum())}


class AnsweringObjective(Objective):
    """Answer questions about images (salesforce/BLIP, models/blip_vqa.py)."""

    def __init__(self, model: VlpBlipForQuestionAnswering):
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor,
        answer_ids: Tensor, answer_index: Tensor, answer_weights: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The loss of a batch. Args: as `ClipObjective` and `VlpBlipForQuestionAnswering.forward`."""
        output = self.model(
            input_ids[text_index], pixel_values, labels=answer_ids, answer_index=answer_index,
            answer_weights=answer_weights,
        )  # fmt: skip
        return {"answer": output.loss}


class ReasoningObjective(Objective):
    """Tell whether sentences are true of two images (salesforce/BLIP, models/blip_nlvr.py)."""

    def __init__(self, model: VlpBlipForVisualReasoning):
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The loss of a batch. Args: as `ClipObjective`, of (2 B, C, S, S) images, left and right in turn."""
        return {"nlvr": self.model(input_ids[text_index], pixel_values.unflatten(0, (-1, 2)), labels=labels).loss}


class BlipObjective(Objective):
    """BLIP's pre-training: compare, match and write (section 3.2 of the paper; salesforce/BLIP, blip_pretrain.py).

    A model that does not write is fine-tuned for retrieval: it is told to compare and to match (blip_retrieval.py).

    As in the paper the student's features are compared with the teacher's, of the batch and of the queue. Otherwise
    than in the original code the batch is that of all processes; the queue is masked while it fills; the teacher is in
    evaluation mode, and follows once for each optimiser step; pairs that share a caption or an image are no negatives.

    Args:
        alpha: the teacher's part in ITC's targets, reached after `alpha_steps` optimiser steps.
        exclude_duplicates: pairs that share a caption or an image belong together: no negatives to each other.
        global_negatives: draw ITM's hard negatives from the batches of all processes, not of each one.
        contrastive_share: share of the run (0 to 1), at its start, that compares alone, within the batch, as CLIP does:
            the paper begins with towers that can see and read, and what cannot yet has nothing to match and to write.
        seed: of the draws, which depend on it and on the step alone.
    """

    def __init__(
        self, model: VlpBlipMatcher, teacher: Teacher, alpha: float = 0.4, alpha_steps: int = 0,
        exclude_duplicates: bool = True, global_negatives: bool = False, contrastive_share: float = 0.0, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.model, self.teacher = model, teacher
        self.alpha, self.alpha_steps = alpha, alpha_steps
        self.contrastive_share, self.contrastive_alone = contrastive_share, False
        self.writes = hasattr(model, "lm_head")
        self.exclude_duplicates, self.global_negatives, self.seed = exclude_duplicates, global_negatives, seed
        self.register_buffer("alpha_now", torch.zeros(()), persistent=False)
        self.draws = torch.Generator()
        self.pending: list[tuple[Tensor, ...]] = []

    def before_step(self, step: int, share_done: float = 1.0) -> None:
        """Let the teacher follow, and the targets soften; called once for each optimiser step, not for each batch."""
        self.contrastive_alone = share_done < self.contrastive_share
        self.model.clamp_temperature()
        self.teacher.follow(self.model)
        self.alpha_now.fill_(self.alpha * min(1.0, step / self.alpha_steps if self.alpha_steps else 1.0))
        self.draws.manual_seed(self.seed * 1_000_003 + step)
        self.pending.clear()

    def after_step(self) -> None:
        """Put what the teacher saw into the queue."""
        for features in self.pending:
            self.teacher.enqueue(*features)
        self.pending.clear()

    def facts(self) -> dict[str, float]:
        """What is worth logging beside the losses."""
        return {"temperature": self.model.temp.item(), "alpha": self.alpha_now.item()}

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

        Args: as `ClipObjective`;
            negatives: (B,) numbers, in the joined batch, of each text's negative image and of each image's negative
                text; drawn where not given.
        """
        model = self.model
        vision = model.get_image_features(pixel_values, pooled_only=self.contrastive_alone)
        image = F.normalize(vision.pooler_output.float(), dim=-1)
        text = model.get_text_features(input_ids, pooled_only=True).pooler_output[text_index]
        text = F.normalize(text.float(), dim=-1)
        if self.contrastive_alone:
            with torch.autocast(image.device.type, enabled=False):
                return {"itc": self.compare_within_batch(image, text, caption_ids, image_ids)}
        input_ids = input_ids[text_index]
        with torch.autocast(image.device.type, enabled=False):
            image_logits, text_logits, same, loss_itc = self.compare(
                image, text, *self.teacher(pixel_values, input_ids), caption_ids, image_ids
            )
        with torch.no_grad():
            found = torch.ones_like(caption_ids, dtype=torch.bool), torch.ones_like(caption_ids, dtype=torch.bool)
            if negatives is None:
                if not self.writes:  # blip_retrieval.py draws by what the student alone finds similar
                    image_logits = image @ gather_with_gradient(text).T / model.temp
                    text_logits = text @ gather_with_gradient(image).T / model.temp
                negatives, found = self.draw(image_logits, text_logits, same)
        memory = model.text_model.read(vision.last_hidden_state)
        itm_logits = self.match(input_ids, vision.last_hidden_state, memory, *negatives)
        matches, counted = matching_labels(*found)
        with torch.autocast(image.device.type, enabled=False):
            loss_itm = weigh_by_count(matching_loss(itm_logits.float(), matches, counted), counted.sum())
        losses = {"itc": loss_itc, "itm": loss_itm}
        if self.writes:
            tokens = (input_ids[:, 1:] != model.config.text_config.pad_token_id).sum()
            losses["lm"] = weigh_by_count(model.lm_loss(input_ids, memory), tokens)
        return losses

    def compare_within_batch(self, image, text, caption_ids, image_ids) -> Tensor:
        """CLIP's loss of the joined batch: without teacher and queue, which follow a student that learns fast badly."""
        image, text = gather_with_gradient(image), gather_with_gradient(text)
        not_negative = same_in_joined_batch(caption_ids, image_ids) if self.exclude_duplicates else None
        return clip_loss(image, text, 1 / self.model.temp.float(), not_negative)

    def compare(self, image, text, teacher_image, teacher_text, caption_ids, image_ids):
        """ITC: similarities (B, joined batch) over the temperature, which of those pairs are the same, and the loss."""
        teacher, temperature = self.teacher, self.model.temp.float()
        joined = [gather_with_gradient(x) for x in (teacher_image, teacher_text, image_ids, caption_ids)]
        self.pending.append(tuple(joined))
        all_images, all_texts = torch.cat([joined[0], teacher.image_queue]), torch.cat([joined[1], teacher.text_queue])
        size = len(joined[0])
        positives = torch.zeros(size, len(all_images), dtype=torch.bool, device=image.device)
        if self.exclude_duplicates:
            for ids, queue in ((joined[2], teacher.image_ids), (joined[3], teacher.caption_ids)):
                positives |= ids[:, None] == torch.cat([ids, queue])
        positives[:, :size].fill_diagonal_(True)
        empty = torch.arange(teacher.queue_size, device=image.device) >= teacher.filled  # places yet without a pair
        positives[:, size:] &= ~empty
        positives = own_rows(positives)
        unseen = torch.cat([empty.new_zeros(size), empty])

        def similarities(queries: Tensor, keys: Tensor) -> Tensor:
            return (queries @ keys.T / temperature).masked_fill(unseen, torch.finfo(torch.float32).min)

        image_logits, text_logits = similarities(image, all_texts), similarities(text, all_images)
        with torch.no_grad():
            image_targets = soft_targets(similarities(teacher_image, all_texts), positives, self.alpha_now)
            text_targets = soft_targets(similarities(teacher_text, all_images), positives, self.alpha_now)
        loss = (
            soft_contrastive_loss(image_logits, image_targets) + soft_contrastive_loss(text_logits, text_targets)
        ) / 2
        return image_logits[:, :size].detach(), text_logits[:, :size].detach(), positives[:, :size], loss

    def draw(self, image_logits: Tensor, text_logits: Tensor, same: Tensor) -> tuple:
        """A hard negative image for each text, a hard negative text for each image, and whether there was one."""
        size = same.shape[1]
        uniform = own_rows(torch.rand(size, 2, generator=self.draws).to(same.device))
        excluded = same
        if not self.global_negatives:
            mine = own_rows(torch.arange(size, device=same.device))
            excluded = same | ~torch.isin(torch.arange(size, device=same.device), mine)
        image_negatives, image_found = draw_hard_negatives(text_logits, excluded, uniform[:, 0])
        text_negatives, text_found = draw_hard_negatives(image_logits, excluded, uniform[:, 1])
        return (image_negatives, text_negatives), (image_found, text_found)

    def match(self, input_ids, states, memory, image_negatives, text_negatives) -> Tensor:
        """ITM logits (3 B, 2); keys and values of this process' images are computed once, those of others' here."""
        model = self.model
        if processes() == 1 or not self.global_negatives:
            first = own_rows(torch.arange(len(input_ids) * processes(), device=input_ids.device))[0]
            negatives = image_negatives - first, text_negatives - first
            return model.itm_logits(input_ids, model.padding_mask(input_ids), memory, *negatives)
        others = model.text_model.read(gather_with_gradient(states)[image_negatives])
        texts = gather_padded(input_ids, model.config.text_config.pad_token_id)
        own = own_rows(texts)
        return model.match(torch.cat([own, own, texts[text_negatives]]), None, Memory.join([memory, others, memory]))
