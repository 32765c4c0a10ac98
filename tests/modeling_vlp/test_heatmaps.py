"""Heat maps of BLIP: shapes, words, and gradients checked by finite differences."""

import pytest
import torch
from conftest import CAPTIONS, tiny_blip
from vlp.modeling_vlp import attention
from vlp.modeling_vlp.heatmaps import attention_maps, by_word, matching_maps, to_grid
from vlp.processing.blip import VlpBlipImageProcessor, VlpBlipProcessor, train_tokenizer

import vlp


def parts(tower: str = "vit"):
    tokenizer = train_tokenizer(CAPTIONS, 118, 30)
    side = 32 if tower == "vit" else 64
    processor = VlpBlipProcessor(VlpBlipImageProcessor(size={"height": side, "width": side}), tokenizer)
    return tiny_blip(tower).eval(), processor, torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_one_map_per_generated_word(tower):
    model, processor, pixels = parts(tower)
    captioner = vlp.VlpBlipForConditionalGeneration.sharing(model)
    before = captioner.config._attn_implementation
    heat = attention_maps(captioner, processor, pixels, num_beams=1, max_length=9)
    assert heat.words and len(heat.maps) == len(heat.words)
    caption = processor.decode_texts(captioner.generate(pixels, num_beams=1, max_length=9, do_sample=False))[0]
    assert " ".join(heat.words).replace(" ", "") == caption.replace(" ", "")
    assert heat.maps.min() >= 0 and heat.maps.flatten(1).sum(1).max() <= 1 + 1e-5
    assert captioner.config._attn_implementation == before


def test_matching_maps_agree_with_finite_differences(monkeypatch):
    """Maps are attention times its gradient; here, finite differences of the match logit give the gradient."""
    model, processor, pixels = parts()
    model, pixels, text = model.double(), pixels.double(), "two yellow triangles and a dog"
    heat = matching_maps(model, processor, pixels, text)
    assert heat.words == ["match", *text.split()] and heat.maps.shape == (7, 4, 4)
    second = model.text_model.layers[1].cross_attention.attention  # of three layers
    ids, original, captured = processor.tokenize([text], 40)["input_ids"], attention.eager_attention, {}

    @torch.no_grad()
    def logit(delta: torch.Tensor) -> float:
        """The match logit, with `delta` added to the attention weights of the second layer."""

        def attend(module, query, key, value, *args, **kwargs):
            output, weights = original(module, query, key, value, *args, **kwargs)
            if module is second:
                captured["weights"] = weights
                output = ((weights + delta) @ value).transpose(1, 2)
            return output, weights

        monkeypatch.setattr(attention, "eager_attention", attend)
        model.set_attn_implementation("eager")
        memory = model.memory_of(model.encode_image(pixels).last_hidden_state)
        return model.match(ids, None, memory, pack=False)[0, 1].item()

    logit(torch.zeros(()))
    weights = captured["weights"]  # (1, H, N, M)
    word = 2  # "yellow", the second token after [ENC]
    cell = torch.zeros(weights.shape[-1])
    for head in range(weights.shape[1]):
        gradient = torch.zeros_like(cell)
        for patch in range(len(cell)):
            step = torch.zeros_like(weights)
            step[0, head, word, patch] = 1e-3
            gradient[patch] = (logit(step) - logit(-step)) / 2e-3
        row_weights = weights[0, head, word].float()
        cell += row_weights * (gradient - (row_weights * gradient).sum()).clamp(min=0) / weights.shape[1]
    assert (cell > 0).any()
    torch.testing.assert_close(heat.maps[word].flatten().float(), cell[1:], rtol=1e-3, atol=1e-7)


def test_one_layer_model_maps_only_the_whole_text():
    model, processor, pixels = parts()
    model.text_model.layers = model.text_model.layers[:1]
    heat = matching_maps(model, processor, pixels, "a red square")
    assert heat.words == ["match"] and heat.maps.sum() > 0
    model.config.itm_pooling = "mean"  # every word's state affects the match
    heat = matching_maps(model, processor, pixels, "a red square")
    assert heat.words == ["match", "a", "red", "square"] and (heat.maps.flatten(1).sum(dim=1) > 0).all()


def test_word_pieces_are_merged():
    _, processor, _ = parts()
    ids = processor.tokenize(["redsquare dog"], 30)["input_ids"][0]
    heat = by_word(processor, ids, torch.ones(len(ids), 2, 2))
    assert heat.words == ["redsquare", "dog"] and heat.maps.shape == (2, 2, 2)


def test_patches_must_form_a_square():
    assert to_grid(torch.rand(3, 17)).shape == (3, 4, 4) and to_grid(torch.rand(3, 16)).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="15 image tokens do not form a square grid"):
        to_grid(torch.rand(3, 15))
