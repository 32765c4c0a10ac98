"""Tests that no step waits for the device: the host never reads a value that the device computes.

On a CPU nothing waits, so each operation is checked for whether its result, or its shape, depends on values.
"""

import contextlib
import traceback

import pytest
import torch
from test_distributed import batch_of, make_objective
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from vlp.modeling_vlp.attention import set_packing

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
OBJECTIVES = [
    "softmax", "sigmoid", "micro batches", "patches", "distillation", "resnet", "blip", "blip2", "blip2 stage 2",
    "blip micro", "blip2 micro",
]  # fmt: skip
SHARES = (0.2, 0.8)  # BLIP's first step is ITC only


class Waits(TorchDispatchMode):
    """Collects where an operation reads values: `.item()`, `nonzero`, an index by a mask and the like."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if function in READING or by_mask:
            stack = traceback.extract_stack()[:-1]
            if not any("/torch/optim/" in frame.filename for frame in stack):  # its counters of steps stay on the CPU
                frame = next(frame for frame in reversed(stack) if "/torch/" not in frame.filename)
                self.places.append(f"{function} in {frame.filename}, line {frame.lineno}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def default_packing():
    yield
    set_packing(None)


def step_of(name: str, mode=None) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The losses of two steps, which run in a mode, and the gradients of the last, with a fixed seed."""
    objective, losses = make_objective(name), []
    objective.even_batches = True
    batch = batch_of(name, objective, slice(0, 8))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    gradients = {}
    with mode or contextlib.nullcontext():
        for number, share in enumerate(SHARES):
            optimizer.zero_grad()
            objective.before_step(number, share)
            losses.append(objective(**batch))
            sum(losses[-1].values()).backward()
            torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            gradients = {key: p.grad.clone() for key, p in objective.named_parameters() if p.grad is not None}
            optimizer.step()
            objective.after_step()
    return losses, gradients


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_step_reads_a_value(name):
    set_packing(False)
    waits = Waits()
    step_of(name, waits)
    own = [place for place in waits.places if "site-packages/transformers" not in place]
    assert not own
    # The language model of transformers looks for packed sequences in the positions, once per step.
    assert len(waits.places) <= (len(SHARES) if name == "blip2 stage 2" else 0), waits.places


def test_reading_is_noticed():
    with Waits() as waits:
        x = torch.arange(3.0)
        x[x > 1]
        x.sum().item()
        x[torch.tensor([0])]
    assert len(waits.places) == 2 and "index" in waits.places[0] and "_local_scalar_dense" in waits.places[1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packing_does_not_change_losses_and_gradients(name):
    found = []
    for packing in (True, False):
        set_packing(packing)
        found.append(step_of(name))
    (losses, gradients), (wanted, theirs) = found
    for step, loss in zip(wanted, losses, strict=True):
        assert_close(loss, step, rtol=1e-5, atol=1e-6)
    for key, gradient in theirs.items():
        assert_close(gradients[key], gradient, rtol=1e-5, atol=1e-6 * max(gradient.abs().max().item(), 1e-3), msg=key)
