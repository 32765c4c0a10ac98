"""vlp: pre-train, fine-tune and publish vision-language models inside the Hugging Face ecosystem.

Importing the package registers its models with transformers' Auto classes and pipelines.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from .configuration import VlpClipConfig, VlpClipTextConfig, VlpModifiedResNetConfig, VlpViTConfig
from .modeling_vlp.clip import VlpClipModel
from .processing.clip import VlpClipImageProcessor, VlpClipProcessor
from .processing.tokenizer import VlpClipTokenizer

__version__ = "0.1.0"
__all__ = [
    "VlpClipConfig",
    "VlpClipImageProcessor",
    "VlpClipModel",
    "VlpClipProcessor",
    "VlpClipTextConfig",
    "VlpClipTokenizer",
    "VlpModifiedResNetConfig",
    "VlpViTConfig",
]

for _config in (VlpClipConfig, VlpClipTextConfig, VlpModifiedResNetConfig, VlpViTConfig):
    AutoConfig.register(_config.model_type, _config)
AutoModel.register(VlpClipConfig, VlpClipModel)
AutoModelForZeroShotImageClassification.register(VlpClipConfig, VlpClipModel)
AutoProcessor.register(VlpClipConfig, VlpClipProcessor)
# There is one image processor, exact, whatever backend is asked for.
AutoImageProcessor.register(
    VlpClipConfig, image_processor_classes={"torchvision": VlpClipImageProcessor, "pil": VlpClipImageProcessor}
)
AutoTokenizer.register(VlpClipConfig, tokenizer_class=VlpClipTokenizer)
# The pipeline looks its models up by name in this table and logs an error for a class that is not there.
MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[VlpClipConfig.model_type] = VlpClipModel.__name__
