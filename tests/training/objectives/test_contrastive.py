"""Tests that tiled contrastive losses and micro batches match the direct definitions."""

import contextlib
import types
from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_model
from torch.nn import functional as F
from torch.testing import assert_close
from vlp.modeling_vlp.losses import clip_loss, same_pairs, siglip_loss
from vlp.training.objectives import contrastive
from vlp.training.objectives.clip import ClipObjective
from vlp.training.objectives.contrastive import contrastive_loss, sigmoid_loss
from vlp.training.objectives.distributed import JoinedBatch

IDS = (torch.tensor([0, 1, 2, 1, 4, 5, 6, 0, 8, 9]), torch.tensor([0, 1, 2, 3, 3, 5, 6, 7, 8, 9]))


def pairs(size: int = 10, width: int = 8, scale: float = 14.0, dtype=torch.double) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(size, width, generator=generator, dtype=dtype) for _ in range(2))
    numbers = torch.tensor(scale, dtype=dtype), torch.tensor(-3.0, dtype=dtype)
    return [x.requires_grad_() for x in (F.normalize(image, dim=-1), F.normalize(text, dim=-1), *numbers)]


@pytest.mark.parametrize("tile", [1, 3, 4, 64])
@pytest.mark.parametrize("ids", [(), IDS[:1], IDS], ids=["all negatives", "captions", "captions and images"])
def test_tiled_losses_and_gradients_match_definition(ids, tile, monkeypatch):
    monkeypatch.setattr(contrastive, "TILE", tile)
    same, batch = same_pairs(*ids) if ids else None, JoinedBatch((10,))
    for ours, definition, count in ((contrastive_loss, clip_loss, 3), (sigmoid_loss, siglip_loss, 4)):
        inputs = pairs()[:count]
        loss, wanted = ours(*inputs, batch, ids), definition(*inputs, same)
        assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
        factor = 3.0  # weight of the loss
        gradients, theirs = (torch.autograd.grad(factor * value, inputs) for value in (loss, wanted))
        for gradient, expected in zip(gradients, theirs, strict=True):
            assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            assert_close(ours(*inputs, batch, ids), wanted.detach(), rtol=1e-12, atol=1e-12)


def test_no_overflow_at_largest_scale():
    """Every logit is 0 or -100, in float32."""
    image = F.normalize(torch.eye(2).repeat(4, 1), dim=-1).requires_grad_()
    text = (-image.detach()).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    loss, wanted = contrastive_loss(image, text, scale, JoinedBatch((8,))), clip_loss(image, text, scale)
    gradients = torch.autograd.grad(loss, (image, text, scale))
    assert_close(loss, wanted)
    for gradient, expected in zip(gradients, torch.autograd.grad(wanted, (image, text, scale)), strict=True):
        assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc (Linux)")
def test_memory_grows_linearly_with_batch_size():
    """For 12,288 pairs a logits matrix takes 576 MiB; the loss and its gradients take less than a tenth of that."""
    image, text, scale, _ = pairs(12_288, 32, dtype=torch.float32)
    loss = contrastive_loss(image[:2048], text[:2048], scale, JoinedBatch((2048,)))  # warm-up
    with peak_memory() as peak:
        loss = contrastive_loss(image, text, scale, JoinedBatch((12_288,)))
        torch.autograd.grad(loss, (image, text, scale))
    assert peak.mebibytes < 57


@contextlib.contextmanager
def peak_memory():
    """Measure the peak memory of this process inside the block, in MiB above the memory at its start."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")
    result, before = types.SimpleNamespace(mebibytes=0.0), read("VmRSS")
    yield result
    result.mebibytes = (read("VmHWM") - before) / 1024


# --- micro batches ----------------------------------------------------------------------------------------------------


def gradients_of(model, size: int | None, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    objective = ClipObjective(model, micro_batch_size=size, **options).train()
    batch, rows = tiny_batch(model, 8), torch.arange(8)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    model.zero_grad()
    loss = sum(objective(**batch, text_index=rows, caption_ids=rows, image_ids=rows).values())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("bias", [None, -10.0], ids=["softmax", "sigmoid"])
def test_micro_batches_give_full_batch_gradients(size, bias):
    model = tiny_model(logit_bias_init_value=bias).double()
    whole, parts = gradients_of(model, None), gradients_of(model, size)
    assert_close(parts[0], whole[0], rtol=1e-12, atol=1e-12)
    assert parts[1].keys() == whole[1].keys() and "logit_scale" in parts[1]
    for name, gradient in whole[1].items():
        assert_close(parts[1][name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_recomputed_micro_batches_use_same_dropout():
    """With the same seed, a small step changes the loss as the gradient predicts."""
    model = tiny_model().double()
    model.config.vision_config.patch_dropout = 0.5
    for config in (model.config.vision_config, model.config.text_config):
        config.attention_dropout = 0.3

    def at(seed: int):
        torch.manual_seed(seed)
        return gradients_of(model, 3)

    loss, gradients = at(7)
    assert at(8)[0] != loss  # dropout is active
    assert torch.equal(at(7)[0], loss)
    step, predicted = 1e-6, 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
            predicted += (gradients[name] * direction).sum().item()
            parameter += step * direction
    assert (at(7)[0] - loss).item() / step == pytest.approx(predicted, rel=1e-3)


def test_towers_process_one_micro_batch_at_a_time():
    """A layer runs on one micro batch at a time, in the forward pass and again in the backward pass."""
    model, sizes = tiny_model().double(), []
    original = model.vision_model.encoder.layers[0].mlp.fc1.forward
    model.vision_model.encoder.layers[0].mlp.fc1.forward = lambda x: sizes.append(len(x)) or original(x)
    gradients_of(model, 2)
    assert sizes == 4 * [2] + 4 * [2]  # four micro batches, each computed twice


def test_open_clip_gradient_accumulation_differs():
    """In its trainer, weight gradients match the full batch, but that of logit_scale is accum_freq times too large."""
    open_clip = pytest.importorskip("open_clip")
    train = pytest.importorskip("open_clip_train.train")
    torch.manual_seed(0)
    theirs = open_clip.CLIP(
        16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        output_dict=True,
    )
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(8, 3, 16, 16, generator=generator), torch.randint(1, 49, (8, 8), generator=generator)
    batches = [(images[:4], texts[:4]), (images[4:], texts[4:])]
    seen = {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            seen.update({name: p.grad.clone() for name, p in theirs.named_parameters()})

    class Loader(list):
        num_batches = num_samples = 2

    arguments = types.SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=2, skip_scheduler=True, horovod=False, batch_size=4,
        grad_clip_norm=None, world_size=1, rank=0, local_rank=0, log_every_n_steps=100, wandb=False, distributed=False,
        log_local=False, dataset_type="csv",
    )  # fmt: skip
    data = {"train": types.SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Loader(batches))}
    loss = open_clip.ClipLoss()
    train.train_one_epoch(theirs, data, loss, 0, Keep(theirs.parameters(), lr=0.0), None, None, None, arguments)
    theirs.zero_grad()
    loss(**theirs(images, texts)).backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert_close(seen["visual.proj"], wanted["visual.proj"], rtol=1e-3, atol=1e-6)
    assert_close(seen["logit_scale"], 2 * wanted["logit_scale"], rtol=1e-3, atol=1e-6)
