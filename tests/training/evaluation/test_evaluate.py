"""Tests of the `evaluate` command with different models and numbers of processes."""

import dataclasses
import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import tiny_blip, tiny_pair
from PIL import Image
from processes import run_group
from test_data import picture
from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor
from vlp.processing.blip import VlpBlipImageProcessor, VlpBlipProcessor, train_tokenizer
from vlp.processing.prompts import CLASS_NAMES
from vlp.training import evaluate as command
from vlp.training.evaluate import as_in_training, evaluate, main
from vlp.training.evaluation.arguments import EvaluationArguments
from vlp.training.evaluation.tasks import best

import vlp
from vlp.conversion import convert
from vlp.errors import ArgumentError, UnsupportedModelError
from vlp.inference import Predictor, load

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "cyan"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven cards, each with two captions, a question and its answers, and one row with a missing image."""
    folder = tmp_path_factory.mktemp("cards")
    rows = []
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))
        captions = [f"a {colour} card", f"{colour} paper on a table"]
        question = {"question": "which colour is it?", "answers": [colour] * 10}
        rows.append({"image": f"{colour}.png", "caption": captions, "name": captions[1], "colour": colour} | question)
    rows.insert(2, rows[0] | {"image": "missing.png"})
    (folder / "cards.json").write_text(json.dumps(rows))
    return folder / "cards.json"


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "blip"
    model = tiny_blip()
    tokenizer = train_tokenizer([f"a {c} card, {c} paper on a table" for c in COLOURS], 118, 30)
    model.config.text_config.vocab_size = 120
    model.save_pretrained(folder)
    VlpBlipProcessor(VlpBlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


class Perfect(Predictor):
    """A predictor that reads the colour of a card from its first pixel and is always right."""

    def __init__(self):
        self.model = torch.nn.Identity()

    def colour(self, image: Image.Image) -> str:
        return next(c for c in COLOURS if image.convert("RGB").getpixel((0, 0)) == Image.new("RGB", (1, 1), c).getpixel((0, 0)))  # fmt: skip # noqa: E501

    def embed_images(self, images):
        return torch.stack([torch.eye(7)[COLOURS.index(self.colour(image))] for image in images])

    def embed_texts(self, texts):
        return torch.stack([torch.eye(7)[next(i for i, c in enumerate(COLOURS) if c in text)] for text in texts])

    def encode_images(self, images):
        return self.embed_images(images)

    def match(self, states, index, texts):
        match = (states[index] * self.embed_texts(texts)).sum(dim=1)
        return torch.stack([1 - match, match], dim=1)

    def caption(self, images, prompt="", **options):
        return [f"{self.colour(image)} Paper, on a table." for image in images]

    def answer(self, images, questions, **options):
        return [self.colour(image) for image in images]


@pytest.mark.parametrize("task", ["zero-shot", "retrieval", "reranked", "captioning", "vqa", "itm"])
def test_perfect_model_gets_perfect_scores(task, data, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *args: Perfect())
    more = {
        "zero-shot": {"class_column": "colour", "group_column": "question"},
        "vqa": {"caption_column": "question"},
        "reranked": {"rerank_top_k": 3},
        "captioning": {"caption_column": "name"},
    }.get(task, {})
    arguments = EvaluationArguments(
        dataset=str(data), split="train", task=task.replace("reranked", "retrieval"), batch_size=3, resamples=20,
        output_dir=str(tmp_path), **more,
    )  # fmt: skip
    results = evaluate("perfect", arguments)
    assert results["rows"] == 7 and results["skipped"] == "missing image file: 1"
    for name, value in results["metrics"].items():
        assert value == pytest.approx(10.0 if name == "cider" else 1.0), name
        assert results["intervals"][name] == pytest.approx([value, value])
    assert len(results["metrics"]) == {"zero-shot": 3, "retrieval": 6, "reranked": 12, "captioning": 7, "vqa": 1,
                                       "itm": 3}[task]  # fmt: skip
    saved = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert saved["metrics"] == results["metrics"]
    table = next(tmp_path.glob("*.md")).read_text()
    assert table.count("100.00 %") >= len([n for n in results["metrics"] if n != "cider"])
    if task == "zero-shot":
        assert Image.open(next(tmp_path.glob("*.png"))).width > 200 and results["most_confused"] == []
        assert results["groups"] == {"which colour is it?": {"zero_shot_top1": 1.0, "rows": 7}}


def test_equal_scores_count_against_the_model():
    assert best(torch.tensor([[0.5, 0.5, 0.1]]), torch.tensor([[True, False, False]])) == [[1, 0, 2]]


def test_two_processes_give_same_results_as_one(data, blip, tmp_path):
    """Seven pictures do not divide evenly between two processes; each must count exactly once."""
    arguments = EvaluationArguments(dataset=str(data), split="train", task="retrieval", rerank_top_k=3, batch_size=2,
                                    resamples=20, output_dir=str(tmp_path / "one"))  # fmt: skip
    single = evaluate(str(blip), arguments)
    options = ["--dataset", str(data), "--split", "train", "--task", "retrieval", "--rerank_top_k", "3",
               "--batch_size", "2", "--resamples", "20", "--output_dir", str(tmp_path / "two")]  # fmt: skip
    run_group(2, tmp_path, main, argv=["evaluate", str(blip), *options])
    parallel = json.loads(next((tmp_path / "two").glob("*.json")).read_text())
    assert parallel["processes"] == 2 and parallel["rows"] == 7
    for key in ("metrics", "intervals", "skipped"):
        assert parallel[key] == single[key], key


def test_converted_models_give_same_results(data, blip, tmp_path):
    """CLIP and BLIP models converted to transformers get the same metrics as the vlp models."""
    model, processor = tiny_pair()
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    convert(tmp_path / "clip", tmp_path / "their-clip", "transformers")
    matcher = vlp.VlpBlipForImageTextRetrieval.from_pretrained(blip)
    matcher.save_pretrained(tmp_path / "matcher")
    vlp.VlpBlipProcessor.from_pretrained(blip).save_pretrained(tmp_path / "matcher")
    convert(tmp_path / "matcher", tmp_path / "their-matcher", "transformers")
    captioner = vlp.VlpBlipForConditionalGeneration.from_pretrained(blip)
    captioner.save_pretrained(tmp_path / "captioner")
    vlp.VlpBlipProcessor.from_pretrained(blip).save_pretrained(tmp_path / "captioner")
    convert(tmp_path / "captioner", tmp_path / "their-captioner", "transformers")
    common = dict(dataset=str(data), split="train", resamples=0)
    for ours, theirs, task in ((tmp_path / "clip", tmp_path / "their-clip", "zero-shot"),
                               (tmp_path / "matcher", tmp_path / "their-matcher", "itm"),
                               (tmp_path / "captioner", tmp_path / "their-captioner", "captioning")):  # fmt: skip
        more = {"class_column": "colour"} if task == "zero-shot" else {}
        found = [evaluate(str(name), EvaluationArguments(task=task, output_dir=str(tmp_path / "out"), **common, **more))
                 for name in (ours, theirs)]  # fmt: skip
        assert found[0]["metrics"] == found[1]["metrics"] and found[0]["metrics"], task


def test_captioner_from_transformers(data, tmp_path):
    tokenizer = train_tokenizer([f"a {c} card" for c in COLOURS], 118, 30)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    config = GitConfig(vision_config=vision, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                       num_attention_heads=4, intermediate_size=64, bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.sep_token_id, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    GitForCausalLM(config).save_pretrained(tmp_path / "git")
    square = {"height": 32, "width": 32}
    GitProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square), tokenizer).save_pretrained(
        tmp_path / "git"
    )
    results = evaluate(str(tmp_path / "git"), EvaluationArguments(dataset=str(data), split="train", task="captioning",
                                                                  max_length=8, resamples=0))  # fmt: skip
    assert results["architecture"] == "GitForCausalLM" and 0 <= results["metrics"]["bleu_4"] <= 1
    assert (tmp_path / "git/evaluations").is_dir()  # in the model folder
    with pytest.raises(UnsupportedModelError, match="cannot match: it has no matching head"):
        load(tmp_path / "git", "match")


def test_unsupported_tasks_raise(blip, tmp_path):
    model, processor = tiny_pair()
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    for use, reason in (("match", "no matching head"), ("caption", "no decoder"), ("answer", "not fine-tuned")):
        with pytest.raises(UnsupportedModelError, match=f"a VlpClipModel, cannot {use}: .*{reason}"):
            load(tmp_path / "clip", use)
    with pytest.raises(UnsupportedModelError, match="cannot answer: it was not fine-tuned"):
        load(blip, "answer")
    with pytest.raises(UnsupportedModelError, match="nowhere: the configuration cannot be loaded: there is no"):
        load(tmp_path / "nowhere", "embed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "vqa", "answer_column": "reply"}, "has no column 'reply'"),
        ({"task": "captioning", "caption_column": "words"}, "has no column 'words'"),
        ({"class_column": "answers"}, "must hold names or labels"),
        ({"class_column": "colour", "class_names": "cifar10"}, "has 'black', which is not one of --class_names"),
        ({"class_column": "colour", "class_names": "no.txt"}, "no such file, and not one of .*imagenet"),
        ({"split": "test"}, "no column split"),
    ],
)
def test_invalid_data_raises(options, message, data, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *args: Perfect())
    with pytest.raises(ArgumentError, match=message):
        evaluate("perfect", EvaluationArguments(**{"dataset": str(data), "split": "train"} | options))


def test_invalid_options_raise(monkeypatch, capsys):
    with pytest.raises(ArgumentError, match="--task must be one of zero-shot, retrieval"):
        EvaluationArguments(task="classify")
    with pytest.raises(ArgumentError, match="cannot be shards"):
        EvaluationArguments(dataset="a-{000..009}.tar")
    monkeypatch.setattr(sys, "argv", ["evaluate", "model", "--resamples", "-1"])
    with pytest.raises(SystemExit, match="error: --resamples must not be negative, got -1"):
        main()


def test_class_names_of_common_data_sets():
    counts = {name: len(names) for name, names in CLASS_NAMES.items()}
    assert counts == {"cifar10": 10, "cifar100": 100, "fashion_mnist": 10, "imagenet": 1000, "mnist": 10}
    assert CLASS_NAMES["imagenet"][0] == "tench" and CLASS_NAMES["imagenet"][999] == "toilet paper"
    assert CLASS_NAMES["cifar100"][0] == "apple" and CLASS_NAMES["cifar100"][99] == "worm"


def test_class_names_come_from_label_column(tmp_path, data, monkeypatch):
    """The label column is found automatically, and its ClassLabel names are used."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(data.parent), split="train", drop_labels=True)
    features = rows.features | {"label": datasets.ClassLabel(names=COLOURS)}
    colours = [COLOURS.index(Path(rows.cast_column("image", datasets.Image(decode=False))[i]["image"]["path"]).stem)
               for i in range(len(rows))]  # fmt: skip
    rows = rows.select_columns(["image"]).add_column("label", colours).cast(datasets.Features(
        {"image": features["image"], "label": features["label"]}))  # fmt: skip
    rows.save_to_disk(str(tmp_path / "cards"))
    monkeypatch.setattr(command, "load", lambda *args: Perfect())
    results = evaluate("perfect", EvaluationArguments(dataset=str(tmp_path / "cards"), split="train", resamples=0,
                                                      output_dir=str(tmp_path / "out")))  # fmt: skip
    assert results["metrics"]["zero_shot_top1"] == 1.0 and results["classes"] == 7


def test_predictions_are_written_as_the_servers_of_coco_and_vqa_read_them(tmp_path, data, monkeypatch):
    rows = [row | {"image_id": str(10 + n)} for n, row in enumerate(json.loads(data.read_text()))]
    (data.parent / "ids.json").write_text(json.dumps(rows))
    monkeypatch.setattr(command, "load", lambda *args: Perfect())
    options = dict(dataset=str(data.parent / "ids.json"), split="train", resamples=0, output_dir=str(tmp_path / "out"),
                   save_predictions=True)  # fmt: skip
    evaluate("perfect", EvaluationArguments(task="captioning", **options))
    found = json.loads((tmp_path / "out/ids-train-captioning.predictions.json").read_text())
    assert found[0] == {"image_id": 10, "caption": "red Paper, on a table."} and len(found) == 7
    assert [each["image_id"] for each in found] == [10, 11, 13, 14, 15, 16, 17]  # the third picture is missing
    evaluate("perfect", EvaluationArguments(task="vqa", caption_column="question", **options))
    found = json.loads((tmp_path / "out/ids-train-vqa-question.predictions.json").read_text())
    assert found[0] == {"question_id": 0, "answer": "red"} and found[2]["question_id"] == 3  # the number of the row
    evaluate("perfect", EvaluationArguments(task="captioning", **options | {"save_predictions": False}))
    assert not (tmp_path / "out/ids-train-captioning.predictions.json").exists()  # which belonged to other results
    with pytest.raises(ArgumentError, match="--save_predictions has no effect on --task retrieval"):
        EvaluationArguments(task="retrieval", save_predictions=True)


def test_options_that_are_not_given_are_as_in_training(tmp_path):
    given = EvaluationArguments(task="retrieval", rerank_top_k=16)
    assert not as_in_training(given, None).rerank_posterior and as_in_training(given, tmp_path).prompt == ""
    trained = {"arguments": {"rerank_posterior": True, "prompt": "a picture of "}, "metrics": {}}
    (tmp_path / "results.json").write_text(json.dumps(trained))
    filled = as_in_training(given, tmp_path)
    assert filled.rerank_posterior and filled.prompt == "a picture of "
    assert not as_in_training(dataclasses.replace(given, rerank_posterior=False), tmp_path).rerank_posterior
    assert as_in_training(dataclasses.replace(given, prompt=""), tmp_path).prompt == ""
    (tmp_path / "results.json").write_text("[1, 2]")
    assert as_in_training(given, tmp_path).prompt == ""


def test_command_reranks_by_captioning(blip, data, tmp_path):
    options = dict(dataset=str(data), split="train", task="retrieval", rerank_top_k=3, resamples=0,
                   rerank_by="matching,captioning", output_dir=str(tmp_path))  # fmt: skip
    metrics = evaluate(str(blip), EvaluationArguments(**options))["metrics"]
    assert "reranked_image_to_text_recall_at_1" in metrics and "reranked_lm_image_to_text_recall_at_1" in metrics
    for part in tiny_pair():
        part.save_pretrained(tmp_path / "clip")
    with pytest.raises(UnsupportedModelError, match="cannot rerank: re-ranking by captioning needs"):
        evaluate(str(tmp_path / "clip"), EvaluationArguments(**options))
