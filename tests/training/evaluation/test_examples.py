"""Tests of the examples, galleries and heat maps of the model card."""

import pytest
from accelerate import PartialState
from conftest import tiny_pair
from PIL import Image
from test_tasks import COLOURS, as_lists, blip, png  # noqa: F401
from vlp.training.evaluation.arguments import EvaluationArguments
from vlp.training.evaluation.examples import draw_galleries, make_examples
from vlp.training.evaluation.tasks import prepare_data

import vlp


def prepared(*tasks: str, **options):
    """The data of each task, prepared for evaluation."""
    rows = as_lists().add_column("colour", COLOURS)
    return [
        prepare_data(rows, EvaluationArguments(task=task, max_length=8, **options), PartialState()) for task in tasks
    ]


def test_draw_galleries_for_each_kind_of_model(blip, tmp_path):  # noqa: F811
    model, processor = blip
    (tmp_path / "blip").mkdir()
    (tmp_path / "clip").mkdir()
    draw_galleries(model, processor, prepared("captioning"), tmp_path / "blip")
    assert {path.name for path in (tmp_path / "blip").iterdir()} == {"retrieval.png", "attention.png", "matching.png"}
    assert all(Image.open(path).width > 200 for path in (tmp_path / "blip").iterdir())
    draw_galleries(*tiny_pair(), prepared("retrieval"), tmp_path / "clip")
    assert {path.name for path in (tmp_path / "clip").iterdir()} == {"retrieval.png"}
    captioner = vlp.VlpBlipForConditionalGeneration(model.config).eval()
    draw_galleries(captioner, processor, prepared("captioning"), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"attention.png"}
    draw_galleries(*tiny_pair(), prepared("zero-shot", class_column="colour"), tmp_path / "none")


@pytest.mark.parametrize("task", ["captioning", "itm"])
def test_examples_of_blip(task, blip):  # noqa: F811
    examples = make_examples(*blip, prepared("retrieval", task), ["", "a card"])
    assert len(examples) == 6 and {len(each["predictions"]) for each in examples} == {2 if task == "captioning" else 3}
    assert all(each["image"].mode == "RGB" and each["label"].startswith("a ") for each in examples)


def test_examples_of_questions_and_statements(blip):  # noqa: F811
    model, processor = blip
    rows = as_lists(answers=["red"], label=True, second_image={"bytes": png("blue"), "path": None})
    found = {}
    for task, kind in (("vqa", vlp.VlpBlipForQuestionAnswering), ("nlvr", vlp.VlpBlipForVisualReasoning)):
        data = prepare_data(rows, EvaluationArguments(task=task, max_length=8, num_beams=1), PartialState())
        found[task] = make_examples(kind.from_pre_training(model).eval(), processor, [data], [""])
    assert len(found["vqa"]) == len(found["nlvr"]) == 6
    assert all(each["label"].endswith(" red") and len(each["predictions"]) == 1 for each in found["vqa"])
    for each in found["nlvr"]:
        ((answer, probability, right),) = each["predictions"]
        assert answer in ("true", "false") and probability >= 0.5 and right == (answer == "true")
        assert each["label"].startswith("a ") and each["image"].getpixel((each["image"].width - 1, 0)) == (0, 0, 255)


def test_examples_of_clip():
    examples = make_examples(*tiny_pair(), prepared("zero-shot", "retrieval", class_column="colour"), [""])
    for each in examples:
        assert sum(share for _, share, _ in each["predictions"]) <= 1 + 1e-6
        assert [correct for name, _, correct in each["predictions"]] == [
            n == each["label"] for n, _, _ in each["predictions"]
        ]
    assert make_examples(*tiny_pair(), prepared("retrieval"), [""]) == []
