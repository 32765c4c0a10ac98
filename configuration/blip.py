"""Configuration of BLIP: an image tower and a text model (MED) that cross-attends to the image."""

from transformers import AutoConfig, PreTrainedConfig

from .checks import config_from, require_choice, require_fraction, require_positive, require_width
from .text import VlpBlipTextConfig
from .towers import VlpVisionTowerConfig, states_size
from .vision import VlpBlipViTConfig, VlpModifiedResNetConfig, vision_config_from

VISION = (VlpBlipViTConfig, VlpModifiedResNetConfig, VlpVisionTowerConfig)
ITM_POOLING = ("cls", "mean")


class VlpBlipConfig(PreTrainedConfig):
    """Configuration of the `VlpBlip...` models.

    Args:
        vision_config: a `VlpBlipViTConfig`, a `VlpModifiedResNetConfig`, or a `VlpVisionTowerConfig` for any image
            encoder of transformers; or a dict of its fields, in which "model_type" selects the class (default:
            `VlpBlipViTConfig`).
        text_config: a `VlpBlipTextConfig` or a dict of its fields. If a dict or None, `encoder_hidden_size` defaults to
            the width of the image tower.
        image_text_hidden_size: width of the shared image-text embedding space (ITC).
        vision_projection_hidden_size: width of a hidden layer in the image's projection to that space; None: the
            projection is linear, as in the paper.
        projection_dropout: dropout probability (0 to 1) in the image's projection, which then begins with a LayerNorm,
            as one with a hidden layer does; for small data on a locked image tower.
        itm_pooling: what the matching head (ITM) reads: "cls", the text's first position, [Encode], as in the paper; or
            "mean", the mean over the text's positions, as BLIP-2's head reads the mean over its queries. In a text
            model with few layers, one position cannot compare every word with the image.
        temperature_init_value: initial temperature of the ITC similarities.
        tie_word_embeddings: share the input and output word embeddings, as in BERT.

    Raises:
        ValueError: if a value is out of range, or the text model does not fit the width of the image tower.

    Example:
        >>> config = VlpBlipConfig(vision_config={"image_size": 384})
    """

    model_type = "vlp_blip"
    sub_configs = {"vision_config": AutoConfig, "text_config": VlpBlipTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_text_hidden_size: int = 256
    vision_projection_hidden_size: int | None = None
    projection_dropout: float = 0.0
    itm_pooling: str = "cls"
    temperature_init_value: float = 0.07
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        require_positive(self, "image_text_hidden_size", "temperature_init_value")
        if self.vision_projection_hidden_size is not None:
            require_positive(self, "vision_projection_hidden_size")
        require_fraction(self, "projection_dropout")
        require_choice(self, "itm_pooling", ITM_POOLING)
        self.vision_config = vision_config_from(self.vision_config, VISION, self.image_text_hidden_size, self)
        width = states_size(self.vision_config)
        fields = {"encoder_hidden_size": width}
        self.text_config = config_from(self.text_config, (VlpBlipTextConfig,), "text_config", self, fields)
        require_width(self, "text model", self.text_config.encoder_hidden_size, width)
        super().__post_init__(**kwargs)
