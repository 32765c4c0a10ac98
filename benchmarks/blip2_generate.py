"""Time generation with BLIP-2: vlp and transformers' Blip2ForConditionalGeneration, same weights, images and prompts.

    python benchmarks/blip2_generate.py [--rounds 5] [--batch 1] [--beams 5] [--tokens 20] [--language_model 1.3b]

The paper's smaller tower (ViT-L/14, 23 layers), its Q-Former, and OPT; random weights, float32, on the CPU. The
generated tokens are compared first. Then the two take turns in one process; the ratio is the ratio of the medians.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig
from vlp.modeling_vlp.exchange import transformers
from vlp.modeling_vlp.exchange.places import import_state
from vlp.training.machine.hardware import cpu_cores, use_cpu_well

import vlp

RESULTS = Path(__file__).with_suffix(".json")
OPT = {
    "125m": dict(hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12),
    "1.3b": dict(hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=8192, num_hidden_layers=24,
                 num_attention_heads=32),
}  # fmt: skip
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
         "patch_size": 14, "image_size": 224}  # fmt: skip


def make_pair(language_model: str) -> tuple:
    """vlp's model and transformers' model with the same random weights.

    Args:
        language_model: a key of OPT.
    """
    torch.manual_seed(0)
    config = Blip2Config(vision_config=VIT_L, text_config=OPTConfig(**OPT[language_model]), image_token_index=50271)
    theirs = Blip2ForConditionalGeneration(config).eval()
    theirs.config.architectures = ["Blip2ForConditionalGeneration"]
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim > 1 and not name.startswith("language_model"):
                parameter.normal_(std=0.02)
    ours_config = transformers.config_from(theirs.config)
    ours = vlp.VlpBlip2ForConditionalGeneration(ours_config).eval()
    rules = transformers.rules_of(ours_config, "VlpBlip2ForConditionalGeneration")
    ours.load_state_dict(import_state(theirs.state_dict(), ours.state_dict(), rules, transformers.IGNORED))
    return ours, theirs


def clock(work) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--language_model", choices=OPT, default="1.3b")
    parser.add_argument("--threads", type=int, default=min(2, cpu_cores()))
    options = parser.parse_args()
    use_cpu_well(options.threads)  # both contenders use the memory setting
    ours, theirs = make_pair(options.language_model)
    pixels = torch.randn(options.batch, 3, 224, 224)
    prompt = torch.tensor([[2, 102, 1345, 9]]).expand(options.batch, -1)  # </s>a photo of
    ids = torch.cat([torch.full((options.batch, 32), 50271), prompt], dim=1)
    how = {"num_beams": options.beams, "min_new_tokens": options.tokens, "max_new_tokens": options.tokens,
           "do_sample": False}  # fmt: skip
    contenders = {
        "vlp": lambda: ours.generate(pixels, prompt, **how),
        "transformers": lambda: theirs.generate(pixels, ids, torch.ones_like(ids), **how)[:, 32:],
    }
    generated = {name: generate() for name, generate in contenders.items()}
    if not torch.equal(generated["vlp"], generated["transformers"]):
        sys.exit(f"The tokens differ: {generated}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, generate in contenders.items():
            seconds[name].append(clock(generate))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = vars(options) | {
        "cores": cpu_cores(),
        "seconds": seconds,
        "medians": median,
        "ratio": median["transformers"] / median["vlp"],
        "versions": {"torch": torch.__version__, "vlp": vlp.__version__},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"vlp {median['vlp']:.2f} s, transformers {median['transformers']:.2f} s: {result['ratio']:.2f} times as fast."
    )


if __name__ == "__main__":
    main()
