"""Time a whole pre-training step of BLIP-base (forward, backward, AdamW, teacher, queue) in vlp and in LAVIS.

    python benchmarks/blip_step.py --lavis_python .venv-lavis/bin/python [--rounds 5] [--batch 8] [--image_size 224]

Float32, on the CPU, dropout 0.1, a full queue of 4,096, the same captions of 6 to 15 tokens. LAVIS pads them to
30, and needs a separate environment with old libraries:

    python3 -m venv .venv-lavis
    .venv-lavis/bin/pip install torch torchvision "transformers==4.38.2" fairscale einops "numpy<2" \
        opencv-python-headless pandas
    .venv-lavis/bin/pip install --no-deps salesforce-lavis==1.0.2 timm==0.4.12 omegaconf iopath portalocker \
        antlr4-python3-runtime==4.9.3

Each contender runs in its own process, set up as in its own trainer (vlp: fused AdamW, freed memory is kept for reuse).
They take turns, one at a time. tests/modeling_vlp/test_blip_reference.py checks that both compute the same.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from vlp.training.machine.hardware import cpu_cores, use_cpu_well
from vlp.training.machine.optim import make_optimizer, parameter_groups
from vlp.training.objectives.blip import BlipObjective
from vlp.training.objectives.momentum import Teacher

import vlp

sys.path.append(str(Path(__file__).parent / "peers"))
from lavis_blip_step import caption_ids  # noqa: E402  the captions that LAVIS gets too
from workers import interleave, serve  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
PEER = Path(__file__).parent / "peers" / "lavis_blip_step.py"
QUEUE = 4096


def serve_vlp(image_size: int, batch: int, threads: int) -> None:
    """Run vlp's steps in this process (see `workers.serve`)."""
    use_cpu_well(threads)
    torch.manual_seed(0)
    model = vlp.VlpBlipForPreTraining(vlp.VlpBlipConfig(vision_config={"image_size": image_size}))
    teacher = Teacher(model, queue_size=QUEUE)
    for queue in (teacher.image_queue, teacher.text_queue):
        queue.copy_(F.normalize(torch.randn_like(queue), dim=-1))
    teacher.filled.fill_(QUEUE)
    objective = BlipObjective(model, teacher, exclude_duplicates=False).train()
    optimizer = make_optimizer(parameter_groups(model, 1e-5, 0.05), 0.9, 0.999, 1e-8)
    ids, mask = caption_ids(batch)
    rows = torch.arange(batch)
    inputs = {"pixel_values": torch.randn(batch, 3, image_size, image_size), "text_index": rows, "caption_ids": rows,
              "image_ids": rows, "input_ids": ids[:, : int(mask.sum(1).max())]}  # fmt: skip

    def step(number: int) -> None:
        objective.before_step(number)
        sum(objective(**inputs).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step()

    serve(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lavis_python", default=".venv-lavis/bin/python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=min(2, cpu_cores()))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = [str(options.image_size), str(options.batch), str(options.threads)]
    if options.serve:
        return serve_vlp(options.image_size, options.batch, options.threads)
    words = [sys.executable, __file__, "--serve", "--image_size", shape[0], "--batch", shape[1], "--threads", shape[2]]
    seconds = interleave({"vlp": words, "LAVIS": [options.lavis_python, str(PEER), *shape]}, options.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "batch": options.batch,
        "image_size": options.image_size,
        "threads": options.threads,
        "cores": cpu_cores(),
        "seconds": seconds,
        "ratio_of_medians": median["LAVIS"] / median["vlp"],
        "versions": {"torch": torch.__version__, "vlp": vlp.__version__, "LAVIS": "1.0.2"},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name, values in seconds.items():
        print(f"{name:6s} {median[name]:6.2f} s per step ({min(values):.2f} to {max(values):.2f})")
    print(f"vlp is {result['ratio_of_medians']:.2f} times as fast.")


if __name__ == "__main__":
    main()
