"""Prediction with models of vlp and transformers: embed, match, caption, answer, reason.

    predictor = load("runs/blip-emoji", "embed")
    predictor.similarity(predictor.embed_images(images), predictor.embed_texts(["a cat", "a dog"]))

Evaluation, the search index, CapFilt and the demo all predict through these classes.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    PreTrainedModel,
)

from .architectures import USES, architecture_of
from .conversion import own_copy
from .errors import ArgumentError, UnsupportedModelError, printable
from .loading import load_model, load_processor, read_config, row_of
from .modeling_vlp.blip import VlpBlipForPreTraining
from .modeling_vlp.blip2 import VlpBlip2PreTrainedModel, best_query
from .modeling_vlp.blip2_generation import VlpBlip2ForConditionalGeneration
from .modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from .modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering
from .modeling_vlp.clip import VlpClipModel
from .modeling_vlp.losses import unit_length
from .modeling_vlp.med import Memory
from .modeling_vlp.resnet import ModifiedResNet
from .processing.blip2 import QUESTION
from .processing.pictures import to_rgb

# Shapes: B images, T texts, Q queries, M image tokens, D width, E embedding

LACKS = {
    "embed": "it does not embed images and texts in one space",
    "match": "it has no matching head (ITM); BLIP and BLIP-2 have one",
    "rerank": "re-ranking by captioning needs a matching head and a decoder, as a pre-trained BLIP has",
    "caption": "it has no decoder to generate captions; BLIP and BLIP-2 have one",
    "answer": "it was not fine-tuned to answer questions, as `training blip --task vqa` does",
    "reason": "it was not fine-tuned on pairs of images, as `training blip --task nlvr` does",
}
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")  # what towers read of a processor's output


class Predictor:
    """A model that embeds images and texts in one space: any model of transformers that has features of both.

    Args:
        model: the model; it is put into evaluation mode.
        processor: its processor.
    """

    def __init__(self, model: PreTrainedModel, processor):
        self.model, self.processor = model.eval(), processor
        self.embedding_size: int | None = None  # how many dimensions of an embedding are used; None: all

    @property
    def model_type(self) -> str:
        return self.model.config.model_type

    def prepare_images(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Preprocess images.

        Args:
            images: PIL images of any mode and size.

        Returns:
            `pixel_values` (B, 3, S, S) on the model's device, in its dtype; or patches (B, N, P * P * 3) of images that
            keep their shape, and their `spatial_shapes` (B, 2).
        """
        inputs = self.processor.image_processor([self.readable(image) for image in images], return_tensors="pt")
        kept = {name: inputs[name].to(self.model.device) for name in IMAGE_INPUTS if name in inputs}
        return kept | {"pixel_values": kept["pixel_values"].to(self.model.dtype)}

    def readable(self, image: Image.Image) -> Image.Image:
        """The image as the processor can read it; transformers' processors cannot read all modes."""
        return to_rgb(image)

    def prepare_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Tokenize texts, truncated to the model's maximum length.

        Returns:
            Token ids and attention mask (T, N) on the model's device.
        """
        length = self.model.config.get_text_config().max_position_embeddings
        padding = "max_length" if self.model_type.startswith("siglip") else True  # as SigLIP was trained
        tokens = self.processor.tokenizer(
            texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        return tokens.to(self.model.device)

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        """Embed images.

        Args:
            images: B PIL images of any mode and size.

        Returns:
            Embeddings of unit length, float32, on the CPU: (B, E), or (B, Q, E) for BLIP-2.
        """
        return self.unit_features(self.model.get_image_features(**self.prepare_images(images)))

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts.

        Returns:
            Embeddings (T, E) of unit length, float32, on the CPU.
        """
        return self.unit_features(self.model.get_text_features(**self.prepare_texts(texts)))

    def unit_features(self, output) -> Tensor:
        """The features in a model's output, normalised to unit length, on the CPU.

        Raises:
            FloatingPointError: if they are not finite; a ranking by them would look perfect.
        """
        features = getattr(output, "pooler_output", output)
        return require_finite_features(unit_length(features[..., : self.embedding_size]).cpu())

    @torch.inference_mode()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """The features of the image tower, before any projection to the space that texts share, for linear probes.

        Args:
            images: B PIL images of any mode and size.

        Returns:
            Features (B, D), float32, on the CPU. Embeddings, not normalised, if the tower cannot be run alone.
        """
        inputs, tower = self.prepare_images(images), getattr(self.model, "vision_model", None)
        output = None if tower is None else tower(**inputs)
        if getattr(output, "pooler_output", None) is None:
            output = self.model.get_image_features(**inputs)
        return require_finite_features(getattr(output, "pooler_output", output).float().cpu())

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosine similarities of images and texts.

        Args:
            images: image embeddings of unit length, (B, E), or (B, Q, E) for BLIP-2.
            texts: text embeddings of unit length, (T, E).

        Returns:
            Similarities (B, T); for BLIP-2, those of the query that fits each text best.
        """
        if images.ndim == 2:
            return images @ texts.T
        return torch.cat([best_query(chunk, texts) for chunk in images.split(256)])

    @property
    def temperature(self) -> float:
        """The temperature by which cosines are divided before a softmax."""
        scale = getattr(self.model, "logit_scale", None)
        return float((self.model.temp if scale is None else (-scale).exp()).detach())


def require_finite_features(features: Tensor) -> Tensor:
    """The features themselves. Raises FloatingPointError if they are not finite."""
    if not torch.isfinite(features).all():
        raise FloatingPointError(
            "The model's embeddings are not finite: its weights are broken, or its dtype too narrow."
        )
    return features


def require_room(max_length: int, prompt: int, positions: int) -> None:
    """Check that a text can be generated after its start.

    Args:
        max_length: maximum number of tokens, with the start.
        prompt: tokens of the start token and the prompt.
        positions: number of tokens that the model reads.

    Raises:
        ArgumentError: if there is no room for a token, or the model reads fewer tokens.
    """
    if not prompt < max_length <= positions:
        raise ArgumentError(
            f"--max_length {max_length} must be more than the {prompt} tokens of the start and the prompt, and at most "
            f"the {positions} that the model reads."
        )


class VlpPredictor(Predictor):
    """CLIP and SigLIP of vlp; base class for all models of vlp."""

    def readable(self, image: Image.Image) -> Image.Image:
        return image

    def prepare_texts(self, texts: list[str]) -> dict[str, Tensor]:
        config = self.model.config
        length = (getattr(config, "qformer_config", None) or config.get_text_config()).max_position_embeddings
        return self.processor.tokenize(texts, length).to(self.model.device)

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        return self.unit_features(self.model.get_image_features(**self.prepare_images(images), pooled_only=True))

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        ids = self.prepare_texts(texts)["input_ids"]
        return self.unit_features(self.model.get_text_features(ids, pooled_only=True))


class BlipPredictor(VlpPredictor):
    """BLIP of vlp. Which methods work depends on the model's class."""

    @torch.inference_mode()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """Encode images for `match`.

        Args:
            images: B PIL images of any mode and size.

        Returns:
            The hidden states (B, M, D) of the image tower, on the CPU.
        """
        return self.model.encode_image(**self.prepare_images(images)).last_hidden_state.cpu()

    def memory_of(self, states: Tensor) -> Memory:
        """The keys and values that texts attend to, from states (B, M, D)."""
        return self.model.memory_of(states.to(self.model.device))

    @torch.inference_mode()
    def match(self, states: Tensor, index: Tensor, texts: list[str]) -> Tensor:
        """Match texts with images (ITM).

        Args:
            states: (B, M, D) hidden states of `encode_images`.
            index: (T,) for each text, the number of its image in `states`.
            texts: T texts.

        Returns:
            Logits (T, 2) of "no match" and "match", float32, on the CPU.
        """
        memory = self.memory_of(states).select(index.to(self.model.device))
        return self.model.match(self.prepare_texts(texts)["input_ids"], None, memory).float().cpu()

    @torch.inference_mode()
    def caption_log_probabilities(self, states: Tensor, index: Tensor, texts: list[str]) -> Tensor:
        """Compute the probability that the decoder gives to captions.

        Args:
            states, index, texts: as for `match`.

        Returns:
            Logarithms of the probabilities (T,), float32, on the CPU.

        Raises:
            UnsupportedModelError: if the model has no decoder beside its matching head.
        """
        if not hasattr(self.model, "caption_log_probabilities"):
            raise UnsupportedModelError(
                f"A {type(self.model).__name__} cannot re-rank by captioning: only a pre-trained BLIP can."
            )
        memory = self.memory_of(states).select(index.to(self.model.device))
        return self.model.caption_log_probabilities(self.prepare_texts(texts)["input_ids"], memory).cpu()

    @torch.inference_mode()
    def caption(self, images: list[Image.Image], prompt: str = "", **options) -> list[str]:
        """Generate a caption for each image.

        Args:
            images: B PIL images of any mode and size.
            prompt: the text that each caption continues; it is not returned.
            options: options of `generate`; by default 3 beams and at most 30 tokens.

        Returns:
            B captions.
        """
        options = {"num_beams": 3, "do_sample": False, "max_length": 30} | options
        ids = self.processor.tokenize([prompt], 512)["input_ids"].to(self.model.device)
        require_room(options["max_length"], ids.shape[1] - 1, self.model.config.text_config.max_position_embeddings)
        generated = self.model.generate(**self.prepare_images(images), input_ids=ids.expand(len(images), -1), **options)
        return self.processor.decode_texts(generated[:, ids.shape[1] - 1 :])  # without [DEC] and the prompt

    @torch.inference_mode()
    def answer(self, images: list[Image.Image], questions: list[str], **options) -> list[str]:
        """Generate an answer to a question about each image.

        Args:
            images: B PIL images of any mode and size.
            questions: B questions.
            options: options of `generate`; by default 3 beams and at most 12 tokens.

        Returns:
            B answers.

        Raises:
            UnsupportedModelError: if the model was not trained to answer questions.
        """
        if not isinstance(self.model, VlpBlipForQuestionAnswering):
            raise unsupported(f"A {type(self.model).__name__}", "answer")
        options = {"num_beams": 3, "do_sample": False, "max_length": 12} | options
        require_room(options["max_length"], 1, self.model.config.text_config.max_position_embeddings)
        ids = self.prepare_texts(questions)["input_ids"]
        return self.processor.decode_texts(self.model.generate(**self.prepare_images(images), input_ids=ids, **options))

    @torch.inference_mode()
    def rank_answers(
        self, images: list[Image.Image], questions: list[str], answers: list[str], top_k: int = 128
    ) -> list[str]:
        """Choose the most probable of given answers to a question about each image.

        Args:
            images: B PIL images of any mode and size.
            questions: B questions.
            answers: the candidates, the same for all questions.
            top_k: number of candidates that are scored in full, chosen by their first token.

        Returns:
            B answers.
        """
        listed = self.prepare_texts(answers)["input_ids"]
        pixels, ids = self.prepare_images(images)["pixel_values"], self.prepare_texts(questions)["input_ids"]
        best = self.model.rank(pixels, ids, listed, top_k)
        return [answers[number] for number in best.tolist()]

    @torch.inference_mode()
    def reason(self, left: list[Image.Image], right: list[Image.Image], texts: list[str]) -> Tensor:
        """Decide whether a text is true of a pair of images (NLVR2).

        Args:
            left: B first images.
            right: B second images.
            texts: B texts, one per pair.

        Returns:
            Logits (B, 2) of "false" and "true", float32, on the CPU.
        """
        both = [self.prepare_images(images)["pixel_values"] for images in (left, right)]
        pixels = torch.stack(both, dim=1)  # (B, 2, 3, S, S)
        return self.model(self.prepare_texts(texts)["input_ids"], pixels).logits.float().cpu()


class Blip2Predictor(BlipPredictor):
    """BLIP-2 of vlp after stage 1."""

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> Tensor:
        return self.unit_features(self.model.get_image_features(**self.prepare_images(images)))

    @torch.inference_mode()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """The mean of the queries' embeddings (B, E), because the image tower itself is not trained."""
        output = self.model.get_image_features(**self.prepare_images(images))
        return output.pooler_output.mean(dim=1).float().cpu()

    @torch.inference_mode()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        return self.model.encode_image(**self.prepare_images(images)).cpu()


class LanguageModelPredictor(Blip2Predictor):
    """BLIP-2 of vlp after stage 2: a language model generates text from a prompt."""

    def caption(self, images: list[Image.Image], prompt: str = "", **options) -> list[str]:
        return self.generate(images, [prompt] * len(images), {"num_beams": 5, "max_new_tokens": 30} | options)

    def answer(self, images: list[Image.Image], questions: list[str], **options) -> list[str]:
        prompts = [QUESTION.format(question) for question in questions]
        return self.generate(images, prompts, {"num_beams": 5, "max_new_tokens": 10} | options)

    @torch.inference_mode()
    def generate(self, images: list[Image.Image], prompts: list[str], options: dict) -> list[str]:
        """Generate a text for each image.

        Args:
            images: B PIL images of any mode and size.
            prompts: B texts that the generated texts continue; "" for none.
            options: options of `generate`.

        Returns:
            B generated texts, without the prompts.
        """
        inputs, skip = {}, 0
        if any(prompts):
            cleaned = [self.processor.clean(prompt) for prompt in prompts]
            inputs = dict(self.processor.tokenizer(cleaned, padding=True, return_tensors="pt"))
            if not self.model.language_model.config.is_encoder_decoder:
                skip = inputs["input_ids"].shape[1]
        if self.model.reads_instructions:
            inputs |= self.processor.instructions(prompts)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        if "max_length" in options:
            options["max_new_tokens"] = options.pop("max_length")
        generated = self.model.generate(**self.prepare_images(images), **inputs, **({"do_sample": False} | options))
        return [text.strip() for text in self.processor.decode_texts(generated[:, skip:])]


class TransformersPredictor(Predictor):
    """A model of transformers that generates captions, or chooses answers from a fixed list."""

    @torch.inference_mode()
    def caption(self, images: list[Image.Image], prompt: str = "", **options) -> list[str]:
        """Generate a caption for each image, as `BlipPredictor.caption`."""
        text = {"text": [prompt] * len(images)} if prompt else {}
        inputs = self.processor(images=[to_rgb(image) for image in images], return_tensors="pt", **text)
        options = {"num_beams": 3, "do_sample": False, "max_length": 30} | options
        generated = self.model.generate(**inputs.to(self.model.device), **options)
        texts = self.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [text.removeprefix(prompt).strip() for text in texts]

    @torch.inference_mode()
    def answer(self, images: list[Image.Image], questions: list[str], **options) -> list[str]:
        """Choose the most probable of the model's answers to each question; `options` are ignored."""
        images = [to_rgb(image) for image in images]
        inputs = self.processor(images=images, text=questions, padding=True, truncation=True, return_tensors="pt")
        best = self.model(**inputs.to(self.model.device)).logits.argmax(dim=-1)
        return [self.model.config.id2label[number] for number in best.tolist()]


# --- loading ----------------------------------------------------------------------------------------------------------


def predictor_of(model: PreTrainedModel, processor, use: str) -> Predictor:
    """The predictor for a model of vlp in memory. The weights are shared, not copied.

    Args:
        model: any model of vlp, during or after training; it is put into evaluation mode.
        processor: its processor.
        use: one of `architectures.USES`.

    Raises:
        UnsupportedModelError: if the model does not support the use.
    """
    row = architecture_of(model)
    if use not in row.uses:
        raise unsupported(type(model).__name__, use)
    ModifiedResNet.use_channels_last(model)
    if use == "caption" and isinstance(model, VlpBlipForPreTraining):
        model = VlpBlipForConditionalGeneration.sharing(model)
    if isinstance(model, VlpClipModel):
        return VlpPredictor(model, processor)
    if isinstance(model, VlpBlip2ForConditionalGeneration):
        return LanguageModelPredictor(model, processor)
    return (Blip2Predictor if isinstance(model, VlpBlip2PreTrainedModel) else BlipPredictor)(model, processor)


def unsupported(what: str, use: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what} cannot {use}: {LACKS[use]}.")


def load(
    name: str | Path,
    use: str,
    device: str | torch.device = "cpu",
    dtype=torch.float32,
    embedding_size: int | None = None,
) -> Predictor:
    """Load a model with its processor for one use.

    Args:
        name: folder or hub name of a model of vlp, transformers or open_clip; the latter two are converted once.
        use: one of `architectures.USES`.
        device: where to put the model.
        dtype: the dtype of its weights.
        embedding_size: use only the first dimensions of an embedding, this many, of a model that was trained for that
            (Matryoshka embeddings: `--embedding_sizes` of training); None: all.

    Raises:
        UnsupportedModelError: if there is no such model, or it does not support the use or the embedding size.
        ArgumentError: if there is no such use.
    """
    if use not in USES:
        raise ArgumentError(f"use must be one of {', '.join(USES)}, got {printable(repr(use), 60)}.")
    name = own_copy(name)
    config = read_config(name)
    if config.model_type.startswith("vlp_"):
        predictor = load_vlp(name, config, use)
    else:
        predictor = load_transformers(name, config, use)
    if embedding_size is not None:
        shorten_embeddings(predictor, name, embedding_size)
    predictor.model.to(device, dtype)
    return predictor


def shorten_embeddings(predictor: Predictor, name: str | Path, size: int) -> None:
    """Use only the first `size` dimensions of embeddings. Raises UnsupportedModelError if it was not trained so."""
    config = predictor.model.config
    if not getattr(config, "embedding_sizes", None):
        raise UnsupportedModelError(
            f"{printable(name, 120)} was not trained for shorter embeddings, as with --embedding_sizes: omit "
            "--embedding_size."
        )
    if not 1 <= size <= config.projection_dim:
        raise UnsupportedModelError(
            f"--embedding_size must be from 1 to {config.projection_dim}, the size of the embeddings of "
            f"{printable(name, 120)}, got {size}."
        )
    predictor.embedding_size = size


def load_vlp(name: str | Path, config, use: str) -> Predictor:
    """Load a model of vlp as the class that the use needs.

    Args:
        name: folder or hub name of the model.
        config: its configuration.
        use: one of `architectures.USES`.

    Raises:
        UnsupportedModelError: if the model does not support the use, or has no processor.
    """
    kind = row_of(name, config).uses.get(use)
    if kind is None:
        raise unsupported(f"{printable(name, 120)}, a {config.architectures[0]},", use)
    return predictor_of(load_model(kind, name), load_processor(name), use)


def load_transformers(name: str | Path, config, use: str) -> Predictor:
    """Load any other model of transformers."""
    kinds = {"embed": AutoModel, "caption": AutoModelForImageTextToText, "answer": AutoModelForVisualQuestionAnswering}
    if use not in kinds:
        raise unsupported(f"{name}, a {config.model_type},", use)
    model, processor = load_model(kinds[use], name), load_processor(name)
    if use == "embed" and not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise unsupported(f"{name}, a {config.model_type},", use)
    return (Predictor if use == "embed" else TransformersPredictor)(model, processor)
