"""transformers' CLIPModel, whose names vlp's CLIP has, and its Blip models."""

from transformers import BlipConfig, CLIPConfig, PreTrainedConfig

from ...configuration import VlpBlipConfig, VlpClipConfig
from . import salesforce
from .places import ExchangeError, Rule

CLIP = (Rule(r"(.+)", r"\1"),)

BLIP_VISION = (
    Rule(r"vision_model\.embeddings\.class_embedding", "vision_model.embeddings.class_embedding", leading=2),
    Rule(
        r"vision_model\.embeddings\.position_embedding\.weight", "vision_model.embeddings.position_embedding", leading=1
    ),
    Rule(
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.(?P<qkv>[qkv])_proj\.(weight|bias)",
        r"vision_model.encoder.layers.\1.self_attn.qkv.\3",
    ),
    Rule(
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)",
        r"vision_model.encoder.layers.\1.self_attn.projection.\2",
    ),
    Rule(r"(vision_model\.\S+)", r"\1"),
)
# Their names of what vlp's architectures are called; there is no class there for the others.
ARCHITECTURES = {
    "VlpClipModel": "CLIPModel",
    "VlpBlipForConditionalGeneration": "BlipForConditionalGeneration",
    "VlpBlipForImageTextRetrieval": "BlipForImageTextRetrieval",
    "VlpBlipForQuestionAnswering": "BlipForQuestionAnswering",
}
HEADS = (Rule(r"((?:vision_proj|text_proj|itm_head)\.\S+)", r"\1"),)  # transformers has no temperature
RULES = {"VlpClipModel": CLIP} | {
    name: (*BLIP_VISION, *HEADS, *salesforce.TEXTS[name]) for name in ARCHITECTURES if name != "VlpClipModel"
}
IGNORED = r".*\.position_ids"

VISION_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
                 "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout")  # fmt: skip
CLIP_TEXT_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "bos_token_id",
                    "eos_token_id", "pad_token_id")  # fmt: skip
BLIP_TEXT_FIELDS = ("vocab_size", "hidden_size", "encoder_hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps",
                    "hidden_dropout_prob", "attention_probs_dropout_prob", "label_smoothing", "pad_token_id",
                    "bos_token_id")  # fmt: skip


def architecture_of(config: PreTrainedConfig) -> str:
    """Which of our models a folder of transformers is. Raises ExchangeError where it is none."""
    theirs = (config.architectures or ["none"])[0]
    for ours, name in ARCHITECTURES.items():
        if name == theirs:
            return ours
    raise ExchangeError(f"{theirs} is not among the architectures that vlp reads: {', '.join(ARCHITECTURES.values())}.")


def config_from(theirs: CLIPConfig | BlipConfig) -> VlpClipConfig | VlpBlipConfig:
    """Our configuration from theirs."""
    vision = pick(theirs.vision_config, VISION_FIELDS)
    if isinstance(theirs, CLIPConfig):
        text = pick(theirs.text_config, CLIP_TEXT_FIELDS)
        if text["eos_token_id"] == 2:  # what early configurations say, though OpenAI's end token is the last
            text |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
        return VlpClipConfig(vision_config=vision, text_config=text, projection_dim=theirs.projection_dim)
    text = pick(theirs.text_config, BLIP_TEXT_FIELDS)
    text["eos_token_id"] = theirs.text_config.sep_token_id
    text["enc_token_id"] = text["vocab_size"] - 1  # transformers has no [ENC]; it stands last in BLIP's vocabulary
    return VlpBlipConfig(
        vision_config=vision, text_config=text, image_text_hidden_size=theirs.image_text_hidden_size
    )  # fmt: skip


def config_to(ours: VlpClipConfig | VlpBlipConfig, architecture: str) -> CLIPConfig | BlipConfig:
    """Their configuration from ours. Raises ExchangeError where transformers has no such model."""
    if architecture not in ARCHITECTURES:
        raise ExchangeError(f"transformers has no class for {architecture}.")
    if ours.vision_config.model_type == "vlp_modified_resnet":
        raise ExchangeError("transformers has no ModifiedResNet.")
    vision = pick(ours.vision_config, VISION_FIELDS)
    if isinstance(ours, VlpClipConfig):
        if ours.logit_bias_init_value is not None:
            raise ExchangeError("transformers' CLIPModel has no logit_bias.")
        text = pick(ours.text_config, CLIP_TEXT_FIELDS)
        theirs = CLIPConfig(vision_config=vision, text_config=text, projection_dim=ours.projection_dim)
    else:
        text = pick(ours.text_config, BLIP_TEXT_FIELDS)
        text |= {"sep_token_id": ours.text_config.eos_token_id, "eos_token_id": ours.text_config.eos_token_id}
        theirs = BlipConfig(
            vision_config=vision, text_config=text, image_text_hidden_size=ours.image_text_hidden_size,
            projection_dim=ours.image_text_hidden_size,
        )  # fmt: skip
    theirs.architectures = [ARCHITECTURES[architecture]]
    return theirs


def pick(config: PreTrainedConfig, fields: tuple[str, ...]) -> dict:
    return {name: getattr(config, name) for name in fields if hasattr(config, name)}
