"""Time a whole training step of CLIP (forward, backward, AdamW) in vlp, open_clip and transformers, same weights.

    python benchmarks/clip_step.py [--model ViT-B-32|ViT-B-16|RN50] [--compiled] [--rounds 7] [--batch 16] [--threads 2]

Images and captions of 8 to 18 tokens, float32, on the CPU. Each contender runs in its own process, set up as in its own
trainer: vlp skips padding, computes the last layers only at the pooled positions, uses a fused AdamW and keeps freed
memory for reuse; open_clip pads captions to 77 tokens and uses torch.optim.AdamW; transformers (which has no ResNet)
pads to the longest caption and uses a fused AdamW. One more process trains open_clip with vlp's memory setting and a
context as long as the longest caption (its option --force-context-length). With --compiled, each library's own
torch.compile is compared instead (open_clip's with that setting and context), beside vlp without it. Losses and
gradients are compared first. Then the processes take turns, one at a time.

One more process, "products", multiplies large square matrices, with as many operations as the products of vlp's step
have. Its time is the least that such a step can take on the machine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import open_clip
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel
from vlp.modeling_vlp.exchange.open_clip import RULES
from vlp.modeling_vlp.exchange.places import export_state
from vlp.training.machine.hardware import cpu_cores, use_cpu_well
from vlp.training.machine.optim import make_optimizer, parameter_groups
from vlp.training.objectives.clip import ClipObjective
from workers import interleave, ratios, serve

import vlp

RESULTS = Path(__file__).with_suffix(".json")
VISION = {
    "ViT-B-32": {"patch_size": 32},
    "ViT-B-16": {"patch_size": 16},
    "RN50": {"model_type": "vlp_modified_resnet"},
}
OPEN_CLIP = {"ViT-B-32": "ViT-B-32-quickgelu", "ViT-B-16": "ViT-B-16-quickgelu", "RN50": "RN50-quickgelu"}
TUNED, PRODUCTS = "open_clip, memory kept, short context", "products"
COMPILED = ", compiled"
SIDE = 2048  # of the matrices of PRODUCTS


def contenders(model: str, compiled: bool) -> list[str]:
    """The contenders for a model; vlp is the first."""
    peers = ["open_clip", *([] if model == "RN50" else ["transformers"])]
    if compiled:
        return ["vlp", *(f"{name}{COMPILED}" for name in ("vlp", *peers)), PRODUCTS]
    return ["vlp", *peers, TUNED, PRODUCTS]


def make_batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random images (B, 3, 224, 224), captions padded to the longest (B, N), and the same padded to 77 (open_clip)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 19, (size,), generator=generator)  # start and end included
    ids = torch.zeros(size, 77, dtype=torch.long)
    for row, length in enumerate(lengths.tolist()):
        ids[row, 0], ids[row, length - 1] = 49406, 49407
        ids[row, 1 : length - 1] = torch.randint(1, 49406, (length - 2,), generator=generator)
    return torch.randn(size, 3, 224, 224, generator=generator), ids[:, : int(lengths.max())], ids


def new_model(name: str) -> vlp.VlpClipModel:
    """vlp's model with the random weights that all contenders use."""
    torch.manual_seed(0)
    config = {"vision_config": VISION[name]}
    if name == "RN50":
        config["projection_dim"] = 1024
    return vlp.VlpClipModel(vlp.VlpClipConfig(**config))


def vlp_step(name: str, size: int):
    """vlp's model, its loss on the batch, and its optimiser."""
    model = new_model(name)
    pixels, ids, _ = make_batch(size)
    objective, rows = ClipObjective(model, exclude_duplicates=False).train(), torch.arange(size)
    batch = {"pixel_values": pixels, "input_ids": ids, "text_index": rows, "caption_ids": rows, "image_ids": rows}
    optimizer = make_optimizer(parameter_groups(model, 1e-6, 0.2), 0.9, 0.98, 1e-6)
    return model, lambda: objective(**batch)["contrastive"], optimizer


def adamw(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; `options` are those of torch.optim.AdamW."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.2},
    ]
    return torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, **options)


def open_clip_step(name: str, size: int, short: bool = False):
    """open_clip's model with the same weights, its loss, and the optimiser of its trainer."""
    pixels, least, ids = make_batch(size)
    ids = least if short else ids
    model = open_clip.create_model(OPEN_CLIP[name], force_context_length=ids.shape[1]).train()
    weights = export_state(new_model(name).state_dict(), RULES)[0]
    weights["positional_embedding"] = weights["positional_embedding"][: ids.shape[1]].clone()
    model.load_state_dict(weights, strict=False)
    loss = open_clip.ClipLoss()
    return model, lambda: loss(*model(pixels, ids)), adamw(model)


def transformers_step(name: str, size: int):
    """transformers' model with the same weights, its loss, and the optimiser of its Trainer."""
    model = CLIPModel(CLIPConfig(vision_config=VISION[name], text_config={"eos_token_id": 49407})).train()
    model.load_state_dict(new_model(name).state_dict(), strict=False)
    pixels, ids, _ = make_batch(size)
    return model, lambda: model(input_ids=ids, pixel_values=pixels, return_loss=True).loss, adamw(model, fused=True)


def work(contender: str, name: str, size: int, threads: int, folder: Path) -> None:
    """Run a contender in this process: store its first loss and gradients, then serve steps (see `workers.serve`).

    Args:
        contender: one of `contenders`. name: of the model. size: of the batch. threads: CPU threads to use.
        folder: where the loss and the gradients are stored.
    """
    torch.set_num_threads(threads)
    library, compiled = contender.split(",")[0], contender.endswith(COMPILED)
    tuned = library == "open_clip" and (compiled or contender == TUNED)
    if library == "vlp" or tuned:
        use_cpu_well(threads)
    if contender == PRODUCTS:
        return serve_products(operations_of(name, size))
    make = {"vlp": vlp_step, "transformers": transformers_step}.get(library, open_clip_step)
    model, forward, optimizer = make(name, size, **({"short": True} if tuned else {}))
    if compiled:
        forward = torch.compile(forward)
    loss = forward()
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    if library in ("vlp", "transformers"):
        gradients = export_state(gradients, RULES)[0]
    torch.save({"loss": loss.detach(), "gradients": gradients}, folder / f"{contender}.pt")

    def step(number: int) -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    serve(step)


def operations_of(name: str, size: int) -> int:
    """The operations of the matrix products and convolutions of vlp's step, forward and backward."""
    _, forward, _ = vlp_step(name, size)
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    return counter.get_total_flops()


def serve_products(operations: int) -> None:
    """Serve products of large matrices with about this number of operations."""
    left, right = torch.randn(2, SIDE, SIDE)
    out, count = torch.empty_like(left), max(1, round(operations / (2 * SIDE**3)))

    def step(number: int) -> None:
        for _ in range(count):
            torch.mm(left, right, out=out)

    serve(step)


def compare(folder: Path, peer: str) -> float:
    """Check that vlp and a peer have the same loss, and compare their gradients.

    Args:
        folder: where both stored their loss and gradients. peer: name of the other contender.

    Returns:
        The largest difference of a gradient, relative to the largest entry of that gradient.

    Raises:
        AssertionError: if the losses differ.
    """
    ours, theirs = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("vlp", peer))
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-5, atol=0)
    worst = 0.0
    for name, gradient in theirs["gradients"].items():
        # Skip gradients that are zero up to rounding: of key biases, and behind weights that start at zero (ResNet).
        if not name.endswith(("in_proj_bias", "k_proj.bias")) and gradient.abs().max() > 1e-12:
            own = ours["gradients"][name]
            own = own[: len(gradient)] if name == "positional_embedding" else own  # a short context has fewer
            worst = max(worst, ((own - gradient).abs().max() / gradient.abs().max()).item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", choices=list(VISION))
    parser.add_argument("--compiled", action="store_true", help="compare torch.compile in each library")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=cpu_cores())
    parser.add_argument("--work", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work[0], options.model, options.batch, options.threads, Path(options.work[1]))
    words = [sys.executable, __file__, "--model", options.model]
    words += ["--batch", str(options.batch), "--threads", str(options.threads)]
    names, differences = contenders(options.model, options.compiled), {}
    with tempfile.TemporaryDirectory() as folder:

        def compare_all() -> None:
            differences.update({peer: compare(Path(folder), peer) for peer in names[1:] if peer != PRODUCTS})

        commands = {name: [*words, "--work", name, folder] for name in names}
        seconds = interleave(commands, options.rounds, started=compare_all)
    result = {
        "batch": options.batch,
        "threads": options.threads,
        "cores": os.cpu_count(),
        "seconds": seconds,
        "ratios_of_medians": ratios(seconds),
        "share_of_the_products": statistics.median(seconds[PRODUCTS]) / statistics.median(seconds["vlp"]),
        "largest_relative_gradient_difference": differences,
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__,
                     "transformers": transformers.__version__, "vlp": vlp.__version__},
    }  # fmt: skip
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    key = f"{options.model}{COMPILED * options.compiled}"
    RESULTS.write_text(json.dumps(stored | {key: result}, indent=1) + "\n")
    for name, values in seconds.items():
        print(f"{options.model}, {name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")
    print({name: round(ratio, 2) for name, ratio in result["ratios_of_medians"].items()}, differences)


if __name__ == "__main__":
    main()
