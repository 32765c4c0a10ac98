"""BLIP-2's objectives: stage 1 (ITC, ITM and ITG with the Q-Former), stage 2 (generation by a language model)."""

from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from ...modeling_vlp.blip import matching_labels
from ...modeling_vlp.blip2 import VlpBlip2ForPreTraining, VlpBlip2PreTrainedModel, best_query
from ...modeling_vlp.blip2_generation import VlpBlip2ForConditionalGeneration
from ...modeling_vlp.losses import (
    draw_hard_negatives,
    matching_loss,
    same_pairs,
    smooth_targets,
    soft_contrastive_loss,
    spelling_loss,
    unit_length,
)
from ...modeling_vlp.med import Memory
from ..machine.sharding import gathered, number
from .base import Objective
from .distributed import JoinedBatch, weigh_by_count


def vision_states(model: VlpBlip2PreTrainedModel, images: Tensor) -> Tensor:
    """The image tower's states of images (B, C, S, S). States that are given, (B, M, D), are returned unchanged."""
    return images if images.ndim == 3 else model.encode_image(images)


class Blip2Objective(Objective):
    """BLIP-2's stage 1 (section 3.2 of the paper; LAVIS, blip2_qformer.py).

    Negatives come from the joined batch of all processes. For ITC, the gradient flows into both sides (LAVIS gathers
    without gradient).

    Args:
        model: the model to train.
        exclude_duplicates: treat pairs that share a caption or an image as positives, not as negatives.
        label_smoothing: label smoothing of ITC (0 to 1): 0.1 in LAVIS, not mentioned in the paper.
        contrastive_share: share of the run (0 to 1), at its start, that trains with ITC only. The paper initialises the
            Q-Former from BERT instead.
        seed: seed of the hard negatives, which depend only on the seed and the step.
        micro_batch_size: see `Objective`; ITM counts each pair and each negative as a row.
    """

    def __init__(
        self, model: VlpBlip2ForPreTraining, exclude_duplicates: bool = True, label_smoothing: float = 0.1,
        contrastive_share: float = 0.0, seed: int = 0, micro_batch_size: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.micro_batch_size = micro_batch_size
        self.model = model
        self.exclude_duplicates, self.label_smoothing, self.seed = exclude_duplicates, label_smoothing, seed
        self.contrastive_share, self.contrastive_only = contrastive_share, False
        self.draws = torch.Generator()

    def before_step(self, step: int, share_done: float = 1.0) -> None:
        """Clamp the temperature and seed the draws of this step."""
        self.contrastive_only = share_done < self.contrastive_share
        with gathered([self.model.temp], changed=True):
            self.model.clamp_temperature()
        self.draws.manual_seed(self.seed * 1_000_003 + step)

    def facts(self) -> dict[str, float]:
        """Values to log in addition to the losses."""
        return {"temperature": number(self.model.temp)}

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        text_index: Tensor,
        caption_ids: Tensor,
        image_ids: Tensor,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            pixel_values: images (B, C, S, S), or the states (B, M, D) of the image tower.
            input_ids, text_index, caption_ids, image_ids: as in `ClipObjective.forward`.
            negatives: the negative image of each text and the negative text of each image, (B,) each, as indices into
                the joined batch; drawn if None.

        Returns:
            {"itc", "itm", "itg"}; only "itc" during the first `contrastive_share` of the run.
        """
        model, most, in_parts = self.model, len(text_index), self.micro_batch_size is not None
        states = self.in_parts(partial(vision_states, self.model), pixel_values, most=most)
        if in_parts:
            image = self.in_parts(lambda rows: self.embed_queries(rows)[0], states, most=most)
        else:
            image, memory, cache = self.embed_queries(states)
        text = unit_length(self.in_parts(self.embed_texts, input_ids, most=most))[text_index]
        batch = JoinedBatch.of(text_index, self.even_batches)
        with torch.autocast(image.device.type, enabled=False):
            image_logits, text_logits, same, loss_itc = self.compare(batch, image, text, caption_ids, image_ids)
        if self.contrastive_only:
            return {"itc": loss_itc}
        input_ids = input_ids[text_index]
        found = torch.ones_like(caption_ids, dtype=torch.bool), torch.ones_like(caption_ids, dtype=torch.bool)
        if negatives is None:
            uniform = batch.own(torch.rand(batch.size, 2, generator=self.draws).to(same.device))
            image_negatives, image_found = draw_hard_negatives(text_logits.detach(), same, uniform[:, 0])
            text_negatives, text_found = draw_hard_negatives(image_logits.detach(), same, uniform[:, 1])
            negatives, found = (image_negatives, text_negatives), (image_found, text_found)
        tokens = self.count_tokens(input_ids)
        if in_parts:
            itm_logits = self.match_in_parts(batch, input_ids, states, *negatives)
            loss_itg = self.in_parts(self.sum_itg, input_ids, states, most=most).sum() / tokens
        else:
            itm_logits = self.match(batch, input_ids, states, memory, *negatives)
            loss_itg = model.lm_loss(input_ids, cache)
        matches, counted = matching_labels(len(input_ids), *found)
        with torch.autocast(image.device.type, enabled=False):
            loss_itm = weigh_by_count(matching_loss(itm_logits.float(), matches, counted), counted.sum())
        return {"itc": loss_itc, "itm": loss_itm, "itg": weigh_by_count(loss_itg, tokens)}

    def embed_queries(self, states: Tensor) -> tuple[Tensor, Memory, DynamicCache]:
        """Embed images by the queries that read them.

        Args:
            states: (B, M, D), the image tower's states.

        Returns:
            (B, Q, E) of unit length, the keys and values of the images, and those of the queries.
        """
        memory, cache = self.model.memory_of(states), DynamicCache()
        queries = self.model.query(memory, past_key_values=cache).last_hidden_state
        return unit_length(self.model.vision_proj(queries)), memory, cache

    def embed_texts(self, input_ids: Tensor) -> Tensor:
        """Embed texts (T, N) as (T, E), not normalised."""
        return self.model.get_text_features(input_ids, pooled_only=True).pooler_output

    def count_tokens(self, input_ids: Tensor) -> Tensor:
        """The number of tokens of texts (T, N) that the Q-Former predicts."""
        return (input_ids[:, 1:] != self.model.config.qformer_config.pad_token_id).sum()

    def sum_itg(self, input_ids: Tensor, states: Tensor) -> Tensor:
        """The sum (1,) of the loss of ITG over the tokens of texts (B, N) about images (B, M, D)."""
        _, _, cache = self.embed_queries(states)
        return (self.model.lm_loss(input_ids, cache) * self.count_tokens(input_ids))[None]

    def compare(self, batch: JoinedBatch, image: Tensor, text: Tensor, caption_ids: Tensor, image_ids: Tensor):
        """Compute ITC.

        Args:
            batch: the joined batch.
            image: (B, Q, E) query features of unit length.
            text: (B, E) text features of unit length.
            caption_ids, image_ids: (B,) integers.

        Returns:
            The similarities of images to texts and of texts to images, divided by the temperature; whether the pairs
            are positives (all three (B, size of the joined batch)); and the loss.
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
        """ITM logits (3 B, 2) of the pairs, of the negative images and of the negative texts.

        The keys and values of this process's images are reused; those of other processes' images are computed here.

        Args:
            batch: the joined batch.
            input_ids: (B, N).
            states: (B, M, D), the image tower's states.
            memory: keys and values of this process's images.
            image_negatives: (B,) index in the joined batch of each text's negative image.
            text_negatives: (B,) index in the joined batch of each image's negative text.
        """
        model = self.model
        if len(batch.counts) == 1:
            return model.itm_logits(
                input_ids, model.padding_mask(input_ids), memory, image_negatives, text_negatives
            )  # fmt: skip
        others = model.memory_of(batch.gather(states)[image_negatives])
        texts = batch.gather_texts(input_ids, model.config.qformer_config.pad_token_id)
        own = batch.own(texts)
        return model.match(torch.cat([own, own, texts[text_negatives]]), None, Memory.join([memory, others, memory]))

    def match_in_parts(self, batch: JoinedBatch, input_ids, states, image_negatives, text_negatives) -> Tensor:
        """The same as `match`, in micro batches, each of which computes the keys and values of its images."""
        model = self.model
        texts = batch.gather_texts(input_ids, model.config.qformer_config.pad_token_id)
        images, own = batch.gather(states), batch.first + torch.arange(len(input_ids), device=input_ids.device)
        of_texts, of_images = torch.cat([own, own, text_negatives]), torch.cat([own, image_negatives, own])

        def match(text: Tensor, image: Tensor) -> Tensor:
            return model.match(texts[text], None, model.memory_of(images[image]))

        return self.in_parts(match, of_texts, of_images, most=len(of_texts))


class LanguageObjective(Objective):
    """BLIP-2's stage 2: a frozen language model generates texts (section 3.3; LAVIS, blip2_opt.py, blip2_t5.py).

    Args:
        model: the model to train.
        prompt: token ids of the prompt, which has no loss. The texts for a causal model begin with it; for a
            sequence-to-sequence model it is the encoder's input, and the texts do not contain it. If each text has a
            prompt of its own (`prompt_lengths`), what all of them end with.
        end_token_id: the token that ends a text.
        spelling_share: for a model with `prefix_words`, share of the run (0 to 1), at its start, in which the language
            model is not run: each vector of the prefix learns to choose one token of the prompt, the text and its end,
            in order. The language model, which reads the prompt again after the prefix, then has an example to go by.
            The paper's runs, on many GPUs, have no such phase.
        language_batch_size: from then on, pairs of each batch that the language model reads, with texts of similar
            lengths; the prefixes of all pairs go on to learn words. None: it reads all of them, and words are not
            learnt any longer.
        micro_batch_size: see `Objective`.
    """

    def __init__(
        self, model: VlpBlip2ForConditionalGeneration, prompt: list[int], end_token_id: int,
        spelling_share: float = 0.0, language_batch_size: int | None = None, micro_batch_size: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.micro_batch_size = micro_batch_size
        self.model, self.prompt, self.end_token_id = model, prompt, end_token_id
        self.spelling_share, self.language_batch_size = spelling_share, language_batch_size
        self.spelling_only = False
        # The language model is large and never changes, so states to resume from do not contain it.
        self.register_state_dict_post_hook(remove_language_model)
        self.register_load_state_dict_pre_hook(restore_language_model)

    def before_step(self, step: int, share_done: float = 1.0) -> None:
        self.spelling_only = share_done < self.spelling_share

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, text_index: Tensor, caption_ids: Tensor, image_ids: Tensor,
        prompt_lengths: Tensor | None = None, image_index: Tensor | None = None, **instructions: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Compute the loss of a batch.

        Args:
            pixel_values: images (B, C, S, S), or the states (B, M, D) of the image tower.
            input_ids: (T, N), the distinct texts; they end with the end token and are padded on the right.
            text_index, caption_ids, image_ids: as in `ClipObjective.forward`.
            prompt_lengths: (T,) number of tokens before what each text answers, which have no loss; None: those of
                the common prompt. Causal models only.
            image_index: (B,) the image of each text, if an image has several; None: they are in the same order.
            instructions: for InstructBLIP, `qformer_input_ids` and `qformer_attention_mask` of each text, (T, N') each.

        Returns:
            {"lm": the loss}; {"spelling": the loss} in the first `spelling_share` of the run, and both after it with a
            `language_batch_size`.
        """
        input_ids = input_ids[text_index]
        real = self.until_the_end(input_ids)
        labels = input_ids.masked_fill(~real, -100)
        states, losses = self.in_parts(partial(vision_states, self.model), pixel_values, most=len(text_index)), {}
        states = states if image_index is None else states[image_index]
        instructions = {name: value[text_index] for name, value in instructions.items()}
        if self.model.prefix_words is not None and (self.spelling_only or self.language_batch_size):
            logits = self.model.word_logits(states, **instructions)  # (B, Q, W)
            losses["spelling"] = self.spell(logits, labels, text_index, prompt_lengths)
        if self.spelling_only:
            return losses
        if self.language_batch_size:  # pairs whose texts are about as long as the first one's, to read less padding
            lengths = real.sum(dim=1)
            few = (lengths - lengths[0]).abs().argsort(stable=True)[: self.language_batch_size]
            longest = int(lengths[few].max())
            input_ids, real, labels = (each[few, :longest] for each in (input_ids, real, labels))
            states, text_index = states[few], text_index[few]
            instructions = {name: value[few] for name, value in instructions.items()}
        if not self.model.language_model.config.is_encoder_decoder:
            labels = self.without_prompt(labels, text_index, prompt_lengths)
        count, names = (labels != -100).sum(), list(instructions)
        if self.micro_batch_size is None:
            loss = self.read(input_ids, labels, states, instructions)
        else:

            def total(ids: Tensor, labels: Tensor, states: Tensor, *others: Tensor) -> Tensor:
                count = (labels != -100).sum()
                # The mean over no label would not be finite: read one, which then counts nothing.
                last = torch.where(count == 0, ids[:, -1:], labels[:, -1:])
                labels = torch.cat([labels[:, :-1], last], dim=1)
                loss = self.read(ids, labels, states, dict(zip(names, others, strict=True)))
                return (loss * count)[None]

            rows = input_ids, labels, states, *instructions.values()
            loss = self.in_parts(total, *rows, most=len(rows[0])).sum() / count
        return losses | {"lm": weigh_by_count(loss, count)}

    def read(self, input_ids: Tensor, labels: Tensor, states: Tensor, instructions: dict[str, Tensor]) -> Tensor:
        """The mean loss of the language model over the labels.

        Args:
            input_ids, labels: (B, N) each; -100 for tokens without loss.
            states: (B, M, D), the image tower's states.
            instructions: as in `forward`, (B, N') each.
        """
        if self.model.language_model.config.is_encoder_decoder:
            input_ids = torch.tensor(self.prompt, device=labels.device).expand(len(labels), -1) if self.prompt else None
        # A causal model needs no mask: no token attends to the padding on its right.
        return self.model(input_ids=input_ids, vision_states=states, labels=labels, **instructions).loss

    def without_prompt(self, labels: Tensor, text_index: Tensor, prompt_lengths: Tensor | None) -> Tensor:
        """The labels (B, N) with -100 for the tokens of the prompt."""
        before = len(self.prompt) if prompt_lengths is None else prompt_lengths[text_index, None]
        positions = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        return labels.masked_fill(positions < before, -100)

    def spell(self, logits: Tensor, labels: Tensor, text_index: Tensor, prompt_lengths: Tensor | None) -> Tensor:
        """The loss of prefixes that should spell the prompt and the texts, as far as there are vectors.

        All vectors after a text stand for its end token. Words that a prefix cannot have are not counted.

        Args:
            logits: (B, Q, W).
            labels: (B, N), -100 for padding.
            text_index, prompt_lengths: as in `forward`.
        """
        model = self.model
        if not model.language_model.config.is_encoder_decoder:
            labels = self.without_prompt(labels, text_index, prompt_lengths)
        kept, begin = labels != -100, labels.new_tensor(self.prompt)
        order = kept.long().cumsum(dim=1) - 1 + len(begin)
        fits = kept & (order < logits.shape[1])
        words = labels.new_full(logits.shape[:2], self.end_token_id)
        words[:, : len(begin)] = begin[: logits.shape[1]]
        words[fits.nonzero()[:, 0], order[fits]] = labels[fits]
        with torch.autocast(logits.device.type, enabled=False):
            loss, count = spelling_loss(logits, words, model.prefix_words.ids)
            loss = loss + 0.0 * model.prefix_words.offsets.sum()  # a gradient for all parameters, as FSDP2 expects
        return weigh_by_count(loss, count)

    def until_the_end(self, input_ids: Tensor) -> Tensor:
        """(B, N) bool: True up to and including the first end token. The padding token may be the same token."""
        ends = (input_ids == self.end_token_id).long().cumsum(dim=1)
        return (ends == 0) | ((ends == 1) & (input_ids == self.end_token_id))


def remove_language_model(objective: LanguageObjective, state: dict, prefix: str, metadata) -> None:
    """Remove the frozen weights of the language model from a state dict, but not its adapters."""
    for name in [name for name in state if name.startswith(f"{prefix}model.language_model.") and "lora_" not in name]:
        del state[name]


def restore_language_model(objective: LanguageObjective, state: dict, prefix: str, *others) -> None:
    """Add the current weights of the language model to a state dict that is being loaded."""
    for name, value in objective.model.language_model.state_dict().items():
        state.setdefault(f"{prefix}model.language_model.{name}", value)
