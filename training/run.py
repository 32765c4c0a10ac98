"""One run, from options to a folder that can be published: set up, fit, evaluate, publish."""

import contextlib
import ctypes
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import platform
import signal
import sys
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from ..configuration import VlpClipConfig, VlpClipTextConfig, VlpViTConfig
from ..configuration.clip import VISION_CONFIGS
from ..model_cards.card import write_card
from ..modeling_vlp.clip import VlpClipModel
from ..processing.augmentation import PerImage, StrongAugmentation, ToPixelValues
from ..processing.clip import VlpClipImageProcessor, VlpClipProcessor
from ..processing.prompts import CLASS_NAMES
from ..processing.tokenizer import VlpClipTokenizer
from .arguments import ArgumentError, TrainingArguments, parse_command_line
from .checkpoint import ResumeError, find_state, load_state, save_state, state_folder, write_whole
from .data import BadDataError, BadRows, CaptionChooser, Collator, SampleMaker, caption_texts, train_loader
from .evaluation import Evaluator
from .hub import check_access, push
from .loop import Progress, Run, fit
from .objectives import ClipObjective
from .optim import make_optimizer, parameter_groups
from .sources import is_shards, load_rows, require_column


def main() -> None:
    """Train as the command line says. Errors that a user can mend end the program with one line."""
    arguments = parse_command_line()
    try:
        train(arguments)
    except (ArgumentError, BadDataError, ResumeError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")


def train(arguments: TrainingArguments) -> None:
    """Do a whole run; see the module's docstring."""
    if arguments.push_to_hub:
        check_access()
    if not arguments.model_name_or_path:
        new_config(arguments)  # what cannot be is refused before anything is loaded
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(arguments)
    if accelerator.device.type == "cpu":
        use_cpu_well(arguments.num_threads or max(1, cpu_cores() // accelerator.num_processes))
    set_seed(arguments.seed)
    rows, eval_rows = load_data(arguments)
    chooser = make_chooser(arguments)
    processor = make_processor(arguments, rows, chooser)
    model = make_model(arguments, processor)
    run = make_run(arguments, accelerator, rows, processor, model)
    evaluator = make_evaluator(arguments, chooser, eval_rows)
    if accelerator.is_main_process:
        describe_run(run, rows, evaluator)

    def published_model() -> VlpClipModel:
        return run.average.module if run.average is not None else run.model

    def evaluate() -> dict:
        return evaluator(published_model(), processor) if evaluator else {}

    def save() -> None:
        facts = {"model_config": model.config.to_dict(), "progress": dataclasses.asdict(run.progress)}
        try:
            path = save_state(
                accelerator, state_folder(arguments.output_dir), run.progress.step, facts, arguments.save_total_limit
            )
            accelerator.print(f"State saved in {path}.")
        except OSError as error:
            accelerator.print(f"warning: {error} Training goes on.")

    if arguments.resume_from_checkpoint:
        resume(run)
    start_batches(run, rows, chooser, processor)
    with interruptible(run):
        fit(run, evaluate, save)
    save()
    accelerator.end_training()
    if run.interrupted:
        accelerator.print(f"Interrupted at step {run.progress.step}. Go on with --resume_from_checkpoint latest.")
        return
    metrics = evaluate()
    if accelerator.is_main_process:
        publish(run, rows, processor, published_model().eval(), evaluator, metrics)


# --- set up -----------------------------------------------------------------------------------------------------------


def make_accelerator(arguments: TrainingArguments) -> Accelerator:
    precision = arguments.mixed_precision
    if precision == "auto":
        precision = "bf16" if computes_in_bfloat16() else "no"
    trackers = None if arguments.report_to == "none" else arguments.report_to
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=trackers,
        project_dir=str(state_folder(arguments.output_dir)),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if trackers:
        plain = {k: v for k, v in dataclasses.asdict(arguments).items() if isinstance(v, (bool, int, float, str))}
        accelerator.init_trackers("logs", config=plain)
    return accelerator


def computes_in_bfloat16() -> bool:
    """Whether the hardware has bfloat16 arithmetic; where it is only emulated, float32 is faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.backends.cpu.get_cpu_capability() if torch.backends.cpu else ""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return capabilities.startswith("AVX512") and ("avx512_bf16" in flags or "amx_bf16" in flags)


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_well(threads: int) -> None:
    """All threads that there are (`accelerate launch` leaves one), and freed memory kept.

    A training step frees and takes the same large blocks again and again; glibc gives each back to the system, which
    then hands out zeroed pages one by one. Kept, the same step ran about twice as fast where this was measured.
    """
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max, largest = -1, -4, 2**31 - 1  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
        libc.mallopt(trim_threshold, largest)
        libc.mallopt(mmap_max, 0)


def load_data(arguments: TrainingArguments) -> tuple:
    """The rows to train on (None for shards) and to evaluate on (None for no evaluation)."""
    load = dict(
        image_column=arguments.image_column, image_root=arguments.image_root, config=arguments.dataset_config_name
    )
    rows = eval_rows = None
    if is_shards(arguments.dataset_name) and not importlib.util.find_spec("webdataset"):
        raise ArgumentError('Shards need webdataset: pip install "vlp[webdataset]".')
    if not is_shards(arguments.dataset_name):
        rows = load_rows(arguments.dataset_name, arguments.train_split, **load)
        require_column(rows, arguments.caption_column, arguments.dataset_name)
        if arguments.tag_share:
            require_column(rows, arguments.tag_column, arguments.dataset_name)
    elif arguments.shard_size is None and not (arguments.max_train_steps or arguments.max_train_minutes):
        raise ArgumentError("Shards have no known length: give --max_train_steps, --max_train_minutes or --shard_size.")
    if arguments.hold_out:
        column, value = arguments.hold_out.split("=", 1)
        if rows is None:
            raise ArgumentError("--hold_out needs data whose rows are known beforehand, not shards.")
        require_column(rows, column, arguments.dataset_name)
        held = [str(entry) == value for entry in rows[column]]
        if not any(held) or all(held):
            raise ArgumentError(
                f"--hold_out {arguments.hold_out}: {sum(held)} of {len(held)} rows; expected some, not all."
            )
        eval_rows = rows.select([number for number, out in enumerate(held) if out])
        rows = rows.select([number for number, out in enumerate(held) if not out])
    elif arguments.eval_split:
        name = arguments.eval_dataset_name or arguments.dataset_name
        if is_shards(name):
            raise ArgumentError("Evaluation needs data whose rows are known: --eval_dataset_name cannot be shards.")
        eval_rows = load_rows(name, arguments.eval_split, **load)
        require_column(eval_rows, arguments.caption_column, name)
    if eval_rows is not None and arguments.class_column:
        require_column(eval_rows, arguments.class_column, arguments.eval_dataset_name or arguments.dataset_name)
    return rows, eval_rows


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
    return VlpClipProcessor(images, tokenizer)


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


def make_run(arguments, accelerator, rows, processor, model) -> Run:
    objective = ClipObjective(
        model,
        exclude_duplicates=arguments.exclude_duplicates,
        lock_image_tower=arguments.lock_image_tower,
        lock_text_tower=arguments.lock_text_tower,
    )
    groups = parameter_groups(model, arguments.learning_rate, arguments.weight_decay, arguments.layer_decay)
    if not groups:
        raise ArgumentError("Nothing is left to train: both towers are locked.")
    optimizer = make_optimizer(groups, arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon)
    average = None
    if arguments.ema_decay:
        average = AveragedModel(model, multi_avg_fn=growing_average(arguments.ema_decay), use_buffers=True)
        accelerator.register_for_checkpointing(average)
    if arguments.torch_compile:
        objective.compile()
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    wrapped.train()
    set_seed(arguments.seed + accelerator.process_index)  # from here on, each process draws its own augmentation
    image_processor = processor.image_processor
    augment = StrongAugmentation() if arguments.augmentation == "strong" else None
    return Run(
        arguments=arguments,
        accelerator=accelerator,
        model=model,
        objective=wrapped,
        optimizer=optimizer,
        batches=iter(()),
        to_pixel_values=ToPixelValues(image_processor.image_mean, image_processor.image_std, augment),
        total_steps=total_steps(arguments, len(rows) if rows is not None else None, accelerator.num_processes),
        bad_rows=BadRows(arguments.max_bad_share, len(rows) if rows is not None else None),
        average=average,
    )


def growing_average(decay: float):
    """EMA whose decay grows with the steps, (1 + n) / (10 + n), up to `decay`: the random start fades out at once."""

    @torch.no_grad()
    def update(averaged, current, count):
        count = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averaged, current, count)

    return update


def start_batches(run: Run, rows, chooser: CaptionChooser, processor: VlpClipProcessor) -> None:
    """Let the batches begin where the run is."""
    arguments = run.arguments
    maker = SampleMaker(
        chooser=chooser,
        per_image=PerImage(
            run.model.config.vision_config.image_size, "random" if arguments.augmentation == "crop" else "middle"
        ),
        image_column=arguments.image_column,
        max_image_pixels=arguments.max_image_pixels,
        seed=arguments.seed,
        cache={} if arguments.cache_images else None,
    )
    collator = Collator(processor.tokenizer, run.model.config.text_config.max_position_embeddings)
    accelerator = run.accelerator
    loader = train_loader(arguments, rows, maker, collator, accelerator.process_index, accelerator.num_processes,
                          start=run.progress.samples)  # fmt: skip
    run.batches = iter(loader)


def total_steps(arguments: TrainingArguments, size: int | None, processes: int) -> int | None:
    """Optimiser steps of the whole schedule; None where minutes alone end it."""
    if arguments.max_train_steps or arguments.max_train_minutes:
        return arguments.max_train_steps
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes
    return max(1, math.ceil((size or arguments.shard_size) * arguments.num_train_epochs / batch))


def make_evaluator(arguments: TrainingArguments, chooser: CaptionChooser, rows) -> Evaluator | None:
    if rows is None:
        return None
    names = list(CLASS_NAMES[arguments.class_names]) if arguments.class_names else None
    return Evaluator(rows, chooser, arguments.image_column, arguments.max_image_pixels, arguments.class_column, names,
                     arguments.eval_templates, arguments.eval_batch_size)  # fmt: skip


def resume(run: Run) -> None:
    path = find_state(run.arguments.resume_from_checkpoint, run.arguments.output_dir)
    run.progress = Progress(**load_state(run.accelerator, path, run.model.config.to_dict())["progress"])
    run.accelerator.print(f"Going on from {path}, step {run.progress.step}.")


@contextlib.contextmanager
def interruptible(run: Run):
    """Ctrl-C (or SIGTERM) ends the loop after the step at hand, and the state is saved; a second one ends at once."""

    def stop(number, frame):
        if run.interrupted:
            raise KeyboardInterrupt
        run.interrupted = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what is left behind ----------------------------------------------------------------------------------------------


def describe_run(run: Run, rows, evaluator: Evaluator | None) -> None:
    arguments, accelerator = run.arguments, run.accelerator
    count = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    pairs = "shards" if rows is None else f"{len(rows):,} pairs"
    evaluated = f"{len(evaluator.rows):,} to evaluate on" if evaluator else "no evaluation"
    print(f"Model: {count:.1f} M parameters, precision {accelerator.mixed_precision}.")
    print(
        f"Machine: {accelerator.num_processes} x {accelerator.device.type}, {torch.get_num_threads()} CPU threads each."
    )
    print(f"Data: {arguments.dataset_name}, {pairs} to train on, {evaluated}.")


def publish(run: Run, rows, processor, model: VlpClipModel, evaluator: Evaluator | None, metrics: dict) -> None:
    """Write the folder to publish, whole, and push it where asked; tell how to use it."""
    arguments, progress = run.arguments, run.progress
    folder = Path(arguments.output_dir)
    results = {
        "metrics": metrics,
        "evaluations": progress.evaluations,
        "history": progress.history,
        "steps": progress.step,
        "samples": progress.samples,
        "training_seconds": round(progress.seconds, 1),
        "training_pairs": len(rows) if rows is not None else None,
        "evaluation_pairs": len(evaluator.rows) if evaluator else None,
        "classes": len(evaluator.names) if evaluator and evaluator.names else None,
        "bad_rows": run.bad_rows.describe(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": run.accelerator.mixed_precision,
        "processes": run.accelerator.num_processes,
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "arguments": dataclasses.asdict(arguments),
    }

    def write(fresh: Path) -> None:
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        (fresh / "training_arguments.yaml").write_text(yaml.safe_dump(results["arguments"], sort_keys=False))
        examples = evaluator.examples(model, processor) if evaluator and evaluator.names else []
        write_card(fresh, results, examples)

    write_whole(folder, write)
    print_results(metrics, run)
    if arguments.push_to_hub:
        print(f"Pushed to {push(folder, arguments)}.")
    print(f"""
The model, its processor and its card are in {folder}, the state to resume from in {state_folder(folder)}.
Use it:

    import vlp
    from transformers import pipeline
    classify = pipeline("zero-shot-image-classification", model="{folder}")
    classify("picture.png", candidate_labels=["a cat", "a dog", "a rocket"])
""")


def print_results(metrics: dict, run: Run) -> None:
    print(f"{run.progress.samples:,} samples in {run.progress.step:,} steps, {run.progress.seconds:.0f} s of training.")
    print(f"Bad rows: {run.bad_rows.describe()}.")
    for name, value in metrics.items():
        print(f"  {name:28s} {100 * value:6.2f} %")
