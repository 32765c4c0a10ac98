"""Ranking by similarity and matching scores."""

import pytest
import torch
from torch.testing import assert_close
from vlp.modeling_vlp.ranking import candidates_of, combine, rerank


@pytest.mark.parametrize("temperature", [None, 0.05])
def test_matched_candidates_rank_above_the_rest(temperature):
    similarity = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    similarity[range(5), range(5)] = 0.9 * similarity.max()  # correct pairs are near the top, but not first
    candidates = candidates_of(similarity, 3)
    assert candidates.sum(dim=1).tolist() == [3] * 5
    assert all(similarity[row][candidates[row]].min() >= similarity[row][~candidates[row]].max() for row in range(5))
    right = torch.eye(5)
    scores = rerank(similarity, candidates, torch.stack([-right, 5 * right], dim=-1), temperature)
    for row in range(5):
        if candidates[row, row]:
            assert scores[row].argmax() == row
        assert scores[row][candidates[row]].min() > scores[row][~candidates[row]].max()


def test_captions_of_low_probability_rank_above_what_is_no_candidate():
    similarity = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    candidates = candidates_of(similarity, 3)
    scores = -1000 * torch.rand(5, 5, generator=torch.Generator().manual_seed(1))
    combined = combine(similarity, candidates, scores, 0.5)
    for row in range(5):
        assert combined[row][candidates[row]].min() > combined[row][~candidates[row]].max()
    assert_close(combined[candidates], (similarity / 0.5 + scores)[candidates])


def test_scores_are_the_originals_or_log_posteriors():
    """If ITM's odds are the true distribution over ITC's, scores are true log-probabilities plus a constant."""
    generator = torch.Generator().manual_seed(0)
    similarity, truth = torch.rand(4, 6, generator=generator), torch.rand(4, 6, generator=generator).softmax(1)
    odds = (truth / (similarity / 0.1).softmax(1)).log()
    logits, everything = torch.stack([1.0 - odds / 3, 1.0 + 2 * odds / 3], dim=-1), torch.ones(4, 6, dtype=torch.bool)
    assert_close(rerank(similarity, everything, logits), similarity + logits[..., 1])
    assert_close(rerank(similarity, everything, logits, temperature=0.1).softmax(dim=1), truth)
