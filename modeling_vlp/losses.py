"""Contrastive losses: pure functions, tensors in, scalar out."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: B pairs, E embedding


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
