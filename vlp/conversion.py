"""`vlp convert SOURCE TARGET`: convert checkpoints of other libraries to vlp, and back.

    vlp convert ViT-B-32.pt runs/clip                       # OpenAI's, read without running its code
    vlp convert open_clip_folder runs/clip                  # open_clip, transformers, salesforce/BLIP
    vlp convert model.pt runs/clip --hidden_act gelu        # a file of weights does not record its activation
    vlp convert blip2_pretrained.pth runs/blip2 --image_tower eva_vit_g.pth      # LAVIS
    vlp convert runs/clip exported --to transformers        # also open_clip, openai, salesforce, lavis

The format of the source is detected from its files, and the architecture is inferred from the tensor shapes.
Preprocessing and tokenizer are converted too if the source has them.
"""

import argparse
import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCardData, snapshot_download
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    Blip2Processor,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPProcessor,
    InstructBlipProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Processor,
    SiglipImageProcessor,
    SiglipProcessor,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers.utils import cached_file

from .architectures import ARCHITECTURES, architecture
from .configuration.clip import VlpClipConfig
from .configuration.text import VlpSiglipTextConfig
from .configuration.towers import VlpVisionTowerConfig
from .configuration.vision import VlpModifiedResNetConfig, VlpSiglipViTConfig
from .errors import ArgumentError, UnsupportedModelError, brief, printable
from .files import (
    TEACHER_FILE,
    UNFINISHED,
    cache_folder,
    check_new_file,
    check_output,
    current_umask,
    start_anew,
    state_folder,
    usable_path,
    write_file,
    write_whole,
)
from .loading import (
    ADAPTERS,
    check_files,
    holds_model,
    licence_of,
    load_auto_tokenizer,
    load_bert_tokenizer,
    load_image_processor,
    load_model,
    load_processor,
    read_config,
    readable_as,
    row_of,
    told_of,
)
from .modeling_vlp.blip2_generation import PREFIX, VlpBlip2ForConditionalGeneration
from .modeling_vlp.clip import VlpClipModel
from .modeling_vlp.exchange import lavis, open_clip, openai, salesforce
from .modeling_vlp.exchange import transformers as peer
from .modeling_vlp.exchange.files import read_tensors
from .modeling_vlp.exchange.places import ExchangeError, Rule, State, export_state, import_state, shortened
from .processing.blip import VlpBlipImageProcessor, VlpBlipProcessor, with_blip_tokens
from .processing.blip2 import VlpBlip2Processor, VlpInstructBlipProcessor
from .processing.clip import VlpClipImageProcessor, VlpClipProcessor
from .processing.naflex import VlpNaflexImageProcessor
from .processing.tokenizer import VlpClipTokenizer

COPIES = 2  # counted up when a conversion gives something else, so that copies in the cache are made anew
CONVERTED = (
    "blip",
    "blip-2",
    "clip",
    "instructblip",
    "siglip",
    "siglip2",
    "vision-text-dual-encoder",
)  # model types of transformers that vlp has an architecture for
OPEN_CLIP = "open_clip_config.json"
QFORMER_TOKENIZER = "qformer_tokenizer"  # folder of the second tokenizer of an InstructBLIP, in vlp and transformers
HUB_NAME = re.compile(r"[\w][\w.-]*/[\w.-]+")
LARGEST = 4096  # image size, number of tokens and number of heads
NAFLEX_OPTIONS = ("resample", "image_mean", "image_std", "patch_size", "max_num_patches")
LOCAL = "local"
SINGLE_FILES = ("openai", "salesforce", "lavis")  # targets that are a file, not a folder
TARGETS = ("vlp", "transformers", "open_clip", "openai", "salesforce", "lavis")
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")


@dataclass
class Checkpoint:
    """A model during conversion.

    Attributes:
        architecture: the name of our model class.
        config: our configuration.
        tensors: the state dict, with our names.
        images: the preprocessing; the default one of the architecture if the source has none.
        tokenizer: None if the source has none.
        qformer_tokenizer: InstructBLIP: the tokenizer of the Q-Former; None if the source has none.
        teacher: the momentum towers and the queue, as `training.momentum.Teacher` saves them; empty if there are none.
        notes: messages for the user, such as what was not converted and why.
        licence: the licence in the card of the source; None if it is not known.
        source: name of the source, for the card.
    """

    architecture: str
    config: PreTrainedConfig
    tensors: State
    images: VlpClipImageProcessor
    tokenizer: PreTrainedTokenizerFast | None = None
    qformer_tokenizer: PreTrainedTokenizerFast | None = None
    teacher: State = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    licence: str | None = None
    source: str = ""

    @property
    def is_clip(self) -> bool:
        return self.architecture == "VlpClipModel"

    @property
    def has_language_model(self) -> bool:
        return issubclass(architecture(self.architecture).model, VlpBlip2ForConditionalGeneration)

    @property
    def reads_instructions(self) -> bool:
        return getattr(architecture(self.architecture).model, "reads_instructions", False)

    def model(self):
        """Our model with these tensors, including those of its language model if they are present."""
        stored = getattr(self.config, "store_language_model", None)
        if any(name.startswith(PREFIX) for name in self.tensors):
            self.config.store_language_model = True
        model = architecture(self.architecture).model(self.config)
        model.load_state_dict(self.tensors)
        if stored is not None:
            model.config.store_language_model = stored
        return model


# --- import -------------------------------------------------------------------------------------------------------


def read_source(source: Path, options) -> Checkpoint:
    """Read a checkpoint in any format that vlp supports.

    Args:
        source: a file of weights, or a folder.
        options: the options of the command line, as attributes.

    Raises:
        ExchangeError: if the source is missing, or its format or architecture is not supported.
    """
    if source.is_file():
        return from_file(source, options)
    if not source.is_dir():
        raise ExchangeError(f"{source}: no such file or folder.")
    if (source / "open_clip_config.json").is_file():
        return from_open_clip(source, options.tokenizer is None)
    if not holds_model(source):
        raise ExchangeError(
            f"{source} contains neither config.json nor open_clip_config.json: pass a file of weights instead."
        )
    config = read_config(source, "SOURCE")
    if config.model_type.startswith("vlp_"):
        return from_vlp(source, config, options.architecture)
    return from_transformers(source, config, options.tokenizer is None)


def from_vlp(folder: Path, config: PreTrainedConfig, name: str | None = None) -> Checkpoint:
    """Read a folder of vlp.

    Args:
        folder: the folder.
        config: its configuration.
        name: the architecture to read it as, such as a captioner from a pre-trained BLIP; None: its own.

    Raises:
        UnsupportedModelError: if it cannot be read as that architecture.
    """
    row = row_of(folder, config, "SOURCE", read_as=name)
    model = load_model(row.model, folder, "SOURCE")
    found = Checkpoint(type(model).__name__, model.config, model.state_dict(), default_images(config))
    if (folder / ADAPTERS).is_file() or (folder / "tokenizer_config.json").is_file():
        processor = load_processor(folder, "SOURCE")
        found.images, found.tokenizer = processor.image_processor, processor.tokenizer
        found.qformer_tokenizer = getattr(processor, "qformer_tokenizer", None)
    elif (folder / "preprocessor_config.json").is_file():
        found.images = load_image_processor(folder, "SOURCE")
    return found


def from_transformers(folder: Path, config: PreTrainedConfig, with_tokenizer: bool = True) -> Checkpoint:
    """Read a folder of transformers.

    Args:
        folder: the folder.
        config: its configuration.
        with_tokenizer: read the tokenizer, too; not if another one replaces it.

    Raises:
        ExchangeError: if vlp has no such architecture, or the tensors do not fit it.
    """
    name = name_of_peer((config.architectures or ["none"])[0])
    if (config.architectures or [None])[0] == peer.DUAL_ENCODER_CLASS:  # its parts' files have names of their own
        state = load_model(VisionTextDualEncoderModel, folder, "SOURCE").state_dict()
    else:
        state = weights_of(folder)
    ours = peer.config_from(config)
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    if words in state:  # input and output embeddings are tied and stored once
        state.setdefault("text_decoder.cls.predictions.decoder.weight", state[words])
    found = assemble(name, ours, state, peer.rules_of(ours, name), peer.IGNORED)
    if list(folder.glob("*processor_config.json")):
        theirs = load_image_processor(folder, "SOURCE", backend="pil")
        found.images = image_processor_for(found.config, image_options(theirs))
        if isinstance(found.images, VlpNaflexImageProcessor):
            found.config.vision_config.max_num_patches = found.images.max_num_patches
    if with_tokenizer and (folder / "tokenizer_config.json").is_file():
        found.tokenizer = tokenizer_of(found, str(folder))
    if (folder / QFORMER_TOKENIZER).is_dir():
        found.qformer_tokenizer = load_bert_tokenizer(folder / QFORMER_TOKENIZER, "SOURCE")
        found.qformer_tokenizer.model_max_length = ours.qformer_config.max_position_embeddings
    return found


def name_of_peer(theirs: str) -> str:
    """The name of our model class for one of transformers.

    Args:
        theirs: the name of transformers' model class.

    Raises:
        ExchangeError: if vlp has no such architecture.
    """
    if theirs in ("SiglipModel", "Siglip2Model", peer.DUAL_ENCODER_CLASS):
        return VlpClipModel.__name__
    theirs = {"Blip2Model": "Blip2ForConditionalGeneration"}.get(theirs, theirs)  # the same parts
    # If two of our classes have the same peer, the later row wins: it has no language modelling head, like the peer.
    found = {row.peer: row.model.__name__ for row in ARCHITECTURES if row.peer}
    if theirs not in found:
        raise ExchangeError(f"vlp cannot convert {theirs}; it converts {', '.join(found)}.")
    return found[theirs]


def from_open_clip(folder: Path, with_tokenizer: bool = True) -> Checkpoint:
    """Read a folder of open_clip.

    Args:
        folder: the folder.
        with_tokenizer: as for `from_transformers`.

    Raises:
        ExchangeError: if vlp does not support the architecture, or the tensors do not fit it.
    """
    path = folder / "open_clip_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        model_cfg = settings["model_cfg"]
        if not all(isinstance(model_cfg[name], dict) for name in ("vision_cfg", "text_cfg")):
            raise TypeError("vision_cfg and text_cfg must be objects")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExchangeError(f"{path} is damaged ({brief(repr(error))[:120]}): download it again.") from error
    state = openai.as_native(weights_of(folder))
    config = open_clip.config_from(state, model_cfg)
    found = assemble("VlpClipModel", config, state, open_clip.RULES, open_clip.IGNORED)
    images = open_clip.image_options(settings.get("preprocess_cfg", {}), config.vision_config.image_size)
    found.images = VlpClipImageProcessor(**images)
    if with_tokenizer and (folder / "tokenizer_config.json").is_file():
        found.tokenizer = tokenizer_of(found, str(folder))
    return found


def from_file(path: Path, options) -> Checkpoint:
    """Read a file of weights of OpenAI, open_clip, salesforce/BLIP or LAVIS.

    Args:
        path: the file.
        options: the options of the command line, as attributes.

    Raises:
        ExchangeError: if the file is not supported, or an option that it needs is missing.
    """
    state = openai.as_native(read_tensors(path))
    heads = dict(vision_heads=options.vision_heads, text_heads=options.text_heads)
    if lavis.is_blip2(state):
        found = from_lavis(path, state, options)
    elif any(name.startswith("visual_encoder.") for name in state):
        name = salesforce.architecture_of(state)
        config = salesforce.config_from(state, **heads)
        ignored = f"{salesforce.IGNORED}|{salesforce.TEACHER}"
        found = assemble(name, config, state, salesforce.RULES[name], ignored)
        found.teacher = salesforce.teacher_from(state, config)
    elif any(name.startswith("visual.") for name in state):
        act = options.hidden_act or ("quick_gelu" if openai.is_openai(state) else None)
        if act is None:
            raise ExchangeError(
                f"{path} does not record its activation, and a wrong one silently degrades the results: pass "
                "--hidden_act quick_gelu (OpenAI's weights and models trained with --force-quick-gelu) or gelu."
            )
        config = openai.config_from(state, act, **heads)
        found = assemble("VlpClipModel", config, state, openai.RULES, openai.IGNORED)
    else:
        raise ExchangeError(
            f"{path} contains neither a CLIP (visual.*) nor a BLIP (visual_encoder.*): pass its folder instead."
        )
    return found


def from_lavis(path: Path, state: State, options) -> Checkpoint:
    """Read a BLIP-2 of LAVIS, whose file contains only the trained parts.

    Args:
        path: the file, for error messages.
        state: its state dict.
        options: the options of the command line, as attributes: `image_tower`, `language_model` and heads.

    Raises:
        ExchangeError: if a part is missing and no option names it, or the tensors do not fit.
    """
    if options.image_tower:
        state = {key: value for key, value in state.items() if not key.startswith("visual_encoder.")}
        state |= lavis.tower_from(read_tensors(Path(options.image_tower)))
    elif not any(name.startswith("visual_encoder.") for name in state):
        raise ExchangeError(
            f"{path} has no image tower, which LAVIS stores in a separate file: pass --image_tower eva_vit_g.pth (or "
            "clip_vit_L.pth)."
        )
    name, text = lavis.architecture_of(state), None
    if name == "VlpBlip2ForConditionalGeneration":
        if not options.language_model:
            raise ExchangeError(f"{path} is a stage 2 checkpoint without its language model: pass --language_model.")
        text = read_config(options.language_model, "--language_model")
    vision = lavis.vision_config_from(state, options.vision_heads)
    config = lavis.config_from(state, vision, text, options.text_heads)
    config.language_model_name_or_path = options.language_model
    return assemble(name, config, lavis.with_joint_bias(state), lavis.rules_of(config), lavis.IGNORED)


def assemble(name: str, config: PreTrainedConfig, state: State, rules: tuple[Rule, ...], ignored: str) -> Checkpoint:
    """Convert another library's tensors to a checkpoint of ours.

    If the source has no temperature, it gets the initial value of a new model, and a note says so.

    Args:
        name: the name of our model class.
        config: our configuration.
        state: the other library's state dict.
        rules: how names map.
        ignored: regular expression for names in `state` that are not needed.

    Raises:
        ExchangeError: if the tensors do not fit.
    """
    with torch.device("meta"):
        model = architecture(name).model(config)
        wanted = model.state_dict()
    for key, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if key.startswith(PREFIX) and source in state:  # a language model's tied weights are stored once
            state.setdefault(key, state[source])
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    without = {"temp"} - state.keys() if "temp" in wanted else set()
    tensors = import_state(state, {key: value for key, value in wanted.items() if key not in without}, rules, ignored)
    notes = []
    if without:
        tensors["temp"] = torch.tensor(config.temperature_init_value)
        notes.append(f"the source has no temperature: initialised to {config.temperature_init_value}")
    config.architectures = [name]
    return Checkpoint(name, config, tensors, default_images(config), notes=notes)


def default_images(config: PreTrainedConfig) -> VlpClipImageProcessor:
    """The default preprocessing of OpenAI, BLIP or SigLIP, for a model's image size."""
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    if config.vision_config.model_type == VlpVisionTowerConfig.model_type:
        return VlpClipImageProcessor(size=square, do_center_crop=False)
    if config.model_type != VlpClipConfig.model_type:
        return VlpBlipImageProcessor(size=square)
    if getattr(config.vision_config, "max_num_patches", None) is not None:
        return image_processor_for(config, {"patch_size": config.vision_config.patch_size})
    if config.vision_config.model_type == VlpSiglipViTConfig.model_type:
        half = [0.5, 0.5, 0.5]
        return VlpClipImageProcessor(size=square, do_center_crop=False, image_mean=half, image_std=half)
    return VlpClipImageProcessor(size={"shortest_edge": side}, crop_size=square)


def image_processor_for(config: PreTrainedConfig, options: dict) -> VlpClipImageProcessor:
    """The image processor of a model, with these options (see `image_options`)."""
    vision = config.vision_config
    if getattr(vision, "max_num_patches", None) is not None:
        kept = {name: options[name] for name in NAFLEX_OPTIONS if name in options}
        return VlpNaflexImageProcessor(**{"max_num_patches": vision.max_num_patches} | kept)
    is_clip = config.model_type == VlpClipConfig.model_type
    return (VlpClipImageProcessor if is_clip else VlpBlipImageProcessor)(**options)


def image_options(images) -> dict:
    """The options to construct an image processor like this one, ours or transformers'."""
    names = ("size", "crop_size", "do_center_crop", *NAFLEX_OPTIONS)
    options = {name: getattr(images, name, None) for name in names}
    options["do_center_crop"] = bool(options["do_center_crop"])  # None if the processor has no such option
    return {name: dict(v) if hasattr(v, "items") else v for name, v in options.items() if v is not None}


def tokenizer_of(found: Checkpoint, name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer for a model.

    Args:
        found: the checkpoint.
        name: hub name or folder of the tokenizer, or OpenAI's bpe_simple_vocab_16e6.txt.gz.
    """
    if found.has_language_model:
        return load_auto_tokenizer(name, "--tokenizer")
    length = getattr(found.config, "qformer_config", found.config.text_config).max_position_embeddings
    if name.endswith(".gz"):
        return VlpClipTokenizer.from_openai_merges(name, length)
    return (
        load_auto_tokenizer(name, "--tokenizer", model_max_length=length)
        if found.is_clip
        else with_blip_tokens(load_bert_tokenizer(name, "--tokenizer"), length)
    )


def weights_of(folder: Path) -> State:
    """Read all tensors of a folder, from one file or several shards.

    Raises:
        ExchangeError: if the folder contains no weights.
        UnsupportedModelError: if a file is damaged, or the index refers to files outside the folder.
    """
    check_files(folder, f"SOURCE {printable(folder, 120)}")
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: value for name in names for key, value in read_tensors(folder / name).items()}
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise ExchangeError(f"{folder} contains no weights: there is none of {', '.join(WEIGHTS)}.")


# --- export -------------------------------------------------------------------------------------------------------


def write_target(found: Checkpoint, target: Path, to: str) -> list[str]:
    """Write a checkpoint, completely or not at all.

    Args:
        found: the checkpoint.
        target: the folder or file to write.
        to: the format, one of TARGETS.

    Returns:
        The names of our tensors that the format cannot store.

    Raises:
        ExchangeError: if the format does not support the model.
        ArgumentError: if the target is a folder with other files in it.
    """
    if to == "vlp":
        write_whole(target, lambda fresh: save_vlp(found, fresh))
        if found.teacher:  # training state: saved beside the output folder, where training loads it from
            start_anew(state_folder(target))
            write_file(state_folder(target) / TEACHER_FILE, safetensors_bytes(found.teacher))
        return []
    if getattr(found.config, "num_prefix_words", 0) or getattr(found.config, "num_prefix_repeats", 1) != 1:
        raise ExchangeError(
            f"{to}'s BLIP-2 has a prefix of projected queries; this model's is made of words (--spelling_share), or "
            "repeated. Bundle it with its code instead."
        )
    if getattr(found.config, "itm_pooling", "cls") != "cls" and "match" in architecture(found.architecture).uses:
        raise ExchangeError(
            f"{to}'s BLIP matches texts (ITM) by the state of [Encode], this model by the mean over the text's states "
            "(itm_pooling). Bundle it with its code instead, or pass --architecture VlpBlipForConditionalGeneration "
            "for its captioner."
        )
    if to == "transformers":
        theirs = architecture(found.architecture).peer
        if theirs is None:
            known = ", ".join(name for name in readable_as(found.architecture) if architecture(name).peer)
            hint = f": pass --architecture, one of {known}" if known else ""
            raise ExchangeError(f"transformers has no class for {found.architecture}{hint}.")
        image_token = add_image_token(found) if found.has_language_model else None
        config = peer.config_to(found.config, theirs, image_token)
        state, left_out = export_state(found.tensors, peer.rules_of(found.config, found.architecture))
        write_whole(target, lambda fresh: save_transformers(found, config, state, fresh))
        return left_out
    if getattr(found.config.vision_config, "max_num_patches", None) is not None:
        raise ExchangeError(f"{to} stores models of square images; this one reads variable shapes.")
    if peer.has_foreign_tower(found.config):
        raise ExchangeError(f"{to} has no {found.architecture} with towers of transformers: use --to transformers.")
    if to in ("salesforce", "lavis"):
        is_blip2 = found.architecture.startswith("VlpBlip2") and to == "lavis"
        rules = lavis.rules_of(found.config) if is_blip2 else salesforce.RULES.get(found.architecture)
    else:
        rules = openai.RULES if found.is_clip and not peer.is_siglip(found.config) else None
    if rules is None:
        what = "SigLIP" if found.is_clip and peer.is_siglip(found.config) else found.architecture
        raise ExchangeError(f"vlp cannot write a {what} for {to}: use --to transformers.")
    if to in ("salesforce", "lavis") and isinstance(found.config.vision_config, VlpModifiedResNetConfig):
        raise ExchangeError("salesforce/BLIP and LAVIS have no ModifiedResNet.")
    state, left_out = export_state(found.tensors, rules)
    if to == "open_clip":
        settings = {"model_cfg": open_clip.config_to(found.config), "preprocess_cfg": preprocess_cfg(found)}
        if found.tokenizer is not None:  # open_clip then reads the tokenizer in the folder, whatever the name is
            settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = LOCAL
            found.notes.append(
                "before a push to the hub, put the name of the repository into open_clip_config.json, hf_tokenizer_name"
            )
            if found.tokenizer("&amp;")["input_ids"] != found.tokenizer("&")["input_ids"]:
                found.notes.append(
                    "open_clip reads HTML entities such as &amp; in a text as their character, vlp as text"
                )
        write_whole(target, lambda fresh: save_open_clip(found, settings, state, fresh))
    elif to == "openai":
        save_pickle(state | openai.facts_beside(found.config), target)
    elif found.architecture.startswith("VlpBlip2"):
        save_pickle({"model": lavis.with_separate_bias(state)}, target)
    else:
        save_pickle({"model": state}, target)
    return left_out


def save_vlp(found: Checkpoint, folder: Path) -> None:
    """Save the model, and its processor or image processor, in vlp's format."""
    found.model().save_pretrained(folder)
    save_licence(found, folder, "transformers", tags=["vlp"])
    if found.tokenizer is None or (found.reads_instructions and found.qformer_tokenizer is None):
        found.images.save_pretrained(folder)
    elif found.reads_instructions:
        VlpInstructBlipProcessor(found.images, found.tokenizer, found.qformer_tokenizer).save_pretrained(folder)
    else:
        kind = VlpClipProcessor if found.is_clip else VlpBlipProcessor
        kind = VlpBlip2Processor if found.has_language_model else kind
        kind(found.images, found.tokenizer).save_pretrained(folder)


def save_licence(found: Checkpoint, folder: Path, library: str, **facts) -> None:
    """Write a card with the licence of the source, if it is known; `facts` are further fields of the card."""
    if found.licence:
        data = ModelCardData(license=found.licence, library_name=library, **facts)
        text = f"---\n{data}\n---\n\n# {found.source}\n\nConverted with vlp; the licence is that of the source.\n"
        (folder / "README.md").write_text(text)


def save_transformers(found: Checkpoint, config: PreTrainedConfig, state: State, folder: Path) -> None:
    """Save a checkpoint in transformers' format.

    Args:
        found: the checkpoint.
        config: transformers' configuration.
        state: the tensors, with transformers' names.
        folder: an existing folder.
    """
    if peer.has_foreign_tower(found.config):
        model = VisionTextDualEncoderModel(config)
        model.load_state_dict(state)
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        save_tensors(state, folder / "model.safetensors")
    save_licence(found, folder, "transformers")
    kinds = (CLIPImageProcessor, CLIPProcessor) if found.is_clip else (BlipImageProcessor, BlipProcessor)
    if found.is_clip and peer.has_foreign_tower(found.config):
        kinds = (CLIPImageProcessor, VisionTextDualEncoderProcessor)
    elif found.is_clip and peer.is_siglip(found.config):
        kinds = (SiglipImageProcessor, SiglipProcessor)
        if isinstance(config, Siglip2Config):
            kinds = (Siglip2ImageProcessorPil, Siglip2Processor)
    images = kinds[0](**image_options(found.images))
    if found.tokenizer is None or (found.reads_instructions and found.qformer_tokenizer is None):
        images.save_pretrained(folder)
    elif found.reads_instructions:
        queries, reader = found.config.num_query_tokens, plain_tokenizer(found.qformer_tokenizer)
        InstructBlipProcessor(images, found.tokenizer, reader, queries).save_pretrained(folder)
    elif found.architecture.startswith("VlpBlip2"):
        tokenizer = found.tokenizer if found.has_language_model else plain_tokenizer(found.tokenizer)
        queries = found.config.num_query_tokens if found.has_language_model else None
        Blip2Processor(images, tokenizer, queries).save_pretrained(folder)
    elif kinds[1] is VisionTextDualEncoderProcessor:
        kinds[1](images, found.tokenizer).save_pretrained(folder)
    else:
        kinds[1](images, plain_tokenizer(found.tokenizer)).save_pretrained(folder)


def add_image_token(found: Checkpoint) -> int:
    """The id of the token that marks the position of a query in the input of transformers' language model.

    If the embeddings of the language model have no row for it, `found` gets a resized language model.
    """
    text = found.config.text_config.get_text_config()
    if found.tokenizer is None:
        number = text.vocab_size
    else:
        known = found.tokenizer.convert_tokens_to_ids("<image>")
        number = len(found.tokenizer) if known in (None, found.tokenizer.unk_token_id) else known
    if number >= text.vocab_size:
        model = found.model().language_model
        model.resize_token_embeddings(number + 1, mean_resizing=False)
        found.tensors |= {f"{PREFIX}{name}": value for name, value in model.state_dict().items()}
        found.config.text_config = model.config
    return number


class PlainTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that is saved as a PreTrainedTokenizerFast, which transformers 4 and 5 know."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, as a class of transformers."""
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PlainTokenizer(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=tokenizer.model_max_length,
        model_input_names=[name for name in tokenizer.model_input_names if name != "token_type_ids"],  # SigLIP: no mask
        **special,
    )  # fmt: skip


def save_open_clip(found: Checkpoint, settings: dict, state: State, folder: Path) -> None:
    """Save a checkpoint in open_clip's format.

    Args:
        found: the checkpoint.
        settings: the content of open_clip_config.json.
        state: the tensors, with open_clip's names.
        folder: an existing folder.
    """
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    save_tensors(state, folder / "open_clip_model.safetensors")
    save_licence(found, folder, "open_clip")
    if found.tokenizer is not None:
        plain_tokenizer(found.tokenizer).save_pretrained(folder)


def preprocess_cfg(found: Checkpoint) -> dict:
    """The `preprocess_cfg` of open_clip_config.json for our preprocessing."""
    names = {number: name for name, number in open_clip.RESAMPLE.items()}
    return {
        "mean": list(found.images.image_mean), "std": list(found.images.image_std),
        "interpolation": names[int(found.images.resample)],
        "resize_mode": "shortest" if found.images.do_center_crop else "squash",
    }  # fmt: skip


def save_tensors(state: State, path: Path) -> None:
    """Write a safetensors file. Tensors are cloned, because the format does not support shared memory."""
    save_file({name: value.clone() for name, value in state.items()}, path, {"format": "pt"})


def save_pickle(content: dict, target: Path) -> None:
    """Write a PyTorch file, completely or not at all.

    Raises:
        ArgumentError: if there is a file or folder of this name already.
    """
    target = check_new_file(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=UNFINISHED, dir=target.parent, delete=False) as file:
        try:
            torch.save(content, file)
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o666 & ~current_umask())
    os.rename(file.name, target)


# --- cache ------------------------------------------------------------------------------------------------------------


def own_copy(name: str | Path, option: str = "") -> str:
    """The folder of a model in vlp's format: the model itself, or a converted copy in the cache folder.

    Models of transformers that vlp has no architecture for are returned as they are.

    Args:
        name: folder or hub name of a model of vlp, transformers or open_clip, or a file of weights.
        option: the option that named it, for error messages.

    Raises:
        UnsupportedModelError: if there is no such model, or it cannot be converted.
    """
    place, told = usable_path(name or ".", option or "the model"), told_of(name, option)
    is_open_clip = (place / "open_clip_config.json").is_file() or (not place.exists() and on_hub(str(name), OPEN_CLIP))
    if not is_open_clip and not place.is_file():
        kind = read_config(name, option)
        if kind.model_type.startswith("vlp_") or not is_convertible(kind):
            return str(name)
    try:
        if not place.exists():
            place = downloaded(str(name))
        files = [place] if place.is_file() else sorted(file for file in place.iterdir() if file.is_file())
        facts = [COPIES, *([str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
        key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        target = cache_folder() / "converted" / f"{Path(name).name}-{key}"
        if not (target / "config.json").is_file():
            print(f"Converting {printable(name, 120)} to vlp's format, once.")
            convert(place, target)
    except (ExchangeError, OSError) as error:
        raise UnsupportedModelError(f"{told}: {brief(error)[:300]}") from error
    return str(target)


def downloaded(name: str) -> Path:
    """Download the files of a repository of the hub that a conversion needs, and return their folder."""
    folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors", "README.md"]))
    if not any(folder.glob("*.safetensors")):
        snapshot_download(name, allow_patterns=["*.bin", "*.bin.index.json"])
    return folder


def is_convertible(config: PreTrainedConfig) -> bool:
    """Whether vlp has an architecture for a model of transformers."""
    return config.model_type in CONVERTED


def on_hub(name: str, file: str) -> bool:
    """Whether a repository of the hub has a file, in the cache or, if the hub can be reached, there."""
    return name.count("/") == 1 and cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    ) is not None  # fmt: skip


# --- command line -------------------------------------------------------------------------------------------------


def convert(source: str | Path, target: str | Path, to: str = "vlp", **options) -> list[str]:
    """Convert a checkpoint, as the command line does.

    Args:
        source: a file of weights, or a folder.
        target: the folder to write; for openai, salesforce and lavis the file.
        to: the format of the target, one of TARGETS.
        options: the other options of the command line, by name.

    Returns:
        Messages for the user, such as what could not be converted.

    Raises:
        ExchangeError: if the source cannot be read, or the target's format does not support the model.
        ArgumentError: if the target would replace other files, or the source.
    """
    given = argparse.Namespace(**{"hidden_act": None, "vision_heads": None, "text_heads": None, "tokenizer": None,
                                  "image_size": None, "max_length": None, "image_tower": None, "architecture": None,
                                  "language_model": None} | options)  # fmt: skip
    if to in SINGLE_FILES:
        check_new_file(target)
    else:
        check_output(target, "TARGET", [str(source), given.tokenizer, given.image_tower, given.language_model])
    for name in ("image_size", "max_length", "vision_heads", "text_heads"):
        value = getattr(given, name)
        if value is not None and not 1 <= value <= LARGEST:
            raise ArgumentError(f"--{name} must be from 1 to {LARGEST:,}, got {brief(str(value))[:40]}.")
    place = usable_path(source, "SOURCE")
    if not place.exists() and HUB_NAME.fullmatch(str(source)):
        read_config(source, "SOURCE")  # says what is wrong with the name
        place = downloaded(str(source))
    try:
        found = read_source(place, given)
        if given.architecture not in (None, found.architecture):
            raise ExchangeError("--architecture is for models of vlp.")
    except ExchangeError as error:
        raise ExchangeError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    found.licence, found.source = licence_of(place), printable(Path(source).name)
    if given.tokenizer:
        found.tokenizer = tokenizer_of(found, given.tokenizer)
    pad_as_the_tokenizer(found)
    if given.image_size:
        resize(found, given.image_size)
    if given.max_length:
        resize_texts(found, given.max_length)
    if found.tokenizer is None and to in ("vlp", "transformers"):
        found.notes.append("the source has no tokenizer, so none was saved; to add one, pass --tokenizer")
    left_out = write_target(found, usable_path(target, "TARGET"), to)
    return found.notes + [f"{to} cannot store: {shortened(left_out)}"] * bool(left_out)


def pad_as_the_tokenizer(found: Checkpoint) -> None:
    """Let a SigLIP, whose texts attend to padding, pad with its tokenizer's token, as transformers' processor does.

    The configurations of SigLIP 2 at a fixed resolution name no padding token, and their default is another one.
    """
    text, tokenizer = getattr(found.config, "text_config", None), found.tokenizer
    if isinstance(text, VlpSiglipTextConfig) and tokenizer is not None and tokenizer.pad_token_id is not None:
        text.pad_token_id = tokenizer.pad_token_id


def resize(found: Checkpoint, side: int) -> None:
    """Change the image size: resample the position embeddings of the image tower and adapt the preprocessing.

    Args:
        found: the checkpoint, changed in place.
        side: the new image size in pixels.

    Raises:
        ExchangeError: if the image tower does not support the size.
    """
    model = found.model()
    try:
        model.vision_model.resize_images(side)
        type(model.config.vision_config)(**model.config.vision_config.to_dict())  # runs its validation
    except ValueError as error:
        raise ExchangeError(f"--image_size: {error}") from error
    found.config, found.tensors = model.config, model.state_dict()
    if isinstance(found.images, VlpNaflexImageProcessor):  # the size of its images does not follow from the table's
        return
    square = {"height": side, "width": side}
    found.images.size = {"shortest_edge": side} if found.images.do_center_crop else square
    found.images.crop_size = square if found.images.do_center_crop else found.images.crop_size


def resize_texts(found: Checkpoint, length: int) -> None:
    """Change the context length of CLIP's text tower by resampling its position embeddings.

    Source: open_clip, resize_text_pos_embed.

    Args:
        found: the checkpoint, changed in place.
        length: the new maximum number of tokens.

    Raises:
        ExchangeError: if the model is not a CLIP.
    """
    if not found.is_clip:
        raise ExchangeError("--max_length is for CLIP; BLIP's text model has positions for 512 tokens.")
    name = "text_model.embeddings.position_embedding.weight"
    table = found.tensors[name].T[None]  # (1, D, N)
    found.tensors[name] = F.interpolate(table, size=length, mode="linear", align_corners=False)[0].T.contiguous()
    found.config.text_config.max_position_embeddings = length
    if found.tokenizer is not None:
        found.tokenizer.model_max_length = length
