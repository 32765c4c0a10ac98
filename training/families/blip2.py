"""The BLIP-2 family."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import cached_file

from ...configuration.blip import VlpBlipConfig
from ...configuration.blip2 import VlpBlip2Config
from ...configuration.clip import VlpClipConfig
from ...configuration.text import VlpQFormerConfig
from ...configuration.vision import VlpViTConfig
from ...errors import ArgumentError
from ...modeling_vlp.base import adopt
from ...modeling_vlp.blip2 import VlpBlip2ForPreTraining, VlpBlip2PreTrainedModel
from ...modeling_vlp.blip2_writer import VlpBlip2ForConditionalGeneration, language_model_source, load_language_model
from ...modeling_vlp.exchange import lavis
from ...modeling_vlp.exchange.places import ExchangeError, read
from ...processing.blip import VlpBlipProcessor, token_ids
from ...processing.blip2 import VlpBlip2Processor
from ..arguments import TrainingArguments, option, require_at_least_one, require_share
from ..data.features import FeatureMaker, Features, compute_features
from ..data.rows import CaptionChooser
from ..data.samples import SampleMaker
from ..evaluation.pictures import Pictures
from ..objectives.blip2 import Blip2Objective, LanguageObjective
from ..objectives.distributed import main_process_first
from .base import Family, check_fields, evaluation_tasks, extend, require_model_type
from .blip import make_tokenizer


@dataclass(kw_only=True)
class Blip2Arguments(TrainingArguments):
    """BLIP-2: a Q-Former between a frozen image tower and a frozen language model. The defaults are the paper's."""

    max_length: int = option(32, "most tokens in a caption, start and end included", bound=True)
    vocab_size: int = option(30524, "entries of the tokenizer trained on the captions, where no tokenizer is named")
    crop_scale: float = option(0.5, "least share (0 to 1) of an image's area that augmentation crop keeps", bound=True)
    horizontal_flip: bool = option(True, "augmentation crop also mirrors half of the images", bound=True)
    per_device_train_batch_size: int = option(100, "pairs in a step of each process", bound=True, shown=True)
    learning_rate: float = option(1e-4, "peak learning rate", shown=True)
    weight_decay: float = option(
        0.05, "decay of weight matrices; gains, biases, temperature and positions have none", shown=True
    )
    adam_epsilon: float = option(1e-8, "what AdamW adds to its denominator", shown=True)
    max_grad_norm: float = option(0.0, "gradient norm to clip at; 0 for none", shown=True)
    num_train_epochs: float = option(10.0, "passes over the data, where neither steps nor minutes are given")

    # BLIP-2
    stage: Literal[1, 2] = option(
        1,
        "1: the Q-Former learns to read the image tower; 2: to tell a language model what it read",
        bound=True,
        shown=True,
    )
    vision_tower: str | None = option(
        None, "folder or hub name of a vlp CLIP or BLIP whose image tower is read; --model_name_or_path has its own"
    )
    vision_layers_left_out: int = option(0, "last layers of a vision transformer that are not read; 1 in the paper")
    freeze_vision: bool = option(True, "leave the image tower as it is; the paper fine-tunes it on captions alone")
    cache_vision_features: bool = option(
        False, "compute what the frozen tower gives once, and keep it on disk; needs --augmentation none"
    )
    bert_name_or_path: str | None = option(
        None, "hub name or folder of a BERT, or of a vlp BLIP, that the Q-Former starts from"
    )
    label_smoothing: float = option(
        0.1, "of the contrastive loss' targets (0 to 1); LAVIS has 0.1, the paper none", shown=True
    )
    contrastive_share: float = option(
        0.0,
        "share of the run (0 to 1), at its start, that compares alone: for a Q-Former that begins from nothing",
        bound=True,
        shown=True,
    )
    rerank_top_k: int = option(128, "candidates of each query that evaluation has matched (ITM) again")
    rerank_posterior: bool = option(
        False, "re-rank by ITC's probability times ITM's odds; else by the original's cosine plus ITM's logit"
    )
    language_model_name_or_path: str | None = option(
        None, 'hub name or folder of a language model, or "package:NAME" for a folder that a Python package is'
    )
    language_model_file: str | None = option(None, "the GGUF file in it, where it is one")
    language_model_revision: str | None = option(None, "its branch, tag or commit on the Hub")
    store_language_model: bool = option(False, "publish the language model's weights too, not where they are alone")
    prompt: str = option("", "what every caption begins with in stage 2; it is not learnt", bound=True, shown=True)
    example_prompts: str = option("", "prompts, joined by |, that the card shows answers to; --prompt where not given")
    eval_num_beams: int = option(5, "beams of the captions written in evaluation")

    def __post_init__(self):
        super().__post_init__()
        if not self.model_name_or_path and not self.vision_tower:
            raise ArgumentError(
                "BLIP-2 needs --vision_tower, a trained CLIP or BLIP (such as runs/clip-emoji, from `make train`), or "
                "--model_name_or_path, a BLIP-2 to go on from."
            )
        if self.model_name_or_path:  # it brings both, whatever the recipe names
            self.vision_tower = self.bert_name_or_path = None
        if self.prompt:  # a word of its own, however it was typed
            self.prompt = f"{self.prompt.rstrip()} "
        if self.stage == 2 and not (self.language_model_name_or_path or self.model_name_or_path):
            raise ArgumentError("--stage 2 needs --language_model_name_or_path, the language model that is to write.")
        if self.stage == 1 and self.language_model_name_or_path:
            raise ArgumentError("--language_model_name_or_path is for --stage 2; stage 1 has no language model.")
        if self.stage == 1 and (self.prompt or self.example_prompts):
            raise ArgumentError("--prompt and --example_prompts are for --stage 2; stage 1 has no language model.")
        local = self.language_model_name_or_path and Path(self.language_model_name_or_path).exists()
        if self.push_to_hub and local and not self.store_language_model:
            raise ArgumentError(
                f"--language_model_name_or_path {self.language_model_name_or_path} is a folder on this machine, where "
                "nobody else finds it: give its name on the Hub, or --store_language_model."
            )
        if self.cache_vision_features and (self.augmentation != "none" or not self.freeze_vision):
            raise ArgumentError(
                "--cache_vision_features needs --augmentation none and a frozen tower: else what it gives is another "
                "each time."
            )
        require_share(self, "label_smoothing", "contrastive_share")
        require_at_least_one(self, "rerank_top_k", "eval_num_beams")
        if self.vision_layers_left_out < 0:
            raise ArgumentError(f"--vision_layers_left_out must not be negative, got {self.vision_layers_left_out}.")

    def own_parts(self) -> tuple[str, str] | None:
        return (VlpBlip2ForConditionalGeneration.__name__, "--stage 2") if self.stage == 2 else None


LANGUAGE_MODEL_FIELDS = ("language_model_name_or_path", "language_model_file", "language_model_revision")


def make_processor(arguments: Blip2Arguments, rows, chooser: CaptionChooser) -> VlpBlipProcessor | VlpBlip2Processor:
    """Images as the tower's folder prepares them; texts for the Q-Former, in stage 2 for the language model."""
    name = arguments.model_name_or_path
    if name:
        require_model_type(name, VlpBlip2Config.model_type)
        processor = AutoProcessor.from_pretrained(name)
        if arguments.stage == 1 or isinstance(processor, VlpBlip2Processor):
            return processor
        images = processor.image_processor
    else:
        images = AutoImageProcessor.from_pretrained(arguments.vision_tower)
        arguments.image_size = tower_config(arguments.vision_tower).image_size
    if arguments.stage == 2:
        return VlpBlip2Processor(images, language_tokenizer(arguments))
    tokenizer_name = arguments.tokenizer_name or arguments.bert_name_or_path
    return VlpBlipProcessor(images, make_tokenizer(arguments, tokenizer_name, rows, chooser))


def language_tokenizer(arguments: Blip2Arguments):
    try:
        source = language_model_source(reference_to(arguments))
        return AutoTokenizer.from_pretrained(**source, model_max_length=arguments.max_length)
    except (OSError, ValueError, ImportError) as error:
        raise ArgumentError(
            f"--language_model_name_or_path {arguments.language_model_name_or_path}: {str(error).splitlines()[0]}"
        ) from error


def reference_to(arguments: Blip2Arguments) -> VlpBlip2Config:
    """A configuration that names the language model of the options."""
    return VlpBlip2Config(
        language_model_name_or_path=arguments.language_model_name_or_path,
        language_model_file=arguments.language_model_file,
        language_model_revision=arguments.language_model_revision,
    )


def tower_config(name: str):
    """The configuration of the image tower in a folder. Raises ArgumentError where there is none to be read."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--vision_tower {name}: {str(error).splitlines()[0]}") from error
    if config.model_type not in (VlpClipConfig.model_type, VlpBlipConfig.model_type):
        raise ArgumentError(f"--vision_tower {name} is a {config.model_type}; expected a vlp CLIP or BLIP.")
    return config.vision_config


def new_config(arguments: Blip2Arguments, tokenizer=None) -> VlpBlip2Config:
    """The configuration that the options describe; vocabulary and special tokens are the tokenizer's, where given.

    Raises ArgumentError where it cannot be.
    """
    fields = json.loads(json.dumps(arguments.model))
    qformer = fields.setdefault("qformer_config", {})
    check_fields(fields, VlpBlip2Config)
    check_fields(qformer, VlpQFormerConfig)
    vision = tower_config(arguments.vision_tower).to_dict()
    if vision["model_type"] == VlpViTConfig.model_type or arguments.vision_layers_left_out:
        vision["final_norm"] = False  # CLIP's is on the class token alone, and none is after a layer in the middle
    if arguments.vision_layers_left_out:
        left = vision.get("num_hidden_layers", 0) - arguments.vision_layers_left_out
        if left < 1:
            raise ArgumentError(
                f"--vision_layers_left_out {arguments.vision_layers_left_out} leaves no layer of the tower, or it is a "
                "ResNet."
            )
        vision["num_hidden_layers"] = left
    if isinstance(tokenizer, VlpBlipProcessor):
        ids = token_ids(tokenizer.tokenizer)
        ids.pop("enc_token_id")  # BLIP-2 has none
        qformer |= ids
    fields |= {"vision_config": vision, "freeze_vision": arguments.freeze_vision}
    try:
        config = VlpBlip2Config(**fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ArgumentError(f"--model: {error}") from error
    if config.qformer_config.max_position_embeddings < arguments.max_length and arguments.stage == 1:
        raise ArgumentError(
            f"--max_length {arguments.max_length} is above max_position_embeddings, "
            f"{config.qformer_config.max_position_embeddings}."
        )
    return config


def make_model(arguments: Blip2Arguments, processor) -> VlpBlip2PreTrainedModel:
    """The model of the stage: new around an image tower, or from the folder to go on from."""
    name = arguments.model_name_or_path
    if arguments.stage == 1 and name:
        model = VlpBlip2ForPreTraining.from_pretrained(name, dtype=torch.float32)
        model.config.freeze_vision = arguments.freeze_vision
        model.vision_model.requires_grad_(not arguments.freeze_vision)
    elif arguments.stage == 1:
        model = VlpBlip2ForPreTraining(new_config(arguments, processor))
        load_tower(model, arguments.vision_tower)
        if arguments.bert_name_or_path:
            load_bert(model, arguments.bert_name_or_path)
    else:
        model = make_writer(arguments, processor)
        if arguments.store_language_model:
            model.config.store_language_model, model.config.language_model_name_or_path = True, None
    if name:
        arguments.image_size = model.config.vision_config.image_size
        arguments.vocab_size = model.config.qformer_config.vocab_size
        if arguments.stage == 2:
            for field in LANGUAGE_MODEL_FIELDS:
                setattr(arguments, field, getattr(model.config, field))
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_writer(arguments: Blip2Arguments, processor) -> VlpBlip2ForConditionalGeneration:
    """Stage 2's model. Raises ArgumentError where its language model is not to be had."""
    name = arguments.model_name_or_path
    named = {name: getattr(arguments, name) for name in LANGUAGE_MODEL_FIELDS}
    try:
        if name and AutoConfig.from_pretrained(name).architectures[0] == VlpBlip2ForConditionalGeneration.__name__:
            return VlpBlip2ForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
        language_model = load_language_model(reference_to(arguments))
    except OSError as error:
        raise ArgumentError(str(error)) from error
    if name:
        return VlpBlip2ForConditionalGeneration.from_pre_training(name, language_model, dtype=torch.float32, **named)
    config = new_config(arguments)
    for field, value in named.items():
        setattr(config, field, value)
    model = VlpBlip2ForConditionalGeneration(config, language_model)
    load_tower(model, arguments.vision_tower)
    return model


def load_tower(model: VlpBlip2PreTrainedModel, name: str) -> None:
    """Give the model the image tower of a CLIP or BLIP; layers that it leaves out are not missed."""
    tensors = load_file(cached_file(name, "model.safetensors"))
    state = {key: value for key, value in tensors.items() if key.startswith("vision_model.")}
    own = {key for key in model.state_dict() if key.startswith("vision_model.")}
    if missing := sorted(own - state.keys()):
        raise ArgumentError(f"--vision_tower {name} lacks {', '.join(missing[:3])}.")
    model.load_state_dict({key: state[key] for key in own}, strict=False)


def load_bert(model: VlpBlip2ForPreTraining, name: str) -> None:
    """Start the Q-Former from a BERT; queries, cross-attention and [DEC] start anew (section 3.1).

    Of a vlp BLIP, whose text encoder is BERT's with cross-attention, all is taken that fits.
    """
    if AutoConfig.from_pretrained(name).model_type == VlpBlipConfig.model_type:
        given = load_file(cached_file(name, "model.safetensors"))
        adopt(model, lambda own: given.get(name_in_blip(own)))
        return
    tensors = load_file(cached_file(name, "model.safetensors"))
    rules = lavis.qformer("bert", "self", "bert.embeddings", "bert.embeddings.LayerNorm")
    tensors = {key if key.startswith("bert.") else f"bert.{key}": value for key, value in tensors.items()}
    tensors = {key.replace(".gamma", ".weight").replace(".beta", ".bias"): value for key, value in tensors.items()}
    own = {key: value for key, value in model.state_dict().items()
           if key.startswith("qformer.") and "cross_attention" not in key and "query_mlp" not in key}  # fmt: skip
    words = "bert.embeddings.word_embeddings.weight"
    if words in tensors:  # rows of tokens that BERT does not have stay as they are
        table = model.qformer.embeddings.word_embeddings.weight.detach().clone()
        known = min(len(table), len(tensors[words]))
        table[:known] = tensors[words][:known]
        tensors[words] = table
    try:
        state = read(tensors, own, rules, ignored=r".*")
    except ExchangeError as error:
        raise ArgumentError(f"--bert_name_or_path {name}: {error}") from error
    model.load_state_dict(state, strict=False)
    for layer in model.qformer.layers:
        layer.query_mlp.load_state_dict(layer.text_mlp.state_dict())


def name_in_blip(own: str) -> str:
    """What a tensor of a Q-Former is called in a BLIP's text model; both feed-forward layers are its one."""
    name = own.replace("qformer.", "text_model.", 1).replace(".self_attention.", ".encoder_attention.")
    return name.replace(".query_mlp.", ".").replace(".text_mlp.", ".")


def make_objective(arguments: Blip2Arguments, model, processor, steps_per_epoch: float | None):
    if arguments.stage == 2:
        tokenizer = processor.tokenizer
        prompt = tokenizer(processor.clean(arguments.prompt))["input_ids"] if arguments.prompt else []
        return LanguageObjective(model, prompt, tokenizer.eos_token_id)
    return Blip2Objective(
        model,
        exclude_duplicates=arguments.exclude_duplicates,
        label_smoothing=arguments.label_smoothing,
        contrastive_share=arguments.contrastive_share,
        seed=arguments.seed,
    )


def make_evaluation(arguments: Blip2Arguments, rows, train_rows) -> list[Pictures]:
    """Retrieval and matching after stage 1, captioning after stage 2."""
    tasks: list[dict] = [{"task": "captioning", "prompt": arguments.prompt, "num_beams": arguments.eval_num_beams}]
    if arguments.stage == 1:
        tasks = [{"task": "retrieval", "rerank_top_k": arguments.rerank_top_k,
                  "rerank_posterior": arguments.rerank_posterior}, {"task": "itm"}]  # fmt: skip
    return evaluation_tasks(arguments, rows, tasks)


def make_samples(arguments: Blip2Arguments, rows, model, processor, maker: SampleMaker) -> SampleMaker:
    """Plain pairs, or pairs with the features of the frozen tower, which are computed once."""
    if not arguments.cache_vision_features:
        return maker
    if rows is None:
        raise ArgumentError("--cache_vision_features needs random access to the rows, which shards do not give.")
    with main_process_first():
        path = compute_features(model, processor, rows, arguments.image_column, arguments.max_image_pixels,
                                arguments.eval_batch_size)  # fmt: skip
    return extend(maker, FeatureMaker, features=Features(path))


BLIP2 = Family(
    name="blip2",
    text="Pre-train BLIP-2, stage 1 or 2, on pairs of images and captions, evaluate it, and write a folder to publish",
    recipe="blip2-emoji",
    arguments=Blip2Arguments,
    config=new_config,
    processor=make_processor,
    model=make_model,
    objective=make_objective,
    evaluation=make_evaluation,
    samples=make_samples,
)
