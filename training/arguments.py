"""Training options: their meaning, unit, default, and what is refused before anything is loaded."""

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..processing.prompts import CLASS_NAMES, TEMPLATES

RECIPES = Path(__file__).parent / "recipes"
EMOJI = "emoji"  # the data set that the package embeds


class ArgumentError(ValueError):
    """A wrong option; the message names the value, what was expected and what to do."""


def option(default, text: str, **metadata):
    """A dataclass field with its help text."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(kw_only=True)
class TrainingArguments:
    """Everything that a run is told, along the way of the data: data, model, optimisation, evaluation, output."""

    # Data
    dataset_name: str = option(
        EMOJI,
        'training pairs: "emoji" (embedded), a hub name, a folder (datasets, imagefolder), a .csv, .tsv, .json or '
        ".jsonl file, or .tar shards such as data/{000..099}.tar, several joined by :: ",
    )
    dataset_config_name: str | None = option(None, "configuration of a hub data set")
    train_split: str = option("train", "split to train on")
    image_column: str = option("image", "column with the images, or with their paths")
    caption_column: str = option(
        "caption",
        "column with one caption or a list of them, one drawn at random each time; of several languages, joined by "
        "commas, one column each, and then --tag_column and --templates in the same order",
    )
    tag_column: str | None = option(None, "column with a list of keywords that may stand for the caption")
    tag_share: float = option(0.0, "share of captions (0 to 1) that keywords take part in")
    templates: str = option("name", "templates to put captions in while training; see vlp.processing.prompts")
    template_share: float = option(0.0, "share of captions (0 to 1) that are put in a template")
    image_root: str | None = option(None, "folder that image paths start from; that of the file where not given")
    shard_weights: str | None = option(None, "weights of the :: shard sources, joined by ::, such as 2::1")
    shard_size: int | None = option(None, "samples in all shards, for the length of an epoch (WebDataset)")
    hold_out: str | None = option(None, "COLUMN=VALUE: rows to keep out of training and to evaluate on instead")
    max_bad_share: float = option(0.1, "the run stops when more than this share of rows (0 to 1) cannot be used")
    max_image_pixels: int = option(89_478_485, "images of more pixels are skipped as decompression bombs, in pixels")
    augmentation: str = option("crop", "crop (the paper's), strong (for small data) or none")
    crop_scale: float = option(0.9, "least share (0 to 1) of an image's area that augmentation crop keeps")
    horizontal_flip: bool = option(False, "augmentation crop also mirrors half of the images")
    random_augment: bool = option(False, "augmentation crop also applies BLIP's RandomAugment(2, 5)")
    group_captions: int = option(1, "images with the same caption to put into one batch together, where there are")
    cache_images: bool = option(False, "keep decoded images in memory; for small data with augmentation strong or none")
    num_workers: int = option(0, "processes that load data, for each training process")

    # Model
    model: dict = option({}, "fields of the configuration, as JSON; vocab_size and image_size follow from elsewhere")
    image_size: int = option(224, "side of the images, in pixels")
    max_length: int = option(77, "most tokens in a caption, start and end included")
    tokenizer_name: str | None = option(
        None, "hub name or folder of a tokenizer, or OpenAI's bpe_simple_vocab_16e6.txt.gz"
    )
    vocab_size: int = option(49408, "entries of the tokenizer trained on the captions, where no tokenizer is named")
    model_name_or_path: str | None = option(None, "folder or hub name of a vlp model to go on from, processor included")
    lora_rank: int = option(0, "train LoRA adapters of this rank beside every attention's projections; 0: all weights")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass, to save memory")
    torch_compile: bool = option(False, "compile the model; slower to start, faster steps")

    # Objective and optimisation
    exclude_duplicates: bool = option(True, "rows of a batch with the same caption or image are not negatives")
    per_device_train_batch_size: int = option(256, "pairs in a step of each process")
    gradient_accumulation_steps: int = option(
        1, "backward passes for each optimiser step; unlike CLIP's --micro_batch_size, adds no negatives"
    )
    learning_rate: float = option(5e-4, "peak learning rate")
    weight_decay: float = option(0.2, "decay of weight matrices; gains, biases, scale and positions have none")
    adam_beta1: float = option(0.9, "first moment's decay")
    adam_beta2: float = option(0.98, "second moment's decay; the paper: 0.98 for ViT, 0.999 for ResNet")
    adam_epsilon: float = option(1e-6, "the paper: 1e-6 for ViT, 1e-8 for ResNet")
    layer_decay: float = option(1.0, "factor on the learning rate from each layer to the one below it")
    max_grad_norm: float = option(1.0, "gradient norm to clip at; 0 for none")
    warmup_steps: int = option(2000, "optimiser steps of linear warm-up")
    num_train_epochs: float = option(32.0, "passes over the data, where neither steps nor minutes are given")
    max_train_steps: int | None = option(None, "optimiser steps in all")
    max_train_minutes: float | None = option(None, "minutes of training in all; the schedule ends with them")
    ema_decay: float = option(0.0, "average of weights to evaluate and publish, such as 0.999; 0 for none")
    mixed_precision: str = option("auto", "no, bf16, fp16, or auto: bf16 where the hardware computes in it")
    num_threads: int | None = option(None, "CPU threads of each process; all cores over all processes if not given")
    seed: int = option(0, "seed of weights, order and augmentation")

    # Evaluation
    eval_dataset_name: str | None = option(None, "pairs to evaluate on; the training data's other split if not given")
    eval_split: str | None = option(None, "split to evaluate on; none: no evaluation")
    eval_image_column: str | None = option(None, "column with the images to evaluate on, where it is another")
    eval_steps: int | None = option(None, "evaluate every so many optimiser steps; at the end in any case")
    eval_batch_size: int = option(256, "images or captions in a step of the evaluation")

    # Output
    output_dir: str | None = option(None, "folder to publish; runs/RECIPE where not given, its resume state beside it")
    save_steps: int | None = option(None, "save the state every so many optimiser steps")
    save_minutes: float | None = option(10.0, "save the state every so many minutes")
    save_total_limit: int = option(2, "states to keep")
    resume_from_checkpoint: str | None = option(None, 'folder of a state, or "latest"')
    logging_steps: int = option(10, "log every so many optimiser steps")
    report_to: str = option("tensorboard", "tracker: tensorboard, wandb, ... (those of accelerate), or none")
    publish_dtype: str = option(
        "float32", "of the weight matrices that are published: float32, bfloat16 or float16; loaded, they are float32"
    )
    push_to_hub: bool = option(False, "push model, processor and card to the hub at the end, in one commit")
    hub_model_id: str | None = option(None, "name to push to, such as me/my-clip")
    hub_private: bool = option(False, "make the hub repository private")
    hub_bundle: bool = option(False, "publish the model's code too, for those without vlp (trust_remote_code=True)")
    hub_revision: str | None = option(None, "branch to push to, made where there is none")
    language: str = option("en", "language of the captions, or several joined by commas, for the card")
    data_license: str | None = option(None, "licence of the data, for the card")

    def __post_init__(self):
        require_at_least_one(
            self, "per_device_train_batch_size", "gradient_accumulation_steps", "eval_batch_size", "image_size",
            "max_length", "vocab_size", "logging_steps", "group_captions", "save_total_limit", "max_image_pixels",
        )  # fmt: skip
        for name in (
            "max_train_steps",
            "max_train_minutes",
            "eval_steps",
            "save_steps",
            "save_minutes",
            "shard_size",
            "num_threads",
        ):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ArgumentError(f"--{name} must be positive, got {getattr(self, name)}.")
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon", "layer_decay", "crop_scale"):
            if getattr(self, name) <= 0:
                raise ArgumentError(f"--{name} must be positive, got {getattr(self, name)}.")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "num_workers", "lora_rank"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if self.adam_beta1 == 1 or self.adam_beta2 == 1 or self.ema_decay == 1:
            raise ArgumentError(
                "--adam_beta1, --adam_beta2 and --ema_decay must be below 1: at 1 nothing is ever learnt."
            )
        require_share(
            self, "tag_share", "template_share", "max_bad_share", "ema_decay", "adam_beta1", "adam_beta2", "crop_scale"
        )
        require_one_of("augmentation", self.augmentation, ("crop", "strong", "none"))
        require_one_of("mixed_precision", self.mixed_precision, ("auto", "no", "bf16", "fp16"))
        require_one_of("publish_dtype", self.publish_dtype, ("float32", "bfloat16", "float16"))
        languages = len(self.caption_column.split(","))
        for name in ("templates", "tag_column"):
            count = len((getattr(self, name) or "").split(","))
            if count not in (1, languages):
                raise ArgumentError(f"--{name} names {count}, for the {languages} of --caption_column: one or as many.")
        for templates in self.templates.split(","):
            require_one_of("templates", templates, tuple(TEMPLATES))
        if self.tag_share and not self.tag_column:
            raise ArgumentError(f"--tag_share {self.tag_share} needs --tag_column, the column with the keywords.")
        if self.per_device_train_batch_size == 1:
            raise ArgumentError("--per_device_train_batch_size 1 leaves no negatives to learn from: use at least 2.")
        if self.cache_images and (self.augmentation == "crop" or self.num_workers):
            raise ArgumentError(
                "--cache_images needs --augmentation strong or none (crop draws another crop each time) and "
                f"--num_workers 0, got {self.augmentation} and {self.num_workers}."
            )
        if self.eval_dataset_name and not self.eval_split:
            raise ArgumentError("--eval_dataset_name needs --eval_split, the split of it to evaluate on.")
        if self.eval_split and self.eval_split == self.train_split and not self.eval_dataset_name and not self.hold_out:
            raise ArgumentError(f"--eval_split {self.eval_split} is what is trained on: name another, or --hold_out.")
        if self.push_to_hub and not self.hub_model_id:
            raise ArgumentError("--push_to_hub needs --hub_model_id, the name to push to, such as me/my-clip.")
        if self.hub_model_id and not self.push_to_hub:
            raise ArgumentError(f"--hub_model_id {self.hub_model_id} does nothing without --push_to_hub.")
        if self.hold_out and "=" not in self.hold_out:
            raise ArgumentError(f"--hold_out must be COLUMN=VALUE, got {self.hold_out!r}.")


@dataclass(kw_only=True)
class ClipArguments(TrainingArguments):
    """CLIP: two towers, told to find the pairs of a batch."""

    # CLIP
    clean_text: bool = option(False, "mend Unicode and HTML in captions as OpenAI's tokenizer does")
    image_tower: str | None = option(None, "folder with a vlp or transformers CLIP whose image tower to start from")
    text_tower: str | None = option(None, "folder with a vlp or transformers CLIP whose text tower to start from")
    lock_image_tower: bool = option(False, "leave the image tower as it is (LiT)")
    lock_text_tower: bool = option(False, "leave the text tower as it is")
    patch_dropout: float | None = option(None, "share of patches (0 to 1) that a vision transformer drops in training")
    loss: str = option("softmax", "softmax (CLIP) or sigmoid (SigLIP)")
    micro_batch_size: int | None = option(
        None, "pairs that a tower computes at a time, to save memory; the gradient is still the whole batch's"
    )
    class_column: str | None = option(None, "column with the class name (or label) for zero-shot evaluation")
    class_names: str | None = option(None, "names behind integer labels: a key of vlp.processing.prompts.CLASS_NAMES")
    eval_templates: str = option("name", "templates whose prompts are averaged for a class; see vlp.processing.prompts")

    def __post_init__(self):
        super().__post_init__()
        require_one_of("loss", self.loss, ("softmax", "sigmoid"))
        if self.micro_batch_size is not None:
            require_at_least_one(self, "micro_batch_size")
        require_one_of("eval_templates", self.eval_templates, tuple(TEMPLATES))
        if self.class_names:
            require_one_of("class_names", self.class_names, tuple(CLASS_NAMES))
        if self.lock_image_tower and self.lock_text_tower:
            raise ArgumentError("Nothing is left to train: --lock_image_tower and --lock_text_tower lock both towers.")
        if self.text_tower and not self.tokenizer_name:
            raise ArgumentError("--text_tower needs --tokenizer_name: the tokenizer that the tower was trained with.")
        if self.model_name_or_path and (self.image_tower or self.text_tower):
            raise ArgumentError("--model_name_or_path brings both towers: leave out --image_tower, --text_tower.")


@dataclass(kw_only=True)
class BlipArguments(TrainingArguments):
    """BLIP: compare, match and write. The defaults are those of salesforce/BLIP, configs/pretrain.yaml."""

    max_length: int = option(30, "most tokens in a caption, start and end included")
    vocab_size: int = option(30524, "entries of the tokenizer trained on the captions, where no tokenizer is named")
    crop_scale: float = option(0.2, "least share (0 to 1) of an image's area that augmentation crop keeps")
    horizontal_flip: bool = option(True, "augmentation crop also mirrors half of the images")
    random_augment: bool = option(True, "augmentation crop also applies BLIP's RandomAugment(2, 5)")
    per_device_train_batch_size: int = option(75, "pairs in a step of each process")
    learning_rate: float = option(3e-4, "peak learning rate")
    weight_decay: float = option(0.05, "decay of weight matrices; gains, biases, temperature and positions have none")
    adam_beta2: float = option(0.999, "second moment's decay")
    adam_epsilon: float = option(1e-8, "what AdamW adds to its denominator")
    max_grad_norm: float = option(0.0, "gradient norm to clip at; 0 for none")
    warmup_steps: int = option(3000, "optimiser steps of linear warm-up")
    num_train_epochs: float = option(20.0, "passes over the data, where neither steps nor minutes are given")

    # BLIP
    task: str = option(
        "pretrain", "pretrain (all three losses), captioning, retrieval, vqa (questions) or nlvr (two images)"
    )
    fine_tune_image_size: int | None = option(
        None, "side of the images to go on with, in pixels; positions are resampled; the model's own where not given"
    )
    answer_column: str = option("answers", "vqa: column with the answers, each as often as given; the caption asks")
    second_image_column: str = option("second_image", "nlvr: column with the image on the right")
    label_column: str = option("label", "nlvr: column with whether the caption is true of both images (or 1, 0)")
    prompt: str = option("", 'what captions begin with where the task is captioning; the paper: "a picture of "')
    momentum: float = option(0.995, "how much of itself the momentum teacher keeps at each step (0 to 1)")
    queue_size: int = option(57600, "pairs whose features the teacher remembers")
    alpha: float = option(0.4, "the teacher's part (0 to 1) in the targets of the contrastive loss")
    alpha_epochs: float = option(2.0, "passes over the data in which alpha grows from 0")
    global_negatives: bool = option(False, "draw hard negatives from the batches of all processes, not of each one")
    contrastive_share: float = option(
        0.0, "share of the run (0 to 1), at its start, that compares alone: for towers that begin from nothing"
    )
    rerank_top_k: int = option(128, "candidates of each query that evaluation has matched (ITM) again")
    rerank_posterior: bool = option(
        False, "re-rank by ITC's probability times ITM's odds; else by the original's cosine plus ITM's logit"
    )
    eval_num_beams: int = option(3, "beams of the captions written in evaluation")

    def __post_init__(self):
        super().__post_init__()
        require_one_of("task", self.task, ("pretrain", "captioning", "retrieval", "vqa", "nlvr"))
        if self.fine_tune_image_size and not self.model_name_or_path:
            raise ArgumentError("--fine_tune_image_size needs --model_name_or_path, the model to go on from.")
        if self.prompt and self.task != "captioning":
            raise ArgumentError(f"--prompt {self.prompt!r} is for --task captioning, not for {self.task}.")
        require_share(self, "momentum", "alpha", "contrastive_share")
        require_at_least_one(self, "queue_size", "rerank_top_k", "eval_num_beams")
        if self.alpha_epochs < 0:
            raise ArgumentError(f"--alpha_epochs must not be negative, got {self.alpha_epochs}.")


@dataclass(kw_only=True)
class Blip2Arguments(TrainingArguments):
    """BLIP-2: a Q-Former between a frozen image tower and a frozen language model. The defaults are the paper's."""

    max_length: int = option(32, "most tokens in a caption, start and end included")
    vocab_size: int = option(30524, "entries of the tokenizer trained on the captions, where no tokenizer is named")
    crop_scale: float = option(0.5, "least share (0 to 1) of an image's area that augmentation crop keeps")
    horizontal_flip: bool = option(True, "augmentation crop also mirrors half of the images")
    per_device_train_batch_size: int = option(100, "pairs in a step of each process")
    learning_rate: float = option(1e-4, "peak learning rate")
    weight_decay: float = option(0.05, "decay of weight matrices; gains, biases, temperature and positions have none")
    adam_epsilon: float = option(1e-8, "what AdamW adds to its denominator")
    max_grad_norm: float = option(0.0, "gradient norm to clip at; 0 for none")
    num_train_epochs: float = option(10.0, "passes over the data, where neither steps nor minutes are given")

    # BLIP-2
    stage: int = option(1, "1: the Q-Former learns to read the image tower; 2: to tell a language model what it read")
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
    label_smoothing: float = option(0.1, "of the contrastive loss' targets (0 to 1); LAVIS has 0.1, the paper none")
    contrastive_share: float = option(
        0.0, "share of the run (0 to 1), at its start, that compares alone: for a Q-Former that begins from nothing"
    )
    rerank_top_k: int = option(128, "candidates of each query that evaluation has matched (ITM) again")
    rerank_posterior: bool = option(
        False, "re-rank by ITC's probability times ITM's odds; else by the original's cosine plus ITM's logit"
    )
    language_model_name_or_path: str | None = option(
        None, 'hub name or folder of a language model, or "package:NAME" for a folder that a Python package is'
    )
    language_model_file: str | None = option(None, "the GGUF file in it, where it is one")
    store_language_model: bool = option(False, "publish the language model's weights too, not where they are alone")
    prompt: str = option("", "what every caption begins with in stage 2; it is not learnt")
    example_prompts: str = option("", "prompts, joined by |, that the card shows answers to; --prompt where not given")
    eval_num_beams: int = option(5, "beams of the captions written in evaluation")

    def __post_init__(self):
        super().__post_init__()
        if self.stage not in (1, 2):
            raise ArgumentError(f"--stage must be 1 or 2, got {self.stage}.")
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


@dataclass(kw_only=True)
class CapFiltArguments:
    """CapFilt: caption images and filter captions. The defaults are those of the paper (BLIP, sections 3.3 and 4.3)."""

    dataset_name: str = option(EMOJI, "pairs to caption and to filter, as for training; not shards")
    train_split: str = option("train", "split to read")
    image_column: str = option("image", "column with the images, or with their paths")
    caption_column: str = option("caption", "column with one web caption or a list of them")
    image_root: str | None = option(None, "folder that image paths start from; that of the file where not given")
    max_image_pixels: int = option(89_478_485, "images of more pixels are skipped as decompression bombs, in pixels")
    captioner: str | None = option(None, "folder or hub name of a BLIP that was fine-tuned with --task captioning")
    filter: str | None = option(None, "folder or hub name of a BLIP that was fine-tuned with --task retrieval")
    prompt: str = option("", "what the captioner was trained to begin with")
    top_p: float = option(0.9, "share of probability (0 to 1) that nucleus sampling draws from")
    min_length: int = option(5, "fewest tokens of a new caption, start and prompt included")
    max_length: int = option(20, "most tokens of a new caption, start and prompt included")
    threshold: float = option(0.5, "captions that match with a probability up to this are dropped (0 to 1)")
    batch_size: int = option(32, "images at a time")
    shard_size: int = option(1000, "rows in a file of the new data set; what is written when all is stopped, stays")
    seed: int = option(0, "seed of the sampling")
    output_dir: str | None = option(None, "folder of the new data set; runs/capfilt where not given")

    def __post_init__(self):
        for name in ("captioner", "filter"):
            if not getattr(self, name):
                raise ArgumentError(f"CapFilt needs --{name}, the folder of a fine-tuned BLIP.")
        require_at_least_one(self, "batch_size", "shard_size", "min_length", "max_length", "max_image_pixels")
        require_share(self, "top_p", "threshold")


@dataclass(kw_only=True)
class ShardsArguments:
    """WebDataset shards, written from any data set that training reads."""

    dataset_name: str = option(EMOJI, "pairs to write, as for training")
    dataset_config_name: str | None = option(None, "configuration of a hub data set")
    train_split: str = option("train", "split to read")
    image_column: str = option("image", "column with the images, or with their paths; all others go in as JSON")
    caption_column: str = option("caption", "column with captions, of which the first goes in as text too")
    image_root: str | None = option(None, "folder that image paths start from; that of the file where not given")
    samples_per_shard: int = option(1000, "there must be a shard for each worker of each process")
    seed: int = option(0, "seed of the order in which they are written")
    output_dir: str | None = option(None, "folder of the shards and their index; runs/shards where not given")

    def __post_init__(self):
        require_at_least_one(self, "samples_per_shard")


@dataclass(frozen=True)
class Task:
    """Something to train: its options, its recipe where none is named, and what it is in a few words."""

    arguments: type
    recipe: str
    text: str


TASKS = {
    "clip": Task(
        ClipArguments,
        "clip-emoji",
        "Pre-train CLIP on pairs of images and captions, evaluate it, and write a folder to publish",
    ),
    "blip": Task(
        BlipArguments,
        "blip-emoji",
        "Pre-train or fine-tune BLIP on pairs of images and captions, evaluate it, and write a folder to publish",
    ),
    "blip2": Task(
        Blip2Arguments,
        "blip2-emoji",
        "Pre-train BLIP-2, stage 1 or 2, on pairs of images and captions, evaluate it, and write a folder to publish",
    ),
    "capfilt": Task(
        CapFiltArguments, "capfilt", "Caption web images and filter captions with fine-tuned BLIPs (CapFilt)"
    ),
    "shards": Task(ShardsArguments, "shards", "Write a data set as WebDataset shards with an index"),
}


def require_at_least_one(arguments, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < 1:
            raise ArgumentError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")


def require_share(arguments, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(arguments, name) <= 1:
            raise ArgumentError(f"--{name} must be between 0 and 1, got {getattr(arguments, name)}.")


def require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArgumentError(f"--{name} must be one of {', '.join(allowed)}, got {value!r}.")


def parse(arguments: list[str], task: str = "clip"):
    """Options from the recipe (`--config`, the task's where not given), then those of the command line over them.

    Raises ArgumentError where a value is wrong; exits, as argparse does, where an option is not known.
    """
    parser = build_parser(task)
    recipe = parser.parse_known_args(arguments)[0].config
    values = read_recipe(recipe, TASKS[task].arguments)
    parser.set_defaults(**values)
    parsed = vars(parser.parse_args(arguments))
    del parsed["config"]
    if parsed["output_dir"] is None:
        parsed["output_dir"] = f"runs/{Path(recipe).stem}"
    return TASKS[task].arguments(**parsed)


def read_recipe(name: str, kind: type[TrainingArguments] = ClipArguments) -> dict:
    """The options in a recipe of the package (by name) or in a YAML file (by path)."""
    path = Path(name)
    if not path.suffix:
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise ArgumentError(f"--config {name}: no such file, and no such recipe; the recipes are {names}.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"{path} must hold options, one `name: value` a line; got a {type(values).__name__}.")
    types = {item.name: item.type for item in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in types:
            task = next(name for name, task in TASKS.items() if task.arguments is kind)
            raise ArgumentError(
                f"{path}: {key!r} is no option of {task}; `accelerate launch training {task} --help` lists them."
            )
        expected = typing.get_args(types[key]) or (types[key],)
        if float in expected and isinstance(value, (int, str)) and is_number(value):
            values[key] = float(value)  # YAML reads 5e-4, without a dot, as text
        elif type(value) not in expected and not (value is None and type(None) in expected):
            raise ArgumentError(f"{path}: {key} must be of type {types[key]}, got {value!r}.")
    return values


def is_number(value: int | str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return not isinstance(value, bool)


def build_parser(task: str = "clip") -> argparse.ArgumentParser:
    recipe = TASKS[task].recipe
    parser = argparse.ArgumentParser(
        prog=f"accelerate launch training {task}",
        description=f"{TASKS[task].text}.",
    )
    families = ("blip2", "blip", "capfilt", "shards")  # CLIP's recipes have the names of its architectures
    family = next((name for name in families if name == task), None)
    stems = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    names = ", ".join(s for s in stems if next((n for n in families if s.startswith(n)), None) == family)
    parser.add_argument(
        "--config",
        default=recipe,
        metavar="FILE",
        help=f"YAML file of options, or a recipe: {names} (default: {recipe})",
    )
    add_options(parser, TASKS[task].arguments)
    return parser


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """An option for each field of a dataclass of `option`s."""
    for item in dataclasses.fields(kind):
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        kinds = [kind for kind in (typing.get_args(item.type) or (item.type,)) if kind is not type(None)]
        text = (
            item.metadata["help"].replace("%", "%%") + f" (default: {default if default not in ({}, None) else 'none'})"
        )
        if kinds[0] is bool:
            parser.add_argument(f"--{item.name}", action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            convert = json.loads if kinds[0] is dict else kinds[0]
            convert = none_or(convert) if type(None) in typing.get_args(item.type) else convert
            parser.add_argument(f"--{item.name}", type=convert, default=default, metavar=kinds[0].__name__, help=text)


def none_or(convert: Callable) -> Callable:
    """A converter that reads the word "none" as None: it takes back what a recipe sets."""

    def read(word: str):
        return None if word == "none" else convert(word)

    read.__name__ = convert.__name__  # argparse names it where a value is wrong
    return read


def parse_command_line() -> TrainingArguments:
    """`sys.argv`, its first word (`clip` where it is left out) naming what to train; wrong options end the program."""
    words = sys.argv[1:]
    task = words.pop(0) if words and not words[0].startswith("-") else "clip"
    if task not in TASKS:
        sys.exit(f"There is nothing called {task!r} to train; expected one of {', '.join(TASKS)}.")
    try:
        return parse(words, task)
    except ArgumentError as error:
        sys.exit(f"error: {error}")
