"""Attention by matrix products equals PyTorch's kernel."""

import pytest
import torch
from torch.testing import assert_close
from vlp.modeling_vlp import attention as room


def tensors(dtype, queries: int = 7, keys: int = 9):
    torch.manual_seed(0)
    return [torch.randn(3, 2, n, 8, dtype=dtype, requires_grad=True) for n in (queries, keys, keys)]


def run(query, key, value, **options):
    """The output and the three gradients."""
    output = room.attention(query, key, value, **options)
    return output, *torch.autograd.grad(output.float().square().sum(), (query, key, value))


@pytest.mark.parametrize("case", ["plain", "padding", "causal", "one query"])
def test_matrix_products_equal_the_kernel(monkeypatch, case):
    options, queries = {}, 1 if case == "one query" else 7
    if case == "padding":
        options["mask"] = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None])[:, None, None]
    if case == "causal":
        options["is_causal"] = True
    keys = 7 if case == "causal" else 9
    monkeypatch.setattr(room, "plain_is_faster", lambda *given: False)
    expected = run(*tensors(torch.float64, queries, keys), **options)
    monkeypatch.setattr(room, "plain_is_faster", lambda *given: True)
    # The softmax is in float32, whatever the inputs are.
    assert_close(run(*tensors(torch.float64, queries, keys), **options), expected, rtol=1e-5, atol=1e-6)


def test_matrix_products_are_used_in_training_in_bfloat16_only(monkeypatch):
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *given: calls.append(1) or kernel(*given)
    )
    room.attention(*tensors(torch.bfloat16))
    assert not calls
    room.attention(*tensors(torch.float32))
    with torch.no_grad():
        room.attention(*[each.detach() for each in tensors(torch.bfloat16)])
    assert len(calls) == 2


def test_dropout_drops_weights():
    query, key, value = tensors(torch.bfloat16)
    torch.manual_seed(1)
    dropped = room.attention(query, key, torch.ones_like(value), dropout=0.5)
    assert dropped.std() > 0.1 and abs(dropped.float().mean() - 1) < 0.2
