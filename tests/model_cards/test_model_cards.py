"""Model cards are rendered from stored facts; sections without facts are omitted."""

import ast
import json
import re
from pathlib import Path

import pytest
from conftest import tiny_blip, tiny_config
from huggingface_hub import ModelCard
from PIL import Image
from vlp.model_cards.card import (
    describe_architecture,
    examples_of,
    prompt_for_use,
    render_card,
    reranking,
    seen_parts,
    write_card,
)
from vlp.model_cards.plots import wrapped

from vlp.architectures import architecture
from vlp.errors import ArgumentError


def facts(**changes) -> dict:
    arguments = dict(
        dataset_name="me/pairs",
        eval_dataset_name=None,
        eval_split="test",
        hold_out=None,
        hub_model_id=None,
        output_dir="runs/mine",
        language="vi",
        data_license="CC BY 4.0",
        learning_rate=0.001,
        seed=3,
        patch_dropout=None,
    )
    results = dict(
        metrics={"zero_shot_top1": 0.25, "text_to_image_recall_at_10": 0.5},
        history=[],
        evaluations=[],
        losses=["contrastive"],
        steps=1234,
        samples=5678,
        training_seconds=9.5,
        training_pairs=100,
        evaluation_pairs=50,
        classes=10,
        bad_rows="empty caption: 2",
        parameters=1_234_567,
        precision="bf16",
        processes=2,
        hardware="2 CPU cores",
        versions={"torch": "2"},
        shown_options=["learning_rate", "seed", "patch_dropout", "layer_decay"],
        arguments=arguments,
    )
    return results | changes


def save_evaluation(folder: Path, name: str = "emoji-test-zero-shot", column: str = "caption", **changes) -> None:
    """Save an evaluation in the format of `training.evaluation.results`."""
    arguments = {"task": "zero-shot", "dataset": "emoji", "split": "test", "class_column": None, "templates": "name",
                 "caption_column": column, "group_column": "group"}  # fmt: skip
    evaluation = {"rows": 60, "pictures": 50, "classes": 40, "arguments": arguments,
                  "metrics": {"zero_shot_top1": 0.5}, "intervals": {"zero_shot_top1": [0.4, 0.6]},
                  "most_confused": [["cat", "dog", 3]],
                  "groups": {"food": {"zero_shot_top1": 0.75, "rows": 30},
                             "flags": {"zero_shot_top1": 0.1, "rows": 20}}}  # fmt: skip
    (folder / "evaluations").mkdir(exist_ok=True)
    (folder / f"evaluations/{name}.json").write_text(json.dumps(evaluation | changes))


def test_another_reading_of_the_text_by_itm_is_described():
    config = tiny_blip().config
    assert "Matching (ITM)" not in dict(describe_architecture(config))
    config.itm_pooling = "mean"
    assert "mean over the text's states" in dict(describe_architecture(config))["Matching (ITM)"]


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_card_contains_every_fact(tmp_path, tower):
    tiny_config(tower, architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    history = [{"step": step, "samples": step, "contrastive": 5 / step} for step in range(1, 20)]
    history[-1]["matching"] = 0.5  # a loss that starts late
    example = {
        "image": Image.new("RGB", (8, 8)),
        "label": "a $ sign",
        "predictions": [("cat", 0.7, True), ("$x^{$", 0.3, False)],
    }
    evaluations = [{"step": step, "zero_shot_top1": step / 100, "cider": 1.0} for step in (5, 10, 19)]
    save_evaluation(tmp_path)
    write_card(tmp_path, facts(history=history, losses=["contrastive", "matching"], evaluations=evaluations),
               [example] * 3)  # fmt: skip
    card = ModelCard.load(tmp_path / "README.md")
    for text in ("1,234,567", "1,234 optimiser steps", "5,678 samples", "50.00 %", "empty caption: 2", "CC BY 4.0",
                 "learning_rate | 0.001", "seed | 3", "40 classes", "con mèo", "not trained on the split `test`",
                 "2 processes", "loss.png", "metrics.png",
                 "examples.png", "ViT, 3 layers" if tower == "vit" else "ModifiedResNet, 1-2-1"):  # fmt: skip
        assert text in card.content, text
    assert "patch_dropout" not in card.content
    assert card.data.language == "vi" and card.data.datasets == ["me/pairs"]
    assert {r.metric_name: r.metric_value for r in card.data.eval_results}["Zero-shot top-1 accuracy"] == 0.5
    assert Image.open(tmp_path / "examples.png").width > 200
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["examples"][0]["predictions"][0] == ["cat", 0.7, True]


def test_seed_zero_is_shown(tmp_path):
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    found = facts()
    found["arguments"] |= {"seed": 0, "layer_decay": 0.0}
    write_card(tmp_path, found, [])
    text = (tmp_path / "README.md").read_text()
    assert "| seed | 0 |" in text and "layer_decay" not in text


def test_unknown_facts_are_omitted(tmp_path):
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    write_card(tmp_path, facts(metrics={}, classes=None, evaluation_pairs=None, training_pairs=None), [])
    text = (tmp_path / "README.md").read_text()
    for absent in ("## Results", "examples.png", "loss.png", "pairs;", "None"):
        assert absent not in text, absent
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_card_is_rendered_again_from_its_folder(tmp_path):
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    write_card(tmp_path, facts(), [])
    written = (tmp_path / "README.md").read_text()
    assert str(render_card(tmp_path)) == written.rstrip("\n") or str(render_card(tmp_path)) == written


def test_card_lists_evaluations_and_known_failures(tmp_path):
    """The evaluations saved by `vlp.training.evaluate`, and the terms of the data's licence."""
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    found = facts()
    found["arguments"] |= {"dataset_name": "emoji", "data_license": None, "language": "en,vi"}
    write_card(tmp_path, found, [])
    save_evaluation(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "evaluations/emoji-test-zero-shot.png")
    card = render_card(tmp_path)
    for text in ("Task zero-shot on 50 pictures (60 rows) of emoji, split `test`, 40 classes",
                 "| 50.00 % | 40.00 % – 60.00 % |", "“cat” for “dog”",
                 "Zero-shot top-1 accuracy (`caption`) by group: flags 10 % (of 20), food 75 % (of 30)",
                 "evaluations/emoji-test-zero-shot.png", "share-alike"):  # fmt: skip
        assert text in card.content, text
    assert card.data.license == "cc-by-sa-4.0" and card.data.language == ["en", "vi"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "retrieval", "rerank_top_k": 0}, ""),
        ({"task": "itm", "rerank_top_k": 16}, ""),
        ({"rerank_by": "matching"}, ", the best 16 candidates of each query re-ranked by ITM (cosine plus ITM logit)"),
        ({"rerank_by": "captioning"}, ", the best 16 candidates of each query re-ranked by captioning"),
        (
            {"rerank_by": "matching,captioning", "rerank_posterior": True},
            ", the best 16 candidates of each query re-ranked by "
            "ITM (ITC probability times ITM odds) and by captioning",
        ),
    ],
)
def test_card_says_how_candidates_were_re_ranked(arguments, words):
    assert reranking({"task": "retrieval", "rerank_top_k": 16} | arguments) == words


def test_predictions_are_no_results_of_an_evaluation(tmp_path):
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    write_card(tmp_path, facts(), [])
    save_evaluation(tmp_path)
    before = str(render_card(tmp_path))
    (tmp_path / "evaluations/emoji-test-captioning.predictions.json").write_text("[]")
    assert str(render_card(tmp_path)) == before


SHIPPED = sorted(path.parent for path in Path(__file__).parents[2].glob("model_cards/*/README.md"))


def figures(card: str) -> list[tuple[str, str, str]]:
    """(data and task, metric, value) of each row of a card's result tables."""
    found, sentence = [], ""
    for line in card.splitlines():
        if line.startswith("Task "):
            sentence = line
        row = re.fullmatch(r"\| (.+?) \| ([\d.]+(?: %)?) \|(?: .*\|)?", line)
        if row and sentence:
            found.append((sentence, row[1], row[2]))
        if line.startswith("## "):
            sentence = ""
    return found


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_card_has_one_figure_per_metric(folder):
    """Each metric of the same data and column appears once, both in the text and in the metadata."""
    card = ModelCard.load(folder / "README.md")
    rows = figures(card.text)
    fewest = {
        "blip2-emoji": 7,
        "blip-scenes-vqa": 1,
        "blip-scenes-nlvr": 1,
        "blip2-scenes-vqa": 1,
    }  # of models that do only one task
    assert len(rows) >= fewest.get(folder.name, 9)
    keys = [(re.sub(r"^Task \S+ on ", "", data), metric) for data, metric, _ in rows]
    assert len(set(keys)) == len(keys)
    metadata = [(r.dataset_type, r.dataset_config, r.dataset_split, r.metric_name) for r in card.data.eval_results]
    assert len(set(metadata)) == len(metadata) == len(rows)
    assert sorted(f"{100 * r.metric_value:.2f}" for r in card.data.eval_results) == sorted(
        value.removesuffix(" %") for _, _, value in rows
    )


def test_a_model_of_questions_is_shown_with_a_question():
    kind = architecture("VlpInstructBlipForConditionalGeneration").card
    for arguments, prompt, legend in (
        ({"prompt_column": "question"}, "Question: what is it? Short answer:", "with a question, a reference answer"),
        ({"prompt": "it is ", "prompt_column": None}, "it is ", "after “it is”"),
    ):
        assert prompt_for_use(arguments) == prompt and legend in examples_of(kind, arguments)


def test_figures_finds_duplicate_metrics():
    card = "## Results\n\nTask itm on 5 pictures of x, split `t`.\n\n| BLEU-4 | 35.65 % | |\n| BLEU-4 | 38.49 % | |\n"
    assert [row[1:] for row in figures(card)] == [("BLEU-4", "35.65 %"), ("BLEU-4", "38.49 %")]


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "](http://evil.example) ![x](http://evil.example/x.png)",
    "first\n# Injected heading",
    "a | b",
    "`tick`",
    "\x1b[31mred",
    "&lt;b&gt;",
    "half \ud800",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_act_as_text_only(tmp_path, text):
    """Class names, captions and names of data come from strangers: in the card, they are shown and do nothing."""
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    groups = {text: {"zero_shot_top1": 0.5, "rows": 2}}
    save_evaluation(tmp_path, groups=groups, most_confused=[[text, text, 3]])
    found = facts()
    found["arguments"] |= {"dataset_name": text, "data_license": text, "hold_out": f"group={text}"}
    write_card(tmp_path, found, [])
    body = (tmp_path / "README.md").read_text().split("---\n", 2)[2]
    body = re.sub(r"`[^`\n]*`|```.*?```", "", body, flags=re.DOTALL)  # code is shown as it is
    assert "<script" not in body and "<img" not in body and "\x1b" not in body
    assert not re.search(r"(?<!\\)\]\(http", body) and "\n# Injected" not in body
    assert len([line for line in body.splitlines() if line.startswith("# ")]) == 1


@pytest.mark.parametrize(
    "name", ['x"y', "it's", "a\\", "new\nline", "\x1b[31mred", '"""', "{folder}", "%s", "a\u2028b"]
)
def test_code_of_the_card_is_python_for_any_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(folder)
    found = facts()
    found["arguments"]["output_dir"] = str(folder)
    write_card(folder, found, [])
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert str(folder) in strings


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "{}", '{"arguments": 1, "metrics": {}}', "[" * 99_999])
def test_other_files_beside_the_evaluations_are_reported(tmp_path, content):
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    write_card(tmp_path, facts(), [])
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations/other.json").write_text(content)
    with pytest.raises(ArgumentError, match=r"other\.json does not hold results of vlp .* move it away"):
        render_card(tmp_path)


def test_a_siglip_is_called_one(tmp_path):
    tiny_config(architectures=["VlpClipModel"], logit_bias_init_value=-10.0).save_pretrained(tmp_path)
    write_card(tmp_path, facts(), [])
    assert "A SigLIP, a CLIP whose scores are independent sigmoids (image tower" in (tmp_path / "README.md").read_text()


def test_licence_can_be_chosen(tmp_path):
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    found = facts(base_models=[{"name": "me/clip", "license": "mit"}])
    found["arguments"] |= {"license": "cc-by-4.0"}
    write_card(tmp_path, found, [])
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.license == "cc-by-4.0" and "The weights: cc-by-4.0." in text


@pytest.mark.parametrize(
    ("bases", "licence", "words"),
    [
        ([], None, "no licence was chosen: all rights are reserved"),
        ([{"name": "me/clip", "license": "mit"}], "mit", "mit, as of me/clip, from which training started"),
        ([{"name": "clip", "license": None}], "other", "clip (unknown)"),
        ([{"name": "gpt2", "license": "mit", "local": False}], "mit", "mit, as of gpt2, from which training started"),
        ([{"name": "me/clip", "license": None, "local": True}], "other", "me/clip (unknown)"),
        ([{"name": "a", "license": "mit"}, {"name": "b", "license": "cc-by-nc-4.0"}], "other", "b (cc-by-nc-4.0)"),
    ],
)
def test_licence_follows_the_models_that_training_started_from(tmp_path, bases, licence, words):
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    write_card(tmp_path, facts(base_models=bases), [])
    text = (tmp_path / "README.md").read_text()
    data = ModelCard(text).data
    assert data.license == licence and words in text
    names = [base["name"] for base in bases if not base.get("local", "/" not in base["name"])]
    assert (data.base_model or []) in (names, "".join(names))


def test_long_texts_are_broken_into_lines():
    assert wrapped("a red circle above a blue star", 12, 4) == ["a red circle", "above a blue", "star"]
    assert wrapped("a red circle above a blue star", 12, 2) == ["a red circle", "above a blu…"]
    assert wrapped("", 12, 1, "  90 %") == ["  90 %"] and wrapped("star", 12, 1, "  90 %") == ["star  90 %"]


@pytest.mark.parametrize(
    ("changes", "evaluated", "words"),
    [
        ({}, "test", "The model was not trained on the split `test`."),
        ({}, "train", "The model was trained on the split `train` of me/pairs: its figures there say little"),
        ({"eval_split": None}, "test", "whether the model was trained on the data below is not known."),
        ({"hold_out": "album=2"}, "train", "The model was not trained on the rows album=2."),
        ({"eval_dataset_name": "b.csv", "eval_split": "train"}, "test", "not trained on the split `train` of b.csv."),
    ],
)
def test_card_says_what_the_model_was_trained_on(changes, evaluated, words):
    arguments = facts()["arguments"] | changes
    assert words in seen_parts(arguments, [{"arguments": {"dataset": "me/pairs", "split": evaluated}}])
