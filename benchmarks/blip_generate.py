"""Time captioning with BLIP-base: vlp and transformers' BlipForConditionalGeneration, same weights and images.

    python benchmarks/blip_generate.py [--rounds 5] [--batch 2] [--beams 3] [--tokens 20] [--image_size 384]

Random weights, float32, on the CPU. The generated tokens are compared first. Then the two take turns in one process;
the ratios are ratios of medians. "Outside vision" is the median of the whole minus the median of the contender's own
vision tower.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import BlipConfig, BlipForConditionalGeneration
from vlp.modeling_vlp.exchange import transformers
from vlp.modeling_vlp.exchange.places import import_state
from vlp.training.machine.hardware import cpu_cores, use_cpu_well

import vlp

RESULTS = Path(__file__).with_suffix(".json")


def make_pair(image_size: int) -> tuple:
    """vlp's model and transformers' model with the same random weights."""
    torch.manual_seed(0)
    text = {"num_attention_heads": 12, "bos_token_id": 30522, "pad_token_id": 0, "sep_token_id": 102,
            "eos_token_id": 102}  # fmt: skip
    vision = {"image_size": image_size, "layer_norm_eps": 1e-6}
    theirs = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.02)
    ours = vlp.VlpBlipForConditionalGeneration(vlp.VlpBlipConfig(vision_config={"image_size": image_size})).eval()
    rules = transformers.rules_of(vlp.VlpBlipConfig(), "VlpBlipForConditionalGeneration")
    ours.load_state_dict(import_state(theirs.state_dict(), ours.state_dict(), rules, transformers.IGNORED))
    return ours, theirs


def clock(work) -> tuple[float, object]:
    """Seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--image_size", type=int, default=384)
    parser.add_argument("--threads", type=int, default=min(2, cpu_cores()))
    options = parser.parse_args()
    use_cpu_well(options.threads)  # both contenders use the memory setting
    ours, theirs = make_pair(options.image_size)
    pixels = torch.randn(options.batch, 3, options.image_size, options.image_size)
    how = {"num_beams": options.beams, "min_new_tokens": options.tokens, "max_new_tokens": options.tokens,
           "do_sample": False}  # fmt: skip
    contenders = {"vlp": ours, "transformers": theirs}
    generated = {name: model.generate(pixel_values=pixels, **how) for name, model in contenders.items()}
    if not torch.equal(generated["vlp"], generated["transformers"]):
        sys.exit(f"The tokens differ: {generated}")
    seconds: dict[str, dict[str, list[float]]] = {name: {"whole": [], "vision": []} for name in contenders}
    for _ in range(options.rounds):
        for name, model in contenders.items():
            seconds[name]["whole"].append(clock(lambda m=model: m.generate(pixel_values=pixels, **how))[0])
            seconds[name]["vision"].append(clock(lambda m=model: m.vision_model(pixels))[0])
    median = {name: {part: statistics.median(v) for part, v in parts.items()} for name, parts in seconds.items()}
    outside = {name: parts["whole"] - parts["vision"] for name, parts in median.items()}
    result = vars(options) | {
        "cores": cpu_cores(),
        "seconds": seconds,
        "medians": median,
        "outside_vision": outside,
        "ratio_whole": median["transformers"]["whole"] / median["vlp"]["whole"],
        "ratio_outside_vision": outside["transformers"] / outside["vlp"],
        "versions": {"torch": torch.__version__, "vlp": vlp.__version__},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name, parts in median.items():
        print(f"{name:14s} whole {parts['whole']:.2f} s, vision {parts['vision']:.2f} s, rest {outside[name]:.2f} s")
    print(
        f"vlp is {result['ratio_whole']:.2f} times as fast, outside vision {result['ratio_outside_vision']:.2f} times."
    )


if __name__ == "__main__":
    main()
