"""`vlp-convert SOURCE TARGET`: checkpoints of other libraries into folders of vlp, and back.

    vlp-convert ViT-B-32.pt runs/clip                       # OpenAI's, read without running its code
    vlp-convert open_clip_folder runs/clip                  # open_clip, transformers, salesforce/BLIP
    vlp-convert model.pt runs/clip --hidden_act gelu        # a bare file does not tell its activation
    vlp-convert blip2_pretrained.pth runs/blip2 --image_tower eva_vit_g.pth      # LAVIS
    vlp-convert runs/clip exported --to transformers        # also open_clip, openai, salesforce, lavis

What a source is, is seen from its files. The architecture follows from the shapes of the tensors; preprocessing and
tokenizer go along where the source has them.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Blip2Processor,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipProcessor,
)

from .architectures import ARCHITECTURES, architecture
from .configuration.clip import VlpClipConfig
from .configuration.vision import VlpModifiedResNetConfig, VlpSiglipViTConfig
from .files import TEACHER_FILE, check_output, start_anew, state_folder, write_whole
from .modeling_vlp.blip2_writer import PREFIX
from .modeling_vlp.clip import VlpClipModel
from .modeling_vlp.exchange import lavis, open_clip, openai, salesforce
from .modeling_vlp.exchange import transformers as peer
from .modeling_vlp.exchange.files import read_tensors
from .modeling_vlp.exchange.places import ExchangeError, Rule, State, read, shortened, write
from .processing.blip import VlpBlipImageProcessor, VlpBlipProcessor, load_tokenizer
from .processing.blip2 import VlpBlip2Processor
from .processing.clip import VlpClipImageProcessor, VlpClipProcessor
from .processing.tokenizer import VlpClipTokenizer

TARGETS = ("vlp", "transformers", "open_clip", "openai", "salesforce", "lavis")
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")


@dataclass
class Checkpoint:
    """A model on its way from one format to another.

    Attributes:
        architecture: name of our model class. tensors: under our names.
        images: preprocessing, the usual one where the source has none. tokenizer: where the source has one.
        teacher: the momentum towers and the queue, where the source has them, as `training.momentum.Teacher` is saved.
        notes: what a reader should know: what was left behind, and why.
    """

    architecture: str
    config: PreTrainedConfig
    tensors: State
    images: VlpClipImageProcessor
    tokenizer: PreTrainedTokenizerFast | None = None
    teacher: State = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_clip(self) -> bool:
        return self.architecture == "VlpClipModel"

    @property
    def writes_by_language_model(self) -> bool:
        return self.architecture == "VlpBlip2ForConditionalGeneration"

    def model(self):
        """Our model, with these tensors, those of its language model among them where they are here."""
        stored = getattr(self.config, "store_language_model", None)
        if any(name.startswith(PREFIX) for name in self.tensors):
            self.config.store_language_model = True
        model = architecture(self.architecture).model(self.config)
        model.load_state_dict(self.tensors)
        if stored is not None:
            model.config.store_language_model = stored
        return model


# --- from ---------------------------------------------------------------------------------------------------------


def read_source(source: Path, options) -> Checkpoint:
    """Raises ExchangeError where it is nothing that vlp reads, or does not fit."""
    if source.is_file():
        return from_file(source, options)
    if not source.is_dir():
        raise ExchangeError(f"{source}: no such file or folder.")
    if (source / "open_clip_config.json").is_file():
        return from_open_clip(source)
    if not (source / "config.json").is_file():
        raise ExchangeError(f"{source} holds neither config.json nor open_clip_config.json: name a file of weights.")
    config = AutoConfig.from_pretrained(source)
    return from_vlp(source, config) if config.model_type.startswith("vlp_") else from_transformers(source, config)


def from_vlp(folder: Path, config: PreTrainedConfig) -> Checkpoint:
    name = config.architectures[0]
    model = architecture(name).model.from_pretrained(folder)
    found = Checkpoint(name, model.config, model.state_dict(), usual_images(config))
    if (folder / "tokenizer_config.json").is_file():
        processor = AutoProcessor.from_pretrained(folder)
        found.images, found.tokenizer = processor.image_processor, processor.tokenizer
    elif (folder / "preprocessor_config.json").is_file():
        found.images = AutoImageProcessor.from_pretrained(folder)
    return found


def from_transformers(folder: Path, config: PreTrainedConfig) -> Checkpoint:
    name = name_of_peer((config.architectures or ["none"])[0])
    ours, state = peer.config_from(config), weights_of(folder)
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    if words in state:  # what is read and what is written have the same, which is stored once
        state.setdefault("text_decoder.cls.predictions.decoder.weight", state[words])
    found = assemble(name, ours, state, peer.rules_of(ours, name), peer.IGNORED)
    if list(folder.glob("*processor_config.json")):
        theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
        found.images = (VlpClipImageProcessor if found.is_clip else VlpBlipImageProcessor)(**image_options(theirs))
    if (folder / "tokenizer_config.json").is_file():
        found.tokenizer = tokenizer_of(found, str(folder))
    return found


def name_of_peer(theirs: str) -> str:
    """The name of our model for a class of transformers. Raises ExchangeError if there is none."""
    if theirs == "SiglipModel":
        return VlpClipModel.__name__
    # Of two that have the same peer, the later is the one that their checkpoint is: it has no language modelling head.
    found = {row.peer: row.model.__name__ for row in ARCHITECTURES if row.peer}
    if theirs not in found:
        raise ExchangeError(f"{theirs} is not among the architectures that vlp converts: {', '.join(found)}.")
    return found[theirs]


def from_open_clip(folder: Path) -> Checkpoint:
    facts = json.loads((folder / "open_clip_config.json").read_text())
    state = openai.as_native(weights_of(folder))
    config = open_clip.config_from(state, facts["model_cfg"])
    found = assemble("VlpClipModel", config, state, open_clip.RULES, open_clip.IGNORED)
    images = open_clip.image_options(facts.get("preprocess_cfg", {}), config.vision_config.image_size)
    found.images = VlpClipImageProcessor(**images)
    if (folder / "tokenizer_config.json").is_file():
        found.tokenizer = tokenizer_of(found, str(folder))
    return found


def from_file(path: Path, options) -> Checkpoint:
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
                f"{path} does not tell its activation, and a wrong one spoils the results in silence: pass "
                "--hidden_act quick_gelu (OpenAI's weights, and what was trained with --force-quick-gelu) or gelu."
            )
        config = openai.config_from(state, act, **heads)
        found = assemble("VlpClipModel", config, state, openai.RULES, openai.IGNORED)
    else:
        raise ExchangeError(f"{path} holds neither a CLIP (visual.*) nor a BLIP (visual_encoder.*): name its folder.")
    return found


def from_lavis(path: Path, state: State, options) -> Checkpoint:
    """A BLIP-2 of LAVIS, whose files hold what was trained alone."""
    if options.image_tower:
        state = {key: value for key, value in state.items() if not key.startswith("visual_encoder.")}
        state |= lavis.tower_from(read_tensors(Path(options.image_tower)))
    elif not any(name.startswith("visual_encoder.") for name in state):
        raise ExchangeError(
            f"{path} has no image tower, which LAVIS keeps in a file of its own: pass --image_tower eva_vit_g.pth (or "
            "clip_vit_L.pth)."
        )
    name, text = lavis.architecture_of(state), None
    if name == "VlpBlip2ForConditionalGeneration":
        if not options.language_model:
            raise ExchangeError(f"{path} is of stage 2, and has no language model: name it with --language_model.")
        text = AutoConfig.from_pretrained(options.language_model)
    vision = lavis.vision_config_from(state, options.vision_heads)
    config = lavis.config_from(state, vision, text, options.text_heads)
    config.language_model_name_or_path = options.language_model
    return assemble(name, config, lavis.with_joint_bias(state), lavis.rules_of(config), lavis.IGNORED)


def assemble(name: str, config: PreTrainedConfig, state: State, rules: tuple[Rule, ...], ignored: str) -> Checkpoint:
    """Our tensors from theirs; a temperature that they do not have is that of a new model."""
    with torch.device("meta"):
        model = architecture(name).model(config)
        wanted = model.state_dict()
    for key, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if key.startswith(PREFIX) and source in state:  # a language model's tied weights are stored once
            state.setdefault(key, state[source])
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    without = {"temp"} - state.keys() if "temp" in wanted else set()
    tensors = read(state, {key: value for key, value in wanted.items() if key not in without}, rules, ignored)
    notes = []
    if without:
        tensors["temp"] = torch.tensor(config.temperature_init_value)
        notes.append(f"the source has no temperature: it is {config.temperature_init_value}, that of a new model")
    config.architectures = [name]
    return Checkpoint(name, config, tensors, usual_images(config), notes=notes)


def usual_images(config: PreTrainedConfig) -> VlpClipImageProcessor:
    """The preprocessing of OpenAI and of BLIP, for a model's image size."""
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    if config.model_type != VlpClipConfig.model_type:
        return VlpBlipImageProcessor(size=square)
    if config.vision_config.model_type == VlpSiglipViTConfig.model_type:
        half = [0.5, 0.5, 0.5]
        return VlpClipImageProcessor(size=square, do_center_crop=False, image_mean=half, image_std=half)
    return VlpClipImageProcessor(size={"shortest_edge": side}, crop_size=square)


def image_options(images) -> dict:
    """What an image processor, ours or transformers', is made with."""
    names = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std")
    options = {name: getattr(images, name, None) for name in names}
    options["do_center_crop"] = bool(options["do_center_crop"])  # some have no such option
    return {name: dict(v) if hasattr(v, "items") else v for name, v in options.items() if v is not None}


def tokenizer_of(found: Checkpoint, name: str) -> PreTrainedTokenizerFast:
    """A tokenizer by its hub name, its folder, or OpenAI's file, as the model needs it."""
    if found.writes_by_language_model:
        return AutoTokenizer.from_pretrained(name)
    length = getattr(found.config, "qformer_config", found.config.text_config).max_position_embeddings
    if name.endswith(".gz"):
        return VlpClipTokenizer.from_openai_merges(name, length)
    return (
        AutoTokenizer.from_pretrained(name, model_max_length=length) if found.is_clip else load_tokenizer(name, length)
    )


def weights_of(folder: Path) -> State:
    """All tensors of a folder, in one file or several."""
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ExchangeError(f"{index} points out of its folder.")
            return {key: value for name in names for key, value in read_tensors(folder / name).items()}
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise ExchangeError(f"{folder} holds no weights: none of {', '.join(WEIGHTS)}.")


# --- to -----------------------------------------------------------------------------------------------------------


def write_target(found: Checkpoint, target: Path, to: str) -> list[str]:
    """Write a checkpoint, whole or not at all; returns the names of our tensors that the format cannot hold."""
    if to == "vlp":
        write_folder(target, lambda fresh: save_vlp(found, fresh))
        if found.teacher:  # training state: beside the folder to publish, where training looks for it
            start_anew(state_folder(target))
            write_whole(state_folder(target), lambda fresh: save_file(found.teacher, fresh / TEACHER_FILE))
        return []
    if to == "transformers":
        theirs = architecture(found.architecture).peer
        if theirs is None:
            raise ExchangeError(f"transformers has no class for {found.architecture}.")
        image_token = room_for_image_token(found) if found.writes_by_language_model else None
        config = peer.config_to(found.config, theirs, image_token)
        state, left_out = write(found.tensors, peer.rules_of(found.config, found.architecture))
        write_folder(target, lambda fresh: save_transformers(found, config, state, fresh))
        return left_out
    if to in ("salesforce", "lavis"):
        is_blip2 = found.architecture.startswith("VlpBlip2") and to == "lavis"
        rules = lavis.rules_of(found.config) if is_blip2 else salesforce.RULES.get(found.architecture)
    else:
        rules = openai.RULES if found.is_clip and not peer.is_siglip(found.config) else None
    if rules is None:
        towers = " with SigLIP's towers" if found.is_clip and peer.is_siglip(found.config) else ""
        raise ExchangeError(f"{to} has no {found.architecture}{towers}.")
    if to in ("salesforce", "lavis") and isinstance(found.config.vision_config, VlpModifiedResNetConfig):
        raise ExchangeError("salesforce/BLIP and LAVIS have no ModifiedResNet.")
    state, left_out = write(found.tensors, rules)
    if to == "open_clip":
        facts = {"model_cfg": open_clip.config_to(found.config), "preprocess_cfg": preprocess_cfg(found)}
        write_folder(target, lambda fresh: save_open_clip(found, facts, state, fresh))
    elif to == "openai":
        save_pickle(state | openai.facts_beside(found.config), target)
    elif found.architecture.startswith("VlpBlip2"):
        save_pickle({"model": lavis.with_separate_bias(state)}, target)
    else:
        save_pickle({"model": state}, target)
    return left_out


def write_folder(target: Path, save: Callable[[Path], None]) -> None:
    """Write a folder, whole or not at all. Raises ArgumentError where that would replace other files."""
    check_output(str(target), "TARGET")
    write_whole(target, save)


def save_vlp(found: Checkpoint, folder: Path) -> None:
    found.model().save_pretrained(folder)
    if found.tokenizer is None:
        found.images.save_pretrained(folder)
    else:
        kind = VlpClipProcessor if found.is_clip else VlpBlipProcessor
        kind = VlpBlip2Processor if found.writes_by_language_model else kind
        kind(found.images, found.tokenizer).save_pretrained(folder)


def save_transformers(found: Checkpoint, config: PreTrainedConfig, state: State, folder: Path) -> None:
    config.save_pretrained(folder)
    save_tensors(state, folder / "model.safetensors")
    kinds = (CLIPImageProcessor, CLIPProcessor) if found.is_clip else (BlipImageProcessor, BlipProcessor)
    if found.is_clip and peer.is_siglip(found.config):
        kinds = (SiglipImageProcessor, SiglipProcessor)
    images = kinds[0](**image_options(found.images))
    if found.tokenizer is None:
        images.save_pretrained(folder)
    elif found.architecture.startswith("VlpBlip2"):
        tokenizer = found.tokenizer if found.writes_by_language_model else plain_tokenizer(found.tokenizer)
        queries = found.config.num_query_tokens if found.writes_by_language_model else None
        Blip2Processor(images, tokenizer, queries).save_pretrained(folder)
    else:
        kinds[1](images, plain_tokenizer(found.tokenizer)).save_pretrained(folder)


def room_for_image_token(found: Checkpoint) -> int:
    """The number of the token that stands for a query in transformers' texts; the language model gets a row for it."""
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


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer as a class that transformers has."""
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=tokenizer.model_max_length, **special
    )


def save_open_clip(found: Checkpoint, facts: dict, state: State, folder: Path) -> None:
    (folder / "open_clip_config.json").write_text(json.dumps(facts, indent=1) + "\n")
    save_tensors(state, folder / "open_clip_model.safetensors")
    if found.tokenizer is not None:
        plain_tokenizer(found.tokenizer).save_pretrained(folder)


def preprocess_cfg(found: Checkpoint) -> dict:
    """open_clip's words for our preprocessing."""
    names = {number: name for name, number in open_clip.RESAMPLE.items()}
    return {
        "mean": list(found.images.image_mean), "std": list(found.images.image_std),
        "interpolation": names[int(found.images.resample)],
        "resize_mode": "shortest" if found.images.do_center_crop else "squash",
    }  # fmt: skip


def save_tensors(state: State, path: Path) -> None:
    """Write a safetensors file, which does not know of tensors that share their memory."""
    save_file({name: value.clone() for name, value in state.items()}, path, {"format": "pt"})


def save_pickle(content: dict, target: Path) -> None:
    """Write a PyTorch file, whole or not at all. Raises ExchangeError where its name is a folder's."""
    if target.is_dir():
        raise ExchangeError(f"TARGET {target} is a folder; this format needs the name of a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.writing")
    torch.save(content, fresh)
    fresh.replace(target)


# --- command line -------------------------------------------------------------------------------------------------


def convert(source: str | Path, target: str | Path, to: str = "vlp", **options) -> list[str]:
    """What the command line does; returns what should be told.

    Args:
        to: one of TARGETS. options: those of the command line, by name.

    Raises ExchangeError where the source cannot be read, or the target cannot hold it; ArgumentError where the target
    is a folder with other files in it.
    """
    given = argparse.Namespace(**{"hidden_act": None, "vision_heads": None, "text_heads": None, "tokenizer": None,
                                  "image_size": None, "max_length": None, "image_tower": None,
                                  "language_model": None} | options)  # fmt: skip
    found = read_source(Path(source), given)
    if given.tokenizer:
        found.tokenizer = tokenizer_of(found, given.tokenizer)
    if given.image_size:
        resize(found, given.image_size)
    if given.max_length:
        resize_texts(found, given.max_length)
    if found.tokenizer is None and to in ("vlp", "transformers"):
        found.notes.append("the source has no tokenizer: name one with --tokenizer, or the folder has none")
    left_out = write_target(found, Path(target), to)
    return found.notes + [f"{to} has no place for: {shortened(left_out)}"] * bool(left_out)


def resize(found: Checkpoint, side: int) -> None:
    """Resample the positions of the image tower, and let the preprocessing give images of that size."""
    model = found.model()
    try:
        model.vision_model.resize_images(side)
        type(model.config.vision_config)(**model.config.vision_config.to_dict())  # its checks
    except ValueError as error:
        raise ExchangeError(f"--image_size: {error}") from error
    found.config, found.tensors = model.config, model.state_dict()
    square = {"height": side, "width": side}
    found.images.size = {"shortest_edge": side} if found.images.do_center_crop else square
    found.images.crop_size = square if found.images.do_center_crop else found.images.crop_size


def resize_texts(found: Checkpoint, length: int) -> None:
    """Let CLIP's text tower read so many tokens: its positions are resampled, as open_clip's resize_text_pos_embed."""
    if not found.is_clip:
        raise ExchangeError("--max_length is for CLIP; BLIP's text model has positions for 512 tokens.")
    name = "text_model.embeddings.position_embedding.weight"
    table = found.tensors[name].T[None]  # (1, D, N)
    found.tensors[name] = F.interpolate(table, size=length, mode="linear", align_corners=False)[0].T.contiguous()
    found.config.text_config.max_position_embeddings = length
    if found.tokenizer is not None:
        found.tokenizer.model_max_length = length
