"""Configuration of CLIP: an image tower, a text tower and a shared embedding space."""

import math

from transformers import AutoConfig, PreTrainedConfig

from .checks import config_from, require_finite, require_positive
from .text import VlpClipTextConfig, VlpSiglipTextConfig
from .vision import VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpViTConfig, vision_config_from

VISION = (VlpViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig)
TEXT = (VlpClipTextConfig, VlpSiglipTextConfig)


class VlpClipConfig(PreTrainedConfig):
    """Configuration of a `VlpClipModel`.

    Args:
        vision_config: a `VlpViTConfig`, `VlpModifiedResNetConfig` or `VlpSiglipViTConfig`, or a dict of its fields, in
            which "model_type" selects the class (default: `VlpViTConfig`).
        text_config: a `VlpClipTextConfig` or `VlpSiglipTextConfig`, or a dict of its fields, in which "model_type"
            selects the class (default: `VlpClipTextConfig`).
        projection_dim: width of the shared embedding space; with SigLIP's image tower, it must equal the tower's width.
        logit_scale_init_value: natural logarithm of the initial logit scale: ln(1/0.07) for CLIP, ln(10) for SigLIP.
        logit_bias_init_value: initial bias of the sigmoid loss (-10 for SigLIP); None for a model without a bias.

    Raises:
        ValueError: if a value is out of range, or `projection_dim` does not fit the image tower.

    Example:
        >>> config = VlpClipConfig(vision_config={"patch_size": 16}, projection_dim=512)
    """

    model_type = "vlp_clip"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float = math.log(1 / 0.07)
    logit_bias_init_value: float | None = None

    def __post_init__(self, **kwargs):
        require_positive(self, "projection_dim")
        require_finite(self, "logit_scale_init_value")
        self.logit_scale_init_value = float(self.logit_scale_init_value)
        if self.logit_bias_init_value is not None:
            require_finite(self, "logit_bias_init_value")
            self.logit_bias_init_value = float(self.logit_bias_init_value)
        self.vision_config = vision_config_from(self.vision_config, VISION, self.projection_dim, self)
        vision, width = self.vision_config, self.projection_dim
        if vision.model_type == VlpSiglipViTConfig.model_type and vision.hidden_size != width:
            raise ValueError(
                f"VlpClipConfig: SigLIP's image tower has no projection, so projection_dim ({width}) must equal its "
                f"hidden_size ({vision.hidden_size})."
            )
        self.text_config = config_from(self.text_config, TEXT, "text_config", self)
        super().__post_init__(**kwargs)
