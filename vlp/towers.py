"""Pre-trained towers to start from: image and text encoders of vlp, transformers, sentence-transformers and timm.

The configuration of a tower is read and checked first; its weights are loaded when the model has been built.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file

from .configuration.clip import VlpClipConfig
from .configuration.towers import (
    IMAGE_POOLING,
    MOST_TOKENS,
    TEXT_POOLING,
    VlpTextTowerConfig,
    VlpVisionTowerConfig,
    positions_of,
)
from .conversion import image_options, own_copy
from .errors import ArgumentError, UnsupportedModelError, brief, printable
from .loading import (
    load_auto_tokenizer,
    load_image_processor,
    load_model,
    load_weights,
    read_config,
    told_of,
)
from .modeling_vlp.towers import TextTower, VisionTower, pooling_option

IMAGE_ENCODERS = {
    *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *MODEL_FOR_BACKBONE_MAPPING_NAMES, "clip_vision_model",
    "siglip_vision_model", "timm_wrapper",
}  # fmt: skip
TEXT_ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "clip_text_model"}
# Vision transformers whose published weights include no pooled output; beit averages its patches.
AT_CLASS_TOKEN = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_mae", "vit_msn")


@dataclass(frozen=True)
class Start:
    """A tower to start from.

    Attributes:
        name: folder or hub name that it is loaded from.
        option: the option that named it, for error messages.
        config: our configuration of the tower.
        part: "vision_model" or "text_model", if it is a part of a model of vlp; None if it is a model of its own.
        shared_space: what the shape of the projection depends on, if it is a part of a CLIP; the width of the space
            comes first.
        tokenizer_name: folder or hub name of a tokenizer to use instead of the source's.
    """

    name: str
    option: str
    config: PreTrainedConfig
    part: str | None = None
    shared_space: tuple | None = None
    tokenizer_name: str | None = None

    def brings_projection(self, config: VlpClipConfig) -> bool:
        """Whether the source has a projection that a CLIP with this configuration can use."""
        return self.shared_space is not None and self.shared_space == space_of(config)

    def images(self) -> dict:
        """The options of an image processor that prepares images as the source does."""
        if self.part:
            options = image_options(load_image_processor(self.name, self.option))
            if "max_num_patches" not in options:
                return options
            side = self.config.image_size  # a start reads squares
            kept = {name: options[name] for name in ("resample", "image_mean", "image_std")}
            return kept | {"size": {"height": side, "width": side}, "do_center_crop": False}
        return foreign_image_options(self.name, self.option)

    def tokenizer(self, max_length: int):
        """The tokenizer of the source, or the one given instead."""
        if self.tokenizer_name:
            tokenizer = load_auto_tokenizer(
                self.tokenizer_name, "--tokenizer_name", fast=False, model_max_length=max_length
            )
        else:
            tokenizer = load_auto_tokenizer(self.name, self.option, fast=False, model_max_length=max_length)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        return tokenizer

    def load_into(self, model: PreTrainedModel, projection: str | None = None) -> None:
        """Copy the weights into a model with this configuration.

        Args:
            model: the model; its attribute `vision_model` or `text_model` is the tower.
            projection: name of the model's projection, to copy that too.

        Raises:
            UnsupportedModelError: if weights are missing.
        """
        part = "text_model" if isinstance(self.config, VlpTextTowerConfig) else self.part or "vision_model"
        if self.part is None:
            options = pooling_option(self.config.tower, self.config.pooling)
            source = load_model(AutoModel, self.name, self.option, **options)
            tensors = {f"{part}.model.{name}": value for name, value in source.state_dict().items()}
        else:
            tensors = load_weights(self.name, self.option)
        own = model.state_dict()
        wanted = [name for name in own if name.startswith((f"{part}.", *([f"{projection}."] if projection else [])))]
        if missing := [name for name in wanted if name not in tensors or tensors[name].shape != own[name].shape]:
            raise UnsupportedModelError(
                f"{told_of(self.name, self.option)} lacks {len(missing)} weights of its tower, such as {missing[0]}."
            )
        model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)


def space_of(config: PreTrainedConfig) -> tuple | None:
    """What the shapes of a CLIP's projections depend on, besides the towers; None for other models."""
    if not isinstance(config, VlpClipConfig):
        return None
    hidden = (config.visual_projection_hidden_size, config.text_projection_hidden_size)
    return config.projection_dim, *hidden, bool(config.projection_dropout)


# --- image towers -----------------------------------------------------------------------------------------------------


def vision_start(name: str, option: str, pooling: str | None = None, image_size: int | None = None) -> Start:
    """Find the image tower of a model. Only its configuration is read.

    Args:
        name: folder or hub name of an image encoder, or of a CLIP, SigLIP, BLIP or BLIP-2 of any supported format.
        option: the option that named it, for error messages.
        pooling: one of IMAGE_POOLING; None: that of the source.
        image_size: side of the images in pixels; None: that of the source.

    Raises:
        UnsupportedModelError: if the model has no image tower that can be used.
        ArgumentError: if the pooling or the image size does not suit it.
    """
    name = own_copy(name, option)
    config, told = read_config(name, option), told_of(name, option)
    if config.model_type.startswith("vlp_"):
        if pooling:
            raise ArgumentError(f"{told} is a {config.model_type}, which has a pooling of its own.")
        vision = copy.deepcopy(config.vision_config)
        if getattr(vision, "max_num_patches", None) is not None:
            vision.max_num_patches = None  # what it reads is decided anew
        return Start(name, option, vision, "vision_model", space_of(config))
    if config.model_type not in IMAGE_ENCODERS:
        raise UnsupportedModelError(
            f"{told} is a {config.model_type}, not an image encoder; expected one such as a ViT, DINOv2, Swin, "
            "ConvNeXt or ResNet, or a CLIP, SigLIP, BLIP or BLIP-2."
        )
    if pooling is not None and pooling not in IMAGE_POOLING:
        raise ArgumentError(f"the image pooling must be one of {', '.join(IMAGE_POOLING)}, got {pooling!r}.")
    side = image_size or side_of_options(foreign_image_options(name, option))
    pooling = pooling or default_pooling(config)
    config.num_labels = 2  # the classes of a classifier are no part of the tower
    tower = VlpVisionTowerConfig(tower=config, hidden_size=1, pooling=pooling, image_size=side)
    tower.hidden_size, tower.states_size = widths_of(tower, told)
    return Start(name, option, tower)


def default_pooling(config: PreTrainedConfig) -> str:
    """The pooling of an image encoder: at its class token, over its patches, or its own."""
    if config.model_type in AT_CLASS_TOKEN:
        return "cls"
    return "mean" if config.model_type == "beit" else "pooler"


def side_of_options(options: dict) -> int:
    """The side in pixels of the images that an image processor with these options gives."""
    size = options.get("crop_size") if options.get("do_center_crop") else options.get("size")
    return (size or {}).get("height") or (size or {}).get("shortest_edge") or 224


@torch.no_grad()
def widths_of(config: VlpVisionTowerConfig, told: str) -> tuple[int, int]:
    """The widths of an image tower's pooled output and of its states, found without weights.

    Raises:
        UnsupportedModelError: if it has no such output, or does not accept images of this size.
    """
    try:
        with torch.device("meta"):
            tower = VisionTower(config).eval()
            side, channels = config.image_size, getattr(config.tower, "num_channels", 3)
            output = tower(torch.empty(1, channels, side, side))
            return output.pooler_output.shape[-1], output.last_hidden_state.shape[-1]
    except ImportError as error:
        raise UnsupportedModelError(f"{told} needs a package that is not installed: {brief(error)[:200]}") from None
    except Exception as error:
        raise UnsupportedModelError(
            f"{told} gives no pooled features with pooling {config.pooling} for images of {config.image_size} pixels: "
            f"{brief(error)[:200]}"
        ) from None


def foreign_image_options(name: str, option: str) -> dict:
    """The options of our image processor that prepares images as one of transformers or timm does."""
    theirs = load_image_processor(name, option)
    if hasattr(theirs, "data_config"):  # timm
        data = theirs.data_config
        side, share = data["input_size"][-1], data.get("crop_pct") or 1.0
        square = {"height": side, "width": side}
        if data.get("crop_mode", "center") == "squash":
            size = {"size": square, "do_center_crop": False}
        else:
            size = {"size": {"shortest_edge": int(side / share)}, "crop_size": square, "do_center_crop": True}
        resample = {"bicubic": 3, "bilinear": 2, "lanczos": 1, "nearest": 0}[data.get("interpolation") or "bicubic"]
        return size | {"resample": resample, "image_mean": list(data["mean"]), "image_std": list(data["std"])}
    options = image_options(theirs)
    edge = options["size"].get("shortest_edge")
    if edge and not options["do_center_crop"]:  # ConvNeXt: resized by a share, then cropped
        share = getattr(theirs, "crop_pct", None) or 1.0
        options |= {"crop_size": {"height": edge, "width": edge}, "do_center_crop": True}
        options["size"] = {"shortest_edge": int(edge / share) if edge < 384 else edge}
    if getattr(theirs, "include_top", False):  # EfficientNet: divided by the deviation twice
        options["image_std"] = [value**2 for value in options["image_std"]]
    return options


def with_side(options: dict, side: int) -> dict:
    """Change the side, in pixels, of the images that an image processor with these options gives."""
    before, square = side_of_options(options), {"height": side, "width": side}
    if not options.get("do_center_crop"):
        return options | {"size": square}
    edge = options["size"].get("shortest_edge") or before
    return options | {"size": {"shortest_edge": round(edge * side / before)}, "crop_size": square}


# --- text towers ------------------------------------------------------------------------------------------------------


def text_start(
    name: str,
    option: str,
    pooling: str | None = None,
    max_length: int | None = None,
    tokenizer_name: str | None = None,
) -> Start:
    """Find the text tower of a model. Only its configuration is read.

    Args:
        name: folder or hub name of a text encoder of transformers or sentence-transformers, or of a CLIP or SigLIP of
            any supported format.
        option: the option that named it, for error messages.
        pooling: one of TEXT_POOLING; None: that of the source.
        max_length: maximum number of tokens; None: that of the source, at most MOST_TOKENS.
        tokenizer_name: folder or hub name of a tokenizer; None: that of the source.

    Raises:
        UnsupportedModelError: if the model has no text tower that can be used, or no tokenizer.
        ArgumentError: if the pooling or the length does not suit it.
    """
    name = own_copy(name, option)
    config, told = read_config(name, option), told_of(name, option)
    if config.model_type == "vlp_clip":
        if pooling:
            raise ArgumentError(f"{told} is a {config.model_type}, which has a pooling of its own.")
        return Start(name, option, config.text_config, "text_model", space_of(config), tokenizer_name)
    encodes = config.model_type in TEXT_ENCODERS and not getattr(config, "is_encoder_decoder", False)
    if not encodes or getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{told} is a {config.model_type}, not a text encoder; expected one such as a BERT, RoBERTa, XLM-RoBERTa, "
            "DistilBERT, MPNet or ModernBERT, a sentence encoder, or a CLIP or SigLIP."
        )
    if pooling is not None and pooling not in TEXT_POOLING:
        raise ArgumentError(f"the text pooling must be one of {', '.join(TEXT_POOLING)}, got {pooling!r}.")
    tokenizer = load_auto_tokenizer(
        tokenizer_name or name, "--tokenizer_name" if tokenizer_name else option, fast=False
    )
    if tokenizer.pad_token_id is None:
        raise UnsupportedModelError(f"{told} has a tokenizer without a padding token.")
    positions = positions_of(config)
    stated = sentence_length(name)
    length = max_length or min(positions, stated or min(tokenizer.model_max_length, MOST_TOKENS))
    if length > positions:
        raise ArgumentError(f"--max_length {length} is above the {positions} tokens that {told} supports.")
    tower = VlpTextTowerConfig(
        tower=config, hidden_size=config.hidden_size, pooling=pooling or sentence_pooling(name) or own_pooling(config),
        max_position_embeddings=length, vocab_size=config.vocab_size, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    check_pooling(tower, told)
    return Start(name, option, tower, tokenizer_name=tokenizer_name)


def own_pooling(config: PreTrainedConfig) -> str:
    return "pooler" if config.model_type == "clip_text_model" else "mean"


@torch.no_grad()
def check_pooling(config: VlpTextTowerConfig, told: str) -> None:
    """Raise UnsupportedModelError if the tower cannot be built, or has no output for its pooling."""
    try:
        with torch.device("meta"):
            tower = TextTower(config).eval()
        if config.pooling == "pooler" and getattr(tower.model, "pooler", None) is None:
            if config.tower.model_type != "clip_text_model":
                raise ValueError("it has no pooled output")
    except Exception as error:
        raise UnsupportedModelError(
            f"{told} cannot be a text tower with pooling {config.pooling}: {brief(error)[:200]}"
        ) from None


def sentence_file(name: str, file: str) -> dict:
    """The content of a JSON file of sentence-transformers; empty if there is none."""
    folder = Path(name)
    try:
        path = folder / file if folder.is_dir() else cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )  # fmt: skip
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path and Path(path).is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{printable(name, 120)}: {file} is damaged ({brief(error)[:100]}).") from error
    return content if isinstance(content, dict) else {}


def sentence_pooling(name: str) -> str | None:
    """The pooling that a sentence encoder names in `1_Pooling/config.json`; None if it names none that vlp has."""
    content = sentence_file(name, "1_Pooling/config.json")
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max",
             "pooling_mode_lasttoken": "eos"}  # fmt: skip
    chosen = [ours for theirs, ours in names.items() if content.get(theirs)]
    if content.get("pooling_mode") in TEXT_POOLING:
        return content["pooling_mode"]
    return chosen[0] if len(chosen) == 1 else None


def sentence_length(name: str) -> int | None:
    """The maximum number of tokens that a sentence encoder names in `sentence_bert_config.json`."""
    length = sentence_file(name, "sentence_bert_config.json").get("max_seq_length")
    return length if isinstance(length, int) and length > 0 else None
