"""Two processes give the loss and gradients of one with the joined batch. Run: pytest tests/test_distributed.py"""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_batch, tiny_model
from torch.nn.parallel import DistributedDataParallel
from vlp.training.objectives import ClipObjective


def batch_of(model, rows: slice) -> dict[str, torch.Tensor]:
    whole = tiny_batch(model, 8)
    ids = torch.tensor([0, 1, 2, 1, 4, 5, 6, 0])  # duplicates that stand in different processes
    part = {name: tensor[rows] for name, tensor in whole.items()}
    part["pixel_values"] = part["pixel_values"].double()
    count = len(part["input_ids"])
    return part | {"text_index": torch.arange(count), "caption_ids": ids[rows], "image_ids": torch.arange(8)[rows]}


def work(rank: int, processes: int, port: int, loss: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    bias = {"logit_bias_init_value": -10.0} if loss == "sigmoid" else {}
    objective = DistributedDataParallel(ClipObjective(tiny_model(**bias).double()))
    size = 8 // processes
    value = objective(**batch_of(objective.module.model, slice(rank * size, (rank + 1) * size)))[loss]
    value.backward()
    gradients = {name: p.grad for name, p in objective.module.model.named_parameters()}
    torch.save({"loss": value.detach(), "gradients": gradients}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_two_processes_equal_one_with_the_joined_batch(loss, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, args=(2, port, loss, str(tmp_path)), nprocs=2, start_method="spawn")
    bias = {"logit_bias_init_value": -10.0} if loss == "sigmoid" else {}
    objective = ClipObjective(tiny_model(**bias).double())
    value = objective(**batch_of(objective.model, slice(0, 8)))[loss]
    value.backward()
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(part["loss"], value.detach())
        for name, parameter in objective.model.named_parameters():
            torch.testing.assert_close(part["gradients"][name], parameter.grad, msg=name)
