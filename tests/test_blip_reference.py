"""BLIP against one step of the original pre-training code (salesforce/BLIP) on random weights.

Every fixture blip_pretrain_*.safetensors in the folder VLP_REFERENCE (default: tests/reference) is tried.
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
from vlp.training.momentum import Teacher
from vlp.training.objectives import BlipObjective

import vlp

FOLDER = Path(os.environ.get("VLP_REFERENCE", Path(__file__).parent / "reference"))
FIXTURES = sorted(FOLDER.glob("blip_pretrain_*.safetensors"))
pytestmark = pytest.mark.reference

RENAMED = (
    (r"^visual_encoder\.(cls_token|pos_embed|patch_embed\.proj)", r"vision_model.embeddings.\1"),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"embeddings\.patch_embed\.proj", "embeddings.patch_embedding"),
    (r"embeddings\.cls_token", "embeddings.class_embedding"),
    (r"embeddings\.pos_embed", "embeddings.position_embedding.weight"),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^text_(en|de)coder\.(bert\.)?embeddings\.LayerNorm\.", "text_model.embeddings.layer_norm."),
    (r"^text_(en|de)coder\.(bert\.)?embeddings\.", "text_model.embeddings."),
    (r"^text_encoder\.encoder\.layer\.(\d+)\.attention\.", r"text_model.layers.\1.encoder_attention."),
    (r"^text_decoder\.bert\.encoder\.layer\.(\d+)\.attention\.", r"text_model.layers.\1.decoder_attention."),
    (r"^text_(en|de)coder\.(bert\.)?encoder\.layer\.(\d+)\.crossattention\.", r"text_model.layers.\3.cross_attention."),
    (r"_attention\.self\.(query|key|value)\.", lambda m: f"_attention.attention.{m[1][0]}_proj."),
    (r"_attention\.output\.dense\.", "_attention.attention.out_proj."),
    (r"_attention\.output\.LayerNorm\.", "_attention.layer_norm."),
    (r"^text_(en|de)coder\.(bert\.)?encoder\.layer\.(\d+)\.intermediate\.dense\.", r"text_model.layers.\3.mlp.fc1."),
    (r"^text_(en|de)coder\.(bert\.)?encoder\.layer\.(\d+)\.output\.dense\.", r"text_model.layers.\3.mlp.fc2."),
    (r"^text_(en|de)coder\.(bert\.)?encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"text_model.layers.\3.layer_norm."),
    (r"^text_decoder\.cls\.predictions\.transform\.LayerNorm\.", "lm_head.layer_norm."),
    (r"^text_decoder\.cls\.predictions\.(transform\.)?", "lm_head."),
    (r"^lm_head\.bias$", "lm_head.decoder.bias"),
)


def from_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names of vlp: the joint projection parted, tables without their leading dimensions."""
    result = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if name.endswith(("class_embedding", "position_embedding.weight")):
            value = value.flatten(0, -2) if name.endswith("weight") else value.flatten()
        if match := re.search(r"attn\.qkv\.(weight|bias)$", name):
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                result[f"{name[: match.start()]}self_attn.{part}_proj.{match[1]}"] = tensor
            continue
        result[name] = value
    return result


def teacher_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    online = {name.replace("_m.", ".", 1): value for name, value in state.items() if re.match(r"\w+_m\.", name)}
    return {name: value for name, value in from_original(online).items() if "cross_attention" not in name}


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
        own = {name: value for name, value in state.items() if not re.match(r"\w+_m\.|.*queue", name)}
        self.model.load_state_dict(from_original(own), strict=True)
        teacher = Teacher(self.model, self.facts["momentum"], self.facts["queue_size"])
        teacher.model.load_state_dict(teacher_state(state), strict=True)
        teacher.image_queue.copy_(state["image_queue"].T)
        teacher.text_queue.copy_(state["text_queue"].T)
        teacher.position.fill_(int(state["queue_ptr"]))
        teacher.filled.fill_(self.facts["queue_size"])
        self.objective = BlipObjective(
            self.model, teacher, alpha=self.facts["alpha"], alpha_steps=0, exclude_duplicates=False
        )

    def __getattr__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def step(self) -> dict[str, torch.Tensor]:
        """One step, up to the gradients, with the hard negatives that the original drew."""
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
    """Equal to 1e-5 of the largest value."""
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_there_are_fixtures():
    assert FIXTURES, f"no blip_pretrain_*.safetensors in {FOLDER}"


def test_the_three_losses_are_the_originals(original):
    losses = original.step()
    for name in ("itc", "itm", "lm"):
        assert_close(losses[name], original.tensors[f"loss_{name}"], rtol=1e-5, atol=0)


def test_gradients_are_the_originals(original):
    original.step()
    gradients = {name[5:]: value for name, value in original.tensors.items() if name.startswith("grad.")}
    parameters = dict(original.model.named_parameters())
    for name, value in from_original(gradients).items():
        close(parameters[name].grad, value)
    assert len(gradients) == 10


def test_the_queue_and_the_teacher_after_the_step_are_the_originals(original):
    original.step()
    teacher = original.objective.teacher
    close(teacher.image_queue.T, original.tensors["after.image_queue"])
    close(teacher.text_queue.T, original.tensors["after.text_queue"])
    assert int(teacher.position) == int(original.tensors["after.queue_ptr"])
    after = {name[6:]: value for name, value in original.tensors.items() if re.match(r"after\.\w+_m\.", name)}
    assert after
    for name, value in teacher_state(after).items():
        close(teacher.model.state_dict()[name], value)


@torch.no_grad()
def test_the_outputs_of_each_mode_are_the_originals(original):
    model = original.model.eval()
    vision = model.get_image_features(original.pixel_values)
    close(vision.last_hidden_state, original.image_embeds)
    ids, mask = original.input_ids, original.attention_mask
    real = mask.bool()  # what stands in padding is read by nothing
    text = model.text_model(ids, mask).last_hidden_state
    close(text[real], original.text_embeds[real])
    memory = model.text_model.read(vision.last_hidden_state)
    encode = torch.cat([torch.full_like(ids[:, :1], model.config.text_config.enc_token_id), ids[:, 1:]], 1)
    both = model.text_model(encode, mask, memory).last_hidden_state
    close(both[real], original.multimodal_embeds[real])
    close(model.match(ids, mask, memory), original.itm_logits)
    decode = torch.cat([torch.full_like(ids[:, :1], model.config.text_config.bos_token_id), ids[:, 1:]], 1)
    logits = model.lm_head(model.text_model(decode, mask, memory, decode=True).last_hidden_state)
    close(logits[real], original.decoder_logits[real])
    assert F.normalize(vision.pooler_output, dim=-1).norm(dim=-1).allclose(torch.ones(len(ids)))
