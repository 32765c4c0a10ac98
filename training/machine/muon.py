"""Muon, an optimiser of matrices: the update of each is its momentum, made orthogonal.

Sources: Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon); the scale is that of Liu et al., 2025
(https://arxiv.org/abs/2502.16982, section 2.2), with which an update is as large as AdamW's on average. Learning rate
and weight decay therefore mean the same for both.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

MOMENTUM = 0.95
STEPS = 5  # of the Newton-Schulz iteration
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: singular values end between about 0.7 and 1.2
SCALE = 0.2  # the root mean square of AdamW's updates
MOMENTUM_BUFFER = "momentum_buffer"


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix (M, N) near 1, by the Newton-Schulz iteration."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.AdamW):
    """Muon for the groups of parameters with "muon": True, AdamW for all others.

    A convolution (O, I, H, W) counts as the matrix (O, I * H * W). Matrices that FSDP2 shards are gathered, so that
    each process computes the whole update.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Do one optimiser step; as in `torch.optim.Optimizer.step`, `closure` computes the loss again."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        parameters = [(each, group) for group in self.param_groups if group["muon"] for each in group["params"]]
        gradients = [parameter.grad for parameter, _ in parameters]
        for parameter, group in parameters:
            if parameter.grad is not None:
                self.update(parameter, group)
                parameter.grad = None  # for AdamW, which skips it
        super().step()
        for (parameter, _), gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def update(self, parameter: Tensor, group: dict) -> None:
        """Update a matrix."""
        state = self.state[parameter]
        if MOMENTUM_BUFFER not in state:
            state["step"] = torch.tensor(0.0)  # which AdamW's `load_state_dict` expects of every parameter
            state[MOMENTUM_BUFFER] = torch.zeros_like(parameter)
        momentum = state[MOMENTUM_BUFFER].lerp_(parameter.grad, 1 - MOMENTUM)
        direction = parameter.grad.lerp(momentum, MOMENTUM)  # Nesterov's
        whole = (direction.full_tensor() if isinstance(direction, DTensor) else direction).flatten(1)
        update = orthogonal(whole).view(parameter.shape)
        if isinstance(parameter, DTensor):
            update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * SCALE * max(whole.shape) ** 0.5)
