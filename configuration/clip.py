"""CLIP: two towers and a shared embedding space."""

import math

from transformers import AutoConfig, PreTrainedConfig

from .checks import require_positive
from .text import VlpClipTextConfig
from .vision import VlpModifiedResNetConfig, VlpViTConfig, vision_config_from


class VlpClipConfig(PreTrainedConfig):
    """Configuration of a `VlpClipModel`.

    Args:
        vision_config: a `VlpViTConfig`, a `VlpModifiedResNetConfig`, or the dict of one (its "model_type" tells which;
            a vision transformer where it is missing).
        text_config: a `VlpClipTextConfig` or the dict of one.
        projection_dim: width of the shared embedding space.
        logit_scale_init_value: natural logarithm of the first scale; ln(1/0.07) for CLIP, ln(10) for SigLIP.
        logit_bias_init_value: first bias of the sigmoid loss (SigLIP: -10); None for a model without a bias.

    Example:
        >>> config = VlpClipConfig(vision_config={"patch_size": 16}, projection_dim=512)
    """

    model_type = "vlp_clip"
    sub_configs = {"vision_config": AutoConfig, "text_config": VlpClipTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float = math.log(1 / 0.07)
    logit_bias_init_value: float | None = None

    def __post_init__(self, **kwargs):
        require_positive(self, "projection_dim")
        self.vision_config = vision_config_from(
            self.vision_config, (VlpViTConfig, VlpModifiedResNetConfig), self.projection_dim, self
        )
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = VlpClipTextConfig(**(self.text_config or {}))
        super().__post_init__(**kwargs)
