"""How good a BLIP-2 is: retrieval, re-ranked by matching, after stage 1; captions and answers after stage 2."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...modeling_vlp.blip2 import VlpBlip2ForPreTraining, best_query
from ...modeling_vlp.blip2_writer import VlpBlip2ForConditionalGeneration
from ...modeling_vlp.ranking import rank
from .base import batched
from .blip import BlipEvaluator

# Shapes: I images, T captions, Q queries, M tokens of an image, E embedding


class Blip2Evaluator(BlipEvaluator):
    """Retrieval by ITC and re-ranked by ITM, and ITM's accuracy on hard pairs. Args: as `BlipEvaluator`."""

    def see(self, model, processor) -> tuple[Tensor, Tensor | None]:
        """What the image tower gives for every image (I, M, D), and its queries' embeddings (I, Q, E); on the CPU."""
        states, images = [], []
        for chunk in batched(self.images(), self.batch_size):
            pixels = processor.image_processor(chunk, return_tensors="pt")["pixel_values"]
            states.append(model.see(pixels.to(model.device, model.dtype)))
            if self.task != "captioning":
                queries = model.get_image_features(vision_states=states[-1]).pooler_output
                images.append(F.normalize(queries.float(), dim=-1).cpu())
            states[-1] = states[-1].cpu()
        return torch.cat(states), torch.cat(images) if images else None

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        return torch.cat([best_query(chunk, texts) for chunk in images.split(self.batch_size)])

    def examples(self, model: VlpBlip2ForPreTraining, processor, count: int = 12, seed: int = 0) -> list[dict]:
        """Some images, drawn by `seed`, with their caption and the three that are found for them, re-ranked."""
        chosen, pictures = self.draw(count, seed)
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        ids = processor.read_texts(self.captions, self.max_length)["input_ids"].to(model.device)
        scores = rank(model, pixels, ids, self.top_k, self.rerank_posterior).image_to_text
        best = scores.topk(min(3, scores.shape[1]), dim=1).indices.tolist()
        return [
            {
                "image": picture.convert("RGB"),
                "label": self.captions[self.owner.index(i)],
                "predictions": [(self.captions[number], None) for number in numbers],
            }
            for i, picture, numbers in zip(chosen, pictures, best, strict=True)
        ]


class Blip2WriterEvaluator(Blip2Evaluator):
    """Captions that the language model writes.

    Args: as `BlipEvaluator`;
        example_prompts: prompts to which `examples` gives the answers.
    """

    def __init__(self, *args, example_prompts: list[str], **kwargs):
        super().__init__(*args, **kwargs)
        self.example_prompts = example_prompts

    def write(self, model: VlpBlip2ForConditionalGeneration, processor, states: Tensor) -> list[str]:
        """A caption for each image."""
        return self.answer(model, processor, states, self.prompt)

    def answer(self, model, processor, states: Tensor, prompt: str) -> list[str]:
        """What is written after a prompt about each image (I, M, D)."""
        ids = None
        if prompt:
            ids = processor.tokenizer([processor.clean(prompt)], return_tensors="pt")["input_ids"].to(model.device)
        written, skip = [], 0
        if ids is not None and not model.language_model.config.is_encoder_decoder:
            skip = ids.shape[1]
        for chunk in states.split(self.batch_size):
            prompts = None if ids is None else ids.expand(len(chunk), -1)
            tokens = model.generate(
                vision_states=chunk.to(model.device), input_ids=prompts, num_beams=self.num_beams,
                max_new_tokens=self.max_length, do_sample=False,
            )  # fmt: skip
            written += processor.write(tokens[:, skip:])
        return written

    def examples(self, model, processor, count: int = 12, seed: int = 0) -> list[dict]:
        """Some images, drawn by `seed`, with their caption and what is written after each of the prompts."""
        chosen, pictures = self.draw(count, seed)
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            states = model.see(pixels.to(model.device, model.dtype))
            answers = [self.answer(model, processor, states, prompt) for prompt in self.example_prompts]
        return [
            {
                "image": picture.convert("RGB"),
                "label": self.captions[self.owner.index(i)],
                "predictions": [(text, None) for text in texts],
            }
            for i, picture, texts in zip(chosen, pictures, zip(*answers, strict=True), strict=True)
        ]
