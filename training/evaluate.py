"""How good any model of vlp or transformers is, on any data: `accelerate launch -m vlp.training.evaluate MODEL ...`.

    accelerate launch -m vlp.training.evaluate model_cards/clip-emoji --dataset emoji --task zero-shot
    accelerate launch -m vlp.training.evaluate OWNER/MODEL --dataset captions.json --task retrieval --rerank_top_k 16

Rows are dealt out to the processes and put together again by their numbers, so that each counts once, however many
processes there are; the figures are the same. What is left is a JSON file, a table in Markdown and, of zero-shot
classification, a picture of what is taken for what; in MODEL/evaluations, and in the model's card where vlp wrote one.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ..errors import ArgumentError
from ..inference import NotReadyError, Ready, load
from ..model_cards.card import RESULTS, evaluation_table, render_card
from ..model_cards.plots import plot_confusion
from ..modeling_vlp.ranking import NOT_MATCHED
from ..processing.prompts import CLASS_NAMES, TEMPLATES, prompts_for, read_names
from .arguments import EMOJI, add_options, option, require_at_least_one, require_one_of
from .data.rows import BadRow, answers_of, decode_image, describe, texts_of
from .data.sources import is_shards, load_rows, require_column, require_text
from .evaluation.base import batched, class_means, number_labels
from .evaluation.metrics import load as load_metric
from .machine.hardware import cpu_cores, use_cpu_well

# Shapes: I images, T texts, K classes, E embedding, Q queries that are ranked for

USES = {"zero-shot": "compare", "retrieval": "compare", "captioning": "write", "vqa": "answer", "itm": "match"}
DEPTH = 10  # answers of a ranking that are kept: recalls at 1, 5 and 10 need no more


@dataclass(kw_only=True)
class EvaluationArguments:
    """What is evaluated, on what, and where the figures go."""

    dataset: str = option(EMOJI, "data, as --dataset_name of training; not shards")
    dataset_config_name: str | None = option(None, "configuration of a hub data set")
    split: str = option("test", "split to evaluate on")
    task: str = option("zero-shot", "zero-shot, retrieval, captioning, vqa or itm")
    image_column: str = option("image", "column with the images, or with their paths")
    image_root: str | None = option(None, "folder that image paths start from; that of the file where not given")
    caption_column: str = option("caption", "column with a caption or a list of them; of vqa, the question")
    class_column: str | None = option(
        None, "zero-shot: column with the class; the first that holds labels, else the captions, where not given"
    )
    class_names: str | None = option(
        None, f"zero-shot: names behind integer labels: a file, one a line, or one of {', '.join(CLASS_NAMES)}"
    )
    templates: str = option("name", f"zero-shot: prompts that are averaged, one of {', '.join(TEMPLATES)}")
    group_column: str | None = option(None, "zero-shot: column whose values are told apart: accuracy for each of them")
    answer_column: str = option("answers", "vqa: column with the answers that people gave")
    rerank_top_k: int = option(0, "retrieval: candidates of each query that are matched (ITM) again; 0 for none")
    rerank_posterior: bool = option(
        False, "re-rank by ITC's probability times ITM's odds; else by the original's cosine plus ITM's logit"
    )
    prompt: str = option("", "captioning: what captions begin with; it is taken off again")
    num_beams: int = option(3, "captioning, vqa: beams")
    max_length: int = option(30, "captioning, vqa: most tokens written")
    batch_size: int = option(64, "images or texts at a time, of each process")
    max_samples: int | None = option(None, "rows to evaluate on, the first ones; all where not given")
    max_image_pixels: int = option(89_478_485, "images of more pixels are skipped as decompression bombs, in pixels")
    resamples: int = option(1000, "of the bootstrap, for 95 % intervals; 0 for none")
    seed: int = option(0, "seed of the bootstrap")
    dtype: str = option("float32", "of the model: float32, bfloat16 or float16")
    output_dir: str | None = option(
        None, "folder of the figures; MODEL/evaluations, or runs/evaluations for a name on the hub, where not given"
    )

    def __post_init__(self):
        require_one_of("task", self.task, tuple(USES))
        require_one_of("templates", self.templates, tuple(TEMPLATES))
        require_one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        require_at_least_one(self, "batch_size", "num_beams", "max_length", "max_image_pixels")
        for name in ("resamples", "rerank_top_k"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if self.max_samples is not None:
            require_at_least_one(self, "max_samples")
        if is_shards(self.dataset):
            raise ArgumentError("Evaluation needs data whose rows are known: --dataset cannot be shards.")


@dataclass
class Rows:
    """The rows to evaluate on; this process looks at every `processes`-th of them, its own.

    Attributes:
        own: numbers of the rows that are this process's own and can be used. skipped: causes, of its own rows.
    """

    table: datasets.Dataset
    arguments: EvaluationArguments
    state: PartialState
    own: list[int] = dataclasses.field(default_factory=list)
    skipped: Counter = dataclasses.field(default_factory=Counter)

    def __post_init__(self):
        self.text_columns = self.table.remove_columns([self.arguments.image_column])
        for number in range(self.state.process_index, len(self.table), self.state.num_processes):
            try:
                self.check(number)
                self.own.append(number)
            except BadRow as error:
                self.skipped[str(error)] += 1

    def check(self, number: int) -> None:
        """Raise BadRow where a row cannot be used."""
        row, task = self.table[number], self.arguments.task
        decode_image(row[self.arguments.image_column], self.arguments.max_image_pixels)
        if task != "zero-shot" and not self.texts(number):
            raise BadRow("empty caption")
        if task == "vqa":
            answers_of(row, self.arguments.answer_column)

    def texts(self, number: int) -> list[str]:
        return texts_of(self.text_columns[number].get(self.arguments.caption_column))

    def image(self, number: int):
        return decode_image(self.table[number][self.arguments.image_column], self.arguments.max_image_pixels)

    def batches(self, items: list, text: str):
        """Chunks of what this process has to do, under a progress bar of the main process."""
        size = self.arguments.batch_size
        yield from tqdm(list(batched(items, size)), desc=text, disable=not self.state.is_main_process, leave=False)

    def gather(self, found: list[tuple]) -> list[tuple]:
        """(number, ...) of all processes, in the order of their numbers."""
        return sorted(gather_object(found), key=lambda item: item[0])


# --- the tasks: predictions and what is right, over the rows of all processes -----------------------------------------


def zero_shot(ready: Ready, rows: Rows) -> tuple[dict, list[tuple[int, int]], list[str], dict]:
    """Metrics, (class, class it is taken for) of every image, the names of the classes, and accuracy by group."""
    arguments = rows.arguments
    labels, names = labels_of(rows)
    prompts = prompts_for(names, arguments.templates)
    flat = [text for texts in prompts for text in texts]
    embeds = torch.cat([ready.embed_texts(chunk) for chunk in rows.batches(flat, "classes")])
    embeds = class_means(embeds, names)
    found = []
    for chunk in rows.batches([number for number in rows.own if labels[number] is not None], "images"):
        similarity = ready.similarity(ready.embed_images([rows.image(number) for number in chunk]), embeds)
        wanted = torch.tensor([labels[number] for number in chunk])
        ranked = best(similarity, wanted[:, None] == torch.arange(len(names)))
        found += list(zip(chunk, ranked, wanted.tolist(), strict=True))
    numbers, ranked, wanted = transposed(rows.gather(found))
    metrics = load_metric("zero_shot_accuracy").compute(
        predictions=ranked, references=wanted, k=[k for k in (1, 5) if k < len(names)], **draws(arguments)
    )
    confusion = [(right, first[0]) for right, first in zip(wanted, ranked, strict=True)]
    return metrics, confusion, names, by_group(rows, numbers, [right == said for right, said in confusion])


def by_group(rows: Rows, numbers: list[int], hits: list[bool]) -> dict:
    """For each value of `group_column`: the share of hits, and of how many rows."""
    if not rows.arguments.group_column:
        return {}
    values, groups = rows.table[rows.arguments.group_column], {}
    for number, hit in zip(numbers, hits, strict=True):
        groups.setdefault(str(values[number]), []).append(hit)
    return {name: {"zero_shot_top1": sum(h) / len(h), "rows": len(h)} for name, h in sorted(groups.items())}


def labels_of(rows: Rows) -> tuple[list[int | None], list[str]]:
    """The number of every row's class (None where it has none), and the names. Raises ArgumentError as it says."""
    arguments, features = rows.arguments, rows.table.features
    labelled = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    column = arguments.class_column or (labelled or [arguments.caption_column])[0]
    require_column(rows.table, column, arguments.dataset, "--class_column")
    values, names = rows.table[column], getattr(features[column], "names", None)
    if arguments.class_names:
        known = CLASS_NAMES.get(arguments.class_names)
        if known is None and not Path(arguments.class_names).is_file():
            raise ArgumentError(
                f"--class_names {arguments.class_names}: no such file, and none of {', '.join(CLASS_NAMES)}."
            )
        names = list(known or read_names(Path(arguments.class_names)))
    return number_labels(values, names, column)


def best(scores: Tensor, correct: Tensor) -> list[list[int]]:
    """The numbers of the DEPTH best targets for each query, by (Q, N) scores; of equal ones, the wrong ones first."""
    first = correct.int().argsort(dim=1, stable=True)  # wrong before right
    order = scores.gather(1, first).argsort(dim=1, descending=True, stable=True)
    return first.gather(1, order)[:, :DEPTH].tolist()


def transposed(found: list[tuple]) -> list[list]:
    return [list(column) for column in zip(*found, strict=True)]


def draws(arguments: EvaluationArguments) -> dict:
    return {"resamples": arguments.resamples, "seed": arguments.seed}


@dataclass
class Compared:
    """Every image and text of the data, embedded by the processes together.

    Attributes:
        similarity: (I, T) cosines. owner: (T,) the image of each text. texts: their words.
        own: images of this process; states: what texts are matched with, of its images, where that was asked for.
    """

    similarity: Tensor
    owner: Tensor
    texts: list[str]
    own: list[int]
    states: Tensor | None = None


def compare(ready: Ready, rows: Rows, see: bool) -> Compared:
    images, texts, states = [], [], []
    for chunk in rows.batches(rows.own, "images"):
        pictures = [rows.image(number) for number in chunk]
        images += zip(chunk, ready.embed_images(pictures), strict=True)
        if see:
            states.append(ready.see(pictures))
    places = [(number, place, text) for number in rows.own for place, text in enumerate(rows.texts(number))]
    for chunk in rows.batches(places, "texts"):
        embeds = ready.embed_texts([text for _, _, text in chunk])
        texts += [((number, place), text, each) for (number, place, text), each in zip(chunk, embeds, strict=True)]
    numbers, image_embeds = transposed(rows.gather(images))
    keys, words, text_embeds = transposed(rows.gather(texts))
    place = {number: index for index, number in enumerate(numbers)}
    return Compared(
        similarity=ready.similarity(torch.stack(image_embeds), torch.stack(text_embeds)),
        owner=torch.tensor([place[number] for number, _ in keys]),
        texts=words,
        own=[place[number] for number in rows.own],
        states=torch.cat(states) if states else None,
    )


def retrieval(ready: Ready, rows: Rows) -> dict:
    """Recall both ways, and again where the best candidates are matched."""
    found = compare(ready, rows, see=rows.arguments.rerank_top_k > 0)
    metrics = recalls(found, found.similarity, found.similarity.T, "", rows)
    if rows.arguments.rerank_top_k:
        to_texts, to_images = rerank(ready, rows, found)
        metrics |= recalls(found, to_texts, to_images, "reranked_", rows)
    return metrics


def recalls(found: Compared, to_texts: Tensor, to_images: Tensor, prefix: str, rows: Rows) -> dict:
    """Recalls by (I, T) scores of texts for each image, and (T, I) of images for each text."""
    metric, result = load_metric("recall_at_k"), {}
    right = found.owner == torch.arange(len(to_texts))[:, None]  # (I, T)
    wanted = [row.nonzero()[:, 0].tolist() for row in right]
    for name, scores, correct, references, groups in (
        ("text_to_image", to_images, right.T, found.owner[:, None].tolist(), found.owner.tolist()),
        ("image_to_text", to_texts, right, wanted, list(range(len(wanted)))),
    ):
        ranked = [row for chunk in range(0, len(scores), 1024)
                  for row in best(scores[chunk : chunk + 1024], correct[chunk : chunk + 1024])]  # fmt: skip
        values = metric.compute(predictions=ranked, references=references, groups=groups, **draws(rows.arguments))
        result |= {f"{prefix}{name}_{key}": value for key, value in values.items()}
    return result


def rerank(ready: Ready, rows: Rows, found: Compared) -> tuple[Tensor, Tensor]:
    """Scores (I, T) and (T, I) where each query's best candidates are matched; others stand behind them.

    A pair is matched once, by the process whose image it is. Scores as in `modeling_vlp.ranking`.
    """
    similarity, arguments = found.similarity, rows.arguments
    count = min(arguments.rerank_top_k, *similarity.shape)
    to_texts = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, similarity.topk(count, dim=1).indices, True)
    to_images = torch.zeros_like(similarity.T, dtype=torch.bool)
    to_images.scatter_(1, similarity.T.topk(count, dim=1).indices, True)
    pairs = (to_texts | to_images.T)[found.own].nonzero().tolist()  # (place among own images, text)
    logits = match(ready, rows, found, pairs, "matching")
    told = [((found.own[image], text), row) for (image, text), row in zip(pairs, logits.tolist(), strict=True)]
    scale = ready.temperature if arguments.rerank_posterior else 1.0
    scores = torch.zeros_like(similarity)
    for (image, text), (no, yes) in rows.gather(told):
        scores[image, text] = yes - no if arguments.rerank_posterior else yes
    behind = (similarity + NOT_MATCHED) / scale
    ahead = similarity / scale + scores
    return torch.where(to_texts, ahead, behind), torch.where(to_images, ahead.T, behind.T)


def match(ready: Ready, rows: Rows, found: Compared, pairs: list, text: str) -> Tensor:
    """ITM logits (P, 2) of pairs (place among this process's own images, number of the text)."""
    logits = [torch.zeros(0, 2)]
    for chunk in rows.batches(pairs, text):
        images, index = torch.tensor([image for image, _ in chunk]).unique(return_inverse=True)
        logits.append(ready.match(found.states[images], index, [found.texts[number] for _, number in chunk]))
    return torch.cat(logits)


def itm(ready: Ready, rows: Rows) -> dict:
    """Accuracy on every pair, and on every image with the wrong text that comparing finds nearest."""
    found = compare(ready, rows, see=True)
    right = found.owner == torch.arange(len(found.similarity))[:, None]  # (I, T)
    nearest = found.similarity.masked_fill(right, float("-inf")).argmax(dim=1)
    pairs = []
    for place, image in enumerate(found.own):
        pairs += [(place, text, 1) for text in right[image].nonzero()[:, 0].tolist()]
        if not right[image].all():
            pairs.append((place, int(nearest[image]), 0))
    logits = match(ready, rows, found, [pair[:2] for pair in pairs], "matching")
    told = [
        ((found.own[place], text), said, true)
        for (place, text, true), said in zip(pairs, logits.argmax(dim=1).tolist(), strict=True)
    ]
    keys, said, true = transposed(rows.gather(told))
    groups = [image for image, _ in keys]
    return load_metric("itm_accuracy").compute(predictions=said, references=true, groups=groups,
                                               **draws(rows.arguments))  # fmt: skip


def captioning(ready: Ready, rows: Rows) -> dict:
    arguments, found = rows.arguments, []
    for chunk in rows.batches(rows.own, "captions"):
        written = ready.write([rows.image(number) for number in chunk], arguments.prompt,
                              num_beams=arguments.num_beams, max_length=arguments.max_length)  # fmt: skip
        found += [(number, text, rows.texts(number)) for number, text in zip(chunk, written, strict=True)]
    _, written, wanted = transposed(rows.gather(found))
    return load_metric("caption_scores").compute(predictions=written, references=wanted, **draws(arguments))


def vqa(ready: Ready, rows: Rows) -> dict:
    arguments, found = rows.arguments, []
    places = [(number, place, text) for number in rows.own for place, text in enumerate(rows.texts(number))]
    for chunk in rows.batches(places, "answers"):
        answers = ready.answer([rows.image(number) for number, _, _ in chunk], [text for _, _, text in chunk],
                               num_beams=arguments.num_beams, max_length=arguments.max_length)  # fmt: skip
        found += [
            ((number, place), answer, answers_of(rows.table[number], arguments.answer_column))
            for (number, place, _), answer in zip(chunk, answers, strict=True)
        ]
    keys, answers, given = transposed(rows.gather(found))
    order = {number: place for place, number in enumerate(dict.fromkeys(number for number, _ in keys))}
    groups = [order[number] for number, _ in keys]
    return load_metric("vqa_accuracy").compute(predictions=answers, references=given, groups=groups,
                                               **draws(arguments))  # fmt: skip


# --- the command ------------------------------------------------------------------------------------------------------


def evaluate(model: str, arguments: EvaluationArguments) -> dict:
    """Evaluate a model, write what was found, and return it (on the main process; elsewhere the same figures).

    Raises ArgumentError where the data does not fit, NotReadyError where the model cannot do the task.
    """
    state, start = PartialState(cpu=not torch.accelerator.is_available()), time.perf_counter()
    if state.device.type == "cpu":
        use_cpu_well(max(1, cpu_cores() // state.num_processes))
    table = load_rows(arguments.dataset, arguments.split, arguments.image_column, arguments.image_root,
                      arguments.dataset_config_name)  # fmt: skip
    if arguments.task != "zero-shot":
        require_text(table, arguments.caption_column, arguments.dataset, "--caption_column")
    if arguments.task == "vqa":
        require_text(table, arguments.answer_column, arguments.dataset, "--answer_column")
    use = "match" if arguments.rerank_top_k and arguments.task == "retrieval" else USES[arguments.task]
    if arguments.group_column:
        require_column(table, arguments.group_column, arguments.dataset, "--group_column")
    ready = load(model, use, state.device, getattr(torch, arguments.dtype))
    rows = Rows(table.select(range(min(len(table), arguments.max_samples or len(table)))), arguments, state)
    used, skipped = sum(gather_object([len(rows.own)])), sum(gather_object([rows.skipped]), Counter())
    if not used:
        raise ArgumentError(f"The evaluation data holds no row that can be used: {describe(skipped)}.")
    confusion, names, groups = None, None, {}
    if arguments.task == "zero-shot":
        metrics, confusion, names, groups = zero_shot(ready, rows)
    else:
        tasks = {"retrieval": retrieval, "captioning": captioning, "vqa": vqa, "itm": itm}
        metrics = tasks[arguments.task](ready, rows)
    results = {
        "model": Path(model).name if Path(model).is_dir() else model,
        "architecture": type(ready.model).__name__,
        "metrics": {name: value for name, value in metrics.items() if not name.endswith("_interval")},
        "intervals": {name.removesuffix("_interval"): v for name, v in metrics.items() if name.endswith("_interval")},
        "rows": used,
        "skipped": describe(skipped),
        "classes": len(names) if names else None,
        "groups": groups,
        "seconds": round(time.perf_counter() - start, 1),
        "processes": state.num_processes,
        "device": state.device.type,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "arguments": dataclasses.asdict(arguments) | {"dataset": Path(arguments.dataset).name},
    }
    if confusion:
        wrong = Counter((names[right], names[said]) for right, said in confusion if right != said)
        results["most_confused"] = [[*pair, count] for pair, count in wrong.most_common(20)]
    if state.is_main_process:
        write(model, arguments, results, confusion, names)
    state.wait_for_everyone()
    return results


def write(model: str, arguments: EvaluationArguments, results: dict, confusion, names) -> None:
    """JSON, the table and the picture; and the model's card again, where vlp wrote one."""
    default = Path(model) / "evaluations" if Path(model).is_dir() else Path("runs/evaluations") / Path(model).name
    folder = Path(arguments.output_dir or default)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(arguments)}.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    table = evaluation_table(results)
    if confusion:
        plot_confusion(confusion, names, path.with_suffix(".png"))
        table += f"\n![Which classes are taken for which]({path.stem}.png)\n"
    path.with_suffix(".md").write_text(table)
    print(table)
    print(f"Written: {path}, and .md{' and .png' if confusion else ''} beside it.")
    if folder == Path(model) / "evaluations" and (Path(model) / RESULTS).is_file():
        render_card(Path(model)).save(Path(model) / "README.md")


def file_name(arguments: EvaluationArguments) -> str:
    """What tells one evaluation of a model from another: data, split, task, and the columns that are not the usual."""
    parts = [Path(arguments.dataset).stem, arguments.split, arguments.task]
    parts += [column for column in (arguments.caption_column,) if column != "caption"]
    parts += [arguments.class_column] if arguments.class_column else []
    return "-".join(part.replace("/", "_") for part in parts)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m vlp.training.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a model of vlp or transformers")
    add_options(parser, EvaluationArguments)
    return parser


def main() -> None:
    options = vars(build_parser().parse_args())
    model = options.pop("model")
    datasets.disable_progress_bars()
    try:
        evaluate(model, EvaluationArguments(**options))
    except (ArgumentError, NotReadyError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
