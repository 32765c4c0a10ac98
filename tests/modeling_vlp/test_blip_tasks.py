"""Question answering (VQA) and visual reasoning on two images (NLVR2): models and complete runs."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_blip, tiny_blip_batch, what_the_card_says
from PIL import Image
from test_blip_training import COLOURS, arguments, pairs, trained  # noqa: F401  fixtures
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoProcessor
from vlp.training.evaluation.scores import vqa_accuracy
from vlp.training.run import train

import vlp
from vlp.errors import ArgumentError


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_blip().save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


# --- questions --------------------------------------------------------------------------------------------------------


def questions(folder) -> tuple[vlp.VlpBlipForQuestionAnswering, dict]:
    batch = tiny_blip_batch()
    answers = torch.tensor([[2, 9, 3, 0], [2, 11, 12, 3], [2, 13, 3, 0], [2, 9, 3, 0], [2, 15, 3, 0]])
    batch |= {"labels": answers, "answer_index": torch.tensor([0, 0, 1, 2, 3]),
              "answer_weights": torch.tensor([0.7, 0.3, 1.0, 1.0, 0.5])}  # fmt: skip
    return vlp.VlpBlipForQuestionAnswering.from_pre_training(folder).eval(), batch


def test_encoder_and_decoder_start_from_the_pretrained_weights(folder):
    model, source = questions(folder)[0], tiny_blip()
    ours, theirs = model.text_model.layers[0], source.text_model.layers[0]
    assert_close(ours.encoder_attention.state_dict(), theirs.encoder_attention.state_dict())
    answer = model.answer_decoder.text_model.layers[0]
    assert_close(answer.decoder_attention.state_dict(), theirs.decoder_attention.state_dict())
    assert_close(model.answer_decoder.lm_head.dense.weight, source.lm_head.dense.weight)
    assert answer.mlp.fc1.weight is not ours.mlp.fc1.weight  # separate copies, because they diverge in fine-tuning
    # The tiny image tower is wider than the text model, so its cross-attention weights do not fit a question.
    assert answer.cross_attention.attention.k_proj.weight.shape == (32, 32)


@pytest.mark.parametrize("task", ["vqa", "nlvr"])
def test_images_that_are_encoded_once_give_the_same_loss_and_gradients(folder, task):
    model, batch = questions(folder)
    pixels = batch["pixel_values"]
    if task == "nlvr":
        model = vlp.VlpBlipForVisualReasoning.from_pre_training(folder).eval()
        batch = {"input_ids": batch["input_ids"], "labels": torch.tensor([1, 0, 0, 1])}
        pixels = torch.stack([pixels, pixels.roll(1, dims=0)], dim=1)
    index = torch.tensor([0, 1, 0, 1])
    results = []
    for extra in ({"pixel_values": pixels[index]}, {"pixel_values": pixels[:2], "image_index": index}):
        model.zero_grad()
        loss = model(**batch | extra).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert_close(*results)


@torch.no_grad()
def test_loss_is_the_weighted_sum_over_answers(folder):
    model, batch = questions(folder)
    loss = model(**batch).loss
    total = 0.0
    for row, (question, weight) in enumerate(zip(batch["answer_index"], batch["answer_weights"], strict=True)):
        ids = batch["input_ids"][question][batch["input_ids"][question] != 0][None]
        memory = model.question_memory(batch["pixel_values"][question][None], ids)
        answer = batch["labels"][row][batch["labels"][row] != 0][None]
        decoder_ids = torch.cat([torch.tensor([[118]]), answer[:, 1:]], 1)
        logits = model.answer_decoder(decoder_ids[:, :-1], memory=memory).logits[0]
        total += weight * F.cross_entropy(logits, answer[0, 1:], label_smoothing=0.1, reduction="sum") / 4
    assert_close(loss, total, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_a_question_does_not_change_results(folder):
    model, batch = questions(folder)
    longer = batch | {"input_ids": F.pad(batch["input_ids"], (0, 6))}
    assert_close(model(**longer).loss, model(**batch).loss, rtol=1e-5, atol=1e-5)
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    options = {"num_beams": 3, "max_new_tokens": 5}
    assert torch.equal(model.generate(pixels, longer["input_ids"], **options), model.generate(pixels, ids, **options))


@torch.no_grad()
def test_ranking_returns_the_most_likely_answer(folder):
    model, batch = questions(folder)
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    answers = torch.tensor([[2, 9, 3, 0], [2, 11, 12, 3], [2, 13, 3, 0], [2, 40, 3, 0]])
    scores = torch.zeros(4, 4)
    for column, answer in enumerate(answers):
        real = answer[answer != 0]
        decoder_ids = torch.cat([torch.tensor([118]), real[1:]])[None].expand(4, -1)
        logits = model.answer_decoder(
            decoder_ids[:, :-1], memory=model.question_memory(pixels, ids)
        ).logits.log_softmax(-1)
        scores[:, column] = logits.gather(2, real[1:].expand(4, -1)[..., None])[..., 0].sum(1)
    assert torch.equal(model.rank(pixels, ids, answers, top_k=4), scores.argmax(1))


def test_question_answering_save_load_round_trip(folder, tmp_path):
    model, batch = questions(folder)
    model.save_pretrained(tmp_path / "vqa")
    loaded, info = vlp.VlpBlipForQuestionAnswering.from_pretrained(tmp_path / "vqa", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).loss, model(**batch).loss)
    decoder = loaded.answer_decoder
    assert decoder.lm_head.decoder.weight is decoder.text_model.embeddings.word_embeddings.weight


def test_vqa_accuracy_follows_the_official_formula():
    assert vqa_accuracy("red", ["red"] * 10) == 1.0
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(9 / 3 / 10)
    assert vqa_accuracy("red", ["blue"] * 10) == 0.0
    assert vqa_accuracy("red", ["red"]) == 1.0 and vqa_accuracy("red", ["blue", "green"]) == 0.0


def test_vqa_run_learns_to_answer(trained, tmp_path):  # noqa: F811
    rows = {"image": [], "question": [], "answers": [], "split": []}
    for number in range(48):
        colour = COLOURS[number % 8]
        Image.new("RGB", (16 + number // 8, 16), colour).save(tmp_path / f"{number}.png")
        rows["image"].append(str(tmp_path / f"{number}.png"))
        rows["question"].append("What colour is it?" if number % 2 else "Which colour?")
        rows["answers"].append([colour] * (10 if number % 3 else 9) + ["colourful"] * (number % 3 == 0))
        rows["split"].append("test" if number >= 40 else "train")
    splits = {
        split: datasets.Dataset.from_dict({n: [v for v, s in zip(rows[n], rows["split"], strict=True) if s == split]
                                           for n in ("image", "question", "answers")})
        for split in ("train", "test")
    }  # fmt: skip
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "questions"))
    options = dict(task="vqa", caption_column="question", model_name_or_path=str(trained), max_train_steps=200)
    train(arguments(tmp_path / "questions", tmp_path / "vqa", **options))
    results = json.loads((tmp_path / "vqa" / "results.json").read_text())
    assert results["metrics"]["vqa_accuracy_ranked"] >= 0.85, results["metrics"]
    assert results["metrics"]["vqa_accuracy"] >= 0.85, results["metrics"]
    model = vlp.VlpBlipForQuestionAnswering.from_pretrained(tmp_path / "vqa")
    processor = AutoProcessor.from_pretrained(tmp_path / "vqa")
    inputs = processor(images=Image.new("RGB", (20, 20), "blue"), text="Which colour?", return_tensors="pt")
    assert processor.decode_texts(model.generate(**inputs, max_new_tokens=4)) == ["blue"]
    assert "answers questions" in (tmp_path / "vqa" / "README.md").read_text()
    assert "red" in what_the_card_says(tmp_path / "vqa")
    with pytest.raises(ArgumentError, match="has no column 'answer'; .* Choose one with --answer_column"):
        train(arguments(tmp_path / "questions", tmp_path / "x", answer_column="answer", **options))


# --- two images -------------------------------------------------------------------------------------------------------


def reasoning(folder) -> tuple[vlp.VlpBlipForVisualReasoning, dict]:
    batch = tiny_blip_batch(size=6)
    pixels = batch["pixel_values"][:6].unflatten(0, (3, 2))
    return vlp.VlpBlipForVisualReasoning.from_pre_training(folder).eval(), {
        "input_ids": batch["input_ids"][:3], "pixel_values": pixels, "labels": torch.tensor([1, 0, 1])}  # fmt: skip


@torch.no_grad()
def test_averaging_layers_give_two_equal_images_the_output_of_one(folder):
    """Both attentions start from the pre-trained one, so the mean of two equal outputs is that output."""
    model, batch = reasoning(folder)
    source = tiny_blip().eval()
    pixels = batch["pixel_values"][:, :1].expand(-1, 2, -1, -1, -1)
    pair = model.text_model.layers[0].cross_attention
    assert pair.merge is None and model.text_model.layers[-1].cross_attention.merge is not None
    states = model.encode_image(pixels.flatten(0, 1)).last_hidden_state.unflatten(0, (-1, 2))
    x = torch.randn(3, 5, 32)
    output = pair(x, key_values=pair.keys_values(states.flatten(1, 2)))[0]
    one = source.text_model.layers[0].cross_attention
    assert_close(output, one(x, key_values=one.keys_values(states[:, 0]))[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_merging_layers_start_near_the_mean(folder):
    merge = reasoning(folder)[0].text_model.layers[-1].cross_attention.merge
    one, other = torch.randn(2, 50, 32)
    mean, merged = (one + other) / 2, merge(torch.cat([one, other], dim=-1))
    assert 0 < (merged - mean).norm() < 0.5 * mean.norm()


def test_image_order_matters_and_padding_does_not(folder):
    model, batch = reasoning(folder)
    with torch.no_grad():
        output = model(**batch)
        assert output.logits.shape == (3, 2)
        assert_close(output.loss, F.cross_entropy(output.logits, batch["labels"]))
        swapped = model(**batch | {"pixel_values": batch["pixel_values"].flip(1)})
        assert not torch.allclose(swapped.logits, output.logits)
        longer = model(**batch | {"input_ids": F.pad(batch["input_ids"], (0, 4))})
        assert_close(longer.logits, output.logits, rtol=1e-5, atol=1e-5)
    model(**batch).loss.backward()
    pair = model.text_model.layers[-1].cross_attention
    for part in (pair.attention0.k_proj, pair.attention1.v_proj, pair.merge):
        assert part.weight.grad.abs().sum() > 0


def test_nlvr_run_learns_to_compare_two_images(trained, tmp_path):  # noqa: F811
    lines = ["image,second_image,caption,label,split"]
    for colour in COLOURS:
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{colour}.png")
    for number in range(96):
        left, right = COLOURS[number % 8], COLOURS[(number // 8) % 8]
        asked = COLOURS[(number + number // 3) % 8]
        split = "test" if number % 6 == 5 else "train"
        lines.append(f"{left}.png,{tmp_path / right}.png,a {asked} card,{asked in (left, right)},{split}")
    (tmp_path / "two.csv").write_text("\n".join(lines))
    options = dict(task="nlvr", model_name_or_path=str(trained), max_train_steps=30)
    train(arguments(tmp_path / "two.csv", tmp_path / "nlvr", **options))
    results = json.loads((tmp_path / "nlvr" / "results.json").read_text())
    losses = [entry["nlvr"] for entry in results["history"]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and 0 <= results["metrics"]["nlvr_accuracy"] <= 1
    assert "tensor([" in what_the_card_says(tmp_path / "nlvr")
    loaded = vlp.VlpBlipForVisualReasoning.from_pretrained(tmp_path / "nlvr")
    assert loaded.text_model.layers[-1].cross_attention.merge is not None


# --- another image size -----------------------------------------------------------------------------------------------


def test_fine_tuning_at_another_image_size(pairs, trained, tmp_path):  # noqa: F811
    options = dict(task="captioning", model_name_or_path=str(trained), max_train_steps=1, fine_tune_image_size=32)
    train(arguments(pairs, tmp_path / "large", **options))
    model = vlp.VlpBlipForConditionalGeneration.from_pretrained(tmp_path / "large")
    assert model.config.vision_config.image_size == 32
    processor = AutoProcessor.from_pretrained(tmp_path / "large")
    assert processor(images=Image.new("RGB", (9, 9)), return_tensors="pt")["pixel_values"].shape[-1] == 32
    with pytest.raises(ArgumentError, match=r"--fine_tune_image_size: .*image_size \(30\) must be divisible"):
        train(arguments(pairs, tmp_path / "x", **options | {"fine_tune_image_size": 30}))


@torch.no_grad()
def test_resized_position_embeddings_match_interpolation():
    model, pixels = tiny_blip().eval(), torch.randn(2, 3, 64, 64)
    expected = model.encode_image(pixels, interpolate_pos_encoding=True).last_hidden_state
    model.vision_model.resize_images(64)
    assert torch.equal(model.encode_image(pixels).last_hidden_state, expected)
