"""Publishing: write the folder with the model, its processor, its evaluations and its card, and push it."""

import copy
import dataclasses
import platform
import textwrap
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel

from ..errors import printable
from ..files import state_folder, write_whole
from ..loading import licence_of
from ..model_cards.card import has_local_base, metric_name, prompt_for_use, shown, usage, write_card
from ..modeling_vlp.exchange.bundle import add_code
from .arguments import TrainingArguments, names_of, public_name, publishable
from .evaluation.examples import draw_galleries, make_examples
from .evaluation.results import metrics_of, results_of, write_results
from .evaluation.tasks import Outcome
from .loop import Run
from .machine.checkpoint import store_matrices
from .machine.hardware import precision_of
from .machine.hub import push


def publish(run: Run, model: PreTrainedModel, outcomes: list[Outcome]) -> None:
    """Write the folder to publish, push it if requested, and print how to use it.

    The folder is written completely or not at all.

    Args:
        run: the finished run.
        model: the model to publish.
        outcomes: results of the final evaluation, one per task of the run.

    Raises:
        OSError: if the folder cannot be written or pushed; if writing fails, an existing folder is left unchanged.
    """
    arguments, folder = run.arguments, Path(run.arguments.output_dir)
    results = collect_results(run, model, metrics_of(run.evaluations, outcomes))
    prompts = (getattr(arguments, "example_prompts", "") or getattr(arguments, "prompt", "")).split("|")

    def write(fresh: Path) -> None:
        model.save_pretrained(fresh)
        store_matrices(fresh, getattr(torch, arguments.publish_dtype))
        run.processor.save_pretrained(fresh)
        (fresh / "training_arguments.yaml").write_text(yaml.safe_dump(results["arguments"], sort_keys=False))
        for pictures, outcome in zip(run.evaluations, outcomes, strict=True):
            found = results_of(folder.name, type(model).__name__, pictures, outcome, run.accelerator.device.type)
            write_results(fresh / "evaluations", found, pictures, outcome)
        examples = make_examples(model, run.processor, run.evaluations, prompts)
        draw_galleries(model, run.processor, run.evaluations, fresh)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        write_card(fresh, results, examples, config)
        if arguments.hub_bundle:
            add_code(fresh)

    folder = write_whole(folder, write)
    print_results(run, results)
    if arguments.push_to_hub:
        print(f"Pushed to {push(folder, arguments)}.")
    states, written = printable(state_folder(arguments.output_dir)), results["arguments"]
    code = usage(type(model).__name__, str(folder), prompt_for_use(written), has_local_base(written))
    print(f"""
The model, its processor and its card are in {printable(folder)}; the state to resume from is in {states}.
To use the model:

{textwrap.indent(code, "    ")}""")


def collect_results(run: Run, model: PreTrainedModel, metrics: dict[str, float]) -> dict:
    """Collect the results and settings of a run, from which the card is rendered."""
    arguments, progress = run.arguments, run.progress
    options = dataclasses.asdict(arguments)
    threads = torch.get_num_threads()
    cores = f"{threads} CPU core{'s' * (threads > 1)}"
    return {
        "metrics": metrics,
        "evaluations": progress.evaluations,
        "history": progress.history,
        "steps": progress.step,
        "samples": progress.samples,
        "training_seconds": round(progress.seconds, 1),
        "training_pairs": len(run.rows) if run.rows is not None else None,
        "evaluation_pairs": run.evaluations[0].used if run.evaluations else None,
        "classes": next((len(each.names) for each in run.evaluations if each.names), None),
        "losses": progress.losses,
        "bad_rows": run.bad_rows.describe(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": precision_of(run.accelerator),
        "processes": run.accelerator.num_processes,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cores,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shown_options": names_of(arguments, "shown"),
        "arguments": publishable(options),
        "base_models": base_models(arguments),
    }


def base_models(arguments: TrainingArguments) -> list[dict]:
    """The models from which a run started, as they may be published, with their licences; None if one is not known."""
    names = ("model_name_or_path", "image_tower", "text_tower", "vision_tower", "bert_name_or_path",
             "language_model_name_or_path")  # fmt: skip
    given = dict.fromkeys(value for name in names if (value := getattr(arguments, name, None)))
    return [
        {
            "name": public_name(value.removeprefix("package:")),
            "license": licence_of(value),
            "local": value.startswith("package:") or Path(value).exists(),  # not a name of the hub
        }
        for value in given
    ]


def print_results(run: Run, results: dict) -> None:
    """Print the length of the run, the skipped rows and the metrics."""
    progress = run.progress
    print(f"{progress.samples:,} samples in {progress.step:,} steps, {progress.seconds:.0f} s of training.")
    named = " `vlp check` names the first of each cause." if run.bad_rows.causes and run.rows is not None else ""
    print(f"Skipped rows: {results['bad_rows']}.{named}")
    for name, value in results["metrics"].items():
        print(f"  {metric_name(name):60s} {shown(name, value):>8s}")
