"""The rows that a run trains and evaluates on, from its options."""

from ...errors import ArgumentError
from ..arguments import TrainingArguments
from .shards import check_shards
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
        for column in class_column.split(","):
            require_column(eval_rows, column, arguments.eval_dataset_name or name, "--class_column")
    return rows, eval_rows


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
