"""Batch norm over all processes: the statistics of the joined batch, as one process with that batch would have them.

PyTorch's SyncBatchNorm does the same, but only on GPUs.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import ArgumentError
from ...modeling_vlp.resnet import BatchNorm2d, is_recomputing

# Shapes: B images of this process, C channels, H x W cells


class JointBatchNorm2d(BatchNorm2d):
    """Batch norm whose statistics in training are those of the images of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, C, H, W)
        count = values.new_tensor([values.numel() / values.shape[1]])
        dist.all_reduce(count)
        mean = SumOfProcesses.apply(values.sum(dim=(0, 2, 3))) / count  # (C,)
        centred = values - mean[:, None, None]
        variance = SumOfProcesses.apply(centred.square().sum(dim=(0, 2, 3))) / count
        if not is_recomputing():
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance * count / (count - 1).clamp(min=1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
                self.num_batches_tracked.add_(1)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class SumOfProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def join_batch_norm(module: nn.Module) -> None:
    """Let the batch norms of a module use the statistics of all processes.

    Raises:
        ArgumentError: if there are none, or one that is trained is of another class.
    """
    norms = [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    trained = [each for each in norms if any(parameter.requires_grad for parameter in each.parameters())]
    if not trained:
        raise ArgumentError("--sync_batch_norm has no effect: no batch norm is trained.")
    for each in norms:
        if type(each) in (nn.BatchNorm2d, BatchNorm2d):
            each.__class__ = JointBatchNorm2d  # the weights and statistics stay where they are
        elif each in trained:
            raise ArgumentError(f"--sync_batch_norm does not support the {type(each).__name__} of this model.")
