"""What to choose for a data set: recipe, batch, steps, and how long an epoch takes on this machine."""

import contextlib
import io
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..command_line import parse
from ..data.caption_facts import CaptionFacts
from ..data.survey import CheckArguments
from ..families import family_of
from ..loop import train_step
from ..setup import set_up

SMALL = 72  # pixels of the shorter side up to which pictures count as drawings or icons
LENGTHS = (16, 24, 32, 48, 64, 77)  # of captions, in tokens
NOT_IN_NAMES = r"[^\w.-]+"  # of the folders that are proposed
DATA_OPTIONS = (  # which name the data and the output, for any kind of model
    "dataset_name", "dataset_config_name", "image_root", "encoding", "eval_dataset_name", "eval_image_root",
    "train_split", "image_column", "caption_column", "eval_split", "output_dir",
)  # fmt: skip
STEPS = 4  # optimiser steps that are timed, after one that is not
MEASURED_BATCH = 32
TOWERS = {
    "English": ("facebook/dinov2-small", "sentence-transformers/all-MiniLM-L6-v2"),
    "Vietnamese": ("facebook/dinov2-small", "vinai/phobert-base-v2"),
    "": ("facebook/dinov2-small", "intfloat/multilingual-e5-small"),
}


@dataclass
class Advice:
    """What to choose.

    Attributes:
        options: the options of training, with their values.
        reasons: why, a sentence each.
        measured: the speed on this machine, as a sentence; empty if it was not measured.
    """

    options: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    measured: str = ""

    @property
    def command(self) -> str:
        """The command that trains a CLIP with these options."""
        return self.command_of("clip", self.options)

    @property
    def blip_command(self) -> str:
        """The command that trains a BLIP on the same data, with the default recipe."""
        return self.command_of("blip", self.data_options)

    @property
    def data_options(self) -> dict[str, str]:
        """Those of the options that any kind of model has: the data and the output."""
        return {name: value for name, value in self.options.items() if name in DATA_OPTIONS}

    def command_of(self, family: str, options: dict[str, str]) -> str:
        words = [f"--{name} {value}".strip() for name, value in options.items()]
        return " ".join([f"accelerate launch training {family}", *words])


def advise(arguments: CheckArguments, pairs: int, side: int, captions: CaptionFacts, has_gpu: bool) -> Advice:
    """Choose.

    Args:
        arguments: the options of the check-up.
        pairs: number of rows that can be used.
        side: median of the shorter sides of the pictures, in pixels.
        captions: what is known of the captions.
        has_gpu: whether training would run on a GPU.
    """
    advice = Advice()
    options, reasons = advice.options, advice.reasons
    options["dataset_name"] = quoted(arguments.dataset_name)
    for name in ("dataset_config_name", "image_root", "encoding", "eval_dataset_name", "eval_image_root"):
        if getattr(arguments, name):
            options[name] = quoted(getattr(arguments, name))
    for name, usual in (("train_split", "train"), ("image_column", "image"), ("caption_column", "caption")):
        if getattr(arguments, name) != usual:
            options[name] = quoted(getattr(arguments, name))
    options["eval_split"] = arguments.eval_split or "none"
    options["output_dir"] = f"runs/{re.sub(NOT_IN_NAMES, '-', Path(arguments.dataset_name).stem).strip('-.') or 'mine'}"
    if Path(options["output_dir"]).resolve() == Path(arguments.dataset_name).resolve():
        options["output_dir"] += "-clip"
    if side <= SMALL:
        options |= {"config": "clip-emoji", "image_size": str(32 if side < 64 else 64)}
        reasons.append(f"Half of the pictures are smaller than {side + 1} pixels, so a small ResNet is enough.")
    elif pairs < 200_000 or not has_gpu:
        language = next(iter(captions.languages), "")
        image, text = TOWERS.get(language if language in TOWERS else ("English" if language == "not clear" else ""))
        options |= {"config": "clip-towers", "image_tower": image, "text_tower": text, "lock_image_tower": "",
                    "lock_text_tower": "", "cache_features": "", "cached_views": "4"}  # fmt: skip
        why = f"{pairs:,} pairs are few" if pairs < 200_000 else "there is no GPU"
        reasons.append(f"Start from pre-trained towers, which run once and are locked, because {why} (docs/towers.md).")
    else:
        options["config"] = "vit-b-32" if pairs < 5_000_000 else "vit-b-16"
        options["tokenizer_name"] = "openai/clip-vit-base-patch32"
        reasons.append(f"{pairs:,} pairs on a GPU are enough to train a {options['config']} from scratch.")
    if 0 < pairs < 2048:
        batch = max(8, min(128, pairs // 4))
        options["per_device_train_batch_size"] = str(batch)
        reasons.append(f"Batches of {batch}: a quarter of the data at most, so that the negatives of a batch change.")
    if captions.count and captions.count / max(1, captions.distinct) >= 1.5 and captions.count == pairs:
        group = min(4, round(captions.count / captions.distinct))
        options["group_captions"] = str(group)
        reasons.append(f"Each caption belongs to {captions.count / captions.distinct:.1f} pictures on average.")
    if captions.tokens and options["config"] != "clip-towers":
        length = next((each for each in LENGTHS if each >= captions.tokens["99 %"] + 1), LENGTHS[-1])
        options["max_length"] = str(length)
        reasons.append(f"99 % of the captions have at most {captions.tokens['99 %']} tokens.")
    return advice


def quoted(text: str) -> str:
    """A value for a shell, in quotes if it needs them."""
    return text if text.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum() else f"'{text}'"


def measure(advice: Advice, pairs: int, config: str | None = None, threads: int | None = None) -> str:
    """Time a few steps of the recipe on this machine.

    Args:
        advice: what was chosen; recipes with pre-trained towers are measured with `clip-emoji` at 32 pixels instead,
            which needs no download.
        pairs: number of pairs of an epoch.
        config: another recipe.
        threads: CPU threads; one per core if None.

    Returns:
        A sentence with the time of an epoch; empty if training cannot start.
    """
    from_towers = advice.options["config"] == "clip-towers"
    chosen = advice.data_options if from_towers else advice.options
    options = {name: value.strip("'") for name, value in chosen.items()}
    if from_towers:
        options["config"] = "clip-emoji"
    elif options["config"] != "clip-emoji":
        options |= {"per_device_train_batch_size": str(MEASURED_BATCH)}
    options |= {"eval_split": "none", "max_train_steps": str(STEPS + 1), "max_train_minutes": "none"}
    for name in ("eval_dataset_name", "eval_image_root"):
        options.pop(name, None)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = [word for name, value in options.items() for word in (f"--{name}", value) if word]
        words += ["--num_threads", str(threads)] if threads else []
        run = set_up(arguments := parse([*words, "--output_dir", f"{folder}/run"], "clip"), family_of(arguments))
        run.wrapped.train()
        train_step(run, 0.0)
        started = time.perf_counter()
        for _ in range(STEPS):
            train_step(run, 0.5)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        speed = STEPS * arguments.per_device_train_batch_size / (time.perf_counter() - started)
        run.accelerator.end_training()
    what = "a small ResNet at 32 pixels, as a comparison" if from_towers else f"the recipe {options['config']}"
    return (
        f"On this machine, {what} reads and learns {speed:,.0f} pairs/s, so an epoch of {pairs:,} pairs takes "
        f"{duration(pairs / speed)}."
    )


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
