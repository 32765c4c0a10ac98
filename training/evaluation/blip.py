"""How good a BLIP is: retrieval, re-ranked by matching, matching of hard pairs, and captions."""

import torch
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from torch import Tensor
from torch.nn import functional as F

from ...modeling_vlp.blip import VlpBlipForPreTraining
from ...modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from ...modeling_vlp.med import Memory
from ...modeling_vlp.ranking import rank_by_matching
from .base import Evaluator, batched, embed_texts, rank_of_best, recall, recalls

# Shapes: I images, T captions, E embedding


def caption_metrics(written: list[str], references: list[list[str]]) -> dict[str, float]:
    """CIDEr, from 0 to 10, and BLEU-4 and the share of captions that equal a reference, from 0 to 1.

    The scorers are pycocoevalcap's; texts are taken as they are, parted at spaces, without its Java tokenizer.
    """
    bleu, cider = BleuScorer(n=4), CiderScorer(n=4)
    for text, wanted in zip(written, references, strict=True):
        bleu += (text, wanted)
        cider += (text, wanted)
    exact = sum(text in wanted for text, wanted in zip(written, references, strict=True)) / len(written)
    return {
        "caption_exact": exact,
        "bleu_4": float(bleu.compute_score(option="closest", verbose=0)[0][3]),
        "cider": float(cider.compute_score()[0]),
    }


class BlipEvaluator(Evaluator):
    """Retrieval by ITC and re-ranked by ITM, ITM's accuracy on hard pairs, and captions, on one data set.

    Args: as `Evaluator`;
        top_k: candidates that are matched for each query. rerank_posterior: see `modeling_vlp.ranking`.
        num_beams, max_length: of the captions written, start and end included.
        task: "captioning" or "retrieval", all that is then measured; "pretrain" for both.
        prompt: what captions are begun with; it is taken off again.
    """

    def __init__(
        self, *args, top_k: int = 128, num_beams: int = 3, max_length: int = 30, task: str = "pretrain",
        prompt: str = "", rerank_posterior: bool = False, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.rerank_posterior = rerank_posterior
        self.top_k, self.num_beams, self.max_length = top_k, num_beams, max_length
        self.task, self.prompt = task, prompt

    @torch.inference_mode()
    def __call__(self, model: VlpBlipForPreTraining, processor) -> dict[str, float]:
        """All metrics of a model, in evaluation mode; its mode is put back."""
        training = model.training
        model.eval()
        states, images = self.see(model, processor)
        result = {}
        if self.task != "captioning":
            similarity = self.similarity(images, embed_texts(model, processor, self.captions, self.batch_size))
            owner = torch.tensor(self.owner)
            result = recall(similarity, owner)
            result |= self.matching(model, processor, similarity, states, owner)
        if self.task != "retrieval":
            result |= self.captioning(model, processor, states)
        model.train(training)
        return result

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """(I, T) cosines of embeddings of unit length."""
        return images @ texts.T

    def see(self, model, processor) -> tuple[Tensor, Tensor | None]:
        """What texts read of every image (I, M, D), and its embedding (I, E) where there is one; both on the CPU."""
        states, images = [], []
        for chunk in batched(self.images(), self.batch_size):
            pixels = processor.image_processor(chunk, return_tensors="pt")["pixel_values"]
            output = model.encode_image(pixels.to(model.device, model.dtype))
            states.append(output.last_hidden_state.cpu())
            if self.task != "captioning":
                images.append(F.normalize(model.vision_proj(output.pooler_output).float(), dim=-1).cpu())
        return torch.cat(states), torch.cat(images) if images else None

    def matching(self, model, processor, similarity: Tensor, states: Tensor, owner: Tensor) -> dict[str, float]:
        """Recall re-ranked, and the share of pairs and of their hardest wrong captions that ITM tells rightly."""
        ids = processor.read_texts(self.captions, self.max_length)["input_ids"]

        def memory_of(numbers: Tensor) -> Memory:
            return model.read(states[numbers].to(model.device))

        ranking = rank_by_matching(
            model, memory_of, ids, similarity, self.top_k, self.batch_size, self.rerank_posterior
        )
        right = owner == torch.arange(len(states))[:, None]  # (I, T)
        result = {}
        for name, scores, correct in (
            ("text_to_image", ranking.text_to_image, right.T),
            ("image_to_text", ranking.image_to_text, right),
        ):
            result |= recalls(f"reranked_{name}", rank_of_best(scores, correct))
        # Each caption with its image, and each image with the wrong caption that ITC finds nearest.
        hardest = similarity.masked_fill(right, -2.0).argmax(dim=1)
        told = []
        for start in range(0, len(ids), self.batch_size):
            rows = slice(start, start + self.batch_size)
            told.append(model.match(ids[rows].to(model.device), None, memory_of(owner[rows])).argmax(dim=1) == 1)
        for start in range(0, len(states), self.batch_size):
            rows = torch.arange(start, min(start + self.batch_size, len(states)))
            told.append(model.match(ids[hardest[rows]].to(model.device), None, memory_of(rows)).argmax(dim=1) == 0)
        result["itm_accuracy"] = torch.cat(told).float().mean().item()
        return result

    def captioning(self, model, processor, states: Tensor) -> dict[str, float]:
        written = self.write(model, processor, states)
        wanted: list[list[str]] = [[] for _ in states]
        # References are read and written as captions are, so that spaces and punctuation are the same.
        for number, text in zip(self.owner, processor.write(processor.read_texts(self.captions, 512)["input_ids"]),
                                strict=True):  # fmt: skip
            wanted[number].append(text)
        return caption_metrics(written, wanted)

    def write(self, model, processor, states: Tensor) -> list[str]:
        """A caption for each image."""
        writer, written = captioner(model), []
        prompt = processor.read_texts([self.prompt], self.max_length)["input_ids"].to(model.device)
        for start in range(0, len(states), self.batch_size):
            memory = writer.text_model.read(states[start : start + self.batch_size].to(model.device))
            ids = writer.generate(memory=memory, input_ids=prompt.expand(len(memory), -1), num_beams=self.num_beams,
                                  max_length=self.max_length, do_sample=False)  # fmt: skip
            written += processor.write(ids[:, prompt.shape[1] - 1 :])  # without [DEC] and the prompt
        return written

    def examples(self, model: VlpBlipForPreTraining, processor, count: int = 12, seed: int = 0) -> list[dict]:
        """Some images, drawn by `seed`, with their caption and the one that the model writes; none if it does not."""
        if self.task == "retrieval":
            return []
        chosen, pictures = self.draw(count, seed)
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            states = model.encode_image(pixels.to(model.device, model.dtype)).last_hidden_state
            captions = self.write(model, processor, states)
        references = processor.write(
            processor.read_texts([self.captions[self.owner.index(i)] for i in chosen], 512)["input_ids"]
        )
        return [
            {"image": picture.convert("RGB"), "label": label, "predictions": [(caption, None)]}
            for picture, label, caption in zip(pictures, references, captions, strict=True)
        ]


def captioner(model: VlpBlipForPreTraining) -> VlpBlipForConditionalGeneration:
    """The decoder of a pre-trained model with its very weights, not a copy of them."""
    if isinstance(model, VlpBlipForConditionalGeneration):
        return model
    with torch.device("meta"):
        writer = VlpBlipForConditionalGeneration(model.config)
    writer.vision_model, writer.lm_head = model.vision_model, model.lm_head
    writer.text_model.embeddings = model.text_model.embeddings
    for own, theirs in zip(writer.text_model.layers, model.text_model.layers, strict=True):
        for name in ("decoder_attention", "cross_attention", "mlp", "layer_norm"):
            setattr(own, name, getattr(theirs, name))
    return writer.eval()
