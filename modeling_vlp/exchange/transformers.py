"""transformers' CLIPModel (vlp's CLIP uses its names), Siglip, Siglip2, Blip, Blip2 and InstructBlip models."""

import math
import re

from transformers import (
    Blip2Config,
    BlipConfig,
    CLIPConfig,
    InstructBlipConfig,
    PreTrainedConfig,
    Siglip2Config,
    SiglipConfig,
    VisionTextDualEncoderConfig,
)

from ...configuration.blip import VlpBlipConfig
from ...configuration.blip2 import VlpBlip2Config, VlpInstructBlipConfig
from ...configuration.clip import VlpClipConfig
from ...configuration.towers import VlpTextTowerConfig, VlpVisionTowerConfig, positions_of
from ..exchange import lavis, salesforce
from .places import ExchangeError, Rule

CLIP = (Rule(r"(.+)", r"\1"),)
SIGLIP = (
    Rule(r"(logit_scale|logit_bias)", r"\1", leading=1),
    Rule(r"text_projection\.(weight|bias)", r"text_model.head.\1"),
    Rule(
        r"vision_model\.head\.attention\.(?P<qkv>[qkv])_proj\.(weight|bias)", r"vision_model.head.attention.in_proj_\2"
    ),
    *CLIP,
)

DUAL_ENCODER = (
    Rule(r"(vision|text)_model\.model\.(\S+)", r"\1_model.\2"),
    Rule(r"((?:visual|text)_projection\.weight|logit_scale)", r"\1"),
)
DUAL_ENCODER_CLASS = "VisionTextDualEncoderModel"

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
BLIP2_PARTS = (
    Rule(r"vision_norm\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    *BLIP_VISION,
    Rule("query_tokens", "query_tokens"),
    Rule(r"(vision|text)_proj\.(weight|bias)", r"\1_projection.\2"),
    Rule(r"((?:itm_head|language_projection|language_model)\.\S+)", r"\1"),
)
BLIP2 = (*BLIP2_PARTS, *lavis.qformer("qformer", "attention", "embeddings", "qformer.layernorm"))
INSTRUCTBLIP = (
    *BLIP2_PARTS, *lavis.qformer("qformer", "attention", "qformer.embeddings", "qformer.embeddings.layernorm"),
)  # fmt: skip
LANGUAGE_MODELS = ("Blip2ForConditionalGeneration", "Blip2Model", "InstructBlipForConditionalGeneration")
HEADS = (Rule(r"((?:vision_proj|text_proj|itm_head)\.\S+)", r"\1"),)  # transformers has no temperature
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
QFORMER_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                  "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings",
                  "initializer_range", "layer_norm_eps", "pad_token_id", "cross_attention_frequency",
                  "encoder_hidden_size")  # fmt: skip


def rules_of(config: VlpClipConfig | VlpBlipConfig | VlpBlip2Config, architecture: str) -> tuple[Rule, ...]:
    """The rules that map one of our models to theirs.

    Args:
        config: our configuration.
        architecture: the name of our model class.

    Raises:
        ExchangeError: if only one tower of a CLIP is SigLIP's.
    """
    if isinstance(config, VlpBlip2Config):
        return INSTRUCTBLIP if isinstance(config, VlpInstructBlipConfig) else BLIP2
    if isinstance(config, VlpClipConfig):
        if has_foreign_tower(config):
            return DUAL_ENCODER
        return siglip_rules_of(config) if is_siglip(config) else CLIP
    return (*BLIP_VISION, *HEADS, *salesforce.TEXTS[architecture])


def siglip_rules_of(config: VlpClipConfig) -> tuple[Rule, ...]:
    """The rules for SiglipModel, or for Siglip2Model, whose patch embedding is a matrix."""
    if config.vision_config.max_num_patches is None:
        return SIGLIP
    name = "vision_model.embeddings.patch_embedding.weight"
    return Rule(re.escape(name), name, channels=config.vision_config.num_channels), *SIGLIP


def is_siglip(ours: PreTrainedConfig) -> bool:
    """Whether a CLIP of ours is a SiglipModel or a Siglip2Model in transformers.

    Raises:
        ExchangeError: if only one of its towers is SigLIP's.
    """
    kinds = (ours.vision_config.model_type, getattr(ours.text_config, "model_type", None))
    if kinds.count("vlp_siglip_vit") + kinds.count("vlp_siglip_text") == 1:
        raise ExchangeError("transformers' SiglipModel has two SigLIP towers; this model has one.")
    return kinds[0] == "vlp_siglip_vit"


def config_from(
    theirs: CLIPConfig | BlipConfig | Blip2Config | InstructBlipConfig,
) -> VlpClipConfig | VlpBlipConfig | VlpBlip2Config:
    """Convert transformers' configuration to ours."""
    if isinstance(theirs, VisionTextDualEncoderConfig):
        return dual_encoder_config_from(theirs)
    vision = pick(theirs.vision_config, VISION_FIELDS)
    if isinstance(theirs, (Blip2Config, InstructBlipConfig)):
        return blip2_config_from(theirs, vision)
    if isinstance(theirs, (SiglipConfig, Siglip2Config)):
        return siglip_config_from(theirs, vision)
    if isinstance(theirs, CLIPConfig):
        text = pick(theirs.text_config, CLIP_TEXT_FIELDS)
        if text["eos_token_id"] == 2:  # an error of early configurations: OpenAI's end token is the last one
            text |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
        return VlpClipConfig(vision_config=vision, text_config=text, projection_dim=theirs.projection_dim)
    text = pick(theirs.text_config, BLIP_TEXT_FIELDS)
    text["eos_token_id"] = theirs.text_config.sep_token_id
    text["enc_token_id"] = text["vocab_size"] - 1  # transformers has no [ENC], the last token of BLIP's vocabulary
    return VlpBlipConfig(
        vision_config=vision, text_config=text, image_text_hidden_size=theirs.image_text_hidden_size
    )  # fmt: skip


def has_foreign_tower(ours: PreTrainedConfig) -> bool:
    """Whether a tower of a model of ours is a model of transformers."""
    return isinstance(ours.vision_config, VlpVisionTowerConfig) or isinstance(
        getattr(ours, "text_config", None), VlpTextTowerConfig
    )


def has_heads(ours: VlpClipConfig) -> bool:
    """Whether a projection of a CLIP of ours is more than one linear layer."""
    hidden = (ours.visual_projection_hidden_size, ours.text_projection_hidden_size)
    return hidden != (None, None) or bool(ours.projection_dropout)


def dual_encoder_config_from(theirs: VisionTextDualEncoderConfig) -> VlpClipConfig:
    """Convert the configuration of a VisionTextDualEncoderModel to ours."""
    vision, text = theirs.vision_config, theirs.text_config
    return VlpClipConfig(
        vision_config=VlpVisionTowerConfig(
            tower=vision, hidden_size=vision.hidden_size, pooling="pooler",
            image_size=getattr(vision, "image_size", None) or 224,
        ),
        text_config=VlpTextTowerConfig(
            tower=text, hidden_size=text.hidden_size, pooling="pooler", max_position_embeddings=positions_of(text),
            vocab_size=text.vocab_size, pad_token_id=text.pad_token_id or 0,
        ),
        projection_dim=theirs.projection_dim, logit_scale_init_value=theirs.logit_scale_init_value,
    )  # fmt: skip


def dual_encoder_config_to(ours: VlpClipConfig) -> VisionTextDualEncoderConfig:
    """Convert our configuration to that of a VisionTextDualEncoderModel.

    Raises:
        ExchangeError: if that class does not support the model.
    """
    towers = (ours.vision_config, ours.text_config)
    wrong = [f"a {tower.model_type}" for tower in towers if not hasattr(tower, "tower")]
    wrong += [f"the pooling {tower.pooling}" for tower in towers if getattr(tower, "pooling", "pooler") != "pooler"]
    if hasattr(towers[0], "tower") and getattr(towers[0].tower, "hidden_size", None) != towers[0].hidden_size:
        wrong.append(f"a {towers[0].tower.model_type}, whose configuration has no hidden_size")
    wrong += ["projections with more than one layer"] * has_heads(ours)
    wrong += ["a logit_bias"] * (ours.logit_bias_init_value is not None)
    if wrong:
        raise ExchangeError(
            "transformers' VisionTextDualEncoder joins two models of transformers by linear projections of their own "
            f"pooled outputs; this model has {', '.join(wrong)}. Bundle it with its code instead."
        )
    theirs = VisionTextDualEncoderConfig.from_vision_text_configs(
        ours.vision_config.tower, ours.text_config.tower, projection_dim=ours.projection_dim
    )
    theirs.architectures = [DUAL_ENCODER_CLASS]
    return theirs


def siglip_config_from(theirs: SiglipConfig | Siglip2Config, vision: dict) -> VlpClipConfig:
    """Convert the configuration of a SiglipModel or a Siglip2Model to ours.

    Args:
        theirs: transformers' configuration.
        vision: the fields of its vision configuration that ours has too.

    Raises:
        ExchangeError: if the table of positions is not square, or there is no pooling.
    """
    text = pick(theirs.text_config, CLIP_TEXT_FIELDS)
    if isinstance(theirs, Siglip2Config):
        count = theirs.vision_config.num_patches
        side = math.isqrt(count)
        if side * side != count or not theirs.vision_config.vision_use_head:
            raise ExchangeError("vlp's SigLIP 2 has a square table of positions, and pools by attention.")
        vision |= {"max_num_patches": count, "image_size": side * vision["patch_size"]}
    for name in ("bos_token_id", "eos_token_id"):  # transformers' defaults are ids of CLIP's vocabulary
        if text[name] is not None and text[name] >= text["vocab_size"]:
            text[name] = None
    return VlpClipConfig(
        vision_config=vision | {"model_type": "vlp_siglip_vit"}, text_config=text | {"model_type": "vlp_siglip_text"},
        projection_dim=vision["hidden_size"], logit_scale_init_value=math.log(10), logit_bias_init_value=-10.0,
    )  # fmt: skip


def siglip_config_to(ours: VlpClipConfig) -> SiglipConfig | Siglip2Config:
    """Convert our configuration to that of a SiglipModel or, for images of variable shape, of a Siglip2Model.

    Raises:
        ExchangeError: if the model has no `logit_bias`.
    """
    if ours.logit_bias_init_value is None:
        raise ExchangeError("transformers' SiglipModel has a logit_bias; this model has none.")
    text = pick(ours.text_config, CLIP_TEXT_FIELDS) | {"projection_size": ours.projection_dim}
    vision = pick(ours.vision_config, VISION_FIELDS)
    if ours.vision_config.max_num_patches is None:
        theirs = SiglipConfig(vision_config=vision, text_config=text)
        theirs.architectures = ["SiglipModel"]
        return theirs
    count = (vision.pop("image_size") // vision["patch_size"]) ** 2
    theirs = Siglip2Config(vision_config=vision | {"num_patches": count}, text_config=text)
    theirs.architectures = ["Siglip2Model"]
    return theirs


def blip2_config_from(theirs: Blip2Config | InstructBlipConfig, vision: dict) -> VlpBlip2Config:
    """Convert transformers' configuration of a BLIP-2 or an InstructBLIP to ours.

    If there is a language model, it is stored in our checkpoint, as in theirs.

    Args:
        theirs: transformers' configuration.
        vision: the fields of its vision configuration that ours has too.
    """
    has_language_model = theirs.architectures[0] in LANGUAGE_MODELS
    instructs = isinstance(theirs, InstructBlipConfig)
    qformer = pick(theirs.qformer_config, QFORMER_FIELDS)
    qformer["bos_token_id"] = min(30522, qformer["vocab_size"] - 1)  # [DEC] follows BERT's vocabulary
    qformer["eos_token_id"] = min(102, qformer["vocab_size"] - 1)
    return (VlpInstructBlipConfig if instructs else VlpBlip2Config)(
        vision_config=vision | {"model_type": "vlp_blip_vit", "final_norm": False},
        qformer_config=qformer,
        text_config=theirs.text_config if has_language_model else None,
        num_query_tokens=theirs.num_query_tokens,
        image_text_hidden_size=getattr(theirs, "image_text_hidden_size", 256),  # InstructBLIP compares no embeddings
        vision_norm_eps=theirs.vision_config.layer_norm_eps,
        store_language_model=has_language_model,
    )


def blip2_config_to(
    ours: VlpBlip2Config, has_language_model: bool, image_token_id: int | None
) -> Blip2Config | InstructBlipConfig:
    """Convert our configuration of a BLIP-2 or an InstructBLIP to transformers'.

    Args:
        ours: our configuration.
        has_language_model: whether the model has a language model.
        image_token_id: the token that marks the position of a query in the language model's input.

    Raises:
        ExchangeError: if transformers' Blip2 does not support the image tower.
    """
    vision = ours.vision_config
    if vision.model_type != "vlp_blip_vit" or vision.final_norm:
        raise ExchangeError(
            "transformers' Blip2 supports only EVA-CLIP's vision transformer, without a LayerNorm before or after its "
            f"blocks; this tower, a {vision.model_type}, has one."
        )
    qformer = pick(ours.qformer_config, QFORMER_FIELDS)
    text = {"text_config": ours.text_config} if has_language_model else {}
    if isinstance(ours, VlpInstructBlipConfig):
        return InstructBlipConfig(
            vision_config=pick(vision, VISION_FIELDS), qformer_config=qformer, image_token_index=image_token_id,
            num_query_tokens=ours.num_query_tokens, **text,
        )  # fmt: skip
    qformer["use_qformer_text_input"] = not has_language_model
    return Blip2Config(
        vision_config=pick(vision, VISION_FIELDS), qformer_config=qformer, num_query_tokens=ours.num_query_tokens,
        image_text_hidden_size=ours.image_text_hidden_size, image_token_index=image_token_id, **text,
    )  # fmt: skip


def config_to(
    ours: VlpClipConfig | VlpBlipConfig | VlpBlip2Config, peer: str, image_token_id: int | None = None
) -> CLIPConfig | BlipConfig | Blip2Config | InstructBlipConfig:
    """Convert our configuration to transformers'.

    Args:
        ours: our configuration.
        peer: the name of transformers' model class.
        image_token_id: for a BLIP-2 with a language model, the token that marks the position of a query in the language
            model's input; None for other models.

    Raises:
        ExchangeError: if transformers' class does not support the model.
    """
    if ours.vision_config.model_type == "vlp_modified_resnet":
        raise ExchangeError(
            "transformers has no ModifiedResNet, the image tower of vlp's small recipes; train with a ViT to convert."
        )
    if isinstance(ours, VlpClipConfig) and has_foreign_tower(ours):
        return dual_encoder_config_to(ours)
    if has_foreign_tower(ours):
        raise ExchangeError(f"transformers' {peer} has a vision transformer of its own; this model has another tower.")
    vision = pick(ours.vision_config, VISION_FIELDS)
    if isinstance(ours, VlpBlip2Config):
        theirs = blip2_config_to(ours, peer in LANGUAGE_MODELS, image_token_id)
    elif is_siglip(ours):
        return siglip_config_to(ours)
    elif isinstance(ours, VlpClipConfig):
        if ours.logit_bias_init_value is not None:
            raise ExchangeError("transformers' CLIPModel has no logit_bias.")
        if ours.vision_config.max_num_patches is not None:
            raise ExchangeError("transformers' CLIPModel reads square images; this model reads variable shapes.")
        if has_heads(ours) or ours.vision_config.model_type == "vlp_blip_vit":
            raise ExchangeError("transformers' CLIPModel has linear projections and CLIP's own vision transformer.")
        text = pick(ours.text_config, CLIP_TEXT_FIELDS)
        theirs = CLIPConfig(vision_config=vision, text_config=text, projection_dim=ours.projection_dim)
    else:
        text = pick(ours.text_config, BLIP_TEXT_FIELDS)
        text |= {"sep_token_id": ours.text_config.eos_token_id, "eos_token_id": ours.text_config.eos_token_id}
        theirs = BlipConfig(
            vision_config=vision, text_config=text, image_text_hidden_size=ours.image_text_hidden_size,
            projection_dim=ours.image_text_hidden_size,
        )  # fmt: skip
    theirs.architectures = [peer]
    return theirs


def pick(config: PreTrainedConfig, fields: tuple[str, ...]) -> dict:
    """The named fields that a configuration has."""
    return {name: getattr(config, name) for name in fields if hasattr(config, name)}
