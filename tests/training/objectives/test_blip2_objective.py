"""Tests of the BLIP-2 objectives of stages 1 and 2."""

import pytest
import torch
from conftest import tiny_blip2, tiny_blip2_generation, tiny_blip_batch, tiny_language_model
from torch.nn import functional as F
from torch.testing import assert_close
from vlp.modeling_vlp.losses import spelling_loss
from vlp.training.objectives.blip2 import Blip2Objective, LanguageObjective
from vlp.training.objectives.distributed import JoinedBatch

import vlp


def objective_of(**options) -> Blip2Objective:
    return Blip2Objective(tiny_blip2().double(), **options).train()


def batch_of(rows: slice, size: int = 8) -> dict[str, torch.Tensor]:
    """Some rows of a batch in which texts 1 and 6 are equal, with precomputed states of the image tower."""
    batch = tiny_blip_batch(size=size)
    ids = batch["input_ids"]
    ids[6] = ids[1]
    captions = torch.arange(size)
    captions[6] = 1
    states = torch.randn(size, 17, 48, generator=torch.Generator().manual_seed(9)).double()
    index = torch.arange(size)[rows]
    return {"pixel_values": states[rows], "input_ids": ids[rows], "text_index": index - index[0],
            "caption_ids": captions[rows], "image_ids": index}  # fmt: skip


def test_equal_captions_are_positives_and_never_negatives():
    objective, batch = objective_of(label_smoothing=0.0), batch_of(slice(0, 8))
    model = objective.model
    image = F.normalize(model.get_image_features(vision_states=batch["pixel_values"]).pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(batch["input_ids"]).pooler_output, dim=-1)
    image_logits, text_logits, same, loss = objective.compare(
        JoinedBatch((8,)), image, text, batch["caption_ids"], batch["image_ids"]
    )
    assert same.sum() == 10 and same[1, 6] and same[6, 1]
    assert_close(image_logits, torch.stack([(image @ t).amax(dim=1) for t in text], dim=1) / model.temp)
    assert_close(text_logits, image_logits.T)
    log_i2t, log_t2i = image_logits.log_softmax(1), text_logits.log_softmax(1)
    wanted = 0.0
    for log in (log_i2t, log_t2i):
        rows = [log[row, row] if row not in (1, 6) else (log[row, 1] + log[row, 6]) / 2 for row in range(8)]
        wanted = wanted - torch.stack(rows).mean() / 2
    assert_close(loss, wanted)
    drawn = []
    original = model.itm_logits
    model.itm_logits = lambda *args: drawn.append(args[-2:]) or original(*args)
    for step in range(20):
        objective.before_step(step)
        objective(**batch)
    for images, texts in drawn:
        for negatives in (images, texts):
            assert not same[torch.arange(8), negatives].any()


def test_sampling_depends_only_on_step_and_seed():
    losses = []
    for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3)):
        objective = objective_of(seed=seed)
        objective.before_step(step)
        torch.rand(step)  # other use of the global generator must not matter
        losses.append(objective(**batch_of(slice(0, 8)))["itm"].item())
    assert losses[0] == losses[1] and len(set(losses)) == 3


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_micro_batches_of_the_language_model_give_the_gradient_of_the_whole_batch(kind, size):
    found = []
    for micro_batch_size in (None, size):
        model = tiny_blip2_generation(kind).double()
        model.freeze()
        prompt = [5, 6] if kind == "llama" else []
        objective = LanguageObjective(model, prompt, end_token_id=3, micro_batch_size=micro_batch_size).train()
        batch = batch_of(slice(0, 8))
        batch |= {"pixel_values": batch["pixel_values"].double(), "input_ids": batch["input_ids"].clamp(max=98)}
        loss = objective(**batch)["lm"]
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (whole, gradients), (parts, others) = found
    assert_close(parts, whole)
    assert gradients and gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        size = max(gradient.abs().max().item(), 1e-3)  # losses are computed in float32
        assert_close(others[name], gradient, rtol=1e-5, atol=1e-6 * size, msg=lambda text, name=name: f"{name}: {text}")


def test_a_micro_batch_without_labels_counts_nothing():
    """The text of one row is all prompt."""
    losses = []
    for size in (None, 1, 2):
        model = tiny_blip2_generation().double()
        model.freeze()
        objective = LanguageObjective(model, [], end_token_id=3, micro_batch_size=size).train()
        batch = batch_of(slice(0, 4))
        ids = batch["input_ids"].clamp(max=98)
        lengths = torch.tensor([2, 2, ids.shape[1], 2])
        loss = objective(**batch | {"pixel_values": batch["pixel_values"].double(), "input_ids": ids,
                                    "prompt_lengths": lengths})["lm"]  # fmt: skip
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        losses.append(loss.detach())
    assert losses[0].isfinite()
    assert_close(losses[1], losses[0])
    assert_close(losses[2], losses[0])


def test_first_share_of_training_uses_only_itc():
    objective = objective_of(contrastive_share=0.5)
    objective.before_step(0, 0.2)
    assert list(objective(**batch_of(slice(0, 8)))) == ["itc"]
    objective.before_step(1, 0.5)
    assert list(objective(**batch_of(slice(0, 8)))) == ["itc", "itm", "itg"]


def test_temperature_is_clamped():
    objective = objective_of()
    objective.model.temp.data.fill_(0.9)
    objective.before_step(0)
    assert objective.facts() == {"temperature": 0.5}


def test_duplicate_texts_are_encoded_once_with_same_losses():
    objective, batch = objective_of(), batch_of(slice(0, 8))
    objective.before_step(0)
    wanted = objective(**batch)
    fewer = batch | {"input_ids": batch["input_ids"][[0, 1, 2, 3, 4, 5, 7]],
                     "text_index": torch.tensor([0, 1, 2, 3, 4, 5, 1, 6])}  # fmt: skip
    objective.before_step(0)
    assert_close(objective(**fewer), wanted)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_language_model_loss_covers_text_after_prompt(kind):
    model = tiny_blip2_generation(kind)
    objective = LanguageObjective(model, prompt=[4, 7], end_token_id=2).train()
    states = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(9))
    start = [4, 7] if kind == "llama" else []
    # The padding token is the end token.
    ids = torch.tensor([start + [11, 12, 13, 2], start + [15, 2, 2, 2]])
    rows = torch.arange(2)
    loss = objective(states, ids, rows, rows, rows)["lm"]
    terms = []
    for row, text in enumerate(([11, 12, 13, 2], [15, 2])):
        if kind == "llama":
            given = torch.tensor([[4, 7, *text]])
            labels = torch.tensor([[-100, -100, *text]])
        else:
            given, labels = torch.tensor([[4, 7]]), torch.tensor([text])
        terms.append(len(text) * model(input_ids=given, vision_states=states[row : row + 1], labels=labels).loss)
    assert_close(loss, sum(terms) / 6)


def test_spelling_loss_is_the_cross_entropy_of_known_words():
    logits, ids = torch.randn(2, 3, 4), torch.tensor([7, 3, 5, 11])
    loss, count = spelling_loss(logits, torch.tensor([[3, 7, 99], [11, 4, 3]]), ids)
    known = [(0, 0, 1), (0, 1, 0), (1, 0, 3), (1, 2, 1)]
    assert count == 4
    assert_close(loss, -sum(logits[row, column].log_softmax(-1)[word] for row, column, word in known) / 4)
    nothing, count = spelling_loss(logits, torch.full((2, 3), 99), ids)
    assert nothing == 0 and count == 0


def model_with_words(kind: str, repeats: int = 1) -> vlp.VlpBlip2ForConditionalGeneration:
    return vlp.VlpBlip2ForConditionalGeneration.from_pre_training(
        tiny_blip2(), tiny_language_model(kind), prefix_words=([2, 4, *range(10, 18)], []), num_prefix_repeats=repeats
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_words_are_learnt_first_then_by_all_pairs_beside_the_language_model(kind):
    model = model_with_words(kind)
    prompt = [4] if kind == "llama" else []
    objective = LanguageObjective(model, prompt, 2, 0.5, language_batch_size=2).train()
    states = torch.randn(3, 17, 48, generator=torch.Generator().manual_seed(9))
    start = [4] if kind == "llama" else []
    ids = torch.tensor([start + [11, 12, 13, 2], start + [15, 2, 2, 2], start + [16, 17, 2, 2]])
    rows = torch.arange(3)
    objective.before_step(0, 0.2)
    first = objective(states, ids, rows, rows, rows)
    words = torch.tensor([[11, 12, 13, 2, 2], [15, 2, 2, 2, 2], [16, 17, 2, 2, 2]])
    if prompt:  # the prompt comes first, and what does not fit into the five vectors is left out
        words = torch.tensor([[4, 11, 12, 13, 2], [4, 15, 2, 2, 2], [4, 16, 17, 2, 2]])
    assert list(first) == ["spelling"]
    assert_close(first["spelling"], spelling_loss(model.word_logits(states), words, model.prefix_words.ids)[0])
    objective.before_step(1, 0.5)
    both = objective(states, ids, rows, rows, rows)
    assert list(both) == ["spelling", "lm"]
    assert_close(both["spelling"], first["spelling"])
    # The language model reads the two pairs whose texts are closest in length to the first one's.
    alone, few = LanguageObjective(model, objective.prompt, 2).train(), torch.tensor([0, 2])
    assert_close(both["lm"], alone(states[few], ids[few], rows[:2], rows[:2], rows[:2])["lm"])
    # Texts about the same image share its states.
    index = torch.tensor([1, 0, 1])
    assert_close(objective(states[:2], ids, rows, rows, rows, image_index=index),
                 objective(states[index], ids, rows, rows, rows))  # fmt: skip
