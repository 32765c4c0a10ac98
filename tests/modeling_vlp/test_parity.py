"""With the same random weights, outputs and gradients match open_clip and transformers' CLIPModel."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel
from vlp.modeling_vlp.exchange.open_clip import RULES
from vlp.modeling_vlp.exchange.places import export_state

import vlp

open_clip = pytest.importorskip("open_clip")

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
       "num_attention_heads": 4}  # fmt: skip


def batch(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(5, 12, dtype=torch.long)  # padded with 0, as by OpenAI's tokenizer
    for row in range(5):
        length = 4 + row
        ids[row, :length] = torch.randint(1, 298, (length,), generator=generator)
        ids[row, 0], ids[row, length] = 298, 299
    return torch.randn(5, 3, side, side, generator=generator), ids


def relative(actual: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Assert equality within 1e-5 of the largest value."""
    difference = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert difference <= 1e-5, f"{name}: {difference:.2e}"


@pytest.mark.parametrize(("tower", "activation"), [("vit", "quick_gelu"), ("vit", "gelu"), ("resnet", "gelu")])
def test_outputs_and_gradients_match_open_clip(tower, activation):
    text = TEXT | {"hidden_act": activation}
    if tower == "vit":
        vision = VIT | {"hidden_act": activation}
        theirs_vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
    else:
        vision = {"model_type": "vlp_modified_resnet", "image_size": 64, "depths": [2, 1, 1, 1], "embedding_size": 16}
        theirs_vision = {"image_size": 64, "layers": [2, 1, 1, 1], "width": 16}
    torch.manual_seed(0)
    ours = vlp.VlpClipModel(vlp.VlpClipConfig(vision_config=vision, text_config=text, projection_dim=48))
    for module in ours.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # with zero gains, the blocks would have no effect
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    theirs = open_clip.CLIP(
        embed_dim=48,
        vision_cfg=theirs_vision,
        text_cfg={"context_length": 77, "vocab_size": 300, "width": 32, "heads": 4, "layers": 3},
        quick_gelu=activation == "quick_gelu",
    )
    report = theirs.load_state_dict(export_state(ours.state_dict(), RULES)[0], strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= {"attn_mask"}
    pixels, ids = batch(vision["image_size"])
    if tower == "resnet":  # batch norm amplifies float32 rounding beyond the tolerance
        ours, theirs, pixels = ours.double(), theirs.double(), pixels.double()
        theirs.attn_mask = theirs.attn_mask.double()
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        output = ours(ids, pixels, return_loss=True)
        padded = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]))
        image, text_embeds, scale = theirs(pixels, padded)
        relative(output.image_embeds, image)
        relative(output.text_embeds, text_embeds)
        relative(output.logits_per_image, scale * image @ text_embeds.T)
        expected = open_clip.ClipLoss()(image, text_embeds, scale)
        relative(output.loss, expected)
    ours.zero_grad(), theirs.zero_grad()
    output.loss.backward()
    expected.backward()
    gradients = export_state({name: p.grad for name, p in ours.named_parameters()}, RULES)[0]
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        # The gradients of key biases are only rounding errors, so compare them with the largest gradient.
        difference = (gradients[name] - parameter.grad).abs().max()
        assert difference <= 1e-5 * max(parameter.grad.abs().max(), 1e-2 * largest), name


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_outputs_and_gradients_match_transformers(activation):
    text = TEXT | {"hidden_act": activation, "eos_token_id": 299, "bos_token_id": 298, "pad_token_id": 0}
    vision = VIT | {"hidden_act": activation}
    torch.manual_seed(0)
    ours = vlp.VlpClipModel(vlp.VlpClipConfig(vision_config=vision, text_config=text, projection_dim=48)).eval()
    theirs = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=48)).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    pixels, ids = batch(32)
    mine = ours(ids, pixels, return_loss=True, output_hidden_states=True)
    their = theirs(input_ids=ids, pixel_values=pixels, return_loss=True, output_hidden_states=True)
    assert list(mine.keys()) == list(their.keys())
    for name in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        relative(mine[name], their[name], name)
    for tower in ("text_model_output", "vision_model_output"):
        relative(mine[tower].last_hidden_state, their[tower].last_hidden_state, tower)
        relative(mine[tower].pooler_output, their[tower].pooler_output, tower)
        assert len(mine[tower].hidden_states) == len(their[tower].hidden_states)
        for a, b in zip(mine[tower].hidden_states, their[tower].hidden_states, strict=True):
            relative(a, b, tower)
    features = theirs.get_image_features(pixels)
    assert type(ours.get_image_features(pixels)) is type(features)
    relative(ours.get_image_features(pixels).pooler_output, features.pooler_output)
    relative(ours.get_text_features(ids).pooler_output, theirs.get_text_features(ids).pooler_output)
    larger = torch.randn(2, 3, 48, 64)
    relative(
        ours.get_image_features(larger, interpolate_pos_encoding=True).pooler_output,
        theirs.get_image_features(larger, interpolate_pos_encoding=True).pooler_output,
    )
    mine.loss.backward()
    their.loss.backward()
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for name, a in ours.named_parameters():
        b = theirs.get_parameter(name)
        assert (a.grad - b.grad).abs().max() <= 1e-5 * max(b.grad.abs().max(), 1e-2 * largest), name


def test_parameter_counts_match_openai():
    with torch.device("meta"):
        assert sum(p.numel() for p in vlp.VlpClipModel(vlp.VlpClipConfig()).parameters()) == 151_277_313  # ViT-B/32
        resnet = vlp.VlpClipConfig(vision_config={"model_type": "vlp_modified_resnet"}, projection_dim=1024)
        model = vlp.VlpClipModel(resnet)
    assert sum(p.numel() for p in model.parameters()) == 102_007_137  # open_clip's RN50
