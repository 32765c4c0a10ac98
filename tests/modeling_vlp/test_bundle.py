"""A published folder that includes its code loads without vlp installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BLIP_TEXT, QFORMER, TOWERS, VIT, save_language_model, tiny_pair, with_larger_weights
from PIL import Image
from test_towers import image_folder, joined, text_folder
from torch.testing import assert_close
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from vlp.modeling_vlp.exchange.bundle import add_code
from vlp.processing.blip import token_ids, train_tokenizer

import vlp
from vlp.towers import text_start, vision_start

LOAD_MODEL = """
import json, sys
sys.modules["vlp"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
folder, output = sys.argv[1:]
trusted = dict(trust_remote_code=True)
try:
    AutoModel.from_pretrained(folder, trust_remote_code=False)
    sys.exit("the model was loaded without trust_remote_code")
except ValueError:
    pass
processor = AutoProcessor.from_pretrained(folder, **trusted)
image, texts = Image.new("RGB", (40, 32), "red"), ["a red square", "two dogs"]
inputs = processor(images=image, text=texts, return_tensors="pt")
model = AutoModel.from_pretrained(folder, **trusted).eval()
result = {"classes": [type(model).__name__, type(processor).__name__]}
with torch.no_grad():
    images = {name: inputs[name] for name in ("pixel_values", "spatial_shapes") if name in inputs}
    result["image"] = model.get_image_features(**images).pooler_output
    result["text"] = model.get_text_features(inputs["input_ids"]).pooler_output
if result["classes"][0] == "VlpClipModel":
    classify = pipeline("zero-shot-image-classification", model=folder, **trusted)
    result["best"] = classify(image, candidate_labels=texts, hypothesis_template="{}")[0]["label"]
else:
    captioner = AutoModelForImageTextToText.from_pretrained(folder, **trusted)
    result["generated"] = captioner.generate(inputs["pixel_values"], max_new_tokens=5)
torch.save(result, output)
"""


def run_without_vlp(folder: Path, tmp_path: Path, code: str = LOAD_MODEL) -> dict:
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "result.pt")]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "result.pt", weights_only=True)


def expected(model, processor) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = processor(images=Image.new("RGB", (40, 32), "red"), text=["a red square", "two dogs"], return_tensors="pt")
    with torch.no_grad():
        images = {name: inputs[name] for name in ("pixel_values", "spatial_shapes") if name in inputs}
        image = model.eval().get_image_features(**images).pooler_output
        return image, model.get_text_features(inputs["input_ids"]).pooler_output


def test_clip_of_images_of_any_shape_loads_without_vlp(tmp_path):
    model, processor = tiny_pair()
    size = model.config.vision_config.patch_size
    model.config.vision_config.max_num_patches = 12
    processor.image_processor = vlp.VlpNaflexImageProcessor(patch_size=size, max_num_patches=12)
    model.save_pretrained(tmp_path / "clip", bundle=True)
    processor.save_pretrained(tmp_path / "clip", bundle=True)
    result = run_without_vlp(tmp_path / "clip", tmp_path)
    for name, value in zip(("image", "text"), expected(model, processor), strict=True):
        assert_close(result[name], value, rtol=1e-5, atol=1e-6)


def test_clip_of_foreign_towers_loads_without_vlp(tmp_path):
    image_folder("dinov2", tmp_path / "image"), text_folder("bert", tmp_path / "text")
    start, words = vision_start(str(tmp_path / "image"), ""), text_start(str(tmp_path / "text"), "")
    model, processor = joined(start, words, text_projection_hidden_size=8, projection_dropout=0.1)
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    assert "modeling_vlp_towers.py" in add_code(tmp_path / "clip")
    result = run_without_vlp(tmp_path / "clip", tmp_path)
    for name, value in zip(("image", "text"), expected(model, processor), strict=True):
        assert_close(result[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_clip_loads_without_vlp(tmp_path, tower):
    model, processor = tiny_pair(tower)
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    files = add_code(folder)
    assert "modeling_vlp_clip.py" in files and not any("med" in name or "blip" in name for name in files)
    result = run_without_vlp(folder, tmp_path)
    assert result["classes"] == ["VlpClipModel", "VlpClipProcessor"] and result["best"] in ("a red square", "two dogs")
    for name, value in zip(("image", "text"), expected(model, processor), strict=True):
        assert_close(result[name], value, rtol=1e-5, atol=1e-6)
    again = vlp.VlpClipModel.from_pretrained(folder)  # it still loads with vlp
    assert torch.equal(again.logit_scale, model.logit_scale)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_blip_loads_without_vlp(tmp_path, tower):
    tokenizer = train_tokenizer(["a red square", "two dogs"], 120, 20)
    torch.manual_seed(0)
    vision = TOWERS[tower] | {"image_size": 32}
    config = vlp.VlpBlipConfig(vision_config=vision, text_config=BLIP_TEXT | token_ids(tokenizer))
    model = vlp.VlpBlipForPreTraining(config)
    processor = vlp.VlpBlipProcessor(vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    folder = tmp_path / "blip"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_code(folder)
    result = run_without_vlp(folder, tmp_path)
    assert result["classes"] == ["VlpBlipForPreTraining", "VlpBlipProcessor"]
    for name, value in zip(("image", "text"), expected(model, processor), strict=True):
        assert_close(result[name], value, rtol=1e-5, atol=1e-6)
    assert result["generated"].shape[0] == 1


LOAD_BLIP_2 = """
import sys
sys.modules["vlp"] = None  # as if it were not installed
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
inputs = processor(images=Image.new("RGB", (40, 32), "red"), text="a red", return_tensors="pt")
torch.save({"classes": [type(model).__name__, type(processor).__name__, type(processor.image_processor).__name__],
            "generated": model.generate(**inputs, num_beams=2, max_new_tokens=4)}, output)
"""


def test_blip_2_loads_without_vlp(tmp_path):
    """The language model is loaded from the source named in the configuration."""
    save_language_model(tmp_path / "llm", ["a red square", "two dogs"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "llm")
    torch.manual_seed(0)
    config = vlp.VlpBlip2Config(vision_config=VIT, qformer_config=QFORMER, num_query_tokens=3,
                                language_model_name_or_path=str(tmp_path / "llm"))  # fmt: skip
    language_model = LlamaForCausalLM.from_pretrained(tmp_path / "llm")
    model = with_larger_weights(vlp.VlpBlip2ForConditionalGeneration(config, language_model)).eval()
    square = {"height": 32, "width": 32}
    images = vlp.VlpClipImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    processor = vlp.VlpBlip2Processor(images, tokenizer)
    folder = tmp_path / "blip-2"
    model.save_pretrained(folder, bundle=True)
    processor.save_pretrained(folder, bundle=True)
    result = run_without_vlp(folder, tmp_path, LOAD_BLIP_2)
    assert result["classes"] == ["VlpBlip2ForConditionalGeneration", "VlpBlip2Processor", "VlpClipImageProcessor"]
    inputs = processor(images=Image.new("RGB", (40, 32), "red"), text="a red", return_tensors="pt")
    assert torch.equal(result["generated"], model.generate(**inputs, num_beams=2, max_new_tokens=4))


@pytest.mark.parametrize("architecture", ["VlpBlipForQuestionAnswering", "VlpBlipForVisualReasoning"])
def test_code_of_each_architecture_is_included(tmp_path, architecture):
    config = vlp.VlpBlipConfig(vision_config=VIT, text_config=BLIP_TEXT, architectures=[architecture])
    config.save_pretrained(tmp_path)
    files = add_code(tmp_path)
    place = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"]
    assert place == f"modeling_vlp_blip_tasks.{architecture}"
    for name in files:
        text = (tmp_path / name).read_text()
        assert "from .." not in text
        compile(text, name, "exec")
