"""Tables of the model types and architectures of vlp; registration, loading and model cards are derived from them."""

from dataclasses import dataclass

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration.blip import VlpBlipConfig
from .configuration.blip2 import VlpBlip2Config, VlpInstructBlipConfig
from .configuration.clip import VlpClipConfig
from .configuration.text import VlpBlipTextConfig, VlpClipTextConfig, VlpQFormerConfig, VlpSiglipTextConfig
from .configuration.towers import VlpTextTowerConfig, VlpVisionTowerConfig
from .configuration.vision import VlpBlipViTConfig, VlpModifiedResNetConfig, VlpSiglipViTConfig, VlpViTConfig
from .modeling_vlp.blip import VlpBlipForImageTextRetrieval, VlpBlipForPreTraining
from .modeling_vlp.blip2 import VlpBlip2ForImageTextRetrieval, VlpBlip2ForPreTraining
from .modeling_vlp.blip2_generation import VlpBlip2ForConditionalGeneration
from .modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from .modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering, VlpBlipForVisualReasoning
from .modeling_vlp.clip import VlpClipModel
from .modeling_vlp.instructblip import VlpInstructBlipForConditionalGeneration
from .processing.blip import VlpBlipImageProcessor, VlpBlipProcessor
from .processing.blip2 import VlpBlip2Processor, VlpInstructBlipProcessor
from .processing.clip import VlpClipImageProcessor, VlpClipProcessor
from .processing.naflex import VlpNaflexImageProcessor
from .processing.tokenizer import VlpClipTokenizer

# The public names of vlp: `from vlp import VlpClipModel`.
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
    "VlpInstructBlipConfig",
    "VlpInstructBlipForConditionalGeneration",
    "VlpInstructBlipProcessor",
    "VlpModifiedResNetConfig",
    "VlpNaflexImageProcessor",
    "VlpQFormerConfig",
    "VlpSiglipTextConfig",
    "VlpSiglipViTConfig",
    "VlpTextTowerConfig",
    "VlpViTConfig",
    "VlpVisionTowerConfig",
]

PIPELINE = "vlp.processing.pipeline.VlpZeroShotImageClassificationPipeline"  # by name, to import it only when used
USES = ("embed", "match", "rerank", "caption", "answer", "reason")


@dataclass(frozen=True)
class ModelType:
    """A configuration, and the classes that prepare its inputs."""

    config: type[PreTrainedConfig]
    processor: type[ProcessorMixin]
    image_processor: type
    tokenizer: type


@dataclass(frozen=True)
class Card:
    """The parts of a model card that all models of an architecture share.

    Attributes:
        text: what the model is.
        usage: Python code that uses the model, with the placeholder {folder}.
        pipeline_tag: the Hub's task.
        tag: the Hub's tag for the model family.
        examples: what the figure with examples shows.
    """

    text: str
    usage: str
    pipeline_tag: str
    tag: str
    examples: str = ""


@dataclass(frozen=True)
class Architecture:
    """A model class.

    Attributes:
        model: the class.
        uses: for each of USES that a checkpoint of this architecture supports, the class to load it with.
        card: the fixed parts of its model card.
        auto: the Auto classes that load it by its configuration.
        peer: the name of transformers' class with the same architecture; None if there is none.
    """

    model: type[PreTrainedModel]
    uses: dict[str, type[PreTrainedModel]]
    card: Card
    auto: tuple[type, ...] = ()
    peer: str | None = None


MODEL_TYPES = [
    ModelType(VlpClipConfig, VlpClipProcessor, VlpClipImageProcessor, VlpClipTokenizer),
    ModelType(VlpBlipConfig, VlpBlipProcessor, VlpBlipImageProcessor, PreTrainedTokenizerFast),
    ModelType(VlpBlip2Config, VlpBlip2Processor, VlpBlipImageProcessor, PreTrainedTokenizerFast),
    ModelType(VlpInstructBlipConfig, VlpInstructBlipProcessor, VlpBlipImageProcessor, PreTrainedTokenizerFast),
]
TOWERS = (
    VlpViTConfig, VlpSiglipViTConfig, VlpBlipViTConfig, VlpModifiedResNetConfig,
    VlpClipTextConfig, VlpSiglipTextConfig, VlpBlipTextConfig, VlpQFormerConfig, VlpVisionTowerConfig,
    VlpTextTowerConfig,
)  # fmt: skip


def load_and_use(architecture: str, inputs: str, use: str, processor: str = "VlpBlipProcessor") -> str:
    """Python code for a model card: load a model with its processor, prepare inputs and use the model.

    Args:
        architecture: the name of the model class.
        inputs: the arguments of the processor, as code.
        use: the lines that use the model and its `inputs`.
        processor: the name of the processor class.

    Returns:
        The code, with the placeholder {folder}.
    """
    return f"""\
from PIL import Image
from vlp import {architecture}, {processor}

processor = {processor}.from_pretrained("{{folder}}")
model = {architecture}.from_pretrained("{{folder}}")
inputs = processor({inputs}, return_tensors="pt")
{use}
"""


CLASSIFY = """\
import vlp
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{folder}")
classify("picture.png", candidate_labels=["a cat", "a dog", "a rocket"])
"""
CAPTION = load_and_use(
    "VlpBlipForConditionalGeneration",
    'images=Image.open("picture.png")',
    "print(processor.decode_texts(model.generate(**inputs, num_beams=3)))",
)
CAPTIONS = "with their names and, below, the captions that the model generates; green if correct"
MATCHES = "with their names and, below, the top three matches; green if correct"
CONTINUATIONS = "with their names and, below, the generated text{prompts}; green if correct"


def match_texts(architecture: str) -> str:
    """Python code for a model card that matches texts with an image."""
    return load_and_use(
        architecture,
        'images=[Image.open("picture.png")], text=["a cat", "a dog", "a rocket"]',
        "print(model(**inputs).itm_logits.softmax(dim=-1)[:, 1])  # the probability that each text matches the picture",
    )


def continue_prompt(architecture: str, processor: str) -> str:
    """Python code for a model card that continues a prompt about an image, with the placeholder {prompt}."""
    return load_and_use(
        architecture,
        'images=Image.open("picture.png"), text="{prompt}"',
        "print(processor.decode_texts(model.generate(**inputs, max_new_tokens=20)))",
        processor,
    )


ARCHITECTURES = [
    Architecture(
        VlpClipModel,
        uses={"embed": VlpClipModel},
        auto=(AutoModel, AutoModelForZeroShotImageClassification),
        peer="CLIPModel",
        card=Card(
            text="A CLIP model (image tower and text tower in one embedding space)",
            usage=CLASSIFY,
            examples="with the model's top three names; green if correct",
            pipeline_tag="zero-shot-image-classification",
            tag="clip",
        ),
    ),
    Architecture(
        VlpBlipForPreTraining,
        uses={
            "embed": VlpBlipForImageTextRetrieval,
            "match": VlpBlipForImageTextRetrieval,
            "rerank": VlpBlipForPreTraining,
            "caption": VlpBlipForConditionalGeneration,
        },
        auto=(AutoModel,),
        card=Card(
            text="A BLIP model (embeds images and texts in one space, matches them, and generates captions)",
            usage=CAPTION,
            examples=CAPTIONS,
            pipeline_tag="image-to-text",
            tag="blip",
        ),
    ),
    Architecture(
        VlpBlipForConditionalGeneration,
        uses={"caption": VlpBlipForConditionalGeneration},
        auto=(AutoModelForImageTextToText, AutoModelForMultimodalLM),
        peer="BlipForConditionalGeneration",
        card=Card(
            text="A BLIP model that generates captions of images",
            usage=CAPTION,
            examples=CAPTIONS,
            pipeline_tag="image-to-text",
            tag="blip",
        ),
    ),
    Architecture(
        VlpBlipForImageTextRetrieval,
        uses={"embed": VlpBlipForImageTextRetrieval, "match": VlpBlipForImageTextRetrieval},
        peer="BlipForImageTextRetrieval",
        card=Card(
            text="A BLIP model for image-text retrieval, by embeddings (ITC) and by matching (ITM)",
            usage=match_texts("VlpBlipForImageTextRetrieval"),
            examples=MATCHES,
            pipeline_tag="zero-shot-image-classification",
            tag="blip",
        ),
    ),
    Architecture(
        VlpBlipForQuestionAnswering,
        uses={"answer": VlpBlipForQuestionAnswering},
        peer="BlipForQuestionAnswering",
        card=Card(
            text="A BLIP model that answers questions about images",
            usage=load_and_use(
                "VlpBlipForQuestionAnswering",
                'images=Image.open("picture.png"), text="what colour is it?"',
                "print(processor.decode_texts(model.generate(**inputs, num_beams=3)))",
            ),
            examples="with a question, a reference answer and, below, the generated one; green if correct",
            pipeline_tag="visual-question-answering",
            tag="blip",
        ),
    ),
    Architecture(
        VlpBlipForVisualReasoning,
        uses={"reason": VlpBlipForVisualReasoning},
        card=Card(
            text="A BLIP model that decides whether a sentence is true of two images",
            usage=load_and_use(
                "VlpBlipForVisualReasoning",
                'images=[Image.open("left.png"), Image.open("right.png")], text=["both are red"]',
                """\
pair = inputs["pixel_values"][None]  # one sentence and its two images
print(model(inputs["input_ids"], pair).logits.softmax(dim=-1)[:, 1])  # the probability that the sentence is true""",
            ),
            examples="with a sentence about both and, below, whether the model calls it true; green if that is correct",
            pipeline_tag="visual-question-answering",
            tag="blip",
        ),
    ),
    Architecture(
        VlpBlip2ForPreTraining,
        uses={"embed": VlpBlip2ForImageTextRetrieval, "match": VlpBlip2ForImageTextRetrieval},
        auto=(AutoModel,),
        peer="Blip2ForImageTextRetrieval",
        card=Card(
            text="A BLIP-2 model after stage 1 (a Q-Former on a frozen image tower, trained with ITC, ITM and LM)",
            usage=match_texts("VlpBlip2ForImageTextRetrieval"),
            examples=MATCHES,
            pipeline_tag="zero-shot-image-classification",
            tag="blip-2",
        ),
    ),
    Architecture(
        VlpBlip2ForImageTextRetrieval,
        uses={"embed": VlpBlip2ForImageTextRetrieval, "match": VlpBlip2ForImageTextRetrieval},
        peer="Blip2ForImageTextRetrieval",
        card=Card(
            text="A BLIP-2 model for image-text retrieval, by embeddings (ITC) and by matching (ITM)",
            usage=match_texts("VlpBlip2ForImageTextRetrieval"),
            examples=MATCHES,
            pipeline_tag="zero-shot-image-classification",
            tag="blip-2",
        ),
    ),
    Architecture(
        VlpBlip2ForConditionalGeneration,
        uses={"caption": VlpBlip2ForConditionalGeneration, "answer": VlpBlip2ForConditionalGeneration},
        auto=(AutoModelForImageTextToText, AutoModelForMultimodalLM),
        peer="Blip2ForConditionalGeneration",
        card=Card(
            text="A BLIP-2 model (a Q-Former between a frozen image tower and a frozen language model)",
            usage=continue_prompt("VlpBlip2ForConditionalGeneration", "VlpBlip2Processor"),
            examples=CONTINUATIONS,
            pipeline_tag="image-text-to-text",
            tag="blip-2",
        ),
    ),
    Architecture(
        VlpInstructBlipForConditionalGeneration,
        uses={"caption": VlpInstructBlipForConditionalGeneration, "answer": VlpInstructBlipForConditionalGeneration},
        auto=(AutoModelForImageTextToText, AutoModelForMultimodalLM),
        peer="InstructBlipForConditionalGeneration",
        card=Card(
            text="An InstructBLIP model (a BLIP-2 whose Q-Former reads the instruction, too)",
            usage=continue_prompt("VlpInstructBlipForConditionalGeneration", "VlpInstructBlipProcessor"),
            examples=CONTINUATIONS,
            pipeline_tag="image-text-to-text",
            tag="instructblip",
        ),
    ),
]


def architecture(name: str) -> Architecture:
    """The row of an architecture.

    Args:
        name: the name of its model class.

    Raises:
        KeyError: if there is no such architecture; the message lists the known ones.
    """
    rows = {row.model.__name__: row for row in ARCHITECTURES}
    if name not in rows:
        raise KeyError(f"{name} is not an architecture of vlp; choose from {', '.join(rows)}.")
    return rows[name]


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The row of a model's class, or of its nearest base class.

    Raises:
        KeyError: if none of them is an architecture of vlp.
    """
    rows = {row.model: row for row in ARCHITECTURES}
    found = next((rows[kind] for kind in type(model).__mro__ if kind in rows), None)
    return found or architecture(type(model).__name__)


def add(row: Architecture, model_type: ModelType | None = None) -> None:
    """Add an architecture of your own, with its model type if that is new, and register both.

    Args:
        row: the new architecture.
        model_type: its configuration and processor; None if vlp has its model type already.
    """
    if model_type is not None:
        MODEL_TYPES.append(model_type)
        AutoConfig.register(model_type.config.model_type, model_type.config)
        register_model_type(model_type)
    ARCHITECTURES.append(row)
    register_architecture(row)


def register_model_type(row: ModelType) -> None:
    """Register a processor and its parts for a configuration."""
    AutoProcessor.register(row.config, row.processor)
    register_image_processor(row.config, row.image_processor)
    AutoTokenizer.register(row.config, tokenizer_class=row.tokenizer)


def register_image_processor(config: type[PreTrainedConfig], image_processor: type) -> None:
    """Register an image processor for a configuration; the same serves all backends."""
    AutoImageProcessor.register(
        config, image_processor_classes={"torchvision": image_processor, "pil": image_processor}
    )


def register_architecture(row: Architecture) -> None:
    """Register a model with its Auto classes."""
    for auto in row.auto:
        auto.register(row.model.config_class, row.model)
    if AutoModelForZeroShotImageClassification in row.auto:
        # The pipeline looks up model names in this table and logs an error for a class that is not listed.
        names = MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
        names[row.model.config_class.model_type] = row.model.__name__


def register() -> None:
    """Register all configurations, models and processors with transformers' Auto classes and pipelines."""
    PIPELINE_REGISTRY.supported_tasks["zero-shot-image-classification"]["impl"] = PIPELINE
    for config in (*TOWERS, *(row.config for row in MODEL_TYPES)):
        AutoConfig.register(config.model_type, config)
    for row in MODEL_TYPES:
        register_model_type(row)
    register_image_processor(VlpViTConfig, VlpNaflexImageProcessor)  # a CLIP's, if it keeps the shape of images
    for row in ARCHITECTURES:
        register_architecture(row)
