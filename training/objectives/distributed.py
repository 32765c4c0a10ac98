"""What the processes of a run tell each other."""

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def main_process_first():
    """The main process does what is inside first, the others when it is done: they find what it left on the disk."""
    if processes() > 1 and dist.get_rank():
        dist.barrier()
    yield
    if processes() > 1 and not dist.get_rank():
        dist.barrier()


def weigh_by_count(mean: Tensor, count: Tensor) -> Tensor:
    """A mean over `count` items of this process, scaled so that its mean over processes is that over all items."""
    if processes() == 1:
        return mean
    total = count.clone()
    dist.all_reduce(total)
    return mean * (count * processes() / total)


def largest(number: int, device: torch.device) -> int:
    """The largest of what each process says."""
    if processes() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


@dataclass(frozen=True)
class JoinedBatch:
    """The batches of all processes, one after the other in the order of their ranks, and where one's own rows stand.

    The processes may have different numbers of rows, as in the last batch of a data set.

    Attributes:
        counts: rows of each process, one at least.
        rank: number of this process.
    """

    counts: tuple[int, ...]
    rank: int = 0

    @classmethod
    def of(cls, rows: Tensor) -> "JoinedBatch":
        """Learn how many rows the others have; called by every process with its own, of any kind."""
        if processes() == 1:
            return cls((len(rows),))
        counts = torch.zeros(processes(), dtype=torch.long, device=rows.device)
        counts[dist.get_rank()] = len(rows)
        dist.all_reduce(counts)
        return cls(tuple(counts.tolist()), dist.get_rank())

    @property
    def size(self) -> int:
        return sum(self.counts)

    @property
    def first(self) -> int:
        """Number of this process' first row."""
        return sum(self.counts[: self.rank])

    def own(self, joined: Tensor) -> Tensor:
        """This process' rows of a tensor that holds those of all."""
        return joined[self.first : self.first + self.counts[self.rank]]

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all processes: (own, ...) -> (size, ...), with the gradient of every process' use of one's rows.

        A loss over the joined batch, which each process computes, then has under DDP's mean the gradient of one process
        with the joined batch (open_clip issue 616; `accelerator.gather` carries no gradient).
        """
        if len(self.counts) == 1:
            return tensor
        return _Gather.apply(tensor, self) if tensor.requires_grad else self._collect(tensor)

    def gather_texts(self, tokens: Tensor, pad_token_id: int) -> Tensor:
        """Texts (own, N) of all processes, padded on the right to the longest: (size, longest N)."""
        if len(self.counts) == 1:
            return tokens
        missing = largest(tokens.shape[1], tokens.device) - tokens.shape[1]
        return self.gather(F.pad(tokens, (0, missing), value=pad_token_id))

    def sum_to_owners(self, joined: Tensor) -> Tensor:
        """Add up what all processes have for each row, and keep one's own rows: (size, ...) -> (own, ...)."""
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
        """The logarithm of the sum of exponentials over processes, without gradient; somewhere it is finite."""
        if len(self.counts) == 1:
            return value
        most = value.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most + self.sum((value - most).exp()).log()

    def weigh(self, mean: Tensor) -> Tensor:
        """A mean over this process' rows, scaled so that its mean over processes is the mean over all rows."""
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
