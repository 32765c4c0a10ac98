"""BLIP-2: a frozen image tower, a Q-Former that reads it, and a frozen language model that writes."""

from transformers import AutoConfig, PreTrainedConfig

from .checks import require_fraction, require_positive
from .text import VlpQFormerConfig
from .vision import VlpBlipViTConfig, VlpModifiedResNetConfig, VlpViTConfig, vision_config_from

TOWERS = (VlpBlipViTConfig, VlpViTConfig, VlpModifiedResNetConfig)


class VlpBlip2Config(PreTrainedConfig):
    """Configuration of the `VlpBlip2...` models.

    Args:
        vision_config: a `VlpBlipViTConfig`, `VlpViTConfig` or `VlpModifiedResNetConfig`, or the dict of one (its
            "model_type" tells which; EVA-CLIP ViT-g without its last layer, the paper's, where nothing is given).
        qformer_config: a `VlpQFormerConfig` or the dict of one; its `encoder_hidden_size` is the image tower's width
            where it is not given.
        text_config: the language model's own configuration; None in stage 1, which has none.
        num_query_tokens: learned queries.
        image_text_hidden_size: width of the space in which images and texts are compared (ITC).
        temperature_init_value: first temperature of that comparison.
        vision_norm_eps: epsilon of the LayerNorm between the tower and the Q-Former.
        freeze_vision: the image tower is not trained, and stays in evaluation mode.
        language_model_name_or_path: hub name or folder of the language model, or "package:NAME" for a folder that a
            Python package is; its weights are fetched from there.
        language_model_file: the GGUF file in it, where it is one.
        language_model_revision: branch, tag or commit on the hub.
        store_language_model: keep its weights in this model's own checkpoint, as transformers' Blip2 does.
        tie_word_embeddings: what stage 1 reads and what it writes have the same word embeddings, as in BERT.
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
    store_language_model: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        require_positive(self, "num_query_tokens", "image_text_hidden_size", "vision_norm_eps")
        require_fraction(self, "temperature_init_value")
        given = self.vision_config
        if given is None:
            given = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "patch_size": 14,
                     "num_attention_heads": 16, "final_norm": False}  # fmt: skip
        own = given.get("projection_dim") if isinstance(given, dict) else getattr(given, "projection_dim", None)
        # A ResNet's own projection is part of its attention pooling, and of whatever width.
        self.vision_config = vision_config_from(given, TOWERS, own or self.image_text_hidden_size, self)
        width = self.vision_config.hidden_size
        if not isinstance(self.qformer_config, PreTrainedConfig):
            self.qformer_config = VlpQFormerConfig(**({"encoder_hidden_size": width} | (self.qformer_config or {})))
        if self.qformer_config.encoder_hidden_size != width:
            raise ValueError(
                f"VlpBlip2Config: the Q-Former reads vectors {self.qformer_config.encoder_hidden_size} wide, the image "
                f"tower gives {width}: leave out encoder_hidden_size."
            )
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        super().__post_init__(**kwargs)
