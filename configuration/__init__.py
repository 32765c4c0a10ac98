"""Configuration classes of the models and their parts."""

from .blip import VlpBlipConfig
from .blip2 import VlpBlip2Config
from .clip import VlpClipConfig
from .text import VlpBlipTextConfig, VlpClipTextConfig, VlpQFormerConfig, VlpSiglipTextConfig
from .vision import VlpBlipViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpViTConfig

__all__ = [
    "VlpBlip2Config",
    "VlpBlipConfig",
    "VlpBlipTextConfig",
    "VlpBlipViTConfig",
    "VlpClipConfig",
    "VlpClipTextConfig",
    "VlpModifiedResNetConfig",
    "VlpQFormerConfig",
    "VlpSiglipTextConfig",
    "VlpSiglipViTConfig",
    "VlpViTConfig",
]
