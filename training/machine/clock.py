"""The time of a run, which all processes agree on without waiting for each other in every step."""

from accelerate.utils import broadcast_object_list

AGREE_SECONDS = 2.0  # after which the processes agree again on the time, and on whether to stop
MOST_STEPS = 100  # after which they do so at the latest


class Clock:
    """Counts the time that a run trains for.

    The main process shares its time, and whether it was asked to stop, but only every AGREE_SECONDS. Until then, each
    step counts as the main process's average time per step so far, in all processes, so that they do the same at the
    same step.

    Args:
        processes: number of processes.
    """

    def __init__(self, processes: int):
        self.processes = processes
        self.pace = 0.0  # seconds that each step counts
        self.left = 0  # steps until the processes agree again
        self.restart()

    def restart(self) -> None:
        self.steps = 0  # steps since the processes agreed
        self.taken = 0.0  # seconds that these have taken in this process
        self.drift = 0.0  # how many seconds more than they counted

    def agree(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """Agree on the time and on whether to stop; called by every process before each step.

        Args:
            seconds: the time counted so far.
            stop: whether this process was asked to stop; that of the main process counts.

        Returns:
            The time, and whether to stop before this step; the same in all processes.
        """
        if self.processes == 1:
            return seconds, stop
        if self.left:
            self.left -= 1
            return seconds, False
        pace = self.taken / self.steps if self.steps else 0.0
        left = min(MOST_STEPS, int(AGREE_SECONDS / pace)) if pace else 0
        seconds, stop, self.pace, self.left = broadcast_object_list([seconds + self.drift, stop, pace, left])
        self.restart()
        return seconds, stop

    def count(self, taken: float) -> float:
        """The seconds that a step counts which has taken so many seconds in this process."""
        counted = taken if self.processes == 1 else self.pace
        self.steps, self.taken, self.drift = self.steps + 1, self.taken + taken, self.drift + taken - counted
        return counted
