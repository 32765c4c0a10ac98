"""vlp: pre-train, fine-tune and publish vision-language models inside the Hugging Face ecosystem.

Importing the package registers its models with transformers' Auto classes and pipelines.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from .configuration import (
    VlpBlipConfig,
    VlpBlipTextConfig,
    VlpBlipViTConfig,
    VlpClipConfig,
    VlpClipTextConfig,
    VlpModifiedResNetConfig,
    VlpViTConfig,
)
from .modeling_vlp.blip import VlpBlipForImageTextRetrieval, VlpBlipForPreTraining
from .modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from .modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering, VlpBlipForVisualReasoning
from .modeling_vlp.clip import VlpClipModel
from .processing.blip import VlpBlipImageProcessor, VlpBlipProcessor
from .processing.clip import VlpClipImageProcessor, VlpClipProcessor
from .processing.tokenizer import VlpClipTokenizer

__version__ = "0.1.0"
__all__ = [
    "VlpBlipConfig",
    "VlpBlipForConditionalGeneration",
    "VlpBlipForImageTextRetrieval",
    "VlpBlipForPreTraining",
    "VlpBlipForQuestionAnswering",
    "VlpBlipForVisualReasoning",
    "VlpBlipImageProcessor",
    "VlpBlipProcessor",
    "VlpBlipTextConfig",
    "VlpBlipViTConfig",
    "VlpClipConfig",
    "VlpClipImageProcessor",
    "VlpClipModel",
    "VlpClipProcessor",
    "VlpClipTextConfig",
    "VlpClipTokenizer",
    "VlpModifiedResNetConfig",
    "VlpViTConfig",
]

for _config in (
    VlpBlipConfig,
    VlpBlipTextConfig,
    VlpBlipViTConfig,
    VlpClipConfig,
    VlpClipTextConfig,
    VlpModifiedResNetConfig,
    VlpViTConfig,
):
    AutoConfig.register(_config.model_type, _config)
AutoModel.register(VlpClipConfig, VlpClipModel)
AutoModel.register(VlpBlipConfig, VlpBlipForPreTraining)
AutoModelForImageTextToText.register(VlpBlipConfig, VlpBlipForConditionalGeneration)
AutoModelForZeroShotImageClassification.register(VlpClipConfig, VlpClipModel)
AutoProcessor.register(VlpBlipConfig, VlpBlipProcessor)
AutoProcessor.register(VlpClipConfig, VlpClipProcessor)
# There is one image processor, exact, whatever backend is asked for.
for _config, _images in ((VlpBlipConfig, VlpBlipImageProcessor), (VlpClipConfig, VlpClipImageProcessor)):
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": _images, "pil": _images})
AutoTokenizer.register(VlpBlipConfig, tokenizer_class=PreTrainedTokenizerFast)
AutoTokenizer.register(VlpClipConfig, tokenizer_class=VlpClipTokenizer)
# The pipeline looks its models up by name in this table and logs an error for a class that is not there.
MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[VlpClipConfig.model_type] = VlpClipModel.__name__
