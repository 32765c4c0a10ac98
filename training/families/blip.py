"""The BLIP family."""

import json
from dataclasses import dataclass
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor

from ...configuration.blip import VlpBlipConfig
from ...configuration.text import VlpBlipTextConfig
from ...configuration.vision import VlpBlipViTConfig, VlpModifiedResNetConfig
from ...errors import ArgumentError
from ...files import TEACHER_FILE, state_folder
from ...modeling_vlp.blip import VlpBlipForImageTextRetrieval, VlpBlipForPreTraining, VlpBlipPreTrainedModel
from ...modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from ...modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering, VlpBlipForVisualReasoning
from ...processing.blip import VlpBlipImageProcessor, VlpBlipProcessor, load_tokenizer, token_ids, train_tokenizer
from ..arguments import TrainingArguments, option, require_at_least_one, require_share
from ..data.rows import CaptionChooser, caption_texts, texts_of
from ..data.samples import QuestionMaker, ReasoningMaker, SampleMaker
from ..data.sources import require_column, require_text
from ..evaluation.pictures import Pictures
from ..objectives.blip import BlipObjective
from ..objectives.blip_tasks import AnsweringObjective, CaptioningObjective, ReasoningObjective
from ..objectives.momentum import Teacher
from .base import Family, check_fields, evaluation_tasks, extend, require_model_type


@dataclass(kw_only=True)
class BlipArguments(TrainingArguments):
    """BLIP: compare, match and write. The defaults are those of salesforce/BLIP, configs/pretrain.yaml."""

    max_length: int = option(30, "most tokens in a caption, start and end included", bound=True)
    vocab_size: int = option(30524, "entries of the tokenizer trained on the captions, where no tokenizer is named")
    crop_scale: float = option(0.2, "least share (0 to 1) of an image's area that augmentation crop keeps", bound=True)
    horizontal_flip: bool = option(True, "augmentation crop also mirrors half of the images", bound=True)
    random_augment: bool = option(True, "augmentation crop also applies BLIP's RandomAugment(2, 5)", bound=True)
    per_device_train_batch_size: int = option(75, "pairs in a step of each process", bound=True, shown=True)
    learning_rate: float = option(3e-4, "peak learning rate", shown=True)
    weight_decay: float = option(
        0.05, "decay of weight matrices; gains, biases, temperature and positions have none", shown=True
    )
    adam_beta2: float = option(0.999, "second moment's decay", shown=True)
    adam_epsilon: float = option(1e-8, "what AdamW adds to its denominator", shown=True)
    max_grad_norm: float = option(0.0, "gradient norm to clip at; 0 for none", shown=True)
    warmup_steps: int = option(3000, "optimiser steps of linear warm-up", shown=True)
    num_train_epochs: float = option(20.0, "passes over the data, where neither steps nor minutes are given")

    # BLIP
    task: Literal["pretrain", "captioning", "retrieval", "vqa", "nlvr"] = option(
        "pretrain",
        "pretrain (all three losses), captioning, retrieval, vqa (questions) or nlvr (two images)",
        bound=True,
    )
    fine_tune_image_size: int | None = option(
        None, "side of the images to go on with, in pixels; positions are resampled; the model's own where not given"
    )
    answer_column: str = option(
        "answers", "vqa: column with the answers, each as often as given; the caption asks", bound=True
    )
    second_image_column: str = option("second_image", "nlvr: column with the image on the right", bound=True)
    label_column: str = option(
        "label", "nlvr: column with whether the caption is true of both images (or 1, 0)", bound=True
    )
    prompt: str = option(
        "", 'what captions begin with where the task is captioning; the paper: "a picture of "', bound=True, shown=True
    )
    momentum: float = option(0.995, "how much of itself the momentum teacher keeps at each step (0 to 1)", shown=True)
    queue_size: int = option(57600, "pairs whose features the teacher remembers", bound=True, shown=True)
    alpha: float = option(0.4, "the teacher's part (0 to 1) in the targets of the contrastive loss", shown=True)
    alpha_epochs: float = option(2.0, "passes over the data in which alpha grows from 0", shown=True)
    global_negatives: bool = option(
        False, "draw hard negatives from the batches of all processes, not of each one", bound=True, shown=True
    )
    contrastive_share: float = option(
        0.0,
        "share of the run (0 to 1), at its start, that compares alone: for towers that begin from nothing",
        bound=True,
        shown=True,
    )
    rerank_top_k: int = option(128, "candidates of each query that evaluation has matched (ITM) again")
    rerank_posterior: bool = option(
        False, "re-rank by ITC's probability times ITM's odds; else by the original's cosine plus ITM's logit"
    )
    eval_num_beams: int = option(3, "beams of the captions written in evaluation")

    def __post_init__(self):
        super().__post_init__()
        if self.fine_tune_image_size and not self.model_name_or_path:
            raise ArgumentError("--fine_tune_image_size needs --model_name_or_path, the model to go on from.")
        if self.prompt and self.task != "captioning":
            raise ArgumentError(f"--prompt {self.prompt!r} is for --task captioning, not for {self.task}.")
        require_share(self, "momentum", "alpha", "contrastive_share")
        require_at_least_one(self, "queue_size", "rerank_top_k", "eval_num_beams")
        if self.alpha_epochs < 0:
            raise ArgumentError(f"--alpha_epochs must not be negative, got {self.alpha_epochs}.")

    def own_parts(self) -> tuple[str, str] | None:
        kind = {"vqa": VlpBlipForQuestionAnswering, "nlvr": VlpBlipForVisualReasoning}.get(self.task)
        return None if kind is None else (kind.__name__, f"--task {self.task}")


MODELS = {
    "pretrain": VlpBlipForPreTraining,
    "captioning": VlpBlipForConditionalGeneration,
    "retrieval": VlpBlipForImageTextRetrieval,
    "vqa": VlpBlipForQuestionAnswering,
    "nlvr": VlpBlipForVisualReasoning,
}
OBJECTIVES = {"vqa": AnsweringObjective, "nlvr": ReasoningObjective}


def make_processor(arguments: BlipArguments, rows, chooser: CaptionChooser) -> VlpBlipProcessor:
    """The processor of the model gone on from, else one of the image size asked for, its tokenizer named or trained."""
    if arguments.model_name_or_path:
        require_model_type(arguments.model_name_or_path, VlpBlipConfig.model_type)
        return AutoProcessor.from_pretrained(arguments.model_name_or_path)
    images = VlpBlipImageProcessor(size={"height": arguments.image_size, "width": arguments.image_size})
    return VlpBlipProcessor(images, make_tokenizer(arguments, arguments.tokenizer_name, rows, chooser))


def make_tokenizer(arguments: TrainingArguments, name: str | None, rows, chooser: CaptionChooser):
    """A tokenizer by its name, else one trained on the captions. Raises ArgumentError where it cannot be had."""
    if not name and rows is None:
        raise ArgumentError("Training on shards needs --tokenizer_name: captions are not known beforehand.")
    try:
        if name:
            return load_tokenizer(name, arguments.max_length)
        return train_tokenizer(caption_texts(rows, chooser), arguments.vocab_size, arguments.max_length)
    except (ValueError, OSError) as error:
        raise ArgumentError(f"--tokenizer_name {name}: {error}") from error


def new_config(arguments: BlipArguments, tokenizer=None) -> VlpBlipConfig:
    """The configuration that the options describe; vocabulary and special tokens are the tokenizer's, where given.

    Raises ArgumentError where it cannot be.
    """
    fields = json.loads(json.dumps(arguments.model))
    vision = fields.setdefault("vision_config", {})
    vision.setdefault("image_size", arguments.image_size)
    text = fields.setdefault("text_config", {})
    is_resnet = vision.get("model_type") == VlpModifiedResNetConfig.model_type
    kinds = (VlpBlipConfig, VlpModifiedResNetConfig if is_resnet else VlpBlipViTConfig, VlpBlipTextConfig)
    for part, kind in zip((fields, vision, text), kinds, strict=True):
        check_fields(part, kind)
    if tokenizer is not None:
        text |= token_ids(tokenizer)
    try:
        config = VlpBlipConfig(**fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ArgumentError(f"--model: {error}") from error
    if config.text_config.max_position_embeddings < arguments.max_length:
        raise ArgumentError(
            f"--max_length {arguments.max_length} is above max_position_embeddings, "
            f"{config.text_config.max_position_embeddings}."
        )
    return config


def make_model(arguments: BlipArguments, processor: VlpBlipProcessor) -> VlpBlipPreTrainedModel:
    """A new model for the task, or the parts that the task needs of the model to go on from."""
    kind = MODELS[arguments.task]
    if arguments.model_name_or_path:
        model = load_model(arguments.model_name_or_path, arguments.task)
        if arguments.fine_tune_image_size:
            try:
                model.vision_model.resize_images(arguments.fine_tune_image_size)
                type(model.config.vision_config)(**model.config.vision_config.to_dict())  # its checks
            except ValueError as error:
                raise ArgumentError(f"--fine_tune_image_size: {error}") from error
            side = arguments.fine_tune_image_size
            processor.image_processor.size = {"height": side, "width": side}
        arguments.image_size = model.config.vision_config.image_size
        arguments.vocab_size = model.config.text_config.vocab_size
    else:
        model = kind(new_config(arguments, processor.tokenizer))
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_model(name: str, task: str) -> VlpBlipPreTrainedModel:
    """The parts that a task needs of a model. Raises ArgumentError where it lacks them."""
    require_model_type(name, VlpBlipConfig.model_type)
    kind, architecture = MODELS[task], (AutoConfig.from_pretrained(name).architectures or [""])[0]
    if hasattr(kind, "from_pre_training") and architecture == VlpBlipForPreTraining.__name__:
        return kind.from_pre_training(name, dtype=torch.float32)
    model, loaded = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise ArgumentError(f"{name} lacks what --task {task} needs: {missing}, ... Name a pre-trained folder.")
    return model


def make_objective(arguments: BlipArguments, model, processor: VlpBlipProcessor, steps_per_epoch: float | None):
    if arguments.task == "captioning":
        prompt = processor.read_texts([arguments.prompt], arguments.max_length)["input_ids"]
        return CaptioningObjective(model, prompt_length=prompt.shape[1] - 1)
    if arguments.task in OBJECTIVES:
        return OBJECTIVES[arguments.task](model)
    return BlipObjective(
        model,
        make_teacher(arguments, model),
        alpha=arguments.alpha,
        alpha_steps=round(arguments.alpha_epochs * (steps_per_epoch or arguments.warmup_steps)),
        exclude_duplicates=arguments.exclude_duplicates,
        global_negatives=arguments.global_negatives,
        contrastive_share=arguments.contrastive_share,
        seed=arguments.seed,
    )


def make_teacher(arguments: BlipArguments, model) -> Teacher:
    """A copy of the model, or the teacher of a pre-training that was begun elsewhere (see `vlp.conversion`)."""
    teacher = Teacher(model, arguments.momentum, arguments.queue_size)
    saved = state_folder(arguments.model_name_or_path or "") / TEACHER_FILE
    if arguments.model_name_or_path and saved.is_file():
        try:
            teacher.load_state_dict(load_file(saved))
        except RuntimeError as error:
            raise ArgumentError(
                f"{saved} does not fit, as where --queue_size is not {arguments.queue_size} there: {error}. "
                "Choose the options that it was made with, or remove it to begin with a teacher that is the model."
            ) from error
    return teacher


def make_evaluation(arguments: BlipArguments, rows, train_rows) -> list[Pictures]:
    """Retrieval, matching and captioning after pre-training; after fine-tuning, the tasks that it was for."""
    generation = {"num_beams": arguments.eval_num_beams}
    if arguments.task == "vqa":
        answers: list[str] = []
        if train_rows is not None:
            require_text(train_rows, arguments.answer_column, arguments.dataset_name, "--answer_column")
            answers = sorted({answer for row in train_rows[arguments.answer_column] for answer in texts_of(row)})
        settings = {"answer_column": arguments.answer_column, "answer_top_k": arguments.rerank_top_k} | generation
        return evaluation_tasks(arguments, rows, [{"task": "vqa"} | settings], answers)
    if arguments.task == "nlvr":
        columns = {"second_image_column": arguments.second_image_column, "label_column": arguments.label_column}
        return evaluation_tasks(arguments, rows, [{"task": "nlvr"} | columns])
    tasks: list[dict] = []
    if arguments.task != "captioning":
        tasks += [{"task": "retrieval", "rerank_top_k": arguments.rerank_top_k,
                   "rerank_posterior": arguments.rerank_posterior}, {"task": "itm"}]  # fmt: skip
    if arguments.task != "retrieval":
        tasks.append({"task": "captioning", "prompt": arguments.prompt} | generation)
    return evaluation_tasks(arguments, rows, tasks)


def make_samples(arguments: BlipArguments, rows, model, processor, maker: SampleMaker) -> SampleMaker:
    """Plain pairs, questions with their answers (vqa) or pairs of images (nlvr).

    Raises ArgumentError if a column that the task needs is missing.
    """
    if arguments.task == "vqa":
        if rows is not None:
            require_text(rows, arguments.answer_column, arguments.dataset_name, "--answer_column")
        return extend(maker, QuestionMaker, answer_column=arguments.answer_column)
    if arguments.task == "nlvr":
        columns = {"second_image_column": arguments.second_image_column, "label_column": arguments.label_column}
        for option, column in columns.items():
            if rows is not None:
                require_column(rows, column, arguments.dataset_name, f"--{option}")
        return extend(maker, ReasoningMaker, **columns)
    return maker


BLIP = Family(
    name="blip",
    text="Pre-train or fine-tune BLIP on pairs of images and captions, evaluate it, and write a folder to publish",
    recipe="blip-emoji",
    arguments=BlipArguments,
    config=new_config,
    processor=make_processor,
    model=make_model,
    objective=make_objective,
    evaluation=make_evaluation,
    samples=make_samples,
)
