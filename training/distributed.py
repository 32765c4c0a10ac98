"""What the processes of a run tell each other."""

import contextlib

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
    counts = gather_with_gradient(count[None])
    return mean * (count * processes() / counts.sum())


def own_rows(joined: Tensor) -> Tensor:
    """This process' rows of a tensor that holds those of all, of each the same number."""
    if processes() == 1:
        return joined
    return joined.chunk(processes())[dist.get_rank()]


def gather_padded(tokens: Tensor, pad_token_id: int) -> Tensor:
    """Texts (B, N) of all processes, padded on the right to the longest: (B * processes, longest N)."""
    if processes() == 1:
        return tokens
    longest = torch.tensor(tokens.shape[1], device=tokens.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return gather_with_gradient(F.pad(tokens, (0, int(longest) - tokens.shape[1]), value=pad_token_id))


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks: (B, ...) -> (B * processes, ...).

    Its backward pass adds up what every process says of one's rows, so that a loss over the joined batch, which each
    process computes, gives under DDP's mean the gradient of one process with the joined batch (open_clip issue 616;
    `accelerator.gather` carries no gradient).
    """
    if processes() == 1:
        return tensor
    if tensor.requires_grad:
        return torch.cat(torch.distributed.nn.functional.all_gather(tensor.contiguous()))
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
