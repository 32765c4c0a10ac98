"""What an objective is to the training loop."""

from torch import nn


class Objective(nn.Module):
    """What the loop calls around the steps; by itself it does nothing."""

    def before_step(self, step: int, share_done: float = 1.0) -> None:
        """Called before the first backward pass of an optimiser step, `share_done` of the run (0 to 1) behind it."""

    def after_step(self) -> None:
        """Called after an optimiser step."""

    def facts(self) -> dict[str, float]:
        """What is worth logging beside the losses."""
        return {}
