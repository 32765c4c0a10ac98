"""Merging models: averages of weights, greedy soups, curves and error messages."""

import json
import sys
import typing

import pytest
import torch
from conftest import tiny_blip, tiny_pair
from safetensors.torch import load_file
from test_training import pairs  # noqa: F401  # the fixture
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor
from vlp.model_cards.card import METRIC_NAMES
from vlp.training.evaluation.arguments import TaskName

import vlp.commands.merge as module
from vlp.commands.merge import MergeError, average, greedy, main, merge, shares_of
from vlp.errors import ArgumentError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Three models that were trained from the same start: it, and the same with noise."""
    folder, names = tmp_path_factory.mktemp("models"), []
    for number in range(3):
        model, processor = tiny_pair("resnet")
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.data += 0.01 * number * torch.randn(parameter.shape, generator=generator)
        model.vision_model.bn1.num_batches_tracked += number
        for part in (model, processor):
            part.save_pretrained(folder / f"model-{number}")
        names.append(str(folder / f"model-{number}"))
    return names


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


@pytest.mark.parametrize(
    ("given", "shares"), [("0.25", [0.75, 0.25, 0]), ("3,1", [0.75, 0.25, 0]), ("1,1,2", [0.25, 0.25, 0.5]),
                          (None, [1 / 3] * 3)],
)  # fmt: skip
def test_weights_are_averaged(models, tmp_path, given, shares):
    used = models[:2] if not shares[2] else models
    folder = merge(used, tmp_path / "merged", weights=given)
    states = [weights(name) for name in models]
    for name, value in weights(folder).items():
        wanted = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        if value.is_floating_point():
            assert_close(value, wanted.float(), rtol=0, atol=1e-7, msg=name)
        else:
            assert value == states[0][name]
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model(**processor(text=["a cat"], images=torch.zeros(3, 32, 32, dtype=torch.uint8), return_tensors="pt"))
    card = (folder / "README.md").read_text()
    assert "base_model_relation: merge" in card and "model-0" in card and str(tmp_path) not in card


def test_average_of_equal_weights_is_exact():
    state = {"weight": torch.tensor([0.1, 1e-30], dtype=torch.bfloat16)}
    assert torch.equal(average([state, dict(state)], [0.3, 0.7])["weight"], state["weight"])


@pytest.mark.parametrize("given", ["x", "1,2,3", "-1,2", "0,0", "nan,1", "1.5"])
def test_wrong_weights_are_refused(given):
    with pytest.raises(ArgumentError, match="--weights"):
        shares_of(given, 2)


def test_models_that_differ_are_refused(models, tmp_path):
    model, processor = tiny_pair("vit")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vit")
    with pytest.raises(MergeError, match="vision_config"):
        merge([models[0], str(tmp_path / "vit")], tmp_path / "merged")
    tiny_blip().save_pretrained(tmp_path / "blip")
    processor.save_pretrained(tmp_path / "blip")
    with pytest.raises(MergeError, match="VlpBlipForPreTraining, the other a VlpClipModel"):
        merge([models[0], str(tmp_path / "blip")], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_every_task_has_a_metric():
    assert set(module.METRIC) == set(typing.get_args(TaskName)) - {"few-shot"} and set(module.METRIC.values()) <= set(
        METRIC_NAMES
    )


def test_settings_of_training_do_not_matter(models, tmp_path):
    model, processor = tiny_pair("resnet")
    model.config.embedding_sizes, model.config.text_config.attention_dropout = [4], 0.1
    for part in (model, processor):
        part.save_pretrained(tmp_path / "tuned")
    assert merge([models[0], str(tmp_path / "tuned")], tmp_path / "merged", weights="0.5").is_dir()


def test_folder_that_is_read_is_not_replaced(models):
    with pytest.raises(ArgumentError, match="which is read"):
        merge(models, models[1])


def test_greedy_soup_keeps_the_models_that_help(models, monkeypatch):
    """The score is best at the average of the first and the third model."""
    merged = module.read_members(models)
    states = [member.state for member in merged.members]
    goal = average(states, [0.5, 0.0, 0.5])

    def score(model, processor, evaluations):
        return [-sum((value - goal[name]).abs().sum().item() for name, value in model.state_dict().items()
                     if value.is_floating_point())]  # fmt: skip

    monkeypatch.setattr(module, "scores", score)
    assert greedy(merged, [None]) == [0.5, 0.0, 0.5]


def test_curve_has_both_models_at_its_ends(models, pairs, tmp_path, monkeypatch, capsys):  # noqa: F811
    data = f"{pairs} --split test --class_column caption"
    command = ["vlp merge", *models[:2], "--curve", "3", "--data", data, "--data", f"{data} --task retrieval"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path / "curve")])
    main()
    found = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert [point["weight"] for point in found["points"]] == [0.0, 0.5, 1.0]
    assert found["metrics"] == ["1: zero_shot_top1, pairs.csv, test, caption",
                                "2: text_to_image_recall_at_1, pairs.csv, test, caption"]  # fmt: skip
    assert (tmp_path / "curve" / "curve.png").stat().st_size > 1000
    evaluations = [module.prepare(data), module.prepare(f"{data} --task retrieval")]
    for number, point in ((0, 0), (1, 2)):
        model, processor = (kind.from_pretrained(models[number]) for kind in (AutoModel, AutoProcessor))
        assert found["points"][point]["values"] == module.scores(model, processor, evaluations)
    assert "Wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["a"]}, "at least two models"),
        ({"curve_points": 1, "data": ["emoji"]}, "--curve must be from 2"),
        ({"models": ["a", "b", "c"], "curve_points": 3, "data": ["emoji"]}, "between two models"),
        ({"greedy_soup": True}, "need --data"),
        ({"data": ["emoji"]}, "need --data"),
        ({"weights": "0.5", "greedy_soup": True, "data": ["emoji"]}, "Choose one"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ArgumentError, match=message):
        merge(**{"models": ["a", "b"], "output_dir": tmp_path / "merged"} | options)
