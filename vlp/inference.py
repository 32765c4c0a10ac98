"""A model of vlp or transformers with its processor, asked in pictures and words: compare, match, write, answer.

    ready = load("runs/blip-emoji", "compare")
    ready.similarity(ready.embed_images(images), ready.embed_texts(["a cat", "a dog"]))

What evaluation, the search index and the demo have in common. Nothing here learns.
"""

import contextlib
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)
from transformers.utils import logging

import vlp

from .modeling_vlp.blip2 import best_query
from .modeling_vlp.losses import unit_length
from .modeling_vlp.med import Memory

# Shapes: B images, T texts, Q queries, M tokens of an image, D width, E embedding

USES = ("compare", "match", "write", "answer")
# The class that each use of a model of ours needs.
OURS = {
    ("vlp_clip", "compare"): "VlpClipModel",
    ("vlp_blip", "compare"): "VlpBlipForImageTextRetrieval",
    ("vlp_blip", "match"): "VlpBlipForImageTextRetrieval",
    ("vlp_blip", "write"): "VlpBlipForConditionalGeneration",
    ("vlp_blip", "answer"): "VlpBlipForQuestionAnswering",
    ("vlp_blip2", "compare"): "VlpBlip2ForImageTextRetrieval",
    ("vlp_blip2", "match"): "VlpBlip2ForImageTextRetrieval",
    ("vlp_blip2", "write"): "VlpBlip2ForConditionalGeneration",
    ("vlp_blip2", "answer"): "VlpBlip2ForConditionalGeneration",
}
CONVERTED = ("blip", "blip-2", "clip", "siglip")  # read as ours: see `vlp.conversion`
LACKS = {
    "compare": "it does not put images and texts in one space",
    "match": "it has no head that matches (ITM), as BLIP and BLIP-2 have",
    "write": "it has no decoder that writes, as BLIP and BLIP-2 have",
    "answer": "it was not fine-tuned to answer questions, as `training blip --task vqa` does",
}
QUESTION = "Question: {} Short answer:"  # what a language model is asked; LAVIS, blip2_opt.py


class NotReadyError(ValueError):
    """A model that cannot be loaded, or cannot do what it is asked for; the message says what to do."""


class Ready:
    """A model that compares images and texts in one space; of vlp, or any of transformers with both features."""

    takes_any_mode = False  # whether the processor makes pictures RGB itself

    def __init__(self, model, processor):
        self.model, self.processor = model.eval(), processor

    @property
    def name(self) -> str:
        return self.model.config.model_type

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """(B, 3, S, S) of pictures of any mode."""
        if not self.takes_any_mode:
            images = [image.convert("RGB") for image in images]
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and their mask, cut to what the model reads."""
        config = getattr(self.model.config, "qformer_config", None) or self.model.config.get_text_config()
        length = config.max_position_embeddings
        if hasattr(self.processor, "read_texts"):
            return self.processor.read_texts(texts, length).to(self.model.device)
        padding = "max_length" if self.name.startswith("siglip") else True  # as SigLIP was trained
        return self.processor.tokenizer(texts, padding=padding, truncation=True, max_length=length,
                                        return_tensors="pt").to(self.model.device)  # fmt: skip

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """Embeddings of unit length, float32, on the CPU: (B, E), or (B, Q, E) of models that read by queries."""
        return unit(self.model.get_image_features(pixel_values=self.pixels(images)))

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """(T, E) of unit length, float32, on the CPU."""
        return unit(self.model.get_text_features(**self.tokens(texts)))

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, T) cosines of embeddings."""
        if images.ndim == 2:
            return images @ texts.T
        return torch.cat([best_query(chunk, texts) for chunk in images.split(256)])

    @property
    def temperature(self) -> float:
        """What cosines are divided by before a softmax over them."""
        scale = getattr(self.model, "logit_scale", None)
        return float((self.model.temp if scale is None else (-scale).exp()).detach())


def unit(output) -> Tensor:
    features = getattr(output, "pooler_output", output)
    return unit_length(features).cpu()


class ReadyOurs(Ready):
    """What all of vlp's models share: pictures become RGB after the crop, and of texts the pooled row is computed."""

    takes_any_mode = True

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        return unit(self.model.get_text_features(self.tokens(texts)["input_ids"], pooled_only=True))


class ReadyClip(ReadyOurs):
    """CLIP and SigLIP of vlp."""

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        return unit(self.model.get_image_features(self.pixels(images), pooled_only=True))


class ReadyBlip(ReadyOurs):
    """BLIP and BLIP-2 of vlp."""

    @torch.inference_mode()
    def see(self, images: list[Image.Image]) -> Tensor:
        """What texts are matched with, (B, M, D), on the CPU."""
        pixels = self.pixels(images)
        if self.name == "vlp_blip2":
            return self.model.see(pixels).cpu()
        return self.model.encode_image(pixels).last_hidden_state.cpu()

    def read(self, states: Tensor) -> Memory:
        return getattr(self.model, "text_model", self.model).read(states.to(self.model.device))

    @torch.inference_mode()
    def match(self, states: Tensor, index: Tensor, texts: list[str]) -> Tensor:
        """ITM logits (T, 2), "no" and "yes", of texts with the images `index` (T,) of `states` (B, M, D)."""
        memory = self.read(states).select(index.to(self.model.device))
        return self.model.match(self.tokens(texts)["input_ids"], None, memory).float().cpu()

    @torch.inference_mode()
    def write(self, images: list[Image.Image], prompt: str = "", **options) -> list[str]:
        """A caption for each image; `options` are those of `generate`."""
        options = {"num_beams": 3, "do_sample": False, "max_length": 30} | options
        ids = self.processor.read_texts([prompt], 512)["input_ids"].to(self.model.device)
        written = self.model.generate(self.pixels(images), ids.expand(len(images), -1), **options)
        return self.processor.write(written[:, ids.shape[1] - 1 :])  # without [DEC] and the prompt

    @torch.inference_mode()
    def answer(self, images: list[Image.Image], questions: list[str], **options) -> list[str]:
        """An answer to each image's question; `options` are those of `generate`."""
        options = {"num_beams": 3, "do_sample": False, "max_length": 12} | options
        ids = self.tokens(questions)["input_ids"]
        return self.processor.write(self.model.generate(self.pixels(images), ids, **options))


class ReadyWriter(ReadyBlip):
    """BLIP-2 of vlp with its language model."""

    def write(self, images: list[Image.Image], prompt: str = "", **options) -> list[str]:
        return self.go_on(images, [prompt] * len(images), {"num_beams": 5, "max_new_tokens": 30} | options)

    def answer(self, images: list[Image.Image], questions: list[str], **options) -> list[str]:
        asked = [QUESTION.format(question) for question in questions]
        return self.go_on(images, asked, {"num_beams": 5, "max_new_tokens": 10} | options)

    @torch.inference_mode()
    def go_on(self, images: list[Image.Image], prompts: list[str], options: dict) -> list[str]:
        """What the language model writes after each prompt."""
        inputs, skip = {}, 0
        if any(prompts):
            cleaned = [self.processor.clean(prompt) for prompt in prompts]
            inputs = self.processor.tokenizer(cleaned, padding=True, return_tensors="pt").to(self.model.device)
            if not self.model.language_model.config.is_encoder_decoder:
                skip = inputs["input_ids"].shape[1]
        if "max_length" in options:
            options["max_new_tokens"] = options.pop("max_length")
        written = self.model.generate(pixel_values=self.pixels(images), **inputs, do_sample=False, **options)
        return [text.strip() for text in self.processor.write(written[:, skip:])]


class ReadyTransformers(Ready):
    """A model of transformers that writes, or that answers questions from a list of answers."""

    @torch.inference_mode()
    def write(self, images: list[Image.Image], prompt: str = "", **options) -> list[str]:
        text = {"text": [prompt] * len(images)} if prompt else {}
        inputs = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt", **text)
        options = {"num_beams": 3, "do_sample": False, "max_length": 30} | options
        written = self.model.generate(**inputs.to(self.model.device), **options)
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.removeprefix(prompt).strip() for text in texts]

    @torch.inference_mode()
    def answer(self, images: list[Image.Image], questions: list[str], **options) -> list[str]:
        images = [image.convert("RGB") for image in images]
        inputs = self.processor(images=images, text=questions, padding=True, truncation=True, return_tensors="pt")
        best = self.model(**inputs.to(self.model.device)).logits.argmax(dim=-1)
        return [self.model.config.id2label[number] for number in best.tolist()]


def load(name: str | Path, use: str, device: str | torch.device = "cpu", dtype=torch.float32) -> Ready:
    """A folder or hub name, ready for a use: one of USES.

    Raises NotReadyError where there is no such model, or it cannot do that.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise NotReadyError(f"{name} is no folder of vlp or transformers, nor a hub name: {first}") from error
    if config.model_type.startswith("vlp_"):
        ready = load_ours(name, config, use)
    elif config.model_type in CONVERTED:
        ready = load_converted(name, use)
    else:
        ready = load_theirs(name, config, use)
    ready.model.to(device, dtype)
    return ready


def refuse(name: str | Path, kind: str, use: str) -> NotReadyError:
    return NotReadyError(f"{name}, a {kind}, cannot {use}: {LACKS[use]}.")


def load_ours(name: str | Path, config, use: str) -> Ready:
    architecture = OURS.get((config.model_type, use))
    if architecture is None:
        raise refuse(name, config.model_type, use)
    with quiet():
        model, loaded = getattr(vlp, architecture).from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if loaded["missing_keys"]:
        raise refuse(name, (config.architectures or [config.model_type])[0], use)
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise NotReadyError(f"{name} has no processor: {error}") from error
    family = ReadyClip if config.model_type == "vlp_clip" else ReadyBlip
    return (ReadyWriter if architecture == "VlpBlip2ForConditionalGeneration" else family)(model, processor)


@contextlib.contextmanager
def quiet():
    """What transformers says of weights that a part of a model leaves out is not the user's concern."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def load_converted(name: str | Path, use: str) -> Ready:
    """A model of transformers that vlp has too, read as ours."""
    from .conversion import convert
    from .modeling_vlp.exchange.places import ExchangeError

    try:
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name)))
        with tempfile.TemporaryDirectory() as place:
            convert(folder, Path(place) / "model")
            return load_ours(Path(place) / "model", AutoConfig.from_pretrained(Path(place) / "model"), use)
    except (ExchangeError, LocalEntryNotFoundError) as error:
        raise NotReadyError(f"{name}: {error}") from error


def load_theirs(name: str | Path, config, use: str) -> Ready:
    kinds = {"compare": AutoModel, "write": AutoModelForImageTextToText, "answer": AutoModelForVisualQuestionAnswering}
    if use not in kinds:
        raise refuse(name, config.model_type, use)
    try:
        model = kinds[use].from_pretrained(name, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise refuse(name, config.model_type, use) from error
    if use == "compare" and not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise refuse(name, config.model_type, use)
    return (Ready if use == "compare" else ReadyTransformers)(model, processor)
