"""Contrastive losses over the joined batch of all processes, computed in tiles without a (B, B) matrix.

The losses are defined in `modeling_vlp.losses`; here their memory grows linearly with B, not quadratically. The logits
are computed twice, once for the sums and once for the gradient, in tiles that fit into a CPU's cache.

Only captions are communicated: each process compares its own images with the captions of all processes. The softmax
over images, which each caption needs, takes a reduction of (B,) numbers over the processes. The gradients of the
captions are summed and returned to their own process. (open_clip, loss.py, gathers both modalities and computes each
process's logits twice.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .distributed import JoinedBatch

# Shapes: b rows of this process, B rows of all processes, E embedding, R and C rows and columns of a tile

TILE, LARGE_TILE = 1024, 4096  # rows and columns of a tile, on a CPU and elsewhere


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, batch: JoinedBatch, ids: tuple[Tensor, ...] = ()
) -> Tensor:
    """Compute `losses.clip_loss` of the joined batch.

    The gradients are those of this process's features, and its share of the scale's gradient, times the number of
    processes. DDP averages over the processes, so the result is the gradient of one process with the joined batch.

    Args:
        image: (b, E) in float32 or float64, of unit length.
        text: (b, E) likewise; row i belongs to row i of `image`.
        scale: one number, the exponential of `logit_scale`.
        batch: the joined batch.
        ids: (b,) integers each, such as caption ids and image ids; pairs with an equal id are not negatives.

    Returns:
        The loss, the same on every process.
    """
    with torch.no_grad():
        texts, all_ids, scaled = batch.gather(text), [batch.gather(column) for column in ids], image * scale
        own = (scaled * text).sum(dim=1)  # (b,), logits of the pairs
        rows, columns = own.new_full((len(image),), -torch.inf), own.new_full((batch.size,), -torch.inf)
        for r, c, logits in tiles(scaled, texts, ids, all_ids, batch.first):
            rows[r] = torch.logaddexp(rows[r], logits.logsumexp(dim=1))
            columns[c] = torch.logaddexp(columns[c], logits.logsumexp(dim=0))
        columns = batch.logsumexp(columns)
        loss = batch.sum(((rows + batch.own(columns)) / 2 - own).sum()) / batch.size
        if not (image.requires_grad or text.requires_grad or scale.requires_grad):
            return loss
        to_image, to_texts = torch.zeros_like(image), torch.zeros_like(texts)
        for r, c, logits in tiles(scaled, texts, ids, all_ids, batch.first):
            weights = (logits - rows[r, None]).exp_()
            weights += logits.sub_(columns[c]).exp_()
            to_image[r].addmm_(weights, texts[c], alpha=0.5)
            to_texts[c].addmm_(weights.T, image[r], alpha=0.5)
        to_image -= text
        batch.own(to_texts).sub_(image)
        gradients = to_loss(to_image, to_texts, image, scale, batch)
    return PrecomputedGradient.apply(loss, gradients, image, text, scale)


def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, batch: JoinedBatch, ids: tuple[Tensor, ...] = ()
) -> Tensor:
    """Compute `losses.siglip_loss` of the joined batch.

    Args:
        image, text, scale, batch, ids: as in `contrastive_loss`.
        bias: one number, added to every logit.

    Returns:
        The loss, the same on every process.
    """
    with torch.no_grad():
        texts, all_ids, scaled = batch.gather(text), [batch.gather(column) for column in ids], image * scale
        own = (scaled * text).sum(dim=1) + bias  # (b,), logits of the pairs
        total, to_bias = torch.nn.functional.softplus(-own).sum(), -(-own).sigmoid().sum()
        to_image, to_texts = torch.zeros_like(image), torch.zeros_like(texts)
        for r, c, logits in tiles(scaled, texts, ids, all_ids, batch.first, with_own=False):
            logits += bias
            total += torch.nn.functional.softplus(logits).sum()
            weights = logits.sigmoid_()
            to_bias += weights.sum()
            to_image[r].addmm_(weights, texts[c])
            to_texts[c].addmm_(weights.T, image[r])
        wrong = (-own).sigmoid()[:, None]
        to_image -= wrong * text
        batch.own(to_texts).sub_(wrong * image)
        gradients = to_loss(to_image, to_texts, image, scale, batch)
        gradients += ((to_bias * len(batch.counts) / batch.size).reshape(bias.shape),)
        loss = batch.sum(total) / batch.size
    return PrecomputedGradient.apply(loss, gradients, image, text, scale, bias)


def tiles(
    scaled: Tensor, texts: Tensor, ids: tuple[Tensor, ...], all_ids: list[Tensor], first: int, with_own: bool = True
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Compute the logits tile by tile. The logits of excluded pairs are minus infinity.

    Args:
        scaled: (b, E) images times the scale.
        texts: (B, E).
        ids: (b,) each.
        all_ids: (B,) each.
        first: index of this process's first row in the joined batch.
        with_own: whether to include the positive pairs, on the diagonal of the joined batch.

    Returns:
        An iterator over (row slice, column slice, logits (R, C)).
    """
    side = TILE if scaled.device.type == "cpu" else LARGE_TILE
    for top in range(0, len(scaled), side):
        for left in range(0, len(texts), side):
            r, c = slice(top, top + side), slice(left, left + side)
            logits = scaled[r] @ texts[c].T
            offset = first + top - left  # of the diagonal
            crosses = -logits.shape[0] < offset < logits.shape[1]
            if ids:
                same = ids[0][r, None] == all_ids[0][c]
                for own, joined in zip(ids[1:], all_ids[1:], strict=True):
                    same |= own[r, None] == joined[c]
                if crosses:
                    same.diagonal(offset).fill_(False)
                logits.masked_fill_(same, -torch.inf)
            if crosses and not with_own:
                logits.diagonal(offset).fill_(-torch.inf)
            yield r, c, logits


def to_loss(
    to_image: Tensor, to_texts: Tensor, image: Tensor, scale: Tensor, batch: JoinedBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert gradients of the sum into gradients of the mean over the joined batch, times the number of processes.

    The gradient of the scale follows from that of the images, because both are sums over the same products.

    Args:
        to_image: (b, E) gradient of the summed loss with respect to the images, divided by the scale.
        to_texts: (B, E) likewise with respect to the texts; this process's contribution.
        image: (b, E).
        scale: one number.
        batch: the joined batch.

    Returns:
        The gradients of image (b, E), text (b, E) and scale.
    """
    factor = len(batch.counts) / batch.size
    to_scale = (to_image * image).sum().mul_(factor).reshape(scale.shape)
    to_text = batch.sum_to_owners(to_texts)
    return to_image.mul_(scale * factor), to_text.mul_(scale * factor), to_scale


class PrecomputedGradient(torch.autograd.Function):
    """Attach precomputed gradients to a value."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None, *(gradient * known for known in ctx.saved_tensors)
