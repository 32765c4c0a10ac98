"""What transformers expects of its models, beyond its common tests (see tests/contract)."""

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import (
    CAPTIONS,
    QFORMER,
    VIT,
    tiny_blip,
    tiny_blip2,
    tiny_blip2_config,
    tiny_blip2_generation,
    tiny_blip_batch,
    tiny_language_model,
    tiny_model,
)
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, Trainer, TrainingArguments
from vlp.processing.blip import train_tokenizer

import vlp


def question_answerer() -> vlp.VlpBlipForQuestionAnswering:
    torch.manual_seed(0)
    return vlp.VlpBlipForQuestionAnswering(tiny_blip().config).eval()


@pytest.mark.parametrize("make", [tiny_blip, tiny_blip2, question_answerer])
def test_models_with_resized_embeddings_can_be_loaded(tmp_path, make):
    model = make()
    model.resize_token_embeddings(150)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_language_models_with_resized_embeddings_can_be_loaded(tmp_path, kind):
    config = tiny_blip2_config(store_language_model=True)
    model = vlp.VlpBlip2ForConditionalGeneration(config, tiny_language_model(kind))
    assert model.config.is_encoder_decoder == (kind == "t5")
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path)
    again = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert again.config.is_encoder_decoder == (kind == "t5")
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_an_auto_class_that_does_not_fit_is_refused(tmp_path):
    question_answerer().save_pretrained(tmp_path / "vqa")
    for auto in (AutoModel, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match="is a VlpBlipForQuestionAnswering, which lacks weights of"):
            auto.from_pretrained(tmp_path / "vqa")
    tiny_blip().save_pretrained(tmp_path / "blip")
    captioner = AutoModelForMultimodalLM.from_pretrained(tmp_path / "blip")
    assert isinstance(captioner, vlp.VlpBlipForConditionalGeneration)


def test_settings_of_generation_are_saved(tmp_path):
    model = question_answerer()
    assert model.can_generate()
    model.generation_config.max_new_tokens = 3
    model.generation_config.min_new_tokens = 3
    model.save_pretrained(tmp_path)
    again = vlp.VlpBlipForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert again.generation_config.max_new_tokens == 3
    batch = tiny_blip_batch()
    assert again.generate(batch["pixel_values"], batch["input_ids"]).shape == (4, 4)  # [DEC] and three tokens


def test_generation_reports_what_is_missing_or_too_long():
    captioner = vlp.VlpBlipForConditionalGeneration.sharing(tiny_blip())
    pixels, ids = tiny_blip_batch()["pixel_values"], tiny_blip_batch()["input_ids"]
    with pytest.raises(ValueError, match="needs pixel_values, the images"):
        captioner.generate()
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        captioner(pixels)
    with pytest.raises(ValueError, match="41 tokens, but the model supports at most 40"):
        captioner.generate(pixels, max_new_tokens=50, min_new_tokens=50)
    with pytest.raises(ValueError, match="needs pixel_values .* and input_ids"):
        question_answerer().generate(pixels)
    with pytest.raises(ValueError, match="not as inputs_embeds"):
        question_answerer().generate(pixels, ids, inputs_embeds=torch.zeros(4, 3, 32))
    with pytest.raises(ValueError, match="needs pixel_values"):
        tiny_blip2_generation().generate()
    with pytest.raises(ValueError, match="needs labels or decoder_input_ids"):
        tiny_blip2_generation("t5")(pixels)


def test_generation_stops_at_strings():
    tokenizer = train_tokenizer([*CAPTIONS, "abcdef"], 120)  # transformers decodes "abcdef" to find the strings
    captioner, pixels = vlp.VlpBlipForConditionalGeneration.sharing(tiny_blip()), tiny_blip_batch()["pixel_values"]
    whole = captioner.generate(pixels[:1], max_new_tokens=12, min_new_tokens=12)
    word = tokenizer.decode(whole[0, 1:4])[-1:]
    stopped = captioner.generate(
        pixels[:1], max_new_tokens=12, min_new_tokens=12, stop_strings=[word], tokenizer=tokenizer
    )
    assert torch.equal(stopped[0], whole[0, : stopped.shape[1]]) and stopped.shape[1] <= 4


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_generated_sequences_have_the_prompt_in_every_form(kind):
    model, pixels = tiny_blip2_generation(kind), tiny_blip_batch()["pixel_values"]
    ids = torch.randint(5, 90, (4, 3))
    plain = model.generate(pixels, ids, max_new_tokens=4, min_new_tokens=4)
    output = model.generate(
        pixels, ids, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, output_hidden_states=True
    )
    assert torch.equal(output.sequences, plain) and torch.equal(plain[:, :3], ids)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(pixels, inputs_embeds=embeds, max_new_tokens=4, min_new_tokens=4), plain[:, 3:])


def test_a_loss_over_accumulated_batches_is_that_of_the_whole_batch():
    """`num_items_in_batch` of Trainer: the sum over all tokens, divided by their number in all micro batches."""
    for model in (vlp.VlpBlipForConditionalGeneration(tiny_blip().config).eval(), tiny_blip2_generation("opt")):
        batch = tiny_blip_batch()
        ids = batch["input_ids"].clamp(max=90)
        labels = ids.masked_fill(ids == 0, -100)
        inputs = dict(pixel_values=batch["pixel_values"], input_ids=ids, attention_mask=(ids != 0).long())
        shifted = labels[:, 1:] if isinstance(model, vlp.VlpBlipForConditionalGeneration) else labels
        count = (shifted != -100).sum()
        whole = model(**inputs, labels=labels).loss
        parts = [
            model(**{k: v[rows] for k, v in inputs.items()}, labels=labels[rows], num_items_in_batch=count).loss
            for rows in (slice(0, 1), slice(1, 4))
        ]
        assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_divides_a_mean_loss_by_the_accumulated_steps(tmp_path, accumulated):
    """Two micro batches of equal pairs give the gradient of one of them; the loss is not added up."""
    model, batch = tiny_model(), tiny_blip_batch(size=2)
    batch["input_ids"][:, 0], batch["input_ids"][:, -1] = 598, 599
    rows = [{name: value[index % 2] for name, value in batch.items()} for index in range(2 * accumulated)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=accumulated, max_steps=1,
        report_to="none", use_cpu=True, logging_steps=1, max_grad_norm=0.0, disable_tqdm=True, data_seed=0, seed=0,
    )  # fmt: skip

    class WithLoss(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return super().compute_loss(model, inputs | {"return_loss": True}, **kwargs)

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = WithLoss(model, arguments, train_dataset=rows)
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)  # so that the tests that follow can create their own
    GradientState._reset_state()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    with torch.no_grad():
        expected = tiny_model()(**batch, return_loss=True).loss.item()
    assert logged == pytest.approx(expected, rel=1e-3)


def test_hidden_states_follow_the_configuration():
    blip, batch = tiny_blip().eval(), tiny_blip_batch()
    assert blip(**batch).text_model_output.hidden_states is None
    blip.config.output_hidden_states = True
    output = blip(**batch)
    assert len(output.text_model_output.hidden_states) == 4 and len(output.vision_model_output.hidden_states) == 4
    blip.config.output_hidden_states = False
    assert torch.equal(blip(**batch).text_embeds, output.text_embeds) or torch.allclose(
        blip(**batch).text_embeds, output.text_embeds, atol=1e-6
    )


def test_max_length_means_the_same_as_in_transformers():
    """It counts the queries and the prompt; `max_new_tokens` counts the new tokens."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig

    text = tiny_language_model("opt", vocab_size=100).config
    vision = {name: value for name, value in VIT.items()}
    qformer = {
        name: QFORMER[name]
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    theirs = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=Blip2VisionConfig(**vision),
            qformer_config=Blip2QFormerConfig(**qformer, encoder_hidden_size=48),
            text_config=text, num_query_tokens=5, image_token_index=99,
        )
    ).eval()  # fmt: skip
    ours, pixels, ids = tiny_blip2_generation("opt"), torch.randn(2, 3, 32, 32), torch.randint(5, 90, (2, 3))
    with_queries = torch.cat([torch.full((2, 5), 99), ids], dim=1)
    for options in ({"max_length": 14}, {"max_new_tokens": 4}):
        options |= {"eos_token_id": None}
        new = theirs.generate(pixels, with_queries, **options).shape[1] - with_queries.shape[1]
        assert ours.generate(pixels, ids, **options).shape[1] - ids.shape[1] == new


@pytest.mark.parametrize("make", [tiny_blip, tiny_blip2])
def test_tuples_begin_with_the_loss(make):
    """The order of a tuple is that of the output's fields, whatever the order in which they are computed."""
    model, batch = make().eval(), tiny_blip_batch()
    batch["input_ids"] = batch["input_ids"].clamp(max=90)
    output = model(**batch)
    fields = [field.name for field in dataclasses.fields(output) if field.name in output]
    assert list(output) == fields and list(output)[0] == "loss"
    assert torch.equal(model(**batch, return_dict=False)[0], output.loss)
