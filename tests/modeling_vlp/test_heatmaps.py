"""Where BLIP looks: shapes, words, and that the maps are what a match depends on. Run: pytest tests/test_heatmaps.py"""

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
def test_a_map_for_each_word_that_is_written(tower):
    model, processor, pixels = parts(tower)
    writer = vlp.VlpBlipForConditionalGeneration.sharing(model)
    before = writer.config._attn_implementation
    heat = attention_maps(writer, processor, pixels, num_beams=1, max_length=9)
    assert heat.words and len(heat.maps) == len(heat.words)
    written = processor.write(writer.generate(pixels, num_beams=1, max_length=9, do_sample=False))[0]
    assert " ".join(heat.words).replace(" ", "") == written.replace(" ", "")
    assert heat.maps.min() >= 0 and heat.maps.flatten(1).sum(1).max() <= 1 + 1e-5
    assert writer.config._attn_implementation == before


def test_what_speaks_for_a_match_is_what_its_logit_depends_on(monkeypatch):
    """Attention times its gradient, where finite differences of the logit of "match" are that gradient."""
    model, processor, pixels = parts()
    model, pixels, text = model.double(), pixels.double(), "two yellow triangles and a dog"
    heat = matching_maps(model, processor, pixels, text)
    assert heat.words == ["match", *text.split()] and heat.maps.shape == (7, 4, 4)
    second = model.text_model.layers[1].cross_attention.attention  # of three layers
    ids, original, seen = processor.read_texts([text], 40)["input_ids"], attention.eager_attention, {}

    @torch.no_grad()
    def logit(more: torch.Tensor) -> float:
        """Of "match", where the weights of the second layer are `more`."""

        def attend(module, query, key, value, *args, **kwargs):
            output, weights = original(module, query, key, value, *args, **kwargs)
            if module is second:
                seen["weights"] = weights
                output = ((weights + more) @ value).transpose(1, 2)
            return output, weights

        monkeypatch.setattr(attention, "eager_attention", attend)
        model.set_attn_implementation("eager")
        memory = model.read(model.encode_image(pixels).last_hidden_state)
        return model.match(ids, None, memory, pack=False)[0, 1].item()

    logit(torch.zeros(()))
    weights = seen["weights"]  # (1, H, N, M)
    word = 2  # "yellow", the second token after [ENC]
    cell = torch.zeros(weights.shape[-1])
    for head in range(weights.shape[1]):
        gradient = torch.zeros_like(cell)
        for place in range(len(cell)):
            step = torch.zeros_like(weights)
            step[0, head, word, place] = 1e-3
            gradient[place] = (logit(step) - logit(-step)) / 2e-3
        given = weights[0, head, word].float()
        cell += given * (gradient - (given * gradient).sum()).clamp(min=0) / weights.shape[1]
    assert (cell > 0).any()
    torch.testing.assert_close(heat.maps[word].flatten().float(), cell[1:], rtol=1e-3, atol=1e-7)


def test_a_model_of_one_layer_tells_of_the_whole_alone():
    model, processor, pixels = parts()
    model.text_model.layers = model.text_model.layers[:1]
    heat = matching_maps(model, processor, pixels, "a red square")
    assert heat.words == ["match"] and heat.maps.sum() > 0


def test_parts_of_words_are_put_together():
    _, processor, _ = parts()
    ids = processor.read_texts(["redsquare dog"], 30)["input_ids"][0]
    heat = by_word(processor, ids, torch.ones(len(ids), 2, 2))
    assert heat.words == ["redsquare", "dog"] and heat.maps.shape == (2, 2, 2)


def test_patches_that_make_no_square():
    assert to_grid(torch.rand(3, 17)).shape == (3, 4, 4) and to_grid(torch.rand(3, 16)).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="15 tokens of an image make no square"):
        to_grid(torch.rand(3, 15))
