"""LoRA (Hu et al., 2021, arXiv:2106.09685) by peft: a model is fine-tuned by small matrices beside its projections."""

from pathlib import Path

from transformers import PreTrainedModel

from .arguments import ArgumentError, BlipArguments, TrainingArguments

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of every attention, in every tower


def check_lora(arguments: TrainingArguments) -> None:
    """Raise ArgumentError, before anything is loaded, for what adapters cannot be added to."""
    if not arguments.model_name_or_path:
        raise ArgumentError("--lora_rank needs --model_name_or_path, the model that the adapters are added to.")
    if isinstance(arguments, BlipArguments) and arguments.task != "captioning":
        raise ArgumentError(f"--lora_rank is for CLIP and for --task captioning, not for --task {arguments.task}.")
    if arguments.push_to_hub and Path(arguments.model_name_or_path).exists():
        raise ArgumentError(
            f"--lora_rank publishes adapters alone, which name their base, and --model_name_or_path "
            f"{arguments.model_name_or_path} is a folder on this machine: push it first, and give its name on the Hub."
        )
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ArgumentError('--lora_rank needs peft: pip install "vlp[lora]".') from None


def add_lora(model: PreTrainedModel, rank: int, base: str) -> None:
    """Add adapters to every attention; they are then all that is trained, saved and published.

    Args:
        rank: of the matrices; their product is scaled by 2, peft's alpha being twice the rank.
        base: name or folder of the model, which the adapters remember.
    """
    from peft import LoraConfig

    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, base_model_name_or_path=base)
    )  # fmt: skip
