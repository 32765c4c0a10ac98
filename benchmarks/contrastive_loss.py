"""Time the contrastive loss and its gradient in vlp (tiles) and open_clip (matrices), and measure their memory.

    python benchmarks/contrastive_loss.py [--batch 8192] [--large 65536] [--rounds 5]

Float32, embeddings of width 512, one process. Values and gradients are compared first. Memory is the peak of a process
during the loss and the backward pass, minus what it held with its inputs (Linux).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F
from vlp.training.machine.hardware import cpu_cores
from vlp.training.objectives.contrastive import contrastive_loss
from vlp.training.objectives.distributed import JoinedBatch
from workers import interleave, report, serve

import vlp

RESULTS = Path(__file__).with_suffix(".json")
WIDTH = 512


def inputs(size: int) -> list[Tensor]:
    """Image and text embeddings (B, WIDTH) of unit length, and the logit scale; all require gradients."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(size, WIDTH, generator=generator), dim=-1) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (image, text, torch.tensor(100.0))]


def loss_of(contender: str, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The contrastive loss of vlp or open_clip. image, text: (B, WIDTH); scale: one number."""
    if contender == "vlp":
        return contrastive_loss(image, text, scale, JoinedBatch((len(image),)))
    return open_clip.ClipLoss()(image, text, scale)


def work(contender: str, size: int) -> None:
    """Run a contender in this process (see `workers.serve`)."""
    torch.set_num_threads(cpu_cores())
    tensors = inputs(size)
    serve(lambda number: torch.autograd.grad(loss_of(contender, *tensors), tensors))


def memory(contender: str, size: int) -> None:
    """Print, as JSON, the MiB that the loss and the backward pass take without the inputs, and their seconds."""
    torch.set_num_threads(cpu_cores())
    small, tensors = inputs(64), inputs(size)
    torch.autograd.grad(loss_of(contender, *small), small)  # warm-up
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, started = status("VmRSS"), time.perf_counter()
    loss_of(contender, *tensors).backward()
    print(json.dumps({"MiB": (status("VmHWM") - before) / 1024, "seconds": time.perf_counter() - started}))


def status(name: str) -> int:
    """A number in /proc/self/status, in KiB, such as VmRSS (memory held) or VmHWM (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--large", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.batch)
    if options.memory:
        return memory(options.memory, options.batch)
    ours, theirs = (torch.autograd.grad(loss_of(name, *tensors), tensors)
                    for name in ("vlp", "open_clip") for tensors in [inputs(2048)])  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())

    def words(flag: str, name: str, size: int) -> list[str]:
        return [sys.executable, __file__, "--batch", str(size), flag, name]

    seconds = interleave({name: words("--work", name, options.batch) for name in ("vlp", "open_clip")}, options.rounds)
    taken = {}
    for name, size in (("vlp", options.batch), ("open_clip", options.batch), ("vlp", options.large)):
        done = subprocess.run(words("--memory", name, size), capture_output=True, text=True, check=True)
        taken[f"{name}, {size}"] = json.loads(done.stdout)
        print(f"{name}, batch {size}: {taken[f'{name}, {size}']['MiB']:.0f} MiB", file=sys.stderr, flush=True)
    report(
        RESULTS,
        seconds,
        batch=options.batch,
        large=options.large,
        width=WIDTH,
        memory=taken,
        versions={"torch": torch.__version__, "open_clip": open_clip.__version__, "vlp": vlp.__version__},
    )


if __name__ == "__main__":
    main()
