"""Tests of linear probes: the search for the regularisation, few shots, and the tasks from data to results."""

import json

import numpy as np
import pytest
from conftest import tiny_blip, tiny_pair
from PIL import Image
from processes import run_group
from vlp.processing.blip import VlpBlipImageProcessor, VlpBlipProcessor, train_tokenizer
from vlp.training.evaluate import evaluate, main
from vlp.training.evaluation import probes
from vlp.training.evaluation.arguments import EvaluationArguments

from vlp.conversion import convert
from vlp.errors import ArgumentError
from vlp.inference import load

COLOURS = ["red", "green", "blue", "yellow"]


def clusters(count: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around the corners of a cube, with labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    corners = np.eye(4)
    return corners[labels] + noise * generator.normal(size=(count, 4)), labels


def test_strength_is_the_best_of_a_full_search():
    train, validation = clusters(40, 0.6), clusters(400, 0.6, seed=1)
    grid = [10 ** (step / probes.STEPS) for step in range(-48, 49)]
    found = probes.choose_strength(train, validation)
    values = {strength: probes.accuracy(probes.fit(*train, strength), *validation) for strength in grid}
    assert any(found == pytest.approx(strength) for strength in grid)
    assert values[min(grid, key=lambda strength: abs(strength - found))] >= max(values.values()) - 0.01


def test_classes_that_were_not_seen_are_never_predicted():
    features, labels = clusters(20, 0.1)
    two = labels < 2
    scores = probes.scores_of(probes.fit(features[two], labels[two], 1.0), features, 4)
    assert np.isinf(scores[:, 2:]).all() and (scores[two].argmax(axis=1) == labels[two]).all()
    with pytest.raises(ArgumentError, match="at least two classes"):
        probes.fit(features[labels == 1], labels[labels == 1], 1.0)


def test_shots_are_drawn_class_by_class():
    labels = np.array([0] * 9 + [1] * 3 + [2])
    train, validation = probes.draw_shots(labels, 2, seed=0)
    assert [int((labels[train] == label).sum()) for label in range(3)] == [2, 2, 1]
    assert [int((labels[validation] == label).sum()) for label in range(3)] == [2, 1, 0]
    assert not set(train) & set(validation)
    assert list(probes.draw_shots(labels, 2, seed=0)[0]) == list(train) != list(probes.draw_shots(labels, 2, seed=1)[0])
    kept, off = probes.split_off(labels, 0.34, seed=0)
    assert [int((labels[off] == label).sum()) for label in range(3)] == [3, 1, 0]
    assert sorted([*kept, *off]) == list(range(13))


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Cards in four colours, of six different brightnesses each; the last two of each are the test split."""
    folder = tmp_path_factory.mktemp("cards")
    lines = ["image,caption,split,size"]
    for number in range(24):
        colour, shade = COLOURS[number % 4], number // 4
        image = Image.new("RGB", (32, 32), colour)
        image.paste((40 * shade,) * 3, (0, 0, 4, 32))
        image.save(folder / f"{number}.png")
        lines.append(f"{number}.png,{colour},{'test' if shade > 3 else 'val' if shade == 3 else 'train'},{shade}")
    (folder / "cards.csv").write_text("\n".join(lines))
    return folder / "cards.csv"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for part in tiny_pair():
        part.save_pretrained(folder / "clip")
    convert(folder / "clip", folder / "transformers", to="transformers")
    tiny_blip().save_pretrained(folder / "blip")
    tokenizer = train_tokenizer(COLOURS * 20, 118, 30)
    VlpBlipProcessor(VlpBlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(
        folder / "blip"
    )
    return folder


@pytest.mark.parametrize("name", ["clip", "transformers", "blip"])
@pytest.mark.parametrize("validation_split", [None, "val"])
def test_linear_probe_learns_the_classes(models, cards, tmp_path, name, validation_split):
    options = {"dataset": str(cards), "resamples": 20, "output_dir": str(tmp_path), "group_column": "size"}
    results = evaluate(
        str(models / name), EvaluationArguments(task="linear-probe", validation_split=validation_split, **options)
    )
    assert set(results["metrics"]) == {"linear_probe_top1", "linear_probe_mean_per_class"}
    assert results["metrics"]["linear_probe_top1"] == 1.0 and results["rows"] == 8 and results["classes"] == 4
    assert set(results["groups"]) == {"4", "5"}
    assert (tmp_path / "cards-test-linear-probe.png").exists()
    assert "Linear probe, top-1 accuracy" in (tmp_path / "cards-test-linear-probe.md").read_text()


def test_few_shot_with_different_numbers_of_shots(models, cards, tmp_path):
    results = evaluate(
        str(models / "clip"),
        EvaluationArguments(dataset=str(cards), task="few-shot", shots="1,2", resamples=20, output_dir=str(tmp_path)),
    )
    assert list(results["metrics"]) == ["few_shot_top1_1", "few_shot_top1_2"]
    assert results["metrics"]["few_shot_top1_2"] == 1.0 and "few_shot_top1_1" in results["intervals"]


def test_features_are_those_before_the_projection(models):
    predictor = load(models / "clip", "embed")
    image = Image.new("RGB", (32, 32), "red")
    assert predictor.image_features([image]).shape == (1, predictor.model.config.vision_config.hidden_size)
    assert predictor.embed_images([image]).shape == (1, predictor.model.config.projection_dim)


def test_processes_give_the_result_of_one(models, cards, tmp_path):
    command = ["evaluate", str(models / "clip"), "--dataset", str(cards), "--task", "linear-probe", "--resamples", "5"]
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run_group(processes, tmp_path, main, argv=[*command, "--output_dir", str(folder)])
        found.append(json.loads((folder / "cards-test-linear-probe.json").read_text()))
    assert found[0]["metrics"] == found[1]["metrics"] and found[1]["processes"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "--split train is what the classifier learns from"),
        ({"validation_split": "train"}, "--validation_split train is the training split"),
        ({"embedding_size": 4}, "--embedding_size has no effect"),
        ({"shots": "1,x"}, "--shots must be whole numbers"),
        ({"few_shot_draws": 0}, "--few_shot_draws must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        EvaluationArguments(task="few-shot", **options)
