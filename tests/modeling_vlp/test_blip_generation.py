"""Caption generation matches transformers' BLIP token for token and supports the options of `generate`."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import BlipConfig, BlipForConditionalGeneration, TextStreamer
from vlp.modeling_vlp.exchange.places import import_state
from vlp.modeling_vlp.exchange.transformers import IGNORED, rules_of
from vlp.processing.blip import train_tokenizer

import vlp

VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 4, "layer_norm_eps": 1e-6}  # fmt: skip
TEXT = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 40}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 118}
RULES = rules_of(vlp.VlpBlipConfig(), "VlpBlipForConditionalGeneration")


def load_from_transformers(ours: vlp.VlpBlipForConditionalGeneration, theirs: BlipForConditionalGeneration) -> None:
    ours.load_state_dict(import_state(theirs.state_dict(), ours.state_dict(), RULES, IGNORED))


@pytest.fixture(scope="module")
def pair() -> tuple[vlp.VlpBlipForConditionalGeneration, BlipForConditionalGeneration]:
    """Our captioner and transformers' with the same random weights, large enough for varied captions."""
    torch.manual_seed(0)
    config = BlipConfig(
        vision_config=VISION, text_config=TEXT | TOKENS | {"eos_token_id": 3, "sep_token_id": 3}, projection_dim=16
    )
    theirs = BlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.25)
    ours = vlp.VlpBlipForConditionalGeneration(
        vlp.VlpBlipConfig(vision_config=VISION, text_config=TEXT | TOKENS | {"eos_token_id": 3, "enc_token_id": 119})
    ).eval()
    load_from_transformers(ours, theirs)
    return ours, theirs


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_match_transformers(pair, pixels):
    ours, theirs = pair
    ids = torch.randint(4, 118, (2, 7), generator=torch.Generator().manual_seed(2))
    expected = theirs(pixel_values=pixels, input_ids=ids).logits
    assert_close(ours(pixels, ids).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 5, "length_penalty": 2.0}])
@pytest.mark.parametrize("prompt", [None, [2, 17, 30, 55, 3]])
def test_generate_matches_transformers(pair, pixels, options, prompt):
    ours, theirs = pair
    # Without this constraint, random weights generate one token repeatedly.
    options = options | {"do_sample": False, "max_new_tokens": 12, "no_repeat_ngram_size": 1}
    ids = None if prompt is None else torch.tensor([prompt] * 2)
    expected = theirs.generate(pixels, input_ids=None if ids is None else ids.clone(), **options)
    assert torch.equal(ours.generate(pixels, input_ids=ids, **options), expected)
    assert len(set(expected.flatten().tolist())) > 8


def test_images_are_encoded_once_for_all_beams_and_steps(pair, pixels, monkeypatch):
    ours, _ = pair
    projected, encoded = [], []
    projection = ours.text_model.layers[0].cross_attention.attention.k_proj
    handle = projection.register_forward_hook(lambda module, inputs, output: projected.append(len(output)))
    vision = ours.vision_model.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    ours.generate(pixels, num_beams=4, max_new_tokens=10)
    handle.remove(), vision.remove()
    assert projected == [2] and encoded == [2]


def test_batched_prompts_match_single_prompts(pair, pixels):
    ours, _ = pair
    prompts = torch.tensor([[2, 17, 30, 55, 3], [2, 9, 3, 0, 0]])
    together = ours.generate(pixels, input_ids=prompts, num_beams=3, max_new_tokens=8)
    for row, length in enumerate((5, 3)):
        single = ours.generate(pixels[row : row + 1], input_ids=prompts[row : row + 1, :length], num_beams=3,
                              max_new_tokens=8)  # fmt: skip
        kept = together[row][together[row] != 0]
        assert torch.equal(kept, single[0][single[0] != 0])


def test_static_cache_and_no_cache_give_the_same_captions(pair, pixels):
    ours, _ = pair
    options = {"num_beams": 3, "max_new_tokens": 8}
    expected = ours.generate(pixels, **options)
    assert torch.equal(ours.generate(pixels, cache_implementation="static", **options), expected)
    assert torch.equal(ours.generate(pixels, use_cache=False, **options), expected)


def test_sampling_constraints_and_multiple_captions(pair, pixels):
    ours, _ = pair
    torch.manual_seed(0)
    nucleus = ours.generate(pixels, do_sample=True, top_p=0.9, num_return_sequences=3, max_new_tokens=6)
    assert nucleus.shape[0] == 6 and len({tuple(row) for row in nucleus.tolist()}) > 2
    top = ours.generate(pixels, do_sample=True, top_k=1, max_new_tokens=6)
    assert torch.equal(top, ours.generate(pixels, do_sample=False, max_new_tokens=6))
    banned = ours.generate(pixels, bad_words_ids=[[int(top[0, 1])]], do_sample=False, max_new_tokens=6)
    assert int(top[0, 1]) not in banned[0].tolist()
    forced = ours.generate(pixels, min_new_tokens=5, max_new_tokens=5, forced_eos_token_id=3, do_sample=False)
    assert forced[:, -1].tolist() == [3, 3] and (forced[:, 1:-1] != 3).all()
    beams = ours.generate(pixels, num_beams=4, num_return_sequences=2, max_new_tokens=6, return_dict_in_generate=True,
                          output_scores=True)  # fmt: skip
    assert beams.sequences.shape[0] == 4 and beams.sequences_scores[0] >= beams.sequences_scores[1]


def test_training_loss_matches_the_loss_of_all_logits(pair, pixels):
    ours, _ = pair
    ids = torch.randint(4, 118, (2, 7), generator=torch.Generator().manual_seed(2))
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    evaluated = ours(pixels, ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        evaluated.logits[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten(), label_smoothing=0.1
    )
    assert_close(evaluated.loss, expected)
    ours.text_model.config.hidden_dropout_prob = 0.0
    trained = vlp.VlpBlipForConditionalGeneration(ours.config)
    trained.load_state_dict(ours.state_dict())
    for module in trained.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours.config.text_config.attention_probs_dropout_prob = 0.0
    output = trained.train()(pixels, ids, labels=labels)
    assert output.logits is None
    assert_close(output.loss, expected)


@torch.no_grad()
def test_head_gives_the_same_logits_for_few_and_many_rows(pair):
    head = pair[0].lm_head
    rows = torch.randn(40, 1, 32, generator=torch.Generator().manual_seed(0))
    parts = torch.cat([head(part) for part in rows.split(6)])
    assert_close(parts, head(rows), rtol=1e-5, atol=1e-5 * parts.abs().max().item())


def test_missing_images_and_uneven_groups_are_rejected(pair, pixels):
    ours, _ = pair
    with pytest.raises(ValueError, match="needs pixel_values"):
        ours(input_ids=torch.tensor([[118, 5]]))
    with pytest.raises(ValueError, match="3 texts cannot be divided evenly among 2 images"):
        ours(pixels, torch.full((3, 2), 5))


def test_captions_can_be_streamed(capsys):
    tokenizer = train_tokenizer(["a red square", "a green circle"], 200, 20)
    text = TEXT | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": 3,
                   "enc_token_id": len(tokenizer) - 1}  # fmt: skip
    torch.manual_seed(0)
    model = vlp.VlpBlipForConditionalGeneration(vlp.VlpBlipConfig(vision_config=VISION, text_config=text)).eval()
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    processor = vlp.VlpBlipProcessor(images, tokenizer)
    inputs = processor(images=Image.new("RGB", (40, 30), "red"), text="A red", return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    ids = model.generate(**inputs, streamer=streamer, max_new_tokens=4, do_sample=False)
    streamed = capsys.readouterr().out.strip()
    assert processor.decode_texts(ids) == [streamed] and streamed.startswith("a red")
    assert processor.decode_texts(ids, prompt="A red") == [streamed.removeprefix("a red").strip()]


def test_default_length_gives_no_warning(recwarn):
    """The default is 20 new tokens, as in transformers."""
    from conftest import tiny_blip

    captioner, pixels = vlp.VlpBlipForConditionalGeneration.sharing(tiny_blip().eval()), torch.randn(1, 3, 32, 32)
    plain = captioner.generate(pixels, do_sample=False, eos_token_id=-1)
    assert plain.shape == (1, 21) and not [w for w in recwarn if "max_length" in str(w.message)]
    assert torch.equal(plain, captioner.generate(pixels, do_sample=False, eos_token_id=-1, max_length=21))
    captioner.generation_config.max_new_tokens = 3
    assert captioner.generate(pixels, do_sample=False, eos_token_id=-1).shape == (1, 4)
