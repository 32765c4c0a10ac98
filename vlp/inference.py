"""Models of vlp and transformers with their processors, for prediction: embed, match, caption, answer, reason.

    predictor = load("runs/blip-emoji", "embed")
    predictor.similarity(predictor.embed_images(images), predictor.embed_texts(["a cat", "a dog"]))

Evaluation, the search index, CapFilt and the demo all predict through these classes.
"""

import contextlib
import tempfile
from collections.abc import Iterator
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
    PreTrainedModel,
)
from transformers.utils import logging

from .architectures import architecture, architecture_of
from .conversion import convert
from .errors import UnsupportedModelError
from .modeling_vlp.blip import VlpBlipForPreTraining
from .modeling_vlp.blip2 import VlpBlip2PreTrainedModel, best_query
from .modeling_vlp.blip2_writer import VlpBlip2ForConditionalGeneration
from .modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from .modeling_vlp.clip import VlpClipModel
from .modeling_vlp.exchange.places import ExchangeError
from .modeling_vlp.losses import unit_length
from .modeling_vlp.med import Memory
from .processing.pictures import to_rgb

# Shapes: B images, T texts, Q queries, M image tokens, D width, E embedding

CONVERTED = ("blip", "blip-2", "clip", "siglip")  # models of transformers that are converted to ours
LACKS = {
    "embed": "it does not embed images and texts in one space",
    "match": "it has no matching head (ITM), as BLIP and BLIP-2 have",
    "caption": "it has no decoder that generates captions, as BLIP and BLIP-2 have",
    "answer": "it was not fine-tuned to answer questions, as `training blip --task vqa` does",
    "reason": "it was not fine-tuned on pairs of images, as `training blip --task nlvr` does",
}
QUESTION = "Question: {} Short answer:"  # the prompt for a language model; LAVIS, blip2_opt.py


class Predictor:
    """A model that embeds images and texts in one space: any of transformers with both features."""

    def __init__(self, model: PreTrainedModel, processor):
        self.model, self.processor = model.eval(), processor

    @property
    def model_type(self) -> str:
        return self.model.config.model_type

    def prepare_images(self, images: list[Image.Image]) -> Tensor:
        """`pixel_values` (B, 3, S, S) of PIL images of any mode, on the model's device."""
        pixels = self.processor.image_processor([to_rgb(image) for image in images], return_tensors="pt")
        return pixels["pixel_values"].to(self.model.device, self.model.dtype)

    def prepare_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and their mask, truncated to the model's length."""
        length = self.model.config.get_text_config().max_position_embeddings
        padding = "max_length" if self.model_type.startswith("siglip") else True  # as SigLIP was trained
        tokens = self.processor.tokenizer(
            texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        return tokens.to(self.model.device)

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """Embeddings of unit length, float32, on the CPU: (B, E), or (B, Q, E) for BLIP-2."""
        return unit_features(self.model.get_image_features(pixel_values=self.prepare_images(images)))

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """(T, E) of unit length, float32, on the CPU."""
        return unit_features(self.model.get_text_features(**self.prepare_texts(texts)))

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines (B, T) of embeddings; for (B, Q, E), that of the best query."""
        if images.ndim == 2:
            return images @ texts.T
        return torch.cat([best_query(chunk, texts) for chunk in images.split(256)])

    @property
    def temperature(self) -> float:
        """The divisor of cosines before a softmax."""
        scale = getattr(self.model, "logit_scale", None)
        return float((self.model.temp if scale is None else (-scale).exp()).detach())


def unit_features(output) -> Tensor:
    """The features of a model's output, of unit length, on the CPU."""
    return unit_length(getattr(output, "pooler_output", output)).cpu()


class VlpPredictor(Predictor):
    """CLIP and SigLIP of vlp, and what all models of vlp share."""

    def prepare_images(self, images: list[Image.Image]) -> Tensor:
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def prepare_texts(self, texts: list[str]) -> dict[str, Tensor]:
        config = self.model.config
        length = (getattr(config, "qformer_config", None) or config.get_text_config()).max_position_embeddings
        return self.processor.read_texts(texts, length).to(self.model.device)

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        return unit_features(self.model.get_image_features(self.prepare_images(images), pooled_only=True))

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        return unit_features(self.model.get_text_features(self.prepare_texts(texts)["input_ids"], pooled_only=True))


class BlipPredictor(VlpPredictor):
    """BLIP of vlp; which methods work depends on the class of the model."""

    @torch.inference_mode()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """The image tower's states (B, M, D) that texts are matched with, on the CPU."""
        return self.model.encode_image(self.prepare_images(images)).last_hidden_state.cpu()

    def memory_of(self, states: Tensor) -> Memory:
        """What texts attend to, of states (B, M, D)."""
        return self.model.read(states.to(self.model.device))

    @torch.inference_mode()
    def match(self, states: Tensor, index: Tensor, texts: list[str]) -> Tensor:
        """ITM logits (T, 2), "no" and "yes", of texts with the images `index` (T,) of `states` (B, M, D)."""
        memory = self.memory_of(states).select(index.to(self.model.device))
        return self.model.match(self.prepare_texts(texts)["input_ids"], None, memory).float().cpu()

    @torch.inference_mode()
    def caption(self, images: list[Image.Image], prompt: str = "", **options) -> list[str]:
        """A caption for each image, without the prompt that it began with.

        Args:
            options: those of `generate`; 3 beams and at most 30 tokens if not given.
        """
        options = {"num_beams": 3, "do_sample": False, "max_length": 30} | options
        ids = self.processor.read_texts([prompt], 512)["input_ids"].to(self.model.device)
        generated = self.model.generate(self.prepare_images(images), ids.expand(len(images), -1), **options)
        return self.processor.write(generated[:, ids.shape[1] - 1 :])  # without [DEC] and the prompt

    @torch.inference_mode()
    def answer(self, images: list[Image.Image], questions: list[str], **options) -> list[str]:
        """A generated answer to a question about each image; `options` are those of `generate`."""
        options = {"num_beams": 3, "do_sample": False, "max_length": 12} | options
        ids = self.prepare_texts(questions)["input_ids"]
        return self.processor.write(self.model.generate(self.prepare_images(images), ids, **options))

    @torch.inference_mode()
    def rank_answers(
        self, images: list[Image.Image], questions: list[str], answers: list[str], top_k: int = 128
    ) -> list[str]:
        """The likeliest of `answers` to a question about each image; `top_k` of them are scored in full."""
        listed = self.prepare_texts(answers)["input_ids"]
        best = self.model.rank(self.prepare_images(images), self.prepare_texts(questions)["input_ids"], listed, top_k)
        return [answers[number] for number in best.tolist()]

    @torch.inference_mode()
    def reason(self, left: list[Image.Image], right: list[Image.Image], texts: list[str]) -> Tensor:
        """Logits (B, 2), "false" and "true", of one text about each pair of images."""
        pixels = torch.stack([self.prepare_images(left), self.prepare_images(right)], dim=1)  # (B, 2, 3, S, S)
        return self.model(self.prepare_texts(texts)["input_ids"], pixels).logits.float().cpu()


class Blip2Predictor(BlipPredictor):
    """BLIP-2 of vlp after stage 1."""

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        return unit_features(self.model.get_image_features(pixel_values=self.prepare_images(images)))

    @torch.inference_mode()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        return self.model.see(self.prepare_images(images)).cpu()


class LanguageModelPredictor(Blip2Predictor):
    """BLIP-2 of vlp after stage 2: a language model generates after a prompt."""

    def caption(self, images: list[Image.Image], prompt: str = "", **options) -> list[str]:
        return self.generate(images, [prompt] * len(images), {"num_beams": 5, "max_new_tokens": 30} | options)

    def answer(self, images: list[Image.Image], questions: list[str], **options) -> list[str]:
        prompts = [QUESTION.format(question) for question in questions]
        return self.generate(images, prompts, {"num_beams": 5, "max_new_tokens": 10} | options)

    @torch.inference_mode()
    def generate(self, images: list[Image.Image], prompts: list[str], options: dict) -> list[str]:
        """The text that the language model generates after each prompt, without the prompt."""
        inputs, skip = {}, 0
        if any(prompts):
            cleaned = [self.processor.clean(prompt) for prompt in prompts]
            inputs = self.processor.tokenizer(cleaned, padding=True, return_tensors="pt").to(self.model.device)
            if not self.model.language_model.config.is_encoder_decoder:
                skip = inputs["input_ids"].shape[1]
        if "max_length" in options:
            options["max_new_tokens"] = options.pop("max_length")
        generated = self.model.generate(
            pixel_values=self.prepare_images(images), **inputs, **({"do_sample": False} | options)
        )
        return [text.strip() for text in self.processor.write(generated[:, skip:])]


class TransformersPredictor(Predictor):
    """A model of transformers that generates captions, or picks answers from its list."""

    @torch.inference_mode()
    def caption(self, images: list[Image.Image], prompt: str = "", **options) -> list[str]:
        """A caption for each image, without the prompt; `options` are those of `generate`."""
        text = {"text": [prompt] * len(images)} if prompt else {}
        inputs = self.processor(images=[to_rgb(image) for image in images], return_tensors="pt", **text)
        options = {"num_beams": 3, "do_sample": False, "max_length": 30} | options
        generated = self.model.generate(**inputs.to(self.model.device), **options)
        texts = self.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [text.removeprefix(prompt).strip() for text in texts]

    @torch.inference_mode()
    def answer(self, images: list[Image.Image], questions: list[str], **options) -> list[str]:
        """The most probable of the model's answers to a question about each image."""
        images = [to_rgb(image) for image in images]
        inputs = self.processor(images=images, text=questions, padding=True, truncation=True, return_tensors="pt")
        best = self.model(**inputs.to(self.model.device)).logits.argmax(dim=-1)
        return [self.model.config.id2label[number] for number in best.tolist()]


# --- from a model to its predictor ------------------------------------------------------------------------------------


def predictor_of(model: PreTrainedModel, processor, use: str) -> Predictor:
    """The predictor of a model of vlp that is in memory; its weights are not copied.

    Args:
        model: any model of vlp, in or out of training. use: one of `architectures.USES`.

    Raises:
        UnsupportedModelError: if the model does not support the use.
    """
    row = architecture_of(model)
    if use not in row.uses:
        raise unsupported(type(model).__name__, use)
    if use == "caption" and isinstance(model, VlpBlipForPreTraining):
        model = VlpBlipForConditionalGeneration.sharing(model)
    if isinstance(model, VlpClipModel):
        return VlpPredictor(model, processor)
    if isinstance(model, VlpBlip2ForConditionalGeneration):
        return LanguageModelPredictor(model, processor)
    return (Blip2Predictor if isinstance(model, VlpBlip2PreTrainedModel) else BlipPredictor)(model, processor)


def unsupported(what: str, use: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what} cannot {use}: {LACKS[use]}.")


def load(name: str | Path, use: str, device: str | torch.device = "cpu", dtype=torch.float32) -> Predictor:
    """Load a model with its processor for one use.

    Args:
        name: folder or hub name of a model of vlp or transformers. use: one of `architectures.USES`.

    Raises:
        UnsupportedModelError: if there is no such model, or it does not support the use.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"{name} is not a model folder of vlp or transformers, nor a hub name: {first}"
        ) from error
    if config.model_type.startswith("vlp_"):
        predictor = load_vlp(name, config, use)
    elif config.model_type in CONVERTED:
        predictor = load_converted(name, use)
    else:
        predictor = load_transformers(name, config, use)
    predictor.model.to(device, dtype)
    return predictor


def load_vlp(name: str | Path, config, use: str) -> Predictor:
    """A model of vlp, as the class that the use needs."""
    try:
        kind = architecture((config.architectures or [config.model_type])[0]).uses.get(use)
    except KeyError as error:
        raise UnsupportedModelError(f"{name}: {error.args[0]}") from error
    if kind is None:
        raise unsupported(f"{name}, a {config.architectures[0]},", use)
    with quiet():
        model = kind.from_pretrained(name, dtype=torch.float32)
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{name} has no processor: {error}") from error
    return predictor_of(model, processor, use)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings about weights that a part of a model does not use."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def load_converted(name: str | Path, use: str) -> Predictor:
    """A model of transformers whose architecture vlp has, converted to ours."""
    try:
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name)))
        with tempfile.TemporaryDirectory() as place:
            convert(folder, Path(place) / "model")
            return load_vlp(Path(place) / "model", AutoConfig.from_pretrained(Path(place) / "model"), use)
    except (ExchangeError, LocalEntryNotFoundError) as error:
        raise UnsupportedModelError(f"{name}: {error}") from error


def load_transformers(name: str | Path, config, use: str) -> Predictor:
    """Any other model of transformers."""
    kinds = {"embed": AutoModel, "caption": AutoModelForImageTextToText, "answer": AutoModelForVisualQuestionAnswering}
    if use not in kinds:
        raise unsupported(f"{name}, a {config.model_type},", use)
    try:
        model = kinds[use].from_pretrained(name, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise unsupported(f"{name}, a {config.model_type},", use) from error
    if use == "embed" and not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise unsupported(f"{name}, a {config.model_type},", use)
    return (Predictor if use == "embed" else TransformersPredictor)(model, processor)
