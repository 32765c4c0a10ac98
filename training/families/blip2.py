"""The BLIP-2 family."""

import dataclasses
import functools
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from ...configuration.blip import VlpBlipConfig
from ...configuration.blip2 import VlpBlip2Config, VlpInstructBlipConfig
from ...configuration.text import VlpQFormerConfig
from ...configuration.towers import VlpVisionTowerConfig
from ...configuration.vision import VlpViTConfig
from ...errors import ArgumentError, brief, printable
from ...loading import load_auto_tokenizer, load_model, load_processor, load_weights, read_config
from ...modeling_vlp.base import adopt
from ...modeling_vlp.blip2 import VlpBlip2ForPreTraining, VlpBlip2PreTrainedModel
from ...modeling_vlp.blip2_generation import VlpBlip2ForConditionalGeneration
from ...modeling_vlp.exchange import lavis
from ...modeling_vlp.exchange.places import ExchangeError, import_state
from ...modeling_vlp.instructblip import VlpInstructBlipForConditionalGeneration
from ...modeling_vlp.language_model import ALLOWED, PACKAGE, language_model_source, load_language_model
from ...processing.blip import VlpBlipImageProcessor, VlpBlipProcessor, token_ids
from ...processing.blip2 import QUESTION, VlpBlip2Processor, VlpInstructBlipProcessor, prompt_of
from ...towers import Start, vision_start
from ..arguments import option, require_at_least_one, require_share
from ..data.features import FeatureMaker
from ..data.rows import CaptionChooser, caption_texts
from ..data.samples import SampleMaker
from ..data.sources import require_text
from ..evaluation.pictures import Pictures
from ..objectives.blip2 import Blip2Objective, LanguageObjective
from .base import (
    Family,
    GroupingArguments,
    cached_features,
    check_fields,
    evaluation_tasks,
    extend,
    limit_length,
    parts_of_model,
    possible_model,
    require_model_type,
)
from .blip import make_tokenizer


@dataclass(kw_only=True)
class Blip2Arguments(GroupingArguments):
    """Options of BLIP-2. The defaults are those of the paper."""

    max_length: int = option(32, "maximum number of tokens in a caption, including start and end", bound=True)
    vocab_size: int = option(30524, "vocabulary size of the tokenizer that is trained on the captions")
    crop_scale: float = option(
        0.5, "smallest share (0 to 1) of the image area that --augmentation crop keeps", bound=True
    )
    horizontal_flip: bool = option(True, "mirror half of the images with --augmentation crop", bound=True)
    per_device_train_batch_size: int = option(100, "pairs per batch in each process", bound=True, shown=True)
    learning_rate: float = option(1e-4, "peak learning rate", shown=True)
    weight_decay: float = option(
        0.05, "weight decay of matrices; not applied to gains, biases, temperature and position embeddings", shown=True
    )
    adam_epsilon: float = option(1e-8, "AdamW: term added to the denominator", shown=True)
    max_grad_norm: float = option(0.0, "norm to clip the gradient to; 0: no clipping", shown=True)
    num_train_epochs: float = option(10.0, "epochs, if neither --max_train_steps nor --max_train_minutes is given")

    # BLIP-2
    stage: Literal[1, 2] = option(
        1,
        "1: train the Q-Former with a frozen image tower; 2: train it to prompt a frozen language model",
        bound=True,
        shown=True,
    )
    vision_tower: str | None = option(
        None,
        "folder or hub name of a model that provides the image tower: an image encoder of transformers or timm, or a "
        "CLIP, SigLIP or BLIP of any supported format; ignored with --model_name_or_path",
    )
    vision_layers_left_out: int = option(0, "number of final vision transformer layers to drop; 1 in the paper")
    freeze_vision: bool = option(True, "freeze the image tower; the paper trains it only when fine-tuning")
    cache_vision_features: bool = option(
        False, "compute the features of the frozen image tower once and cache them on disk; needs --augmentation none"
    )
    bert_name_or_path: str | None = option(
        None, "hub name or folder of a BERT or vlp BLIP to initialise the Q-Former from"
    )
    label_smoothing: float = option(
        0.1, "label smoothing of the contrastive loss (0 to 1); 0.1 in LAVIS, none in the paper", shown=True
    )
    contrastive_share: float = option(
        0.0,
        "share of the run (0 to 1), at its start, that uses only the contrastive loss; for a randomly "
        "initialised Q-Former",
        bound=True,
        shown=True,
    )
    rerank_top_k: int = option(128, "evaluation: candidates per query that are re-ranked with the matching head (ITM)")
    rerank_posterior: bool = option(
        False, "evaluation: re-rank by ITC probability times ITM odds, instead of the original's cosine plus ITM logit"
    )
    language_model_name_or_path: str | None = option(
        None, 'stage 2: hub name or folder of the language model, or "package:NAME" for one in a Python package'
    )
    language_model_file: str | None = option(None, "GGUF file of the language model, if it is in that format")
    language_model_revision: str | None = option(None, "branch, tag or commit of the language model on the hub")
    store_language_model: bool = option(False, "publish the language model's weights too, instead of only its name")
    prompt: str = option(
        "", "stage 2: prompt that every caption starts with; the loss does not include it", bound=True, shown=True
    )
    spelling_share: float = option(
        0.0,
        "stage 2: make the prefix of word embeddings, and learn to choose those of the prompt and the caption during "
        "this share of the run (0 to 1), at its start, without the language model; for short runs",
        bound=True,
        shown=True,
    )
    num_prefix_repeats: int = option(
        1,
        "stage 2: how often the prefix is repeated; with --spelling_share and 2, the language model has read the "
        "caption twice, and so repeats it more reliably",
        bound=True,
        shown=True,
    )
    language_batch_size: int | None = option(
        None,
        "stage 2, after --spelling_share: pairs of each batch that the language model reads, while all pairs go on to "
        "learn word embeddings; all pairs, and no word embeddings, if not given",
        bound=True,
        shown=True,
    )
    prompt_column: str | None = option(
        None,
        "stage 2: column with a question that each caption answers, such as `question` of LLaVA's conversations; the "
        f"language model reads it as {QUESTION!r}, and only the answer has a loss",
        bound=True,
    )
    history_column: str | None = option(
        "history",
        "stage 2, with --prompt_column: column with the earlier questions and answers of a conversation, in turn, "
        "which are read before the question and have no loss; ignored if the data has no such column",
        bound=True,
    )
    instruction_aware: bool = option(
        False,
        "stage 2: the Q-Former reads the prompt, too (InstructBLIP); its text layers are those of stage 1",
        bound=True,
        shown=True,
    )
    example_prompts: str = option("", "prompts of the examples on the model card, joined by |; --prompt if not given")
    eval_num_beams: int = option(5, "evaluation: beams for generating captions")

    def __post_init__(self):
        super().__post_init__()
        if not self.model_name_or_path and not self.vision_tower:
            raise ArgumentError(
                "BLIP-2 needs --vision_tower, a trained CLIP or BLIP (such as runs/clip-emoji from `make train`), or "
                "--model_name_or_path, a BLIP-2 to continue from."
            )
        if self.model_name_or_path:  # it has both, so those that a recipe names are ignored
            self.vision_tower = self.bert_name_or_path = None
        if self.prompt:  # exactly one space between prompt and caption
            self.prompt = f"{self.prompt.rstrip()} "
        if self.stage == 2 and not (self.language_model_name_or_path or self.model_name_or_path):
            raise ArgumentError(
                "--stage 2 needs --language_model_name_or_path, the language model that generates the text."
            )
        if self.stage == 1 and self.language_model_name_or_path:
            raise ArgumentError("--language_model_name_or_path is only for --stage 2; stage 1 has no language model.")
        if self.stage == 1 and (self.prompt or self.example_prompts):
            raise ArgumentError("--prompt and --example_prompts are only for --stage 2; stage 1 has no language model.")
        if self.prompt_column and (self.stage == 1 or self.prompt):
            raise ArgumentError("--prompt_column is for --stage 2, in place of --prompt.")
        local = self.language_model_name_or_path and Path(self.language_model_name_or_path).exists()
        if self.push_to_hub and local and not self.store_language_model:
            raise ArgumentError(
                f"--language_model_name_or_path {self.language_model_name_or_path} is a folder on this machine, which "
                "other users cannot load: give the name of a hub repository, or --store_language_model."
            )
        self.check_groups(self.prompt_column is not None, "--prompt_column")
        if self.cache_vision_features and self.group_images > 1:
            raise ArgumentError("--cache_vision_features does not go with --group_images: features are cached by row.")
        if self.cache_vision_features and (self.augmentation != "none" or not self.freeze_vision):
            raise ArgumentError(
                "--cache_vision_features needs --augmentation none and a frozen tower; otherwise the features change."
            )
        if self.stage == 1 and (self.spelling_share or self.language_batch_size or self.instruction_aware):
            raise ArgumentError(
                "--spelling_share, --language_batch_size and --instruction_aware are only for --stage 2; stage 1 has "
                "no language model."
            )
        if (self.spelling_share or self.num_prefix_repeats > 1) and not self.model_name_or_path:
            raise ArgumentError("--spelling_share and --num_prefix_repeats need --model_name_or_path, a BLIP-2.")
        if self.instruction_aware and not self.model_name_or_path:
            raise ArgumentError(
                "--instruction_aware needs --model_name_or_path, a BLIP-2 of stage 1, whose Q-Former reads text."
            )
        require_share(self, "label_smoothing", "contrastive_share", "spelling_share")
        require_at_least_one(self, "rerank_top_k", "eval_num_beams", "language_batch_size", "num_prefix_repeats")
        if self.vision_layers_left_out < 0:
            raise ArgumentError(f"--vision_layers_left_out must not be negative, got {self.vision_layers_left_out}.")

    prefix_words = None  # what the prefix is made of (see `words_of`); found when the tokenizer is loaded

    @functools.cached_property
    def start(self) -> Start:
        """The start of the image tower, found once."""
        return vision_start(self.vision_tower, "--vision_tower")

    def own_parts(self) -> tuple[str, str] | None:
        if self.stage == 1:
            return None
        if self.instruction_aware:
            return VlpInstructBlipForConditionalGeneration.__name__, "--stage 2 --instruction_aware"
        return VlpBlip2ForConditionalGeneration.__name__, "--stage 2"


def words_of(
    arguments: Blip2Arguments, rows, chooser: CaptionChooser, processor: VlpBlip2Processor
) -> tuple[list[int], list[tuple[int, int]]]:
    """Find the tokens of the training texts, which the prefix may be made of, and those that follow each other.

    Args:
        arguments: options of the run.
        rows: training data; None for shards.
        chooser: draws the texts.
        processor: its tokenizer is that of the language model.

    Raises:
        ArgumentError: if the rows cannot be read in advance.
    """
    if rows is None:
        raise ArgumentError("--spelling_share needs random access to the rows, which shards do not have.")
    before = f"{prompt_of(('',))} " if arguments.prompt_column else arguments.prompt
    texts = dict.fromkeys(processor.clean(before + text) for text in caption_texts(rows, chooser))
    end = processor.tokenizer.eos_token_id
    spelt = [[*ids[: arguments.max_length - 1], end, end] for ids in processor.tokenizer(list(texts))["input_ids"]]
    pairs = {pair for ids in spelt for pair in itertools.pairwise(ids)}
    return sorted({token for ids in spelt for token in ids}), sorted(pairs)


LANGUAGE_MODEL_FIELDS = ("language_model_name_or_path", "language_model_file", "language_model_revision")


def make_processor(arguments: Blip2Arguments, rows, chooser: CaptionChooser) -> VlpBlipProcessor | VlpBlip2Processor:
    """Load the processor of the model to continue from, or build one; see `Family.processor`.

    Images are prepared as for the image tower. Texts are tokenized for the Q-Former in stage 1, and for the language
    model in stage 2.

    Raises:
        ArgumentError: if the model, the image tower or the tokenizer cannot be used.
    """
    name = arguments.base_model
    if name:
        require_model_type(name, VlpBlip2Config.model_type, VlpInstructBlipConfig.model_type)
        processor = load_processor(name, "--model_name_or_path")
        if arguments.stage == 1 or isinstance(processor, VlpBlip2Processor):
            if isinstance(processor, VlpInstructBlipProcessor) != arguments.instruction_aware:
                raise ArgumentError(
                    f"--model_name_or_path {printable(name, 120)} "
                    + ("is a BLIP-2 of stage 2: its Q-Former has no text layers, which --instruction_aware needs."
                       if arguments.instruction_aware else "is an InstructBLIP: continue with --instruction_aware.")
                )  # fmt: skip
            return processor
        images = processor.image_processor
    else:
        images = VlpBlipImageProcessor(**arguments.start.images())
        arguments.image_size = arguments.start.config.image_size
    if arguments.stage == 2:
        tokenizer = language_tokenizer(arguments)
        processor = (
            VlpInstructBlipProcessor(images, tokenizer, processor.tokenizer) if arguments.instruction_aware
            else VlpBlip2Processor(images, tokenizer)
        )  # fmt: skip
        if arguments.spelling_share:
            arguments.prefix_words = words_of(arguments, rows, chooser, processor)
        return processor
    tokenizer_name = arguments.tokenizer_name or arguments.bert_name_or_path
    return VlpBlipProcessor(images, make_tokenizer(arguments, tokenizer_name, rows, chooser))


def language_tokenizer(arguments: Blip2Arguments):
    """Load the tokenizer of the language model. Raises ArgumentError if it cannot be loaded."""
    try:
        source = language_model_source(reference_to(arguments))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--language_model_name_or_path: {brief(error)}") from error
    name = source.pop("pretrained_model_name_or_path")
    return load_auto_tokenizer(
        name, "--language_model_name_or_path", **source, model_max_length=arguments.max_length
    )  # fmt: skip


def reference_to(arguments: Blip2Arguments) -> VlpBlip2Config:
    """Build a configuration that names the language model of the options, whose package the user allows."""
    name = arguments.language_model_name_or_path or ""
    if name.startswith(PACKAGE):
        ALLOWED.add(name.removeprefix(PACKAGE))
    return VlpBlip2Config(
        language_model_name_or_path=arguments.language_model_name_or_path,
        language_model_file=arguments.language_model_file,
        language_model_revision=arguments.language_model_revision,
    )


def new_config(arguments: Blip2Arguments, tokenizer=None) -> VlpBlip2Config:
    """Build the configuration of a new model.

    Args:
        arguments: options of the run.
        tokenizer: in stage 1 the processor, whose tokenizer sets the vocabulary size and the special tokens.

    Raises:
        ArgumentError: if the options do not give a valid configuration.
    """
    fields = parts_of_model(arguments, "qformer_config")
    qformer = fields["qformer_config"]
    check_fields(fields, VlpBlip2Config)
    check_fields(qformer, VlpQFormerConfig)
    start = arguments.start
    if isinstance(start.config, VlpVisionTowerConfig) and arguments.vision_layers_left_out:
        raise ArgumentError(
            f"--vision_layers_left_out {arguments.vision_layers_left_out} is only for towers of vlp; "
            f"{printable(arguments.vision_tower, 120)} is a {start.config.tower.model_type}."
        )
    vision = start.config.to_dict()
    if vision["model_type"] == VlpViTConfig.model_type or arguments.vision_layers_left_out:
        vision["final_norm"] = False  # CLIP only normalises the class token; a layer in the middle has no final norm
    if arguments.vision_layers_left_out:
        left = vision.get("num_hidden_layers", 0) - arguments.vision_layers_left_out
        if left < 1:
            raise ArgumentError(
                f"--vision_layers_left_out {arguments.vision_layers_left_out} leaves no layer of the tower, or the "
                "tower is a ResNet."
            )
        vision["num_hidden_layers"] = left
    if isinstance(tokenizer, VlpBlipProcessor):
        ids = token_ids(tokenizer.tokenizer)
        ids.pop("enc_token_id")  # BLIP-2 has none
        qformer |= ids
    fields |= {"vision_config": vision, "freeze_vision": arguments.freeze_vision}
    with possible_model():
        config = VlpBlip2Config(**fields)
    if config.qformer_config.max_position_embeddings < arguments.max_length and arguments.stage == 1:
        raise ArgumentError(
            f"--max_length {arguments.max_length} is above max_position_embeddings, "
            f"{config.qformer_config.max_position_embeddings}."
        )
    return config


def make_model(arguments: Blip2Arguments, processor) -> VlpBlip2PreTrainedModel:
    """Build the model of the stage around an image tower, or load one to continue from; see `Family.model`.

    Raises:
        ArgumentError: if the model cannot be built, or the language model cannot be loaded.
    """
    name = arguments.base_model
    if arguments.stage == 1 and name:
        model = load_model(VlpBlip2ForPreTraining, name, "--model_name_or_path")
        model.config.freeze_vision = arguments.freeze_vision
        model.vision_model.requires_grad_(not arguments.freeze_vision)
    elif arguments.stage == 1:
        with possible_model():
            model = VlpBlip2ForPreTraining(new_config(arguments, processor))
        arguments.start.load_into(model)
        if arguments.bert_name_or_path:
            load_bert(model, arguments.bert_name_or_path)
    else:
        model = make_stage_2_model(arguments, processor)
        if model.prefix_words is None and (arguments.spelling_share or arguments.language_batch_size):
            raise ArgumentError(
                "--spelling_share and --language_batch_size need a prefix of words, which a run gets with "
                "--spelling_share when it starts from a BLIP-2 of stage 1."
            )
        if arguments.store_language_model:
            model.config.store_language_model, model.config.language_model_name_or_path = True, None
    if name:
        arguments.image_size = model.config.vision_config.image_size
        arguments.vocab_size = model.config.qformer_config.vocab_size
        if arguments.stage == 1:  # where the Q-Former reads the texts
            limit_length(arguments, model.config.qformer_config.max_position_embeddings)
        if arguments.stage == 2:
            for field in LANGUAGE_MODEL_FIELDS:
                setattr(arguments, field, getattr(model.config, field))
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_stage_2_model(arguments: Blip2Arguments, processor) -> VlpBlip2ForConditionalGeneration:
    """Build or load the model of stage 2. Raises ArgumentError if its language model cannot be loaded."""
    name = arguments.base_model
    named = {name: getattr(arguments, name) for name in LANGUAGE_MODEL_FIELDS}
    kind = VlpBlip2ForConditionalGeneration
    if arguments.instruction_aware:
        kind = VlpInstructBlipForConditionalGeneration
    try:
        if name and read_config(name, "--model_name_or_path").architectures[0] == kind.__name__:
            return load_model(kind, name, "--model_name_or_path")
        language_model = load_language_model(reference_to(arguments))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--language_model_name_or_path: {brief(error)}") from error
    if name:
        source = load_model(VlpBlip2ForPreTraining, name, "--model_name_or_path")
        return kind.from_pre_training(
            source, language_model, **named, prefix_words=arguments.prefix_words,
            num_prefix_repeats=arguments.num_prefix_repeats,
        )  # fmt: skip
    config = new_config(arguments)
    for field, value in named.items():
        setattr(config, field, value)
    model = VlpBlip2ForConditionalGeneration(config, language_model)
    arguments.start.load_into(model)
    return model


def load_bert(model: VlpBlip2ForPreTraining, name: str) -> None:
    """Initialise the Q-Former from BERT; queries, cross-attention and [DEC] keep their random weights (section 3.1).

    A vlp BLIP also has cross-attention in its text encoder; all tensors whose shapes match are used.

    Args:
        model: model to change.
        name: folder or hub name of the BERT or BLIP.

    Raises:
        ArgumentError: if the weights do not fit the Q-Former.
    """
    option = "--bert_name_or_path"
    if read_config(name, option).model_type == VlpBlipConfig.model_type:
        given = load_weights(name, option)
        adopt(model, lambda own: given.get(name_in_blip(own)))
        return
    tensors = load_weights(name, option)
    rules = lavis.qformer("bert", "self", "bert.embeddings", "bert.embeddings.LayerNorm")
    tensors = {key if key.startswith("bert.") else f"bert.{key}": value for key, value in tensors.items()}
    tensors = {key.replace(".gamma", ".weight").replace(".beta", ".bias"): value for key, value in tensors.items()}
    own = {key: value for key, value in model.state_dict().items()
           if key.startswith("qformer.") and "cross_attention" not in key and "query_mlp" not in key}  # fmt: skip
    words = "bert.embeddings.word_embeddings.weight"
    if words in tensors:  # tokens that BERT does not have keep their embeddings
        table = model.qformer.embeddings.word_embeddings.weight.detach().clone()
        known = min(len(table), len(tensors[words]))
        table[:known] = tensors[words][:known]
        tensors[words] = table
    try:
        state = import_state(tensors, own, rules, ignored=r".*")
    except ExchangeError as error:
        raise ArgumentError(f"--bert_name_or_path {name}: {error}") from error
    model.load_state_dict(state, strict=False)
    for layer in model.qformer.layers:
        layer.query_mlp.load_state_dict(layer.text_mlp.state_dict())


def name_in_blip(own: str) -> str:
    """Map a tensor name of the Q-Former to BLIP's text model; both feed-forward layers map to its single one."""
    name = own.replace("qformer.", "text_model.", 1).replace(".self_attention.", ".encoder_attention.")
    return name.replace(".query_mlp.", ".").replace(".text_mlp.", ".")


def make_objective(arguments: Blip2Arguments, model, processor, steps_per_epoch: float | None):
    if arguments.stage == 2:
        tokenizer = processor.tokenizer
        if arguments.prompt_column and model.language_model.config.is_encoder_decoder:
            raise ArgumentError("--prompt_column needs a causal language model, not one with an encoder.")
        prompt = tokenizer(processor.clean(arguments.prompt))["input_ids"] if arguments.prompt else []
        if arguments.prompt_column:
            first, second = (
                tokenizer(prompt_of((question,)))["input_ids"][::-1] for question in ("who", "what is it?")
            )
            prompt = os.path.commonprefix([first, second])[::-1]
        return LanguageObjective(
            model, prompt, tokenizer.eos_token_id, arguments.spelling_share, arguments.language_batch_size,
            arguments.micro_batch_size,
        )  # fmt: skip
    return Blip2Objective(
        model,
        exclude_duplicates=arguments.exclude_duplicates,
        label_smoothing=arguments.label_smoothing,
        contrastive_share=arguments.contrastive_share,
        seed=arguments.seed,
        micro_batch_size=arguments.micro_batch_size,
    )


def make_evaluation(arguments: Blip2Arguments, rows, train_rows) -> list[Pictures]:
    """Prepare retrieval and matching for stage 1, captioning for stage 2."""
    tasks: list[dict] = [{"task": "captioning", "prompt": arguments.prompt, "num_beams": arguments.eval_num_beams}]
    if arguments.prompt_column:
        tasks = [{"task": "vqa", "caption_column": arguments.prompt_column, "answer_column": "answers",
                  "num_beams": arguments.eval_num_beams}]  # fmt: skip
    if arguments.stage == 1:
        tasks = [{"task": "retrieval", "rerank_top_k": arguments.rerank_top_k,
                  "rerank_posterior": arguments.rerank_posterior}, {"task": "itm"}]  # fmt: skip
    return evaluation_tasks(arguments, rows, tasks)


def make_samples(arguments: Blip2Arguments, rows, model, processor, maker: SampleMaker) -> SampleMaker:
    """Return the maker of image-caption pairs, or of pairs with cached features of the frozen image tower.

    Raises:
        ArgumentError: if features are to be cached and the data are shards.
    """
    if arguments.prompt_column:
        if rows is not None:
            require_text(rows, arguments.prompt_column, arguments.dataset_name, "--prompt_column")
        maker = dataclasses.replace(
            maker, prompt_column=arguments.prompt_column, history_column=arguments.history_column
        )
    if not arguments.cache_vision_features:
        return maker
    if rows is None:
        raise ArgumentError("--cache_vision_features needs random access to the rows, which shards do not have.")

    def encode(images: list[Image.Image]) -> Tensor:
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return model.encode_image(pixels.to(model.device, model.dtype))

    features = cached_features(
        arguments, rows, encode, model.vision_model, model.config.vision_config, processor.image_processor
    )
    return extend(maker, FeatureMaker, features=features)


BLIP2 = Family(
    name="blip2",
    text="Train BLIP-2, stage 1 or 2, on pairs of images and captions, evaluate it, and save a publishable folder",
    recipe="blip2-emoji",
    arguments=Blip2Arguments,
    config=new_config,
    processor=make_processor,
    model=make_model,
    objective=make_objective,
    evaluation=make_evaluation,
    samples=make_samples,
    fine_tuning=lambda options: f"blip2-stage-{options.stage}",
)
