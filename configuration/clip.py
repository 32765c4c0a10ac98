"""Configuration of CLIP: an image tower, a text tower and a shared embedding space."""

import math

from transformers import AutoConfig, PreTrainedConfig

from .checks import config_from, require_finite, require_fraction, require_positive
from .text import VlpClipTextConfig, VlpSiglipTextConfig
from .towers import VlpTextTowerConfig, VlpVisionTowerConfig
from .vision import VlpBlipViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpViTConfig, vision_config_from

VISION = (VlpViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpBlipViTConfig, VlpVisionTowerConfig)
TEXT = (VlpClipTextConfig, VlpSiglipTextConfig, VlpTextTowerConfig)


class VlpClipConfig(PreTrainedConfig):
    """Configuration of a `VlpClipModel`.

    Args:
        vision_config: a `VlpViTConfig`, `VlpModifiedResNetConfig`, `VlpSiglipViTConfig`, `VlpBlipViTConfig`, or a
            `VlpVisionTowerConfig` for any image encoder of transformers; or a dict of its fields, in which "model_type"
            selects the class (default: `VlpViTConfig`).
        text_config: a `VlpClipTextConfig`, `VlpSiglipTextConfig`, or a `VlpTextTowerConfig` for any text encoder of
            transformers; or a dict of its fields, in which "model_type" selects the class (default:
            `VlpClipTextConfig`).
        projection_dim: width of the shared embedding space; with SigLIP's image tower, it must equal the tower's width.
        visual_projection_hidden_size, text_projection_hidden_size: width of a hidden layer in the projection; None: the
            projection is linear, as in CLIP. A ResNet and SigLIP's image tower project in their pooling instead.
        projection_dropout: dropout probability (0 to 1) in the projections, which then begin with a LayerNorm, as those
            with a hidden layer do; for small data on locked towers.
        logit_scale_init_value: natural logarithm of the initial logit scale: ln(1/0.07) for CLIP, ln(10) for SigLIP.
        logit_bias_init_value: initial bias of the sigmoid loss (-10 for SigLIP); None for a model without a bias.
        embedding_sizes: Matryoshka embeddings: shorter sizes that the embeddings were trained for, besides
            `projection_dim`: the first dimensions, normalised again, are embeddings too. None: no other size.

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
    visual_projection_hidden_size: int | None = None
    text_projection_hidden_size: int | None = None
    projection_dropout: float = 0.0
    logit_scale_init_value: float = math.log(1 / 0.07)
    logit_bias_init_value: float | None = None
    embedding_sizes: list[int] | None = None

    def __post_init__(self, **kwargs):
        require_positive(self, "projection_dim")
        for name in ("visual_projection_hidden_size", "text_projection_hidden_size"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require_fraction(self, "projection_dropout")
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
        sizes = self.embedding_sizes
        if sizes is not None and not (
            isinstance(sizes, (list, tuple)) and all(type(size) is int and 1 <= size < width for size in sizes)
        ):
            raise ValueError(
                f"VlpClipConfig: embedding_sizes must be whole numbers from 1 to {width - 1} (below projection_dim), "
                f"got {sizes!r}."
            )
        self.text_config = config_from(self.text_config, TEXT, "text_config", self)
        super().__post_init__(**kwargs)
