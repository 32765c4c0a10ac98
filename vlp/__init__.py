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

from .configuration.blip import VlpBlipConfig
from .configuration.blip2 import VlpBlip2Config
from .configuration.clip import VlpClipConfig
from .configuration.text import VlpBlipTextConfig, VlpClipTextConfig, VlpQFormerConfig, VlpSiglipTextConfig
from .configuration.vision import VlpBlipViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpViTConfig
from .modeling_vlp.blip import VlpBlipForImageTextRetrieval, VlpBlipForPreTraining
from .modeling_vlp.blip2 import VlpBlip2ForImageTextRetrieval, VlpBlip2ForPreTraining
from .modeling_vlp.blip2_writer import VlpBlip2ForConditionalGeneration
from .modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from .modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering, VlpBlipForVisualReasoning
from .modeling_vlp.clip import VlpClipModel
from .processing.blip import VlpBlipImageProcessor, VlpBlipProcessor
from .processing.blip2 import VlpBlip2Processor
from .processing.clip import VlpClipImageProcessor, VlpClipProcessor
from .processing.tokenizer import VlpClipTokenizer

__version__ = "0.1.0"
__all__ = [
    "VlpBlip2Config",
    "VlpBlip2ForConditionalGeneration",
    "VlpBlip2ForImageTextRetrieval",
    "VlpBlip2ForPreTraining",
    "VlpBlip2Processor",
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
    "VlpQFormerConfig",
    "VlpSiglipTextConfig",
    "VlpSiglipViTConfig",
    "VlpViTConfig",
]

for _config in (
    VlpBlip2Config,
    VlpBlipConfig,
    VlpBlipTextConfig,
    VlpBlipViTConfig,
    VlpClipConfig,
    VlpClipTextConfig,
    VlpModifiedResNetConfig,
    VlpQFormerConfig,
    VlpSiglipTextConfig,
    VlpSiglipViTConfig,
    VlpViTConfig,
):
    AutoConfig.register(_config.model_type, _config)
AutoModel.register(VlpClipConfig, VlpClipModel)
AutoModel.register(VlpBlipConfig, VlpBlipForPreTraining)
AutoModel.register(VlpBlip2Config, VlpBlip2ForPreTraining)
AutoModelForImageTextToText.register(VlpBlipConfig, VlpBlipForConditionalGeneration)
AutoModelForImageTextToText.register(VlpBlip2Config, VlpBlip2ForConditionalGeneration)
AutoModelForZeroShotImageClassification.register(VlpClipConfig, VlpClipModel)
AutoProcessor.register(VlpBlipConfig, VlpBlipProcessor)
AutoProcessor.register(VlpBlip2Config, VlpBlip2Processor)
AutoProcessor.register(VlpClipConfig, VlpClipProcessor)
# There is one image processor, exact, whatever backend is asked for.
for _config, _images in (
    (VlpBlipConfig, VlpBlipImageProcessor),
    (VlpBlip2Config, VlpBlipImageProcessor),
    (VlpClipConfig, VlpClipImageProcessor),
):
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": _images, "pil": _images})
AutoTokenizer.register(VlpBlipConfig, tokenizer_class=PreTrainedTokenizerFast)
AutoTokenizer.register(VlpBlip2Config, tokenizer_class=PreTrainedTokenizerFast)
AutoTokenizer.register(VlpClipConfig, tokenizer_class=VlpClipTokenizer)
# The pipeline looks its models up by name in this table and logs an error for a class that is not there.
MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[VlpClipConfig.model_type] = VlpClipModel.__name__
