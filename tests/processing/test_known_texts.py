"""Repeated captions are embedded from a cache: outputs are exact and never stale after a weight change."""

import pytest
import torch
from conftest import tiny_batch, tiny_model, tiny_pair
from peft import LoraConfig
from PIL import Image
from torch.testing import assert_close
from transformers import pipeline


@pytest.fixture
def counted():
    """A model in evaluation mode, a batch, and a list with one entry per call of the text tower."""
    model, calls = tiny_model().eval(), []
    forward = model.text_model.forward
    model.text_model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    return model, tiny_batch(model), calls


def test_repeated_captions_are_cached_after_the_second_call(counted):
    """Nothing is cached after the first call, because the captions may never be repeated."""
    model, batch, calls = counted
    with torch.no_grad():
        outputs = [model(**batch) for _ in range(5)]
        assert len(calls) == 2
        plain = model.get_text_features(batch["input_ids"])
        for output in outputs:
            assert torch.equal(output.text_model_output.pooler_output, plain.pooler_output)
            assert torch.equal(output.text_model_output.last_hidden_state, plain.last_hidden_state)
            assert torch.equal(output.logits_per_image, outputs[0].logits_per_image)
        other = batch | {"input_ids": batch["input_ids"].flip(0)}
        assert_close(model(**other).text_embeds, outputs[0].text_embeds.flip(0))


def test_many_captions_are_cached_after_the_first_call(counted):
    model, batch, calls = counted
    many = batch | {"input_ids": batch["input_ids"].repeat(8, 1)}
    with torch.no_grad():
        first, second = model(**many), model(**many)
    assert len(calls) == 1 and torch.equal(first.logits_per_image, second.logits_per_image)


CHANGES = {
    "in place": lambda p: p.add_(0.01),
    "through .data": lambda p: p.data.add_(0.01),
    "one bit of one entry": lambda p: p.data.view(-1).view(torch.int32)[:1].bitwise_xor_(1),
    "through numpy": lambda p: p.detach().numpy().__imul__(1.5),
    "filled": lambda p: p.data.fill_(0.5),
    "another tensor": lambda p: setattr(p, "data", p.data * 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name",
    ["text_projection.weight", "text_model.encoder.layers.1.mlp.fc1.bias", "text_model.final_layer_norm.weight",
     "text_model.embeddings.position_embedding.weight"],
)  # fmt: skip
def test_never_stale_after_a_weight_change(counted, name, change):
    model, batch, calls = counted
    with torch.no_grad():
        for _ in range(3):
            model(**batch)
        CHANGES[change](model.get_parameter(name))
        output = model(**batch)
        assert len(calls) == 3
        assert torch.equal(output.text_model_output.pooler_output,
                           model.get_text_features(batch["input_ids"]).pooler_output)  # fmt: skip


def test_never_stale_after_embedding_state_kernel_or_dtype_changes(counted):
    model, batch, calls = counted
    with torch.no_grad():

        def settle() -> int:
            for _ in range(3):
                model(**batch)
            return len(calls)

        calls_before = settle()
        model.text_model.embeddings.token_embedding.weight[batch["input_ids"][0, 1]] += 1.0
        changed = model(**batch).text_embeds
        assert len(calls) == calls_before + 1
        calls_before = settle()
        model.load_state_dict(tiny_model().state_dict())
        assert not torch.equal(model(**batch).text_embeds, changed) and len(calls) == calls_before + 1
        calls_before = settle()
        model.set_attn_implementation("eager")
        model(**batch)
        assert len(calls) == calls_before + 1
        calls_before = settle()
        assert model.bfloat16()(**batch).text_embeds.dtype == torch.bfloat16 and len(calls) == calls_before + 1
        model.float()
        calls_before = settle()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)
        assert len(calls) == calls_before + 1


def test_modifying_an_output_does_not_affect_the_next(counted):
    model, batch, _ = counted
    with torch.inference_mode():
        outputs = [model(**batch) for _ in range(4)]
        expected = outputs[0].text_model_output.pooler_output.clone()
        for output in outputs:
            output.text_model_output.pooler_output.zero_()
        assert torch.equal(model(**batch).text_model_output.pooler_output, expected)
    with torch.no_grad():  # the cache from inference mode is usable outside it
        again = model(**batch).text_model_output.pooler_output
    (again * torch.ones((), requires_grad=True)).sum().backward()


def test_nothing_is_cached_with_training_gradients_hooks_or_adapters(counted):
    model, batch, calls = counted
    model(**batch).logits_per_image.sum().backward()
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(**batch)
        model.eval()
        handle = model.text_model.final_layer_norm.register_forward_hook(lambda *_: None)
        for _ in range(3):
            model(**batch)
        handle.remove()
        assert len(calls) == 7 and model.known_texts.last is None
        model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
        model.eval()
        adapted = [model(**batch).text_embeds for _ in range(3)][-1]
        model.disable_adapters()
        assert not torch.equal(model(**batch).text_embeds, adapted)


def test_pipeline_embeds_its_labels_twice_for_many_images():
    model, processor = tiny_pair()
    calls, forward = [], model.text_model.forward
    model.text_model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    classify = pipeline("zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
                        image_processor=processor.image_processor)  # fmt: skip
    pictures = [Image.new("RGB", (30, 30), (20 * number, 90, 200)) for number in range(6)]
    labels = ["a dog", "a red square", "two yellow triangles"]
    together = classify(pictures, candidate_labels=labels)
    assert len(calls) == 2
    for picture, found in zip(pictures, together, strict=True):
        model.known_texts.last = None
        single = classify(picture, candidate_labels=labels)
        assert [entry["label"] for entry in found] == [entry["label"] for entry in single]
        assert_close([entry["score"] for entry in found], [entry["score"] for entry in single])
