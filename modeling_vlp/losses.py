"""Losses as pure functions of tensors."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: B pairs, K keys, E embedding, V vocabulary


def unit_length(features: Tensor) -> Tensor:
    """Normalise features (..., E) to unit length, in at least float32, the precision of the losses."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, not_negative: Tensor | None = None) -> Tensor:
    """Compute the symmetric softmax loss of CLIP (paper, figure 3; open_clip, loss.py, ClipLoss).

    This is the definition, which `VlpClipModel` uses for a batch in one process. Training computes the same loss over
    the batches of all processes, in tiles, without the (B, B) logits:
    `training.objectives.contrastive.contrastive_loss`.

    Args:
        image_embeds: (B, E), of unit length.
        text_embeds: (B, E), of unit length; row i belongs to row i of `image_embeds`.
        scale: scalar, the exponential of `logit_scale`.
        not_negative: (B, B) bool, True if image i and caption j are not a negative pair (see `same_pairs`); the
            diagonal is ignored. If None, all pairs off the diagonal are negative.

    Returns:
        Scalar, the mean over the batch.
    """
    logits = scale * image_embeds @ text_embeds.T  # (B, B), used along both sides
    if not_negative is not None:
        others = not_negative & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(others, float("-inf"))
    return ((logits.logsumexp(dim=1) + logits.logsumexp(dim=0)) / 2 - logits.diagonal()).mean()


def siglip_loss(
    image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, bias: Tensor, not_negative: Tensor | None = None
) -> Tensor:
    """Compute the pairwise sigmoid loss of SigLIP (arXiv:2303.15343, algorithm 1).

    This is the definition. Training computes it by `training.objectives.contrastive.sigmoid_loss`.

    Args:
        image_embeds, text_embeds, scale, not_negative: as for `clip_loss`.
        bias: scalar, added to every logit.

    Returns:
        Scalar, the sum over pairs divided by B.
    """
    logits = scale * image_embeds @ text_embeds.T + bias  # (B, B)
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    terms = F.logsigmoid(torch.where(own, logits, -logits))
    if not_negative is not None:
        terms = terms.masked_fill(not_negative & ~own, 0.0)
    return -terms.sum() / len(logits)


def distillation_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the cross entropy between a teacher's similarities and a student's (open_clip, loss.py, DistillClipLoss).

    Args:
        student: the scaled similarities of images to texts and of texts to images, (B, K) each.
        teacher: those of the teacher, of the same shapes.

    Returns:
        Scalar, the mean over the batch and both directions.
    """
    terms = [soft_contrastive_loss(own, target.softmax(dim=1)) for own, target in zip(student, teacher, strict=True)]
    return (terms[0] + terms[1]) / 2


def same_pairs(*ids: Tensor) -> Tensor:
    """Compare rows by their ids, such as those of captions and images, each (B,) of integers.

    Returns:
        (B, B) bool, True if two rows share any of the ids.
    """
    same = ids[0][:, None] == ids[0]
    for column in ids[1:]:
        same = same | (column[:, None] == column)
    return same


def soft_targets(teacher_logits: Tensor, positives: Tensor, alpha: Tensor | float) -> Tensor:
    """Compute the ITC targets: a mixture of the known matches and the teacher's similarities.

    Source: ALBEF (arXiv:2107.07651), equation 6; salesforce/BLIP, models/blip_pretrain.py.

    Args:
        teacher_logits: (B, K) the teacher's similarities, divided by the temperature.
        positives: (B, K) bool, at least one per row; positives of a row have equal targets (models/blip_retrieval.py).
        alpha: weight of the teacher, from 0 to 1.

    Returns:
        (B, K), rows sum to 1.
    """
    return alpha * teacher_logits.softmax(dim=1) + (1 - alpha) * smooth_targets(positives)


def smooth_targets(positives: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Distribute the targets evenly over the positives of each row, with label smoothing.

    With one positive per row, cross entropy with these targets equals PyTorch's with label smoothing (LAVIS,
    blip2_qformer.py).

    Args:
        positives: (B, K) bool, at least one per row.
        label_smoothing: share that is distributed evenly over all K keys.

    Returns:
        (B, K), rows sum to 1.
    """
    known = positives / positives.sum(dim=1, keepdim=True)
    return (1 - label_smoothing) * known + label_smoothing / positives.shape[1]


def soft_contrastive_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross entropy of (B, K) logits with targets (B, K) that are distributions over the keys."""
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def draw_hard_negatives(logits: Tensor, excluded: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw hard negatives for each row, from the softmax of its similarities, for all rows at once.

    Source: salesforce/BLIP, models/blip_pretrain.py, which draws row by row and adds 1e-4 to every probability.

    Args:
        logits: (B, N) similarities, divided by the temperature.
        excluded: (B, N) bool, True for keys that are not negatives.
        uniform: (B,) or (K, B) random numbers in [0, 1), which determine the draws. The K draws of a row differ.

    Returns:
        The indices (B,) or (K, B) of the drawn keys, 0 where there is none; and a mask of the same shape, True if there
        is one.
    """
    weights, draws = (logits.double().softmax(dim=1) + 1e-4).masked_fill(excluded, 0.0), []
    for each in uniform.double().view(-1, len(logits)):  # (B,)
        cumulative = weights.cumsum(dim=1)
        total = cumulative[:, -1:]
        found = total[:, 0] > 0
        drawn = torch.where(found, (cumulative <= each[:, None] * total).sum(dim=1), 0)
        weights = weights.scatter(1, drawn[:, None], 0.0)
        draws.append((drawn, found))
    drawn, found = (torch.stack(parts).view(uniform.shape) for parts in zip(*draws, strict=True))
    return drawn, found


def matching_loss(logits: Tensor, matches: Tensor, counted: Tensor | None = None) -> Tensor:
    """Compute the ITM loss, binary cross entropy.

    Args:
        logits: (N, 2) of "no match" and "match".
        matches: (N,) bool.
        counted: (N,) bool, False for rows to ignore; None to count all.
    """
    labels = matches.long()
    if counted is not None:
        labels = labels.masked_fill(~counted, -100)
    return F.cross_entropy(logits, labels)


def weighted_answer_loss(losses: Tensor, weights: Tensor, questions: int) -> Tensor:
    """Compute the VQA loss (blip_vqa.py).

    Args:
        losses: (A,) losses of the answers.
        weights: (A,) weights of the answers.
        questions: number of questions.

    Returns:
        Scalar, the weighted sum divided by the number of questions.
    """
    return (losses * weights).sum() / questions


def spelling_loss(logits: Tensor, words: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute how well each vector of a prefix chooses its word: the cross entropy with the word.

    Args:
        logits: (B, Q, W), of the words to choose from.
        words: (B, Q) token ids; those that are not in `ids` have no loss.
        ids: (W,) token ids of the words to choose from, all different.

    Returns:
        Scalar, the mean over the vectors with a loss; and their number.
    """
    order = ids.argsort()
    place = torch.searchsorted(ids[order], words).clamp(max=len(ids) - 1)
    targets = torch.where(ids[order][place] == words, order[place], -100)
    count = (targets != -100).sum()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss / count.clamp(min=1), count


def language_modelling_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross entropy of (N, V) logits with the next tokens (N,), averaged over those that are not -100."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
