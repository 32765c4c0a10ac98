"""The card is rendered from facts; a fact that is missing drops its section. Run: pytest tests/test_model_cards.py"""

import json

import pytest
from conftest import tiny_config
from huggingface_hub import ModelCard
from PIL import Image
from vlp.model_cards.card import render_card, write_card


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
        arguments=arguments,
    )
    return results | changes


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_every_fact_is_told(tmp_path, tower):
    tiny_config(tower, architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    history = [{"step": step, "samples": step, "contrastive": 5 / step} for step in range(1, 20)]
    history[-1]["matching"] = 0.5  # a loss that begins late
    example = {"image": Image.new("RGB", (8, 8)), "label": "a $ sign", "predictions": [("cat", 0.7), ("$x^{$", 0.3)]}
    write_card(tmp_path, facts(history=history, losses=["contrastive", "matching"]), [example] * 3)
    card = ModelCard.load(tmp_path / "README.md")
    for text in ("1,234,567", "1,234 optimiser steps", "5,678 samples", "25.00 %", "empty caption: 2", "CC BY 4.0",
                 "learning_rate | 0.001", "seed | 3", "over 10 names", "50 pairs of the split `test`", "loss.png",
                 "examples.png", "ViT, 3 layers" if tower == "vit" else "ModifiedResNet, 1-2-1"):  # fmt: skip
        assert text in card.content, text
    assert "patch_dropout" not in card.content
    assert card.data.language == "vi" and card.data.datasets == ["me/pairs"]
    assert {r.metric_name: r.metric_value for r in card.data.eval_results}["Zero-shot top-1 accuracy"] == 0.25
    assert Image.open(tmp_path / "examples.png").width > 200
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["examples"][0]["predictions"][0] == ["cat", 0.7]


def test_what_is_not_known_is_left_out(tmp_path):
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    write_card(tmp_path, facts(metrics={}, classes=None, evaluation_pairs=None, training_pairs=None), [])
    text = (tmp_path / "README.md").read_text()
    for absent in ("## Results", "examples.png", "loss.png", "pairs;", "None"):
        assert absent not in text, absent
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_a_card_is_rendered_again_from_its_folder_alone(tmp_path):
    tiny_config(architectures=["VlpClipModel"]).save_pretrained(tmp_path)
    write_card(tmp_path, facts(), [])
    written = (tmp_path / "README.md").read_text()
    assert str(render_card(tmp_path)) == written.rstrip("\n") or str(render_card(tmp_path)) == written
