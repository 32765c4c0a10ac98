"""A large batch on small memory: features of a few rows at a time, and their gradient later, by computing them again.

Between the two stands a loss over all rows, so that the gradient is that of the whole batch, the loss' own parameters
included: what GradCache (Gao et al., 2021, arXiv:2101.06983) does. Accumulated gradients of small batches are not that:
they have other negatives, and in open_clip's `--accum-freq K`, K times the gradient of `logit_scale`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .distributed import largest


def in_micro_batches(function: Callable[[Tensor], Tensor], size: int | None, rows: Tensor) -> Tensor:
    """`function(rows)`, with the activations of `size` rows in memory at most; all at once where it is None.

    What is drawn at random, such as dropout, is drawn again alike when a part is computed again. Batch norm takes the
    statistics of each part.
    """
    if size is None:
        return function(rows)
    # As many parts in every process, whatever their rows: where parameters are sharded, each part has them gathered.
    parts = largest(math.ceil(len(rows) / size), rows.device)
    if parts == 1:
        return function(rows)

    def compute(part: Tensor) -> Tensor:
        return function(part) if len(part) else function(rows[:1])[:0]  # fewer rows than parts: one, for nothing

    return torch.cat([checkpoint(compute, part, use_reentrant=False) for part in rows.tensor_split(parts)])
