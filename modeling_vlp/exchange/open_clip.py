"""open_clip's native CLIP: OpenAI's tensor names, with open_clip's own configuration file."""

import math

from ...configuration.clip import VlpClipConfig
from ...configuration.vision import VlpModifiedResNetConfig
from ..exchange import openai
from .places import ExchangeError, State

RULES, IGNORED = openai.RULES, openai.IGNORED

# The options of open_clip that vlp's CLIP supports. Others are refused, unless they are unset or as in DEFAULTS.
VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name", "tokenizer_mode",
        "tokenizer_kwargs"}  # fmt: skip
MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias", "custom_text",
         "nonscalar_logit_scale"}  # fmt: skip
STAGES = 4  # of open_clip's ResNet
DEFAULTS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",), "pad_id": (0,)}


def config_from(state: State, model: dict) -> VlpClipConfig:
    """Build the configuration from the tensor shapes and open_clip_config.json.

    Args:
        state: open_clip's state dict.
        model: the `model_cfg` of open_clip_config.json.

    Raises:
        ExchangeError: if vlp does not support a tower (such as timm's or Hugging Face's) or an option of it.
    """
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    for part, known in ((model, MODEL), (vision, VISION), (text, TEXT)):
        for name, value in part.items():
            if name not in known and value not in (None, False, *DEFAULTS.get(name, ())):
                raise ExchangeError(f"vlp's CLIP does not support open_clip's option {name} (here {value!r}).")
    width = vision.get("width", 768)
    heads = None if isinstance(vision.get("layers"), list) else width // vision.get("head_width", 64)
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return openai.config_from(state, act, heads, text.get("heads", 8))


def config_to(ours: VlpClipConfig) -> dict:
    """The `model_cfg` of open_clip_config.json for our configuration.

    Raises:
        ExchangeError: if open_clip's CLIP does not support the model.
    """
    vision, text = ours.vision_config, ours.text_config
    acts = {text.hidden_act} | ({vision.hidden_act} if hasattr(vision, "hidden_act") else set())
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"}:
        raise ExchangeError(
            f"open_clip uses one activation, gelu or quick_gelu, in both towers; this model uses {sorted(acts)}."
        )
    if isinstance(vision, VlpModifiedResNetConfig):
        if len(vision.depths) != STAGES:
            raise ExchangeError(f"open_clip's ResNet has {STAGES} stages; this model's has {len(vision.depths)}.")
        tower = {"image_size": vision.image_size, "layers": vision.depths, "width": vision.embedding_size}
        if vision.num_attention_heads != max(vision.hidden_size // 64, 1):
            raise ExchangeError("open_clip's ResNet needs attention heads of width 64.")
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
    """Options of `VlpClipImageProcessor` from open_clip_config.json.

    Args:
        preprocess: the `preprocess_cfg` of open_clip_config.json.
        side: the model's image size in pixels.

    Raises:
        ExchangeError: if vlp does not support the resize mode or the interpolation.
    """
    mode, resample = preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or resample not in RESAMPLE:
        raise ExchangeError(
            f"vlp does not support preprocessing with resize_mode {mode!r} and interpolation {resample!r}."
        )
    options = {"resample": RESAMPLE[resample]}
    if "mean" in preprocess:
        options |= {"image_mean": list(preprocess["mean"]), "image_std": list(preprocess["std"])}
    if mode == "squash":
        return options | {"size": {"height": side, "width": side}, "do_center_crop": False}
    return options | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


RESAMPLE = {"bicubic": 3, "bilinear": 2}  # PIL's numbers
