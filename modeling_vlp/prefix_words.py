"""A prefix made of words, for the language model of BLIP-2's stage 2. The paper's prefix is projected queries."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

CANDIDATES = 32  # words that are considered at each place
PENALTY = 8.0  # in nats, for a pair of words that never follow each other

# Shapes: B images, Q queries, R repeats, D width of the language model, W words, K candidates


class PrefixWords(nn.Module):
    """Chooses words, whose embeddings a language model can read at once.

    The vectors of a linear projection would have to be very close to embeddings before the language model could repeat
    the words. Here, each vector only chooses among words, which the language model has always been able to read. All
    vectors choose at the same time, as in non-autoregressive translation; that neighbours fit together is left to a
    search (Viterbi) for the most probable sequence of words that may follow each other.

    Learned offsets, the same for all images, are added to the embeddings: they tell the language model what the words
    are for, as prompt tuning does (Lester et al., 2021, arXiv:2104.08691).

    Args:
        words: W, the number of words.
        pairs: the number of pairs of words that may follow each other; 0: all may.
        repeats: R, how often the prefix is repeated.
        places: Q, the length of the prefix before it is repeated.
        width: D.

    Attributes:
        ids: (W,), token ids of the words in the language model.
        pairs: (pairs,), each as (first word) * W + (second word), in ascending order.
        offsets: (R Q, D).
    """

    def __init__(self, words: int, pairs: int = 0, repeats: int = 1, places: int = 1, width: int = 1):
        super().__init__()
        self.repeats = repeats
        self.ids = nn.Buffer(torch.zeros(words, dtype=torch.long))
        self.pairs = nn.Buffer(torch.zeros(pairs, dtype=torch.long))
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.bias = nn.Parameter(torch.zeros(words))
        self.offsets = nn.Parameter(torch.zeros(repeats * places, width))

    def initialize(self) -> None:
        """Begin without offsets, also when a checkpoint that was saved before there were any is loaded."""
        init.zeros_(self.offsets)

    def fill(self, ids: list[int], pairs: list[tuple[int, int]]) -> None:
        """Set the words and the pairs that may follow each other, both as token ids."""
        place = {token: index for index, token in enumerate(ids)}
        self.ids.copy_(torch.tensor(ids))
        self.pairs.copy_(torch.tensor(sorted(place[one] * len(ids) + place[other] for one, other in pairs)))

    def logits(self, x: Tensor, embeddings: nn.Embedding) -> Tensor:
        """Compute the logits (B, Q, W) of the words for vectors (B, Q, D): scaled products with the unit embeddings."""
        words = F.normalize(embeddings.weight[self.ids].float(), dim=-1)
        return (x @ words.T.to(x.dtype)).float() * self.scale + self.bias

    def choose(self, logits: Tensor) -> Tensor:
        """Find the most probable sequence of words.

        Args:
            logits: (B, Q, W).

        Returns:
            (B, Q), indices of words.
        """
        values, words = logits.log_softmax(dim=-1).topk(min(CANDIDATES, logits.shape[-1]), dim=-1)  # (B, Q, K)
        if not len(self.pairs):
            return words[..., 0]
        score, before = values[:, 0], []
        for place in range(1, logits.shape[1]):
            pairs = words[:, place - 1, :, None] * len(self.ids) + words[:, place, None]  # (B, K, K)
            nearest = torch.searchsorted(self.pairs, pairs).clamp(max=len(self.pairs) - 1)
            score = score[:, :, None] - PENALTY * (self.pairs[nearest] != pairs)
            score, best = score.max(dim=1)
            score = score + values[:, place]
            before.append(best)
        path = [score.argmax(dim=-1, keepdim=True)]  # (B, 1) each
        for best in reversed(before):
            path.append(best.gather(1, path[-1]))
        return words.gather(2, torch.stack(path[::-1], dim=1)).squeeze(2)

    def embed(self, x: Tensor, embeddings: nn.Embedding) -> Tensor:
        """Replace vectors (B, Q, D) by the embeddings of the words that they choose, repeated, with the offsets.

        The gradient is that of the mixture of all words' embeddings by their probabilities.

        Returns:
            (B, R Q, D).
        """
        logits, table = self.logits(x, embeddings), embeddings.weight[self.ids].to(x.dtype)
        chosen = table[self.choose(logits.detach())]
        if torch.is_grad_enabled():
            mixture = logits.softmax(dim=-1).to(x.dtype) @ table
            chosen = chosen + mixture - mixture.detach()
        return chosen.repeat(1, self.repeats, 1) + self.offsets
