"""Ranking images and texts by BLIP or BLIP-2: by similarity, the best candidates of each query then by matching.

Source: salesforce/BLIP, train_retrieval.py, evaluation: a candidate's score is its cosine plus ITM's logit of "match".

The alternative is `posterior`. ITM learns to tell pairs from negatives that are drawn from ITC's softmax, so its odds
are what is true over what ITC holds to be true (noise-contrastive estimation; Deng et al., 2020, arXiv:2004.11714).
ITC's probability times those odds, as logarithms cosine / temperature + log-odds, is then the best to rank by.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .blip import VlpBlipMatcher
from .blip2 import VlpBlip2Matcher, best_query
from .med import Memory

NOT_MATCHED = -100.0  # added to the cosine: what is not among a query's candidates stands behind all that is

# Shapes: B images, T texts, Q queries, N targets, K candidates of a query


@dataclass
class Ranking:
    """Scores to rank by, the higher the better.

    Attributes:
        image_to_text: (B, T), to rank texts for each image. text_to_image: (T, B), to rank images for each text.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def rerank(
    similarity: Tensor, top_k: int, match: Callable[[Tensor, Tensor], Tensor], batch_size: int,
    temperature: float | None = None,
) -> Tensor:  # fmt: skip
    """Score each query's best candidates by how well they match; put all others behind them.

    Args:
        similarity: (Q, N) cosines.
        match: numbers of queries (q,) and of their candidates (q, K) -> ITM logits (q * K, 2).
        batch_size: pairs to match at a time.
        temperature: ITC's, for scores that are log posteriors but for a constant.

    Returns (Q, N) scores, of the candidates: cosine + logit of "match", or cosine / temperature + log-odds of "match"
    where the temperature is given; of the others: cosine - 100, over the temperature where it is given.
    """
    similarity = similarity.float().cpu()
    best = similarity.topk(min(top_k, similarity.shape[1]), dim=1).indices
    scores = (similarity + NOT_MATCHED) / (temperature or 1.0)
    rows = max(1, batch_size // best.shape[1])
    for queries in torch.arange(len(similarity)).split(rows):
        candidates = best[queries]
        no, yes = match(queries, candidates).float().cpu().view(*candidates.shape, 2).unbind(-1)
        cosine = similarity[queries[:, None], candidates]
        scores[queries[:, None], candidates] = cosine + yes if temperature is None else cosine / temperature + yes - no
    return scores


@torch.inference_mode()
def rank_by_matching(
    model: VlpBlipMatcher | VlpBlip2Matcher, memory_of: Callable[[Tensor], Memory], texts: Tensor, similarity: Tensor,
    top_k: int = 128,
    batch_size: int = 256, posterior: bool = False,
) -> Ranking:  # fmt: skip
    """Rank both ways.

    Args:
        memory_of: numbers of images -> what texts or queries read of them (`model.read`).
        texts: (T, N) token ids; similarity: (B, T) cosines of their embeddings.
        top_k: candidates of each query that are matched; batch_size: pairs to match at a time.
        posterior: rank by ITC's and ITM's product (see the module's docstring), not as the original does.
    """
    device = model.device
    temperature = model.temp.item() if posterior else None

    def match_texts(images: Tensor, candidates: Tensor) -> Tensor:
        return model.match(texts[candidates.flatten()].to(device), None, memory_of(images))

    def match_images(queries: Tensor, candidates: Tensor) -> Tensor:
        repeated = texts[queries].repeat_interleave(candidates.shape[1], dim=0)
        return model.match(repeated.to(device), None, memory_of(candidates.flatten()))

    return Ranking(
        image_to_text=rerank(similarity, top_k, match_texts, batch_size, temperature),
        text_to_image=rerank(similarity.T, top_k, match_images, batch_size, temperature),
    )


@torch.inference_mode()
def rank(
    model: VlpBlipMatcher | VlpBlip2Matcher,
    pixel_values: Tensor,
    input_ids: Tensor,
    top_k: int = 128,
    posterior: bool = False,
) -> Ranking:
    """Rank images (B, C, S, S) and texts (T, N), of any numbers, for each other; `top_k` of each are matched.

    Args:
        posterior: rank by ITC's and ITM's product (see the module's docstring), not as the original does.

    Example:
        >>> inputs = processor(images=images, text=texts, return_tensors="pt")
        >>> rank(model, inputs["pixel_values"], inputs["input_ids"]).text_to_image.argmax(dim=1)  # the best images
    """
    vision = model.get_image_features(pixel_values)
    image = F.normalize(vision.pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(input_ids, pooled_only=True).pooler_output, dim=-1)
    states = vision.last_hidden_state
    similarity = image @ text.T if image.ndim == 2 else best_query(image, text)

    def memory_of(numbers: Tensor) -> Memory:
        return model.read(states[numbers.to(states.device)])

    return rank_by_matching(model, memory_of, input_ids, similarity, top_k, posterior=posterior)
