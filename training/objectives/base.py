"""The interface between an objective and the training loop."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .micro_batches import Features, in_micro_batches


class Objective(nn.Module):
    """Base class of the objectives. The hooks that the training loop calls do nothing by default.

    Attributes:
        frozen: parts of the model that are frozen, such as locked towers (LiT, arXiv:2111.07991); they stay in
            evaluation mode, with their batch norm and dropout.
        even_batches: whether all processes have batches of the same size, as in training. If not, they exchange the
            sizes in every step, for which the host waits.
        micro_batch_size: rows that are processed at a time, and recomputed in the backward pass (GradCache). None: all
            at once.
    """

    frozen: Sequence[nn.Module] = ()
    even_batches: bool = False
    micro_batch_size: int | None = None

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def in_parts(self, function: Callable[..., Features], *rows: Tensor, most: int) -> Features:
        """Compute `function(*rows)` in micro batches (see `in_micro_batches`).

        Args:
            function: maps rows to features.
            rows: its inputs.
            most: a number that the rows of no process exceed, if all have batches of the same size.
        """
        return in_micro_batches(function, self.micro_batch_size, *rows, most=most if self.even_batches else None)

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
