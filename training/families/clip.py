"""The CLIP family."""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...configuration.clip import TEXT, VISION, VlpClipConfig
from ...configuration.text import VlpClipTextConfig
from ...configuration.vision import VlpViTConfig
from ...errors import ArgumentError, brief, printable
from ...loading import load_auto_tokenizer, load_model, load_processor, load_weights, read_config
from ...modeling_vlp.clip import VlpClipModel
from ...processing.clip import VlpClipImageProcessor, VlpClipProcessor
from ...processing.prompts import CLASS_NAMES, TEMPLATES
from ...processing.tokenizer import VlpClipTokenizer
from ..arguments import TrainingArguments, option, require_at_least_one, require_one_of
from ..data.rows import CaptionChooser, caption_texts
from ..data.samples import SampleMaker
from ..evaluation.pictures import Pictures
from ..objectives.clip import ClipObjective
from .base import Family, check_fields, evaluation_tasks, parts_of_model, possible_model, require_model_type


@dataclass(kw_only=True)
class ClipArguments(TrainingArguments):
    """Options of CLIP: two towers, trained to match the images and captions of a batch."""

    # CLIP
    clean_text: bool = option(
        False,
        "let a newly trained tokenizer fix broken Unicode and HTML in captions, as OpenAI's tokenizer does",
        bound=True,
    )
    image_tower: str | None = option(
        None, "folder or hub name of a vlp or transformers CLIP to initialise the image tower from"
    )
    text_tower: str | None = option(
        None, "folder or hub name of a vlp or transformers CLIP to initialise the text tower from"
    )
    lock_image_tower: bool = option(False, "freeze the image tower and its projection (LiT)", bound=True, shown=True)
    lock_text_tower: bool = option(False, "freeze the text tower and its projection", bound=True, shown=True)
    patch_dropout: float | None = option(
        None,
        "share of patches (0 to 1) that a vision transformer drops in training; the model's setting if not given",
        bound=True,
        shown=True,
    )
    loss: Literal["softmax", "sigmoid"] = option(
        "softmax", "contrastive loss: softmax (CLIP) or sigmoid (SigLIP)", bound=True, shown=True
    )
    micro_batch_size: int | None = option(
        None,
        "pairs per forward pass of a tower, to save memory; the gradient is still that of the whole batch",
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
        if self.micro_batch_size is not None:
            require_at_least_one(self, "micro_batch_size")
        require_one_of("eval_templates", self.eval_templates, tuple(TEMPLATES))
        if self.class_names:
            require_one_of("class_names", self.class_names, tuple(CLASS_NAMES))
        if self.lock_image_tower and self.lock_text_tower:
            raise ArgumentError("Nothing is left to train: --lock_image_tower and --lock_text_tower lock both towers.")
        if self.text_tower and not self.tokenizer_name:
            raise ArgumentError("--text_tower needs --tokenizer_name, the tokenizer that the tower was trained with.")
        if self.model_name_or_path and (self.image_tower or self.text_tower):
            raise ArgumentError("--model_name_or_path loads both towers: omit --image_tower and --text_tower.")


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
        require_model_type(arguments.model_name_or_path, VlpClipConfig.model_type)
        return load_processor(arguments.model_name_or_path, "--model_name_or_path")
    side = arguments.image_size
    images = VlpClipImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
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
    text = fields["text_config"]
    fields["vision_config"].setdefault("image_size", arguments.image_size)
    text["max_position_embeddings"] = arguments.max_length
    if tokenizer is not None:
        text["vocab_size"] = len(tokenizer)
        text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if arguments.loss == "sigmoid":  # SigLIP, section 3.2
        fields = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0} | fields
    kinds = {kind.model_type: kind for kind in (*VISION, *TEXT)}
    vision = kinds.get(str(fields["vision_config"].get("model_type")), VlpViTConfig)
    text_kind = kinds.get(str(text.get("model_type")), VlpClipTextConfig)
    for part, kind in ((fields, VlpClipConfig), (fields["vision_config"], vision), (text, text_kind)):
        check_fields(part, kind)
    with possible_model():
        return VlpClipConfig(**fields)


def make_model(arguments: ClipArguments, processor: VlpClipProcessor) -> VlpClipModel:
    """Build a new model, or load one and copy its sizes to the arguments; see `Family.model`.

    Raises:
        ArgumentError: if the model cannot be built, or if --loss or --patch_dropout does not suit it.
    """
    if arguments.model_name_or_path:
        require_model_type(arguments.model_name_or_path, VlpClipConfig.model_type)
        model = load_model(VlpClipModel, arguments.model_name_or_path, "--model_name_or_path")
        arguments.image_size = model.config.vision_config.image_size
        arguments.max_length = model.config.text_config.max_position_embeddings
        arguments.vocab_size = model.config.text_config.vocab_size
    else:
        with possible_model():
            model = VlpClipModel(new_config(arguments, processor.tokenizer))
    if (arguments.loss == "sigmoid") != (model.logit_bias is not None):
        has = "has a" if model.logit_bias is not None else "has no"
        raise ArgumentError(f"--loss {arguments.loss} does not suit the model, which {has} logit_bias (SigLIP).")
    for tower, source in (("vision_model", arguments.image_tower), ("text_model", arguments.text_tower)):
        if source:
            load_tower(model, tower, source)
    if arguments.patch_dropout is not None:
        if not hasattr(model.config.vision_config, "patch_dropout"):
            raise ArgumentError("--patch_dropout needs a vision transformer; a ResNet has no patches.")
        model.config.vision_config.patch_dropout = arguments.patch_dropout
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_objective(arguments: ClipArguments, model: VlpClipModel, processor, steps_per_epoch) -> ClipObjective:
    return ClipObjective(
        model,
        exclude_duplicates=arguments.exclude_duplicates,
        lock_image_tower=arguments.lock_image_tower,
        lock_text_tower=arguments.lock_text_tower,
        micro_batch_size=arguments.micro_batch_size,
    )


def make_evaluation(arguments: ClipArguments, rows, train_rows) -> list[Pictures]:
    """Prepare zero-shot classification for each class column and retrieval for each caption column in the data."""
    tasks: list[dict] = []
    for column in (arguments.class_column or "").split(",") if arguments.class_column else []:
        tasks.append({"task": "zero-shot", "class_column": column, "class_names": arguments.class_names,
                      "templates": arguments.eval_templates})  # fmt: skip
    columns = [column for column in arguments.caption_column.split(",") if column in rows.column_names]
    tasks += [{"task": "retrieval", "caption_column": column} for column in columns]
    return evaluation_tasks(arguments, rows, tasks)


def load_tower(model: VlpClipModel, tower: str, source: str) -> None:
    """Initialise a tower, and its projection if the shapes match, from a vlp or transformers CLIP.

    Both libraries use the same tensor names.

    Args:
        model: model to change.
        tower: "vision_model" or "text_model".
        source: folder or hub name of the CLIP.

    Raises:
        ArgumentError: if the tower has another architecture.
    """
    option = {"vision_model": "--image_tower", "text_model": "--text_tower"}[tower]
    theirs = getattr(read_config(source, option), tower.replace("_model", "_config"), None)
    if theirs is None:
        raise ArgumentError(
            f"{option} {printable(source, 120)} has no {tower}; expected a CLIP of vlp or transformers."
        )
    tensors = load_weights(source, option)
    ours = getattr(model.config, tower.replace("_model", "_config"))
    for field in ("num_attention_heads", "hidden_act", "layer_norm_eps"):  # settings that do not show in the shapes
        if getattr(theirs, field, None) != getattr(ours, field, None):
            raise ArgumentError(
                f"{source} has a different {tower}: {field} is {getattr(theirs, field, None)}, and "
                f"{getattr(ours, field, None)} in this model."
            )
    projection = {"vision_model": "visual_projection.weight", "text_model": "text_projection.weight"}[tower]
    wanted = {name: value for name, value in model.state_dict().items() if name.startswith(f"{tower}.")}
    missing = sorted(wanted.keys() - tensors.keys())
    wrong = [f"{name} is {tuple(tensors[name].shape)}, and {tuple(value.shape)} in this model"
             for name, value in wanted.items() if name in tensors and tensors[name].shape != value.shape]  # fmt: skip
    if missing or wrong:
        raise ArgumentError(
            f"{source} has a different {tower}: {'; '.join(wrong[:3] + [f'{n} is missing' for n in missing[:3]])}."
        )
    state = {name: tensors[name] for name in wanted}
    if projection in tensors and projection in model.state_dict():
        if tensors[projection].shape == model.state_dict()[projection].shape:
            state[projection] = tensors[projection]
    model.load_state_dict(state, strict=False)


def make_samples(arguments: ClipArguments, rows, model, processor, maker: SampleMaker) -> SampleMaker:
    """Return the maker of image-caption pairs."""
    return maker


CLIP = Family(
    name="clip",
    text="Train CLIP on pairs of images and captions, evaluate it, and save a publishable folder",
    recipe="clip-emoji",
    arguments=ClipArguments,
    config=new_config,
    processor=make_processor,
    model=make_model,
    objective=make_objective,
    evaluation=make_evaluation,
    samples=make_samples,
)
