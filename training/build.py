"""What every run is made of, from its options: rows to train on and to evaluate on. Wrong options end here."""

import dataclasses
import difflib
import os

from transformers import AutoConfig

from .arguments import ArgumentError, TrainingArguments
from .data import CaptionChooser
from .distributed import processes
from .shards import expand, read_index, require_webdataset
from .sources import is_shards, load_rows, require_column, require_text


def load_data(arguments: TrainingArguments) -> tuple:
    """The rows to train on (None for shards) and to evaluate on (None for no evaluation)."""
    name, rows, eval_rows = arguments.dataset_name, None, None
    class_column = getattr(arguments, "class_column", None)  # CLIP's, for zero-shot classification
    if is_shards(name):
        check_shards(arguments)
    else:
        rows = load_rows(
            name, arguments.train_split, arguments.image_column, arguments.image_root, arguments.dataset_config_name
        )
        for column in arguments.caption_column.split(","):
            require_text(rows, column, name, "--caption_column")
        for column in (arguments.tag_column or "").split(",") if arguments.tag_share else ():
            require_text(rows, column, name, "--tag_column")
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
        if not class_column:
            for column in arguments.caption_column.split(","):
                require_text(eval_rows, column, other, "--caption_column")
    if eval_rows is not None and class_column:
        require_column(eval_rows, class_column, arguments.eval_dataset_name or name, "--class_column")
    return rows, eval_rows


def check_shards(arguments: TrainingArguments) -> None:
    """Raise ArgumentError where shards cannot be streamed as the options say."""
    require_webdataset()
    sources = [expand(source) for source in arguments.dataset_name.split("::")]
    streams = max(1, arguments.num_workers) * processes()
    for paths in sources:
        for path in paths:
            if "://" not in path and not path.startswith("pipe:") and not os.path.isfile(path):
                raise ArgumentError(f"--dataset_name {arguments.dataset_name}: there is no shard {path}.")
        if len(paths) < streams:
            raise ArgumentError(
                f"--dataset_name {arguments.dataset_name}: {len(paths)} shards from {paths[0]} on are fewer than the "
                f"{streams} workers that read them ({processes()} processes of {max(1, arguments.num_workers)}): lower "
                "--num_workers, or write smaller shards (`training shards --samples_per_shard`)."
            )
    indices = [read_index(paths) for paths in sources]
    for path, facts in (item for index in indices if index for item in index.items()):
        if os.path.getsize(path) != facts["bytes"]:
            raise ArgumentError(
                f"{path} has {os.path.getsize(path)} bytes, its index says {facts['bytes']}: it was not copied whole."
            )
    if arguments.shard_size is None and all(indices):
        arguments.shard_size = sum(facts["samples"] for index in indices for facts in index.values())
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
        raise ArgumentError(
            "Shards without an index have no known length: give --max_train_steps, --max_train_minutes or --shard_size."
        )
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


def check_fields(given: dict, kind: type) -> None:
    """Raise ArgumentError, with the nearest name, for a field that a configuration does not have."""
    known = [item.name for item in dataclasses.fields(kind)] + ["model_type"]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ArgumentError(f"--model: {kind.__name__} has no field {name!r}{f'; {near[0]}?' if near else '.'}")


def require_model_type(name: str, model_type: str) -> None:
    """Raise ArgumentError where a folder or hub name holds another kind of model."""
    kind = AutoConfig.from_pretrained(name).model_type
    if kind != model_type:
        raise ArgumentError(f"{name} is a {kind}, not a {model_type}.")
