"""Configuration of BLIP-2: a frozen image tower, a Q-Former and a frozen language model."""

from transformers import AutoConfig, PreTrainedConfig

from .checks import config_from, require_fraction, require_positive, require_width
from .text import VlpQFormerConfig
from .towers import VlpVisionTowerConfig, states_size
from .vision import VlpBlipViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpViTConfig, vision_config_from

TOWERS = (VlpBlipViTConfig, VlpViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpVisionTowerConfig)


class VlpBlip2Config(PreTrainedConfig):
    """Configuration of the `VlpBlip2...` models.

    Args:
        vision_config: a `VlpBlipViTConfig`, `VlpViTConfig`, `VlpModifiedResNetConfig` or `VlpSiglipViTConfig`, or a
            `VlpVisionTowerConfig` for any image encoder of transformers; or a dict of its fields, in which "model_type"
            selects the class (default: `VlpBlipViTConfig`). If None, the paper's EVA-CLIP ViT-g without its last layer.
        qformer_config: a `VlpQFormerConfig` or a dict of its fields. If a dict or None, `encoder_hidden_size` defaults
            to the width of the image tower.
        text_config: configuration of the language model; None in stage 1, which has no language model.
        num_query_tokens: number of learned queries.
        image_text_hidden_size: width of the shared image-text embedding space (ITC).
        temperature_init_value: initial temperature of the ITC similarities, at least 0 and below 1.
        vision_norm_eps: epsilon of the LayerNorm between the image tower and the Q-Former.
        freeze_vision: do not train the image tower and keep it in evaluation mode.
        language_model_name_or_path: hub name or folder from which the language model is loaded, or "package:NAME" for
            the folder of the installed Python package NAME.
        language_model_file: GGUF file in that repository or folder, if the weights are in GGUF format.
        language_model_revision: branch, tag or commit on the hub.
        num_prefix_words: if 0, the prefix of the language model is the projected queries, as in the paper; otherwise,
            each of its vectors is the embedding of one of this many words, plus an offset (see `PrefixWords`).
        num_prefix_pairs: number of pairs of these words that may follow each other; 0 for no such limit.
        num_prefix_repeats: how often the prefix is repeated; 1 in the paper.
        store_language_model: save the language model's weights in this model's checkpoint, as transformers' Blip2 does.
        tie_word_embeddings: share the input and output word embeddings of stage 1, as in BERT.

    Raises:
        ValueError: if a value is out of range, or the Q-Former does not fit the width of the image tower.
    """

    model_type = "vlp_blip2"
    sub_configs = {"vision_config": AutoConfig, "qformer_config": VlpQFormerConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    temperature_init_value: float = 0.07
    vision_norm_eps: float = 1e-5
    freeze_vision: bool = True
    language_model_name_or_path: str | None = None
    language_model_file: str | None = None
    language_model_revision: str | None = None
    num_prefix_words: int = 0
    num_prefix_pairs: int = 0
    num_prefix_repeats: int = 1
    store_language_model: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        require_positive(self, "num_query_tokens", "image_text_hidden_size", "vision_norm_eps", "num_prefix_repeats")
        for name in ("num_prefix_words", "num_prefix_pairs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        require_fraction(self, "temperature_init_value")
        vision = self.vision_config
        if vision is None:
            vision = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "patch_size": 14,
                      "num_attention_heads": 16, "final_norm": False}  # fmt: skip
        # A ResNet has its own projection, in its attention pooling, which may have any width.
        own_dim = vision.get("projection_dim") if isinstance(vision, dict) else getattr(vision, "projection_dim", None)
        self.vision_config = vision_config_from(vision, TOWERS, own_dim or self.image_text_hidden_size, self)
        width = states_size(self.vision_config)
        self.qformer_config = config_from(
            self.qformer_config, (VlpQFormerConfig,), "qformer_config", self, {"encoder_hidden_size": width}
        )
        require_width(self, "Q-Former", self.qformer_config.encoder_hidden_size, width)
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.is_encoder_decoder = self.text_config is not None and bool(self.text_config.is_encoder_decoder)
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The configuration of what reads and writes text: the language model in stage 2, the Q-Former in stage 1."""
        if self.text_config is None:
            return self.qformer_config
        return super().get_text_config(decoder=decoder, encoder=encoder)


class VlpInstructBlipConfig(VlpBlip2Config):
    """Configuration of InstructBLIP, whose Q-Former also reads the instruction. Arguments: as for `VlpBlip2Config`."""

    model_type = "vlp_instructblip"
