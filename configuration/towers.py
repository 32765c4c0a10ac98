"""Configurations of towers that are models of transformers: any image or text encoder that its Auto classes load."""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .checks import require_choice, require_positive, shown

IMAGE_POOLING = ("pooler", "cls", "mean", "max", "stages")
MOST_TOKENS = 512  # of a caption
TEXT_POOLING = ("mean", "cls", "max", "eos", "pooler")


class VlpTowerConfig(PreTrainedConfig):
    """What the configurations of both towers share.

    Args:
        tower: the configuration of transformers' model, or a dict of its fields with its "model_type".
        hidden_size: width of the pooled output.
        pooling: how the outputs of all positions become one vector; "pooler" is the model's own pooled output.
    """

    sub_configs = {"tower": AutoConfig}
    POOLING = ()  # the possible ones

    def __post_init__(self, **kwargs):
        self.tower = tower_from(self.tower, self)
        require_positive(self, "hidden_size")
        require_choice(self, "pooling", self.POOLING)
        super().__post_init__(**kwargs)


class VlpVisionTowerConfig(VlpTowerConfig):
    """Configuration of an image tower that is a model of transformers, such as a DINOv2, a ConvNeXt or one of timm.

    Args: as for `VlpTowerConfig`; the defaults of `hidden_size` and `tower` are those of a `ViTConfig`, and:
        pooling: "pooler", "cls" (the first position), "mean" or "max" over the patches or cells, or "stages": the
            model's own pooled output after the means of all its hidden states, for pictures unlike those that it was
            trained on.
        image_size: side of the images in pixels.
        states_size: width of the outputs of all positions, which BLIP's texts attend to; None: `hidden_size`.
    """

    model_type = "vlp_vision_tower"
    base_config_key = "vision_config"
    POOLING = IMAGE_POOLING

    tower: dict | PreTrainedConfig | None = None
    hidden_size: int = 768
    pooling: str = "cls"
    image_size: int = 224
    states_size: int | None = None

    def __post_init__(self, **kwargs):
        self.tower = self.tower or {"model_type": "vit"}
        require_positive(self, "image_size")
        if self.states_size is not None:
            require_positive(self, "states_size")
        super().__post_init__(**kwargs)


class VlpTextTowerConfig(VlpTowerConfig):
    """Configuration of a text tower that is an encoder of transformers, such as a BERT or an XLM-RoBERTa.

    Args: as for `VlpTowerConfig`; the defaults of `hidden_size` and `tower` are those of a `BertConfig`, and:
        pooling: "mean" or "max" over the tokens, "cls" (the first token), "eos" (the last one) or "pooler".
        max_position_embeddings: maximum number of tokens.
        vocab_size: size of the vocabulary.
        pad_token_id: padding, which tokens do not attend to.
    """

    model_type = "vlp_text_tower"
    base_config_key = "text_config"
    POOLING = TEXT_POOLING

    tower: dict | PreTrainedConfig | None = None
    hidden_size: int = 768
    pooling: str = "mean"
    max_position_embeddings: int = 512
    vocab_size: int = 30522
    pad_token_id: int = 0

    def __post_init__(self, **kwargs):
        self.tower = self.tower or {"model_type": "bert"}
        require_positive(self, "max_position_embeddings", "vocab_size")
        super().__post_init__(**kwargs)


def tower_from(given: dict | PreTrainedConfig, owner: PreTrainedConfig) -> PreTrainedConfig:
    """Build the configuration of transformers' model. Raises ValueError if its "model_type" is unknown."""
    if isinstance(given, PreTrainedConfig):
        return given
    name = given.get("model_type") if isinstance(given, dict) else None
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise ValueError(
            f"{type(owner).__name__}: tower must be a configuration of transformers with its model_type, got "
            f"{shown(given)}."
        )
    return CONFIG_MAPPING[name].from_dict(dict(given))


def states_size(config: PreTrainedConfig) -> int:
    """The width of the states of an image tower, which differs from that of its pooled output for some towers."""
    return getattr(config, "states_size", None) or config.hidden_size


def positions_of(config: PreTrainedConfig) -> int:
    """The number of tokens that a text encoder has positions for; RoBERTa's begin after its padding token's id."""
    most = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
    counts_from_padding = config.model_type in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet",
                                                "xmod", "longformer", "roberta-prelayernorm", "esm")  # fmt: skip
    return most - (config.pad_token_id or 0) - 1 if counts_from_padding else most
