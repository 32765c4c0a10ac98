"""sentence-transformers loads the folders of vlp, embeds with them as vlp does, and trains them."""

import pytest
import torch
from conftest import saved_pair
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from vlp.inference import load

sentence_transformers = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
COLOURS = ["red", "green", "blue", "white"]


@pytest.mark.parametrize("kind", ["clip", "blip"])
def test_embeddings_are_those_of_vlp(kind, tmp_path):
    name = saved_pair(kind, tmp_path / kind)
    model, predictor = sentence_transformers.SentenceTransformer(name, device="cpu"), load(name, "embed")
    pictures = [Image.new("RGB", (40, 33), colour) for colour in COLOURS]
    images, texts = (torch.tensor(model.encode(each)) for each in (pictures, COLOURS))
    assert_close(F.normalize(images, dim=-1), predictor.embed_images(pictures), rtol=0, atol=1e-5)
    assert_close(F.normalize(texts, dim=-1), predictor.embed_texts(COLOURS), rtol=0, atol=1e-5)
    assert model.similarity(images, texts).shape == (4, 4)


def test_its_trainer_trains_a_clip_that_vlp_loads(tmp_path):
    model = sentence_transformers.SentenceTransformer(saved_pair("clip", tmp_path / "clip"), device="cpu")
    pictures = [Image.new("RGB", (32, 32), colour) for colour in COLOURS]
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=25, per_device_train_batch_size=4, learning_rate=3e-3,
        report_to="none", use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict({"anchor": COLOURS, "positive": pictures}),
        loss=losses.MultipleNegativesRankingLoss(model),
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(str(tmp_path / "trained"))
    predictor = load(str(tmp_path / "trained"), "embed")
    similarity = predictor.similarity(predictor.embed_images(pictures), predictor.embed_texts(COLOURS))
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2, 3]
