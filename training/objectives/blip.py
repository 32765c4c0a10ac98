"""BLIP's pre-training objective: ITC, ITM and LM."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...modeling_vlp.blip import VlpBlipMatcher, matching_labels
from ...modeling_vlp.losses import draw_hard_negatives, matching_loss, soft_contrastive_loss, soft_targets, unit_length
from ...modeling_vlp.med import Memory
from ..machine.sharding import gathered, number
from .base import Objective
from .contrastive import contrastive_loss
from .distributed import JoinedBatch, weigh_by_count
from .momentum import Teacher


class BlipObjective(Objective):
    """BLIP's pre-training with ITC, ITM and LM (section 3.2 of the paper; salesforce/BLIP, blip_pretrain.py).

    A model without a decoder is fine-tuned for retrieval with ITC and ITM only (blip_retrieval.py).

    As in the paper, ITC compares the student's features with the teacher's features of the batch and the queue. The
    differences from the original code: the batch is that of all processes; empty queue entries are masked; the teacher
    is in evaluation mode and is updated once per optimiser step; pairs that share a caption or an image are not
    negatives.

    Args:
        model: the student.
        teacher: the momentum teacher.
        alpha: weight of the teacher's similarities in the ITC targets (0 to 1).
        alpha_steps: optimiser steps in which alpha grows linearly from 0; 0: it is constant.
        exclude_duplicates: treat pairs that share a caption or an image as positives, not as negatives.
        global_negatives: draw ITM's hard negatives from the batches of all processes, not only from the own batch.
        contrastive_share: share of the run (0 to 1), at its start, that trains with ITC only, within the batch, as CLIP
            does. The paper starts from pre-trained towers; ITM and LM are of little use before the towers have learnt
            anything.
        itm_negatives: K, the number of hard negatives of ITM for each text, and for each image; 1 in the paper.
        seed: seed of the hard negatives, which depend only on the seed and the step.
        micro_batch_size: see `Objective`; ITM counts each pair and each negative as a row.

    If the teacher's queue keeps texts, ITM's negative texts are drawn from the batch and the queue: they are harder
    than those of the batch alone.
    """

    def __init__(
        self, model: VlpBlipMatcher, teacher: Teacher, alpha: float = 0.4, alpha_steps: int = 0,
        exclude_duplicates: bool = True, global_negatives: bool = False, contrastive_share: float = 0.0,
        itm_negatives: int = 1, seed: int = 0, micro_batch_size: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.micro_batch_size = micro_batch_size
        self.model, self.teacher, self.itm_negatives = model, teacher, itm_negatives
        self.alpha, self.alpha_steps = alpha, alpha_steps
        self.contrastive_share, self.contrastive_only = contrastive_share, False
        self.has_decoder = hasattr(model, "lm_head")
        self.exclude_duplicates, self.global_negatives, self.seed = exclude_duplicates, global_negatives, seed
        self.register_buffer("alpha_now", torch.zeros(()), persistent=False)
        self.draws = torch.Generator()
        self.pending: list[tuple[Tensor, ...]] = []

    def before_step(self, step: int, share_done: float = 1.0) -> None:
        """Update the teacher and alpha, and seed the draws. Called once per optimiser step, not per batch."""
        self.contrastive_only = share_done < self.contrastive_share
        with gathered([self.model.temp], changed=True):
            self.model.clamp_temperature()
        self.teacher.follow(self.model)
        self.alpha_now.fill_(self.alpha * min(1.0, step / self.alpha_steps if self.alpha_steps else 1.0))
        self.draws.manual_seed(self.seed * 1_000_003 + step)
        self.pending.clear()

    def after_step(self) -> None:
        """Put the teacher's features of this step into the queue."""
        for features in self.pending:
            self.teacher.enqueue(*features)
        self.pending.clear()

    def facts(self) -> dict[str, float]:
        """Values to log in addition to the losses."""
        return {"temperature": number(self.model.temp), "alpha": self.alpha_now.item()}

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        text_index: Tensor,
        caption_ids: Tensor,
        image_ids: Tensor,
        negatives: tuple[Tensor, Tensor] | None = None,
        image_states: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            pixel_values, input_ids, text_index, caption_ids, image_ids: as in `ClipObjective.forward`.
            negatives: the negative images of each text and the negative texts of each image, (K B,) each, as indices
                into the joined batch (see `MatchesPairs.itm_logits`); drawn if None.
            image_states: (B, M, D), cached states of the image tower, which is locked; `pixel_values` are then its
                cached pooled outputs, (B, P).

        Returns:
            {"itc", "itm", "lm"}, without "lm" if the model has no decoder; only "itc" during the first
            `contrastive_share` of the run.
        """
        model, most = self.model, len(text_index)
        cached = image_states is not None
        if cached:
            pooled = model.vision_proj(pixel_values)
        elif self.contrastive_only:
            pooled = self.in_parts(self.embed_images, pixel_values, most=most)
        else:
            pooled, image_states = self.in_parts(self.encode_images, pixel_values, most=most)
        image = unit_length(pooled)
        text = unit_length(self.in_parts(self.embed_texts, input_ids, most=most))[text_index]
        batch = JoinedBatch.of(text_index, self.even_batches)
        if self.contrastive_only:  # without teacher and queue, which lag behind a student that learns fast
            ids = (caption_ids, image_ids) if self.exclude_duplicates else ()
            with torch.autocast(image.device.type, enabled=False):
                return {"itc": contrastive_loss(image, text, 1 / model.temp.to(image.dtype), batch, ids)}
        input_ids = input_ids[text_index]
        with torch.autocast(image.device.type, enabled=False):
            taught = self.in_parts(lambda *rows: self.teacher(*rows, cached), pixel_values, input_ids, most=most)
            image_logits, text_logits, same, loss_itc = self.compare(
                batch, image, text, *taught, caption_ids, image_ids
            )
        with torch.no_grad():
            found = tuple(torch.ones_like(drawn, dtype=torch.bool) for drawn in negatives or ())
            if negatives is None:
                if not self.has_decoder:  # blip_retrieval.py draws by the student's similarities only
                    image_logits[:, : batch.size] = image @ batch.gather(text).T / model.temp
                    text_logits[:, : batch.size] = text @ batch.gather(image).T / model.temp
                negatives, found = self.draw(batch, image_logits, text_logits, same)
        if self.micro_batch_size is None:
            memory = model.text_model.memory_of(image_states)
            itm_logits = self.match(batch, input_ids, image_states, memory, *negatives)
        else:
            itm_logits = self.match_in_parts(batch, input_ids, image_states, *negatives)
        matches, counted = matching_labels(len(input_ids), *found)
        with torch.autocast(image.device.type, enabled=False):
            loss_itm = weigh_by_count(matching_loss(itm_logits.float(), matches, counted), counted.sum())
        losses = {"itc": loss_itc, "itm": loss_itm}
        if self.has_decoder:
            tokens = self.count_tokens(input_ids)
            if self.micro_batch_size is None:
                loss_lm = model.lm_loss(input_ids, memory)
            else:
                loss_lm = self.in_parts(self.sum_lm, input_ids, image_states, most=most).sum() / tokens
            losses["lm"] = weigh_by_count(loss_lm, tokens)
        return losses

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Embed images (B, C, S, S) as (B, E), not normalised."""
        return self.model.get_image_features(pixel_values, pooled_only=True).pooler_output

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings (B, E) of images (B, C, S, S), not normalised, and their states (B, M, D)."""
        vision = self.model.get_image_features(pixel_values)
        return vision.pooler_output, vision.last_hidden_state

    def embed_texts(self, input_ids: Tensor) -> Tensor:
        """Embed texts (T, N) as (T, E), not normalised."""
        return self.model.get_text_features(input_ids, pooled_only=True).pooler_output

    def count_tokens(self, input_ids: Tensor) -> Tensor:
        """The number of tokens of texts (T, N) that the decoder predicts."""
        return (input_ids[:, 1:] != self.model.config.text_config.pad_token_id).sum()

    def sum_lm(self, input_ids: Tensor, states: Tensor) -> Tensor:
        """The sum (1,) of the language modelling loss over the tokens of texts (B, N) about images (B, M, D)."""
        loss = self.model.lm_loss(input_ids, self.model.text_model.memory_of(states))
        return (loss * self.count_tokens(input_ids))[None]

    def compare(self, batch: JoinedBatch, image, text, teacher_image, teacher_text, caption_ids, image_ids):
        """Compute ITC.

        Args:
            batch: the joined batch.
            image, text: (B, E) features of the student, of unit length.
            teacher_image, teacher_text: (B, E) features of the teacher, of unit length.
            caption_ids, image_ids: (B,) integers.

        Returns:
            The similarities of images to texts and of texts to images, divided by the temperature, without gradient;
            whether the pairs are positives (all three (B, K): the joined batch, then the queue); and the loss.
        """
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
        empty = teacher.empty
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
        return image_logits.detach(), text_logits.detach(), positives, batch.weigh(loss)

    def draw(self, batch: JoinedBatch, image_logits: Tensor, text_logits: Tensor, same: Tensor) -> tuple:
        """Draw hard negatives.

        Args:
            batch: the joined batch.
            image_logits, text_logits: (B, N) similarities over the temperature, of the joined batch, then the queue.
            same: bool of the same shape, True for positives.

        Returns:
            (negative images of each text, negative texts of each image), indices (K B,) into the joined batch, and of
            texts into the queue after it, if it keeps texts; and whether there was one to draw, bool (K B,) each.
        """
        size, teacher = batch.size, self.teacher
        uniform = batch.own(torch.rand(size, 2 * self.itm_negatives, generator=self.draws).to(same.device)).T
        excluded = same[:, :size]
        if not self.global_negatives:
            excluded = torch.ones_like(same[:, :size])
            excluded[:, batch.first :][:, : len(same)] = batch.own(same[:, :size].T).T
        of_images, of_texts = uniform.chunk(2)  # (K, B) each
        image_negatives, image_found = draw_hard_negatives(text_logits[:, :size], excluded, of_images)
        if teacher.texts is not None:
            excluded = torch.cat([excluded, same[:, size:] | teacher.empty], dim=1)
        text_negatives, text_found = draw_hard_negatives(image_logits[:, : excluded.shape[1]], excluded, of_texts)
        found = image_found.flatten(), text_found.flatten()
        # Where none is found, a row of this process takes the place, which does not count.
        drawn = image_negatives.flatten(), text_negatives.flatten()
        return tuple(torch.where(*each, batch.first) for each in zip(found, drawn, strict=True)), found

    def as_queued(self, input_ids: Tensor) -> Tensor:
        """Texts (T, N), padded to the length of those in the queue, or cut to it."""
        length, padding = self.teacher.texts.shape[1], self.model.config.text_config.pad_token_id
        return F.pad(input_ids[:, :length], (0, max(0, length - input_ids.shape[1])), value=padding)

    def match(self, batch: JoinedBatch, input_ids, states, memory, image_negatives, text_negatives) -> Tensor:
        """ITM logits ((1 + 2 K) B, 2) of the pairs, of the negative images and of the negative texts.

        The keys and values of this process's images are reused; those of other processes' images are computed here.
        If the queue keeps texts, those of the joined batch are set aside for it.

        Args:
            batch: the joined batch.
            input_ids: (B, N).
            states: (B, M, D), the image tower's states.
            memory: keys and values of this process's images.
            image_negatives: (K B,) index in the joined batch of each text's negative images.
            text_negatives: (K B,) index in the joined batch, or in the queue after it, of each image's negative texts.
        """
        model, queued = self.model, self.teacher.texts
        local = len(batch.counts) == 1 or not self.global_negatives
        if local and queued is None:
            negatives = image_negatives - batch.first, text_negatives - batch.first
            return model.itm_logits(input_ids, model.padding_mask(input_ids), memory, *negatives)
        if local:
            others = memory.select(image_negatives - batch.first)
        else:
            others = model.text_model.memory_of(batch.gather(states)[image_negatives])
        texts = self.joined_texts(batch, input_ids)
        own, count = batch.own(texts[: batch.size]), len(image_negatives) // len(input_ids)
        images = Memory.join([memory, others, *[memory] * count])
        return model.match(torch.cat([own, own.repeat(count, 1), texts[text_negatives]]), None, images)

    def joined_texts(self, batch: JoinedBatch, input_ids: Tensor) -> Tensor:
        """The texts of the joined batch, then those of the queue, if it keeps texts; the first are set aside for it."""
        texts = batch.gather_texts(input_ids, self.model.config.text_config.pad_token_id)
        if self.teacher.texts is None:
            return texts
        texts = self.as_queued(texts)
        self.pending[-1] += (texts,)  # they enter the queue after the step
        return torch.cat([texts, self.teacher.texts])

    def match_in_parts(self, batch: JoinedBatch, input_ids, states, image_negatives, text_negatives) -> Tensor:
        """The same as `match`, in micro batches, each of which computes the keys and values of its images."""
        model, texts = self.model, self.joined_texts(batch, input_ids)
        local = len(batch.counts) == 1 or not self.global_negatives
        images, first = (states, 0) if local else (batch.gather(states), batch.first)
        if local:
            image_negatives = image_negatives - batch.first
        own = torch.arange(len(input_ids), device=input_ids.device)
        again = own.repeat(len(image_negatives) // len(own))
        of_texts = torch.cat([batch.first + own, batch.first + again, text_negatives])
        of_images = torch.cat([first + own, image_negatives, first + again])

        def match(text: Tensor, image: Tensor) -> Tensor:
            return model.match(texts[text], None, model.text_model.memory_of(images[image]))

        return self.in_parts(match, of_texts, of_images, most=len(of_texts))
