"""Communication between the processes of a run."""

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def processes() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def main_process_first():
    """Run the body in the main process first, then in the others, which can then use the files that it wrote."""
    if processes() > 1 and dist.get_rank():
        dist.barrier()
    yield
    if processes() > 1 and not dist.get_rank():
        dist.barrier()


def weigh_by_count(mean: Tensor, count: Tensor) -> Tensor:
    """Scale a mean so that the average over processes is the mean over the items of all processes.

    Args:
        mean: the mean over the items of this process.
        count: the number of these items.
    """
    if processes() == 1:
        return mean
    total = count.clone()
    dist.all_reduce(total)
    return mean * (count * processes() / total)


def largest(number: int, device: torch.device) -> int:
    """The maximum of a number over all processes."""
    if processes() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


@dataclass(frozen=True)
class JoinedBatch:
    """The batches of all processes, concatenated in the order of their ranks.

    The processes may have different numbers of rows, as in the last batch of a data set.

    Attributes:
        counts: number of rows of each process, at least one.
        rank: number of this process.
    """

    counts: tuple[int, ...]
    rank: int = 0

    @classmethod
    def of(cls, rows: Tensor, even: bool = False) -> "JoinedBatch":
        """Exchange the numbers of rows. Called by every process.

        Args:
            rows: any tensor with the rows of this process, (own, ...).
            even: every process has the same number, so that nothing is exchanged, for which the host would wait.
        """
        if processes() == 1:
            return cls((len(rows),))
        if even:
            return cls((len(rows),) * processes(), dist.get_rank())
        counts = torch.zeros(processes(), dtype=torch.long, device=rows.device)
        counts[dist.get_rank()] = len(rows)
        dist.all_reduce(counts)
        return cls(tuple(counts.tolist()), dist.get_rank())

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def first(self) -> int:
        """Index of this process's first row in the joined batch."""
        return sum(self.counts[: self.rank])

    def own(self, joined: Tensor) -> Tensor:
        """The rows of this process in a tensor with the rows of all processes."""
        return joined[self.first : self.first + self.counts[self.rank]]

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather the rows of all processes with gradient.

        A row's gradient is the sum over all processes that use the row. If each process computes a loss over the joined
        batch, DDP's average is then the gradient of one process with the joined batch (open_clip issue 616;
        `accelerator.gather` has no gradient).

        Args:
            tensor: (own, ...), the rows of this process.

        Returns:
            (size, ...), the rows of all processes.
        """
        if len(self.counts) == 1:
            return tensor
        return _Gather.apply(tensor, self) if tensor.requires_grad else self._collect(tensor)

    def gather_texts(self, tokens: Tensor, pad_token_id: int) -> Tensor:
        """Gather texts (own, N) as (size, longest N), padded on the right to the longest of all processes."""
        if len(self.counts) == 1:
            return tokens
        missing = largest(tokens.shape[1], tokens.device) - tokens.shape[1]
        return self.gather(F.pad(tokens, (0, missing), value=pad_token_id))

    def sum_to_owners(self, joined: Tensor) -> Tensor:
        """Sum (size, ...) over the processes and return the rows of this process, (own, ...)."""
        if len(self.counts) == 1:
            return joined
        if len(set(self.counts)) == 1:
            own = torch.empty_like(self.own(joined), memory_format=torch.contiguous_format)
            dist.reduce_scatter_tensor(own, joined.contiguous())
            return own
        joined = joined.clone()
        dist.all_reduce(joined)
        return self.own(joined)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, without gradient."""
        if len(self.counts) > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def logsumexp(self, value: Tensor) -> Tensor:
        """The log-sum-exp over processes, without gradient; each entry must be finite in at least one process."""
        if len(self.counts) == 1:
            return value
        most = value.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most + self.sum((value - most).exp()).log()

    def weigh(self, mean: Tensor) -> Tensor:
        """Scale a mean over this process's rows so that the average over processes is the mean over all rows."""
        return mean * (self.counts[self.rank] * len(self.counts) / self.size)

    def _collect(self, tensor: Tensor) -> Tensor:
        most = max(self.counts)
        padded = tensor.contiguous()
        if len(padded) < most:
            padded = torch.cat([padded, padded.new_zeros(most - len(padded), *padded.shape[1:])])
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, batch: JoinedBatch) -> Tensor:
        ctx.batch = batch
        return batch._collect(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.batch.sum_to_owners(gradient), None
