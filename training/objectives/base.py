"""The interface between an objective and the training loop."""

from torch import nn


class Objective(nn.Module):
    """Base class of the objectives. The hooks that the training loop calls do nothing by default."""

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
