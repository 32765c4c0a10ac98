"""ONNX files match the models, including for other batch sizes and text lengths."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_blip, tiny_blip_batch, tiny_model, tiny_pair, tiny_processor
from PIL import Image
from processes import Program
from torch.testing import assert_close
from vlp.processing.blip import train_tokenizer
from vlp.training.data.sources import load_rows

import vlp
from vlp.commands import onnx
from vlp.commands.onnx import effect_of_quantization, export, main

onnxruntime = pytest.importorskip("onnxruntime")


def compute(path: Path, **inputs: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path)
    assert {given.name for given in session.get_inputs()} == inputs.keys()
    return [torch.tensor(x) for x in session.run(None, {name: value.numpy() for name, value in inputs.items()})]


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("tower", ["vit", "resnet", "siglip"])
@torch.no_grad()
def test_torch_export_matches_the_model(tower):
    """The whole CLIP model, for any number of images and captions."""
    model = tiny_model(tower).eval()
    free, batch = torch.export.Dim.DYNAMIC, tiny_batch(model, size=6)
    shapes = {"input_ids": {0: free}, "pixel_values": {0: free}}
    program = torch.export.export(model, (), batch, dynamic_shapes=shapes)
    other = tiny_batch(model, size=5)
    close(program.module()(**other).logits_per_image, model(**other).logits_per_image)


@pytest.mark.parametrize("tower", ["vit", "resnet", "siglip"])
@torch.no_grad()
def test_clip_files_match_the_model(tmp_path, tower):
    """Embeddings, and logits with the sigmoid loss's bias, for another number of texts than of images."""
    model, processor = tiny_model(tower), tiny_processor()
    files = export(model, processor, tmp_path / "out", quantized=False) / "onnx"
    assert sorted(file.name for file in files.iterdir()) == ["model.onnx", "text_model.onnx", "vision_model.onnx"]
    batch = tiny_batch(model.eval(), size=4)
    ids, pixels = batch["input_ids"], batch["pixel_values"][:3]
    expected = model(input_ids=ids, pixel_values=pixels)
    close(compute(files / "vision_model.onnx", pixel_values=pixels)[0], model.get_image_features(pixels).pooler_output)
    close(compute(files / "text_model.onnx", input_ids=ids)[0], model.get_text_features(ids).pooler_output)
    found = compute(files / "model.onnx", input_ids=ids, pixel_values=pixels)
    names = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
    for name, each in zip(names, found, strict=True):
        close(each, expected[name])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == ("siglip" if tower == "siglip" else "clip")
    assert (tmp_path / "out/tokenizer.json").is_file()
    images = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "CLIPImageProcessor" and images["crop_size"] == {"height": 32, "width": 32}


@pytest.mark.parametrize("tower", ["vit", "siglip"])
@torch.no_grad()
def test_images_of_variable_shape_match_the_model(tmp_path, tower):
    model = tiny_model(tower)
    model.config.vision_config.max_num_patches = 12
    size = model.config.vision_config.patch_size
    reader = vlp.VlpNaflexImageProcessor(patch_size=size, max_num_patches=12)
    files = export(model, vlp.VlpClipProcessor(reader, tiny_processor().tokenizer), tmp_path / "out", quantized=False)
    pictures = [Image.effect_noise(shape, 80).convert("RGB") for shape in ((70, 20), (30, 30), (10, 99))]
    images = reader(pictures, return_tensors="pt")
    found = compute(files / "onnx/vision_model.onnx", **images)[0]
    close(found, model.eval().get_image_features(**images).pooler_output)


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> tuple[vlp.VlpBlipForPreTraining, Path]:
    """A BLIP, and the files of its parts."""
    model = tiny_blip()
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    processor = vlp.VlpBlipProcessor(images, train_tokenizer(["a red apple", "a dog"], 64, max_length=12))
    return model, export(model, processor, tmp_path_factory.mktemp("blip") / "out", quantized=False) / "onnx"


@torch.no_grad()
def test_blip_encoders_match_the_model(blip):
    model, files = blip
    batch = tiny_blip_batch(size=3)
    ids, vision = batch["input_ids"], model.get_image_features(batch["pixel_values"])
    states = compute(files / "encoder_model.onnx", pixel_values=batch["pixel_values"])[0]
    close(states, vision.last_hidden_state)
    close(compute(files / "vision_model.onnx", pixel_values=batch["pixel_values"])[0], vision.pooler_output)
    close(compute(files / "text_model.onnx", input_ids=ids)[0], model.get_text_features(ids).pooler_output)
    memory = model.text_model.memory_of(vision.last_hidden_state)
    close(compute(files / "itm_model.onnx", input_ids=ids, encoder_hidden_states=states)[0],
          model.match(ids, None, memory))  # fmt: skip
    searcher = vlp.VlpBlipForImageTextRetrieval(model.config).eval()
    searcher.load_state_dict(model.state_dict(), strict=False)
    found = compute(files / "model.onnx", input_ids=ids[:2], pixel_values=batch["pixel_values"])
    close(found[0], searcher(input_ids=ids, pixel_values=batch["pixel_values"]).logits_per_image[:, :2])


@torch.no_grad()
def test_blip_decoders_match_the_model(blip):
    """All tokens at once, and one after the other with a cache that is empty at first."""
    model, files = blip
    batch = tiny_blip_batch(size=3)
    ids, states = batch["input_ids"].clone(), model.encode_image(batch["pixel_values"]).last_hidden_state
    ids[:, 0] = model.config.text_config.bos_token_id
    memory = model.text_model.memory_of(states)
    expected = model.lm_head(model.text_model(ids, None, memory, decode=True).last_hidden_state)
    close(compute(files / "decoder_model.onnx", input_ids=ids, encoder_hidden_states=states)[0], expected)
    text = model.config.text_config
    shape = (3, text.num_attention_heads, 0, text.hidden_size // text.num_attention_heads)
    names = [f"{layer}.{kind}" for layer in range(text.num_hidden_layers) for kind in ("key", "value")]
    past, logits = [torch.zeros(shape) for _ in names], []
    for part in (ids[:, :2], *ids[:, 2:].split(1, dim=1)):
        inputs = {f"past_key_values.{name}": each for name, each in zip(names, past, strict=True)}
        found, *past = compute(
            files / "decoder_model_merged.onnx", input_ids=part, encoder_hidden_states=states, **inputs
        )
        logits.append(found)
    close(torch.cat(logits, dim=1), expected)
    config = json.loads((files.parent / "config.json").read_text())
    assert config["decoder"]["n_layer"] == text.num_hidden_layers
    assert config["decoder_start_token_id"] == text.bos_token_id


@torch.no_grad()
def test_quantised_files_are_close_and_their_effect_is_told(tmp_path):
    model, processor = tiny_pair("vit")
    folder = export(model, processor, tmp_path / "out")
    pixels = tiny_batch(model, size=3)["pixel_values"]
    whole, small = folder / "onnx/vision_model.onnx", folder / "onnx/vision_model_quantized.onnx"
    assert small.stat().st_size < whole.stat().st_size
    expected, found = (compute(path, pixel_values=pixels)[0] for path in (whole, small))
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
    said = effect_of_quantization(folder, processor, load_rows("emoji", "test", "image"), most=20)
    assert "chooses among the 20 captions" in said and "of 20 pictures; " in said and "of the original's" in said


@torch.no_grad()
def test_the_weights_of_a_large_model_are_beside_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "MOST_BYTES", 50_000)
    model, processor = tiny_pair("vit")
    folder = export(model, processor, tmp_path / "out")
    beside = {path.name.removesuffix("_data") for path in (folder / "onnx").glob("*_data")}
    assert beside == {  # the quantised text tower fits into its file
        "model.onnx", "model_quantized.onnx", "text_model.onnx", "vision_model.onnx", "vision_model_quantized.onnx"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": dict.fromkeys(sorted(beside), True)}
    batch = tiny_batch(model, size=3)
    pixels, ids = {"pixel_values": batch["pixel_values"]}, {"input_ids": batch["input_ids"]}
    image, text = (each.pooler_output for each in (model.get_image_features(**pixels), model.get_text_features(**ids)))
    for name, inputs, expected in (("vision_model", pixels, image), ("text_model", ids, text)):
        close(compute(folder / f"onnx/{name}.onnx", **inputs)[0], expected)
        found = compute(folder / f"onnx/{name}_quantized.onnx", **inputs)[0]
        assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_command_line(tmp_path):
    vlp.VlpBlipForVisualReasoning(tiny_blip().config).save_pretrained(tmp_path / "nlvr")
    command = ["vlp onnx", str(tmp_path / "nlvr"), str(tmp_path / "onnx")]
    code, output = Program(tmp_path / "output.txt", main, argv=command).wait()
    assert code == 1 and "is a VlpBlipForVisualReasoning, which vlp onnx does not export" in output
    assert not (tmp_path / "onnx").exists()
    tiny_blip().save_pretrained(tmp_path / "blip")
    command = ["vlp onnx", str(tmp_path / "blip"), str(tmp_path / "onnx"), "--architecture", "VlpClipModel"]
    code, output = Program(tmp_path / "output.txt", main, argv=command).wait()
    assert code == 1 and "--architecture VlpClipModel: a VlpBlipForPreTraining can be read as" in output
