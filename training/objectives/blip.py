"""BLIP's pre-training objective: ITC, ITM and LM."""

import torch
from torch import Tensor

from ...modeling_vlp.blip import VlpBlipMatcher, matching_labels
from ...modeling_vlp.losses import draw_hard_negatives, matching_loss, soft_contrastive_loss, soft_targets, unit_length
from ...modeling_vlp.med import Memory
from ..machine.sharding import number
from .base import Objective
from .contrastive import contrastive_loss
from .distributed import JoinedBatch, weigh_by_count
from .momentum import Teacher


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
        return {"temperature": number(self.model.temp.detach()), "alpha": self.alpha_now.item()}

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
        image = unit_length(vision.pooler_output)
        text = unit_length(model.get_text_features(input_ids, pooled_only=True).pooler_output)[text_index]
        batch = JoinedBatch.of(text_index)
        if self.contrastive_alone:  # without teacher and queue, which follow a student that learns fast badly
            ids = (caption_ids, image_ids) if self.exclude_duplicates else ()
            with torch.autocast(image.device.type, enabled=False):
                return {"itc": contrastive_loss(image, text, 1 / model.temp.to(image.dtype), batch, ids)}
        input_ids = input_ids[text_index]
        with torch.autocast(image.device.type, enabled=False):
            image_logits, text_logits, same, loss_itc = self.compare(
                batch, image, text, *self.teacher(pixel_values, input_ids), caption_ids, image_ids
            )
        with torch.no_grad():
            found = torch.ones_like(caption_ids, dtype=torch.bool), torch.ones_like(caption_ids, dtype=torch.bool)
            if negatives is None:
                if not self.writes:  # blip_retrieval.py draws by what the student alone finds similar
                    image_logits = image @ batch.gather(text).T / model.temp
                    text_logits = text @ batch.gather(image).T / model.temp
                negatives, found = self.draw(batch, image_logits, text_logits, same)
        memory = model.text_model.read(vision.last_hidden_state)
        itm_logits = self.match(batch, input_ids, vision.last_hidden_state, memory, *negatives)
        matches, counted = matching_labels(*found)
        with torch.autocast(image.device.type, enabled=False):
            loss_itm = weigh_by_count(matching_loss(itm_logits.float(), matches, counted), counted.sum())
        losses = {"itc": loss_itc, "itm": loss_itm}
        if self.writes:
            tokens = (input_ids[:, 1:] != model.config.text_config.pad_token_id).sum()
            losses["lm"] = weigh_by_count(model.lm_loss(input_ids, memory), tokens)
        return losses

    def compare(self, batch: JoinedBatch, image, text, teacher_image, teacher_text, caption_ids, image_ids):
        """ITC: similarities (B, joined batch) over the temperature, which of those pairs are the same, and the loss."""
        teacher, temperature = self.teacher, self.model.temp.float()
        joined = [batch.gather(x) for x in (teacher_image, teacher_text, image_ids, caption_ids)]
        self.pending.append(tuple(joined))
        all_images, all_texts = torch.cat([joined[0], teacher.image_queue]), torch.cat([joined[1], teacher.text_queue])
        size = batch.size
        positives = torch.zeros(size, len(all_images), dtype=torch.bool, device=image.device)
        if self.exclude_duplicates:
            for ids, queue in ((joined[2], teacher.image_ids), (joined[3], teacher.caption_ids)):
                positives |= ids[:, None] == torch.cat([ids, queue])
        positives[:, :size].fill_diagonal_(True)
        empty = torch.arange(teacher.queue_size, device=image.device) >= teacher.filled  # places yet without a pair
        positives[:, size:] &= ~empty
        positives = batch.own(positives)
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
        return image_logits[:, :size].detach(), text_logits[:, :size].detach(), positives[:, :size], batch.weigh(loss)

    def draw(self, batch: JoinedBatch, image_logits: Tensor, text_logits: Tensor, same: Tensor) -> tuple:
        """A hard negative image for each text, a hard negative text for each image, and whether there was one."""
        uniform = batch.own(torch.rand(batch.size, 2, generator=self.draws).to(same.device))
        excluded = same
        if not self.global_negatives:
            excluded = torch.ones_like(same)
            excluded[:, batch.first :][:, : len(same)] = batch.own(same.T).T
        image_negatives, image_found = draw_hard_negatives(text_logits, excluded, uniform[:, 0])
        text_negatives, text_found = draw_hard_negatives(image_logits, excluded, uniform[:, 1])
        return (image_negatives, text_negatives), (image_found, text_found)

    def match(self, batch: JoinedBatch, input_ids, states, memory, image_negatives, text_negatives) -> Tensor:
        """ITM logits (3 B, 2); keys and values of this process' images are computed once, those of others' here."""
        model = self.model
        if len(batch.counts) == 1 or not self.global_negatives:
            negatives = image_negatives - batch.first, text_negatives - batch.first
            return model.itm_logits(input_ids, model.padding_mask(input_ids), memory, *negatives)
        others = model.text_model.read(batch.gather(states)[image_negatives])
        texts = batch.gather_texts(input_ids, model.config.text_config.pad_token_id)
        own = batch.own(texts)
        return model.match(torch.cat([own, own, texts[text_negatives]]), None, Memory.join([memory, others, memory]))
