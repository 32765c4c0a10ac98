"""Tests that 1, 2 and 4 processes, with DDP and FSDP2, give the losses and gradients of one with the joined batch."""

import os

import pytest
import torch
import torch.distributed as dist
from conftest import (
    free_port,
    tiny_batch,
    tiny_blip,
    tiny_blip2,
    tiny_blip2_generation,
    tiny_blip_batch,
    tiny_model,
    tiny_processor,
)
from processes import Program
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from vlp.processing.naflex import padded_patches
from vlp.training.machine.batch_norm import join_batch_norm
from vlp.training.machine.sharding import let_layers_precompute, make_shardable, number, repeated_layers, whole_model
from vlp.training.objectives.base import Objective
from vlp.training.objectives.blip import BlipObjective
from vlp.training.objectives.blip2 import Blip2Objective, LanguageObjective
from vlp.training.objectives.clip import ClipObjective
from vlp.training.objectives.distillation import DistillationTeacher, DistilledClipObjective
from vlp.training.objectives.distributed import JoinedBatch
from vlp.training.objectives.momentum import Teacher

from vlp.inference import VlpPredictor

OBJECTIVES = [
    "softmax",
    "sigmoid",
    "micro batches",
    "patches",
    "distillation",
    "resnet",
    "batch norm",
    "blip",
    "blip2",
    "blip2 stage 2",
    "blip micro",
    "blip2 micro",
]
# Rows per process: evenly and unevenly divided batches.
SHARES = {1: [(8,)], 2: [(4, 4), (5, 3)], 4: [(3, 1, 2, 2)]}
WRAPPERS = ["ddp", "fsdp2"]
# Rows 0 and 7, and rows 1 and 3, have equal captions; some of them are in different processes.
CAPTION_IDS = torch.tensor([0, 1, 2, 1, 4, 5, 6, 0])


def make_objective(name: str) -> Objective:
    model = {
        "sigmoid": lambda: tiny_model(logit_bias_init_value=-10.0),
        "resnet": lambda: tiny_model("resnet"),
        "batch norm": lambda: tiny_model("resnet"),
        "blip": tiny_blip,
        "blip2": tiny_blip2,
        "blip2 stage 2": tiny_blip2_generation,
    }.get(name.removesuffix(" micro"), tiny_model)()
    few = 3 if name.endswith(" micro") else None
    model = model.double()  # float64, to compare gradients precisely
    if name == "blip2 stage 2":
        model.freeze()
    if name in ("blip", "blip micro"):
        return BlipObjective(model, Teacher(model, momentum=0.9, queue_size=10), global_negatives=True,
                             contrastive_share=0.5, itm_negatives=2, micro_batch_size=few).train()  # fmt: skip
    if name in ("blip2", "blip2 micro"):
        return Blip2Objective(model, contrastive_share=0.5, micro_batch_size=few).train()
    if name == "blip2 stage 2":
        return LanguageObjective(model, [], end_token_id=3).train()
    if name == "distillation":
        predictor = VlpPredictor(tiny_model("resnet").double(), tiny_processor())
        teacher = DistillationTeacher(predictor, [0.5] * 3, [0.25] * 3)
        return DistilledClipObjective(model, teacher, weight=0.5).train()
    objective = ClipObjective(model, micro_batch_size=2 if name in ("micro batches", "patches") else None)
    if name == "batch norm":
        join_batch_norm(objective)
    # In training mode, batch norm would use only the local rows, unless it is joined.
    return objective.eval() if name == "resnet" else objective.train()


def batch_of(name: str, objective: Objective, rows: slice) -> dict[str, torch.Tensor]:
    whole = tiny_blip_batch(size=8) if name.startswith("blip") else tiny_batch(objective.model, 8)
    ids = whole["input_ids"][rows]
    if name == "blip2 stage 2":
        ids = ids.clamp(max=98)  # the vocabulary of the language model
    if name.startswith("blip"):  # like a collator, crop to the longest of these rows
        ids = ids[:, : int((ids != 0).sum(dim=1).max())]
    taught = {"teacher_texts": ids} if name == "distillation" else {}
    images = {"pixel_values": whole["pixel_values"][rows].double()}
    if name == "patches":  # of different shapes, padded to the longest of these rows
        size = objective.model.config.vision_config.patch_size
        shapes = [(1 + row % 2, 2 - row % 3 % 2) for row in range(8)][rows]
        cut = [image[:, : size * h, : size * w] for image, (h, w) in zip(images["pixel_values"], shapes, strict=True)]
        images = dict(zip(("pixel_values", "spatial_shapes"), padded_patches(cut, size), strict=True))
    return taught | images | {
        "input_ids": ids, "text_index": torch.arange(len(ids)), "caption_ids": CAPTION_IDS[rows],
        "image_ids": torch.arange(8)[rows],
    }  # fmt: skip


def steps(name: str, wrapped, objective: Objective, rows: slice) -> dict:
    """Losses, gradients and teacher state of one step; for BLIP and BLIP-2, of one ITC-only step and two full steps."""
    result = {"losses": [], "gradients": []}
    for step, share in enumerate((0.2, 0.5, 0.8) if name.startswith("blip") and name != "blip2 stage 2" else (1.0,)):
        objective.zero_grad()
        objective.before_step(step, share)
        losses = wrapped(**batch_of(name, objective, rows))
        sum(losses.values()).backward()
        objective.after_step()
        result["losses"].append({key: loss.detach() for key, loss in losses.items()})
        gradients = {key: p.grad for key, p in objective.model.named_parameters() if p.grad is not None}
        result["gradients"].append({key: full_value(value).squeeze() for key, value in gradients.items()})
    state = {key: full_value(value) for key, value in objective.state_dict().items()
             if key.startswith("teacher.") or (name == "batch norm" and ".running_" in key)}  # fmt: skip
    return result | {"teacher": state}


def full_value(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard(objective: Objective) -> Objective:
    """Shard like Accelerate, wrapping the classes that `repeated_layers` returns."""
    make_shardable(objective)
    names = repeated_layers(objective)
    for module in reversed(list(objective.modules())[1:]):
        if type(module).__name__ in names:
            fully_shard(module)
    fully_shard(objective)
    let_layers_precompute(objective)
    return objective


def run_process(rank: int, processes: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    results = {}
    for wrapper in WRAPPERS:
        for name in OBJECTIVES:
            for shares in SHARES[processes]:
                objective = make_objective(name)
                rows = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
                if wrapper == "fsdp2":
                    wrapped = shard(objective)
                else:
                    wrapped = DistributedDataParallel(objective, broadcast_buffers=False, find_unused_parameters=True)
                result = steps(name, wrapped, objective, rows)
                if wrapper == "fsdp2":
                    result["published"] = whole_model(objective.model).state_dict()
                    scale = getattr(objective.model, "logit_scale", None)
                    result["scale"] = None if scale is None else number(scale)
                results[wrapper, name, shares] = result
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SHARES)
def parts(request, tmp_path_factory) -> list[dict]:
    """The results of each process in a group."""
    folder = tmp_path_factory.mktemp("processes")
    port = free_port()
    programs = [Program(folder / f"{rank}.txt", run_process, rank, request.param, port, str(folder))
                for rank in range(request.param)]  # fmt: skip
    results = [program.wait() for program in programs]
    assert not any(code for code, _ in results), results
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_processes_match_one_with_joined_batch(parts, name, wrapper):
    """Compare losses, gradients, teacher and queue; negatives are sampled from the joined batch."""
    whole = name.removesuffix(" micro")  # micro batches are compared with one process that has none
    objective = make_objective(whole)
    single = steps(whole, objective, objective, slice(0, 8))
    kinds = {"blip": ["itc", "itm", "lm"], "blip2": ["itc", "itm", "itg"]}.get(whole)
    assert kinds is None or [list(losses) for losses in single["losses"]] == [["itc"], kinds, kinds]
    results = {key[2]: [part[key] for part in parts] for key in parts[0] if key[:2] == (wrapper, name)}
    assert list(results) == SHARES[len(parts)]
    for shares, group in results.items():
        for step, losses in enumerate(single["losses"]):
            for key, value in losses.items():
                mean = sum(part["losses"][step][key] for part in group) / len(group)
                assert_close(mean, value, msg=f"{key} of step {step}, shares {shares}")
        for part in group:
            for theirs, gradients in zip(part["gradients"], single["gradients"], strict=True):
                used = {key for key, value in theirs.items() if value.any()}
                assert {key for key, value in gradients.items() if value.abs().max() > 1e-12} <= used <= set(gradients)
                for key in used:
                    # Losses are computed in float32, and the gradient of a key bias is zero up to rounding.
                    size = max(gradients[key].abs().max().item(), 1e-3)
                    assert_close(theirs[key], gradients[key], rtol=1e-5, atol=1e-6 * size, msg=f"{key}, {shares}")
            for key, value in single["teacher"].items():
                assert_close(part["teacher"][key], value, msg=key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sharded_model_is_published_unchanged(parts, name):
    wanted = make_objective(name).model
    for key, result in parts[-1].items():
        if key[:2] == ("fsdp2", name):
            state = result["published"]
            assert state.keys() == wanted.state_dict().keys()
            for tensor, value in wanted.state_dict().items():
                assert state[tensor].shape == value.shape
                if name == "batch norm" and ("running_" in tensor or "num_batches" in tensor):
                    continue  # these have changed in the step
                assert_close(state[tensor].to(value.dtype), value, rtol=1e-6, atol=1e-6, msg=tensor)
            if hasattr(wanted, "logit_scale"):
                assert result["scale"] == pytest.approx(wanted.logit_scale.item())


def test_joined_batch_selects_own_rows():
    batch = JoinedBatch((3, 1, 2), rank=2)
    assert (batch.size, batch.first) == (6, 4)
    assert batch.own(torch.arange(6)).tolist() == [4, 5]
    assert batch.weigh(torch.tensor(1.0)).item() == 1.0 and JoinedBatch((3, 1), 1).weigh(torch.ones(())).item() == 0.5
