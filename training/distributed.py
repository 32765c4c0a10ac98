"""What the processes of a run tell each other."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks: (B, ...) -> (B * processes, ...).

    Its backward pass adds up what every process says of one's rows, so that a loss over the joined batch, which each
    process computes, gives under DDP's mean the gradient of one process with the joined batch (open_clip issue 616;
    `accelerator.gather` carries no gradient).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    if tensor.requires_grad:
        return torch.cat(torch.distributed.nn.functional.all_gather(tensor.contiguous()))
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
