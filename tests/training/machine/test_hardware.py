"""The number of threads follows the option, or else the cores."""

import pytest
import torch
from vlp.training.data.survey import CheckArguments
from vlp.training.evaluation.arguments import EvaluationArguments
from vlp.training.machine import hardware

from vlp.errors import ArgumentError


@pytest.mark.parametrize(("threads", "processes", "expected"), [(3, 1, 3), (3, 4, 3), (None, 2, 4), (None, 99, 1)])
def test_threads(monkeypatch, threads, processes, expected):
    before = torch.get_num_threads()
    monkeypatch.setattr(hardware, "cpu_cores", lambda: 8)
    try:
        hardware.use_cpu_well(threads, processes)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [EvaluationArguments, CheckArguments])
def test_no_threads_are_refused(options):
    with pytest.raises(ArgumentError, match="--num_threads must be at least 1, got 0"):
        options(num_threads=0)
