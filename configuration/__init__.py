"""What a model is: one dataclass-style configuration each."""

from .blip import VlpBlipConfig
from .clip import VlpClipConfig
from .text import VlpBlipTextConfig, VlpClipTextConfig
from .vision import VlpBlipViTConfig, VlpModifiedResNetConfig, VlpViTConfig

__all__ = [
    "VlpBlipConfig",
    "VlpBlipTextConfig",
    "VlpBlipViTConfig",
    "VlpClipConfig",
    "VlpClipTextConfig",
    "VlpModifiedResNetConfig",
    "VlpViTConfig",
]
