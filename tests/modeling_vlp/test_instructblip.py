"""InstructBLIP: the Q-Former reads the instruction, too (parity with transformers: test_exchange_instructblip.py)."""

import pytest
import torch
from conftest import tiny_blip2, tiny_language_model
from torch.testing import assert_close

import vlp

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
INSTRUCTIONS = torch.tensor([[5, 9, 7, 8, 3], [5, 11, 3, 0, 0]])


def instructed() -> vlp.VlpInstructBlipForConditionalGeneration:
    torch.manual_seed(0)
    return vlp.VlpInstructBlipForConditionalGeneration.from_pre_training(tiny_blip2(), tiny_language_model("llama"))


def test_it_starts_from_stage_1_with_the_layers_of_its_text():
    model, source = instructed(), tiny_blip2()
    assert type(model.config) is vlp.VlpInstructBlipConfig and model.config.model_type == "vlp_instructblip"
    for name, value in source.qformer.state_dict().items():
        assert torch.equal(model.qformer.state_dict()[name], value), name


def test_everything_that_is_trained_has_a_gradient():
    model = instructed().train()
    ids = torch.tensor([[4, 7, 9], [4, 8, 2]])
    model(PIXELS, ids, labels=ids, qformer_input_ids=INSTRUCTIONS).loss.backward()
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert "qformer.layers.0.text_mlp.mlp.fc1.weight" in trained
    assert not [name for name in trained if model.get_parameter(name).grad is None]


@torch.no_grad()
def test_padding_of_instructions_has_no_influence():
    model = instructed().eval()
    both = model.prefix(PIXELS, qformer_input_ids=INSTRUCTIONS)
    assert_close(both[1:], model.prefix(PIXELS[1:], qformer_input_ids=INSTRUCTIONS[1:, :3]))


def test_instructions_are_needed_one_for_each_image():
    model = instructed()
    with pytest.raises(ValueError, match="needs qformer_input_ids, the instructions as tokens of the Q-Former"):
        model.generate(PIXELS)
    with pytest.raises(ValueError, match="There are 1 instructions for 2 images"):
        model.generate(PIXELS, qformer_input_ids=INSTRUCTIONS[:1])
