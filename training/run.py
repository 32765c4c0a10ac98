"""One run, from options to a folder that can be published: set up, fit, evaluate, publish."""

import contextlib
import dataclasses
import math
import platform
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import ArgumentError, BadDataError, ResumeError
from ..files import check_output, start_anew, state_folder, write_whole
from ..model_cards.card import shown, usage, write_card
from ..modeling_vlp.exchange.bundle import add_code
from ..processing.augmentation import PerImage, StrongAugmentation, ToPixelValues
from .arguments import TrainingArguments
from .command_line import parse_command_line
from .data.batches import BadRows, Collator, train_loader
from .data.build import load_data
from .data.capfilt import CapFiltArguments, capfilt
from .data.rows import CaptionChooser, make_chooser, stable_id
from .data.samples import DrawSampler, PairDataset
from .data.shards import ShardDataset, ShardsArguments, expand, write_shards
from .data.sources import is_shards
from .evaluation.base import Evaluator
from .evaluation.pictures import draw_pictures
from .families import blip, blip2, clip
from .families.blip import BlipArguments
from .families.blip2 import Blip2Arguments
from .families.clip import ClipArguments
from .loop import Progress, Run, fit
from .machine.adapters import add_lora, check_lora
from .machine.checkpoint import find_state, load_state, round_matrices, save_state, store_matrices
from .machine.hardware import cpu_cores, make_accelerator, start_trackers, use_cpu_well
from .machine.hub import check_access, push
from .machine.optim import make_optimizer, parameter_groups
from .machine.sharding import let_layers_be_read, make_shardable, repeated_layers, whole_model

# The module that makes the parts of a run, for each kind of options.
FAMILIES = {ClipArguments: clip, BlipArguments: blip, Blip2Arguments: blip2}


def main() -> None:
    """Train as the command line says. Errors that a user can mend end the program with one line."""
    arguments = parse_command_line()
    try:
        {CapFiltArguments: capfilt, ShardsArguments: write_shards}.get(type(arguments), train)(arguments)
    except (ArgumentError, BadDataError, ResumeError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")


def train(arguments: TrainingArguments) -> None:
    """Do a whole run; see the module's docstring."""
    family = FAMILIES[type(arguments)]
    check_output(arguments.output_dir)
    if arguments.push_to_hub:
        check_access()
    if arguments.lora_rank:
        check_lora(arguments)
    if not arguments.model_name_or_path:
        family.new_config(arguments)  # what cannot be is refused before anything is loaded
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(arguments)
    if accelerator.device.type == "cpu":
        use_cpu_well(arguments.num_threads or max(1, cpu_cores() // accelerator.num_processes))
    set_seed(arguments.seed)
    rows, eval_rows = load_data(arguments)
    chooser = make_chooser(arguments)
    processor = family.make_processor(arguments, rows, chooser)
    model = family.make_model(arguments, processor)
    if arguments.model_name_or_path:
        family.adopt_sizes(arguments, model)
    if arguments.lora_rank:
        add_lora(model, arguments.lora_rank, arguments.model_name_or_path)
    run = make_run(arguments, accelerator, rows, processor, model, family)
    evaluator = family.make_evaluator(arguments, chooser, eval_rows, rows) if eval_rows is not None else None
    state = (
        find_state(arguments.resume_from_checkpoint, arguments.output_dir) if arguments.resume_from_checkpoint else None
    )
    if accelerator.is_main_process:
        describe_run(run, rows, evaluator)
        if state is None:
            start_anew(state_folder(arguments.output_dir))
    accelerator.wait_for_everyone()
    start_trackers(arguments, accelerator)

    def published_model() -> PreTrainedModel:
        if accelerator.is_fsdp2:
            return whole_model(run.model)
        return run.average.module if run.average is not None else run.model

    def evaluate(model: PreTrainedModel | None = None) -> dict:
        if evaluator is None:
            return {}
        metrics = evaluator(model or published_model(), processor)
        run.wrapped.train()  # locked towers stay in evaluation mode, which only the objective knows
        run.progress.evaluations.append({"step": run.progress.step} | metrics)
        accelerator.log(metrics, step=run.progress.step)
        first = ", ".join(f"{name} {shown(name, value)}" for name, value in list(metrics.items())[:3])
        accelerator.print(f"Step {run.progress.step}: {first}.")
        return metrics

    def save() -> bool:
        folder, step = state_folder(arguments.output_dir), run.progress.step
        try:
            path = save_state(accelerator, folder, step, state_facts(run), arguments.save_total_limit)
        except OSError as error:
            accelerator.print(f"warning: {error}")
            return False
        accelerator.print(f"State saved in {path}.")
        return True

    if state is not None:
        resume(run, state)
    start_batches(run, rows, chooser, processor)
    with interruptible(run):
        fit(run, evaluate, save)
    saved = save()
    if run.interrupted:
        accelerator.end_training()
        if not saved:
            raise OSError(f"Interrupted at step {run.progress.step}, and the state could not be saved.")
        accelerator.print(f"Interrupted at step {run.progress.step}. Go on with --resume_from_checkpoint latest.")
        return
    published = published_model().eval()
    round_matrices(published, getattr(torch, arguments.publish_dtype))  # what is measured is what is published
    metrics = evaluate(published)
    published.eval()
    accelerator.end_training()
    if accelerator.is_main_process:
        publish(run, rows, processor, published, evaluator, metrics)


# --- set up -----------------------------------------------------------------------------------------------------------


def make_run(arguments, accelerator, rows, processor, model, family) -> Run:
    size = len(rows) if rows is not None else arguments.shard_size
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    objective = family.make_objective(arguments, model, processor, size / batch if size else None)
    if accelerator.is_fsdp2:
        make_shardable(objective)
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = repeated_layers(objective)
    groups = parameter_groups(model, arguments.learning_rate, arguments.weight_decay, arguments.layer_decay)
    optimizer = make_optimizer(groups, arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon)
    average = None
    objective.to(accelerator.device)
    if arguments.ema_decay:
        average = AveragedModel(model, multi_avg_fn=growing_average(arguments.ema_decay), use_buffers=True)
        accelerator.register_for_checkpointing(average)
    if arguments.torch_compile:
        objective.compile()
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    if accelerator.is_fsdp2:
        let_layers_be_read(objective)
    wrapped.train()
    set_seed(arguments.seed + accelerator.process_index)  # from here on, each process draws its own augmentation
    return Run(
        arguments=arguments,
        accelerator=accelerator,
        model=model,
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        batches=iter(()),
        to_pixel_values=to_pixel_values(arguments, processor.image_processor),
        total_steps=total_steps(arguments, size, batch),
        bad_rows=BadRows(arguments.max_bad_share, len(rows) if rows is not None else None),
        average=average,
    )


def to_pixel_values(arguments: TrainingArguments, image_processor) -> Callable[[Tensor], Tensor]:
    """What is done to a batch of images on the device; nothing to what a frozen tower gave for them before."""
    if getattr(arguments, "cache_vision_features", False):
        return lambda states: states
    augment = StrongAugmentation() if arguments.augmentation == "strong" else None
    return ToPixelValues(image_processor.image_mean, image_processor.image_std, augment)


def growing_average(decay: float):
    """EMA whose decay grows with the steps, (1 + n) / (10 + n), up to `decay`: the random start fades out at once."""

    @torch.no_grad()
    def update(averaged, current, count):
        count = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averaged, current, count)

    return update


def start_batches(run: Run, rows, chooser: CaptionChooser, processor) -> None:
    """Let the batches begin where the run is."""
    arguments = run.arguments
    maker = FAMILIES[type(arguments)].make_maker(
        arguments,
        rows,
        run.model,
        processor,
        chooser=chooser,
        per_image=per_image(arguments, processor),
        image_column=arguments.image_column,
        max_image_pixels=arguments.max_image_pixels,
        seed=arguments.seed,
        cache={} if arguments.cache_images else None,
    )
    collator = Collator(processor, arguments.max_length, getattr(arguments, "prompt", ""))
    run.batches = iter(train_loader(arguments, *make_dataset(run, rows, maker), collator))


def make_dataset(run: Run, rows, maker) -> tuple:
    """The data and their order, from where the run is: rows by number and a sampler, or a stream of shards."""
    arguments, rank, processes = run.arguments, run.accelerator.process_index, run.accelerator.num_processes
    if rows is None:
        sources = [expand(source) for source in arguments.dataset_name.split("::")]
        weights = [float(weight) for weight in arguments.shard_weights.split("::")] if arguments.shard_weights else None
        batches = run.progress.samples // (arguments.per_device_train_batch_size * processes)
        places = run.progress.places
        return ShardDataset(sources, weights, maker, arguments.seed, rank, processes, places, batches), None
    column = rows[arguments.caption_column.split(",")[0]] if arguments.group_captions > 1 else None
    groups = None if column is None else [stable_id(value) for value in column]
    sampler = DrawSampler(
        len(rows), arguments.seed, rank, processes, run.progress.samples, groups, arguments.group_captions
    )
    return PairDataset(rows, maker), sampler


def per_image(arguments: TrainingArguments, processor) -> PerImage:
    """What is done to each image where it is decoded: a random crop, or what the image processor does."""
    if arguments.augmentation == "crop":
        return PerImage(arguments.image_size, "random", arguments.crop_scale, arguments.horizontal_flip,
                        arguments.random_augment)  # fmt: skip
    return PerImage(arguments.image_size, "middle" if processor.image_processor.do_center_crop else "squeeze")


def total_steps(arguments: TrainingArguments, size: int | None, batch: int) -> int | None:
    """Optimiser steps of the whole schedule; None where minutes alone end it."""
    if arguments.max_train_steps or arguments.max_train_minutes:
        return arguments.max_train_steps
    return max(1, math.ceil(size * arguments.num_train_epochs / batch))


# What a run must share with the state that it goes on from; rates, lengths, evaluation and the like may be others.
BOUND = (
    "dataset_name", "train_split", "hold_out", "image_column", "caption_column", "shard_weights", "seed", "tag_share",
    "templates", "template_share", "augmentation", "crop_scale", "horizontal_flip", "random_augment", "group_captions",
    "per_device_train_batch_size", "gradient_accumulation_steps", "exclude_duplicates", "lora_rank", "loss", "task",
    "stage", "prompt", "lock_image_tower", "lock_text_tower", "patch_dropout", "queue_size", "global_negatives",
    "contrastive_share",
)  # fmt: skip


def state_facts(run: Run) -> dict:
    """What a state says beside its tensors: where the run is, and what it must fit; called by every process."""
    arguments, accelerator = run.arguments, run.accelerator
    recipe = {name: getattr(arguments, name) for name in BOUND if hasattr(arguments, name)}
    recipe["ema_decay"] = bool(arguments.ema_decay)
    progress = dataclasses.asdict(run.progress)
    if is_shards(arguments.dataset_name):  # each stream of them is a worker's of a process
        recipe |= {"num_workers": arguments.num_workers, "processes": accelerator.num_processes}
        workers, rank = max(1, arguments.num_workers), accelerator.process_index
        own = {number: place for number, place in run.progress.places.items() if int(number) // workers == rank}
        progress["places"] = {number: place for part in gather_object([own]) for number, place in part.items()}
    return {
        "model_config": run.model.config.to_dict(),
        "recipe": recipe,
        "progress": progress,
        "bad_rows": list(run.bad_rows.causes.items()),
    }


def resume(run: Run, path: Path) -> None:
    """Go on from a state. Learning rates, decay and the like are those of this run's options, not the state's."""
    options = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    facts = load_state(run.accelerator, path, state_facts(run))
    for group, values in zip(run.optimizer.param_groups, options, strict=True):
        group.update(values)
    run.progress = Progress(**facts["progress"])
    run.bad_rows.causes = {key: cause for key, cause in facts["bad_rows"]}
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


def publish(run: Run, rows, processor, model: PreTrainedModel, evaluator: Evaluator | None, metrics: dict) -> None:
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
        "losses": progress.losses,
        "bad_rows": run.bad_rows.describe(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": run.accelerator.mixed_precision,
        "processes": run.accelerator.num_processes,
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "arguments": publishable(dataclasses.asdict(arguments)),
    }

    def write(fresh: Path) -> None:
        model.save_pretrained(fresh)
        store_matrices(fresh, getattr(torch, arguments.publish_dtype))
        processor.save_pretrained(fresh)
        (fresh / "training_arguments.yaml").write_text(yaml.safe_dump(results["arguments"], sort_keys=False))
        examples = evaluator.examples(model, processor) if evaluator else []
        if evaluator:
            draw_pictures(model, processor, evaluator, fresh)
        write_card(fresh, results, examples)
        if arguments.hub_bundle:
            add_code(fresh)

    write_whole(folder, write)
    print_results(metrics, run)
    if arguments.push_to_hub:
        print(f"Pushed to {push(folder, arguments)}.")
    print(f"""
The model, its processor and its card are in {folder}, the state to resume from in {state_folder(folder)}.
Use it:

{textwrap.indent(usage(type(model).__name__, str(folder), getattr(arguments, "prompt", "")), "    ")}""")


def publishable(options: dict) -> dict:
    """Options as anyone may read them: of a path on this machine, its last part alone."""

    def name(value):
        if isinstance(value, str) and value.startswith("/"):
            return "::".join(Path(path).name for path in value.split("::"))
        return value

    return {key: name(value) for key, value in options.items()}


def print_results(metrics: dict, run: Run) -> None:
    print(f"{run.progress.samples:,} samples in {run.progress.step:,} steps, {run.progress.seconds:.0f} s of training.")
    print(f"Bad rows: {run.bad_rows.describe()}.")
    for name, value in metrics.items():
        print(f"  {name:36s} {shown(name, value):>8s}")
