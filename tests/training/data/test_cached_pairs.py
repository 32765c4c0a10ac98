"""Cached features of locked towers: exact, and the same batches as without the cache."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training import RESNET, arguments, pairs  # noqa: F401  # the fixture
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from vlp.training.data import cached_pairs
from vlp.training.data.cached_pairs import CachedPairs
from vlp.training.families.blip import BlipArguments
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
        ({"unlock_image_layers": 1}, "does not go with unlocked layers"),
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


# --- BLIP -------------------------------------------------------------------------------------------------------------

TEXT_MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "max_position_embeddings": 16, "initializer_range": 0.1, "hidden_dropout_prob": 0.0,
              "attention_probs_dropout_prob": 0.0}  # fmt: skip


def blip_arguments(dataset, folder, **options) -> BlipArguments:
    defaults = dict(
        dataset_name=str(dataset), output_dir=str(folder), image_size=32, max_length=12, vocab_size=64,
        augmentation="none", per_device_train_batch_size=8, max_train_steps=6, learning_rate=1e-3, warmup_steps=2,
        queue_size=24, momentum=0.9, logging_steps=1, mixed_precision="no", contrastive_share=0.2,
        model={"image_text_hidden_size": 16, "text_config": TEXT_MODEL}, lock_vision_tower=True,
    )  # fmt: skip
    return BlipArguments(**defaults | options)


@pytest.fixture
def vit(tmp_path) -> str:
    """A small ViT of transformers."""
    config = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
                       patch_size=8)  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_cached_blip_equals_the_run_with_the_tower(pairs, tower, vit, tmp_path, kind):  # noqa: F811
    source = tower if kind == "resnet" else vit
    for name, cached in (("without", False), ("with", True)):
        train(blip_arguments(pairs, tmp_path / name, vision_tower=source, cache_features=cached))
    losses = [
        [[entry.get(loss) for loss in ("itc", "itm", "lm")] for entry in facts["history"]]
        for facts in (json.loads((tmp_path / name / "results.json").read_text()) for name in ("with", "without"))
    ]
    assert losses[0][-1][2] is not None
    assert_close(
        torch.tensor([[value or 0 for value in entry] for entry in losses[0]]),
        torch.tensor([[value or 0 for value in entry] for entry in losses[1]]),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    trained, before = load_file(tmp_path / "with" / "model.safetensors"), None
    if kind == "vit":
        before = load_file(f"{vit}/model.safetensors")
        for name, value in before.items():
            if f"vision_model.model.{name}" in trained:
                assert torch.equal(trained[f"vision_model.model.{name}"], value), name
        assert sum(f"vision_model.model.{name}" in trained for name in before) > 20


def test_states_may_be_wider_than_what_is_pooled(pairs, tmp_path):  # noqa: F811
    """The pooled output of `stages` is wider than the states that texts attend to."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / "resnet")
    model = {"image_text_hidden_size": 16, "vision_projection_hidden_size": 20, "projection_dropout": 0.1}
    train(blip_arguments(
        pairs, tmp_path / "run", vision_tower=str(tmp_path / "resnet"), vision_pooling="stages", cache_features=True,
        cached_views=2, augmentation="strong", model=model | {"text_config": TEXT_MODEL},
    ))  # fmt: skip
    config = json.loads((tmp_path / "run/config.json").read_text())
    vision = config["vision_config"]
    assert vision["states_size"] == 16 < vision["hidden_size"] and config["text_config"]["encoder_hidden_size"] == 16
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert model.vision_proj[1].in_features == vision["hidden_size"] and model.vision_proj[1].out_features == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lock_vision_tower": False}, "needs --lock_vision_tower"),
        ({"task": "captioning"}, "for --task pretrain"),
        ({"cache_images": True}, "does not go with --cache_images"),
        ({"cache_features": False, "vision_tower": None}, "a new tower must be trained"),
        ({"trim_vocabulary": True}, "--trim_vocabulary needs --bert_name_or_path"),
    ],
)
def test_options_of_blip_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ArgumentError, match=message):
        blip_arguments("x", tmp_path / "run", **{"vision_tower": "x", "cache_features": True} | options)


def test_first_layers_of_a_bert_with_the_words_of_the_captions(pairs, tower, tmp_path):  # noqa: F811
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "unused", "a", "red", "card", "##s", "green", "blue", "!"]
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    bert = BertModel(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                                intermediate_size=64, max_position_embeddings=20))  # fmt: skip
    bert.save_pretrained(folder)
    train(blip_arguments(
        pairs, tmp_path / "run", vision_tower=tower, bert_name_or_path=str(folder), trim_vocabulary=True,
        max_train_steps=1, learning_rate=1e-9, model={"text_config": {"num_hidden_layers": 2}},
    ))  # fmt: skip
    model = AutoModel.from_pretrained(tmp_path / "run")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "run").tokenizer
    assert len(model.text_model.layers) == 2 and "unused" not in tokenizer.get_vocab()
    for word in ("red", "card", "[CLS]"):
        own = model.text_model.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids(word)]
        assert_close(own, bert.embeddings.word_embeddings.weight[words.index(word)], rtol=0, atol=1e-5)
    assert tokenizer("a red card")["input_ids"] == [
        tokenizer.convert_tokens_to_ids(word) for word in ("[CLS]", "a", "red", "card", "[SEP]")
    ]
