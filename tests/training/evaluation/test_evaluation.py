"""Metrics on cases made by hand, and a perfect model that must score 1.0. Run: pytest tests/test_evaluation.py"""

import io

import datasets
import pytest
import torch
from conftest import tiny_config, tiny_pair, tiny_processor
from PIL import Image
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlp.training.data.rows import CaptionChooser
from vlp.training.evaluation.base import (
    Evaluator,
    embed_classes,
    embed_images,
    embed_texts,
    ranks,
    retrieval,
    zero_shot,
)

from vlp.errors import ArgumentError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0),
           "yellow": (255, 255, 0)}  # fmt: skip


def test_ranks_by_hand():
    queries = torch.eye(3)
    targets = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.5], [0.7, 0.3, 0.5], [0.0, 0.3, 0.5]])
    assert ranks(queries, targets, torch.tensor([0, 0, 2])).tolist() == [0, 3, 3]  # ties count against the model
    several = torch.tensor([[False, True, True, False]] * 3)
    assert ranks(queries, targets, several).tolist() == [1, 0, 2]


def test_ranks_do_not_depend_on_the_chunk():
    torch.manual_seed(0)
    queries, targets = torch.randn(50, 8), torch.randn(30, 8)
    right = torch.randint(0, 30, (50,))
    assert torch.equal(ranks(queries, targets, right, chunk=7), ranks(queries, targets, right))


def test_zero_shot_by_hand():
    images = torch.eye(6)
    classes = torch.eye(6)
    classes[[0, 1]] = classes[[1, 0]]
    assert zero_shot(images, classes, torch.arange(6)) == {
        "zero_shot_top1": pytest.approx(4 / 6),
        # The two wrong ones have five ties at zero before them: not among the first five.
        "zero_shot_top5": pytest.approx(4 / 6),
    }


def test_retrieval_with_several_captions_an_image():
    images = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=-1)
    texts = F.normalize(torch.tensor([[0.1, 1.0], [1.0, 0.2], [0.2, 1.0]]), dim=-1)
    result = retrieval(images, texts, torch.tensor([0, 0, 1]))
    assert result["text_to_image_recall_at_1"] == pytest.approx(2 / 3)
    assert result["image_to_text_recall_at_1"] == pytest.approx(1 / 2)
    assert result["image_to_text_recall_at_5"] == 1.0


class Perfect:
    """A toy model: an image's embedding is its mean colour, a text's the colour that it names."""

    def __init__(self, processor):
        self.processor, self.training, self.seen = processor, True, 0
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = tiny_config()
        self.config.text_config.max_position_embeddings = 77
        self.logit_scale = torch.tensor(3.0)

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.training = False

    def get_image_features(self, pixels, **kwargs):
        self.seen += len(pixels)
        images = self.processor.image_processor
        mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
        return BaseModelOutputWithPooling(pooler_output=pixels.mean(dim=(2, 3)) * std + mean - 0.5)

    def get_text_features(self, input_ids, **kwargs):
        texts = self.processor.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        colours = [next(rgb for name, rgb in COLOURS.items() if name in text) for text in texts]
        return BaseModelOutputWithPooling(pooler_output=torch.tensor(colours) / 255 - 0.5)


def coloured_rows(broken: bool = False) -> datasets.Dataset:
    images = []
    for rgb in COLOURS.values():
        file = io.BytesIO()
        Image.new("RGB", (20, 24), rgb).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    captions = [[f"a {name} card", f"{name} paper"] for name in COLOURS]
    labels = list(range(6))
    if broken:
        images, captions, labels = [*images, {"bytes": b"x", "path": None}], [*captions, ["broken"]], [*labels, 0]
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "caption": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=list(COLOURS)),
        }
    )
    return datasets.Dataset.from_dict({"image": images, "caption": captions, "label": labels}, features=features)


@pytest.mark.parametrize("templates", ["name", "simple", "emoji"])
def test_a_perfect_model_scores_one_and_every_image_is_seen_once(templates):
    processor = tiny_processor()
    evaluator = Evaluator(
        coloured_rows(broken=True), CaptionChooser(), "image", 10**6, "label", templates=templates, batch_size=4
    )
    assert evaluator.skipped == 1
    model = Perfect(processor)
    result = evaluator(model, processor)
    assert set(result.values()) == {1.0} and len(result) == 8
    assert model.seen == 6 and model.training
    examples = evaluator.examples(model, processor, count=3)
    assert len(examples) == 3 and all(e["predictions"][0][0] == e["label"] for e in examples)


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch():
    model, processor = tiny_pair()
    pictures = [Image.new("RGB", (30, 40), rgb) for rgb in COLOURS.values()]
    texts = ["a", "two yellow triangles and a dog", "b c"]
    for embed, items in ((embed_images, pictures), (embed_texts, texts)):
        one, many = embed(model, processor, items, 1), embed(model, processor, items, 64)
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.norm(dim=-1), torch.ones(len(items)))
    classes = embed_classes(model, processor, ["cat", "dog"], ("a {}", "the {}"))
    mean = embed_texts(model, processor, ["a cat", "the cat"]).mean(0)
    torch.testing.assert_close(classes[0], F.normalize(mean, dim=0), rtol=1e-4, atol=1e-5)


def test_labels_that_have_no_name():
    rows = coloured_rows().cast_column("label", datasets.Value("int64"))
    with pytest.raises(ArgumentError, match="numbers without names: give --class_names"):
        Evaluator(rows, CaptionChooser(), "image", 10**6, "label")
    with pytest.raises(ArgumentError, match="labels go from 0 to 5, of 2 names"):
        Evaluator(rows, CaptionChooser(), "image", 10**6, "label", ["a", "b"])
    with pytest.raises(ArgumentError, match="must hold names or labels"):
        Evaluator(rows, CaptionChooser(), "image", 10**6, "caption")
    named = rows.add_column("name", list(COLOURS))
    with pytest.raises(ArgumentError, match="holds 'blue', which --class_names does not"):
        Evaluator(named, CaptionChooser(), "image", 10**6, "name", [n for n in COLOURS if n != "blue"])
    unlabelled = Evaluator(
        rows.map(lambda r: {"label": r["label"] - 1}), CaptionChooser(), "image", 10**6, "label", ["a"] * 6
    )
    assert unlabelled.skipped == 1


def test_no_row_that_can_be_used():
    rows = coloured_rows(broken=True).select([6])
    with pytest.raises(ValueError, match="no row that can be used"):
        Evaluator(rows, CaptionChooser(), "image", 10**6)
