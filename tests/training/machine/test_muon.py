"""Muon: its update is that of torch's own, for the matrices of the layers alone, and training resumes exactly."""

import copy

import pytest
import torch
from conftest import tiny_batch, tiny_blip, tiny_model
from torch import nn
from torch.testing import assert_close
from vlp.training.machine.muon import MOMENTUM, Muon, orthogonal
from vlp.training.machine.optim import make_optimizer, parameter_groups
from vlp.training.objectives.clip import ClipObjective

import vlp


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_singular_values_are_brought_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonal(matrix)
    assert found.shape == matrix.shape and found.dtype == matrix.dtype
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = (left.T @ found @ right.T).diagonal()
    assert values.min() > 0.5 and values.max() < 1.3
    off = left.T @ found @ right.T - values.diag()
    assert off.abs().max() < 1e-4  # the singular vectors stay


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_steps_equal_those_of_torch(shape):
    """But for torch's Newton-Schulz iteration in bfloat16."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = Muon([{"params": [ours], "muon": True}], lr=1e-2, weight_decay=0.1)
    peer = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.1, momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(), peer.step()
        assert_close(ours.grad, gradient)  # the gradient is still there
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_convolution_counts_as_a_matrix():
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    whole, flat = nn.Parameter(start.clone().to(memory_format=torch.channels_last)), nn.Parameter(start.flatten(1))
    whole.grad, flat.grad = gradient.to(memory_format=torch.channels_last), gradient.flatten(1)
    for parameter in (whole, flat):
        Muon([{"params": [parameter], "muon": True}], lr=1e-2).step()
    assert_close(whole.flatten(1), flat)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_matrices_alone_are_marked(tower):
    model = tiny_model(tower)
    groups = parameter_groups(model, 1.0, 0.2, muon=True)
    marked = {id(each) for group in groups if group["muon"] for each in group["params"]}
    for name, parameter in model.named_parameters():
        kept = any(part in name for part in ("embedding", "visual_projection", "text_projection"))
        assert (id(parameter) in marked) is (parameter.ndim > 1 and not kept), name
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert not any("muon" in group for group in parameter_groups(model, 1.0, 0.2))


@pytest.mark.parametrize("kind", [vlp.VlpBlipForPreTraining, vlp.VlpBlipForQuestionAnswering])
def test_heads_of_blip_keep_adamw(kind):
    model = kind(tiny_blip().config)
    marked = {
        id(each) for group in parameter_groups(model, 1.0, 0.2, muon=True) if group["muon"] for each in group["params"]
    }
    names = {name for name, parameter in model.named_parameters() if id(parameter) in marked}
    assert any(name.endswith("layers.0.cross_attention.attention.q_proj.weight") for name in names)
    assert not any(part in name for name in names for part in ("lm_head", "itm_head", "embedding"))
    assert not {"vision_proj.weight", "text_proj.weight"} & names


def test_states_are_saved_and_loaded():
    torch.manual_seed(0)
    model, other = tiny_model(), tiny_model()
    objectives = [ClipObjective(each).train() for each in (model, other)]
    batch, ids = tiny_batch(model), torch.arange(4)
    optimizers = [
        make_optimizer(parameter_groups(each, 1e-3, 0.1, muon=True), 0.9, 0.98, 1e-6) for each in (model, other)
    ]

    def step(index: int) -> None:
        objectives[index](**batch, text_index=ids, caption_ids=ids, image_ids=ids)["contrastive"].backward()
        optimizers[index].step()
        optimizers[index].zero_grad()

    step(0)
    other.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))  # else both would share the tensors
    step(0), step(1)
    for (name, value), expected in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert_close(value, expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_objective_overfits_one_batch(tower):
    model = tiny_model(tower)
    objective, batch, ids = ClipObjective(model).train(), tiny_batch(model, size=16), torch.arange(16)
    optimizer = make_optimizer(parameter_groups(model, 3e-3, 0.0, muon=True), 0.9, 0.98, 1e-6)
    for _ in range(60):
        loss = objective(**batch, text_index=ids, caption_ids=ids, image_ids=ids)["contrastive"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
