"""Time attention in training in bfloat16 on a CPU: vlp's matrix products, and PyTorch's kernel.

    python benchmarks/attention.py [--rounds 7]

A step is a forward and a backward pass. The two take turns in one process.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from vlp.modeling_vlp.attention import attention, plain_is_faster
from vlp.training.machine.hardware import cpu_cores, use_cpu_well

RESULTS = Path(__file__).with_suffix(".json")
SIZES = {  # batch, heads, queries, keys, width of a head
    "BLIP's texts attend to a grid of 5 x 5": (384, 12, 8, 25, 32),
    "texts of 8 tokens": (384, 12, 8, 8, 32),
    "CLIP's texts of 77 tokens": (64, 8, 77, 77, 64),
    "a ViT-B/32's 50 tokens": (64, 12, 50, 50, 64),
    "a ViT-B/16's 197 tokens": (16, 12, 197, 197, 64),
}


def seconds_of(function, tensors: list[torch.Tensor]) -> float:
    """The time of a forward and a backward pass."""
    started = time.perf_counter()
    function(*tensors).sum().backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    use_cpu_well(cpu_cores())
    results = {}
    for name, (batch, heads, queries, keys, width) in SIZES.items():
        shapes = [(batch, heads, count, width) for count in (queries, keys, keys)]
        tensors = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        assert plain_is_faster(tensors[0], None)
        contenders = {"vlp": attention, "PyTorch's kernel": torch.nn.functional.scaled_dot_product_attention}
        seconds: dict[str, list[float]] = {each: [] for each in contenders}
        for number in range(options.rounds + 1):
            for each, function in contenders.items():
                value = seconds_of(function, tensors)
                if number:  # the first is a warm-up
                    seconds[each].append(value)
        results[name] = {"shape": [batch, heads, queries, keys, width], "seconds": seconds}
        ours, theirs = (statistics.median(values) for values in seconds.values())
        print(f"{name}: {1e3 * ours:.1f} ms, {1e3 * theirs:.1f} ms with PyTorch's kernel, {theirs / ours:.1f} times")
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "sizes": results}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
