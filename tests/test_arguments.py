"""Options: recipes, the command line, and what is refused. Run: pytest tests/test_arguments.py"""

import dataclasses

import pytest
import torch
from vlp.processing.prompts import TEMPLATES
from vlp.training.arguments import RECIPES, ArgumentError, TrainingArguments, build_parser, parse

import vlp

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_the_recipes_are_there():
    assert NAMES == ["clip-emoji", "clip-emoji-vit", "rn101", "rn50", "rn50x4", "vit-b-16", "vit-b-32", "vit-l-14"]


@pytest.mark.parametrize(
    ("name", "millions"),
    # open_clip's docs/model_profile.csv
    [("vit-b-32", 151.28), ("vit-b-16", 149.62), ("vit-l-14", 427.62), ("rn50", 102.01), ("rn101", 119.69),
     ("rn50x4", 178.3)],
)  # fmt: skip
def test_recipes_build_the_models_of_the_paper(name, millions):
    arguments = parse(["--config", name])
    fields = arguments.model | {
        "vision_config": arguments.model["vision_config"] | {"image_size": arguments.image_size}
    }
    with torch.device("meta"):
        model = vlp.VlpClipModel(vlp.VlpClipConfig(**fields))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_embedded_recipe_is_the_default_and_the_command_line_wins():
    arguments = parse([])
    assert arguments.dataset_name == "emoji" and arguments.output_dir == "runs/clip-emoji"
    assert arguments.max_train_minutes <= 6 and arguments.templates in TEMPLATES
    changed = parse(
        ["--learning_rate", "1e-5", "--no-cache_images", "--output_dir", "x", "--model", '{"projection_dim": 8}']
    )
    assert parse(["--eval_split", "none", "--max_train_minutes", "none"]).eval_split is None
    assert changed.learning_rate == 1e-5 and not changed.cache_images and changed.model == {"projection_dim": 8}


def test_help_tells_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(TrainingArguments):
        assert f"--{item.name}" in text and item.metadata["help"].strip(), item.name
    assert text.count("(default: ") >= len(dataclasses.fields(TrainingArguments))


def test_a_file_of_options(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1\nadam_epsilon: 1e-7\nmax_train_steps: 7\n")
    arguments = parse(["--config", str(path)])
    assert arguments.max_train_steps == 7 and arguments.learning_rate == 1.0 and arguments.adam_epsilon == 1e-7
    assert arguments.output_dir == "runs/mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "one `name: value` a line; got a list"),
        ("a: [\n", "is no YAML"),
        ("learning_rat: 1.0\n", "'learning_rat' is no option"),
        ("seed: many\n", "seed must be of type .*'many'"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=message):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "vit-h"], "recipes are clip-emoji, "),
        (["--per_device_train_batch_size", "0"], "at least 1, got 0"),
        (["--per_device_train_batch_size", "1"], "no negatives"),
        (["--learning_rate", "-1"], "must be positive, got -1.0"),
        (["--warmup_steps", "-1"], "must not be negative, got -1"),
        (["--tag_share", "1.5"], "between 0 and 1, got 1.5"),
        (["--loss", "triplet"], "one of softmax, sigmoid, got 'triplet'"),
        (["--lock_image_tower", "--lock_text_tower"], "Nothing is left to train"),
        (["--text_tower", "x"], "needs --tokenizer_name"),
        (["--eval_split", "train"], "is what is trained on"),
        (["--adam_beta2", "1"], "must be below 1"),
        (["--push_to_hub"], "needs --hub_model_id"),
        (["--hub_model_id", "me/x"], "does nothing without --push_to_hub"),
        (["--augmentation", "crop"], "--cache_images needs"),
        (["--templates", "x"], "one of name, photo, .*got 'x'"),
        (["--class_names", "x"], "one of cifar10, .*got 'x'"),
        (["--tag_column", "none"], "--tag_share 0.25 needs --tag_column"),
        (["--hold_out", "noto"], "COLUMN=VALUE, got 'noto'"),
        (["--max_train_minutes", "0"], "must be positive, got 0.0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(words, message):
    with pytest.raises(ArgumentError, match=message):
        parse(words)
