"""Tests of training on images that keep their resolution and shape: `--max_num_patches`."""

import json
import random
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_training import RESNET, arguments
from transformers import AutoModel, AutoProcessor, pipeline
from vlp.processing.augmentation import PerImageOfAnyShape, ToPixelValues
from vlp.processing.naflex import padded_patches
from vlp.training.evaluate import evaluate
from vlp.training.evaluation.arguments import EvaluationArguments
from vlp.training.run import train

import vlp
from vlp.errors import ArgumentError
from vlp.inference import load

SHAPES = [(40, 40), (80, 20), (20, 80), (33, 61)]  # width, height
COLOURS = ["red", "blue", "green", "white"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Cards of four shapes whose two ends have a colour; the caption tells both. Every fifth row is for testing."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = ["image,caption,split"]
    for number in range(48):
        size, colour = SHAPES[number % 4], COLOURS[number // 4 % 4]
        picture = Image.new("RGB", size, "grey")
        picture.paste(colour, (0, 0, 14, 14))
        picture.paste(colour, (size[0] - 14, size[1] - 14, *size))
        picture.putpixel((number % 14, 3), (9, 9, 9))
        picture.save(folder / f"{number}.png")
        shape = "square" if size[0] == size[1] else "wide" if size[0] > size[1] else "tall"
        lines.append(f"{number}.png,{shape} {colour} card,{'test' if number % 5 == 4 else 'train'}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder


def options(folder: Path, output: Path, **more):
    return arguments(
        folder / "pairs.csv", output,
        **{"max_num_patches": 9, "augmentation": "none", "image_size": 24, "cache_images": False} | more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("runs") / "cards"
    train(options(folder, output, max_train_steps=300))
    return output


def test_a_model_learns_the_shapes_of_pictures(folder, trained):
    """The square in the middle would not have the ends."""
    assert json.loads((trained / "results.json").read_text())["metrics"]["zero_shot_top1"] == 1.0
    config = AutoModel.from_pretrained(trained).config
    assert config.vision_config.max_num_patches == 9 and config.vision_config.image_size == 24
    processor = AutoProcessor.from_pretrained(trained)
    assert isinstance(processor.image_processor, vlp.VlpNaflexImageProcessor)
    assert processor.image_processor.patch_size == 8
    found = evaluate(
        str(trained),
        EvaluationArguments(dataset=str(folder / "pairs.csv"), split="test", task="zero-shot", class_column="caption"),
    )
    assert found["metrics"]["zero_shot_top1"] == 1.0


def test_the_pipeline_classifies_wide_pictures(folder, trained):
    classify = pipeline("zero-shot-image-classification", model=str(trained))
    labels = ["wide red card", "tall red card", "square red card"]
    for number, label in ((1, labels[0]), (2, labels[1]), (0, labels[2])):
        found = classify(str(folder / f"{number}.png"), candidate_labels=labels, hypothesis_template="{}")
        assert found[0]["label"] == label


def test_training_sees_what_evaluation_sees(folder, trained):
    predictor = load(str(trained), "embed")
    images = predictor.processor.image_processor
    per_image = PerImageOfAnyShape(8, 9, None, random_crop=False, resample=images.resample)
    paths = [str(folder / f"{number}.png") for number in range(4)]
    seen = [per_image.read(path, random.Random(0)) for path in paths]
    tensors = [torch.tensor(list(image.getdata()), dtype=torch.uint8).reshape(*image.size[::-1], 3) for image in seen]
    patches, shapes = padded_patches([each.permute(2, 0, 1) for each in tensors], 8)
    wanted = predictor.prepare_images([Image.open(path) for path in paths])
    assert torch.equal(shapes, wanted["spatial_shapes"])
    found = ToPixelValues(images.image_mean, images.image_std)(patches)
    for row, count in enumerate(shapes.prod(dim=1)):
        torch.testing.assert_close(found[row, :count], wanted["pixel_values"][row, :count])


@pytest.mark.parametrize("more", [{"augmentation": "crop", "min_num_patches": 4}, {"micro_batch_size": 5}])
def test_a_square_model_goes_on_with_variable_shapes(more, folder, tmp_path):
    train(options(folder, tmp_path / "square", max_num_patches=None))
    train(options(folder, tmp_path / "out", model_name_or_path=str(tmp_path / "square"), **more))
    images = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    assert images.max_num_patches == 9 and list(images.image_mean) == list(vlp.VlpClipImageProcessor().image_mean)
    train(options(folder, tmp_path / "again", model_name_or_path=str(tmp_path / "out"), max_num_patches=None))
    assert AutoModel.from_pretrained(tmp_path / "again").config.vision_config.max_num_patches == 9
    train(options(folder, tmp_path / "tower", image_tower=str(tmp_path / "out"), max_num_patches=None))  # a square one
    assert AutoModel.from_pretrained(tmp_path / "tower").config.vision_config.max_num_patches is None


def test_crops_keep_the_shape_and_the_budget():
    per_image = PerImageOfAnyShape(8, 30, 10, random_crop=True, resample=2, scale=0.5, flip=True)
    rng, counts = random.Random(0), set()
    for width, height in ((300, 100), (64, 64), (40, 200)):
        for _ in range(50):
            left, top, box_width, box_height = box = per_image.box(width, height, rng)
            assert 0 <= left <= width - box_width and 0 <= top <= height - box_height
            assert box_width / box_height == pytest.approx(width / height, rel=0.05)
            assert 0.48 < box_width * box_height / (width * height) <= 1.0
            new_width, new_height = per_image.size(box, rng)
            assert new_width % 8 == new_height % 8 == 0
            counts.add(new_width // 8 * (new_height // 8))
    assert min(counts) < 15 and 24 < max(counts) <= 30
    image = per_image(Image.new("L", (300, 100)), rng)
    assert image.mode == "RGB" and image.width > image.height


def test_a_large_jpeg_is_decoded_smaller(tmp_path):
    path = tmp_path / "large.jpg"
    Image.radial_gradient("L").resize((1600, 400)).save(path, quality=95)
    per_image = PerImageOfAnyShape(8, 16, None, random_crop=True, resample=2)
    small = per_image.read(str(path), random.Random(3))
    with Image.open(path) as whole:
        whole.load()
        wanted = per_image(whole, random.Random(3))
    assert small.size == wanted.size
    pairs = zip(small.getdata(), wanted.getdata(), strict=True)
    assert sum(abs(one[0] - other[0]) for one, other in pairs) / (small.width * small.height) < 2


@pytest.mark.parametrize(
    "more, message",
    [
        ({"augmentation": "strong"}, "--augmentation strong needs square images"),
        ({"min_num_patches": 10}, "at least --min_num_patches"),
        ({"min_num_patches": 4}, "it needs --augmentation crop"),
        ({"max_num_patches": 10**9}, "at most 65,536"),
        ({"max_num_patches": 0}, "--max_num_patches must be at least 1"),
        ({"max_num_patches": None, "min_num_patches": 4}, "--min_num_patches needs --max_num_patches"),
        ({"model": RESNET, "image_size": 32}, "needs a vision transformer"),
    ],
)
def test_options_that_do_not_fit(more, message, folder, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        train(options(folder, tmp_path / "out", **more))
