"""Tests that processes agree on the time and on when to stop, without waiting for each other in every step."""

import pytest
from vlp.training.machine import clock as module
from vlp.training.machine.clock import MOST_STEPS, Clock


class Group:
    """Two processes whose steps take different times, and a count of how often they wait for each other."""

    def __init__(self, monkeypatch, steps: tuple[float, float]):
        self.steps, self.shared, self.waits = steps, None, 0
        self.clocks, self.seconds = [Clock(2), Clock(2)], [0.0, 0.0]
        monkeypatch.setattr(module, "broadcast_object_list", self.broadcast)

    def broadcast(self, values: list) -> list:
        if self.shared is None:  # the main process is asked first
            self.shared, self.waits = values, self.waits + 1
        return self.shared

    def step(self, stop: tuple[bool, bool] = (False, False)) -> list[bool]:
        self.shared, stopped = None, []
        for rank, clock in enumerate(self.clocks):
            self.seconds[rank], stops = clock.agree(self.seconds[rank], stop[rank])
            stopped.append(stops)
        assert self.seconds[0] == self.seconds[1] and stopped[0] == stopped[1]
        for rank, clock in enumerate(self.clocks):
            self.seconds[rank] += clock.count(self.steps[rank])
        return stopped


@pytest.mark.parametrize(("steps", "most"), [((0.1, 0.11), 15), ((3.0, 2.0), 200), ((0.001, 0.002), 5)])
def test_processes_have_the_same_time_and_seldom_wait(monkeypatch, steps, most):
    group = Group(monkeypatch, steps)
    for _ in range(200):
        group.step()
    assert group.seconds[0] == pytest.approx(200 * steps[0], rel=0.05)
    assert group.waits <= most


def test_all_processes_stop_when_the_main_process_was_asked_to(monkeypatch):
    group = Group(monkeypatch, (0.1, 0.1))
    assert not any(group.step()[0] for _ in range(50))
    assert not any(group.step((False, True))[0] for _ in range(50))
    stopped = [group.step((True, False))[0] for _ in range(MOST_STEPS)]
    assert any(stopped[:22])  # within two seconds


def test_one_process_counts_what_its_steps_take():
    clock = Clock(1)
    assert clock.count(0.7) == 0.7
    assert clock.agree(5.0, True) == (5.0, True)
