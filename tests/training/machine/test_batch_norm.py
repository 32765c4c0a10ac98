"""Tests of joined batch norm that need no processes; tests/training/objectives/test_distributed.py has the others."""

import pytest
import torch
from conftest import tiny_model
from torch import nn
from vlp.training.machine.batch_norm import JointBatchNorm2d, join_batch_norm

from vlp.errors import ArgumentError


def test_all_batch_norms_are_joined_and_keep_their_weights():
    model = tiny_model("resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    join_batch_norm(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 5 and all(type(module) is JointBatchNorm2d for module in norms)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_without_batch_norm_or_with_another_class_are_refused():
    with pytest.raises(ArgumentError, match="no batch norm is trained"):
        join_batch_norm(tiny_model("vit"))
    with pytest.raises(ArgumentError, match="no batch norm is trained"):
        join_batch_norm(tiny_model("resnet").requires_grad_(False))
    with pytest.raises(ArgumentError, match="does not support the BatchNorm1d"):
        join_batch_norm(nn.Sequential(nn.BatchNorm1d(3)))
