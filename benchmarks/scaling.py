"""Measure how memory and communication grow with the batch and the number of processes, and compare with formulas.

    python benchmarks/scaling.py [--largest 65536]

Runs 1, 2 and 4 processes (gloo, on this machine) with joined batches of 2^8 to 2^16 float32 embeddings of width 256.
Measures the peak memory of a process in the contrastive loss and its backward pass, without its inputs (Linux,
/proc/self/status), and the bytes that each process sends (counted by the loopback device). Then measures the bytes sent
for DDP's gradients of a model. Writes scaling.json and docs/scaling.png; `make readme` renders the tables of
docs/scaling.md from scaling.json.
"""

import argparse
import json
import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contrastive_loss import status
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from vlp.training.objectives.contrastive import TILE, contrastive_loss
from vlp.training.objectives.distributed import JoinedBatch

RESULTS = Path(__file__).with_suffix(".json")
PLOT = Path(__file__).parents[1] / "docs" / "scaling.png"
SENT = Path("/sys/class/net/lo/statistics/tx_bytes")
PROCESSES, SMALLEST, WIDTH = (1, 2, 4), 256, 256
PARAMETERS = 4_000_000
MIB = 2**20
GLOO_SCATTER = 2


# --- formulas ---------------------------------------------------------------------------------------------------------


def loss_memory(batch: int, processes: int, width: int = WIDTH) -> float:
    """Bytes of memory that the loss takes in each process, without its inputs.

    The loss itself holds all captions (gathered if there are several processes), their gradient, the scaled images, the
    gradient of the images, and three tiles. The backward pass holds the gradients of images and captions twice.

    Args:
        batch: pairs in the joined batch. processes: number of processes. width: of the embeddings.
    """
    own, side = batch / processes, min(TILE, batch)
    rows = (batch if processes > 1 else 0) + batch + 2 * own + (own if processes > 1 else 0)
    return 4 * width * max(rows, 4 * own) + 4 * 3 * min(side, own) * side


def loss_traffic(batch: int, processes: int, width: int = WIDTH, scatter: int = GLOO_SCATTER) -> float:
    """Bytes that each process sends to gather the captions, to return their gradients, and to exchange their sums.

    Args:
        batch: pairs in the joined batch. processes: number of processes. width: of the embeddings.
        scatter: how many times a reduce-scatter sends its data: once (NCCL), or twice if it is an all-reduce (gloo).
    """
    share = (processes - 1) / processes
    return (1 + scatter) * share * batch * width * 4 + 2 * 2 * share * batch * 4


def gradient_traffic(parameters: float, processes: int, bytes_each: int = 4) -> float:
    """Bytes that each process sends in a ring all-reduce that averages the gradients."""
    return 2 * (processes - 1) / processes * parameters * bytes_each


# --- measurement ------------------------------------------------------------------------------------------------------


def measure(rank: int, processes: int, port: int, largest: int, queue) -> None:
    """Measure in one process; the process of rank 0 puts the results into the queue.

    Args:
        rank: of this process. processes: number of processes. port: of the process group.
        largest: joined batch to stop at. queue: receives the results.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    dist.init_process_group("gloo", rank=rank, world_size=processes)

    def cost_of(step) -> tuple[float, float, float]:
        """Peak memory in MiB, MiB sent by each process, and seconds of a step."""
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")
        before, sent, started = status("VmRSS"), int(SENT.read_text()), time.perf_counter()
        dist.barrier()
        step()
        dist.barrier()
        traffic = (int(SENT.read_text()) - sent) / processes
        return (status("VmHWM") - before) / 1024, traffic / MIB, time.perf_counter() - started

    batch, rows = SMALLEST // 2, []
    while batch <= largest:
        own = batch // processes
        generator = torch.Generator().manual_seed(rank)
        image, text = (F.normalize(torch.randn(own, WIDTH, generator=generator), dim=-1) for _ in range(2))
        tensors = [tensor.requires_grad_() for tensor in (image, text, torch.tensor(100.0))]
        shares = JoinedBatch((own,) * processes, rank)
        memory, traffic, seconds = cost_of(lambda t=tensors, s=shares: contrastive_loss(*t, s).backward())
        if batch >= SMALLEST:  # the smaller batch before it is a warm-up
            rows.append({"batch": batch, "MiB": memory, "sent_MiB": traffic, "seconds": seconds})
            if rank == 0:
                print(
                    f"{processes} processes, batch {batch}: {memory:.1f} MiB, {traffic:.2f} MiB sent, {seconds:.1f} s"
                )
        batch *= 2
    model = torch.nn.Linear(2000, PARAMETERS // 2000, bias=False)
    wrapped = DistributedDataParallel(model) if processes > 1 else model
    inputs = torch.randn(4, 2000)
    wrapped(inputs).sum().backward()  # DDP rebuilds its buckets after the first step
    gradients = cost_of(lambda: wrapped(inputs).sum().backward())[1]
    dist.barrier()
    if rank == 0:
        queue.put({"loss": rows, "gradients_sent_MiB": gradients})
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=65536)
    options = parser.parse_args()
    result = {"width": WIDTH, "parameters": PARAMETERS, "cores": os.cpu_count(), "torch": torch.__version__}
    context = mp.get_context("spawn")
    for processes in PROCESSES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        queue = context.SimpleQueue()
        mp.start_processes(
            measure, args=(processes, port, options.largest, queue), nprocs=processes, start_method="spawn"
        )
        result[str(processes)] = queue.get()
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    plot(result)


def plot(result: dict) -> None:
    """Draw docs/scaling.png: measured memory and communication, with the formulas."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for processes, colour in zip(PROCESSES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        rows = result[str(processes)]["loss"]
        batches = [row["batch"] for row in rows]
        name = f"{processes} process{'es' if processes > 1 else ''}"
        for axis, key, formula in ((axes[0], "MiB", loss_memory), (axes[1], "sent_MiB", loss_traffic)):
            if key == "sent_MiB" and processes == 1:
                continue
            axis.plot(batches, [row[key] for row in rows], "o", color=colour, label=f"{name}, measured")
            axis.plot(batches, [formula(batch, processes) / MIB for batch in batches], color=colour, label="formula")
    batches = [row["batch"] for row in result["1"]["loss"]]
    axes[0].plot(batches, [4 * batch**2 / MIB for batch in batches], ":", color="gray", label="one (B, B) matrix")
    for axis, title in zip(axes, ("memory of the loss, MiB in a process", "sent by a process, MiB"), strict=True):
        axis.set(title=title, xlabel="joined batch", xscale="log", yscale="log")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    figure.savefig(PLOT, dpi=110)


# --- tables of docs/scaling.md ----------------------------------------------------------------------------------------


def measured_table(result: dict) -> str:
    """The tables of measured memory and communication, with the formulas, in Markdown.

    Args:
        result: what scaling.json holds.
    """
    lines = ["| processes | joined batch | memory, MiB | formula | sent, MiB | formula |", "| --- " * 6 + "|"]
    for processes in PROCESSES:
        for row in result[str(processes)]["loss"]:
            batch = row["batch"]
            lines.append(
                f"| {processes} | {batch:,} | {row['MiB']:.1f} | {loss_memory(batch, processes) / MIB:.1f} "
                f"| {row['sent_MiB']:.2f} | {loss_traffic(batch, processes) / MIB:.2f} |"
            )
    lines += ["", f"| processes | gradients of {result['parameters']:,} parameters, MiB sent | formula |",
              "| --- " * 3 + "|"]  # fmt: skip
    for processes in PROCESSES[1:]:
        sent = result[str(processes)]["gradients_sent_MiB"]
        lines.append(f"| {processes} | {sent:.2f} | {gradient_traffic(result['parameters'], processes) / MIB:.2f} |")
    return "\n".join(lines)


def memory_lines(result: dict) -> str:
    """The table of the memory of the loss in vlp and open_clip, in Markdown.

    Args:
        result: what contrastive_loss.json holds.
    """
    lines = ["| loss and backward pass | batch | MiB, without the inputs |", "| --- " * 3 + "|"]
    for name, taken in result["memory"].items():
        contender, batch = name.split(", ")
        lines.append(f"| {contender} | {int(batch):,} x {result['width']} | {taken['MiB']:,.0f} |")
    return "\n".join(lines)


# ViT-L/14 (open_clip's docs/model_profile.csv) on A100s. Published rate: 12.8 billion samples in 50,800 GPU hours
# (open_clip, PRETRAINED.md, with gradient checkpointing).
PLAN = {
    "parameters": 427.62e6, "batch": 32768, "gpus": 32, "width": 768, "samples": 12.8e9,
    "published": 12.8e9 / (50_800 * 3600), "vision": (24, 257, 1024), "text": (12, 20, 768), "wire": 25e9,
    "flops": 19.5e12,
}  # fmt: skip


def plan_table(plan: dict = PLAN) -> str:
    """The table of a large run, computed with the formulas, in Markdown.

    Args:
        plan: the sizes and rates of the run, as in PLAN.
    """
    gpus, batch, n = plan["gpus"], plan["batch"], plan["parameters"]
    own = batch // gpus
    # In bfloat16: the input of each block is stored, and one block at a time is recomputed. A block needs about 34
    # bytes per entry of its input (Korthikanti et al., 2022, arXiv:2205.05198, without the attention matrix).
    kept = sum(own * layers * tokens * width * 2 for layers, tokens, width in (plan["vision"], plan["text"]))
    again = own * plan["vision"][1] * plan["vision"][2] * 34
    micro = own // 4
    loss = 4 * plan["width"] * (2 * batch + 3 * own) + 12 * 4096 * min(4096, own)
    wire = gradient_traffic(n, gpus)
    features = loss_traffic(batch, gpus, plan["width"], scatter=1)
    rate = plan["published"] * gpus
    loss_flops = 4 * 2 * own * batch * plan["width"]
    gb = 1e9
    rows = [
        ("pairs per GPU", f"{own:,}"),
        ("weights, gradients and AdamW's moments in float32 (16 bytes per parameter)", f"{16 * n / gb:.1f} GB"),
        ("the same under FSDP2", f"{16 * n / gpus / gb:.2f} GB"),
        ("activations with gradient checkpointing", f"{(kept + again) / gb:.1f} GB"),
        (f"the same with `--micro_batch_size {micro}`", f"{(kept + again) / 4 / gb:.1f} GB"),
        ("contrastive loss", f"{loss / gb:.2f} GB"),
        ("one (B, B) matrix of logits, which vlp never stores", f"{4 * batch**2 / gb:.1f} GB"),
        ("gradients, sent by each GPU per step", f"{wire / gb:.2f} GB"),
        ("caption features and their gradients, sent by each GPU per step", f"{features / gb:.3f} GB"),
        ("the same if images and captions were both gathered", f"{2 * features / gb:.3f} GB"),
        ("matrix products of the loss, at 19.5 TFLOP/s in float32", f"{1000 * loss_flops / plan['flops']:.0f} ms"),
        ("communication at 25 GB/s (200 Gb/s per GPU), without overlap",
         f"{1000 * (wire + features) / plan['wire']:.0f} ms"),
        ("expected samples/s (published: "
         f"{plan['published']:.0f} per A100 40 GB, with gradient checkpointing)", f"{rate:,.0f}"),
        ("seconds per step", f"{batch / rate:.1f}"),
        ("days for 12.8 billion samples", f"{plan['samples'] / rate / 86400:.0f}"),
    ]  # fmt: skip
    return "\n".join(["| ViT-L/14, batch 32,768, 32 GPUs | |", "| --- | --- |"] + [f"| {a} | {b} |" for a, b in rows])


if __name__ == "__main__":
    main()
