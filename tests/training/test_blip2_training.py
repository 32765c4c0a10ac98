"""Tests of complete small BLIP-2 runs: stage 1, stage 2, adapters, cached features, initialisation and errors."""

import csv
import json
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import save_language_model, tiny_blip2, tiny_language_model, what_the_card_says
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoProcessor, AutoTokenizer, BertConfig, BertForMaskedLM, TextIteratorStreamer, pipeline
from vlp.processing.blip2 import QUESTION, prompt_of
from vlp.training.data.batches import Collator
from vlp.training.data.features import Features, compute_features, key_of
from vlp.training.data.rows import BadRow, CaptionChooser
from vlp.training.data.samples import Sample
from vlp.training.families import blip2
from vlp.training.families.blip import BlipArguments
from vlp.training.families.blip2 import Blip2Arguments
from vlp.training.families.clip import ClipArguments
from vlp.training.machine.optim import OFFSETS_RATE, parameter_groups
from vlp.training.run import train

import vlp
from vlp.errors import ArgumentError, UnsupportedModelError
from vlp.files import state_folder, states
from vlp.inference import load
from vlp.loading import load_auto_tokenizer, load_model

COLOURS = ["red", "green", "blue", "yellow", "black", "orange", "purple", "brown"]
CAPTIONS = [f"a {colour} card" for colour in COLOURS]
TOWER = {"model_type": "vlp_modified_resnet", "depths": [1, 1], "embedding_size": 8}
QFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
           "max_position_embeddings": 16, "initializer_range": 0.1, "hidden_dropout_prob": 0.0,
           "attention_probs_dropout_prob": 0.0}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="module")
def separate_feature_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Cards in eight colours; eight of the 40 rows are the test split."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["image,caption,split"]
    for number in range(40):
        colour = COLOURS[number % 8]
        Image.new("RGB", (16 + number // 8, 16), colour).save(folder / f"{number}.png")
        lines.append(f"{number}.png,A {colour} card,{'test' if number >= 32 else 'train'}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def common(pairs, output_dir, **changes) -> dict:
    defaults = dict(
        dataset_name=str(pairs), output_dir=str(output_dir), eval_split="test", image_size=16, max_length=10,
        vocab_size=120, augmentation="none", per_device_train_batch_size=16, learning_rate=4e-3, warmup_steps=2,
        max_train_steps=4, report_to="none", mixed_precision="no", logging_steps=1, num_threads=1,
    )  # fmt: skip
    return defaults | changes


def arguments(pairs, output_dir, **changes) -> Blip2Arguments:
    if not {"model_name_or_path", "model"} & changes.keys():
        changes["model"] = {"num_query_tokens": 3, "image_text_hidden_size": 16, "qformer_config": dict(QFORMER)}
    return Blip2Arguments(**common(pairs, output_dir, rerank_top_k=4, **changes))


@pytest.fixture(scope="module")
def towers(pairs, tmp_path_factory) -> Path:
    """Two CLIP models (ResNet and ViT) and a BLIP model, trained for a few steps."""
    folder = tmp_path_factory.mktemp("towers")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = text | {"num_hidden_layers": 3, "patch_size": 8}
    for name, vision, steps in (("clip", TOWER, 60), ("vit", vit, 4)):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = {"projection_dim": 24, "vision_config": dict(vision), "text_config": dict(text)}
        train(ClipArguments(**common(pairs, folder / name, vocab_size=600, max_train_steps=steps, model=model)))
    AcceleratorState._reset_state(reset_partial_state=True)
    text |= {"max_position_embeddings": 16, "num_hidden_layers": 2}
    med = {"image_text_hidden_size": 16, "vision_config": TOWER, "text_config": text}
    train(BlipArguments(**common(pairs, folder / "blip", queue_size=16, eval_split=None, model=med)))
    return folder


@pytest.fixture(scope="module")
def stage_1(pairs, towers, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "stage-1"
    train(arguments(pairs, folder, vision_tower=str(towers / "clip"), max_train_steps=500, cache_vision_features=True))
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    save_language_model(folder, [*(caption.replace("a ", "A ", 1) for caption in CAPTIONS), "it is", "is it what?"])
    return folder


@pytest.fixture(scope="module")
def stage_2(pairs, stage_1, language_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "stage-2"
    train(arguments(pairs, folder, stage=2, model_name_or_path=str(stage_1), max_train_steps=200, prompt="it is",
                    language_model_name_or_path=str(language_model), cache_vision_features=True, eval_num_beams=2,
                    example_prompts="it is|what is it?"))  # fmt: skip
    return folder


def test_stage_1_learns_itc_itm_and_itg(stage_1, towers):
    results = json.loads((stage_1 / "results.json").read_text())
    metrics, first, last = results["metrics"], results["history"][0], results["history"][-1]
    assert set(results["losses"]) == {"itc", "itm", "itg"}
    assert last["itm"] < first["itm"] / 2 and last["itg"] < first["itg"] / 2 and last["itc"] < first["itc"]
    for name in ("text_to_image_recall_at_1", "reranked_image_to_text_recall_at_1", "itm_accuracy"):
        assert metrics[name] >= 0.85, (name, metrics[name])
    ours, theirs = load_file(stage_1 / "model.safetensors"), load_file(towers / "clip" / "model.safetensors")
    for name, value in theirs.items():
        if name.startswith("vision_model."):
            assert torch.equal(ours[name], value), name


def test_stage_1_folder_retrieves(stage_1, monkeypatch):
    processor = AutoProcessor.from_pretrained(stage_1)
    model = vlp.VlpBlip2ForImageTextRetrieval.from_pretrained(stage_1).eval()
    images = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    output = model(**processor(images=images, text=["a red card", "a green card"], return_tensors="pt"))
    assert output.itm_logits.softmax(-1)[0, 1] > 0.5 > output.itm_logits.softmax(-1)[1, 1]
    assert output.logits_per_image.argmax(1)[0] == 0
    card = ModelCard.load(stage_1 / "README.md")
    assert "blip-2" in card.data.tags
    for text in ("3 queries, 2 layers of 32", "frozen", "examples.png", "the top three matches"):
        assert text in card.text, text
    assert "tensor" in what_the_card_says(stage_1)


def test_stage_2_learns_captioning(stage_2):
    results = json.loads((stage_2 / "results.json").read_text())
    assert results["losses"] == ["lm"] and results["history"][-1]["lm"] < results["history"][0]["lm"] / 3
    assert results["metrics"]["caption_exact"] >= 0.85
    example = results["examples"][0]
    assert len(example["predictions"]) == 2 and example["predictions"][0][2]
    assert not [name for name in load_file(stage_2 / "model.safetensors") if name.startswith("language_model.")]
    state = load_file(states(state_folder(stage_2))[-1] / "model.safetensors")
    assert "model.language_projection.weight" in state
    assert not [name for name in state if "language_model" in name]  # it is frozen and large


def test_stage_2_folder_generates_captions(stage_2, language_model):
    processor = AutoProcessor.from_pretrained(stage_2)
    assert type(processor) is vlp.VlpBlip2Processor and processor.tokenizer.padding_side == "left"
    model = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(stage_2)
    images = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    inputs = processor(images=images, text=["it is", "it is"], return_tensors="pt")
    captions = processor.decode_texts(model.generate(**inputs, num_beams=2), prompt="it is")
    assert captions == ["A red card", "A blue card"]
    describe = pipeline("image-text-to-text", model=str(stage_2))
    outputs = describe(Image.new("RGB", (20, 20), "orange"), text="it is", max_new_tokens=4)
    assert "A orange card" in outputs[0]["generated_text"]
    card = ModelCard.load(stage_2 / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "the generated text after “it is” and “what is it?”; green" in card.text
    assert "llama, 2 layers of 32), frozen" in card.text and str(language_model.parent) not in card.text
    assert "card" in what_the_card_says(stage_2)


def said_by(user: str, image: Image.Image | None = None) -> dict:
    content = [{"type": "image", "image": image}] if image is not None else []
    return {"role": "user", "content": [*content, {"type": "text", "text": user}]}


def test_stage_2_takes_part_in_conversations(stage_2):
    processor = AutoProcessor.from_pretrained(stage_2)
    image = Image.new("RGB", (20, 20), "orange")
    first = [said_by("what is it?", image)]
    later = [*first, {"role": "assistant", "content": [{"type": "text", "text": "a card"}]}, said_by("which colour? ")]
    text = processor.apply_chat_template(later, add_generation_prompt=True)
    assert text == "Question: what is it? Short answer: a card Question: which colour? Short answer:"
    # What `answer` asks, and what stage 2 learns with --prompt_column.
    assert processor.apply_chat_template(first, add_generation_prompt=True) == QUESTION.format("what is it?")
    chat = pipeline("image-text-to-text", model=str(stage_2))
    alone = chat(text=first, max_new_tokens=3, do_sample=False)[0]["generated_text"]
    model = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(stage_2)
    inputs = processor(images=image, text=QUESTION.format("what is it?"), return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    wanted = processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert alone[-1]["role"] == "assistant" and alone[-1]["content"].strip() == wanted.strip()
    # Several conversations of different lengths in one batch.
    both = chat(text=[first, later], max_new_tokens=3, do_sample=False, batch_size=2)
    assert both[0][0]["generated_text"][-1] == alone[-1]
    assert len(both[1][0]["generated_text"]) == 4
    with pytest.raises(ValueError, match="about one picture; this one has 2"):
        chat(text=[said_by("what?", image), said_by("and this?", image)], max_new_tokens=2)


def test_stage_2_streams_its_answer(stage_2):
    processor = AutoProcessor.from_pretrained(stage_2)
    model = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(stage_2)
    inputs = processor(images=Image.new("RGB", (20, 20), "red"), text="it is", return_tensors="pt")
    streamer = TextIteratorStreamer(processor.tokenizer, timeout=10, skip_special_tokens=True)
    whole = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.generate(**inputs, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :],
                                                           skip_special_tokens=True)  # fmt: skip


def test_stage_2_learns_words_first(pairs, stage_1, language_model, tmp_path):
    options = dict(stage=2, spelling_share=0.7, language_batch_size=4, max_length=10)
    train(arguments(pairs, tmp_path / "run", model_name_or_path=str(stage_1), num_prefix_repeats=2, **options,
                    language_model_name_or_path=str(language_model), max_train_steps=60))  # fmt: skip
    model = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    processor = vlp.VlpBlip2Processor.from_pretrained(tmp_path / "run")
    known = processor.tokenizer.decode(model.prefix_words.ids)
    assert {"A", "red", "card", "</s>"} <= set(known.split())
    states = model.encode_image(
        processor(images=Image.new("RGB", (16, 16), "red"), return_tensors="pt")["pixel_values"]
    )
    words = processor.tokenizer.decode(model.prefix_words.ids[model.word_logits(states)[0].argmax(dim=-1)])
    assert words.split()[:2] == ["A", "red"]
    assert model.prefix(vision_states=states).shape[1] == 2 * model.config.num_query_tokens
    # A run continues with these words; --spelling_share cannot be added to a model without them.
    train(arguments(pairs, tmp_path / "more", model_name_or_path=str(tmp_path / "run"), **options, max_train_steps=2))
    again = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path / "more")
    assert torch.equal(again.prefix_words.ids, model.prefix_words.ids)


def test_stage_2_continues_from_its_folder_and_resumes(pairs, stage_2, tmp_path):
    options = dict(stage=2, model_name_or_path=str(stage_2), prompt="it is ", cache_vision_features=True)
    train(arguments(pairs, tmp_path / "whole", max_train_steps=6, save_steps=3, save_total_limit=5, **options))
    first = json.loads((tmp_path / "whole" / "results.json").read_text())["history"][0]
    assert first["lm"] < 1.0  # it starts from the trained weights
    AcceleratorState._reset_state(reset_partial_state=True)
    train(arguments(pairs, tmp_path / "half", max_train_steps=6, **options,
                    resume_from_checkpoint=str(states(state_folder(tmp_path / "whole"))[0])))  # fmt: skip
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")[name], value), name


@pytest.mark.parametrize("stage", [1, 2])
def test_adapters_are_trained_saved_loaded_and_merged(pairs, stage_1, stage_2, tmp_path, stage):
    """In stage 2, the language model gets adapters too."""
    base = stage_1 if stage == 1 else stage_2
    options = dict(stage=stage, model_name_or_path=str(base), lora_rank=2, max_train_steps=4, learning_rate=1e-2)
    train(arguments(pairs, tmp_path / "run", **options | ({"prompt": "it is "} if stage == 2 else {})))
    names = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {name.split("base_model.model.")[-1].split(".")[0] for name in names} == (
        {"qformer"} if stage == 1 else {"qformer", "language_model"})  # fmt: skip
    assert all(".lora_" in name for name in names)
    kind = vlp.VlpBlip2ForImageTextRetrieval if stage == 1 else vlp.VlpBlip2ForConditionalGeneration
    tuned, before = load_model(kind, tmp_path / "run"), kind.from_pretrained(base).eval()
    merged = PeftModel.from_pretrained(kind.from_pretrained(base), str(tmp_path / "run")).merge_and_unload().eval()
    processor = AutoProcessor.from_pretrained(base)
    images = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    inputs = processor(images=images, text=["it is", "it is"], return_tensors="pt")
    with torch.no_grad():
        outputs = [model(**inputs)["logits" if stage == 2 else "itm_logits"] for model in (tuned, merged, before)]
    assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-3


def test_adapters_need_a_complete_base_model(pairs, stage_1, tmp_path):
    with pytest.raises(ArgumentError, match="--stage 2 adds parts that .* does not have"):
        train(arguments(pairs, tmp_path / "x", stage=2, model_name_or_path=str(stage_1), lora_rank=2,
                        language_model_name_or_path="x"))  # fmt: skip


# --- cached features --------------------------------------------------------------------------------------------------


def test_cached_features_train_the_same_model_as_images(pairs, towers, tmp_path):
    for name, cached in (("cached", True), ("images", False)):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(arguments(pairs, tmp_path / name, vision_tower=str(towers / "clip"), cache_vision_features=cached))
    images = load_file(tmp_path / "images" / "model.safetensors")
    for name, value in load_file(tmp_path / "cached" / "model.safetensors").items():
        # The tower's output for an image depends on the batch size in the last digit.
        assert_close(value, images[name], rtol=1e-4, atol=1e-6, msg=name)


def test_features_are_recomputed_only_for_another_tower(pairs, towers, tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path))
    rows = datasets.Dataset.from_dict(
        {"image": [str(pairs.parent / "0.png"), str(pairs.parent / "none.png"), str(pairs.parent / "2.png")],
         "caption": ["a", "b", "c"]})  # fmt: skip
    processor = AutoProcessor.from_pretrained(towers / "clip")
    options = arguments(pairs, tmp_path / "x", vision_tower=str(towers / "clip"))
    model = blip2.make_model(options, blip2.make_processor(options, datasets.Dataset.from_dict({"caption": CAPTIONS}),
                                                        CaptionChooser()))  # fmt: skip
    calls = []
    model.vision_model.register_forward_hook(lambda *_: calls.append(1))

    def compute() -> Path:
        key = key_of(model.vision_model, model.config.vision_config, processor.image_processor, rows, "image")
        return compute_features(encode, key, rows, "image", 10**6)

    def encode(images: list) -> torch.Tensor:
        return model.encode_image(processor.image_processor(images, return_tensors="pt")["pixel_values"])

    path = compute()
    assert compute() == path and len(calls) == 1
    features = Features(path)
    image = processor.image_processor(Image.open(pairs.parent / "2.png"), return_tensors="pt")["pixel_values"]
    assert_close(features[2], model.encode_image(image)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(BadRow, match="missing image file"):
        features[1]
    with torch.no_grad():
        next(model.vision_model.parameters()).add_(1)
    assert compute() != path and len(calls) == 3
    assert sorted(file.suffix for file in tmp_path.glob("*.*")) == [".json", ".json", ".npy", ".npy"]


# --- initialisation ---------------------------------------------------------------------------------------------------


def test_qformer_is_initialised_from_bert(pairs, towers, tmp_path):
    torch.manual_seed(3)
    size = {name: QFORMER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                             "num_attention_heads", "max_position_embeddings")}  # fmt: skip
    bert = BertForMaskedLM(BertConfig(vocab_size=70, **size))
    bert.save_pretrained(tmp_path / "bert")
    save_file({k: v.clone() for k, v in bert.state_dict().items() if "decoder.weight" not in k},
              tmp_path / "bert" / "model.safetensors")  # fmt: skip
    options = arguments(pairs, tmp_path / "x", vision_tower=str(towers / "clip"), max_length=10)
    processor = blip2.make_processor(options, datasets.Dataset.from_dict({"caption": CAPTIONS}), CaptionChooser())
    options.bert_name_or_path = str(tmp_path / "bert")
    model = blip2.make_model(options, processor)
    layer, theirs = model.qformer.layers[1], bert.bert.encoder.layer[1]
    assert torch.equal(layer.self_attention.attention.q_proj.weight, theirs.attention.self.query.weight)
    for own in (layer.query_mlp, layer.text_mlp):
        assert torch.equal(own.mlp.fc1.weight, theirs.intermediate.dense.weight)
        assert torch.equal(own.layer_norm.bias, theirs.output.LayerNorm.bias)
    words = model.qformer.embeddings.word_embeddings.weight
    known = min(len(words), 70)
    assert torch.equal(words[:known], bert.bert.embeddings.word_embeddings.weight[:known])
    wide = BertForMaskedLM(BertConfig(vocab_size=70, **(size | {"intermediate_size": 8})))
    wide.save_pretrained(tmp_path / "wide")
    options.bert_name_or_path = str(tmp_path / "wide")
    with pytest.raises(ArgumentError, match="of the wrong shape: bert.encoder.layer.0.intermediate.dense.weight"):
        blip2.make_model(options, processor)


def test_qformer_is_initialised_from_blip_text_encoder(pairs, towers, tmp_path):
    options = arguments(
        pairs, tmp_path / "x", vision_tower=str(towers / "blip"), bert_name_or_path=str(towers / "blip")
    )
    processor = blip2.make_processor(options, None, CaptionChooser())
    model, given = blip2.make_model(options, processor), load_file(towers / "blip" / "model.safetensors")
    pairs_of_names = {
        "qformer.embeddings.word_embeddings.weight": "text_model.embeddings.word_embeddings.weight",
        "qformer.layers.1.self_attention.attention.k_proj.weight":
            "text_model.layers.1.encoder_attention.attention.k_proj.weight",
        "qformer.layers.0.cross_attention.attention.v_proj.weight":
            "text_model.layers.0.cross_attention.attention.v_proj.weight",
        "qformer.layers.1.query_mlp.mlp.fc2.weight": "text_model.layers.1.mlp.fc2.weight",
        "qformer.layers.1.text_mlp.layer_norm.weight": "text_model.layers.1.layer_norm.weight",
        "text_proj.weight": "text_proj.weight", "vision_model.conv1.weight": "vision_model.conv1.weight",
    }  # fmt: skip
    for own, theirs in pairs_of_names.items():
        assert torch.equal(model.state_dict()[own], given[theirs]), own


def test_last_vision_layers_are_left_out(pairs, towers, tmp_path):
    options = arguments(pairs, tmp_path / "x", vision_tower=str(towers / "vit"), vision_layers_left_out=1)
    processor = blip2.make_processor(options, datasets.Dataset.from_dict({"caption": CAPTIONS}), CaptionChooser())
    model = blip2.make_model(options, processor).eval()
    clip = vlp.VlpClipModel.from_pretrained(towers / "vit").eval()
    pixels = torch.randn(2, 3, 16, 16)
    hidden = clip.get_image_features(pixels, output_hidden_states=True).hidden_states
    assert_close(model.encode_image(pixels), hidden[-2])
    options.vision_layers_left_out = 3
    with pytest.raises(ArgumentError, match="--vision_layers_left_out 3 leaves no layer"):
        blip2.make_model(options, processor)


def test_invalid_options_raise(pairs, towers, stage_1, language_model, tmp_path):
    clip = str(towers / "clip")
    for changes, message in (
        (dict(), "BLIP-2 needs --vision_tower"),
        (dict(vision_tower=clip, stage=3), "--stage must be one of 1, 2, got 3"),
        (dict(vision_tower=clip, stage=2), "--stage 2 needs --language_model_name_or_path"),
        (dict(vision_tower=clip, language_model_name_or_path="x"), "is only for --stage 2"),
        (dict(vision_tower=clip, instruction_aware=True), "and --instruction_aware are only for --stage 2"),
        (
            dict(vision_tower=clip, stage=2, language_model_name_or_path="x", instruction_aware=True),
            "--instruction_aware needs --model_name_or_path",
        ),
        (dict(vision_tower=clip, prompt="x"), "--prompt and --example_prompts are only for --stage 2"),
        (dict(vision_tower=clip, cache_vision_features=True, augmentation="strong"), "needs --augmentation none"),
        (dict(vision_tower=clip, cache_vision_features=True, freeze_vision=False), "and a frozen tower"),
        (dict(vision_tower=clip, group_images=2), "--group_images is for --prompt_column"),
        (
            dict(
                model_name_or_path=str(stage_1),
                stage=2,
                prompt_column="question",
                group_images=2,
                cache_vision_features=True,
                augmentation="none",
            ),
            "does not go with --group_images",
        ),
    ):
        with pytest.raises(ArgumentError, match=message):
            arguments(pairs, tmp_path / "x", **changes)
    for changes, message in (
        (dict(vision_tower=str(tmp_path)), f"--vision_tower {tmp_path}"),
        (dict(vision_tower=str(stage_1), vision_layers_left_out=9), "leaves no layer of the tower"),
        (dict(model_name_or_path=clip), "is a vlp_clip, not a vlp_blip2"),
        (dict(model_name_or_path=str(stage_1), stage=2, language_model_name_or_path="package:no_such_llm"),
         "package no_such_llm, which is not installed"),
        (dict(vision_tower=clip, model={"qformer_config": {"hidden": 3}}), "has no field 'hidden'"),
        (dict(model_name_or_path=str(stage_1), stage=2, language_model_name_or_path=str(language_model),
              language_batch_size=4), "need a prefix of words"),
    ):  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(ArgumentError, match=message):
            train(arguments(pairs, tmp_path / "x", **changes))
    assert not (tmp_path / "x").exists()


def test_offsets_of_a_prefix_of_words_have_a_rate_of_their_own():
    model = vlp.VlpBlip2ForConditionalGeneration.from_pre_training(
        tiny_blip2(), tiny_language_model("llama"), prefix_words=([2, 4, 7], [])
    )
    groups = parameter_groups(model, 1e-4, 0.1, offsets_rate=OFFSETS_RATE)
    (own,) = [group for group in groups if group["constant"]]
    assert (own["lr"], own["weight_decay"], own["params"]) == (OFFSETS_RATE, 0.0, [model.prefix_words.offsets])
    assert {group["lr"] for group in groups} == {1e-4, OFFSETS_RATE}
    assert not any(group["constant"] for group in parameter_groups(model, 1e-4, 0.1))


@pytest.mark.parametrize("instruction_aware", [False, True])
def test_stage_2_learns_the_answers_of_conversations(pairs, stage_1, tmp_path, instruction_aware):
    """Each question of a picture has its own answer; the questions have no loss."""
    questions = {"What is it?": "A card", "Which colour?": "{}"}
    rows = list(csv.DictReader(pairs.open()))
    conversations = []
    for row in rows:
        colour = row["caption"].split()[1]
        turns = []
        for question, answer in questions.items():
            turns += [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer.format(colour)},
            ]
        conversations.append({"image": row["image"], "conversations": turns})
    (pairs.parent / "llava.json").write_text(json.dumps(conversations))
    colours = sorted({row["caption"].split()[1] for row in rows})
    save_language_model(
        tmp_path / "llm", [f"Question: {question} Short answer: {answer.format(colour)}"
                           for question, answer in questions.items() for colour in colours],
    )  # fmt: skip
    train(arguments(pairs.parent / "llava.json", tmp_path / "run", stage=2, model_name_or_path=str(stage_1),
                    language_model_name_or_path=str(tmp_path / "llm"), prompt_column="question", max_length=24,
                    max_train_steps=400 if instruction_aware else 200, eval_split=None, cache_vision_features=True,
                    instruction_aware=instruction_aware))  # fmt: skip
    if instruction_aware:
        model = vlp.VlpInstructBlipForConditionalGeneration.from_pretrained(tmp_path / "run")
        with pytest.raises(ValueError, match="needs qformer_input_ids, the instructions as tokens of the Q-Former"):
            model.generate(torch.zeros(1, 3, 16, 16))
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'text="Question: what is it? Short answer:"' in card
    predictor = load(str(tmp_path / "run"), "answer")
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    assert predictor.answer(images, ["What is it?"] * 2, num_beams=2, max_length=5) == ["A card"] * 2
    first = {"role": "assistant", "content": [{"type": "text", "text": "A card"}]}
    second = {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]}
    talks = [[said_by("What is it?", image), first, second] for image in images]
    said = pipeline("image-text-to-text", model=str(tmp_path / "run"))(text=talks, max_new_tokens=5, do_sample=False)
    assert [talk[0]["generated_text"][-1]["content"].split()[0] for talk in said] == ["red", "blue"]
    with pytest.raises(ArgumentError, match="--prompt_column is for --stage 2"):
        arguments(pairs, tmp_path / "x", model_name_or_path=str(stage_1), prompt_column="question")


def test_the_oldest_turns_are_left_out_of_long_conversations(tmp_path):
    turns = ("what is it ?", "a card", "which colour ?", "red", "is it large ?")
    save_language_model(tmp_path, [f"{prompt_of(turns)} yes"])
    processor = vlp.VlpBlip2Processor(vlp.VlpBlipImageProcessor(), AutoTokenizer.from_pretrained(tmp_path))
    sample = Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), "yes", 0, 0, turns=turns)
    whole = len(f"{prompt_of(turns)} yes".split())
    for length, first in ((64, 0), (whole + 1, 0), (whole, 2), (12, 4), (4, 4)):  # with the end token
        batch = Collator(processor, length)([sample])
        text = processor.tokenizer.decode(batch.input_ids[0], skip_special_tokens=True)
        assert text == f"{prompt_of(turns[first:])} yes" or length == 4
        assert batch.extra["prompt_lengths"].tolist() == [len(prompt_of(turns[first:]).split())]
    assert prompt_of(turns[2:]) == "Question: which colour ? Short answer: red Question: is it large ? Short answer:"


def test_tokenizer_in_a_gguf_file(tmp_path, monkeypatch):
    """A GGUF file has its tokenizer inside, so there is no tokenizer.json beside it."""
    save_language_model(tmp_path / "model", CAPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    assert load_auto_tokenizer(tmp_path / "gguf", gguf_file="model.gguf") is tokenizer
    with pytest.raises(UnsupportedModelError, match="no tokenizer.json"):
        load_auto_tokenizer(tmp_path / "gguf")
    with pytest.raises(UnsupportedModelError, match="no tokenizer.json"):
        load_auto_tokenizer(tmp_path / "gguf", gguf_file="other.gguf")
