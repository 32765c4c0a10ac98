"""LoRA (Hu et al., 2021, arXiv:2106.09685) by peft: a model is fine-tuned by small matrices beside its projections."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from ...configuration.blip2 import VlpBlip2Config
from ...errors import ArgumentError
from ..arguments import TrainingArguments

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of every attention, in every tower
# Of BLIP-2: the image tower is frozen, and language models of transformers have names of their own.
BLIP2_TARGETS = r"(qformer|language_model)\..*\.([qkv]_proj|o_proj|out_proj|[qkvo])"


def check_lora(arguments: TrainingArguments) -> None:
    """Raise ArgumentError, before anything is loaded, for what adapters cannot be added to."""
    base = arguments.model_name_or_path
    if not base:
        raise ArgumentError("--lora_rank needs --model_name_or_path, the model that the adapters are added to.")
    needed, what = arguments.own_parts() or (None, "")
    if needed and needed not in (AutoConfig.from_pretrained(base).architectures or []):
        raise ArgumentError(
            f"--lora_rank publishes adapters alone, and {what} adds parts that {base} does not have: train it without "
            "adapters first, and go on from that folder."
        )
    if arguments.push_to_hub and Path(base).exists():
        raise ArgumentError(
            f"--lora_rank publishes adapters alone, which name their base, and --model_name_or_path {base} is a folder "
            "on this machine: push it first, and give its name on the Hub."
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

    targets = BLIP2_TARGETS if isinstance(model.config, VlpBlip2Config) else TARGETS
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, base_model_name_or_path=base))
