"""Losses: pure functions, tensors in, scalar out."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: B pairs, K keys, E embedding, V vocabulary


def unit_length(features: Tensor) -> Tensor:
    """Features (..., E) divided by their length, in float32 at least, in which losses are computed."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, not_negative: Tensor | None = None) -> Tensor:
    """Symmetric softmax loss of CLIP (paper, figure 3; open_clip, loss.py, ClipLoss).

    Args:
        image_embeds, text_embeds: (B, E) of unit length; row i of one belongs to row i of the other.
        scale: scalar, the exponential of `logit_scale`.
        not_negative: (B, B) bool, True where image i and caption j are not to be told apart (see `same_pairs`); the
            diagonal is not read.
    """
    logits = scale * image_embeds @ text_embeds.T  # (B, B), used along both sides
    if not_negative is not None:
        others = not_negative & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(others, float("-inf"))
    return ((logits.logsumexp(dim=1) + logits.logsumexp(dim=0)) / 2 - logits.diagonal()).mean()


def siglip_loss(
    image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, bias: Tensor, not_negative: Tensor | None = None
) -> Tensor:
    """Pairwise sigmoid loss of SigLIP (arXiv:2303.15343, algorithm 1), a sum over pairs divided by B.

    Args: as `clip_loss`; bias: scalar added to every logit.
    """
    logits = scale * image_embeds @ text_embeds.T + bias  # (B, B)
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    terms = F.logsigmoid(torch.where(own, logits, -logits))
    if not_negative is not None:
        terms = terms.masked_fill(not_negative & ~own, 0.0)
    return -terms.sum() / len(logits)


def same_pairs(*ids: Tensor) -> Tensor:
    """(B, B) bool, True where two rows share any of the given ids, each (B,) of integers (a caption's, an image's)."""
    same = ids[0][:, None] == ids[0]
    for column in ids[1:]:
        same = same | (column[:, None] == column)
    return same


def soft_targets(teacher_logits: Tensor, positives: Tensor, alpha: Tensor | float) -> Tensor:
    """What ITC learns towards: partly what is known to match, partly what the teacher finds similar.

    Source: ALBEF (arXiv:2107.07651), equation 6; salesforce/BLIP, models/blip_pretrain.py.

    Args:
        teacher_logits: (B, K) the teacher's similarities over the temperature; positives: (B, K) bool, one at least in
            each row, which share their part of the target evenly (models/blip_retrieval.py).
        alpha: the teacher's part, from 0 to 1.
    """
    return alpha * teacher_logits.softmax(dim=1) + (1 - alpha) * smooth_targets(positives)


def smooth_targets(positives: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Distributions over the keys: rows of (B, K) bool `positives` share evenly, but for what all keys share.

    With one positive in each row, cross entropy with label smoothing as PyTorch has it (LAVIS, blip2_qformer.py).
    """
    known = positives / positives.sum(dim=1, keepdim=True)
    return (1 - label_smoothing) * known + label_smoothing / positives.shape[1]


def soft_contrastive_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of (B, K) logits to targets that are distributions over the keys."""
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def draw_hard_negatives(logits: Tensor, excluded: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One hard negative for each row, drawn from the softmax of its similarities, all rows at once.

    Source: salesforce/BLIP, models/blip_pretrain.py, which draws row by row and adds 1e-4 to every probability.

    Args:
        logits: (B, K) similarities over the temperature; excluded: (B, K) bool, what is no negative.
        uniform: (B,) from 0 to below 1, which the draw is made by.

    Returns the number of the key drawn for each row, and whether there was one to draw (else the number is 0).
    """
    weights = (logits.double().softmax(dim=1) + 1e-4).masked_fill(excluded, 0.0)
    cumulated = weights.cumsum(dim=1)
    total = cumulated[:, -1:]
    drawn = (cumulated <= uniform.double()[:, None] * total).sum(dim=1)
    found = total[:, 0] > 0
    return torch.where(found, drawn, 0), found


def matching_loss(logits: Tensor, matches: Tensor, counted: Tensor | None = None) -> Tensor:
    """Binary cross entropy of ITM: (N, 2) logits, whose second is for "matches"; `counted` (N,) leaves rows out."""
    labels = matches.long()
    if counted is not None:
        labels = labels.masked_fill(~counted, -100)
    return F.cross_entropy(logits, labels)


def weighted_answer_loss(losses: Tensor, weights: Tensor, questions: int) -> Tensor:
    """VQA's loss: (A,) losses of answers, each by its weight, over the number of questions (blip_vqa.py)."""
    return (losses * weights).sum() / questions


def language_modelling_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of (N, V) logits to the token that comes next, the mean over the tokens."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
