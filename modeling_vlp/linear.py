"""A linear layer that is faster on a CPU if it has few rows to compute, as in each step of `generate`."""

import torch
from torch import Tensor, nn

FEW_ROWS = 16


class Linear(nn.Linear):
    """nn.Linear that uses oneDNN instead of MKL for few float32 rows on a CPU, without gradients.

    The results are the same up to rounding. Such a product is limited by the time to load the weights from memory,
    which MKL does more slowly (benchmarks/blip_generate.py).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E)"""
        if not use_onednn(x) or type(self.weight) is not nn.Parameter:  # a quantised weight has its own class
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def use_onednn(x: Tensor) -> bool:
    """Return whether oneDNN is faster than MKL for an input, and can be used."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() <= FEW_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch.backends.mkldnn.is_available()
    )
