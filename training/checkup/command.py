"""`vlp check DATA`: look at a data set before training, and write a report."""

import itertools
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from ...errors import ArgumentError, BadDataError, UserError, brief, printable
from ...files import check_output, write_whole
from ...inference import Predictor, load
from ...loading import load_auto_tokenizer
from ...processing.tokenizer import VlpClipTokenizer
from ..data.caption_facts import caption_facts
from ..data.duplicates import groups_of, identical, similar
from ..data.rows import texts_of
from ..data.sources import is_shards, load_rows, require_text
from ..data.survey import CheckArguments, PictureFacts, advice_for, survey
from ..machine.hardware import cpu_cores, use_cpu_well
from .advice import advise, measure
from .findings import Findings
from .fit import embed_rows, misfits
from .report import sections_of, write_report

ALIKE = 0.99  # cosine of the embeddings of two pictures from which they are reported as alike to --model
MOST_ALIKE = 50  # of such pairs


def check(arguments: CheckArguments) -> Findings:
    """Check a data set and write the report.

    Raises:
        BadDataError: if no row can be used; the report is written all the same.
        ArgumentError: if no data is named, it cannot be loaded, or the output folder holds other files.
    """
    if not arguments.dataset_name:
        raise ArgumentError("Name the data to check, as in `vlp check pairs.csv`; `emoji` are the included drawings.")
    if is_shards(arguments.dataset_name):
        raise ArgumentError("The check-up needs random access to the rows: --dataset_name cannot be shards.")
    target = arguments.output_dir or "runs/check"
    names = ("dataset_name", "eval_dataset_name", "image_root", "eval_image_root")
    check_output(target, sources=[getattr(arguments, name) for name in names])
    print(f"Checking {printable(arguments.dataset_name, 200)}.")
    datasets.disable_progress_bars()
    use_cpu_well(arguments.num_threads)
    rows = load_split(arguments, arguments.dataset_name, arguments.train_split, "--dataset_name")
    eval_rows = rows_to_evaluate_on(arguments)
    if arguments.eval_image_root and eval_rows is None:
        raise ArgumentError("--eval_image_root needs data to evaluate on: give --eval_split or --eval_dataset_name.")
    findings = look(arguments, rows, eval_rows)
    sections = sections_of(findings, rows, eval_rows, arguments)
    written = write_whole(Path(target), lambda folder: write_report(folder, findings, sections, arguments))
    print(sections[0].text)
    if findings.usable:
        print(f"To train on it: {printable(findings.advice.command, 1000)}")
    print(f"Report written to {printable(written)}/check.html, and as .md and .json beside it.")
    if not findings.usable:
        raise BadDataError(
            f"No row of {printable(arguments.dataset_name, 120)} can be used. {findings.advice_for_paths}"
        )
    return findings


def rows_to_evaluate_on(arguments: CheckArguments):
    """The rows to evaluate on: those that the options name, or else those of the data's own test split, if it has one.

    `eval_split` is set to the split. Returns None if there are no such rows.
    """
    name = arguments.eval_dataset_name or arguments.dataset_name
    if arguments.eval_split or arguments.eval_dataset_name:
        arguments.eval_split = arguments.eval_split or "test"
        option = "--eval_dataset_name" if arguments.eval_dataset_name else "--dataset_name"
        return load_split(arguments, name, arguments.eval_split, option, arguments.eval_image_root)
    for split in ("test", "validation"):
        try:
            found = load_split(arguments, name, split, "--dataset_name", arguments.eval_image_root)
        except ArgumentError:
            continue
        arguments.eval_split = split
        return found
    return None


def load_split(arguments: CheckArguments, name: str, split: str, option: str, image_root: str | None = None):
    """Load a split of the data; its image paths start from --image_root if no folder is given."""
    config = arguments.dataset_config_name if name == arguments.dataset_name else None
    rows = load_rows(name, split, arguments.image_column, image_root or arguments.image_root, config, option,
                     caption_column=arguments.caption_column, encoding=arguments.encoding)  # fmt: skip
    for column in arguments.caption_column.split(","):
        require_text(rows, column, name, "--caption_column")
    return rows


def look(arguments: CheckArguments, rows, eval_rows) -> Findings:
    """Find everything out."""
    processes = arguments.num_workers or cpu_cores()
    facts = survey(rows, arguments.image_column, arguments.max_image_pixels, processes)
    columns = arguments.caption_column.split(",")
    values = rows.select_columns(columns)[:]
    captions = [[text for column in columns for text in texts_of(values[column][n])] for n in range(len(rows))]
    findings = Findings(rows=len(rows))
    causes = [each.cause or (None if texts else "empty caption") for each, texts in zip(facts, captions, strict=True)]
    findings.unreadable, findings.examples = by_cause(causes, facts)
    findings.advice_for_paths = advice_for(facts, tried=arguments.image_root)
    read = [number for number, each in enumerate(facts) if each.cause is None]
    findings.pictures = len({facts[number].digest for number in read})
    findings.formats = dict(Counter(facts[number].format for number in read).most_common())
    if read:
        shorter = np.array([min(facts[number].width, facts[number].height) for number in read])
        aspect = np.array([facts[number].width / facts[number].height for number in read])
        shares = (0, 0.01, 0.5, 0.99, 1)
        findings.sizes = {"shorter side": np.quantile(shorter, shares).round().tolist(),
                          "width / height": np.quantile(aspect, shares).round(2).tolist()}  # fmt: skip
        findings.sides = shorter.tolist()
    find_copies(findings, facts, read)
    predictor = load_predictor(arguments) if arguments.model else None
    if predictor is not None and read:
        options = (arguments.image_column, arguments.max_image_pixels, arguments.batch_size)
        images = embed_rows(predictor, rows, read, *options)
        findings.misfits = misfits(predictor, images, read, captions, arguments.batch_size)
        findings.alike_to_model = alike_to_model(findings, images, read)
    if eval_rows is not None:
        findings.eval_rows = len(eval_rows)
        theirs = survey(eval_rows, arguments.image_column, arguments.max_image_pixels, processes, "Evaluation")
        findings.leaks = leaks_between(facts, theirs)
        findings.eval_unreadable, findings.eval_examples = by_cause([each.cause for each in theirs], theirs)
        tried = arguments.eval_image_root or arguments.image_root
        findings.advice_for_eval_paths = advice_for(theirs, "--eval_image_root", tried)
    findings.captions = caption_facts(captions, lengths_of(captions, arguments), arguments.max_length)
    side = int(np.median(findings.sides)) if findings.sides else 0
    findings.advice = advise(arguments, findings.usable, side, findings.captions, torch.accelerator.is_available())
    if arguments.measure and findings.usable > 1:
        print("Measuring how fast this machine trains with the suggested options, which can take half a minute.")
        try:
            findings.advice.measured = measure(findings.advice, findings.usable, threads=arguments.num_threads)
        except (UserError, OSError, RuntimeError) as error:
            findings.advice.measured = f"The speed was not measured: {brief(error)[:200]}"
    return findings


def by_cause(causes: list[str | None], facts: list[PictureFacts]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The rows with each cause for which they cannot be used, and an example of each cause.

    Args:
        causes: the cause of each row; None if it can be used.
        facts: the facts of each row.
    """
    numbers: dict[str, list[int]] = {}
    for number, cause in enumerate(causes):
        if cause:
            numbers.setdefault(cause, []).append(number)
    return numbers, {cause: facts[found[0]].example for cause, found in numbers.items()}


def find_copies(findings: Findings, facts: list[PictureFacts], read: list[int]) -> None:
    """Fill in `copies` and `alike`."""
    findings.copies = [
        [read[index] for index in group] for group in groups_of(identical([facts[number].digest for number in read]))
    ]
    spare = {number for group in findings.copies for number in group[1:]}
    kept = [number for number in read if number not in spare]
    if len(kept) > 1:
        pairs = similar(np.stack([facts[number].small for number in kept]))
        findings.alike = [[kept[index] for index in group] for group in groups_of(pairs)]


def alike_to_model(findings: Findings, images: Tensor, read: list[int]) -> list[tuple[int, int, float]]:
    """Pairs of pictures whose embeddings (P, E) or (P, Q, E) are nearly equal, and which are not copies."""
    images = images if images.ndim == 2 else images.mean(dim=1)
    images = torch.nn.functional.normalize(images, dim=-1)
    known = {
        tuple(sorted(pair)) for group in findings.copies + findings.alike for pair in itertools.combinations(group, 2)
    }
    found: list[tuple[int, int, float]] = []
    for first in range(0, len(images), 1000):
        cosines = images[first : first + 1000] @ images[first:].T
        for one, other in (cosines >= ALIKE).nonzero().tolist():
            pair = (read[first + one], read[first + other])
            if one < other and pair not in known:
                found.append((*pair, round(cosines[one, other].item(), 4)))
    return sorted(found, key=lambda each: -each[2])[:MOST_ALIKE]


def leaks_between(own: list[PictureFacts], theirs: list[PictureFacts]) -> list[tuple[int, int, bool]]:
    """The rows to evaluate on whose picture is also trained on: (row to train on, row to evaluate on, identical)."""
    found: dict[int, tuple[int, int, bool]] = {}
    first: dict[bytes, int] = {}
    for number, each in enumerate(own):
        if each.digest:
            first.setdefault(each.digest, number)
    for number, each in enumerate(theirs):
        if each.cause is None and each.digest in first:
            found[number] = (first[each.digest], number, True)
    mine = [number for number, each in enumerate(own) if each.cause is None]
    others = [number for number, each in enumerate(theirs) if each.cause is None and number not in found]
    if mine and others:
        both = [own[number] for number in mine] + [theirs[number] for number in others]
        for one, other in similar(np.stack([each.small for each in both])):
            if one < len(mine) <= other:
                found.setdefault(others[other - len(mine)], (mine[one], others[other - len(mine)], False))
    return [found[number] for number in sorted(found)]


def load_predictor(arguments: CheckArguments) -> Predictor:
    """The model that --model names."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return load(arguments.model, "embed", device)


def lengths_of(captions: list[list[str]], arguments: CheckArguments) -> dict[str, int]:
    """The number of tokens of each distinct caption."""
    texts = list(dict.fromkeys(text for own in captions for text in own))
    if not texts:
        return {}
    name = arguments.tokenizer_name or arguments.model
    if name:
        tokenizer = load_auto_tokenizer(name, "--tokenizer_name" if arguments.tokenizer_name else "--model")
    else:
        tokenizer = VlpClipTokenizer.train(texts[:200_000], arguments.vocab_size, 10_000)
    found = {}
    for first in range(0, len(texts), 10_000):
        part = texts[first : first + 10_000]
        found |= dict(zip(part, map(len, tokenizer(part, truncation=False)["input_ids"]), strict=True))
    return found
