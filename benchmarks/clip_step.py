"""A whole training step of CLIP ViT-B/32 (forward, backward, AdamW): vlp beside open_clip, same weights, same batch.

    python benchmarks/clip_step.py [--rounds 5] [--batch 16] [--threads 2]

Both start from the same random weights and see the same images and captions of 8 to 18 tokens, in float32, on the CPU.
First the losses and gradients are compared; then steps are timed in turn, one of each a round, and the ratio is that of
the medians. open_clip runs as its own training does on one process: captions padded to 77, ClipLoss, torch.optim.AdamW.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import open_clip
import torch
from vlp.training.hardware import cpu_cores, use_cpu_well
from vlp.training.objectives import ClipObjective
from vlp.training.optim import make_optimizer, parameter_groups

import vlp

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from test_parity import to_open_clip  # noqa: E402  the key map that the parity tests use

RESULTS = Path(__file__).with_suffix(".json")


def make_batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images, captions padded to the longest (vlp), and the same captions padded to 77 (open_clip)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 19, (size,), generator=generator)  # start and end included
    ids = torch.zeros(size, 77, dtype=torch.long)
    for row, length in enumerate(lengths.tolist()):
        ids[row, 0], ids[row, length - 1] = 49406, 49407
        ids[row, 1 : length - 1] = torch.randint(1, 49406, (length - 2,), generator=generator)
    return torch.randn(size, 3, 224, 224, generator=generator), ids[:, : int(lengths.max())], ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=cpu_cores())
    options = parser.parse_args()
    use_cpu_well(options.threads)  # for both: they share the process

    torch.manual_seed(0)
    ours = vlp.VlpClipModel(vlp.VlpClipConfig(vision_config={"patch_size": 32}))
    theirs = open_clip.create_model("ViT-B-32-quickgelu")
    theirs.load_state_dict(to_open_clip(ours.state_dict(), resnet=False), strict=False)
    pixels, trimmed, padded = make_batch(options.batch)
    objective, ids = ClipObjective(ours, exclude_duplicates=False).train(), torch.arange(options.batch)
    our_optimizer = make_optimizer(parameter_groups(ours, 1e-6, 0.2), 0.9, 0.98, 1e-6)
    decayed = [p for n, p in theirs.named_parameters() if p.ndim >= 2]
    free = [p for n, p in theirs.named_parameters() if p.ndim < 2]
    groups = [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    their_optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6)
    their_loss = open_clip.ClipLoss()

    def our_forward() -> torch.Tensor:
        return objective(pixel_values=pixels, input_ids=trimmed, text_index=ids, caption_ids=ids, image_ids=ids)[
            "contrastive"
        ]

    def their_forward() -> torch.Tensor:
        return their_loss(*theirs.train()(pixels, padded))

    def check() -> float:
        """The largest difference of a gradient, relative to the largest entry of that gradient."""
        losses = []
        for forward in (our_forward, their_forward):
            loss = forward()
            loss.backward()
            losses.append(loss.item())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        gradients = to_open_clip({n: p.grad for n, p in ours.named_parameters()}, resnet=False)
        worst = 0.0
        for name, parameter in theirs.named_parameters():
            if not name.endswith("in_proj_bias"):  # a key's bias has no gradient but rounding
                difference = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
                worst = max(worst, difference.item())
        return worst

    def step(forward, optimizer) -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()
        return time.perf_counter() - started

    difference = check()
    times: dict[str, list[float]] = {"vlp": [], "open_clip": []}
    for round_number in range(options.rounds + 1):  # the first is a warm-up
        for name, forward, optimizer in (
            ("vlp", our_forward, our_optimizer),
            ("open_clip", their_forward, their_optimizer),
        ):
            seconds = step(forward, optimizer)
            if round_number:
                times[name].append(seconds)
                print(f"{name:10s} {seconds:6.2f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["open_clip"] / medians["vlp"]
    versions = {"torch": torch.__version__, "open_clip": open_clip.__version__, "vlp": vlp.__version__}
    result = {"batch": options.batch, "threads": options.threads, "cores": os.cpu_count(), "seconds": times,
              "ratio_of_medians": ratio, "largest_relative_gradient_difference": difference,
              "versions": versions}  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n| CLIP ViT-B/32, batch {options.batch}, {options.threads} threads | median s/step | spread | samples/s |")
    print("| --- | --- | --- | --- |")
    for name, values in times.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {name} | {medians[name]:.2f} | {spread} | {options.batch / medians[name]:.2f} |")
    print(
        f"\nvlp does {ratio:.2f} times open_clip's samples/s; gradients differ by {difference:.1e} at most (relative)."
    )


if __name__ == "__main__":
    main()
