"""A prefix made of words, for the language model of BLIP-2."""

import itertools

import pytest
import torch
from conftest import tiny_blip2, tiny_language_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from vlp.modeling_vlp.prefix_words import PENALTY, PrefixWords

import vlp
from vlp.loading import load_model


@pytest.mark.parametrize("pairs", [[(30, 10), (10, 20), (20, 20)], [(10, 10)], []])
def test_the_most_probable_sequence_is_found(pairs):
    words = PrefixWords(3, len(pairs))
    words.fill([10, 20, 30], pairs)
    logits = 4 * torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))
    scores = logits.log_softmax(dim=-1)

    def score(row: int, path: tuple[int, ...]) -> float:
        tokens = [words.ids[word].item() for word in path]
        wrong = sum(pair not in pairs for pair in itertools.pairwise(tokens)) if pairs else 0
        return sum(scores[row, place, word].item() for place, word in enumerate(path)) - PENALTY * wrong

    for row, chosen in enumerate(words.choose(logits).tolist()):
        assert tuple(chosen) == max(itertools.product(range(3), repeat=4), key=lambda path: score(row, path))


def test_the_gradient_is_that_of_the_mixture():
    words, table = PrefixWords(3, places=4, width=8), nn.Embedding(40, 8)
    words.fill([10, 20, 30], [])
    x = torch.randn(2, 4, 8, requires_grad=True)
    target = torch.randn(2, 4, 8)
    logits = words.logits(x, table)
    chosen = table.weight[words.ids[logits.argmax(dim=-1)]]
    output = words.embed(x, table)
    assert_close(output, chosen)
    (gradient,) = torch.autograd.grad((output * target).sum(), x)
    mixture = words.logits(x, table).softmax(dim=-1) @ table.weight[words.ids]
    assert_close(gradient, torch.autograd.grad((mixture * target).sum(), x)[0])


def test_the_language_model_reads_the_words_and_repeats_of_them():
    model = vlp.VlpBlip2ForConditionalGeneration.from_pre_training(
        tiny_blip2(), tiny_language_model("llama"), prefix_words=([2, 4, *range(10, 18)], [(2, 2), (4, 10)]),
        num_prefix_repeats=2,
    ).eval()  # fmt: skip
    states = torch.randn(2, 17, 48)
    words = model.prefix_words.ids[model.prefix_words.choose(model.word_logits(states))].repeat(1, 2)  # (B, 2 Q)
    assert_close(model.prefix(vision_states=states), model.get_input_embeddings().weight[words])
    ids = torch.tensor([[4, 7], [4, 7]])
    read = model.language_model(torch.cat([words, ids], dim=1)).logits[:, -2:]
    assert_close(model(input_ids=ids, vision_states=states).logits, read, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_offsets_are_added_to_the_words_and_learnt(kind):
    model = vlp.VlpBlip2ForConditionalGeneration.from_pre_training(
        tiny_blip2(), tiny_language_model(kind), prefix_words=([2, 4, *range(10, 18)], []), num_prefix_repeats=2
    )
    states, offsets = torch.randn(2, 17, 48), model.prefix_words.offsets
    before = model.prefix(vision_states=states)
    ids = torch.tensor([[4, 7, 11], [4, 7, 12]])
    loss = model(input_ids=ids, labels=ids, vision_states=states).loss
    loss.backward()
    assert offsets.shape == before.shape[1:] and offsets.grad.abs().min(dim=1).values.min() > 0
    with torch.no_grad():
        offsets -= 1e-3 * offsets.grad.sign()
    assert_close(model.prefix(vision_states=states), before - 1e-3 * offsets.grad.sign(), rtol=1e-4, atol=1e-5)
    assert model(input_ids=ids, labels=ids, vision_states=states).loss < loss


def test_a_checkpoint_without_offsets_begins_with_none(tmp_path):
    model = vlp.VlpBlip2ForConditionalGeneration.from_pre_training(
        tiny_blip2(), tiny_language_model("llama"), prefix_words=([2, 4, 7], [])
    )
    torch.nn.init.normal_(model.prefix_words.offsets)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["prefix_words.offsets"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for again in (
        vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path, language_model=tiny_language_model("llama")),
        load_model(vlp.VlpBlip2ForConditionalGeneration, str(tmp_path), "model",
                   language_model=tiny_language_model("llama")),
    ):  # fmt: skip
        assert torch.equal(again.prefix_words.offsets, torch.zeros(5, 32))
