"""Conversion of checkpoints from and to other libraries: `vlp convert`."""

import json
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import tiny_blip, tiny_model, tiny_pair
from huggingface_hub import ModelCard
from PIL import Image
from processes import Program
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    pipeline,
)
from vlp.modeling_vlp.exchange import salesforce
from vlp.modeling_vlp.exchange.files import read_tensors
from vlp.modeling_vlp.exchange.places import ExchangeError
from vlp.processing.blip import train_tokenizer
from vlp.processing.tokenizer import VlpClipTokenizer
from vlp.training.families.blip import BlipArguments, make_teacher

import vlp
from vlp.commands.convert import main
from vlp.conversion import convert, plain_tokenizer
from vlp.errors import ArgumentError, UnsupportedModelError
from vlp.files import state_folder
from vlp.inference import load

open_clip = pytest.importorskip("open_clip")
ROOT = Path(__file__).parents[2]
FIXTURE = Path(__file__).parents[1] / "reference" / "blip_pretrain_0.safetensors"
CAPTIONS = ["a red square", "two dogs on a green hill", "blue"]


def pixels(side: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def ids(vocabulary: int = 99, length: int = 12) -> torch.Tensor:
    """Texts that end with the last token of the vocabulary, padded with 0."""
    generator, result = torch.Generator().manual_seed(2), torch.zeros(3, length, dtype=torch.long)
    for row in range(3):
        result[row, : 4 + row] = torch.randint(1, vocabulary - 2, (4 + row,), generator=generator)
        result[row, 0], result[row, 4 + row] = vocabulary - 2, vocabulary - 1
    return result


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- CLIP -------------------------------------------------------------------------------------------------------------


def openai_model(resnet: bool = False):
    """A tiny model of OpenAI's own class, whose heads are always 64 wide."""
    from clip.model import CLIP

    torch.manual_seed(0)
    vision = dict(vision_layers=(1, 2, 1, 1), vision_width=16) if resnet else dict(vision_layers=2, vision_width=64)
    return CLIP(
        embed_dim=16, image_resolution=64 if resnet else 32, vision_patch_size=8, context_length=12, vocab_size=99,
        transformer_width=64, transformer_heads=1, transformer_layers=2, **vision,
    ).eval()  # fmt: skip


@torch.no_grad()
def compare_clip(folder: Path, theirs, side: int) -> vlp.VlpClipModel:
    ours = vlp.VlpClipModel.from_pretrained(folder).eval()
    same(ours.get_image_features(pixels(side)).pooler_output, theirs.encode_image(pixels(side)))
    same(ours.get_text_features(ids()).pooler_output, theirs.encode_text(ids()))
    return ours


@torch.no_grad()
def test_siglip_scores_the_same_with_its_exported_processor(tmp_path):
    """SigLIP attends to padding: its tokenizer gives no mask, neither before nor after it is exported."""
    _, processor = tiny_pair("vit")
    tokenizer, config = processor.tokenizer, tiny_model("siglip").config
    config.text_config.vocab_size, tokenizer.model_input_names = len(tokenizer), ["input_ids"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    processor = vlp.VlpClipProcessor(processor.image_processor, plain_tokenizer(tokenizer))
    for part in (vlp.VlpClipModel(config), processor):
        part.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "transformers")
    picture, texts, scores = Image.new("RGB", (40, 30), "red"), ["a red square", "a blue circle"], []
    for folder in ("ours", "theirs"):
        reader = AutoProcessor.from_pretrained(tmp_path / folder)
        inputs = reader(images=picture, text=texts, padding="max_length", return_tensors="pt")
        assert set(inputs) == {"input_ids", "pixel_values"}
        scores.append(AutoModel.from_pretrained(tmp_path / folder).eval()(**inputs).logits_per_image)
    same(*scores)


@torch.no_grad()
def test_siglip_pads_as_its_tokenizer(tmp_path):
    """As SigLIP 2 at a fixed resolution: the configuration names no padding token, the tokenizer pads with another."""
    _, processor = tiny_pair("vit")
    tokenizer = plain_tokenizer(processor.tokenizer)
    tokenizer.model_max_length, tokenizer.model_input_names = 12, ["input_ids"]
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = size | {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "bos_token_id": None}
    vision = size | {"image_size": 32, "patch_size": 8}
    theirs = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    assert theirs.config.text_config.pad_token_id != tokenizer.pad_token_id
    theirs.save_pretrained(tmp_path / "theirs")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "vlp")
    texts = ["a red square", "blue"]
    padded = theirs.get_text_features(**tokenizer(texts, padding="max_length", return_tensors="pt")).pooler_output
    ours = vlp.VlpClipModel.from_pretrained(tmp_path / "ours").eval()
    short = AutoProcessor.from_pretrained(tmp_path / "ours")(text=texts, return_tensors="pt")
    assert short["input_ids"].shape[1] < 12
    same(ours.get_text_features(short["input_ids"]).pooler_output, padded)
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    assert SiglipModel.from_pretrained(tmp_path / "back").config.text_config.pad_token_id == tokenizer.pad_token_id


@torch.no_grad()
def test_transformers_siglip_both_ways(tmp_path):
    """Loss, attention to padding, pooling and preprocessing match transformers."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = SiglipModel(SiglipConfig(text_config=size | {"vocab_size": 99, "max_position_embeddings": 12},
                                      vision_config=size | {"image_size": 32, "patch_size": 8})).eval()  # fmt: skip
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    theirs.logit_scale.fill_(1.2)
    theirs.save_pretrained(tmp_path / "theirs")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = vlp.VlpClipModel.from_pretrained(tmp_path / "ours").eval()
    texts = torch.cat([ids()[:, :5], torch.ones(3, 7, dtype=torch.long)], dim=1)  # padded with 1, as for SigLIP
    expected = theirs(texts, pixels(), return_loss=True)
    for given in (texts, texts[:, :5]):  # padded and unpadded
        output = ours(given, pixels(), return_loss=True)
        same(output.logits_per_image, expected.logits_per_image)
        same(output.loss, expected.loss)
        short = ours(given, pixels(), pooled_only=True)
        same(short.text_embeds, expected.text_embeds)
        same(short.image_embeds, expected.image_embeds)
    images = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert list(images.image_mean) == [0.5, 0.5, 0.5] and not images.do_center_crop
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors"))
    again = SiglipModel.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(again(texts, pixels()).logits_per_image, expected.logits_per_image)
    for target in ("openai", "open_clip"):
        with pytest.raises(ExchangeError, match=f"cannot write a SigLIP for {target}"):
            convert(tmp_path / "ours", tmp_path / "x", target)
    convert(tmp_path / "theirs", tmp_path / "larger", image_size=48)
    larger = vlp.VlpClipModel.from_pretrained(tmp_path / "larger").eval()
    interpolated = theirs.get_image_features(pixels(48), interpolate_pos_encoding=True).pooler_output
    same(larger.get_image_features(pixels(48)).pooler_output, interpolated)


@pytest.mark.parametrize("resnet", [False, True], ids=["vit", "resnet"])
def test_openai_both_ways(tmp_path, resnet):
    """From a TorchScript archive, without running its code, and back to a file that OpenAI's own loader accepts."""
    import clip

    theirs, side = openai_model(resnet), 64 if resnet else 32

    class Released(torch.nn.Module):  # OpenAI's archives contain three integers besides the weights
        def __init__(self):
            super().__init__()
            for name, module in theirs.named_children():
                setattr(self, name, module)
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, getattr(theirs, name))
            for name, value in (("input_resolution", side), ("context_length", 12), ("vocab_size", 99)):
                self.register_buffer(name, torch.tensor(value))

        def forward(self, image):
            return self.visual(image)

    torch.jit.trace(Released(), pixels(side)).save(str(tmp_path / "theirs.pt"))
    notes = convert(tmp_path / "theirs.pt", tmp_path / "ours")
    assert "no tokenizer" in notes[0]
    ours = compare_clip(tmp_path / "ours", theirs, side)
    assert ours.config.text_config.hidden_act == "quick_gelu"
    assert convert(tmp_path / "ours", tmp_path / "back.pt", to="openai") == []
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    facts = {name: int(back.pop(name)) for name in ("input_resolution", "context_length", "vocab_size")}
    assert facts == {"input_resolution": side, "context_length": 12, "vocab_size": 99}
    equal(back, dict(theirs.state_dict()))
    loaded, _ = clip.load(str(tmp_path / "back.pt"), device="cpu", jit=False)
    half = loaded.float().encode_image(pixels(side)) - theirs.encode_image(pixels(side))
    assert half.abs().max() < 0.01  # OpenAI's code keeps half precision


def open_clip_folder(folder: Path, activation: str, resnet: bool, **more) -> open_clip.CLIP:
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16} if resnet else {
        "image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8, "mlp_ratio": 2.0}  # fmt: skip
    text = {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text} | more
    if activation == "quick_gelu":
        model["quick_gelu"] = True
    theirs = open_clip.CLIP(**model).eval()
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "interpolation": "bicubic",
                  "resize_mode": "shortest"}  # fmt: skip
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    save_file(dict(theirs.state_dict()), folder / "open_clip_model.safetensors")
    return theirs


@pytest.mark.parametrize(("activation", "resnet"), [("gelu", False), ("quick_gelu", False), ("gelu", True)])
def test_open_clip_both_ways(tmp_path, activation, resnet):
    theirs, side = open_clip_folder(tmp_path / "theirs", activation, resnet), 64 if resnet else 32
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = compare_clip(tmp_path / "ours", theirs, side)
    assert ours.config.text_config.hidden_act == activation
    images = vlp.VlpClipImageProcessor.from_pretrained(tmp_path / "ours")
    assert list(images.image_mean) == [0.5, 0.4, 0.3] and images.size["shortest_edge"] == side
    assert convert(tmp_path / "ours", tmp_path / "back", to="open_clip") == []
    equal(load_file(tmp_path / "back" / "open_clip_model.safetensors"), dict(theirs.state_dict()))
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'back'}")
    same(loaded.eval().encode_image(pixels(side)), theirs.encode_image(pixels(side)))
    same(loaded.encode_text(ids()), theirs.encode_text(ids()))
    assert tuple(transform.transforms[-1].mean) == (0.5, 0.4, 0.3)


def test_open_clip_training_files(tmp_path):
    """A training checkpoint: a "state_dict" with "module." prefixes, a separate text tower and a logit_bias."""
    theirs = open_clip_folder(tmp_path / "theirs", "gelu", resnet=False, init_logit_bias=-10.0)
    state = {}
    for name, value in theirs.state_dict().items():
        of_text = not name.startswith(("visual.", "logit_"))
        state[f"module.{'text.' if of_text else ''}{name}"] = value
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "epoch_3.pt")
    heads = dict(vision_heads=4, text_heads=4)
    with pytest.raises(ExchangeError, match="does not record its activation.*--hidden_act quick_gelu"):
        convert(tmp_path / "epoch_3.pt", tmp_path / "ours", **heads)
    with pytest.raises(ExchangeError, match="32 wide, which is not a multiple of 64: pass --vision_heads"):
        convert(tmp_path / "epoch_3.pt", tmp_path / "ours", hidden_act="gelu", vision_heads=4)
    convert(tmp_path / "epoch_3.pt", tmp_path / "ours", hidden_act="gelu", **heads)
    ours = compare_clip(tmp_path / "ours", theirs, 32)
    assert ours.logit_bias.item() == -10.0
    convert(tmp_path / "ours", tmp_path / "back", to="open_clip")
    equal(load_file(tmp_path / "back" / "open_clip_model.safetensors"), dict(theirs.state_dict()))


def test_unsupported_towers_are_rejected(tmp_path):
    open_clip_folder(tmp_path / "theirs", "gelu", resnet=False)
    path = tmp_path / "theirs" / "open_clip_config.json"
    facts = json.loads(path.read_text())
    for part, option, value in (("vision_cfg", "timm_model_name", "vit_tiny"), ("text_cfg", "no_causal_mask", True)):
        changed = json.loads(json.dumps(facts))
        changed["model_cfg"][part][option] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(ExchangeError, match=f"vlp's CLIP does not support open_clip's option {option}"):
            convert(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def clip_of_transformers(folder: Path) -> CLIPModel:
    tokenizer = VlpClipTokenizer.train(CAPTIONS, 560, 20)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 20, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4}  # fmt: skip
    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).eval()
    theirs.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return theirs


LOAD_WITHOUT_VLP = """
import sys
sys.modules["vlp"] = None
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModel.from_pretrained(sys.argv[1]).eval()
inputs = processor(images=Image.new("RGB", (40, 32), "red"), text=["a red square", "two dogs"], padding=True,
                   return_tensors="pt")
with torch.no_grad():
    torch.save({"type": type(model).__name__, "logits": model(**inputs).logits_per_image}, sys.argv[2])
"""


def test_transformers_clip_both_ways(tmp_path):
    from PIL import Image

    theirs = clip_of_transformers(tmp_path / "theirs")
    assert convert(tmp_path / "theirs", tmp_path / "ours") == []
    ours = vlp.VlpClipModel.from_pretrained(tmp_path / "ours").eval()
    processor = vlp.VlpClipProcessor.from_pretrained(tmp_path / "ours")
    inputs = processor(images=Image.new("RGB", (40, 32), "red"), text=["a red square", "two dogs"], return_tensors="pt")
    with torch.no_grad():
        logits = ours(**inputs).logits_per_image
        same(logits, theirs(**inputs).logits_per_image)
    assert convert(tmp_path / "ours", tmp_path / "back", to="transformers") == []
    equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors"))
    command = [sys.executable, "-c", LOAD_WITHOUT_VLP, str(tmp_path / "back"), str(tmp_path / "result.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["type"] == "CLIPModel"
    same(result["logits"], logits)


def test_end_token_of_early_configurations_is_corrected(tmp_path):
    theirs = clip_of_transformers(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(re.sub(r'"eos_token_id": \d+', '"eos_token_id": 2', path.read_text()))
    convert(tmp_path / "theirs", tmp_path / "ours")
    text = vlp.VlpClipConfig.from_pretrained(tmp_path / "ours").text_config
    assert text.eos_token_id == theirs.config.text_config.vocab_size - 1


@pytest.mark.parametrize(("tower", "to", "message"), [
    ("resnet", "transformers", "transformers has no ModifiedResNet"),
    ("vit", "openai", "heads are not 64 wide"),
    ("vit", "salesforce", "cannot write a VlpClipModel for salesforce"),
])  # fmt: skip
def test_unsupported_targets_are_rejected(tmp_path, tower, to, message):
    tiny_model(tower).save_pretrained(tmp_path / "ours")
    with pytest.raises(ExchangeError, match=message):
        convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    assert not (tmp_path / "theirs").exists()


def test_blip_with_a_resnet_cannot_be_exported(tmp_path):
    tiny_blip("resnet").save_pretrained(tmp_path / "ours")
    with pytest.raises(ExchangeError, match="salesforce/BLIP and LAVIS have no ModifiedResNet"):
        convert(tmp_path / "ours", tmp_path / "theirs.pth", to="salesforce")
    assert not (tmp_path / "theirs.pth").exists()


@pytest.mark.parametrize("to", ["transformers", "salesforce"])
def test_a_blip_that_matches_by_the_mean_is_exported_as_a_captioner_only(tmp_path, to):
    model = tiny_blip()
    model.config.itm_pooling = "mean"
    model.save_pretrained(tmp_path / "ours")
    for name in (None, "VlpBlipForImageTextRetrieval"):
        with pytest.raises(ExchangeError, match=f"{to}'s BLIP matches texts .ITM. by the state of .Encode."):
            convert(tmp_path / "ours", tmp_path / "theirs.pth", to=to, architecture=name)
        assert not (tmp_path / "theirs.pth").exists()
    convert(tmp_path / "ours", tmp_path / "theirs", to=to, architecture="VlpBlipForConditionalGeneration")


def test_another_image_size(tmp_path):
    theirs = clip_of_transformers(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", image_size=48)
    ours = vlp.VlpClipModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        same(ours.get_image_features(pixels(48)).pooler_output,
             theirs.get_image_features(pixels(48), interpolate_pos_encoding=True).pooler_output)  # fmt: skip
    assert vlp.VlpClipImageProcessor.from_pretrained(tmp_path / "ours").crop_size["height"] == 48
    with pytest.raises(ExchangeError, match="--image_size: .*divisible"):
        convert(tmp_path / "theirs", tmp_path / "other", image_size=45)


def test_longer_texts(tmp_path):
    theirs = open_clip_folder(tmp_path / "theirs", "gelu", resnet=False)
    convert(tmp_path / "theirs", tmp_path / "ours", max_length=20)
    ours = vlp.VlpClipModel.from_pretrained(tmp_path / "ours")
    state = dict(theirs.state_dict())
    longer = open_clip.CLIP(**json.loads((tmp_path / "theirs" / "open_clip_config.json").read_text())["model_cfg"] | {
        "text_cfg": {"context_length": 20, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}})  # fmt: skip
    open_clip.model.resize_text_pos_embed(state, longer)
    table = ours.text_model.embeddings.position_embedding.weight
    assert torch.allclose(table, state["positional_embedding"]) and len(table) == 20
    assert ours.config.text_config.max_position_embeddings == 20
    tiny_blip().save_pretrained(tmp_path / "blip")
    with pytest.raises(ExchangeError, match="--max_length is for CLIP"):
        convert(tmp_path / "blip", tmp_path / "longer", max_length=20)


# --- BLIP -------------------------------------------------------------------------------------------------------------


def pretrained_file(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint as salesforce/BLIP saves it, with the state of the fixture."""
    state = {name[6:]: value for name, value in load_file(FIXTURE).items() if name.startswith("state.")}
    torch.save({"model": state, "optimizer": {}, "config": {"image_size": 32}, "epoch": 1}, path)
    return state


def heads_of_fixture() -> dict:
    facts = json.loads(FIXTURE.with_suffix(".json").read_text())
    return {"vision_heads": facts["vision"]["heads"], "text_heads": facts["text"]["heads"]}


def test_pretrained_blip_both_ways(tmp_path):
    state = pretrained_file(tmp_path / "model_base.pth")
    convert(tmp_path / "model_base.pth", tmp_path / "ours", **heads_of_fixture())
    ours = vlp.VlpBlipForPreTraining.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours.temp, state["temp"])
    assert not [name for name in load_file(tmp_path / "ours" / "model.safetensors") if "queue" in name]
    assert convert(tmp_path / "ours", tmp_path / "back.pth", to="salesforce") == []
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    kept = {name: value for name, value in state.items()
            if not re.fullmatch(f"{salesforce.IGNORED}|{salesforce.TEACHER}", name)}  # fmt: skip
    equal(back, kept)


def test_teacher_and_queue_are_training_state(tmp_path):
    """They belong to resumed pre-training, not to the model; queued pairs match no pair of the data."""
    state = pretrained_file(tmp_path / "model_base.pth")
    convert(tmp_path / "model_base.pth", tmp_path / "ours", **heads_of_fixture())
    ours = vlp.VlpBlipForPreTraining.from_pretrained(tmp_path / "ours")
    size = state["image_queue"].shape[1]
    arguments = BlipArguments(model_name_or_path=str(tmp_path / "ours"), queue_size=size)
    teacher = make_teacher(arguments, ours)
    assert torch.equal(teacher.image_queue, state["image_queue"].T) and int(teacher.filled) == size
    assert torch.equal(teacher.model.text_proj.weight, state["text_proj_m.weight"])
    assert not torch.equal(teacher.model.text_proj.weight, ours.text_proj.weight)
    assert (teacher.image_ids < 0).all() and len(set(teacher.image_ids.tolist())) == size
    with pytest.raises(ArgumentError, match="does not fit this run, for example because it has another --queue_size"):
        make_teacher(BlipArguments(model_name_or_path=str(tmp_path / "ours"), queue_size=size + 1), ours)
    assert (state_folder(tmp_path / "ours") / "teacher.safetensors").is_file()


TASKS = {
    "VlpBlipForImageTextRetrieval": {"text_encoder", "itm_head", "vision_proj", "text_proj", "temp"},
    "VlpBlipForConditionalGeneration": {"text_decoder"},
    "VlpBlipForQuestionAnswering": {"text_encoder", "text_decoder"},
    "VlpBlipForVisualReasoning": {"text_encoder", "cls_head"},
}


@pytest.mark.parametrize("architecture", TASKS)
def test_fine_tuned_blips_both_ways(tmp_path, architecture):
    """The round trip is bit-exact; exported names that the pre-trained fixture also has are the same there."""
    torch.manual_seed(0)
    config = tiny_blip().config
    ours = getattr(vlp, architecture)(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    ours.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "theirs.pth", to="salesforce") == []
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]
    assert {name.split(".")[0] for name in theirs} == TASKS[architecture] | {"visual_encoder"}
    known = {re.sub(r"\d+", "0", name[6:]) for name in load_file(FIXTURE) if name.startswith("state.")}
    own = {"VlpBlipForVisualReasoning": r"cls_head|crossattention\.(self[01]|output\.(dense[01]|merge_layer))"}
    for name in theirs:
        if not re.search(own.get(architecture, "^$"), name):
            assert re.sub(r"\d+", "0", name) in known, name
    heads = dict(vision_heads=config.vision_config.num_attention_heads,
                 text_heads=config.text_config.num_attention_heads)  # fmt: skip
    convert(tmp_path / "theirs.pth", tmp_path / "again", **heads)
    again = getattr(vlp, architecture).from_pretrained(tmp_path / "again")
    equal(dict(again.state_dict()), dict(ours.state_dict()))


BLIP_VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 4, "layer_norm_eps": 1e-6}  # fmt: skip


def blip_of_transformers(kind: type, folder: Path):
    tokenizer = train_tokenizer(CAPTIONS, 120, 20)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "sep_token_id": tokenizer.sep_token_id, "eos_token_id": tokenizer.sep_token_id}  # fmt: skip
    torch.manual_seed(0)
    theirs = kind(BlipConfig(vision_config=BLIP_VISION, text_config=text, image_text_hidden_size=16)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return theirs, tokenizer


@pytest.mark.parametrize("kind", [BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering])
@torch.no_grad()
def test_transformers_blip_both_ways(tmp_path, kind):
    theirs, tokenizer = blip_of_transformers(kind, tmp_path / "theirs")
    notes = convert(tmp_path / "theirs", tmp_path / "ours")
    ours = getattr(vlp, f"Vlp{kind.__name__}").from_pretrained(tmp_path / "ours").eval()
    words = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    if kind is BlipForConditionalGeneration:
        options = dict(max_new_tokens=8, do_sample=False)
        assert torch.equal(ours.generate(pixels(), **options), theirs.generate(pixels(), **options))
    elif kind is BlipForImageTextRetrieval:
        assert any("no temperature" in note for note in notes)
        ours.config.text_config.enc_token_id = tokenizer.cls_token_id  # transformers does not use [ENC]
        mine = ours(words["input_ids"], pixels(), words["attention_mask"])
        same(mine.itm_logits, theirs(pixel_values=pixels(), **words).itm_score)
        cosine = theirs(pixel_values=pixels(), **words, use_itm_head=False).itm_score
        same(mine.image_embeds @ mine.text_embeds.T, cosine)
    else:
        one = tokenizer(["two dogs"], return_tensors="pt")  # one text, because transformers attends to padding
        ours.config.text_config.enc_token_id = tokenizer.cls_token_id
        options = dict(max_new_tokens=6, do_sample=False)
        generated = theirs.generate(pixel_values=pixels()[:1], **one, **options)
        assert torch.equal(ours.generate(pixels()[:1], one["input_ids"], **options), generated)
    left_out = convert(tmp_path / "ours", tmp_path / "back", to="transformers")
    assert left_out == (["transformers cannot store: temp"] if kind is BlipForImageTextRetrieval else [])
    back, wrong = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not wrong["missing_keys"] and not wrong["unexpected_keys"] and not wrong["mismatched_keys"]
    equal(dict(back.state_dict()), dict(theirs.state_dict()))


# --- damaged and malicious files --------------------------------------------------------------------------------------


def test_mismatched_tensors_are_named(tmp_path):
    state = pretrained_file(tmp_path / "x.pth")
    heads, name = heads_of_fixture(), "text_encoder.encoder.layer.0.output.dense.weight"
    other = name.replace("text_encoder", "text_decoder.bert")
    for change, message in (
        (lambda s: [s.pop(n) for n in (name, other)], f"missing: {re.escape(name)}"),
        (lambda s: s.update({"text_encoder.pooler.dense.weight": torch.ones(2)}), r"unexpected: text_encoder\.pooler"),
        (lambda s: s.update({"itm_head.weight": torch.ones(3, 2)}), r"itm_head\.weight is \(3, 2\)"),
        (lambda s: s.update({other: s[other] + 1}), "shared in BLIP but different here"),
    ):
        changed = dict(state)
        change(changed)
        torch.save({"model": changed}, tmp_path / "changed.pth")
        with pytest.raises(ExchangeError, match=message):
            convert(tmp_path / "changed.pth", tmp_path / "ours", **heads)
        assert not (tmp_path / "ours").exists()


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"x": torch.ones(1)}, "config": Harm()}, "harm.pth")
    with pytest.raises(ExchangeError, match="harm.pth contains more than tensors and was not loaded"):
        convert("harm.pth", "ours")
    torch.jit.script(torch.nn.Linear(2, 2)).save("scripted.pt")
    with zipfile.ZipFile("scripted.pt") as archive, zipfile.ZipFile("harm.pt", "w") as harmed:
        for entry in archive.namelist():
            content = pickle.dumps(Harm()) if entry.endswith("/data.pkl") else archive.read(entry)
            harmed.writestr(entry, content)
    with pytest.raises(ExchangeError, match="harm.pt contains more than tensors"):
        convert("harm.pt", "ours")
    assert not Path("harmed").exists() and not Path("ours").exists()


def test_damaged_files_are_named(tmp_path):
    clip_of_transformers(tmp_path / "theirs")
    weights = tmp_path / "theirs" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArgumentError, match="model.safetensors is damaged"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    pretrained_file(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:5000])
    with pytest.raises(ExchangeError, match="x.pth is damaged"):
        convert(tmp_path / "x.pth", tmp_path / "ours")
    (tmp_path / "note.txt").write_text("no model")
    with pytest.raises(ExchangeError, match="note.txt"):
        convert(tmp_path / "note.txt", tmp_path / "ours")
    with pytest.raises(ExchangeError, match="no such file or folder"):
        convert(tmp_path / "nowhere", tmp_path / "ours")


def test_paths_outside_the_folder_are_rejected(tmp_path):
    clip_of_transformers(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"logit_scale": "../outside.safetensors"}}
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArgumentError, match="names the file ../outside.safetensors, which is not in the folder"):
        convert(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("to", ["vlp", "transformers", "open_clip"])
def test_folder_with_other_files_is_not_changed(tmp_path, to):
    clip_of_transformers(tmp_path / "theirs")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "years of work.txt").write_text("x")
    with pytest.raises(ArgumentError, match="TARGET .*thesis contains other files"):
        convert(tmp_path / "theirs", tmp_path / "thesis", to=to)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["years of work.txt"]


def test_training_states_of_an_earlier_run_are_moved_aside(tmp_path):
    pretrained_file(tmp_path / "model_base.pth")
    state = state_folder(tmp_path / "ours") / "step-0000003"
    state.mkdir(parents=True)
    (state / "trainer_state.json").write_text("{}")
    convert(tmp_path / "model_base.pth", tmp_path / "ours", **heads_of_fixture())
    assert (tmp_path / "ours.resume.previous" / "step-0000003" / "trainer_state.json").exists()
    with pytest.raises(ArgumentError, match="exists: choose a new name"):
        convert(tmp_path / "ours", tmp_path / "ours", to="salesforce")


def test_sharded_checkpoints_are_loaded(tmp_path):
    theirs = clip_of_transformers(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    convert(tmp_path / "theirs", tmp_path / "ours")
    equal(dict(vlp.VlpClipModel.from_pretrained(tmp_path / "ours").state_dict()), dict(theirs.state_dict()))


def test_half_precision_tensors_are_loaded(tmp_path):
    torch.save({"a": torch.ones(3, dtype=torch.bfloat16), "b": "text", "c": 3}, tmp_path / "x.bin")
    assert {name: value.dtype for name, value in read_tensors(tmp_path / "x.bin").items()} == {"a": torch.bfloat16}


def test_the_command_line(tmp_path):
    tiny_blip().save_pretrained(tmp_path / "ours")
    command, other = ["vlp convert", str(tmp_path / "ours"), str(tmp_path / "theirs.pth")], str(tmp_path / "other")
    code, output = Program(tmp_path / "1.txt", main, argv=[*command, "--to", "salesforce"]).wait()
    assert code == 0 and "Wrote " in output, output
    code, output = Program(tmp_path / "2.txt", main, argv=[*command[:2], other, "--to", "transformers"]).wait()
    assert code == 1 and "error: transformers has no class for VlpBlipForPreTraining" in output


@pytest.mark.parametrize("to", ["vlp", "transformers", "open_clip"])
def test_licence_goes_along(tmp_path, to):
    model, processor = tiny_pair()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "without", to)
    assert not (tmp_path / "without/README.md").exists()
    (tmp_path / "source/README.md").write_text("---\nlicense: mit\n---\n\n# Model\n")
    convert(tmp_path / "source", tmp_path / "with", to)
    assert ModelCard.load(tmp_path / "with/README.md").data.license == "mit"


@pytest.mark.filterwarnings("ignore")
def test_open_clip_reads_pictures_and_words_as_vlp_does(tmp_path):
    """The exported folder alone is enough: open_clip's own preprocessing and tokenizer, from that folder."""
    model, processor = tiny_pair()
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    notes = convert(tmp_path / "ours", tmp_path / "theirs", to="open_clip")
    assert any("hf_tokenizer_name" in note for note in notes)
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'theirs'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'theirs'}")
    picture, texts = Image.effect_noise((40, 33), 90).convert("RGB"), [*CAPTIONS, "Two  DOGS", "red " * 40]
    predictor = load(str(tmp_path / "ours"), "embed")
    with torch.no_grad():
        images = F.normalize(theirs.eval().encode_image(preprocess(picture)[None]), dim=-1)
        words = F.normalize(theirs.encode_text(tokenize(texts)), dim=-1)
    assert_close(predictor.embed_images([picture]), images, rtol=0, atol=1e-5)
    assert_close(predictor.embed_texts(texts), words, rtol=0, atol=1e-5)


def test_open_clip_has_no_resnet_of_three_stages(tmp_path):
    vision = {"model_type": "vlp_modified_resnet", "depths": [1, 1, 1], "embedding_size": 8, "projection_dim": 24,
              "image_size": 32}  # fmt: skip
    config = vlp.VlpClipConfig(vision_config=vision, text_config=tiny_model().config.text_config, projection_dim=24)
    vlp.VlpClipModel(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ExchangeError, match="open_clip's ResNet has 4 stages; this model's has 3"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="open_clip")
    assert not (tmp_path / "theirs").exists()


def test_exported_tokenizers_have_a_class_that_transformers_4_has(tmp_path):
    model, processor = tiny_pair()
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    for to in ("transformers", "open_clip"):
        convert(tmp_path / "ours", tmp_path / to, to=to)
        settings = json.loads((tmp_path / to / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert settings["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("name, kind", [("VlpBlipForConditionalGeneration", BlipForConditionalGeneration),
                                        ("VlpBlipForImageTextRetrieval", BlipForImageTextRetrieval)])  # fmt: skip
def test_a_pretrained_blip_is_exported_as_the_class_that_is_named(name, kind, tmp_path):
    model = tiny_blip().eval()
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ExchangeError, match=f"pass --architecture, one of .*{name}"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="transformers")
    convert(tmp_path / "ours", tmp_path / "theirs", to="transformers", architecture=name)
    theirs = kind.from_pretrained(tmp_path / "theirs").eval()
    size = model.config.vision_config.image_size
    with torch.no_grad():
        wanted = model.encode_image(pixels(size)).last_hidden_state
        assert_close(theirs.vision_model(pixels(size)).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


def test_architectures_that_do_not_fit_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "clip")
    tiny_blip().save_pretrained(tmp_path / "blip")
    for folder, name, message in (
        ("clip", "VlpBlipForConditionalGeneration", "a VlpClipModel can be read as VlpClipModel"),
        ("blip", "Nothing", "a VlpBlipForPreTraining can be read as VlpBlipForPreTraining, "),
    ):
        with pytest.raises(UnsupportedModelError, match=f"--architecture {name}: {message}"):
            convert(tmp_path / folder, tmp_path / "out", architecture=name)
    convert(tmp_path / "clip", tmp_path / "theirs", to="transformers")
    with pytest.raises(ExchangeError, match="--architecture is for models of vlp"):
        convert(tmp_path / "theirs", tmp_path / "out", architecture="VlpBlipForImageTextRetrieval")


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_every_library_classifies_a_drawing_with_the_included_vit(tmp_path):
    """Each reads the exported folder with its own preprocessing and tokenizer."""
    source, names = ROOT / "model_cards/clip-emoji-vit", ["red apple", "dog", "rocket"]
    picture = Image.open(ROOT / "docs/red-apple.webp").convert("RGB")
    expected = pipeline("zero-shot-image-classification", model=str(source))(
        picture, candidate_labels=names, hypothesis_template="{}"
    )
    assert expected[0]["label"] == "red apple"
    scores = {each["label"]: each["score"] for each in expected}
    convert(source, tmp_path / "transformers", to="transformers")
    model = CLIPModel.from_pretrained(tmp_path / "transformers").eval()
    inputs = CLIPProcessor.from_pretrained(tmp_path / "transformers")(
        images=picture, text=names, padding=True, return_tensors="pt"
    )
    theirs = model(**inputs).logits_per_image.softmax(dim=-1)[0]
    assert_close(theirs, torch.tensor([scores[name] for name in names]), rtol=1e-4, atol=1e-5)
    convert(source, tmp_path / "open_clip", to="open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'open_clip'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")
    images = F.normalize(model.eval().encode_image(preprocess(picture)[None]), dim=-1)
    words = F.normalize(model.encode_text(tokenize(names)), dim=-1)
    theirs = (model.logit_scale.exp() * images @ words.T).softmax(dim=-1)[0]
    assert_close(theirs, torch.tensor([scores[name] for name in names]), rtol=1e-3, atol=1e-4)
    with pytest.raises(ExchangeError, match="hidden_act is not quick_gelu"):  # OpenAI's code has no other
        convert(source, tmp_path / "model.pt", to="openai")
