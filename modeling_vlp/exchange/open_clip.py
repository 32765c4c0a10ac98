"""open_clip's native CLIP: OpenAI's names for the tensors, and a configuration file of its own."""

import math

from ...configuration.clip import VlpClipConfig
from ...configuration.vision import VlpModifiedResNetConfig
from ..exchange import openai
from .places import ExchangeError, State

RULES, IGNORED = openai.RULES, openai.IGNORED

# What vlp's CLIP has as open_clip has it by default; any other option of open_clip is refused.
VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name", "tokenizer_mode",
        "tokenizer_kwargs"}  # fmt: skip
MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias", "custom_text",
         "nonscalar_logit_scale"}  # fmt: skip
DEFAULTS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",), "pad_id": (0,)}


def config_from(state: State, model: dict) -> VlpClipConfig:
    """The configuration, from the shapes and from `model_cfg` of open_clip_config.json.

    Raises ExchangeError for a tower that vlp does not have (timm's, Hugging Face's, and other blocks).
    """
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    for part, known in ((model, MODEL), (vision, VISION), (text, TEXT)):
        for name, value in part.items():
            if name not in known and value not in (None, False, *DEFAULTS.get(name, ())):
                raise ExchangeError(f"vlp's CLIP has no {name} (here {value!r}), an option of open_clip.")
    width = vision.get("width", 768)
    heads = None if isinstance(vision.get("layers"), list) else width // vision.get("head_width", 64)
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return openai.config_from(state, act, heads, text.get("heads", 8))


def config_to(ours: VlpClipConfig) -> dict:
    """`model_cfg` of open_clip_config.json. Raises ExchangeError for what open_clip's CLIP cannot be."""
    vision, text = ours.vision_config, ours.text_config
    acts = {text.hidden_act} | ({vision.hidden_act} if hasattr(vision, "hidden_act") else set())
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"}:
        raise ExchangeError(f"open_clip has one activation, gelu or quick_gelu, for both towers; here: {sorted(acts)}.")
    if isinstance(vision, VlpModifiedResNetConfig):
        tower = {"image_size": vision.image_size, "layers": vision.depths, "width": vision.embedding_size}
        if vision.num_attention_heads != max(vision.hidden_size // 64, 1):
            raise ExchangeError("open_clip's ResNet has attention heads 64 wide.")
    else:
        tower = {
            "image_size": vision.image_size, "layers": vision.num_hidden_layers, "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads, "patch_size": vision.patch_size,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        }  # fmt: skip
    model = {
        "embed_dim": ours.projection_dim,
        "vision_cfg": tower,
        "text_cfg": {
            "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
            "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }  # fmt: skip
    if acts == {"quick_gelu"}:
        model["quick_gelu"] = True
    if ours.logit_bias_init_value is not None:
        model |= {"init_logit_bias": ours.logit_bias_init_value, "init_logit_scale": math.log(10)}
    return model


def image_options(preprocess: dict, side: int) -> dict:
    """Options of `VlpClipImageProcessor` from `preprocess_cfg`."""
    mode, resample = preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or resample not in RESAMPLE:
        raise ExchangeError(f"vlp has no preprocessing with resize_mode {mode!r} and interpolation {resample!r}.")
    options = {"resample": RESAMPLE[resample]}
    if "mean" in preprocess:
        options |= {"image_mean": list(preprocess["mean"]), "image_std": list(preprocess["std"])}
    if mode == "squash":
        return options | {"size": {"height": side, "width": side}, "do_center_crop": False}
    return options | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


RESAMPLE = {"bicubic": 3, "bilinear": 2}  # PIL's numbers
