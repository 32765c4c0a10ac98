"""BLIP matches one step of the original pre-training code (salesforce/BLIP) on random weights.

The tests run on every fixture blip_pretrain_*.safetensors in the folder VLP_REFERENCE (default: tests/reference).
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close
from vlp.modeling_vlp.exchange import salesforce
from vlp.modeling_vlp.exchange.places import import_state, places_of
from vlp.training.objectives.blip import BlipObjective
from vlp.training.objectives.momentum import Teacher

import vlp

FOLDER = Path(os.environ.get("VLP_REFERENCE", Path(__file__).parents[1] / "reference"))
FIXTURES = sorted(FOLDER.glob("blip_pretrain_*.safetensors"))
pytestmark = pytest.mark.reference

RULES = salesforce.RULES["VlpBlipForPreTraining"]


def pairs(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]):
    """Yield each of our tensors with its counterpart, if `theirs` has one."""
    for name, value in ours.items():
        for place in places_of(name, RULES):
            if place.name in theirs:
                yield value, place.take(theirs[place.name])


class Fixture:
    def __init__(self, path: Path):
        self.tensors = load_file(path)
        self.facts = json.loads(path.with_suffix(".json").read_text())
        vision, text = self.facts["vision"], self.facts["text"]
        config = vlp.VlpBlipConfig(
            vision_config={
                "image_size": self.facts["image_size"], "patch_size": vision["patch_size"],
                "hidden_size": vision["hidden_size"], "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["heads"], "intermediate_size": vision["intermediate_size"],
                "layer_norm_eps": vision["layer_norm_eps"],
            },
            text_config={
                "vocab_size": text["vocab_size"], "hidden_size": text["hidden_size"],
                "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"],
                "intermediate_size": text["intermediate_size"], "layer_norm_eps": text["layer_norm_eps"],
                "max_position_embeddings": text["max_position_embeddings"], "pad_token_id": text["pad_token_id"],
                "eos_token_id": text["sep_token_id"], "bos_token_id": text["decode_token_id"],
                "enc_token_id": text["encode_token_id"], "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0, "label_smoothing": self.facts["label_smoothing"],
            },
            image_text_hidden_size=self.facts["embed_dim"],
        )  # fmt: skip
        state = {name[6:]: value for name, value in self.tensors.items() if name.startswith("state.")}
        self.model = vlp.VlpBlipForPreTraining(config)
        own = {name: value for name, value in state.items() if not re.fullmatch(salesforce.TEACHER, name)}
        self.model.load_state_dict(import_state(own, self.model.state_dict(), RULES, salesforce.IGNORED))
        teacher = Teacher(self.model, self.facts["momentum"], self.facts["queue_size"])
        teacher.load_state_dict(salesforce.teacher_from(state, config))
        self.objective = BlipObjective(
            self.model, teacher, alpha=self.facts["alpha"], alpha_steps=0, exclude_duplicates=False
        )

    def __getattr__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def step(self) -> dict[str, torch.Tensor]:
        """Run one step, with the hard negatives of the original code."""
        rows = torch.arange(len(self.pixel_values))
        self.objective.before_step(step=10**6)
        losses = self.objective(
            pixel_values=self.pixel_values, input_ids=self.input_ids, text_index=rows, caption_ids=rows, image_ids=rows,
            negatives=(self.image_negative_index, self.text_negative_index),
        )  # fmt: skip
        sum(losses.values()).backward()
        self.objective.after_step()
        return losses


@pytest.fixture(params=FIXTURES, ids=lambda path: path.stem)
def original(request) -> Fixture:
    return Fixture(request.param)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert equality within 1e-5 of the largest value."""
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_fixtures_exist():
    assert FIXTURES, f"no blip_pretrain_*.safetensors in {FOLDER}"


def test_losses_match_the_original(original):
    losses = original.step()
    for name in ("itc", "itm", "lm"):
        assert_close(losses[name], original.tensors[f"loss_{name}"], rtol=1e-5, atol=0)


def test_gradients_match_the_original(original):
    original.step()
    gradients = {name[5:]: value for name, value in original.tensors.items() if name.startswith("grad.")}
    ours = {name: parameter.grad for name, parameter in original.model.named_parameters()}
    compared = list(pairs(ours, gradients))
    for gradient, expected in compared:
        close(gradient, expected)
    assert len(gradients) == 10 and len(compared) >= 10


def test_queue_and_teacher_after_the_step_match_the_original(original):
    original.step()
    teacher = original.objective.teacher
    close(teacher.image_queue.T, original.tensors["after.image_queue"])
    close(teacher.text_queue.T, original.tensors["after.text_queue"])
    assert int(teacher.position) == int(original.tensors["after.queue_ptr"])
    after = {re.sub(r"^after\.(\w+)_m\.", r"\1.", name): value for name, value in original.tensors.items()
             if re.match(r"after\.\w+_m\.", name)}  # fmt: skip
    compared = list(pairs(teacher.model.state_dict(), after))
    assert compared
    for value, expected in compared:
        close(value, expected)


@torch.no_grad()
def test_outputs_of_each_mode_match_the_original(original):
    model = original.model.eval()
    vision = model.get_image_features(original.pixel_values)
    close(vision.last_hidden_state, original.image_embeds)
    ids, mask = original.input_ids, original.attention_mask
    real = mask.bool()  # outputs at padding positions are never used
    text = model.text_model(ids, mask).last_hidden_state
    close(text[real], original.text_embeds[real])
    memory = model.text_model.memory_of(vision.last_hidden_state)
    encode = torch.cat([torch.full_like(ids[:, :1], model.config.text_config.enc_token_id), ids[:, 1:]], 1)
    both = model.text_model(encode, mask, memory).last_hidden_state
    close(both[real], original.multimodal_embeds[real])
    close(model.match(ids, mask, memory), original.itm_logits)
    decode = torch.cat([torch.full_like(ids[:, :1], model.config.text_config.bos_token_id), ids[:, 1:]], 1)
    logits = model.lm_head(model.text_model(decode, mask, memory, decode=True).last_hidden_state)
    close(logits[real], original.decoder_logits[real])
    assert F.normalize(vision.pooler_output, dim=-1).norm(dim=-1).allclose(torch.ones(len(ids)))
