"""The losses match their definitions."""

import torch
from torch.nn import functional as F
from torch.testing import assert_close
from vlp.modeling_vlp.losses import clip_loss, same_pairs, siglip_loss


def embeddings(size=6, width=8):
    generator = torch.Generator().manual_seed(0)
    pair = [F.normalize(torch.randn(size, width, generator=generator, dtype=torch.double), dim=-1) for _ in range(2)]
    return [x.requires_grad_() for x in pair] + [torch.tensor(14.0, dtype=torch.double, requires_grad=True)]


def test_clip_loss_is_the_mean_of_two_cross_entropies():
    image, text, scale = embeddings()
    logits, target = scale * image @ text.T, torch.arange(6)
    assert_close(
        clip_loss(image, text, scale), (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    )


def test_duplicates_are_excluded_from_the_denominator():
    image, text, scale = embeddings()
    not_negative = same_pairs(torch.tensor([7, 8, 7, 9, 10, 11]))
    logits = scale * image @ text.T
    without = logits.detach().clone()
    without[0, 2] = without[2, 0] = float("-inf")
    target = torch.arange(6)
    expected = (F.cross_entropy(without, target) + F.cross_entropy(without.T, target)) / 2
    loss = clip_loss(image, text, scale, not_negative)
    assert_close(loss, expected)
    loss.backward()
    assert torch.isfinite(image.grad).all() and torch.isfinite(scale.grad)


def test_siglip_loss_is_the_sum_of_sigmoids_over_the_batch():
    image, text, scale = embeddings()
    bias = torch.tensor(-10.0, dtype=torch.double)
    logits = scale * image @ text.T + bias
    sign = 2 * torch.eye(6, dtype=torch.double) - 1
    assert_close(siglip_loss(image, text, scale, bias), -F.logsigmoid(sign * logits).sum() / 6)
    skipped = siglip_loss(image, text, scale, bias, same_pairs(torch.tensor([0, 0, 2, 3, 4, 5])))
    mask = torch.ones(6, 6, dtype=torch.double)
    mask[0, 1] = mask[1, 0] = 0
    assert_close(skipped, -(F.logsigmoid(sign * logits) * mask).sum() / 6)


def test_same_pairs_combines_all_columns():
    same = same_pairs(torch.tensor([1, 2, 3]), torch.tensor([5, 6, 5]))
    assert same.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
