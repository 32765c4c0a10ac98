"""What a model is: one dataclass-style configuration each."""

from .clip import VlpClipConfig
from .text import VlpClipTextConfig
from .vision import VlpModifiedResNetConfig, VlpViTConfig

__all__ = ["VlpClipConfig", "VlpClipTextConfig", "VlpModifiedResNetConfig", "VlpViTConfig"]
