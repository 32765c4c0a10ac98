"""ONNX files match the models, including for other batch sizes and text lengths."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_blip, tiny_blip_batch, tiny_model
from PIL import Image
from processes import Program
from torch.testing import assert_close

import vlp
from vlp.commands.onnx import export, main

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
def test_clip_towers_match_the_model(tmp_path, tower):
    model = tiny_model(tower)
    assert export(model, tmp_path / "onnx") == ["image.onnx", "text.onnx"]
    batch = tiny_batch(model.eval(), size=4)
    close(compute(tmp_path / "onnx" / "image.onnx", pixel_values=batch["pixel_values"])[0],
          model.get_image_features(batch["pixel_values"]).pooler_output)  # fmt: skip
    close(compute(tmp_path / "onnx" / "text.onnx", input_ids=batch["input_ids"])[0],
          model.get_text_features(batch["input_ids"]).pooler_output)  # fmt: skip


@pytest.mark.parametrize("tower", ["vit", "siglip"])
@torch.no_grad()
def test_images_of_variable_shape_match_the_model(tmp_path, tower):
    model = tiny_model(tower)
    model.config.vision_config.max_num_patches = 12
    export(model, tmp_path / "onnx")
    size = model.eval().config.vision_config.patch_size
    pictures = [Image.effect_noise(shape, 80).convert("RGB") for shape in ((70, 20), (30, 30), (10, 99))]
    images = vlp.VlpNaflexImageProcessor(patch_size=size, max_num_patches=12)(pictures, return_tensors="pt")
    close(compute(tmp_path / "onnx" / "image.onnx", **images)[0], model.get_image_features(**images).pooler_output)


@torch.no_grad()
def test_blip_modes_match_the_model(tmp_path):
    model, batch = tiny_blip(), tiny_blip_batch(size=3)
    assert export(model, tmp_path / "onnx") == ["image.onnx", "match.onnx", "text.onnx", "write.onnx"]
    model.eval()
    ids, vision = batch["input_ids"], model.get_image_features(batch["pixel_values"])
    embeds, states = compute(tmp_path / "onnx" / "image.onnx", pixel_values=batch["pixel_values"])
    close(embeds, vision.pooler_output)
    close(states, vision.last_hidden_state)
    close(compute(tmp_path / "onnx" / "text.onnx", input_ids=ids)[0], model.get_text_features(ids).pooler_output)
    memory = model.text_model.memory_of(vision.last_hidden_state)
    expected = model.match(ids, None, memory)
    close(compute(tmp_path / "onnx" / "match.onnx", input_ids=ids, states=states)[0], expected)
    decoder_ids = ids.clone()
    decoder_ids[:, 0] = model.config.text_config.bos_token_id
    expected = model.lm_head(model.text_model(decoder_ids, None, memory, decode=True).last_hidden_state)
    close(compute(tmp_path / "onnx" / "write.onnx", input_ids=decoder_ids, states=states)[0], expected)


def test_the_command_line(tmp_path):
    vlp.VlpBlipForVisualReasoning(tiny_blip().config).save_pretrained(tmp_path / "nlvr")
    command = ["vlp-onnx", str(tmp_path / "nlvr"), str(tmp_path / "onnx")]
    code, output = Program(tmp_path / "output.txt", main, argv=command).wait()
    assert code == 1 and "is a VlpBlipForVisualReasoning, which vlp-onnx does not export" in output
    assert not (tmp_path / "onnx").exists()
