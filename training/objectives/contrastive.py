"""The contrastive losses of the joined batch of all processes, tile by tile: no (B, B) matrix is ever held.

`modeling_vlp.losses` says what they are; here they are computed with memory that grows as B, not as B squared. Logits
are computed twice, once for their sums and once for the gradient, in tiles that stay in a CPU's cache.

One-sided across processes: each has its own images and everyone's captions, so that one modality alone travels. The sum
over the images of all, which each caption's softmax needs, is a sum over processes of numbers (B,); the gradient of the
captions goes back to those whose they are. (open_clip, loss.py, gathers both and computes each process' logits twice.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .distributed import JoinedBatch

# Shapes: b rows of this process, B rows of all, E embedding, R and C rows and columns of a tile

TILE, LARGE_TILE = 1024, 4096  # rows and columns of a tile, on a CPU and elsewhere


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, batch: JoinedBatch, ids: tuple[Tensor, ...] = ()
) -> Tensor:
    """`losses.clip_loss` of the joined batch, the same on every process.

    Its gradients are those of this process' features and of its part of the scale's, times the number of processes:
    the mean over processes, as DDP takes it, is the gradient of one process with the joined batch.

    Args:
        image, text: (b, E) in float32 (or 64), of unit length; row i of one belongs to row i of the other.
        scale: one number, the exponential of `logit_scale`.
        ids: (b,) integers each, such as a caption's and an image's: pairs that share one are not negatives.
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
    """`losses.siglip_loss` of the joined batch. Args: as `contrastive_loss`; bias: one number added to every logit."""
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
    """Rows, columns and logits (R, C) of each tile; minus infinity where a pair is left out.

    Args:
        scaled: (b, E) images times the scale; texts: (B, E); ids: (b,) each; all_ids: (B,) each.
        first: number of this process' first row in the joined batch.
        with_own: whether the pairs themselves, on the joined batch's diagonal, are in.
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
                for mine, everyones in zip(ids[1:], all_ids[1:], strict=True):
                    same |= mine[r, None] == everyones[c]
                if crosses:
                    same.diagonal(offset).fill_(False)
                logits.masked_fill_(same, -torch.inf)
            if crosses and not with_own:
                logits.diagonal(offset).fill_(-torch.inf)
            yield r, c, logits


def to_loss(
    to_image: Tensor, to_texts: Tensor, image: Tensor, scale: Tensor, batch: JoinedBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a mean over the joined batch from those of a sum, by logits over the scale, times the processes.

    The scale's follows from the images': both are sums over the same products.
    """
    factor = len(batch.counts) / batch.size
    to_scale = (to_image * image).sum().mul_(factor).reshape(scale.shape)
    to_text = batch.sum_to_owners(to_texts)
    return to_image.mul_(scale * factor), to_text.mul_(scale * factor), to_scale


class PrecomputedGradient(torch.autograd.Function):
    """A value whose gradients were computed with it."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None, *(gradient * known for known in ctx.saved_tensors)
