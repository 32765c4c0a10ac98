"""A linear layer that reads its weights faster where a CPU has few rows to compute, as in each step of `generate`."""

import torch
from torch import Tensor, nn

FEW_ROWS = 16


class Linear(nn.Linear):
    """nn.Linear; for few rows in float32 on a CPU, without gradients, the product is oneDNN's, not MKL's.

    The values are the same but for rounding. Such a product takes as long as its weights take to be read, and MKL reads
    them more slowly (benchmarks/blip_generate.py).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E)"""
        if not reads_few_rows(x):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def reads_few_rows(x: Tensor) -> bool:
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
