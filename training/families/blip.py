"""The BLIP family."""

import copy
import functools
from dataclasses import dataclass
from typing import Literal

from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from ...configuration.blip import VISION, VlpBlipConfig
from ...configuration.text import VlpBlipTextConfig
from ...configuration.towers import IMAGE_POOLING
from ...configuration.vision import VlpBlipViTConfig, VlpModifiedResNetConfig
from ...errors import ArgumentError, brief, printable
from ...files import TEACHER_FILE, state_folder
from ...loading import load_bert_tokenizer, load_model, load_processor, read_config
from ...modeling_vlp.blip import VlpBlipForImageTextRetrieval, VlpBlipForPreTraining, VlpBlipPreTrainedModel
from ...modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from ...modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering, VlpBlipForVisualReasoning
from ...processing.blip import (
    VlpBlipImageProcessor,
    VlpBlipProcessor,
    token_ids,
    train_tokenizer,
    with_blip_tokens,
    with_used_tokens,
)
from ...towers import Start, vision_start, with_side
from ..arguments import TrainingArguments, option, require_at_least_one, require_share
from ..data.rows import CaptionChooser, caption_texts, texts_of
from ..data.samples import QuestionMaker, ReasoningMaker, SampleMaker
from ..data.sources import require_column, require_text
from ..evaluation.arguments import check_rerankers
from ..evaluation.pictures import Pictures
from ..objectives.blip import BlipObjective
from ..objectives.blip_tasks import AnsweringObjective, CaptioningObjective, ReasoningObjective
from ..objectives.momentum import Teacher
from .base import (
    CachingArguments,
    Family,
    GroupingArguments,
    check_fields,
    evaluation_tasks,
    extend,
    limit_length,
    parts_of_model,
    possible_model,
    require_model_type,
)
from .bert import load_bert, text_fields

COMPARED = ("pretrain", "retrieval")  # tasks whose losses compare the pairs of a batch


@dataclass(kw_only=True)
class BlipArguments(CachingArguments, GroupingArguments):
    """Options of BLIP. The defaults are those of salesforce/BLIP, configs/pretrain.yaml."""

    image_size: int | None = option(
        224, "side of the images, in pixels; a loaded model keeps its own; none: that of --vision_tower"
    )
    max_length: int = option(30, "maximum number of tokens in a caption, including start and end", bound=True)
    vocab_size: int = option(30524, "vocabulary size of the tokenizer that is trained on the captions")
    crop_scale: float = option(
        0.2, "smallest share (0 to 1) of the image area that --augmentation crop keeps", bound=True
    )
    horizontal_flip: bool = option(True, "mirror half of the images with --augmentation crop", bound=True)
    random_augment: bool = option(True, "also apply BLIP's RandomAugment(2, 5) with --augmentation crop", bound=True)
    per_device_train_batch_size: int = option(75, "pairs per batch in each process", bound=True, shown=True)
    learning_rate: float = option(3e-4, "peak learning rate", shown=True)
    weight_decay: float = option(
        0.05, "weight decay of matrices; not applied to gains, biases, temperature and position embeddings", shown=True
    )
    adam_beta2: float = option(0.999, "AdamW: decay rate of the second moment", shown=True)
    adam_epsilon: float = option(1e-8, "AdamW: term added to the denominator", shown=True)
    max_grad_norm: float = option(0.0, "norm to clip the gradient to; 0: no clipping", shown=True)
    warmup_steps: int = option(3000, "optimiser steps of linear warm-up", shown=True)
    num_train_epochs: float = option(20.0, "epochs, if neither --max_train_steps nor --max_train_minutes is given")

    # BLIP
    vision_tower: str | None = option(
        None,
        "folder or hub name of a model whose image tower to start from: an image encoder of transformers or timm (the "
        "paper: a ViT or DeiT), or a BLIP; it brings its sizes and its preprocessing",
    )
    vision_pooling: str | None = option(
        None, f"pooling of --vision_tower: {', '.join(IMAGE_POOLING)} (its own); that of the source if not given"
    )
    lock_vision_tower: bool = option(False, "freeze the image tower", bound=True, shown=True)
    bert_name_or_path: str | None = option(
        None,
        "hub name or folder of a BERT to initialise the text model from; it brings its sizes and its tokenizer; with "
        "a smaller num_hidden_layers in `model`, only its first layers are used",
    )
    trim_vocabulary: bool = option(
        False,
        "keep only those tokens of --bert_name_or_path that the training captions use, besides letters and digits: a "
        "smaller and faster model for captions of one domain",
        bound=True,
    )
    task: Literal["pretrain", "captioning", "retrieval", "vqa", "nlvr"] = option(
        "pretrain",
        "pretrain (contrastive, matching and captioning losses), or the task to fine-tune for; vqa: questions about an "
        "image; nlvr: statements about two images",
        bound=True,
    )
    fine_tune_image_size: int | None = option(
        None, "new side of the images for a loaded model, in pixels; its position embeddings are interpolated"
    )
    answer_column: str = option(
        "answers",
        "vqa: column with the list of answers that people gave; --caption_column holds the question",
        bound=True,
    )
    second_image_column: str = option(
        "second_image", "nlvr: column with the right image; --image_column holds the left one", bound=True
    )
    label_column: str = option(
        "label", "nlvr: column that says if the caption is true of the two images: true or false, or 1 or 0", bound=True
    )
    prompt: str = option(
        "", 'captioning: prompt that every caption starts with; the paper: "a picture of "', bound=True, shown=True
    )
    momentum: float = option(
        0.995,
        "decay of the momentum teacher (0 to 1): the share of its own weights that it keeps at each step",
        shown=True,
    )
    queue_size: int = option(57600, "pairs in the queue of the teacher's features", bound=True, shown=True)
    queue_negatives: bool = option(
        False,
        "keep the texts of the queue too, and draw the negative texts of ITM from the batch and the queue, in which "
        "there are harder ones",
        bound=True,
        shown=True,
    )
    itm_negatives: int = option(
        1,
        "hard negatives of the matching loss (ITM) for each text and for each image; a text costs far less than an "
        "image, which is encoded once for all of them",
        bound=True,
        shown=True,
    )
    alpha: float = option(
        0.4, "weight of the teacher's predictions (0 to 1) in the targets of the contrastive loss", shown=True
    )
    alpha_epochs: float = option(2.0, "epochs over which alpha grows linearly from 0", shown=True)
    global_negatives: bool = option(
        False,
        "draw hard negatives from the batches of all processes instead of each process' own",
        bound=True,
        shown=True,
    )
    contrastive_share: float = option(
        0.0,
        "share of the run (0 to 1), at its start, that uses only the contrastive loss; for randomly initialised towers",
        bound=True,
        shown=True,
    )
    rerank_top_k: int = option(128, "evaluation: candidates per query that are re-ranked with the matching head (ITM)")
    rerank_posterior: bool = option(
        False, "evaluation: re-rank by ITC probability times ITM odds, instead of the original's cosine plus ITM logit"
    )
    rerank_by: str = option(
        "matching",
        "evaluation: what re-ranks: matching (ITM), captioning (the probability of the caption), or both, as "
        "matching,captioning",
    )
    eval_num_beams: int = option(3, "evaluation: beams for generating captions and answers")

    def __post_init__(self):
        super().__post_init__()
        if self.micro_batch_size and self.task not in COMPARED:
            raise ArgumentError(
                f"--micro_batch_size is for --task {' and '.join(COMPARED)}, whose losses compare the pairs of a "
                "batch: use --gradient_accumulation_steps."
            )
        if self.fine_tune_image_size and not self.model_name_or_path:
            raise ArgumentError("--fine_tune_image_size needs --model_name_or_path, the model to fine-tune.")
        if self.image_size is None and not self.vision_tower:
            self.image_size = 224
        if self.model_name_or_path and (self.vision_tower or self.bert_name_or_path):
            raise ArgumentError("--model_name_or_path loads all parts: omit --vision_tower and --bert_name_or_path.")
        if self.vision_pooling and not self.vision_tower:
            raise ArgumentError("--vision_pooling needs --vision_tower.")
        if self.lock_vision_tower and not (self.vision_tower or self.model_name_or_path):
            raise ArgumentError(
                "--lock_vision_tower needs --vision_tower or --model_name_or_path: a new tower must be trained."
            )
        self.check_cache(self.lock_vision_tower, "--lock_vision_tower")
        if self.cache_features and self.task != "pretrain":
            raise ArgumentError(f"--cache_features is for --task pretrain, not for --task {self.task}.")
        if self.trim_vocabulary and not self.bert_name_or_path:
            raise ArgumentError("--trim_vocabulary needs --bert_name_or_path.")
        if self.prompt and self.task != "captioning":
            raise ArgumentError(
                f"--prompt {self.prompt!r} can only be used with --task captioning, not with {self.task}."
            )
        require_share(self, "momentum", "alpha", "contrastive_share")
        check_rerankers(self.rerank_by)
        if self.task == "retrieval":  # which trains no decoder
            if self.rerank_by == "captioning":
                raise ArgumentError("--task retrieval trains no decoder: --rerank_by captioning is not possible.")
            self.rerank_by = "matching"
        require_at_least_one(self, "queue_size", "rerank_top_k", "eval_num_beams", "itm_negatives")
        self.check_groups(self.task in ("vqa", "nlvr"), "--task vqa and nlvr")
        if self.alpha_epochs < 0:
            raise ArgumentError(f"--alpha_epochs must not be negative, got {self.alpha_epochs}.")

    @functools.cached_property
    def start(self) -> Start | None:
        """The start of the image tower, found once; the image size that it sets is copied to the options.

        Raises:
            ArgumentError: if BLIP cannot use the tower.
        """
        if not self.vision_tower:
            return None
        start = vision_start(self.vision_tower, "--vision_tower", self.vision_pooling, self.image_size)
        if not isinstance(start.config, VISION):
            raise ArgumentError(
                f"--vision_tower {printable(self.vision_tower, 120)} has a {start.config.model_type}, which has no "
                "normalised states for texts to attend to; expected an image encoder, or a BLIP."
            )
        self.image_size = self.image_size or start.config.image_size
        return start

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
# What else a task can start from, besides a model of its own kind and of those that `loads` names.
STARTS = {
    "pretrain": (VlpBlipForConditionalGeneration,),
    "vqa": (VlpBlipForPreTraining, VlpBlipForConditionalGeneration),
    "nlvr": (VlpBlipForPreTraining, VlpBlipForConditionalGeneration, VlpBlipForQuestionAnswering),
}
OBJECTIVES = {"vqa": AnsweringObjective, "nlvr": ReasoningObjective}


def make_processor(arguments: BlipArguments, rows, chooser: CaptionChooser) -> VlpBlipProcessor:
    """Load the processor of the model to fine-tune, or build a new one; see `Family.processor`.

    Raises:
        ArgumentError: if the model is not a BLIP, or the tokenizer cannot be loaded or trained.
    """
    if arguments.model_name_or_path:
        require_model_type(arguments.base_model, VlpBlipConfig.model_type)
        return load_processor(arguments.base_model, "--model_name_or_path")
    start = arguments.start
    images = VlpBlipImageProcessor(size={"height": arguments.image_size, "width": arguments.image_size})
    if start is not None:
        images = VlpBlipImageProcessor(**with_side(start.images(), arguments.image_size))
    name = arguments.tokenizer_name or arguments.bert_name_or_path
    tokenizer = make_tokenizer(arguments, name, rows, chooser)
    if arguments.trim_vocabulary:
        if rows is None:
            raise ArgumentError("--trim_vocabulary reads all captions, which shards do not allow.")
        try:
            tokenizer = with_used_tokens(tokenizer, caption_texts(rows, chooser))
        except ValueError as error:
            raise ArgumentError(f"--trim_vocabulary: {error}.") from error
        tokenizer = with_blip_tokens(tokenizer, arguments.max_length)
    return VlpBlipProcessor(images, tokenizer)


def make_tokenizer(arguments: TrainingArguments, name: str | None, rows, chooser: CaptionChooser):
    """Load a tokenizer, or train one on the captions.

    Args:
        arguments: options of the run.
        name: hub name or folder of the tokenizer; None: train one.
        rows: training data; None for shards.
        chooser: chooses the captions of a row.

    Raises:
        ArgumentError: if the tokenizer cannot be loaded or trained.
    """
    if not name and rows is None:
        raise ArgumentError(
            "Training on shards needs --tokenizer_name: a tokenizer cannot be trained on streamed captions."
        )
    if name:
        option = "--tokenizer_name" if name == arguments.tokenizer_name else "--bert_name_or_path"
        return with_blip_tokens(load_bert_tokenizer(name, option), arguments.max_length)
    try:
        return train_tokenizer(caption_texts(rows, chooser), arguments.vocab_size, arguments.max_length)
    except ValueError as error:
        raise ArgumentError(f"--vocab_size: {error}") from error


def new_config(arguments: BlipArguments, tokenizer=None) -> VlpBlipConfig:
    """Build the configuration of a new model.

    Args:
        arguments: options of the run.
        tokenizer: tokenizer that sets the vocabulary size and the special tokens; None: as in the options.

    Raises:
        ArgumentError: if the options do not give a valid configuration.
    """
    fields = parts_of_model(arguments, "vision_config", "text_config")
    vision, text = fields["vision_config"], fields["text_config"]
    start = arguments.start
    vision.setdefault("image_size", arguments.image_size)
    if arguments.bert_name_or_path:
        fewer = {name: text[name] for name in ("num_hidden_layers",) if name in text}
        text |= text_fields(arguments.bert_name_or_path) | fewer
    is_resnet = vision.get("model_type") == VlpModifiedResNetConfig.model_type
    kinds = (VlpBlipConfig, VlpModifiedResNetConfig if is_resnet else VlpBlipViTConfig, VlpBlipTextConfig)
    for part, kind in zip((fields, vision, text), kinds, strict=True):
        check_fields(part, kind)
    if tokenizer is not None:
        text |= token_ids(tokenizer)
    if start is not None:
        fields["vision_config"] = copy.deepcopy(start.config)
        if isinstance(start.config, VlpModifiedResNetConfig):
            fields["image_text_hidden_size"] = start.config.projection_dim
    with possible_model():
        config = VlpBlipConfig(**fields)
    if config.text_config.max_position_embeddings < arguments.max_length:
        raise ArgumentError(
            f"--max_length {arguments.max_length} is above max_position_embeddings, "
            f"{config.text_config.max_position_embeddings}."
        )
    return config


def make_model(arguments: BlipArguments, processor: VlpBlipProcessor) -> VlpBlipPreTrainedModel:
    """Build a new model for the task, or load the parts of a model that the task needs; see `Family.model`.

    Raises:
        ArgumentError: if the model cannot be built, lacks weights of the task, or cannot use --fine_tune_image_size.
    """
    kind = MODELS[arguments.task]
    if arguments.model_name_or_path:
        model = load_for_task(arguments.base_model, arguments.task)
        if arguments.fine_tune_image_size:
            try:
                fields = model.config.vision_config.to_dict() | {"image_size": arguments.fine_tune_image_size}
                type(model.config.vision_config)(**fields)  # validate the new size
                model.vision_model.resize_images(arguments.fine_tune_image_size)
            except (ValueError, RuntimeError, StrictDataclassError) as error:
                raise ArgumentError(f"--fine_tune_image_size: {brief(error)[:300]}") from error
            side = arguments.fine_tune_image_size
            processor.image_processor.size = {"height": side, "width": side}
        arguments.image_size = model.config.vision_config.image_size
        arguments.vocab_size = model.config.text_config.vocab_size
        limit_length(arguments, model.config.text_config.max_position_embeddings)
    else:
        with possible_model():
            model = kind(new_config(arguments, processor.tokenizer))
        if (start := arguments.start) is not None:
            start.load_into(model)
            if model.config.vision_config.image_size != arguments.image_size:
                model.vision_model.resize_images(arguments.image_size)
        if arguments.bert_name_or_path:
            load_bert(model, arguments.bert_name_or_path, processor.tokenizer)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_for_task(name: str, task: str) -> VlpBlipPreTrainedModel:
    """Load the parts of a model that a task needs, or start them from a model in `STARTS`.

    Args:
        name: folder or hub name of the model.
        task: a key of `MODELS`.

    Raises:
        ArgumentError: if the model lacks weights that the task needs.
    """
    require_model_type(name, VlpBlipConfig.model_type)
    option, kind = "--model_name_or_path", MODELS[task]
    saved = read_config(name, option).architectures[0]
    start = next((each for each in STARTS.get(task, ()) if each.__name__ == saved), None)
    if start is not None:
        source = load_model(start, name, option)
        if isinstance(source, VlpBlipForConditionalGeneration):
            source = source.to_pre_training()
        return source if task == "pretrain" else kind.from_pre_training(source)
    if saved != kind.__name__ and saved not in (kind.loads or ()):
        raise ArgumentError(
            f"{option} {printable(name, 120)} is a {saved}, which lacks weights that --task {task} needs: use a "
            f"pre-trained model, or a {kind.__name__}."
        )
    return load_model(kind, name, option)


def make_objective(arguments: BlipArguments, model, processor: VlpBlipProcessor, steps_per_epoch: float | None):
    """Lock the image tower if that is wanted, and return the objective of the task."""
    if arguments.lock_vision_tower:
        model.vision_model.requires_grad_(False)
    objective = objective_of(arguments, model, processor, steps_per_epoch)
    if arguments.lock_vision_tower:
        objective.frozen = [model.vision_model]
    return objective


def objective_of(arguments: BlipArguments, model, processor: VlpBlipProcessor, steps_per_epoch: float | None):
    """Return the objective of the task."""
    if arguments.task == "captioning":
        prompt = processor.tokenize([arguments.prompt], arguments.max_length)["input_ids"]
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
        itm_negatives=arguments.itm_negatives,
        seed=arguments.seed,
        micro_batch_size=arguments.micro_batch_size,
    )


def make_teacher(arguments: BlipArguments, model) -> Teacher:
    """Build the momentum teacher from the model, or load the one of a converted pre-training (see `vlp.conversion`)."""
    text_length = arguments.max_length if arguments.queue_negatives else 0
    teacher = Teacher(model, arguments.momentum, arguments.queue_size, text_length)
    saved = state_folder(arguments.model_name_or_path or "") / TEACHER_FILE
    if arguments.model_name_or_path and saved.is_file():
        try:
            teacher.load_state_dict(load_file(saved))
        except RuntimeError as error:
            raise ArgumentError(
                f"{saved} does not fit this run, for example because it has another --queue_size than "
                f"{arguments.queue_size}: {error}. Use the options that it was saved with, or remove it to start the "
                "teacher as a copy of the model."
            ) from error
    return teacher


def make_evaluation(arguments: BlipArguments, rows, train_rows) -> list[Pictures]:
    """Prepare retrieval, matching and captioning after pre-training, or the task of the fine-tuning."""
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
        tasks += [{"task": "retrieval", "rerank_top_k": arguments.rerank_top_k, "rerank_by": arguments.rerank_by,
                   "rerank_posterior": arguments.rerank_posterior}, {"task": "itm"}]  # fmt: skip
    if arguments.task != "retrieval":
        tasks.append({"task": "captioning", "prompt": arguments.prompt} | generation)
    return evaluation_tasks(arguments, rows, tasks)


def make_samples(arguments: BlipArguments, rows, model, processor, maker: SampleMaker) -> SampleMaker:
    """Return the maker of image-caption pairs, of questions with answers (vqa) or of image pairs (nlvr).

    Raises:
        ArgumentError: if a column that the task needs is missing.
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
    text="Pre-train or fine-tune BLIP on images and texts, evaluate it, and save a publishable folder",
    recipe="blip-emoji",
    recipe_with_towers="blip-towers",
    arguments=BlipArguments,
    config=new_config,
    processor=make_processor,
    model=make_model,
    objective=make_objective,
    evaluation=make_evaluation,
    samples=make_samples,
    fine_tuning=lambda options: "blip-fine-tuning" if options.task == "pretrain" else f"blip-{options.task}",
)
