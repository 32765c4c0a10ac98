"""OpenAI's CLIP (clip/model.py). open_clip's native CLIP uses the same tensor names."""

import re

import torch

from ...configuration.clip import VlpClipConfig
from .places import ExchangeError, Rule, State, count, heads_of, require


def block(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The rules of a tower's transformer blocks.

    Args:
        ours: our name of the tower, as a regular expression.
        theirs: OpenAI's name of the transformer.
    """
    ours, theirs = rf"{ours}\.encoder\.layers\.(\d+)", rf"{theirs}.resblocks.\1"
    return (
        Rule(rf"{ours}\.self_attn\.(?P<qkv>[qkv])_proj\.(weight|bias)", rf"{theirs}.attn.in_proj_\3"),
        Rule(rf"{ours}\.self_attn\.out_proj\.(weight|bias)", rf"{theirs}.attn.out_proj.\2"),
        Rule(rf"{ours}\.layer_norm([12])\.(weight|bias)", rf"{theirs}.ln_\2.\3"),
        Rule(rf"{ours}\.mlp\.fc1\.(weight|bias)", rf"{theirs}.mlp.c_fc.\2"),
        Rule(rf"{ours}\.mlp\.fc2\.(weight|bias)", rf"{theirs}.mlp.c_proj.\2"),
    )


TEXT = (
    Rule(r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    Rule(r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    Rule(r"text_model\.final_layer_norm\.(weight|bias)", r"ln_final.\1"),
    Rule(r"text_projection\.weight", "text_projection", transposed=True),
    *block("text_model", "transformer"),
)
VISION = (
    Rule(r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    Rule(r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    Rule(r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    Rule(r"vision_model\.pre_layrnorm\.(weight|bias)", r"visual.ln_pre.\1"),
    Rule(r"vision_model\.post_layernorm\.(weight|bias)", r"visual.ln_post.\1"),
    Rule(r"visual_projection\.weight", "visual.proj", transposed=True),
    *block("vision_model", "visual.transformer"),
    Rule(r"vision_model\.((?:conv|bn|layer|attnpool)\S+)", r"visual.\1"),  # the ModifiedResNet
)
RULES = (*TEXT, *VISION, Rule(r"(logit_scale|logit_bias)", r"\1"))

IGNORED = r"input_resolution|context_length|vocab_size|(text\.)?attn_mask"


def config_from(
    state: State, hidden_act: str, vision_heads: int | None = None, text_heads: int | None = None
) -> VlpClipConfig:
    """Infer the configuration from the tensor shapes (clip/model.py, build_model).

    Args:
        state: a state dict with OpenAI's names.
        hidden_act: the activation, which shapes do not show: "quick_gelu" in OpenAI's models, "gelu" in most of
            open_clip's.
        vision_heads: attention heads of the image tower; None for heads of width 64.
        text_heads: attention heads of the text tower; None for heads of width 64.

    Raises:
        ExchangeError: if a tensor that is needed is missing, or a width is not a multiple of 64.
    """
    require(state, "text_projection", "positional_embedding", "token_embedding.weight", "ln_final.weight")
    width, projection = state["text_projection"].shape
    text = {
        "vocab_size": state["token_embedding.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": count(state, r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": text_heads or heads_of(width),
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "hidden_act": hidden_act,
    }
    return VlpClipConfig(
        vision_config=vision_config_from(state, hidden_act, vision_heads),
        text_config=text,
        projection_dim=projection,
        logit_bias_init_value=-10.0 if "logit_bias" in state else None,
    )


def vision_config_from(state: State, hidden_act: str, heads: int | None) -> dict:
    """Infer the configuration of the image tower, a vision transformer or a ModifiedResNet, from the tensor shapes.

    Args:
        state: a state dict with OpenAI's names.
        hidden_act: the activation of a vision transformer.
        heads: attention heads; None for heads of width 64.

    Returns:
        The fields of a vision configuration.

    Raises:
        ExchangeError: if a tensor that is needed is missing, or the width is not a multiple of 64.
    """
    if "visual.proj" not in state:
        require(state, "visual.layer1.0.conv1.weight", "visual.attnpool.positional_embedding")
        stages = count(state, r"visual\.layer(\d+)\.")
        grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        return {
            "model_type": "vlp_modified_resnet",
            "depths": [count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, stages + 1)],
            "embedding_size": state["visual.layer1.0.conv1.weight"].shape[0],
            "num_attention_heads": heads,
            "image_size": grid * 4 * 2 ** (stages - 1),
        }
    require(state, "visual.conv1.weight", "visual.positional_embedding")
    width, channels, patch, _ = state["visual.conv1.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": heads or heads_of(width),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5),
        "hidden_act": hidden_act,
    }


def is_openai(state: State) -> bool:
    """Whether a state dict is from OpenAI's own file, whose TorchScript archive has metadata beside the weights."""
    return {"input_resolution", "context_length", "vocab_size"} <= state.keys()


def facts_beside(config: VlpClipConfig) -> State:
    """The metadata that OpenAI's files contain beside the weights.

    Returns:
        The image size, context length and vocabulary size, as scalar tensors.

    Raises:
        ExchangeError: if OpenAI's code does not support the model.
    """
    vision, text = config.vision_config, config.text_config
    problems = []
    if {text.hidden_act, getattr(vision, "hidden_act", "quick_gelu")} != {"quick_gelu"}:
        problems.append("hidden_act is not quick_gelu")
    if any(part.num_attention_heads * 64 != part.hidden_size for part in (vision, text)):
        problems.append("heads are not 64 wide")
    if config.logit_bias_init_value is not None:
        problems.append("there is a logit_bias")
    if problems:
        raise ExchangeError(f"OpenAI's code does not support this model: {', '.join(problems)}.")
    return {
        "input_resolution": torch.tensor(vision.image_size),
        "context_length": torch.tensor(text.max_position_embeddings),
        "vocab_size": torch.tensor(text.vocab_size),
    }


def as_native(state: State) -> State:
    """Rename open_clip's tensors to those of its native CLIP.

    Removes the prefix "module." (of distributed training) and the prefix "text." (of open_clip's CustomTextCLIP).
    """
    state = {re.sub(r"^module\.", "", name): value for name, value in state.items()}
    return {re.sub(r"^text\.", "", name): value for name, value in state.items()}
