"""BLIP's parts of a run: processor, model, objective, evaluation. Wrong options end here, with what to do."""

import json

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor

from ..configuration import VlpBlipConfig, VlpBlipTextConfig, VlpBlipViTConfig, VlpModifiedResNetConfig
from ..modeling_vlp.blip import VlpBlipForImageTextRetrieval, VlpBlipForPreTraining, VlpBlipPreTrainedModel
from ..modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from ..modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering, VlpBlipForVisualReasoning
from ..processing.blip import VlpBlipImageProcessor, VlpBlipProcessor, load_tokenizer, token_ids, train_tokenizer
from .arguments import ArgumentError, Blip2Arguments, BlipArguments
from .blip_evaluation import BlipEvaluator
from .build import check_fields, require_model_type
from .checkpoint import TEACHER_FILE, state_folder
from .data import CaptionChooser, QuestionMaker, ReasoningMaker, SampleMaker, caption_texts, texts_of
from .evaluation import Evaluator
from .momentum import Teacher
from .objectives import AnsweringObjective, BlipObjective, CaptioningObjective, ReasoningObjective
from .sources import require_column, require_text
from .task_evaluation import QuestionEvaluator, ReasoningEvaluator

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


def make_tokenizer(arguments: BlipArguments | Blip2Arguments, name: str | None, rows, chooser: CaptionChooser):
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


def adopt_sizes(arguments: BlipArguments, model: VlpBlipPreTrainedModel) -> None:
    """Let the options tell what a model that is gone on from is, not what a recipe would have made."""
    arguments.image_size = model.config.vision_config.image_size
    arguments.vocab_size = model.config.text_config.vocab_size


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
    """A copy of the model, or the teacher of a pre-training that was begun elsewhere (see `vlp.convert`)."""
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


def make_evaluator(arguments: BlipArguments, chooser: CaptionChooser, eval_rows, rows) -> Evaluator:
    common = (eval_rows, chooser, arguments.image_column, arguments.max_image_pixels)
    beams = dict(batch_size=arguments.eval_batch_size, num_beams=arguments.eval_num_beams,
                 max_length=arguments.max_length, top_k=arguments.rerank_top_k)  # fmt: skip
    if arguments.task == "vqa":
        require_text(eval_rows, arguments.answer_column, "the evaluation data", "--answer_column")
        answers = sorted({answer for row in rows[arguments.answer_column] for answer in texts_of(row)})
        return QuestionEvaluator(*common, answer_column=arguments.answer_column, answers=answers, **beams)
    if arguments.task == "nlvr":
        columns = dict(second_image_column=arguments.second_image_column, label_column=arguments.label_column)
        return ReasoningEvaluator(*common, batch_size=arguments.eval_batch_size, **columns)
    return BlipEvaluator(
        *common, task=arguments.task, prompt=arguments.prompt, rerank_posterior=arguments.rerank_posterior, **beams
    )


def make_maker(arguments: BlipArguments, rows, model, processor, **parts) -> SampleMaker:
    """What makes samples of rows. Raises ArgumentError where a column that the task needs is not there."""
    if arguments.task == "vqa":
        if rows is not None:
            require_text(rows, arguments.answer_column, arguments.dataset_name, "--answer_column")
        return QuestionMaker(answer_column=arguments.answer_column, **parts)
    if arguments.task == "nlvr":
        columns = {"second_image_column": arguments.second_image_column, "label_column": arguments.label_column}
        for option, column in columns.items():
            if rows is not None:
                require_column(rows, column, arguments.dataset_name, f"--{option}")
        return ReasoningMaker(**columns, **parts)
    return SampleMaker(**parts)
