"""vlp: pre-train, fine-tune and publish vision-language models inside the Hugging Face ecosystem.

Importing the package registers its models with transformers' Auto classes and pipelines.
"""

from . import architectures
from .configuration.blip import VlpBlipConfig
from .configuration.blip2 import VlpBlip2Config
from .configuration.clip import VlpClipConfig
from .configuration.text import VlpBlipTextConfig, VlpClipTextConfig, VlpQFormerConfig, VlpSiglipTextConfig
from .configuration.vision import VlpBlipViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpViTConfig
from .modeling_vlp.blip import VlpBlipForImageTextRetrieval, VlpBlipForPreTraining
from .modeling_vlp.blip2 import VlpBlip2ForImageTextRetrieval, VlpBlip2ForPreTraining
from .modeling_vlp.blip2_generation import VlpBlip2ForConditionalGeneration
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

architectures.register()
