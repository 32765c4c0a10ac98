"""A whole training step of CLIP ViT-B/32 (forward, backward, AdamW): vlp beside open_clip, same weights, same batch.

    python benchmarks/clip_step.py [--rounds 7] [--batch 16] [--threads 2]

Images and captions of 8 to 18 tokens, float32, on the CPU. Each contender has a process of its own, set up as its own
trainer does: vlp reads captions up to the longest, computes last layers where they are pooled, steps a fused AdamW and
keeps freed memory; open_clip pads captions to 77 and steps torch.optim.AdamW. A third process is open_clip with vlp's
memory setting, to show what that alone is worth. Losses and gradients are compared first; then the processes step in
turn, one at a time, and the ratios are those of the medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from vlp.modeling_vlp.exchange.open_clip import RULES
from vlp.modeling_vlp.exchange.places import write
from vlp.training.hardware import cpu_cores, use_cpu_well
from vlp.training.objectives import ClipObjective
from vlp.training.optim import make_optimizer, parameter_groups

import vlp

RESULTS = Path(__file__).with_suffix(".json")
CONTENDERS = ("vlp", "open_clip", "open_clip, memory kept")


def make_batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random images, captions padded to the longest (vlp), and the same captions padded to 77 (open_clip)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 19, (size,), generator=generator)  # start and end included
    ids = torch.zeros(size, 77, dtype=torch.long)
    for row, length in enumerate(lengths.tolist()):
        ids[row, 0], ids[row, length - 1] = 49406, 49407
        ids[row, 1 : length - 1] = torch.randint(1, 49406, (length - 2,), generator=generator)
    return torch.randn(size, 3, 224, 224, generator=generator), ids[:, : int(lengths.max())], ids


def new_model() -> vlp.VlpClipModel:
    torch.manual_seed(0)
    return vlp.VlpClipModel(vlp.VlpClipConfig(vision_config={"patch_size": 32}))


def vlp_step(size: int):
    """vlp's model, its loss on the batch, and its optimiser."""
    model = new_model()
    pixels, ids, _ = make_batch(size)
    objective, rows = ClipObjective(model, exclude_duplicates=False).train(), torch.arange(size)
    batch = {"pixel_values": pixels, "input_ids": ids, "text_index": rows, "caption_ids": rows, "image_ids": rows}
    optimizer = make_optimizer(parameter_groups(model, 1e-6, 0.2), 0.9, 0.98, 1e-6)
    return model, lambda: objective(**batch)["contrastive"], optimizer


def open_clip_step(size: int):
    """open_clip's model with the same weights, its loss, and the optimiser that its trainer makes."""
    model = open_clip.create_model("ViT-B-32-quickgelu").train()
    model.load_state_dict(write(new_model().state_dict(), RULES)[0], strict=False)
    pixels, _, ids = make_batch(size)
    loss = open_clip.ClipLoss()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6)
    return model, lambda: loss(*model(pixels, ids)), optimizer


def work(contender: str, size: int, threads: int, folder: Path) -> None:
    """A contender: store the first loss and gradients, then make a step for each line that comes in."""
    torch.set_num_threads(threads)
    if contender != "open_clip":
        use_cpu_well(threads)
    model, forward, optimizer = (vlp_step if contender == "vlp" else open_clip_step)(size)
    loss = forward()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if contender == "vlp":
        gradients = write(gradients, RULES)[0]
    torch.save({"loss": loss.detach(), "gradients": gradients}, folder / f"{contender}.pt")
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()
        print(time.perf_counter() - started, flush=True)


def compare(folder: Path) -> float:
    """Check the losses; the largest difference of a gradient, relative to the largest entry of that gradient."""
    ours, theirs = (torch.load(folder / f"{name}.pt", weights_only=True) for name in CONTENDERS[:2])
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-5, atol=0)
    worst = 0.0
    for name, gradient in theirs["gradients"].items():
        if not name.endswith("in_proj_bias"):  # a key's bias has no gradient but rounding
            worst = max(worst, ((ours["gradients"][name] - gradient).abs().max() / gradient.abs().max()).item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=cpu_cores())
    parser.add_argument("--work", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work[0], options.batch, options.threads, Path(options.work[1]))

    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        workers = {}
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--batch", str(options.batch), "--threads", str(options.threads)]
            workers[name] = subprocess.Popen(
                [*command, "--work", name, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            while workers[name].stdout.readline() != "ready\n":  # one after the other
                if workers[name].poll() is not None:
                    sys.exit(f"{name} ended before it was ready.")
        difference = compare(Path(folder))
        for round_number in range(options.rounds + 1):  # the first is a warm-up
            for name, worker in workers.items():
                print("step", file=worker.stdin, flush=True)
                seconds = float(worker.stdout.readline())
                if round_number:
                    times[name].append(seconds)
                    print(f"{name:24s} {seconds:6.2f} s", flush=True)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: medians[name] / medians["vlp"] for name in CONTENDERS[1:]}
    versions = {"torch": torch.__version__, "open_clip": open_clip.__version__, "vlp": vlp.__version__}
    result = {"batch": options.batch, "threads": options.threads, "cores": os.cpu_count(), "seconds": times,
              "ratios_of_medians": ratios, "largest_relative_gradient_difference": difference,
              "versions": versions}  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n| CLIP ViT-B/32, batch {options.batch}, {options.threads} threads | median s/step | spread | samples/s |")
    print("| --- | --- | --- | --- |")
    for name, values in times.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {name} | {medians[name]:.2f} | {spread} | {options.batch / medians[name]:.2f} |")
    print(f"\nvlp does {ratios['open_clip']:.2f} times open_clip's samples/s; gradients differ by {difference:.1e}.")


if __name__ == "__main__":
    main()
