"""The CLIP family."""

import copy
import dataclasses
import functools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
from transformers import PreTrainedConfig

from ...configuration.blip import VlpBlipConfig
from ...configuration.clip import TEXT, VISION, VlpClipConfig
from ...configuration.text import VlpClipTextConfig
from ...configuration.towers import IMAGE_POOLING, TEXT_POOLING
from ...configuration.vision import VlpViTConfig
from ...conversion import NAFLEX_OPTIONS, image_options, own_copy
from ...errors import ArgumentError, UnsupportedModelError, brief, printable
from ...inference import VlpPredictor, load
from ...loading import load_auto_tokenizer, load_model, load_processor, read_config
from ...modeling_vlp.clip import PROJECTED, VlpClipModel
from ...modeling_vlp.towers import lock
from ...processing.clip import VlpClipImageProcessor, VlpClipProcessor
from ...processing.naflex import VlpNaflexImageProcessor
from ...processing.prompts import CLASS_NAMES, TEMPLATES
from ...processing.tokenizer import VlpClipTokenizer
from ...towers import Start, text_start, vision_start, with_side
from ..arguments import option, require_at_least_one, require_one_of
from ..data.features import TaughtMaker
from ..data.rows import CaptionChooser, caption_texts
from ..data.samples import SampleMaker
from ..evaluation.pictures import Pictures
from ..objectives.clip import ClipObjective
from ..objectives.distillation import (
    DistillationTeacher,
    DistilledClipObjective,
    TeacherEmbeddings,
    TeacherTokens,
)
from .base import (
    CachingArguments,
    Family,
    cached_features,
    check_fields,
    evaluation_tasks,
    extend,
    parts_of_model,
    possible_model,
    require_model_type,
)

TEACHERS = (VlpClipConfig.model_type, VlpBlipConfig.model_type)
MOST_PATCHES = 65_536
PROJECTIONS = ("visual_projection", "text_projection")


@dataclass(kw_only=True)
class ClipArguments(CachingArguments):
    """Options of CLIP: two towers, trained to match the images and captions of a batch."""

    # CLIP
    clean_text: bool = option(
        False,
        "let a newly trained tokenizer fix broken Unicode and HTML in captions, as OpenAI's tokenizer does",
        bound=True,
    )
    image_size: int | None = option(
        224, "side of the images, in pixels; a loaded model keeps its own; none: that of --image_tower"
    )
    max_length: int | None = option(
        77,
        "maximum number of tokens in a caption, including start and end; none: that of --text_tower",
        bound=True,
    )
    image_tower: str | None = option(
        None,
        "folder or hub name of a model whose image tower to start from: an image encoder of transformers or timm, or a "
        "CLIP, SigLIP, BLIP or BLIP-2 of any supported format; it brings its sizes and its preprocessing",
    )
    text_tower: str | None = option(
        None,
        "folder or hub name of a model whose text tower to start from: a text encoder of transformers or "
        "sentence-transformers, or a CLIP or SigLIP; it brings its sizes and its tokenizer",
    )
    image_pooling: str | None = option(
        None, f"pooling of --image_tower: {', '.join(IMAGE_POOLING)} (its own); that of the source if not given"
    )
    text_pooling: str | None = option(
        None, f"pooling of --text_tower: {', '.join(TEXT_POOLING)} (its own); that of the source if not given"
    )
    lock_image_tower: bool = option(
        False, "freeze the image tower (LiT), and its projection if that was trained before", bound=True, shown=True
    )
    lock_text_tower: bool = option(
        False, "freeze the text tower, and its projection if that was trained before", bound=True, shown=True
    )
    unlock_image_layers: int = option(
        0, "with --lock_image_tower: train this many of its last layers or stages, and what follows them", bound=True
    )
    unlock_text_layers: int = option(
        0, "with --lock_text_tower: train this many of its last layers, and what follows them", bound=True
    )
    max_num_patches: int | None = option(
        None,
        "variable resolution: each image keeps its shape and is scaled to at most this many patches, instead of to a "
        "square; for vision transformers; a loaded model keeps its own",
        bound=True,
        shown=True,
    )
    min_num_patches: int | None = option(
        None,
        "with --max_num_patches and --augmentation crop: draw the number of patches of each training image from this "
        "one to the maximum",
        bound=True,
        shown=True,
    )
    patch_dropout: float | None = option(
        None,
        "share of patches (0 to 1) that a vision transformer drops in training; the model's setting if not given",
        bound=True,
        shown=True,
    )
    loss: Literal["softmax", "sigmoid"] = option(
        "softmax", "contrastive loss: softmax (CLIP) or sigmoid (SigLIP)", bound=True, shown=True
    )
    embedding_sizes: str | None = option(
        None,
        "Matryoshka embeddings: sizes joined by commas, such as 64,128: the first 64 and the first 128 dimensions are "
        "trained too, and the loss is the mean over these and the whole embedding",
        bound=True,
        shown=True,
    )
    teacher_name_or_path: str | None = option(
        None,
        "distillation: folder or hub name of a CLIP, SigLIP or BLIP, of vlp, transformers or open_clip, whose "
        "similarities between the images and texts of a batch the model also learns",
        bound=True,
        shown=True,
    )
    distillation_weight: float = option(1.0, "distillation: factor of its loss", shown=True)
    cache_teacher: bool = option(
        False,
        "distillation: compute the teacher's embedding of each image once, without augmentation, and keep it in the "
        "cache folder; otherwise the teacher embeds the augmented images in every step",
        bound=True,
        shown=True,
    )
    class_column: str | None = option(
        None, "column with the class name or label, for zero-shot evaluation; several columns, joined by commas"
    )
    class_names: str | None = option(None, f"class names for integer labels: one of {', '.join(CLASS_NAMES)}")
    eval_templates: str = option(
        "name", f"prompt templates to average for each class in zero-shot evaluation: one of {', '.join(TEMPLATES)}"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_num_patches", "min_num_patches"):
            if getattr(self, name) is not None:
                require_at_least_one(self, name)
        require_one_of("eval_templates", self.eval_templates, tuple(TEMPLATES))
        if self.class_names:
            require_one_of("class_names", self.class_names, tuple(CLASS_NAMES))
        if self.lock_image_tower and self.lock_text_tower and self.model_name_or_path and not (
            self.unlock_image_layers or self.unlock_text_layers
        ):  # fmt: skip
            raise ArgumentError("Nothing is left to train: --lock_image_tower and --lock_text_tower lock both towers.")
        for each in ("image", "text"):
            layers, locked = getattr(self, f"unlock_{each}_layers"), getattr(self, f"lock_{each}_tower")
            if layers < 0 or (layers and not locked):
                raise ArgumentError(f"--unlock_{each}_layers {layers} needs --lock_{each}_tower, and must be positive.")
            if locked and not (getattr(self, f"{each}_tower") or self.model_name_or_path):
                raise ArgumentError(
                    f"--lock_{each}_tower needs --{each}_tower or --model_name_or_path: a new tower must be trained."
                )
            if getattr(self, f"{each}_pooling") and not getattr(self, f"{each}_tower"):
                raise ArgumentError(f"--{each}_pooling needs --{each}_tower.")
        if self.image_size is None and not self.image_tower:
            self.image_size = 224
        if self.max_length is None and not self.text_tower:
            self.max_length = 77
        self.check_cache(self.lock_image_tower, "--lock_image_tower")
        if self.cache_features and (self.unlock_image_layers or self.unlock_text_layers or self.micro_batch_size):
            raise ArgumentError(
                "--cache_features does not go with unlocked layers, which change, or --micro_batch_size."
            )
        if self.embedding_sizes is not None and not self.sizes:
            raise ArgumentError(f"--embedding_sizes must be whole numbers joined by commas: {self.embedding_sizes!r}.")
        self.check_teacher()
        if self.model_name_or_path and (self.image_tower or self.text_tower):
            raise ArgumentError("--model_name_or_path loads both towers: omit --image_tower and --text_tower.")

    @property
    def sizes(self) -> list[int]:
        """The sizes of --embedding_sizes; empty if there are none, or they are no numbers."""
        words = (self.embedding_sizes or "").split(",")
        return sorted({int(word) for word in words}) if all(word.strip().isdecimal() for word in words) else []

    def check_variable_shape(self) -> None:
        """Raise ArgumentError unless the options fit images of variable shape."""
        if self.max_num_patches > MOST_PATCHES or (self.min_num_patches or 1) > self.max_num_patches:
            raise ArgumentError(
                f"--max_num_patches {self.max_num_patches} must be at most {MOST_PATCHES:,}, and at least "
                "--min_num_patches."
            )
        if self.min_num_patches and self.augmentation != "crop":
            raise ArgumentError("--min_num_patches draws the size of random crops: it needs --augmentation crop.")
        if self.augmentation == "strong":
            raise ArgumentError("--augmentation strong needs square images: use crop or none with --max_num_patches.")
        if self.cache_features:
            raise ArgumentError("--cache_features needs square images: omit it, or --max_num_patches.")
        if self.teacher_name_or_path and not self.cache_teacher:
            raise ArgumentError("A teacher reads square images: add --cache_teacher, or omit --max_num_patches.")

    def check_teacher(self) -> None:
        """Raise ArgumentError unless the options of distillation fit each other and the data."""
        if not self.teacher_name_or_path:
            if self.cache_teacher:
                raise ArgumentError("--cache_teacher needs --teacher_name_or_path, the model to learn from.")
            return
        if self.distillation_weight <= 0:
            raise ArgumentError(f"--distillation_weight must be positive, got {self.distillation_weight}.")
        if self.cache_features:
            raise ArgumentError("--cache_features leaves no images for the teacher: omit it, or the teacher.")
        if self.cache_teacher:
            self.require_random_access("--cache_teacher")

    @functools.cached_property
    def teacher(self) -> VlpPredictor | None:
        """The teacher of the distillation, loaded once; None without one.

        Raises:
            ArgumentError: if the model cannot be loaded, or does not embed an image as one vector.
        """
        if not self.teacher_name_or_path:
            return None
        name = own_copy(self.teacher_name_or_path, "--teacher_name_or_path")
        try:
            predictor = load(name, "embed")
        except UnsupportedModelError as error:
            raise ArgumentError(f"--teacher_name_or_path: {brief(error)}") from error
        if not isinstance(predictor, VlpPredictor) or predictor.model_type not in TEACHERS:
            raise ArgumentError(
                f"--teacher_name_or_path {printable(self.teacher_name_or_path, 120)} is a {predictor.model_type}; "
                "expected a CLIP, SigLIP or BLIP."
            )
        return predictor

    @functools.cached_property
    def starts(self) -> tuple[Start | None, Start | None]:
        """The starts of the image tower and of the text tower; None for a tower that is trained from scratch.

        They are found once; the image size and the length that they set are copied to the options.
        """
        vision = text = None
        if self.image_tower:
            vision = vision_start(self.image_tower, "--image_tower", self.image_pooling, self.image_size)
            self.image_size = self.image_size or vision.config.image_size
        if self.text_tower:
            text = text_start(
                self.text_tower, "--text_tower", self.text_pooling, self.max_length, self.tokenizer_name
            )  # fmt: skip
            self.max_length = text.config.max_position_embeddings
        return vision, text


def make_processor(arguments: ClipArguments, rows, chooser: CaptionChooser) -> VlpClipProcessor:
    """Load the processor of the model to fine-tune, or build a new one; see `Family.processor`.

    Args:
        arguments: options of the run.
        rows: training data, to train a tokenizer on; None for shards.
        chooser: chooses the captions of a row.

    Raises:
        ArgumentError: if the tokenizer does not suit CLIP, or cannot be trained because the data are shards.
    """
    if arguments.model_name_or_path:
        require_model_type(arguments.base_model, VlpClipConfig.model_type)
        config = read_config(arguments.base_model, "--model_name_or_path")
        processor = load_processor(arguments.base_model, "--model_name_or_path")
        processor.image_processor = with_variable_shape(arguments, config.vision_config, processor.image_processor)
        return processor
    vision, text = arguments.starts
    side = arguments.image_size
    images = VlpClipImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    if vision is not None:
        images = VlpClipImageProcessor(**with_side(vision.images(), side))
    images = with_variable_shape(arguments, new_config(arguments).vision_config, images)
    if text is not None:
        return VlpClipProcessor(images, text.tokenizer(arguments.max_length))
    name, length = arguments.tokenizer_name, arguments.max_length
    if name and name.endswith(".gz"):
        tokenizer = read_merges(name, length)
    elif name:
        tokenizer = load_auto_tokenizer(name, "--tokenizer_name", model_max_length=length)
    elif rows is None:
        raise ArgumentError(
            "Training on shards needs --tokenizer_name: a tokenizer cannot be trained on streamed captions."
        )
    else:
        texts = caption_texts(rows, chooser)
        try:
            tokenizer = VlpClipTokenizer.train(texts, arguments.vocab_size, length, arguments.clean_text)
        except ValueError as error:
            raise ArgumentError(f"--vocab_size: {error}") from error
    check_tokenizer(tokenizer, name)
    return VlpClipProcessor(images, tokenizer)


def with_variable_shape(
    arguments: ClipArguments, config: PreTrainedConfig, images: VlpClipImageProcessor
) -> VlpClipImageProcessor:
    """The image processor for the number of patches in the options, or in a loaded one; else the same one.

    Args:
        arguments: options of the run; the number of patches of a loaded model is copied to them.
        config: configuration of the image tower.
        images: the image processor of the model.

    Raises:
        ArgumentError: if the image tower has no patches, or other options need square images.
    """
    loaded = getattr(images, "max_num_patches", None)
    arguments.max_num_patches = arguments.max_num_patches or loaded
    if arguments.max_num_patches is None:
        if arguments.min_num_patches:
            raise ArgumentError("--min_num_patches needs --max_num_patches.")
        return images
    if not hasattr(config, "max_num_patches"):
        raise ArgumentError("--max_num_patches needs a vision transformer of vlp; this image tower has no patches.")
    arguments.check_variable_shape()
    options = image_options(images) | {
        "patch_size": config.patch_size, "max_num_patches": arguments.max_num_patches,
    }  # fmt: skip
    return VlpNaflexImageProcessor(**{name: options[name] for name in NAFLEX_OPTIONS})


def read_merges(name: str, length: int) -> VlpClipTokenizer:
    """Read OpenAI's merges. Raises ArgumentError if the file is missing or is not such a file."""
    path = Path(name)
    if not path.is_file():
        raise ArgumentError(f"--tokenizer_name {printable(name, 120)}: there is no such file.")
    try:
        return VlpClipTokenizer.from_openai_merges(path, length)
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise ArgumentError(
            f"--tokenizer_name {printable(name, 120)} is not OpenAI's bpe_simple_vocab_16e6.txt.gz: "
            f"{brief(error)[:120]}"
        ) from error


def check_tokenizer(tokenizer, name: str | None) -> None:
    """Raise ArgumentError unless captions end with exactly one end token, which CLIP's text tower pools."""
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None or tokenizer.bos_token_id is None:
        raise ArgumentError(f"--tokenizer_name {name} lacks a start, end or pad token, which CLIP needs.")
    ids = tokenizer("a")["input_ids"]
    if ids[-1] != tokenizer.eos_token_id or tokenizer.eos_token_id in ids[:-1]:
        raise ArgumentError(f"--tokenizer_name {name} does not end each caption with exactly one end token.")


def new_config(arguments: ClipArguments, tokenizer=None) -> VlpClipConfig:
    """Build the configuration of a new model.

    Args:
        arguments: options of the run.
        tokenizer: tokenizer that sets the vocabulary size and the special tokens; None: as in the options.

    Raises:
        ArgumentError: if the options do not give a valid configuration.
    """
    fields = parts_of_model(arguments, "vision_config", "text_config")
    vision_source, text_source = arguments.starts
    vision, text = fields["vision_config"], fields["text_config"]
    vision.setdefault("image_size", arguments.image_size)
    text["max_position_embeddings"] = arguments.max_length
    if tokenizer is not None:
        text["vocab_size"] = len(tokenizer)
        text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if arguments.loss == "sigmoid":  # SigLIP, section 3.2
        fields = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0} | fields
    kinds = {kind.model_type: kind for kind in (*VISION, *TEXT)}
    vision_kind = kinds.get(str(vision.get("model_type")), VlpViTConfig)
    text_kind = kinds.get(str(text.get("model_type")), VlpClipTextConfig)
    for part, kind in ((fields, VlpClipConfig), (vision, vision_kind), (text, text_kind)):
        check_fields(part, kind)
    if vision_source is not None:
        fields["vision_config"] = copy.deepcopy(vision_source.config)
        if vision_source.config.model_type in PROJECTED:  # it projects to the shared space itself
            fields["projection_dim"] = vision_source.shared_space[0]
    if text_source is not None:
        fields["text_config"] = copy.deepcopy(text_source.config)
    with possible_model():
        return VlpClipConfig(**fields)


def make_model(arguments: ClipArguments, processor: VlpClipProcessor) -> VlpClipModel:
    """Build a new model, or load one and copy its sizes to the arguments; see `Family.model`.

    Raises:
        ArgumentError: if the model cannot be built, or if --loss or --patch_dropout does not suit it.
    """
    if arguments.model_name_or_path:
        require_model_type(arguments.base_model, VlpClipConfig.model_type)
        model = load_model(VlpClipModel, arguments.base_model, "--model_name_or_path")
        arguments.image_size = model.config.vision_config.image_size
        arguments.max_length = model.config.text_config.max_position_embeddings
        arguments.vocab_size = model.config.text_config.vocab_size
    else:
        with possible_model():
            model = VlpClipModel(new_config(arguments, processor.tokenizer))
    if (arguments.loss == "sigmoid") != (model.logit_bias is not None):
        has = "has a" if model.logit_bias is not None else "has no"
        raise ArgumentError(
            f"--loss {arguments.loss} does not suit the model, which {has} logit_bias (SigLIP): "
            f"give --loss {'softmax' if arguments.loss == 'sigmoid' else 'sigmoid'}."
        )
    for start, projection in zip(arguments.starts, PROJECTIONS, strict=True):
        if start is not None:
            start.load_into(model, projection if start.brings_projection(model.config) else None)
    if arguments.image_tower and model.config.vision_config.image_size != arguments.image_size:
        try:
            model.vision_model.resize_images(arguments.image_size)
        except ValueError as error:
            raise ArgumentError(f"--image_size {arguments.image_size}: {brief(error)[:200]}") from error
    if arguments.max_num_patches is not None:
        model.config.vision_config.max_num_patches = arguments.max_num_patches
    if arguments.patch_dropout is not None:
        if not hasattr(model.config.vision_config, "patch_dropout"):
            raise ArgumentError("--patch_dropout needs a vision transformer; a ResNet has no patches.")
        model.config.vision_config.patch_dropout = arguments.patch_dropout
    if arguments.sizes:
        width = model.config.projection_dim
        shorter = [size for size in arguments.sizes if size != width]
        if not shorter or not 1 <= shorter[0] <= shorter[-1] < width:
            raise ArgumentError(
                f"--embedding_sizes must be from 1 to {width - 1}; the embeddings have {width} dimensions."
            )
        model.config.embedding_sizes = shorter
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_objective(arguments: ClipArguments, model: VlpClipModel, processor, steps_per_epoch) -> ClipObjective:
    """Lock the towers and return the objective.

    Raises:
        ArgumentError: if more layers are to be unlocked than there are.
    """
    for each, tower, start, name in zip(
        ("image", "text"), (model.vision_model, model.text_model), arguments.starts, PROJECTIONS, strict=True
    ):
        if getattr(arguments, f"lock_{each}_tower"):
            layers = getattr(arguments, f"unlock_{each}_layers")
            try:
                lock(tower, layers)
            except ValueError as error:
                raise ArgumentError(f"--unlock_{each}_layers: {error}.") from error
            if not layers and (start is None or start.brings_projection(model.config)):
                getattr(model, name).requires_grad_(False)
    if not any(parameter.requires_grad for name, parameter in model.named_parameters() if "logit_" not in name):
        raise ArgumentError("Nothing is left to train: both towers and their projections are locked.")
    options = {
        "exclude_duplicates": arguments.exclude_duplicates,
        "cached_images": arguments.cache_features,
        "cached_texts": arguments.cache_features and arguments.lock_text_tower,
        "micro_batch_size": arguments.micro_batch_size,
    }
    if arguments.teacher is None:
        return ClipObjective(model, **options)
    images = processor.image_processor
    teacher = DistillationTeacher(arguments.teacher, images.image_mean, images.image_std)
    return DistilledClipObjective(model, teacher, arguments.distillation_weight, **options)


def make_evaluation(arguments: ClipArguments, rows, train_rows) -> list[Pictures]:
    """Prepare zero-shot classification for each class column and retrieval for each caption column in the data.

    If no class column is given, the first ClassLabel column is one, such as that of a folder of classes.
    """
    tasks: list[dict] = []
    classes = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    for column in arguments.class_column.split(",") if arguments.class_column else classes[:1]:
        tasks.append({"task": "zero-shot", "class_column": column, "class_names": arguments.class_names,
                      "templates": arguments.eval_templates})  # fmt: skip
    columns = [column for column in arguments.caption_column.split(",") if column in rows.column_names]
    tasks += [{"task": "retrieval", "caption_column": column} for column in columns]
    return evaluation_tasks(arguments, rows, tasks)


def make_samples(arguments: ClipArguments, rows, model, processor, maker: SampleMaker) -> SampleMaker:
    """Return the maker of image-caption pairs, or of pairs with what the teacher of a distillation needs."""
    teacher = arguments.teacher
    if teacher is None:
        return maker
    if not arguments.cache_teacher:
        return dataclasses.replace(maker, teacher_texts=TeacherTokens(teacher))
    teacher.model.to(model.device)
    images = teacher.processor.image_processor
    features = cached_features(arguments, rows, teacher.embed_images, teacher.model, teacher.model.config, images)
    maker = dataclasses.replace(maker, teacher_texts=TeacherEmbeddings(teacher))
    return extend(maker, TaughtMaker, features=features)


CLIP = Family(
    name="clip",
    text="Train CLIP on pairs of images and captions, evaluate it, and save a publishable folder",
    recipe="clip-emoji",
    recipe_with_towers="clip-towers",
    arguments=ClipArguments,
    config=new_config,
    processor=make_processor,
    model=make_model,
    objective=make_objective,
    evaluation=make_evaluation,
    samples=make_samples,
    fine_tuning=lambda options: "clip-fine-tuning",
)
