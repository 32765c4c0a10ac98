"""Ranking images and texts with BLIP or BLIP-2: by similarity, then by matching the best candidates of each query.

Source: salesforce/BLIP, train_retrieval.py, evaluation: the score of a candidate is its cosine plus ITM's "yes" logit.

With a temperature, scores are log posteriors. ITM learns to distinguish pairs from negatives drawn from ITC's softmax,
so its odds are the ratio of the true distribution to ITC's (noise-contrastive estimation; Deng et al., 2020,
arXiv:2004.11714). The best score to rank by is then ITC's probability times those odds; its logarithm is cosine /
temperature + log-odds.

The decoder can re-rank, too: the probability that it gives to a caption of an image tells how well they fit (Lin et
al., 2024, arXiv:2306.01879). Its logarithm is added to that of ITC's probability.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .blip import VlpBlipMatcher
from .blip2 import VlpBlip2Matcher, best_query

NOT_MATCHED = -100.0  # added to the cosines of other targets, so that they rank below all candidates

# Shapes: B images, T texts, Q queries, N targets, P pairs


@dataclass
class Ranking:
    """Scores to rank by; higher is better.

    Attributes:
        image_to_text: (B, T), to rank texts for each image.
        text_to_image: (T, B), to rank images for each text.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def candidates_of(similarity: Tensor, top_k: int) -> Tensor:
    """Select the `top_k` most similar targets of each query.

    Args:
        similarity: (Q, N).
        top_k: number of candidates per query.

    Returns:
        (Q, N) bool, True for candidates.
    """
    best = similarity.topk(min(top_k, similarity.shape[1]), dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, best, True)


def rerank(similarity: Tensor, candidates: Tensor, logits: Tensor, temperature: float | None = None) -> Tensor:
    """Compute scores from similarities and ITM logits; targets that are not candidates rank below all candidates.

    Args:
        similarity: (Q, N) cosines.
        candidates: (Q, N) bool, True for the targets that were matched.
        logits: (Q, N, 2), ITM's "no" and "yes"; ignored where `candidates` is False.
        temperature: ITC's temperature, for log posteriors; if None, the original's scores.

    Returns:
        (Q, N): for candidates, cosine + "yes", or cosine / temperature + "yes" - "no" with a temperature.
    """
    return combine(similarity, candidates, matching_scores(logits, temperature is not None), temperature)


def matching_scores(logits: Tensor, posterior: bool) -> Tensor:
    """The scores of ITM's logits (..., 2) for `combine`: log-odds for log posteriors, the "yes" logit otherwise."""
    no, yes = logits.unbind(dim=-1)
    return yes - no if posterior else yes


def combine(similarity: Tensor, candidates: Tensor, scores: Tensor, temperature: float | None = None) -> Tensor:
    """Add scores to the similarities of candidates; other targets rank below all candidates.

    Args:
        similarity, candidates, temperature: as for `rerank`.
        scores: (Q, N), such as log-odds of ITM or log-probabilities of captions; ignored where `candidates` is False.

    Returns:
        (Q, N): for candidates, cosine / temperature + score; for others, (cosine - 100) / temperature, or less if the
        scores require it.
    """
    scale = temperature or 1.0
    lowest = scores.masked_fill(~candidates, 0.0).min().item() if scores.numel() else 0.0
    below = min(NOT_MATCHED / scale, lowest - 2 / scale)  # cosines differ by at most 2
    return torch.where(candidates, similarity / scale + scores, similarity / scale + below)


@torch.inference_mode()
def rank(
    model: VlpBlipMatcher | VlpBlip2Matcher,
    pixel_values: Tensor,
    input_ids: Tensor,
    top_k: int = 128,
    posterior: bool = False,
    batch_size: int = 256,
) -> Ranking:
    """Rank images and texts for each other; the `top_k` candidates of each query are scored by matching.

    Args:
        model: a matcher of BLIP or BLIP-2.
        pixel_values: (B, C, S, S).
        input_ids: (T, N) texts that begin with [CLS].
        top_k: number of candidates per query.
        posterior: rank by log posteriors (see the module's docstring) instead of the original's scores.
        batch_size: number of pairs to match at a time.

    Returns:
        Scores in both directions, on the CPU.

    Example:
        >>> inputs = processor(images=images, text=texts, return_tensors="pt")
        >>> rank(model, inputs["pixel_values"], inputs["input_ids"]).text_to_image.argmax(dim=1)  # the best images
    """
    vision = model.get_image_features(pixel_values)
    image = F.normalize(vision.pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(input_ids, pooled_only=True).pooler_output, dim=-1)
    similarity = (image @ text.T if image.ndim == 2 else best_query(image, text)).float().cpu()  # (B, T)
    texts, images = candidates_of(similarity, top_k), candidates_of(similarity.T, top_k)
    logits = torch.zeros(*similarity.shape, 2)
    for pairs in (texts | images.T).nonzero().split(batch_size):  # (P, 2)
        image_index, text_index = pairs.to(input_ids.device).unbind(dim=1)
        unique_images, inverse = image_index.unique(return_inverse=True)
        memory = model.memory_of(vision.last_hidden_state[unique_images]).select(inverse)
        logits[tuple(pairs.T)] = model.match(input_ids[text_index], None, memory).float().cpu()
    temperature = model.temp.item() if posterior else None
    return Ranking(
        image_to_text=rerank(similarity, texts, logits, temperature),
        text_to_image=rerank(similarity.T, images, logits.transpose(0, 1), temperature),
    )
