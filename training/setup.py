"""Set up a run: data, processor, model, objective, optimiser and batches."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from datasets import Dataset
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Sampler
from transformers.utils import logging as transformers_logging

from ..errors import ArgumentError, BadDataError, printable
from ..files import start_anew, state_folder
from ..loading import text_of
from ..modeling_vlp.attention import set_packing
from ..modeling_vlp.resnet import ModifiedResNet
from ..processing.augmentation import PerImage, PerImageOfAnyShape, ToPixelValues, strong_augmentation
from ..processing.naflex import VlpNaflexImageProcessor
from .arguments import TrainingArguments
from .data.batches import BadRows, Collator, batches_of, train_loader
from .data.build import load_data
from .data.cached_pairs import CachedPairs, compute_pairs
from .data.rows import CaptionChooser, make_chooser, picture_id, stable_id, texts_of
from .data.samples import DrawSampler, PairDataset, SampleMaker
from .data.shards import expand
from .data.streaming import load_stream
from .data.streams import ShardDataset, kinds_of
from .families import Family
from .loop import Run
from .machine.adapters import add_lora, check_lora, freeze_statistics, note_base
from .machine.batch_norm import join_batch_norm
from .machine.checkpoint import find_state, state_for_all
from .machine.hardware import make_accelerator, precision_of, start_trackers, use_cpu_well
from .machine.hub import check_access
from .machine.optim import OFFSETS_RATE, make_optimizer, parameter_groups
from .machine.sharding import let_layers_precompute, make_shardable, repeated_layers, size_of
from .resume import resume

SMALL, SMALL_RATE = 10_000_000, 1e-3  # parameters of a small model; a learning rate that fine-tunes it
MANY_CUT = 0.05  # share of captions that are cut
LARGEST_BATCH = 10  # times the number of rows, in one optimiser step


def set_up(arguments: TrainingArguments, family: Family) -> Run:
    """Build everything that a run needs, and resume it from a training state if the options name one.

    Args:
        arguments: options of the run.
        family: kind of model to train.

    Returns:
        The run, ready for `loop.fit`.

    Raises:
        ArgumentError: if an option is wrong.
        ResumeError: if the state to resume from belongs to another model or recipe.
    """
    if arguments.push_to_hub:
        check_access()
    if arguments.lora_rank:
        check_lora(arguments)
    if not arguments.model_name_or_path:
        family.config(arguments, None)  # reject an impossible configuration before anything is loaded
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(arguments)
    if accelerator.device.type == "cpu":
        use_cpu_well(arguments.num_threads, accelerator.num_processes)
    set_packing(arguments.pack_texts)
    set_seed(arguments.seed)
    rows, eval_rows = load_data(arguments)
    chooser = make_chooser(arguments)
    processor = family.processor(arguments, rows, chooser)
    model = family.model(arguments, processor)
    if arguments.lora_rank:
        add_lora(model, arguments.lora_rank, arguments.model_name_or_path)
        freeze_statistics(model)
        if accelerator.is_main_process:
            note_base(arguments.output_dir, arguments.model_name_or_path)
    run = make_run(arguments, family, accelerator, rows, processor, model)
    if eval_rows is not None:
        try:
            run.evaluations = family.evaluation(arguments, eval_rows, rows)
        except BadDataError as error:  # the evaluation's own option is --image_root
            raise BadDataError(str(error).replace("--image_root", "--eval_image_root")) from error
    state = None
    if arguments.resume_from_checkpoint:
        state = state_for_all(find_state(arguments.resume_from_checkpoint, arguments.output_dir))
    check_learnable(arguments, rows)
    check_batch(arguments, rows, accelerator.num_processes)
    if accelerator.is_main_process:
        describe_run(run)
        if state is None:
            earlier = start_anew(state_folder(arguments.output_dir))
            if earlier:
                print(
                    f"The states of the earlier run were moved to {printable(earlier)}, where they stay until another "
                    "run starts anew. To continue that run, name one of them with --resume_from_checkpoint."
                )
    accelerator.wait_for_everyone()
    start_trackers(arguments, accelerator)
    if state is not None:
        resume(run, state)
    maker = make_maker(run, family, chooser)
    collator = Collator(processor, arguments.max_length, getattr(arguments, "prompt", ""), maker.same_views,
                        maker.teacher_texts)  # fmt: skip
    dataset, sampler = make_dataset(run, maker)
    if getattr(arguments, "cache_features", False):
        run.batches = cached_pairs(run, maker, collator).batches(sampler, arguments.per_device_train_batch_size)
    else:
        run.batches = batches_of(train_loader(arguments, dataset, sampler, collator))
    return run


def sources_of(arguments: TrainingArguments) -> list[str | None]:
    """The files and folders that a run reads, where the options name them."""
    names = ("dataset_name", "eval_dataset_name", "image_root", "eval_image_root", "model_name_or_path",
             "tokenizer_name", "image_tower", "text_tower", "vision_tower", "bert_name_or_path",
             "language_model_name_or_path", "teacher_name_or_path")  # fmt: skip
    return [getattr(arguments, name, None) for name in names]


def check_learnable(arguments: TrainingArguments, rows: Dataset | None) -> None:
    """Raise ArgumentError if there is nothing to learn: one row, or the same caption everywhere.

    Only the first rows are read, until two captions differ.
    """
    if rows is None or getattr(arguments, "task", "pretrain") in ("vqa", "nlvr"):
        return
    found = set()
    for captions in caption_batches(arguments, rows):
        found.update(captions)
        if len(found) > 1:
            return
    if found:
        raise ArgumentError(
            f"There is nothing to learn from {printable(arguments.dataset_name, 120)}: all {len(rows):,} rows have the "
            f"caption {printable(repr(next(iter(found))), 80)}. Choose another column with --caption_column."
        )


def caption_batches(arguments: TrainingArguments, rows: Dataset) -> Iterator[list[str]]:
    """The captions of the rows, of a thousand rows at a time."""
    columns = [column for column in arguments.caption_column.split(",") if column in rows.column_names]
    for batch in rows.select_columns(columns).iter(1000):
        yield [text for column in columns for value in batch[column] for text in texts_of(value)]


def joined_batch(arguments: TrainingArguments, processes: int) -> int:
    """The pairs of an optimiser step of all processes."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes


def check_batch(arguments: TrainingArguments, rows: Dataset | None, processes: int) -> None:
    """Raise ArgumentError if one optimiser step would see the data many times, which is almost certainly a mistake."""
    batch = joined_batch(arguments, processes)
    if rows is not None and batch > LARGEST_BATCH * max(len(rows), 1000):
        raise ArgumentError(
            f"--per_device_train_batch_size {arguments.per_device_train_batch_size} x --gradient_accumulation_steps "
            f"{arguments.gradient_accumulation_steps} x {processes} processes is {batch:,} pairs for each step, but "
            f"the data has {len(rows):,} rows: choose a smaller batch."
        )


def make_run(
    arguments: TrainingArguments, family: Family, accelerator: Accelerator, rows: Dataset | None, processor, model
) -> Run:
    """Build the run with its objective and optimiser, wrapped by Accelerate, but without batches.

    Args:
        arguments: options of the run.
        family: kind of model to train.
        accelerator: the accelerator.
        rows: training data; None for shards.
        processor: processor of the model.
        model: model to train.
    """
    size = len(rows) if rows is not None else arguments.shard_size
    batch = joined_batch(arguments, accelerator.num_processes)
    objective = family.objective(arguments, model, processor, size / batch if size else None)
    objective.even_batches = True  # the loaders leave out a last batch that is smaller
    if arguments.sync_batch_norm:
        join_batch_norm(objective)
    sharded = accelerator.is_fsdp2 or accelerator.distributed_type == DistributedType.DEEPSPEED
    if sharded:
        make_shardable(objective)
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = repeated_layers(objective)
    groups = parameter_groups(
        model, arguments.learning_rate, arguments.weight_decay, arguments.layer_decay, arguments.tower_learning_rate,
        OFFSETS_RATE if getattr(arguments, "spelling_share", 0.0) else None, arguments.optimizer == "muon",
    )  # fmt: skip
    optimizer = make_optimizer(groups, arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon)
    average = None
    objective.to(accelerator.device)
    if not sharded:
        ModifiedResNet.use_channels_last(objective)
    if arguments.ema_decay:
        average = AveragedModel(model, multi_avg_fn=growing_average(arguments.ema_decay), use_buffers=True)
    if arguments.torch_compile:
        objective.compile()
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    if accelerator.is_fsdp2:
        let_layers_precompute(objective)
    wrapped.train()
    set_seed(arguments.seed + accelerator.process_index)  # from here on, each process has its own augmentation
    return Run(
        arguments=arguments,
        accelerator=accelerator,
        rows=rows,
        processor=processor,
        model=model,
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        to_pixel_values=to_pixel_values(arguments, processor.image_processor),
        total_samples=total_samples(arguments, size, batch),
        bad_rows=BadRows(arguments.max_bad_share, len(rows) if rows is not None else None),
        average=average,
    )


def describe_run(run: Run) -> None:
    """Print the model, the hardware and the data of a run."""
    arguments, accelerator = run.arguments, run.accelerator
    count = size_of(run.model) / 1e6
    pairs = "shards" if run.rows is None else f"{len(run.rows):,} training pairs"
    share = "--hold_out 10%, " if run.rows is not None else ""
    evaluated = f"no evaluation (for one, {share}--eval_split or --eval_dataset_name)"
    if run.evaluations:
        evaluated = f"{run.evaluations[0].used:,} evaluation pairs"
    print(f"Model: {count:.1f} M parameters, precision {precision_of(accelerator)}.")
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    print(f"Hardware: {accelerator.device.type}, {processes}, {torch.get_num_threads()} CPU threads per process.")
    print(f"Data: {printable(arguments.dataset_name, 200)}, {pairs}, {evaluated}.")
    for doubt in doubts(run):
        print(f"warning: {doubt}")


def doubts(run: Run) -> list[str]:
    """Options that fit the data or the length of the run badly, as sentences; the run is possible all the same."""
    arguments, found = run.arguments, []
    batch = joined_batch(arguments, run.accelerator.num_processes)
    if run.rows is not None and batch > len(run.rows):
        found.append(
            f"a batch of {batch:,} is larger than the data, {len(run.rows):,} rows, so that a step has the same pair "
            "more than once; a smaller --per_device_train_batch_size learns more from it."
        )
    steps = arguments.max_train_steps or (run.total_samples and run.total_samples // batch)
    if steps and arguments.warmup_steps > steps:
        found.append(
            f"--warmup_steps {arguments.warmup_steps:,} is longer than the run, {steps:,} steps, so that the "
            "learning rate stays below --learning_rate."
        )
    if share := share_cut(run):
        found.append(
            f"{share:.0%} of the captions are longer than --max_length {arguments.max_length} tokens and are cut."
        )
    size = size_of(run.model)
    if (
        arguments.model_name_or_path
        and not arguments.lora_rank
        and size < SMALL
        and arguments.learning_rate <= SMALL_RATE / 10
    ):
        found.append(
            f"a model of {size / 1e6:.1f} M parameters hardly changes at --learning_rate {arguments.learning_rate:g}; "
            f"try {SMALL_RATE:g}."
        )
    return found


def share_cut(run: Run) -> float:
    """The share of the first captions that are longer than --max_length; 0 if it is below MANY_CUT."""
    is_reading = getattr(run.arguments, "stage", 1) == 2 or getattr(run.arguments, "task", "") in ("vqa", "nlvr")
    if run.rows is None or is_reading:  # a language model reads the texts, or they are questions
        return 0.0
    texts = next(caption_batches(run.arguments, run.rows), [])
    if not texts:
        return 0.0
    lengths = run.processor.tokenize(texts, run.arguments.max_length + 1)["attention_mask"].sum(dim=1)
    share = (lengths > run.arguments.max_length).double().mean().item()
    return share if share >= MANY_CUT else 0.0


def to_pixel_values(arguments: TrainingArguments, image_processor) -> Callable[[Tensor], Tensor]:
    """Return the function that augments and normalises batches on the device; cached features are left as they are."""
    if getattr(arguments, "cache_vision_features", False) or getattr(arguments, "cache_features", False):
        return lambda states: states
    return augmentation_on_device(arguments, image_processor)


def augmentation_on_device(arguments: TrainingArguments, image_processor) -> ToPixelValues:
    """Return the function that augments and normalises batches of images on the device."""
    augment = strong_augmentation if arguments.augmentation == "strong" else None
    return ToPixelValues(image_processor.image_mean, image_processor.image_std, augment)


def growing_average(decay: float):
    """Return an EMA update with decay min(decay, (1 + n) / (10 + n)) after n updates.

    The smaller decay at the start makes the random initial weights fade quickly.
    """

    @torch.no_grad()
    def update(averaged, current, count):
        count = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averaged, current, count)

    return update


def total_samples(arguments: TrainingArguments, size: int | None, batch: int) -> int | None:
    """Return the number of samples of the schedule, in whole batches; None if it is a number of steps or minutes."""
    if arguments.max_train_steps or arguments.max_train_minutes:
        return None
    return batch * max(1, math.ceil(size * arguments.num_train_epochs / batch))


# --- batches ----------------------------------------------------------------------------------------------------------


def make_maker(run: Run, family: Family, chooser: CaptionChooser) -> SampleMaker:
    """Build the `SampleMaker` that converts rows of the data into samples."""
    arguments = run.arguments
    maker = SampleMaker(
        chooser=chooser,
        per_image=per_image(arguments, run.processor),
        image_column=arguments.image_column,
        max_image_pixels=arguments.max_image_pixels,
        seed=arguments.seed,
        cache={} if arguments.cache_images else None,
        same_views=getattr(arguments, "group_images", 1) > 1,
    )
    return family.samples(arguments, run.rows, run.model, run.processor, maker)


def per_image(arguments: TrainingArguments, processor) -> PerImage:
    """Return the transform of each decoded image: a random crop, or the image processor's resize."""
    images = processor.image_processor
    if isinstance(images, VlpNaflexImageProcessor):
        return PerImageOfAnyShape(
            images.patch_size, images.max_num_patches, arguments.min_num_patches, arguments.augmentation == "crop",
            images.resample, arguments.crop_scale, arguments.horizontal_flip, arguments.random_augment,
        )  # fmt: skip
    if arguments.augmentation == "crop":
        return PerImage(arguments.image_size, "random", arguments.crop_scale, arguments.horizontal_flip,
                        arguments.random_augment)  # fmt: skip
    return PerImage(arguments.image_size, "middle" if images.do_center_crop else "squeeze")


def cached_pairs(run: Run, maker: SampleMaker, collator: Collator) -> CachedPairs:
    """Run the locked towers on all rows, unless that was done before; the main process does it, the others wait.

    The views do not depend on --seed, so that runs with other seeds share them.
    """
    arguments, accelerator, model = run.arguments, run.accelerator, run.model
    names = ("augmentation", "crop_scale", "horizontal_flip", "random_augment", "image_size", "max_length",
             "image_column", "max_image_pixels")  # fmt: skip
    facts = {name: getattr(arguments, name) for name in names} | {
        "chooser": dataclasses.asdict(maker.chooser), "images": run.processor.image_processor.to_dict(),
        "precision": precision_of(accelerator), "tokenizer": text_of(run.processor.tokenizer),
    }  # fmt: skip
    with accelerator.main_process_first(), accelerator.autocast():
        folder = compute_pairs(
            run.rows, dataclasses.replace(maker, seed=0), collator, arguments.cached_views, model.vision_model,
            model.text_model if getattr(arguments, "lock_text_tower", False) else None,
            augmentation_on_device(arguments, run.processor.image_processor), facts,
            with_states=hasattr(model, "memory_of"),  # texts attend to them
        )  # fmt: skip
    return CachedPairs(folder)


def make_dataset(run: Run, maker: SampleMaker) -> tuple[PairDataset | ShardDataset, Sampler | None]:
    """Build the data set and its sampler, starting where the run's progress is; a stream of shards has no sampler."""
    arguments, rows = run.arguments, run.rows
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    if rows is None:
        sources = [load_stream(arguments)] if arguments.streaming else [
            expand(source) for source in arguments.dataset_name.split("::")
        ]  # fmt: skip
        weights = [float(weight) for weight in arguments.shard_weights.split("::")] if arguments.shard_weights else None
        batches = run.progress.samples // (arguments.per_device_train_batch_size * processes)
        places = run.progress.places
        return ShardDataset(
            sources, weights, maker, arguments.seed, rank, processes, places, batches, arguments.num_workers,
            kinds_of(arguments),
        ), None  # fmt: skip
    groups, size = None, arguments.group_captions
    if maker.same_views:
        first, *others = maker.image_columns
        columns = ["image_id" if "image_id" in rows.column_names else first, *others]
        groups = [stable_id(picture_id(row, *maker.image_columns)) for row in rows.select_columns(columns)]
        size = arguments.group_images
    elif arguments.group_captions > 1:
        groups = [stable_id(str(value).lower()) for value in rows[arguments.caption_column.split(",")[0]]]
    sampler = DrawSampler(len(rows), arguments.seed, rank, processes, run.progress.samples, groups, size)
    return PairDataset(rows, maker), sampler
