"""LoRA (Hu et al., 2021, arXiv:2106.09685), with peft: fine-tuning with low-rank matrices added to the projections."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...configuration.blip2 import VlpBlip2Config
from ...errors import ArgumentError, printable
from ...files import state_folder, write_file
from ...loading import BASE_FILE, read_config
from ..arguments import TrainingArguments, public_name

# The projections of every attention, in every tower; the second line names those of towers of transformers and timm.
TARGETS = [
    *("q_proj", "k_proj", "v_proj", "out_proj"),
    *("o_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin", "out_lin", "q", "k", "v", "qkv", "Wqkv", "Wo"),
]
# For BLIP-2: the image tower is frozen, and language models name their projections differently.
BLIP2_TARGETS = r"(qformer|language_model)\..*\.([qkv]_proj|o_proj|out_proj|[qkvo])"


def check_lora(arguments: TrainingArguments) -> None:
    """Check --lora_rank before anything is loaded. Raises ArgumentError if adapters cannot be used."""
    base = arguments.model_name_or_path
    if not base:
        raise ArgumentError("--lora_rank needs --model_name_or_path, the model to add the adapters to.")
    if not read_config(base, "--model_name_or_path").model_type.startswith("vlp_"):
        raise ArgumentError(
            f"--lora_rank publishes adapters, which refer to a base model in vlp's format: convert "
            f"{printable(base, 120)} with vlp convert first, and give the result."
        )
    needed, what = arguments.own_parts() or (None, "")
    if needed and needed not in read_config(base, "--model_name_or_path").architectures:
        raise ArgumentError(
            f"--lora_rank publishes only adapters, but {what} adds parts that {base} does not have: train without "
            "--lora_rank first, and use the resulting model."
        )
    if arguments.push_to_hub and Path(base).exists():
        raise ArgumentError(
            f"--lora_rank publishes only adapters, which refer to their base model, but --model_name_or_path {base} is "
            "a folder on this machine: push it first, and give its hub name."
        )
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ArgumentError('--lora_rank needs peft: pip install "vlp[lora]".') from None


def add_lora(model: PreTrainedModel, rank: int, base: str) -> None:
    """Add adapters to every attention; only they are then trained, saved and published.

    Args:
        model: model to change.
        rank: rank of the matrices; alpha is twice the rank, so that their product is scaled by 2.
        base: hub name or folder of the model, whose name is saved with the adapters.
    """
    from peft import LoraConfig

    targets = BLIP2_TARGETS if isinstance(model.config, VlpBlip2Config) else TARGETS
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": "vlp"}
    model.add_adapter(config)
    config.base_model_name_or_path = public_name(base)  # add_adapter has put the path there


def note_base(output_dir: str, base: str) -> None:
    """Note beside a folder of adapters, not in it, where their base model is on this machine."""
    if Path(base).is_dir():
        write_file(state_folder(output_dir) / BASE_FILE, str(Path(base).resolve()) + "\n")


def freeze_statistics(model: PreTrainedModel) -> None:
    """Keep batch normalisation as it is while adapters are trained: its statistics are not saved with the adapters."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train = lambda mode=True, module=module: module  # stays in evaluation mode
            module.training = False
