"""BLIP: an image tower, and a mixture of text encoder and decoder that reads it."""

from transformers import AutoConfig, PreTrainedConfig

from .checks import require_positive
from .text import VlpBlipTextConfig
from .vision import VlpBlipViTConfig, VlpModifiedResNetConfig, vision_config_from


class VlpBlipConfig(PreTrainedConfig):
    """Configuration of the `VlpBlip...` models.

    Args:
        vision_config: a `VlpBlipViTConfig`, a `VlpModifiedResNetConfig`, or the dict of one (its "model_type" tells
            which; BLIP's vision transformer where it is missing).
        text_config: a `VlpBlipTextConfig` or the dict of one; its `encoder_hidden_size` is the image tower's width
            where it is not given.
        image_text_hidden_size: width of the space in which images and texts are compared (ITC).
        temperature_init_value: first temperature of that comparison.
        tie_word_embeddings: what is read and what is written have the same word embeddings, as in BERT.

    Example:
        >>> config = VlpBlipConfig(vision_config={"image_size": 384})
    """

    model_type = "vlp_blip"
    sub_configs = {"vision_config": AutoConfig, "text_config": VlpBlipTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_text_hidden_size: int = 256
    temperature_init_value: float = 0.07
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        require_positive(self, "image_text_hidden_size", "temperature_init_value")
        self.vision_config = vision_config_from(
            self.vision_config, (VlpBlipViTConfig, VlpModifiedResNetConfig), self.image_text_hidden_size, self
        )
        if not isinstance(self.text_config, PreTrainedConfig):
            fields = {"encoder_hidden_size": self.vision_config.hidden_size} | (self.text_config or {})
            self.text_config = VlpBlipTextConfig(**fields)
        super().__post_init__(**kwargs)
