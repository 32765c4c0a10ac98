"""Towers of transformers and timm: their features are exactly those of the model's own class, in every use."""

import json

import pytest
import torch
from conftest import TEXT, VIT, tiny_pair
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessorPil,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTImageProcessorPil,
    pipeline,
)
from vlp.modeling_vlp.exchange.places import ExchangeError
from vlp.modeling_vlp.towers import frozen_parts, layers_of, lock
from vlp.processing.clip import VlpClipImageProcessor
from vlp.training.machine.optim import levels_below_top

import vlp
from vlp.conversion import convert
from vlp.errors import ArgumentError, UnsupportedModelError
from vlp.inference import load
from vlp.towers import foreign_image_options, text_start, vision_start


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PATCHES = {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 32, "patch_size": 4}


def first(output):
    return output.last_hidden_state[:, 0]


def own(output):
    return output.pooler_output.flatten(1)


# For each kind of image encoder: its configuration, and the features that its own class gives.
IMAGES = {
    "vit": (SIZES | PATCHES, first),
    "deit": (SIZES | PATCHES, first),
    "beit": (SIZES | PATCHES, lambda output: output.last_hidden_state[:, 1:].mean(1)),
    "dinov2": (SIZES | PATCHES, first),
    "dinov2_with_registers": (SIZES | PATCHES | {"num_register_tokens": 2}, first),
    "dinov3_vit": (SIZES | PATCHES | {"num_register_tokens": 2}, first),
    "dinov3_convnext": (STAGES, own),
    "swin": (WINDOWS, own),
    "swinv2": (WINDOWS, own),
    "convnext": (STAGES, own),
    "convnextv2": (STAGES, own),
    "resnet": (STAGES | {"embedding_size": 8}, own),
    "efficientnet": ({"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}, own),
    "mobilenet_v2": ({"image_size": 32, "depth_multiplier": 0.25}, own),
    "clip_vision_model": (SIZES | PATCHES, own),
    "siglip_vision_model": (SIZES | PATCHES, own),
    "timm_wrapper": ({"architecture": "test_vit"}, own),
}
VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "green", "blue", "square", "two", "dogs"]
WORDS = SIZES | {"vocab_size": 20, "max_position_embeddings": 48, "pad_token_id": 0}
TEXTS = {
    "bert": WORDS,
    "roberta": WORDS,
    "xlm-roberta": WORDS,
    "camembert": WORDS,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 20, "pad_token_id": 0,
                   "max_position_embeddings": 48},
    "mpnet": WORDS,
    "modernbert": WORDS | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "electra": WORDS | {"embedding_size": 32},
    "clip_text_model": WORDS | {"eos_token_id": 2, "bos_token_id": 1},
}  # fmt: skip
CAPTIONS = ["a red square", "two dogs", "a blue"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer that puts [CLS] before a text and [SEP] after it."""
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    special = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", eos_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=20, **special)


def image_folder(kind: str, folder):
    """Save a random image encoder of transformers with its image processor, and return the model."""
    if kind == "timm_wrapper":
        pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**IMAGES[kind][0])
    if kind == "timm_wrapper":
        config.pretrained_cfg = {"input_size": [3, 160, 160], "mean": [0.4] * 3, "std": [0.3] * 3, "crop_pct": 0.9}
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    images = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    if kind != "timm_wrapper":  # timm's preprocessing is in its configuration
        images.save_pretrained(folder)
    return model


def text_folder(kind: str, folder):
    """Save a random text encoder of transformers with a tokenizer, and return the model."""
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[kind](**TEXTS[kind])).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def joined(vision=None, text=None, **fields):
    """A CLIP with the weights of the given starts, and small towers of vlp where there is none, with its processor."""
    config = vlp.VlpClipConfig(
        vision_config=VIT if vision is None else vision.config,
        text_config=TEXT if text is None else text.config,
        projection_dim=16,
        **fields,
    )
    model = vlp.VlpClipModel(config).eval()
    for start in (vision, text):
        if start is not None:
            start.load_into(model)
    side = config.vision_config.image_size
    images = VlpClipImageProcessor(size={"height": side, "width": side}, do_center_crop=False)
    words = tiny_pair()[1].tokenizer if text is None else text.tokenizer(20)
    return model, vlp.VlpClipProcessor(images, words)


def check_uses(model, processor, tmp_path) -> None:
    """Save and load by Auto classes, classify in the pipeline, and check that nothing changes."""
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    again = AutoModel.from_pretrained(tmp_path / "clip")
    loaded = AutoProcessor.from_pretrained(tmp_path / "clip")
    picture = Image.new("RGB", (40, 40), "red")
    inputs = loaded(images=picture, text=CAPTIONS, return_tensors="pt")
    with torch.no_grad():
        assert_close(again(**inputs).logits_per_image, model(**inputs).logits_per_image, rtol=1e-5, atol=1e-5)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "clip"))
    found = classify(picture, candidate_labels=CAPTIONS, hypothesis_template="{}")
    with torch.no_grad():
        best = model(**inputs).logits_per_image[0].argmax()
    assert found[0]["label"] == CAPTIONS[best]


@pytest.mark.parametrize("kind", IMAGES)
def test_image_tower_gives_the_features_of_its_own_class(kind, tmp_path):
    theirs = image_folder(kind, tmp_path / "source")
    start = vision_start(str(tmp_path / "source"), "--image_tower")
    model, processor = joined(vision=start)
    side = start.config.image_size
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        output = model.vision_model(pixels)
        expected = IMAGES[kind][1](theirs(pixels))
    assert_close(output.pooler_output, expected, rtol=1e-5, atol=1e-5)
    assert output.last_hidden_state.shape[::2] == (2, start.config.hidden_size) and expected.std() > 0
    check_uses(model, processor, tmp_path)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_tower_gives_the_features_of_its_own_class(kind, tmp_path):
    theirs = text_folder(kind, tmp_path / "source")
    start = text_start(str(tmp_path / "source"), "--text_tower")
    model, processor = joined(text=start)
    tokens = processor.tokenize(CAPTIONS, 20)
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output, other = model.text_model(tokens["input_ids"]), theirs(**inputs)
    mask = tokens["attention_mask"][..., None].float()
    expected = (other.last_hidden_state * mask).sum(1) / mask.sum(1)
    if kind == "clip_text_model":
        expected = other.pooler_output
    assert_close(output.pooler_output, expected, rtol=1e-5, atol=1e-5)
    check_uses(model, processor, tmp_path)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("layers", [0, 1])
def test_gradients_reach_what_is_unlocked_and_nothing_else(kind, layers, tmp_path):
    image_folder(kind, tmp_path)
    model, _ = joined(vision=vision_start(str(tmp_path), "--image_tower"))
    tower = model.vision_model
    lock(tower, layers)
    side = model.config.vision_config.image_size
    model.train()
    for part in frozen_parts(model):
        part.eval()
    model.get_image_features(torch.randn(2, 3, side, side)).pooler_output.square().sum().backward()
    found = layers_of(tower)
    unlocked = {id(parameter) for parameter in found[-1].parameters()} if layers else set()
    assert len(found) >= 2 and all(p.requires_grad == (id(p) in unlocked) for p in found[0].parameters())
    with_gradient = {id(p) for p in tower.parameters() if p.grad is not None}
    assert with_gradient <= {id(p) for p in tower.parameters() if p.requires_grad}
    assert bool(with_gradient & unlocked) == bool(layers) and model.visual_projection.weight.grad is not None


def test_locked_batch_norm_and_unlocked_stages(tmp_path):
    image_folder("resnet", tmp_path)
    model, _ = joined(vision=vision_start(str(tmp_path), "--image_tower"))
    lock(model.vision_model, 2)
    names = {name for name, parameter in model.vision_model.named_parameters() if parameter.requires_grad}
    assert names and all("stages.2" in name or "stages.3" in name for name in names)
    with pytest.raises(ValueError, match="the tower has 4 layers, so 5 cannot be unlocked"):
        lock(model.vision_model, 5)
    levels = {levels_below_top(model, f"vision_model.{name}") for name, _ in model.vision_model.named_parameters()}
    assert levels == {1, 2, 3, 4, 5}


def test_pooling_of_sentence_encoders_is_read_and_can_be_set(tmp_path):
    theirs = text_folder("bert", tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    start = text_start(str(tmp_path), "--text_tower")
    assert (start.config.pooling, start.config.max_position_embeddings) == ("cls", 12)
    tokens = tokenizer()(CAPTIONS, padding=True, return_tensors="pt")
    states = theirs(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    last = tokens["attention_mask"].sum(1) - 1
    expected = {
        "cls": states[:, 0],
        "eos": states[torch.arange(3), last],
        "max": states.masked_fill(tokens["attention_mask"][..., None] == 0, -torch.inf).amax(1),
    }
    for pooling, value in expected.items():
        model, _ = joined(text=text_start(str(tmp_path), "--text_tower", pooling))
        assert_close(model.text_model(tokens["input_ids"]).pooler_output, value, rtol=1e-5, atol=1e-5)


def test_phobert_with_its_own_tokenizer(tmp_path):
    text_folder("roberta", tmp_path / "text")
    for path in (tmp_path / "text").glob("*token*"):
        path.unlink()
    (tmp_path / "text" / "vocab.txt").write_text("".join(f"{word}</w> 9\n" for word in ("một", "ô", "vuông", "đỏ")))
    (tmp_path / "text" / "bpe.codes").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "PhobertTokenizer", "model_max_length": 20}
    (tmp_path / "text" / "tokenizer_config.json").write_text(json.dumps(settings))
    start = text_start(str(tmp_path / "text"), "--text_tower")
    model, processor = joined(text=start)
    assert type(processor.tokenizer).__name__ == "PhobertTokenizer" and start.config.pad_token_id == 1
    ids = processor.tokenize(["một ô vuông", "đỏ"], 20)["input_ids"]
    assert ids[1, -1] == 1 and ids.max() < 20
    check_uses(model, processor, tmp_path)


def test_stages_are_pooled_on_request(tmp_path):
    theirs = image_folder("convnext", tmp_path)
    start = vision_start(str(tmp_path), "--image_tower", "stages")
    assert start.config.hidden_size == 8 + 8 + 16 + 24 + 32 + 32  # the stem, four stages, the pooled output
    model, _ = joined(vision=start)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = theirs(pixels, output_hidden_states=True)
        expected = [states.mean((2, 3)) for states in output.hidden_states] + [output.pooler_output]
        assert_close(model.vision_model(pixels).pooler_output, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_files_of_timm_itself_are_read(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    torch.manual_seed(0)
    theirs = timm.create_model("test_convnext", num_classes=5).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    facts = {"input_size": [3, 160, 160], "mean": [0.4] * 3, "std": [0.3] * 3, "crop_pct": 0.9}
    config = {"architecture": "test_convnext", "num_classes": 5, "pretrained_cfg": facts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = vision_start(str(tmp_path), "--image_tower")
    model, _ = joined(vision=start)
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
        found = model.vision_model(pixels)
    assert start.config.image_size == 160 and start.images()["size"] == {"shortest_edge": 177}
    states = theirs.forward_features(pixels).flatten(2).transpose(1, 2)
    assert_close(found.last_hidden_state, states, rtol=1e-5, atol=1e-5)
    assert found.pooler_output.shape == expected.shape and found.pooler_output.std() > 0


def test_preprocessing_equals_that_of_the_source(tmp_path):
    rng = torch.Generator().manual_seed(0)
    noise = Image.fromarray(torch.randint(0, 255, (7, 9, 3), generator=rng, dtype=torch.uint8).numpy())
    picture = noise.resize((160, 128), Image.Resampling.BICUBIC)
    sources = [
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3),
        ConvNextImageProcessorPil(size={"shortest_edge": 48}, crop_pct=0.75),
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    ]
    for number, theirs in enumerate(sources):
        image_folder("vit", tmp_path / str(number))
        theirs.save_pretrained(tmp_path / str(number))
        ours = VlpClipImageProcessor(**foreign_image_options(str(tmp_path / str(number)), ""))
        expected = theirs(picture, return_tensors="pt")["pixel_values"]
        found = ours(picture, return_tensors="pt")["pixel_values"]
        assert found.shape == expected.shape and (found - expected).abs().mean() < 0.05 * expected.std()


def test_wrong_starts_are_refused_by_name(tmp_path):
    image_folder("vit", tmp_path / "vit")
    text_folder("bert", tmp_path / "bert")
    (tmp_path / "silent").mkdir()
    AutoModel.from_config(CONFIG_MAPPING["bert"](**WORDS)).save_pretrained(tmp_path / "silent")
    llama = CONFIG_MAPPING["llama"](vocab_size=20, num_key_value_heads=2, **SIZES)
    AutoModel.from_config(llama).save_pretrained(tmp_path / "llama")
    cases = [
        (vision_start, "bert", {}, "bert is a bert, not an image encoder"),
        (text_start, "vit", {}, "vit is a vit, not a text encoder"),
        (text_start, "llama", {}, "llama is a llama, not a text encoder"),
        (text_start, "silent", {}, "silent: .*tokenizer"),
        (text_start, "bert", {"max_length": 99}, "--max_length 99 is above the 48 tokens"),
        (text_start, "bert", {"pooling": "sum"}, "the text pooling must be one of mean, cls"),
        (vision_start, "vit", {"pooling": "sum"}, "the image pooling must be one of pooler, cls"),
        (vision_start, "nothing", {}, "nothing: the configuration cannot be loaded: there is no such folder"),
    ]
    for find, name, options, message in cases:
        with pytest.raises((ArgumentError, UnsupportedModelError), match=message):
            find(str(tmp_path / name), "--tower", **options)
    text_folder("distilbert", tmp_path / "distilbert")
    with pytest.raises(UnsupportedModelError, match="pooling pooler: it has no pooled output"):
        text_start(str(tmp_path / "distilbert"), "--text_tower", "pooler")


def test_classifiers_serve_as_towers_without_their_heads(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(CONFIG_MAPPING["vit"](**IMAGES["vit"][0])).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    clip, _ = joined(vision=vision_start(str(tmp_path), "--image_tower"))
    pixels = torch.randn(1, 3, 32, 32)
    assert_close(clip.vision_model(pixels).pooler_output, model.vit(pixels).last_hidden_state[:, 0])


def test_towers_of_vlp_and_their_projection(tmp_path):
    model, processor = tiny_pair()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    start, words = vision_start(str(tmp_path), "--image_tower"), text_start(str(tmp_path), "--text_tower")
    assert start.brings_projection(model.config) and words.brings_projection(model.config)
    copy = vlp.VlpClipModel(model.config)
    start.load_into(copy, "visual_projection")
    assert torch.equal(copy.visual_projection.weight, model.visual_projection.weight)
    assert not torch.equal(copy.text_projection.weight, model.text_projection.weight)


def test_dual_encoders_of_transformers_both_ways(tmp_path):
    vision, text = image_folder("vit", tmp_path / "vit"), text_folder("bert", tmp_path / "bert")
    theirs = VisionTextDualEncoderModel.from_vision_text_pretrained(
        str(tmp_path / "vit"), str(tmp_path / "bert"), projection_dim=16
    ).eval()
    with torch.no_grad():
        for head in (theirs.visual_projection, theirs.text_projection):
            head.weight.normal_()
    images = ViTImageProcessorPil(size={"height": 32, "width": 32})
    theirs.save_pretrained(tmp_path / "theirs")
    VisionTextDualEncoderProcessor(images, tokenizer()).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours, processor = AutoModel.from_pretrained(tmp_path / "ours"), AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(ours) is vlp.VlpClipModel and vision and text
    inputs = processor(images=Image.new("RGB", (40, 40), "red"), text=CAPTIONS, return_tensors="pt")
    names = ("input_ids", "attention_mask", "pixel_values")
    with torch.no_grad():
        expected = theirs(**{name: inputs[name] for name in names}).logits_per_image
        assert_close(ours(**inputs).logits_per_image, expected, rtol=1e-5, atol=1e-5)
    convert(tmp_path / "ours", tmp_path / "back", to="transformers")
    back = VisionTextDualEncoderModel.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert_close(back(**{name: inputs[name] for name in names}).logits_per_image, expected, rtol=1e-5, atol=1e-5)
    predictor = load(str(tmp_path / "theirs"), "embed")  # converted into the cache folder
    assert type(predictor.model) is vlp.VlpClipModel
    with pytest.raises(ExchangeError, match="open_clip has no VlpClipModel with towers of transformers"):
        convert(tmp_path / "ours", tmp_path / "open", to="open_clip")


def test_export_says_what_a_dual_encoder_lacks(tmp_path):
    text_folder("bert", tmp_path / "bert")
    model, processor = joined(text=text_start(str(tmp_path / "bert"), "--text_tower"), text_projection_hidden_size=8)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    message = "this model has a vlp_vit, the pooling mean, projections with more than one layer"
    with pytest.raises(ExchangeError, match=message):
        convert(tmp_path / "ours", tmp_path / "theirs", to="transformers")
