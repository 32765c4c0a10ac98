"""Cached features of locked towers: exact, and the same batches as without the cache."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training import RESNET, arguments, pairs  # noqa: F401  # the fixture
from torch.testing import assert_close
from vlp.training.data import cached_pairs
from vlp.training.data.cached_pairs import CachedPairs
from vlp.training.run import train

from vlp.errors import ArgumentError

LOCKED = {"lock_image_tower": True, "max_train_steps": 6, "cache_images": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tower(pairs, tmp_path):  # noqa: F811
    """A trained CLIP whose ResNet has batch norm statistics; its space differs from that of the runs below."""
    train(arguments(pairs, tmp_path / "source", image_size=32, model=RESNET, augmentation="none", max_train_steps=3))
    return str(tmp_path / "source")


def history(folder) -> list[float]:
    return [entry["contrastive"] for entry in json.loads((folder / "results.json").read_text())["history"]]


@pytest.mark.parametrize("texts", [False, True])
def test_cached_run_equals_the_run_with_towers(pairs, tower, tmp_path, texts):  # noqa: F811
    more = {"text_tower": tower, "lock_text_tower": True} if texts else {}
    options = LOCKED | more | dict(image_tower=tower, image_size=32, augmentation="none", save_steps=3)
    options["model"] = {
        "projection_dim": 16,
        "visual_projection_hidden_size": 24,
        "projection_dropout": 0.1,
        "text_config": RESNET["text_config"],
    }
    for name, cached in (("without", False), ("with", True)):
        train(arguments(pairs, tmp_path / name, cache_features=cached, **options))
    assert_close(history(tmp_path / "with"), history(tmp_path / "without"), rtol=1e-5, atol=1e-6)
    with_, without = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert_close(with_, without, rtol=1e-3, atol=1e-5)
    first = {name: value.clone() for name, value in with_.items()}
    states = sorted((tmp_path / "with.resume").glob("step-*"))
    train(arguments(pairs, tmp_path / "with", cache_features=True, resume_from_checkpoint=str(states[0]), **options))
    assert_close(load_file(tmp_path / "with" / "model.safetensors"), first, rtol=0, atol=0)


def test_features_are_computed_once_and_anew_when_something_changes(pairs, tower, tmp_path, monkeypatch):  # noqa: F811
    calls, compute = [], cached_pairs.embed_texts
    monkeypatch.setattr(cached_pairs, "embed_texts", lambda *given: calls.append(1) or compute(*given))
    options = LOCKED | dict(image_tower=tower, image_size=32, cache_features=True, augmentation="strong")
    options["model"] = {"projection_dim": 16, "text_config": RESNET["text_config"]}
    for more, count in (({}, 1), ({}, 1), ({"learning_rate": 1e-4}, 1), ({"seed": 1}, 1), ({"cached_views": 3}, 2)):
        train(arguments(pairs, tmp_path / "run", **options | more))
        assert len(calls) == count
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2


def test_epochs_combine_all_views(tmp_path):
    views, rows = 3, 4
    np.save(tmp_path / "images.npy", np.arange(views * rows, dtype=np.float32).reshape(views, rows, 1))
    np.save(tmp_path / "texts.npy", np.arange(views * rows, dtype=np.float32)[:, None])
    for name in ("text_of", "caption_ids"):
        np.save(tmp_path / f"{name}.npy", np.arange(views * rows).reshape(views, rows))
    np.save(tmp_path / "image_ids.npy", np.arange(rows))
    (tmp_path / "facts.json").write_text(json.dumps({"bad": [[2, "broken"]]}))
    draws = ((number, epoch) for epoch in range(100) for number in range(rows))
    batches = CachedPairs(tmp_path).batches(draws, rows)
    seen = set()
    for number in range(views**2):
        batch = next(batches)
        image, text = batch.pixels[:, 0].long(), batch.input_ids[batch.text_index, 0].long()
        assert torch.equal(image % rows, torch.arange(rows)) and torch.equal(text % rows, torch.arange(rows))
        assert batch.skipped == ([(2, "broken")] if number == 0 else [])
        seen.add((int(image[0]) // rows, int(text[0]) // rows))
    assert len(seen) == views**2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lock_image_tower": False}, "needs --lock_image_tower"),
        ({"unlock_image_layers": 1}, "and no unlocked layers"),
        ({"lora_rank": 2}, "does not go with"),
        ({"dataset_name": "a.tar"}, "no shards"),
        ({"cached_views": 0}, "--cached_views must be at least 1"),
        ({"cache_features": False, "cached_views": 2}, "needs --cache_features"),
    ],
)
def test_options_that_change_features_are_refused(pairs, tmp_path, options, message):  # noqa: F811
    given = {
        "cache_images": False,
        "image_tower": "x",
        "cache_features": True,
        "lock_image_tower": True,
        "dataset_name": str(pairs),
    } | options
    with pytest.raises(ArgumentError, match=message):
        arguments(given.pop("dataset_name"), tmp_path / "run", **given)
