"""The interface between an objective and the training loop."""

from collections.abc import Sequence

from torch import nn


class Objective(nn.Module):
    """Base class of the objectives. The hooks that the training loop calls do nothing by default.

    Attributes:
        frozen: parts of the model that are frozen, such as locked towers (LiT, arXiv:2111.07991); they stay in
            evaluation mode, with their batch norm and dropout.
        even_batches: whether all processes have batches of the same size, as in training. If not, they exchange the
            sizes in every step, for which the host waits.
    """

    frozen: Sequence[nn.Module] = ()
    even_batches: bool = False

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def before_step(self, step: int, share_done: float = 1.0) -> None:
        """Called before the first backward pass of an optimiser step.

        Args:
            step: number of the optimiser step.
            share_done: share of the run that is done (0 to 1).
        """

    def after_step(self) -> None:
        """Called after an optimiser step."""

    def facts(self) -> dict[str, float]:
        """Values to log in addition to the losses."""
        return {}
