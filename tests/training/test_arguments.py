"""Tests of the training options: recipes, YAML files, the command line and validation."""

import dataclasses

import pytest
import torch
from vlp.processing.prompts import TEMPLATES
from vlp.training.arguments import names_of
from vlp.training.command_line import RECIPES, TASKS, build_parser, parse
from vlp.training.families.blip import BlipArguments, new_config
from vlp.training.families.clip import ClipArguments

import vlp
from vlp.errors import ArgumentError

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_recipe_names():
    assert NAMES == [
        "blip-captioning", "blip-emoji", "blip-emoji-towers", "blip-fine-tuning", "blip-nlvr", "blip-retrieval",
        "blip-scenes", "blip-scenes-captions", "blip-scenes-nlvr", "blip-scenes-vqa", "blip-towers", "blip-vit-b-16",
        "blip-vit-l-16", "blip-vqa", "blip2-emoji", "blip2-emoji-2", "blip2-scenes", "blip2-scenes-vqa",
        "blip2-stage-1", "blip2-stage-2", "capfilt", "check", "clip-emoji", "clip-emoji-towers", "clip-emoji-vit",
        "clip-fine-tuning", "clip-towers", "rn101", "rn50", "rn50x4", "shards", "vit-b-16", "vit-b-32", "vit-l-14",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "millions"),
    # Parameters in millions, from open_clip's docs/model_profile.csv.
    [("vit-b-32", 151.28), ("vit-b-16", 149.62), ("vit-l-14", 427.62), ("rn50", 102.01), ("rn101", 119.69),
     ("rn50x4", 178.3)],
)  # fmt: skip
def test_recipes_build_models_of_published_size(name, millions):
    arguments = parse(["--config", name])
    fields = arguments.model | {
        "vision_config": arguments.model["vision_config"] | {"image_size": arguments.image_size}
    }
    with torch.device("meta"):
        model = vlp.VlpClipModel(vlp.VlpClipConfig(**fields))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("words", "steps", "minutes"),
    [
        ("", 2000, None), ("--max_train_minutes 3", None, 3.0), ("--max_train_minutes=3", None, 3.0),
        ("--max_train_steps 9", 9, None), ("--num_train_epochs 2", None, None),
        ("--max_train_minutes none", 2000, None), ("--max_train_minutes 3 --max_train_steps 9", 9, 3.0),
        ("--config blip-emoji --max_train_steps 9", 9, None), ("--config blip-emoji", 2500, None),
        ("--config blip-scenes", None, 15.0),
    ],
)  # fmt: skip
def test_length_on_the_command_line_replaces_that_of_the_recipe(words, steps, minutes):
    arguments = parse(words.split(), "blip" if "blip" in words else "clip")
    assert (arguments.max_train_steps, arguments.max_train_minutes) == (steps, minutes)


@pytest.mark.parametrize(
    ("task", "words", "recipe"),
    [
        ("clip", "", "clip-fine-tuning"), ("blip", "", "blip-fine-tuning"), ("blip2", "", "blip2-stage-1"),
        ("blip2", "--stage 2", "blip2-stage-2"), ("blip", "--task captioning", "blip-captioning"),
        ("blip", "--task retrieval", "blip-retrieval"), ("blip", "--task vqa", "blip-vqa"),
        ("blip", "--task nlvr", "blip-nlvr"), ("clip", "--lock_image_tower", "clip-fine-tuning"),
    ],
)  # fmt: skip
def test_a_trained_model_is_fine_tuned_by_default(task, words, recipe):
    """The default recipe's learning rate, which is for random weights, would spoil a trained model."""
    found = parse(["--model_name_or_path", "runs/mine", *words.split()], task)
    assert found.output_dir == f"runs/{recipe}"
    same = parse(["--config", recipe, "--model_name_or_path", "runs/mine", *words.split()], task)
    assert found == same and found.learning_rate <= 1e-4 and found.optimizer == "adamw"
    own = parse(["--config", TASKS[task].recipe, "--model_name_or_path", "runs/mine", *words.split()], task)
    assert own.learning_rate >= 1e-3


@pytest.mark.parametrize(
    ("words", "warmup"),
    [("", 80), ("--max_train_steps 2000", 80), ("--max_train_steps 200", 20), ("--max_train_steps 3", 1),
     ("--max_train_steps 200 --warmup_steps 70", 70), ("--max_train_minutes 1", 80)],
)  # fmt: skip
def test_a_short_run_has_a_short_warm_up(words, warmup):
    assert parse(words.split()).warmup_steps == warmup


def test_default_recipe_and_command_line_overrides():
    arguments = parse([])
    assert arguments.dataset_name == "emoji" and arguments.output_dir == "runs/clip-emoji"
    assert arguments.max_train_steps == 2000 and arguments.max_train_minutes is None
    assert arguments.templates in TEMPLATES
    changed = parse(
        ["--learning_rate", "1e-5", "--no-cache_images", "--output_dir", "x", "--model", '{"projection_dim": 8}']
    )
    assert parse(["--eval_split", "none", "--max_train_minutes", "none"]).eval_split is None
    assert changed.learning_rate == 1e-5 and not changed.cache_images and changed.model == {"projection_dim": 8}


def test_other_data_do_not_need_the_columns_of_the_included_data():
    arguments = parse(["--dataset_name", "pairs.csv"])
    own = (arguments.tag_column, arguments.tag_share, arguments.class_column, arguments.eval_split)
    assert own == (None, 0.0, None, None) and parse([]).tag_column == "tags"
    assert parse(["--dataset_name", "pairs.csv", "--eval_split", "test"]).eval_split == "test"


@pytest.mark.parametrize("task", TASKS)
def test_help_lists_every_option_and_default(task, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser(task).parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    fields = dataclasses.fields(TASKS[task].arguments)
    for item in fields:
        assert f"--{item.name}" in text and item.metadata["help"].strip(), item.name
    assert text.count("(default: ") >= len(fields) and f"accelerate launch training {task}" in text


def test_blip_recipe_uses_original_hyperparameters():
    arguments = parse(["--config", "blip-vit-b-16"], "blip")
    assert (arguments.learning_rate, arguments.weight_decay, arguments.adam_beta2) == (3e-4, 0.05, 0.999)
    assert (arguments.momentum, arguments.queue_size, arguments.alpha, arguments.alpha_epochs) == (0.995, 57600, 0.4, 2)
    assert (arguments.crop_scale, arguments.horizontal_flip, arguments.random_augment) == (0.2, True, True)
    config = new_config(arguments)
    assert config.vision_config.hidden_size == config.text_config.encoder_hidden_size == 768
    assert config.text_config.label_smoothing == 0.1 and config.image_text_hidden_size == 256


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--momentum", "1.5"], "--momentum must be between 0 and 1, got 1.5"),
        (["--contrastive_share", "2"], "--contrastive_share must be between 0 and 1, got 2.0"),
        (["--queue_size", "0"], "--queue_size must be at least 1, got 0"),
        (["--itm_negatives", "0"], "--itm_negatives must be at least 1, got 0"),
        (["--group_images", "2"], "--group_images is for --task vqa and nlvr"),
        (["--group_images", "0", "--task", "nlvr"], "--group_images must be at least 1, got 0"),
        (["--alpha_epochs", "-1"], "--alpha_epochs must not be negative, got -1.0"),
        (["--crop_scale", "0"], "--crop_scale must be positive, got 0.0"),
    ],
)
def test_invalid_blip_options_raise(argv, message):
    with pytest.raises(ArgumentError, match=message):
        parse(argv, "blip")


def test_invalid_model_configs_raise():
    for fields, message in (
        ('{"text_config": {"hidden_siz": 8}}', "has no field 'hidden_siz'; did you mean hidden_size?"),
        ('{"text_config": {"max_position_embeddings": 4}}', "--max_length 24 is above max_position_embeddings, 4"),
        ('{"vision_config": {"patch_size": 7}}', "must be divisible by patch_size"),
    ):
        with pytest.raises(ArgumentError, match=message):
            new_config(parse(["--model", fields], "blip"))


def test_options_from_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1\nadam_epsilon: 1e-7\nmax_train_steps: 7\n")
    arguments = parse(["--config", str(path)])
    assert arguments.max_train_steps == 7 and arguments.learning_rate == 1.0 and arguments.adam_epsilon == 1e-7
    assert arguments.output_dir == "runs/mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "one `name: value` per line; got a list"),
        ("a: [\n", "is not valid YAML"),
        ("learning_rat: 1.0\n", "'learning_rat' is not an option"),
        ("seed: many\n", "seed must be of type .*'many'"),
    ],
)
def test_invalid_yaml_files_raise(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=message):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "vit-h"], "recipes are blip-captioning, .*clip-emoji, "),
        (["--per_device_train_batch_size", "0"], "at least 1, got 0"),
        (["--per_device_train_batch_size", "1"], "no negatives"),
        (["--learning_rate", "-1"], "must be positive, got -1.0"),
        (["--warmup_steps", "-1"], "must not be negative, got -1"),
        (["--tag_share", "1.5"], "between 0 and 1, got 1.5"),
        (["--lock_image_tower"], "--lock_image_tower needs --image_tower or --model_name_or_path"),
        (["--unlock_text_layers", "2"], "--unlock_text_layers 2 needs --lock_text_tower"),
        (["--image_pooling", "cls"], "--image_pooling needs --image_tower"),
        (["--tower_learning_rate", "0"], "--tower_learning_rate must be positive"),
        (["--eval_split", "train"], "is the training split"),
        (["--adam_beta2", "1"], "must be below 1"),
        (["--push_to_hub"], "needs --hub_model_id"),
        (["--hub_model_id", "me/x"], "has no effect without --push_to_hub"),
        (["--augmentation", "crop"], "--cache_images needs"),
        (["--templates", "x"], "one of name, photo, .*got 'x'"),
        (["--caption_column", "a,b,c", "--tag_column", "t,u"], "--tag_column has 2 entries and --caption_column 3"),
        (["--caption_column", "a,b", "--templates", "emoji,x"], "one of name, photo, .*got 'x'"),
        (["--class_names", "x"], "one of cifar100, .*got 'x'"),
        (["--tag_column", "none"], "--tag_share 0.25 needs --tag_column"),
        (["--hold_out", "noto"], "COLUMN=VALUE or a share of the pictures such as 10%, got 'noto'"),
        (["--hold_out", "100%"], "such as 10%, got '100%'"),
        (["--max_train_minutes", "0"], "must be positive, got 0.0"),
    ],
)
def test_invalid_options_raise_before_loading(argv, message):
    with pytest.raises(ArgumentError, match=message):
        parse(argv)


def test_choices_are_listed_in_help_and_validated(capsys):
    assert "{softmax,sigmoid}" in build_parser("clip").format_help()
    with pytest.raises(SystemExit):
        parse(["--loss", "triplet"])
    assert "invalid choice: 'triplet'" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="--loss must be one of softmax, sigmoid, got 'triplet'"):
        ClipArguments(loss="triplet")


def test_help_tells_what_the_default_recipe_sets():
    text = " ".join(build_parser("clip").format_help().split())
    rate = parse([]).learning_rate
    assert f"peak learning rate (default: 0.0005; with the recipe clip-emoji: {rate})" in text
    assert "(default: none; with the recipe" in text and "with the recipe clip-emoji: {" not in text


def test_bound_and_shown_options():
    options = ClipArguments()
    bound, shown = names_of(options, "bound"), names_of(options, "shown")
    assert {"dataset_name", "tag_column", "caption_column", "tokenizer_name", "seed", "loss"} <= set(bound)
    assert {"learning_rate", "max_train_steps", "report_to", "output_dir"}.isdisjoint(bound)
    assert {"learning_rate", "seed", "loss"} <= set(shown) and "output_dir" not in shown
    blip = names_of(BlipArguments(), "bound")
    assert {"answer_column", "label_column", "second_image_column", "task"} <= set(blip)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("option", ["learning_rate", "max_train_minutes", "tag_share", "weight_decay", "ema_decay"])
def test_options_must_be_finite(option, value):
    with pytest.raises(ArgumentError, match=f"--{option} must be a finite number, got {value}"):
        parse([f"--{option}={value}"])
