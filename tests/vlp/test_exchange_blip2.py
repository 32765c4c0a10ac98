"""Conversion of BLIP-2 checkpoints from and to transformers and LAVIS."""

import json

import pytest
import torch
from conftest import QFORMER as OUR_QFORMER
from conftest import (
    VIT,
    save_language_model,
    tiny_blip,
    tiny_blip2,
    tiny_blip2_config,
    tiny_blip2_generation,
    tiny_language_model,
    with_larger_weights,
)
from PIL import Image
from safetensors.torch import load_file
from test_blip2_reference import FIXTURES, Fixture
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2Processor,
)
from vlp.modeling_vlp.exchange.places import ExchangeError
from vlp.modeling_vlp.language_model import load_language_model

import vlp
from vlp.conversion import convert

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "initializer_range": 0.1,
}  # fmt: skip
QFORMER = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.2,
    "intermediate_size": 48, "max_position_embeddings": 20, "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[5, 9, 7, 8, 3], [5, 11, 3, 0, 0]])


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model of transformers random weights, but for its language model."""
    for name, parameter in model.named_parameters():
        if not name.startswith("language_model"):
            parameter.normal_(std=0.2)
    return model.eval()


def peer(kind: str | None):
    """A tiny model of transformers with random weights: with a language model, or for retrieval if `kind` is None."""
    torch.manual_seed(0)
    common = dict(vision_config=VISION, num_query_tokens=5, image_text_hidden_size=12)
    if kind is None:
        config = Blip2Config(qformer_config=QFORMER | {"use_qformer_text_input": True}, **common)
        model = Blip2ForImageTextRetrieval(config)
    else:
        text = tiny_language_model(kind, vocab_size=60).config
        config = Blip2Config(qformer_config=QFORMER, text_config=text, image_token_index=59, **common)
        model = Blip2ForConditionalGeneration(config)
        model.language_model.load_state_dict(tiny_language_model(kind, vocab_size=60).state_dict())
    return randomised(model)


@torch.no_grad()
def test_transformers_retrieval_both_ways(tmp_path):
    theirs = peer(None)
    theirs.save_pretrained(tmp_path / "theirs")
    notes = convert(tmp_path / "theirs", tmp_path / "ours")
    assert "no temperature" in notes[0]
    ours = vlp.VlpBlip2ForImageTextRetrieval.from_pretrained(tmp_path / "ours").eval()
    output = ours(PIXELS, IDS)
    mask = (IDS != 0).long()
    compared = theirs(PIXELS, IDS, mask)
    same(output.logits_per_image * ours.temp, compared.logits_per_image)
    same(output.image_embeds, compared.image_embeds)
    same(output.itm_logits, theirs(PIXELS, IDS, mask, use_image_text_matching_head=True).logits_per_image)
    assert convert(tmp_path / "ours", tmp_path / "back", "transformers") == [
        "the source has no tokenizer, so none was saved; to add one, pass --tokenizer",
        "transformers cannot store: temp",
    ]
    equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors"))
    again = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(again(PIXELS, IDS, mask).logits_per_image, compared.logits_per_image)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_transformers_generation_both_ways(tmp_path, kind):
    theirs = peer(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    prompt = torch.tensor([[1, 7, 9], [1, 8, 4]])
    ids = torch.cat([torch.full((2, 5), 59), prompt], dim=1)  # the image tokens come first
    if kind == "opt":
        logits = theirs(PIXELS, ids, torch.ones_like(ids)).logits[:, 5:]
        same(ours(PIXELS, prompt).logits, logits)
    else:
        labels = torch.tensor([[7, 8, 2], [9, 4, 2]])
        output = theirs(PIXELS, ids, torch.ones_like(ids), labels=labels)
        mine = ours(PIXELS, prompt, labels=labels)
        same(mine.logits, output.logits)
        same(mine.loss, output.loss)
    for options in ({"num_beams": 1}, {"num_beams": 5}, {"num_beams": 4, "num_return_sequences": 2}):
        options |= {"max_new_tokens": 8, "min_new_tokens": 2}
        expected = theirs.generate(PIXELS, ids, torch.ones_like(ids), **options)
        generated = ours.generate(PIXELS, prompt, **options)
        assert torch.equal(generated, expected[:, 5:] if kind == "opt" else expected)
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    image_token = again.config.image_token_index
    assert image_token == 60  # a new row of the embedding table
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name][: len(value)] if value.ndim else again.state_dict()[name], value)
    ids = ids.masked_fill(ids == 59, image_token)
    options = {"num_beams": 5, "max_new_tokens": 8, "bad_words_ids": [[60]]}
    generated = ours.generate(PIXELS, prompt, num_beams=5, max_new_tokens=8)
    assert torch.equal(
        again.generate(PIXELS, ids, torch.ones_like(ids), **options)[:, 5 * (kind == "opt") :], generated
    )


@torch.no_grad()
def test_transformers_processor_and_model_generate_the_same(tmp_path):
    """With a tokenizer in the folder, transformers alone can use the export like any BLIP-2 of the Hub."""
    save_language_model(tmp_path / "llm", ["a red square", "two dogs"])
    vision = VIT | {"model_type": "vlp_blip_vit", "final_norm": False}
    torch.manual_seed(0)
    config = vlp.VlpBlip2Config(vision_config=vision, qformer_config=dict(OUR_QFORMER), num_query_tokens=3,
                                language_model_name_or_path=str(tmp_path / "llm"))  # fmt: skip
    model = with_larger_weights(vlp.VlpBlip2ForConditionalGeneration(config, load_language_model(config))).eval()
    model.save_pretrained(tmp_path / "ours")
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    processor = vlp.VlpBlip2Processor(images, AutoTokenizer.from_pretrained(tmp_path / "llm"))
    processor.save_pretrained(tmp_path / "ours")
    notes = convert(tmp_path / "ours", tmp_path / "theirs", "transformers")
    assert notes == []
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    their_processor = Blip2Processor.from_pretrained(tmp_path / "theirs")
    picture, options = Image.new("RGB", (40, 30), "red"), {"num_beams": 3, "max_new_tokens": 5}
    inputs = their_processor(images=picture, text="a red", return_tensors="pt")
    own = processor(images=picture, text="a red", return_tensors="pt")
    same(own["pixel_values"], inputs["pixel_values"])
    expected = theirs.generate(**inputs, **options, bad_words_ids=[[theirs.config.image_token_index]])
    assert torch.equal(model.generate(**own, **options)[0], expected[0, 3:])


def test_unsupported_towers_are_rejected(tmp_path):
    tiny_blip2("clip").save_pretrained(tmp_path / "ours")
    with pytest.raises(ExchangeError, match="this tower, a vlp_vit, has one"):
        convert(tmp_path / "ours", tmp_path / "theirs", "transformers")
    assert not (tmp_path / "theirs").exists()


def eva_tower(layers: int = 3) -> dict[str, torch.Tensor]:
    """Weights as in eva_vit_g.pth: one layer more than is used, and the unused final norm and head."""
    generator = torch.Generator().manual_seed(2)

    def values(*shape):
        return 0.2 * torch.randn(*shape, generator=generator)

    state = {"cls_token": values(1, 1, 24), "pos_embed": values(1, 5, 24), "patch_embed.proj.bias": values(24),
             "patch_embed.proj.weight": values(24, 3, 4, 4), "fc_norm.weight": values(24), "fc_norm.bias": values(24),
             "head.weight": values(7, 24), "head.bias": values(7)}  # fmt: skip
    shapes = {"norm1.weight": (24,), "norm1.bias": (24,), "norm2.weight": (24,), "norm2.bias": (24,),
              "attn.q_bias": (24,), "attn.v_bias": (24,), "attn.qkv.weight": (72, 24), "attn.proj.weight": (24, 24),
              "attn.proj.bias": (24,), "mlp.fc1.weight": (40, 24), "mlp.fc1.bias": (40,), "mlp.fc2.weight": (24, 40),
              "mlp.fc2.bias": (24,)}  # fmt: skip
    for layer in range(layers):
        state |= {f"blocks.{layer}.{name}": values(*shape) for name, shape in shapes.items()}
    return state


def lavis_state() -> dict[str, torch.Tensor]:
    return {name[6:]: value for name, value in load_file(FIXTURES[0]).items() if name.startswith("state.")}


@torch.no_grad()
def test_lavis_stage_1_both_ways(tmp_path):
    state = lavis_state()
    torch.save({"model": state, "epoch": 3}, tmp_path / "blip2_pretrained.pth")
    torch.save(eva_tower(), tmp_path / "eva_vit_g.pth")
    heads = {"vision_heads": 4, "text_heads": 4}
    with pytest.raises(ExchangeError, match="pass --image_tower eva_vit_g.pth"):
        convert(tmp_path / "blip2_pretrained.pth", tmp_path / "ours", **heads)
    convert(tmp_path / "blip2_pretrained.pth", tmp_path / "ours", image_tower=tmp_path / "eva_vit_g.pth", **heads)
    ours = vlp.VlpBlip2ForPreTraining.from_pretrained(tmp_path / "ours").eval()
    assert ours.config.vision_config.num_hidden_layers == 2 and not ours.config.vision_config.final_norm
    assert ours.config.qformer_config.cross_attention_frequency == 2
    assert ours.temp.item() == state["temp"].item()  # transformers' own conversion drops it and the LM head
    expected = Fixture(FIXTURES[0])
    memory = ours.memory_of(expected.vision_hidden_states)
    same(ours.query(memory).last_hidden_state, expected.query_output)
    same(ours.encode_image(torch.ones(1, 3, 8, 8)), eva_forward(eva_tower(), torch.ones(1, 3, 8, 8), 2))
    assert convert(tmp_path / "ours", tmp_path / "back.pth", "lavis") == []
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    theirs = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    tower = {f"visual_encoder.{name}": value for name, value in eva_tower().items()
             if not name.startswith(("blocks.2.", "fc_norm", "head"))}  # fmt: skip
    equal(back, theirs | tower)
    convert(tmp_path / "back.pth", tmp_path / "again", **heads)
    equal(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors"))
    # Transformers cannot store the LM head or the temperature.
    notes = convert(tmp_path / "ours", tmp_path / "theirs", "transformers")
    assert "temp" in notes[-1] and "lm_head.dense.weight" in notes[-1]
    assert Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "theirs")


def eva_forward(state: dict, images: torch.Tensor, layers: int, heads: int = 4) -> torch.Tensor:
    """Reference forward pass of EVA-CLIP's blocks (LAVIS, models/eva_vit.py)."""
    from torch.nn import functional as F

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = torch.cat([state["cls_token"], x.flatten(2).transpose(1, 2)], dim=1) + state["pos_embed"]
    for layer in range(layers):
        block = {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith(f"blocks.{layer}.")}
        normed = F.layer_norm(x, (24,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        bias = torch.cat([block["attn.q_bias"], torch.zeros(24), block["attn.v_bias"]])
        q, k, v = F.linear(normed, block["attn.qkv.weight"], bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) * (24 // heads) ** -0.5).softmax(-1) @ v
        x = x + F.linear(attended.transpose(1, 2).flatten(2), block["attn.proj.weight"], block["attn.proj.bias"])
        normed = F.layer_norm(x, (24,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        inner = F.gelu(F.linear(normed, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        x = x + F.linear(inner, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    return x


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_lavis_stage_2_both_ways(tmp_path, kind):
    tiny_language_model(kind).save_pretrained(tmp_path / "llm")
    torch.manual_seed(0)
    config = tiny_blip2_config("clip", language_model_name_or_path=str(tmp_path / "llm"))
    model = with_larger_weights(vlp.VlpBlip2ForConditionalGeneration(config, tiny_language_model(kind)))
    model.save_pretrained(tmp_path / "ours")
    notes = convert(tmp_path / "ours", tmp_path / "theirs.pth", "lavis")
    assert len(notes) == 1 and notes[0].startswith("lavis cannot store: language_model.")
    state = torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]
    assert f"{kind}_proj.weight" in state and "visual_encoder.transformer.resblocks.2.ln_1.weight" in state
    torch.save({"model": state}, tmp_path / "theirs.pth")
    heads = {"vision_heads": 4, "text_heads": 4}
    with pytest.raises(ExchangeError, match="pass --language_model"):
        convert(tmp_path / "theirs.pth", tmp_path / "again", **heads)
    convert(tmp_path / "theirs.pth", tmp_path / "again", language_model=str(tmp_path / "llm"), **heads)
    equal(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors"))
    again = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.generate(images, max_new_tokens=4), model.eval().generate(images, max_new_tokens=4))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["store_language_model"] is False


def test_vlp_folder_with_a_language_model_can_be_copied(tmp_path):
    tiny_language_model().save_pretrained(tmp_path / "llm")
    model = tiny_blip2_generation()
    model.config.language_model_name_or_path = str(tmp_path / "llm")
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "copy")
    equal(load_file(tmp_path / "copy" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors"))


def test_lavis_uses_salesforces_names_for_blip(tmp_path):
    tiny_blip().save_pretrained(tmp_path / "ours")
    for target in ("lavis", "salesforce"):
        convert(tmp_path / "ours", tmp_path / f"{target}.pth", target)
    states = [torch.load(tmp_path / f"{target}.pth", weights_only=True)["model"] for target in ("lavis", "salesforce")]
    equal(*states)
    with pytest.raises(ExchangeError, match="cannot write a VlpBlip2ForPreTraining for salesforce"):
        tiny_blip2().save_pretrained(tmp_path / "blip-2")
        convert(tmp_path / "blip-2", tmp_path / "x.pth", "salesforce")


def test_missing_tensors_are_named(tmp_path):
    state = lavis_state() | {f"visual_encoder.{name}": value for name, value in eva_tower(2).items()
                             if not name.startswith(("fc_norm", "head"))}  # fmt: skip
    del state["Qformer.bert.encoder.layer.1.intermediate_query.dense.bias"]
    torch.save(state, tmp_path / "theirs.pth")
    with pytest.raises(
        ExchangeError, match=r"missing: Qformer\.bert\.encoder\.layer\.1\.intermediate_query\.dense\.bias"
    ):
        convert(tmp_path / "theirs.pth", tmp_path / "ours", vision_heads=4, text_heads=4)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("target", ["transformers", "lavis"])
def test_a_prefix_of_words_is_not_exported(tmp_path, target):
    vlp.VlpBlip2ForConditionalGeneration.from_pre_training(
        tiny_blip2(), tiny_language_model("llama"), prefix_words=([2, 4, 7], [(2, 2)])
    ).save_pretrained(tmp_path / "ours")
    save_language_model(tmp_path / "llm", [" ".join(f"w{number}" for number in range(96))])
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["language_model_name_or_path"] = str(tmp_path / "llm")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    assert convert(tmp_path / "ours", tmp_path / "copy") is not None
    with pytest.raises(ExchangeError, match=f"{target}'s BLIP-2 has a prefix of projected queries"):
        convert(tmp_path / "ours", tmp_path / "theirs", target)
    assert not (tmp_path / "theirs").exists()


def test_the_bare_model_of_transformers_is_converted(tmp_path):
    config = peer("opt").config
    torch.manual_seed(0)
    theirs = Blip2Model(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = vlp.VlpBlip2ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours.query_tokens, theirs.query_tokens)
    assert torch.equal(ours.language_projection.weight, theirs.language_projection.weight)
