"""Tests of Matryoshka embeddings: the loss, training, evaluation and the search index with fewer numbers."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_batch, tiny_model
from safetensors.torch import load_file
from test_training import arguments, pairs  # noqa: F401  # the fixture
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModel
from vlp.modeling_vlp.losses import clip_loss, siglip_loss
from vlp.training.evaluate import evaluate
from vlp.training.evaluation.arguments import EvaluationArguments
from vlp.training.objectives.clip import ClipObjective
from vlp.training.run import train

from vlp.commands.index import Index, build
from vlp.errors import ArgumentError, UnsupportedModelError
from vlp.inference import load


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):  # noqa: F811
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("runs") / "cards"
    train(arguments(pairs, folder, max_train_steps=120, augmentation="none", embedding_sizes="4,8"))
    return folder


@pytest.mark.parametrize("bias", [None, -10.0])
def test_loss_is_the_mean_over_the_sizes(bias):
    """As sentence-transformers' MatryoshkaLoss, which takes the sum: the first numbers, normalised again."""
    model = tiny_model(embedding_sizes=[4, 12], logit_bias_init_value=bias)
    batch = tiny_batch(model, 6)
    index = torch.arange(6)
    losses = ClipObjective(model)(batch["pixel_values"], batch["input_ids"], index, index, index)
    image = model.get_image_features(batch["pixel_values"]).pooler_output
    text = model.get_text_features(batch["input_ids"]).pooler_output
    wanted = []
    for size in (4, 12, 24):
        pair = [F.normalize(each[:, :size], dim=-1) for each in (image, text)]
        scale = model.logit_scale.exp()
        wanted.append(clip_loss(*pair, scale) if bias is None else siglip_loss(*pair, scale, model.logit_bias))
    assert_close(losses["contrastive" if bias is None else "sigmoid"], sum(wanted) / 3, rtol=1e-5, atol=1e-6)


def test_shorter_embeddings_are_the_first_numbers(trained):
    model = AutoModel.from_pretrained(trained)
    assert model.config.embedding_sizes == [4, 8] and model.config.projection_dim == 16
    whole, short = load(trained, "embed"), load(trained, "embed", embedding_size=4)
    texts = ["red card", "blue card"]
    assert_close(short.embed_texts(texts), F.normalize(whole.embed_texts(texts)[:, :4], dim=-1))


def test_evaluation_with_shorter_embeddings(trained, pairs):  # noqa: F811
    options = {"dataset": str(pairs), "task": "retrieval", "resamples": 0}
    whole = evaluate(str(trained), EvaluationArguments(**options))["metrics"]
    short = evaluate(str(trained), EvaluationArguments(embedding_size=4, **options))["metrics"]
    assert whole["text_to_image_recall_at_1"] == short["text_to_image_recall_at_1"] == 1.0
    names = {path.name for path in (trained / "evaluations").glob("*.json")}
    assert {"pairs-test-retrieval.json", "pairs-test-retrieval-4-dimensions.json"} <= names


def test_index_keeps_shorter_embeddings(trained, pairs, tmp_path, monkeypatch, capsys):  # noqa: F811
    build(pairs.parent, tmp_path / "index", str(trained), embedding_size=4)
    stored = load_file(tmp_path / "index" / "embeddings.safetensors")["embeddings"]
    assert stored.shape == (40, 4)
    assert json.loads((tmp_path / "index" / "index.json").read_text())["embedding_size"] == 4
    from vlp.commands import index as module

    monkeypatch.setattr("sys.argv", ["vlp index", "search", str(tmp_path / "index"), "red card", "--top_k", "5"])
    module.main()
    hits = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(hits) == sorted(f"{number}.png" for number in range(0, 40, 8))
    build(pairs.parent, tmp_path / "index", str(trained))  # embeddings of another size are not reused
    assert Index(tmp_path / "index").embeddings.shape == (40, 16)


@pytest.mark.parametrize("sizes", ["x", "4,,8", "0,4", "4,17"])
def test_wrong_sizes_are_refused(pairs, tmp_path, sizes):  # noqa: F811
    with pytest.raises(ArgumentError, match="--embedding_sizes"):
        train(arguments(pairs, tmp_path / "run", embedding_sizes=sizes))


def test_models_without_shorter_embeddings_are_refused(trained, tmp_path):
    with pytest.raises(UnsupportedModelError, match="from 1 to 16"):
        load(trained, "embed", embedding_size=17)
    model = AutoModel.from_pretrained(trained)
    model.config.embedding_sizes = None
    model.save_pretrained(tmp_path / "plain")
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / file).write_bytes((trained / file).read_bytes())
    with pytest.raises(UnsupportedModelError, match="not trained for shorter embeddings"):
        load(tmp_path / "plain", "embed", embedding_size=4)
