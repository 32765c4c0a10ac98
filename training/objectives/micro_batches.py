"""Large batches in little memory: compute the features of a few rows at a time, and recompute them for the gradient.

The loss is computed over the features of all rows, so the gradient is that of the whole batch, including the loss's own
parameters. This is GradCache (Gao et al., 2021, arXiv:2101.06983). Gradient accumulation over small batches is
different: it has fewer negatives, and open_clip's `--accum-freq K` multiplies the gradient of `logit_scale` by K.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .distributed import largest, processes

Features = Tensor | tuple[Tensor, ...]


def in_micro_batches(
    function: Callable[..., Features], size: int | None, *rows: Tensor, most: int | None = None
) -> Features:
    """Compute `function(*rows)` with the activations of at most `size` rows in memory.

    Random operations such as dropout are repeated identically in the recomputation. Batch norm uses the statistics of
    each part.

    Args:
        function: maps one tensor or several, with the same number of rows, to features, row by row, or several of
            them; or to a sum over the rows, of shape (1,): the result has one for each part.
        size: maximum number of rows per part; None: all rows at once.
        rows: its inputs.
        most: a number that the rows of no process exceed, the same in all processes; None: they ask each other.
    """
    if size is None:
        return function(*rows)
    # Every process needs the same number of parts: sharded parameters are gathered for each part.
    parts = math.ceil(len(rows[0]) / size)
    if processes() > 1:
        parts = math.ceil(most / size) if most is not None else largest(parts, rows[0].device)
    if parts == 1:
        return function(*rows)

    def compute(*part: Tensor) -> Features:
        if len(part[0]):
            return function(*part)
        found = function(*(each[:1] for each in rows))  # an empty part still runs one row
        return tuple(each[:0] for each in found) if isinstance(found, tuple) else found[:0]

    split = zip(*(each.tensor_split(parts) for each in rows), strict=True)
    found = [checkpoint(compute, *part, use_reentrant=False) for part in split]
    if isinstance(found[0], tuple):
        return tuple(torch.cat(each) for each in zip(*found, strict=True))
    return torch.cat(found)
