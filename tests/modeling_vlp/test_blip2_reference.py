"""BLIP-2 stage 1 matches one step of the LAVIS code on random weights.

The tests run on every fixture blip2_stage1_*.safetensors in the folder VLP_REFERENCE (default: tests/reference).
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from vlp.modeling_vlp.exchange import lavis
from vlp.modeling_vlp.exchange.places import import_state, places_of
from vlp.training.objectives.blip2 import Blip2Objective

import vlp

FOLDER = Path(os.environ.get("VLP_REFERENCE", Path(__file__).parents[1] / "reference"))
FIXTURES = sorted(FOLDER.glob("blip2_stage1_*.safetensors"))
pytestmark = pytest.mark.reference


class Fixture:
    def __init__(self, path: Path):
        self.tensors, self.facts = load_file(path), json.loads(path.with_suffix(".json").read_text())
        facts = self.facts
        tower = {"hidden_size": facts["encoder_width"], "num_hidden_layers": 1, "num_attention_heads": 2,
                 "intermediate_size": 8, "image_size": 8, "patch_size": 8}  # fmt: skip
        config = vlp.VlpBlip2Config(
            vision_config=tower,
            qformer_config={
                "vocab_size": facts["vocab_size"], "hidden_size": facts["hidden_size"],
                "num_hidden_layers": facts["layers"], "num_attention_heads": facts["heads"],
                "intermediate_size": facts["intermediate_size"], "layer_norm_eps": facts["layer_norm_eps"],
                "cross_attention_frequency": facts["cross_attention_frequency"],
                "max_position_embeddings": facts["max_position_embeddings"], "pad_token_id": facts["pad_token_id"],
                "bos_token_id": facts["decode_token_id"], "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            num_query_tokens=facts["num_query_tokens"], image_text_hidden_size=facts["embed_dim"],
        )  # fmt: skip
        state = {name[6:]: value for name, value in self.tensors.items() if name.startswith("state.")}
        self.model = vlp.VlpBlip2ForPreTraining(config)
        self.rules = lavis.rules_of(config)
        wanted = {name: v for name, v in self.model.state_dict().items() if not name.startswith("vision_model.")}
        self.model.load_state_dict(import_state(state, wanted, self.rules, lavis.IGNORED), strict=False)

    def __getattr__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def step(self) -> dict[str, torch.Tensor]:
        """Run one step up to the gradients, with the hard negatives of the original code."""
        objective = Blip2Objective(
            self.model, exclude_duplicates=False, label_smoothing=self.facts["label_smoothing_itc"]
        )
        rows = torch.arange(len(self.input_ids))
        losses = objective(
            pixel_values=self.vision_hidden_states, input_ids=self.input_ids, text_index=rows, caption_ids=rows,
            image_ids=rows, negatives=(self.image_negative_index, self.text_negative_index),
        )  # fmt: skip
        sum(losses.values()).backward()
        return losses


@pytest.fixture(params=FIXTURES, ids=lambda path: path.stem)
def original(request) -> Fixture:
    return Fixture(request.param)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert equality within 1e-5 of the largest value."""
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_fixtures_exist():
    assert FIXTURES, f"no blip2_stage1_*.safetensors in {FOLDER}"


def test_losses_match_the_original(original):
    losses = original.step()
    for ours, theirs in (("itc", "itc"), ("itm", "itm"), ("itg", "lm")):
        assert_close(losses[ours], original.tensors[f"loss_{theirs}"], rtol=1e-5, atol=0)


def test_gradients_match_the_original(original):
    original.step()
    gradients = {name[5:]: value for name, value in original.tensors.items() if name.startswith("grad.")}
    compared = 0
    for name, parameter in original.model.named_parameters():
        for place in places_of(name, original.rules):
            if place.name in gradients:
                close(parameter.grad, place.take(gradients[place.name]))
                compared += 1
    assert len(gradients) == compared == 9


def test_forward_losses_match_the_original(original):
    """`forward`, as Trainer calls it, draws new hard negatives, so its matching loss is not compared."""
    losses = original.model(
        input_ids=original.input_ids, vision_states=original.vision_hidden_states, label_smoothing=0.1,
        caption_ids=torch.arange(len(original.input_ids)),
    )  # fmt: skip
    assert_close(losses.loss_itc, original.tensors["loss_itc"], rtol=1e-5, atol=0)
    assert_close(losses.loss_lm, original.tensors["loss_lm"], rtol=1e-5, atol=0)


@torch.no_grad()
def test_outputs_match_the_original(original):
    model = original.model.eval()
    memory = model.memory_of(original.vision_hidden_states)
    close(model.query(memory).last_hidden_state, original.query_output)
    text = model.qformer(input_ids=original.input_ids, attention_mask=original.attention_mask).last_hidden_state
    real = original.attention_mask.bool()  # outputs at padding positions are never used
    close(text[real], original.text_output[real])
