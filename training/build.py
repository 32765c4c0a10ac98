"""What a run is made of, from its options: rows, processor, model. Wrong options end here, with what to do."""

import dataclasses
import difflib
import importlib.util
import json
import math
import os

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.utils import cached_file

from ..configuration import VlpClipConfig, VlpClipTextConfig, VlpViTConfig
from ..configuration.clip import VISION_CONFIGS
from ..modeling_vlp.clip import VlpClipModel
from ..processing.clip import VlpClipImageProcessor, VlpClipProcessor
from ..processing.tokenizer import VlpClipTokenizer
from .arguments import ArgumentError, TrainingArguments
from .data import CaptionChooser, caption_texts
from .sources import is_shards, load_rows, require_column, require_text


def load_data(arguments: TrainingArguments) -> tuple:
    """The rows to train on (None for shards) and to evaluate on (None for no evaluation)."""
    name, rows, eval_rows = arguments.dataset_name, None, None
    if is_shards(name):
        check_shards(arguments)
    else:
        rows = load_rows(
            name, arguments.train_split, arguments.image_column, arguments.image_root, arguments.dataset_config_name
        )
        require_text(rows, arguments.caption_column, name, "--caption_column")
        if arguments.tag_share:
            require_text(rows, arguments.tag_column, name, "--tag_column")
    if arguments.hold_out:
        rows, eval_rows = hold_out(rows, arguments)
    elif arguments.eval_split:
        other = arguments.eval_dataset_name or name
        if is_shards(other):
            raise ArgumentError("Evaluation needs data whose rows are known: --eval_dataset_name cannot be shards.")
        image_column = arguments.eval_image_column or arguments.image_column
        config = None if arguments.eval_dataset_name else arguments.dataset_config_name
        eval_rows = load_rows(other, arguments.eval_split, image_column, arguments.image_root, config)
        if image_column != arguments.image_column:
            eval_rows = eval_rows.rename_column(image_column, arguments.image_column)
        if not arguments.class_column:
            require_text(eval_rows, arguments.caption_column, other, "--caption_column")
    if eval_rows is not None and arguments.class_column:
        require_column(eval_rows, arguments.class_column, arguments.eval_dataset_name or name, "--class_column")
    return rows, eval_rows


def check_shards(arguments: TrainingArguments) -> None:
    """Raise ArgumentError where shards cannot be streamed as the options say."""
    if not importlib.util.find_spec("webdataset"):
        raise ArgumentError('Shards need webdataset: pip install "vlp[webdataset]".')
    import webdataset

    sources = arguments.dataset_name.split("::")
    for path in (path for source in sources for path in webdataset.shardlists.expand_urls(source)):
        if "://" not in path and not path.startswith("pipe:") and not os.path.isfile(path):
            raise ArgumentError(f"--dataset_name {arguments.dataset_name}: there is no shard {path}.")
    if arguments.shard_weights:
        try:
            weights = [float(weight) for weight in arguments.shard_weights.split("::")]
        except ValueError:
            weights = []
        if len(weights) != len(sources) or min(weights) < 0 or not sum(weights):
            raise ArgumentError(
                f"--shard_weights must be {len(sources)} numbers joined by ::, one for each source, not "
                f"{arguments.shard_weights!r}."
            )
    if arguments.shard_size is None and not (arguments.max_train_steps or arguments.max_train_minutes):
        raise ArgumentError("Shards have no known length: give --max_train_steps, --max_train_minutes or --shard_size.")
    if arguments.cache_images:
        raise ArgumentError("--cache_images would keep all shards in memory: use --no-cache_images.")


def hold_out(rows, arguments: TrainingArguments) -> tuple:
    """Part the rows in those to train on and those that `--hold_out` names, to evaluate on."""
    column, value = arguments.hold_out.split("=", 1)
    if rows is None:
        raise ArgumentError("--hold_out needs data whose rows are known beforehand, not shards.")
    require_column(rows, column, arguments.dataset_name, "--hold_out")
    held = [str(entry) == value for entry in rows[column]]
    if not any(held) or all(held):
        raise ArgumentError(
            f"--hold_out {arguments.hold_out}: {sum(held)} of {len(held)} rows; expected some, not all."
        )
    kept = rows.select([number for number, out in enumerate(held) if not out])
    return kept, rows.select([number for number, out in enumerate(held) if out])


def make_chooser(arguments: TrainingArguments) -> CaptionChooser:
    return CaptionChooser(
        caption_column=arguments.caption_column,
        tag_column=arguments.tag_column,
        tag_share=arguments.tag_share,
        templates=arguments.templates,
        template_share=arguments.template_share,
    )


def make_processor(arguments: TrainingArguments, rows, chooser: CaptionChooser) -> VlpClipProcessor:
    """The processor of the model gone on from, else one of the image size asked for, its tokenizer named or trained."""
    if arguments.model_name_or_path:
        return AutoProcessor.from_pretrained(arguments.model_name_or_path)
    side = arguments.image_size
    images = VlpClipImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    name, length = arguments.tokenizer_name, arguments.max_length
    if name and name.endswith(".gz"):
        tokenizer = VlpClipTokenizer.from_openai_merges(name, length)
    elif name:
        tokenizer = AutoTokenizer.from_pretrained(name, model_max_length=length)
    elif rows is None:
        raise ArgumentError("Training on shards needs --tokenizer_name: captions are not known beforehand.")
    else:
        texts = caption_texts(rows, chooser)
        tokenizer = VlpClipTokenizer.train(texts, arguments.vocab_size, length, arguments.clean_text)
    check_tokenizer(tokenizer, name)
    return VlpClipProcessor(images, tokenizer)


def check_tokenizer(tokenizer, name: str | None) -> None:
    """Raise ArgumentError for a tokenizer that CLIP's text tower cannot pool: captions must end in one end token."""
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None or tokenizer.bos_token_id is None:
        raise ArgumentError(f"--tokenizer_name {name} lacks a start, end or pad token, which CLIP needs.")
    ids = tokenizer("a")["input_ids"]
    if ids[-1] != tokenizer.eos_token_id or tokenizer.eos_token_id in ids[:-1]:
        raise ArgumentError(f"--tokenizer_name {name} does not put its end token, once, at the end of a caption.")


def new_config(arguments: TrainingArguments, tokenizer=None) -> VlpClipConfig:
    """The configuration that the options describe; vocabulary and special tokens are the tokenizer's, where given.

    Raises ArgumentError where it cannot be.
    """
    fields = json.loads(json.dumps(arguments.model))
    fields.setdefault("vision_config", {}).setdefault("image_size", arguments.image_size)
    text = fields.setdefault("text_config", {})
    text["max_position_embeddings"] = arguments.max_length
    if tokenizer is not None:
        text["vocab_size"] = len(tokenizer)
        text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if arguments.loss == "sigmoid":  # SigLIP, section 3.2
        fields = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0} | fields
    vision = VISION_CONFIGS.get(fields["vision_config"].get("model_type", VlpViTConfig.model_type), VlpViTConfig)
    for part, kind in ((fields, VlpClipConfig), (fields["vision_config"], vision), (text, VlpClipTextConfig)):
        known = [item.name for item in dataclasses.fields(kind)] + ["model_type"]
        for name in part:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ArgumentError(f"--model: {kind.__name__} has no field {name!r}{f'; {near[0]}?' if near else '.'}")
    try:
        return VlpClipConfig(**fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ArgumentError(f"--model: {error}") from error


def make_model(arguments: TrainingArguments, processor: VlpClipProcessor) -> VlpClipModel:
    if arguments.model_name_or_path:
        kind = AutoConfig.from_pretrained(arguments.model_name_or_path).model_type
        if kind != VlpClipConfig.model_type:
            raise ArgumentError(f"{arguments.model_name_or_path} is a {kind}, not a {VlpClipConfig.model_type}.")
        model = AutoModel.from_pretrained(arguments.model_name_or_path, dtype=torch.float32)
    else:
        model = VlpClipModel(new_config(arguments, processor.tokenizer))
    if (arguments.loss == "sigmoid") != (model.logit_bias is not None):
        has = "has a" if model.logit_bias is not None else "has no"
        raise ArgumentError(f"--loss {arguments.loss} does not fit the model, which {has} logit_bias (SigLIP).")
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


def load_tower(model: VlpClipModel, tower: str, source: str) -> None:
    """Start a tower, and its projection where it fits, from a vlp or transformers CLIP (their names are the same)."""
    tensors = load_file(cached_file(source, "model.safetensors"))
    theirs = getattr(AutoConfig.from_pretrained(source), tower.replace("_model", "_config"))
    ours = getattr(model.config, tower.replace("_model", "_config"))
    for field in ("num_attention_heads", "hidden_act", "layer_norm_eps"):  # what shapes do not show
        if getattr(theirs, field, None) != getattr(ours, field, None):
            raise ArgumentError(
                f"{source} has another {tower}: {field} is {getattr(theirs, field, None)} there and "
                f"{getattr(ours, field, None)} here."
            )
    projection = {"vision_model": "visual_projection.weight", "text_model": "text_projection.weight"}[tower]
    wanted = {name: value for name, value in model.state_dict().items() if name.startswith(f"{tower}.")}
    missing = sorted(wanted.keys() - tensors.keys())
    wrong = [f"{name} is {tuple(tensors[name].shape)} there and {tuple(value.shape)} here"
             for name, value in wanted.items() if name in tensors and tensors[name].shape != value.shape]  # fmt: skip
    if missing or wrong:
        raise ArgumentError(
            f"{source} has another {tower}: {'; '.join(wrong[:3] + [f'{n} is missing' for n in missing[:3]])}."
        )
    state = {name: tensors[name] for name in wanted}
    if projection in tensors and projection in model.state_dict():
        if tensors[projection].shape == model.state_dict()[projection].shape:
            state[projection] = tensors[projection]
    model.load_state_dict(state, strict=False)
