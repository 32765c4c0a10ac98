"""Ranking images and texts by BLIP: by similarity, the best candidates of each query then by matching.

Source: salesforce/BLIP, train_retrieval.py, evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .blip import VlpBlipMatcher
from .med import Memory

NOT_MATCHED = -100.0  # what is not among a query's candidates stands behind all that is

# Shapes: B images, T texts, Q queries, N targets, K candidates of a query


@dataclass
class Ranking:
    """Scores to rank by, the higher the better.

    Attributes:
        image_to_text: (B, T), to rank texts for each image. text_to_image: (T, B), to rank images for each text.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def rerank(similarity: Tensor, top_k: int, match: Callable[[Tensor, Tensor], Tensor], batch_size: int) -> Tensor:
    """Add to the similarity of each query's best candidates how well they match; put all others behind them.

    Args:
        similarity: (Q, N) cosines.
        match: numbers of queries (q,) and of their candidates (q, K) -> ITM logits (q * K, 2).
        batch_size: pairs to match at a time.

    Returns (Q, N) scores: cosine and ITM's logit of "match" for the candidates, cosine - 100 for the others.
    """
    similarity = similarity.float().cpu()
    scores, best = similarity + NOT_MATCHED, similarity.topk(min(top_k, similarity.shape[1]), dim=1).indices
    rows = max(1, batch_size // best.shape[1])
    for queries in torch.arange(len(similarity)).split(rows):
        candidates = best[queries]
        logits = match(queries, candidates)[:, 1].float().cpu().view_as(candidates)
        scores[queries[:, None], candidates] = similarity[queries[:, None], candidates] + logits
    return scores


@torch.inference_mode()
def rank_by_matching(
    model: VlpBlipMatcher, memory_of: Callable[[Tensor], Memory], texts: Tensor, similarity: Tensor, top_k: int = 128,
    batch_size: int = 256,
) -> Ranking:  # fmt: skip
    """Rank both ways.

    Args:
        memory_of: numbers of images -> what texts read of them (`model.text_model.read`).
        texts: (T, N) token ids; similarity: (B, T) cosines of their embeddings.
        top_k: candidates of each query that are matched; batch_size: pairs to match at a time.
    """
    device = model.device

    def match_texts(images: Tensor, candidates: Tensor) -> Tensor:
        return model.match(texts[candidates.flatten()].to(device), None, memory_of(images))

    def match_images(queries: Tensor, candidates: Tensor) -> Tensor:
        repeated = texts[queries].repeat_interleave(candidates.shape[1], dim=0)
        return model.match(repeated.to(device), None, memory_of(candidates.flatten()))

    return Ranking(
        image_to_text=rerank(similarity, top_k, match_texts, batch_size),
        text_to_image=rerank(similarity.T, top_k, match_images, batch_size),
    )


@torch.inference_mode()
def rank(model: VlpBlipMatcher, pixel_values: Tensor, input_ids: Tensor, top_k: int = 128) -> Ranking:
    """Rank images (B, C, S, S) and texts (T, N), of any numbers, for each other; `top_k` of each are matched.

    Example:
        >>> inputs = processor(images=images, text=texts, return_tensors="pt")
        >>> rank(model, inputs["pixel_values"], inputs["input_ids"]).text_to_image.argmax(dim=1)  # the best images
    """
    vision = model.get_image_features(pixel_values)
    image = F.normalize(vision.pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(input_ids, pooled_only=True).pooler_output, dim=-1)
    states = vision.last_hidden_state

    def memory_of(numbers: Tensor) -> Memory:
        return model.text_model.read(states[numbers.to(states.device)])

    return rank_by_matching(model, memory_of, input_ids, image @ text.T, top_k)
