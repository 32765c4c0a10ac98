"""Shared fixtures and helpers; all tests run offline on tiny random models."""

import contextlib
import io
import os
import re
import shutil
import socket
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from vlp.processing.blip import train_tokenizer

import vlp

collect_ignore_glob = [] if os.environ.get("VLP_TRANSFORMERS") else ["contract/*"]  # see contract/archive.py

VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
RESNET = {"model_type": "vlp_modified_resnet", "image_size": 64, "embedding_size": 16, "depths": [1, 2, 1]}
TEXT = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
}
TOWERS = {"vit": VIT, "resnet": RESNET}
BLIP_TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "bos_token_id": 118,
    "enc_token_id": 119,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CAPTIONS = ["a red square", "a green circle, small", "blue", "two yellow triangles and a dog"]


@pytest.fixture(autouse=True, scope="module")
def own_accelerator():
    """Let each file of tests create an Accelerator of its own precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tiny_config(tower: str = "vit", **overrides) -> vlp.VlpClipConfig:
    return vlp.VlpClipConfig(vision_config=dict(TOWERS[tower]), text_config=dict(TEXT), projection_dim=24, **overrides)


def tiny_model(tower: str = "vit", **overrides) -> vlp.VlpClipModel:
    torch.manual_seed(0)
    if tower == "siglip":
        vision, text = VIT | {"model_type": "vlp_siglip_vit"}, TEXT | {"model_type": "vlp_siglip_text"}
        config = vlp.VlpClipConfig(
            vision_config=vision, text_config=text, projection_dim=48, logit_bias_init_value=-10.0
        )
        return vlp.VlpClipModel(config)
    return vlp.VlpClipModel(tiny_config(tower, **overrides))


def tiny_batch(model: vlp.VlpClipModel, size: int = 4) -> dict[str, torch.Tensor]:
    """Random images, and captions of different lengths padded with the end token."""
    generator = torch.Generator().manual_seed(1)
    side, text = model.config.vision_config.image_size, model.config.text_config
    input_ids = torch.full((size, 11), text.eos_token_id)
    for row in range(size):
        length = 3 + 2 * row % 8
        input_ids[row, 0] = text.bos_token_id
        input_ids[row, 1:length] = torch.randint(5, 500, (length - 1,), generator=generator)
    return {"input_ids": input_ids, "pixel_values": torch.randn(size, 3, side, side, generator=generator)}


def tiny_processor(side: int = 32) -> vlp.VlpClipProcessor:
    image_processor = vlp.VlpClipImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return vlp.VlpClipProcessor(image_processor, vlp.VlpClipTokenizer.train(CAPTIONS, 600, max_length=20))


def tiny_pair(tower: str = "vit") -> tuple[vlp.VlpClipModel, vlp.VlpClipProcessor]:
    """A model in evaluation mode and its processor."""
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = TEXT | special | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    vision = TOWERS[tower] | {"image_size": 32}
    config = vlp.VlpClipConfig(vision_config=vision, text_config=text, projection_dim=24)
    return vlp.VlpClipModel(config).eval(), processor


def tiny_blip(tower: str = "vit") -> vlp.VlpBlipForPreTraining:
    """A tiny BLIP with weights larger than at initialisation, so that all of them affect its outputs."""
    torch.manual_seed(0)
    vision = dict(TOWERS[tower])
    config = vlp.VlpBlipConfig(vision_config=vision, text_config=dict(BLIP_TEXT), image_text_hidden_size=24)
    model = vlp.VlpBlipForPreTraining(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("vision_model"):
                parameter.normal_(std=0.2)
    return model


def tiny_blip_batch(tower: str = "vit", size: int = 4) -> dict[str, torch.Tensor]:
    """Random images, and captions of different lengths padded on the right."""
    generator = torch.Generator().manual_seed(1)
    side = TOWERS[tower]["image_size"]
    input_ids = torch.zeros(size, 10, dtype=torch.long)
    for row in range(size):
        length = 4 + 2 * row % 7
        input_ids[row, :length] = torch.randint(5, 110, (length,), generator=generator)
        input_ids[row, 0], input_ids[row, length - 1] = 2, 3
    return {"input_ids": input_ids, "pixel_values": torch.randn(size, 3, side, side, generator=generator)}


QFORMER = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "eos_token_id": 3,
    "bos_token_id": 118,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BLIP2_TOWERS = {"blip": VIT | {"model_type": "vlp_blip_vit"}, "clip": VIT | {"model_type": "vlp_vit"}, "resnet": RESNET}


def tiny_blip2_config(tower: str = "blip", **fields) -> vlp.VlpBlip2Config:
    vision = dict(BLIP2_TOWERS[tower])
    return vlp.VlpBlip2Config(
        vision_config=vision, qformer_config=dict(QFORMER), num_query_tokens=5, image_text_hidden_size=24, **fields
    )


def with_larger_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Enlarge the trained weights of a model, so that all of them affect its outputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith(("vision_model", "language_model")):
                parameter.normal_(std=0.2)
    return model


def tiny_blip2(tower: str = "blip") -> vlp.VlpBlip2ForPreTraining:
    torch.manual_seed(0)
    return with_larger_weights(vlp.VlpBlip2ForPreTraining(tiny_blip2_config(tower))).eval()


def tiny_language_model(kind: str = "llama", vocab_size: int = 99) -> torch.nn.Module:
    """A causal or sequence-to-sequence language model of transformers, with random weights."""
    torch.manual_seed(1)
    common = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "llama":
        config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, initializer_range=0.3, **common)  # fmt: skip
        return LlamaForCausalLM(config).eval()
    if kind == "opt":
        config = OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                           num_attention_heads=4, max_position_embeddings=64, init_std=0.3, **common)  # fmt: skip
        return OPTForCausalLM(config).eval()
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **common)
    return T5ForConditionalGeneration(config).eval()


def tiny_blip2_generation(kind: str = "llama", tower: str = "blip") -> vlp.VlpBlip2ForConditionalGeneration:
    torch.manual_seed(0)
    model = vlp.VlpBlip2ForConditionalGeneration(tiny_blip2_config(tower), tiny_language_model(kind))
    return with_larger_weights(model).eval()


def saved_pair(kind: str, folder) -> str:
    """The folder of a tiny "clip", "blip", "vqa", "nlvr" or "blip2" with its processor."""
    if kind == "clip":
        model, processor = tiny_pair()
    elif kind == "blip2":  # its language model is in another folder
        source = Path(folder).with_name("language-model")
        save_language_model(source, CAPTIONS)
        config = tiny_blip2_config("clip", language_model_name_or_path=str(source))
        model = vlp.VlpBlip2ForConditionalGeneration(config, LlamaForCausalLM.from_pretrained(source))
        model = with_larger_weights(model).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        processor = vlp.VlpBlip2Processor(tiny_processor().image_processor, tokenizer)
    else:
        model = tiny_blip().eval()
        if kind != "blip":
            tasks = {"vqa": vlp.VlpBlipForQuestionAnswering, "nlvr": vlp.VlpBlipForVisualReasoning}
            model = tasks[kind](model.config).eval()
        side = model.config.vision_config.image_size
        images = vlp.VlpBlipImageProcessor(size={"height": side, "width": side})
        words = ["a red square", "two dogs", "green", "blue", "white"]
        processor = vlp.VlpBlipProcessor(images, train_tokenizer(words * 9, 99, max_length=12))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def window():
    """A page of a headless Chromium, as Playwright's, with its `errors`: the messages of exceptions in its scripts."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(60_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        chromium.close()


# The slowest files, which `make test` starts first, so that its processes end together.
SLOWEST = (
    "test_blip_training", "test_training", "test_distributed", "test_engines", "test_blip2_training", "test_onnx",
    "test_exchange", "test_blip_tasks", "test_hub", "test_modeling", "test_bundle", "test_docs", "test_processing",
)  # fmt: skip


def pytest_collection_modifyitems(items: list) -> None:
    """Put the slowest files first."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture
def images() -> list[Image.Image]:
    return [Image.new("RGB", (40, 30 + 10 * index), colour) for index, colour in enumerate(("red", "green", "blue"))]


@pytest.fixture(autouse=True)
def restore_thread_count():
    """Restore the number of CPU threads after each test, because training runs change it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def what_the_card_says(folder: Path) -> str:
    """Run the usage snippet of a folder's card next to the folder, with the pictures it names; return its output."""
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    for name in ("picture", "left", "right"):
        Image.new("RGB", (20, 20), "red").save(folder.parent / f"{name}.png")
    here = os.getcwd()
    os.chdir(folder.parent)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(snippet, str(folder / "README.md"), "exec"), {})
    finally:
        os.chdir(here)
    return output.getvalue()


def save_language_model(folder: Path, captions: list[str]) -> None:
    """Save a tiny causal language model and a word-level tokenizer without a padding token."""
    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    tiny_language_model("llama", vocab_size=len(vocabulary)).save_pretrained(folder)
