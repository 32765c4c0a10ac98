"""Training from towers of transformers: CLIP, BLIP and BLIP-2, from the options to the published folder."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from test_towers import CAPTIONS, image_folder, text_folder
from test_training import pairs, run_in_processes  # noqa: F401  # the fixture
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, pipeline
from vlp.training.command_line import parse
from vlp.training.families.blip import BlipArguments
from vlp.training.families.blip2 import Blip2Arguments
from vlp.training.run import train

import vlp
from vlp.commands.index import build
from vlp.errors import ArgumentError

RUN = {
    "eval_split": "test",
    "per_device_train_batch_size": 16,
    "warmup_steps": 1,
    "max_train_steps": 3,
    "num_threads": 1,
    "report_to": "none",
    "mixed_precision": "no",
    "logging_steps": 1,
    "augmentation": "none",
}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)


def clip_options(pairs, folder, **more):  # noqa: F811
    words = [word for name, value in (RUN | more).items() for word in options_for(name, value)]
    return parse(["--dataset_name", str(pairs), "--output_dir", str(folder), *words])


def options_for(name: str, value) -> list[str]:
    if value is True:
        return [f"--{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


@pytest.mark.parametrize("image", ["dinov2", "convnext", "resnet"])
def test_clip_from_two_towers(pairs, tmp_path, image):  # noqa: F811
    theirs, words = image_folder(image, tmp_path / "image"), text_folder("xlm-roberta", tmp_path / "text")
    towers = {"image_tower": tmp_path / "image", "text_tower": tmp_path / "text", "lock_image_tower": True}
    options = clip_options(pairs, tmp_path / "run", unlock_image_layers=1, tower_learning_rate=1e-3, **towers)
    assert options.image_size is None and options.max_length is None and options.learning_rate == 1e-3
    train(options)
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert model.config.vision_config.image_size == 32 and model.config.text_config.max_position_embeddings == 20
    own, before = model.vision_model.model.state_dict(), theirs.state_dict()
    same = {name for name in own if torch.equal(own[name], before[name])}
    changed = {name for name in own if name not in same}
    last = {"dinov2": "layer.1.", "convnext": "stages.3.", "resnet": "stages.3."}[image]
    assert any(last in name for name in changed)
    after = ("layernorm.weight", "layernorm.bias")  # what follows the layers is unlocked with them
    assert all(last in name or name in after for name in changed), changed
    assert not torch.equal(model.text_model.model.embeddings.word_embeddings.weight,
                           words.state_dict()["embeddings.word_embeddings.weight"])  # fmt: skip
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "run"))
    assert len(classify(Image.new("RGB", (9, 9)), candidate_labels=CAPTIONS)) == 3
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures" / "red.png")
    assert not build(tmp_path / "pictures", tmp_path / "index", str(tmp_path / "run"))
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"{image}, " in card and "xlm-roberta, 32 features, pooling: mean" in card


def test_two_processes_train_towers_with_unused_parameters(pairs, tmp_path):  # noqa: F811
    image_folder("dinov2", tmp_path / "image"), text_folder("bert", tmp_path / "text")  # DINOv2 has a mask token
    towers = {"image_tower": str(tmp_path / "image"), "text_tower": str(tmp_path / "text"), "lock_text_tower": True}
    train(clip_options(pairs, tmp_path / "one", **towers))
    two = clip_options(pairs, tmp_path / "two", **towers | {"per_device_train_batch_size": 8})
    run_in_processes(2, two, tmp_path)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["contrastive"] == pytest.approx(b["contrastive"], rel=1e-3)


def test_adapters_on_towers_of_transformers(pairs, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    image_folder("vit", tmp_path / "image"), text_folder("bert", tmp_path / "text")
    towers = {"image_tower": tmp_path / "image", "text_tower": tmp_path / "text"}
    train(clip_options(pairs, tmp_path / "run", **towers))
    more = {"model_name_or_path": tmp_path / "run", "config": "vit-b-32", "lora_rank": 2, "learning_rate": 1e-2}
    train(clip_options(pairs, tmp_path / "lora", **more))
    assert {"adapter_model.safetensors"} <= {path.name for path in (tmp_path / "lora").iterdir()}
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any("vision_model" in name for name in names) and any("text_model" in name for name in names)


def test_models_of_transformers_are_converted_on_the_way(pairs, tmp_path, capsys):  # noqa: F811
    from test_exchange import clip_of_transformers
    from vlp.training.evaluate import evaluate
    from vlp.training.evaluation.arguments import EvaluationArguments

    clip_of_transformers(tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("---\nlicense: mit\n---\n")
    train(clip_options(pairs, tmp_path / "run", config="vit-b-32", model_name_or_path=tmp_path / "theirs"))
    assert capsys.readouterr().out.count("to vlp's format, once") == 1
    assert AutoModel.from_pretrained(tmp_path / "run").config.model_type == "vlp_clip"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "theirs" in card and "license: mit" in card
    with pytest.raises(ArgumentError, match="convert .*theirs with vlp convert first"):
        train(
            clip_options(pairs, tmp_path / "no", config="vit-b-32", model_name_or_path=tmp_path / "theirs", lora_rank=2)
        )
    data = EvaluationArguments(dataset=str(pairs), split="test", task="retrieval", output_dir=str(tmp_path / "found"))
    evaluate(str(tmp_path / "theirs"), data)
    assert "to vlp's format, once" not in capsys.readouterr().out
    assert list((tmp_path / "cache" / "converted").iterdir())


def test_blip_starts_as_its_paper_does(pairs, tmp_path):  # noqa: F811
    theirs, bert = image_folder("vit", tmp_path / "vit"), text_folder("bert", tmp_path / "bert")
    start = {"vision_tower": str(tmp_path / "vit"), "bert_name_or_path": str(tmp_path / "bert"), "image_size": None}
    options = BlipArguments(dataset_name=str(pairs), output_dir=str(tmp_path / "run"), max_length=12, queue_size=16,
                            rerank_top_k=4, **start | RUN | {"learning_rate": 1e-12, "max_train_steps": 1})  # fmt: skip
    train(options)
    model = vlp.VlpBlipForPreTraining.from_pretrained(tmp_path / "run").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    inputs = processor(images=Image.new("RGB", (40, 40), "red"), text=["a red square", "two dogs"], return_tensors="pt")
    with torch.no_grad():
        states = model.encode_image(inputs["pixel_values"]).last_hidden_state
        assert_close(states, theirs(inputs["pixel_values"]).last_hidden_state, rtol=1e-5, atol=1e-5)
        mask = model.padding_mask(inputs["input_ids"])
        found = model.get_text_features(inputs["input_ids"]).last_hidden_state
        expected = bert(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
    assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert model.config.text_config.vocab_size == 13 and "cross_attention" in str(model.state_dict().keys())
    for wrong, message in (({"bert_name_or_path": str(tmp_path / "vit")}, "is a vit; expected a BERT"),
                           ({"vision_tower": str(tmp_path / "bert")}, "is a bert, not an image encoder")):  # fmt: skip
        with pytest.raises((ArgumentError, vlp.errors.UserError), match=message):
            train(BlipArguments(dataset_name=str(pairs), output_dir=str(tmp_path / "no"), **RUN | wrong))


@pytest.mark.parametrize("image", ["resnet", "dinov2_with_registers", "siglip"])
def test_blip2_reads_any_image_tower(pairs, tmp_path, image):  # noqa: F811
    if image == "siglip":
        from test_towers import PATCHES, SIZES
        from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

        torch.manual_seed(0)
        text = SIZES | {
            "vocab_size": 20,
            "projection_size": 32,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
        }
        theirs = SiglipModel(SiglipConfig(vision_config=SIZES | PATCHES, text_config=text)).eval()
        theirs.save_pretrained(tmp_path / "tower")
        SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tower")
        expected = lambda pixels: theirs.vision_model(pixels).last_hidden_state  # noqa: E731
    else:
        own = image_folder(image, tmp_path / "tower")
        expected = lambda pixels: own(pixels).last_hidden_state  # noqa: E731
    qformer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
               "max_position_embeddings": 24}  # fmt: skip
    options = dict(dataset_name=str(pairs), output_dir=str(tmp_path / "run"), vision_tower=str(tmp_path / "tower"),
                   model={"qformer_config": qformer, "num_query_tokens": 4, "image_text_hidden_size": 16},
                   max_length=12, vocab_size=120, rerank_top_k=4)  # fmt: skip
    train(Blip2Arguments(**options | RUN))
    model = vlp.VlpBlip2ForPreTraining.from_pretrained(tmp_path / "run").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states, theirs_states = model.encode_image(pixels), expected(pixels)
    if theirs_states.ndim == 4:
        theirs_states = theirs_states.flatten(2).transpose(1, 2)
    assert_close(states, theirs_states, rtol=1e-4, atol=1e-5)


def test_a_clip_is_no_image_tower_for_blip(pairs, tmp_path):  # noqa: F811
    config = CLIPConfig(vision_config={"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1,
                                       "num_attention_heads": 2, "intermediate_size": 32},
                        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                     "intermediate_size": 32}, projection_dim=16)  # fmt: skip
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    options = dict(dataset_name=str(pairs), output_dir=str(tmp_path / "no"), vision_tower=str(tmp_path / "clip"))
    with pytest.raises(ArgumentError, match="has a vlp_vit, which has no normalised states"):
        train(BlipArguments(**options | RUN))
