"""The evaluation tasks: zero-shot classification, linear probes, retrieval, matching, composition, captioning, VQA
and NLVR.

Training, the command `evaluate`, the model card and the demo share these implementations. Each task works on this
process's share of the pictures, gathers the predictions of all processes and computes the metrics from them, so the
results do not depend on the number of processes.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional as F

from ...architectures import architecture_of
from ...errors import ArgumentError, brief, printable
from ...files import usable_path
from ...inference import Predictor, VlpPredictor
from ...modeling_vlp.ranking import candidates_of, combine, matching_scores
from ...processing.prompts import CLASS_NAMES, prompts_for, read_names
from ..data.rows import answers_of, captions_of, label_of
from ..data.sources import load_rows, require_column, require_text
from . import probes
from .arguments import PROBES, RERANKERS, EvaluationArguments
from .metrics import load as load_metric
from .pictures import Pictures, find_pictures
from .scores import answer_scores, estimate, mean, preferences

# Shapes: I images, T texts, P pairs, K classes, E embedding, Q queries

DEPTH = 10  # results kept per query: enough for recall at 1, 5 and 10


@dataclass
class Outcome:
    """The results of a task.

    Attributes:
        metrics: the metrics, and their 95 % intervals under NAME_interval; accuracies and recalls are from 0 to 1.
        confusion: zero-shot: (class, predicted class) of every picture.
        groups: accuracy (under the name of the metric) and number of rows for each value of `group_column`.
        predictions: captioning, vqa, with --save_predictions: what was generated for each picture or question, in the
            format of COCO's and VQAv2's result files; ids are row numbers, from 0, where the data has no column
            image_id or question_id.
    """

    metrics: dict
    confusion: list[tuple[int, int]] = field(default_factory=list)
    groups: dict[str, dict] = field(default_factory=dict)
    predictions: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Attributes:
        use: what the model must support (see `architectures.USES`).
        run: the function that evaluates the task.
    """

    use: str
    run: Callable[[Predictor, Pictures], Outcome]


def use_of(arguments: EvaluationArguments) -> str:
    """The use that the model must support for an evaluation (see `architectures.USES`)."""
    if arguments.task == "retrieval" and arguments.rerank_top_k:
        return "rerank" if "captioning" in arguments.rerank_by.split(",") else "match"
    return TASKS[arguments.task].use


def evaluate_task(predictor: Predictor, pictures: Pictures) -> Outcome:
    """Evaluate a model on the task of `pictures.arguments`. Called by every process.

    Args:
        predictor: the model, for the use of the task.
        pictures: the data, from `prepare_data`.
    """
    return TASKS[pictures.arguments.task].run(predictor, pictures)


# --- the data ---------------------------------------------------------------------------------------------------------


def prepare_data(
    table: datasets.Dataset, arguments: EvaluationArguments, state: PartialState, answers: list[str] | None = None
) -> Pictures:
    """Check that the table has the columns that the task needs, and find its usable pictures.

    Args:
        table: rows with undecoded images.
        arguments: the options of the evaluation.
        state: the process state of accelerate.
        answers: vqa: candidate answers to rank; None: those of the file `answer_list`.

    Returns:
        The usable pictures, the same in every process.

    Raises:
        ArgumentError: if a column is missing or has the wrong type, or no row is usable.
    """
    data = arguments.dataset
    if arguments.group_column:
        require_column(table, arguments.group_column, data, "--group_column")
    if arguments.task == "zero-shot":
        labels, names = labels_of(table, arguments)
        return find_pictures(table, arguments, state, labels, names)
    if arguments.task in PROBES:
        return prepare_probe(table, arguments, state)
    for column in arguments.caption_column.split(","):
        require_text(table, column, data, "--caption_column")
    if arguments.task == "vqa":
        require_text(table, arguments.answer_column, data, "--answer_column")
    if arguments.task == "composition":
        require_text(table, arguments.wrong_column, data, "--wrong_column")
    if arguments.task == "nlvr":
        require_column(table, arguments.second_image_column, data, "--second_image_column")
        require_column(table, arguments.label_column, data, "--label_column")
    pictures = find_pictures(table, arguments, state)
    pictures.answers = answer_list(arguments) if answers is None else answers
    return pictures


def load_table(arguments: EvaluationArguments, split: str, option: str = "--dataset") -> datasets.Dataset:
    """Load a split of the data to evaluate on, with undecoded images; `option` names it in error messages."""
    return load_rows(arguments.dataset, split, arguments.image_column, arguments.image_root,
                     arguments.dataset_config_name, option, arguments.second_image_column,
                     arguments.caption_column, arguments.encoding)  # fmt: skip


def prepare_probe(table: datasets.Dataset, arguments: EvaluationArguments, state: PartialState) -> Pictures:
    """Prepare the pictures of a linear probe, and those that its classifier learns from.

    The classes are those of all splits. A class that the training split lacks cannot be predicted.

    Raises:
        ArgumentError: if a split or a column is missing.
    """
    tables = {"test": table, "train": load_table(arguments, arguments.train_split)}
    if arguments.validation_split and arguments.task == "linear-probe":
        tables["validation"] = load_table(arguments, arguments.validation_split)
    labels = {part: labels_of(each, arguments) for part, each in tables.items()}
    names = list(dict.fromkeys(name for _, known in labels.values() for name in known))
    numbers, found = {name: number for number, name in enumerate(names)}, {}
    for part, (own, known) in labels.items():
        own = [None if label is None else numbers[known[label]] for label in own]
        limited = arguments if part == "test" else dataclasses.replace(arguments, max_samples=None)
        found[part] = find_pictures(tables[part], limited, state, own, names)
    return dataclasses.replace(found["test"], train=found["train"], validation=found.get("validation"))


def answer_list(arguments: EvaluationArguments) -> list[str]:
    """The lines of the file `answer_list`, without duplicates. Raises ArgumentError if it is missing."""
    if not arguments.answer_list:
        return []
    path = usable_path(arguments.answer_list, "--answer_list")
    if not path.is_file():
        raise ArgumentError(f"--answer_list {printable(arguments.answer_list, 120)}: there is no such file.")
    return list(dict.fromkeys(names_in(path, "--answer_list")))


def names_in(path: Path, option: str) -> tuple[str, ...]:
    """The names in a file, one per line. Raises ArgumentError if it holds no text in UTF-8, or no name."""
    try:
        names = read_names(path)
    except (ValueError, OSError) as error:
        raise ArgumentError(f"{option} {printable(path, 120)} is not a text in UTF-8: {brief(error)[:100]}") from error
    if not names:
        raise ArgumentError(f"{option} {printable(path, 120)} holds no name; expected one per line.")
    return names


def labels_of(table: datasets.Dataset, arguments: EvaluationArguments) -> tuple[list[int | None], list[str]]:
    """Find the class of each row.

    Args:
        table: the rows.
        arguments: the options of the evaluation.

    Returns:
        The class index of each row, None if it has none, and the class names.

    Raises:
        ArgumentError: if the column is missing, or labels and names do not fit (see `number_labels`).
    """
    features = table.features
    labelled = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    column = arguments.class_column or (labelled or [arguments.caption_column])[0]
    require_column(table, column, arguments.dataset, "--class_column")
    values, names = table[column], getattr(features[column], "names", None)
    if arguments.class_names:
        known = CLASS_NAMES.get(arguments.class_names)
        if known is None and not usable_path(arguments.class_names, "--class_names").is_file():
            raise ArgumentError(
                f"--class_names {printable(arguments.class_names, 120)}: no such file, and not one of "
                f"{', '.join(CLASS_NAMES)}."
            )
        names = list(known or names_in(Path(arguments.class_names), "--class_names"))
    return number_labels(list(values), names, column)


def number_labels(values: list, names: list[str] | None, column: str) -> tuple[list[int | None], list[str]]:
    """Map labels to class indices.

    Args:
        values: names or numbers; None, -1 and "" mean that a row has no label.
        names: the class names; if None, the sorted distinct values, which must then be names.
        column: the column, for error messages.

    Returns:
        The class index of each value, None if it has none, and the class names.

    Raises:
        ArgumentError: if the values are neither names nor numbers, or a label has no name.
    """
    given = [value for value in values if value not in (None, -1, "")]
    if not given or not isinstance(given[0], (int, str)):
        raise ArgumentError(f"--class_column {column} must hold names or labels, not {values[0]!r}.")
    if isinstance(given[0], str):
        names = list(dict.fromkeys(names or sorted(set(given))))  # a name twice is one class
        numbers = {name: number for number, name in enumerate(names)}
        if unknown := sorted(set(given) - numbers.keys()):
            raise ArgumentError(f"--class_column {column} has {unknown[0]!r}, which is not one of --class_names.")
        return [numbers.get(value) for value in values], names
    if names is None:
        raise ArgumentError(f"--class_column {column} has numbers without names: give --class_names.")
    if not 0 <= min(given) <= max(given) < len(names):
        raise ArgumentError(
            f"--class_column {column}: labels range from {min(given)} to {max(given)}, for {len(names)} names."
        )
    # No prompt can tell classes of the same name apart, so they are one class.
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [None if value in (None, -1) else numbers[names[value]] for value in values], list(numbers)


def transposed(found: list[tuple]) -> list[list]:
    """The columns of a list of tuples."""
    return [list(column) for column in zip(*found, strict=True)]


def bootstrap(arguments: EvaluationArguments) -> dict:
    """The bootstrap options of a metric."""
    return {"resamples": arguments.resamples, "seed": arguments.seed}


# --- zero-shot classification -----------------------------------------------------------------------------------------


def zero_shot(predictor: Predictor, pictures: Pictures) -> Outcome:
    """Zero-shot classification: compare images with the prompts of the class names."""
    names, found = pictures.names, []
    classes = embed_classes(predictor, pictures)
    for batch in pictures.batches(pictures.own, "images"):
        similarity = predictor.similarity(predictor.embed_images([pictures.image(n) for n in batch]), classes)
        labels = torch.tensor([pictures.items[number].label for number in batch])
        ranked = best(similarity, labels[:, None] == torch.arange(len(names)))
        found += list(zip(batch, ranked, labels.tolist(), strict=True))
    _, ranked, labels = transposed(pictures.gather(found))
    return classified(pictures, ranked, labels, "zero_shot")


def classified(pictures: Pictures, ranked: list[list[int]], labels: list[int], name: str) -> Outcome:
    """The outcome of a classification of all pictures.

    Args:
        pictures: the data.
        ranked: the class indices for each picture, best first.
        labels: the class index of each picture.
        name: what the names of the metrics begin with.
    """
    found = load_metric("zero_shot_accuracy").compute(
        predictions=ranked, references=labels, k=[k for k in (1, 5) if k < len(pictures.names)],
        **bootstrap(pictures.arguments),
    )  # fmt: skip
    metrics = {metric.replace("zero_shot", name): value for metric, value in found.items()}
    confusion = [(label, predicted[0]) for label, predicted in zip(labels, ranked, strict=True)]
    hits = [float(label == predicted) for label, predicted in confusion]
    rows = [picture.rows[0] for picture in pictures.items]
    return Outcome(metrics, confusion, by_group(pictures, f"{name}_top1", rows, hits))


# --- linear probes ----------------------------------------------------------------------------------------------------


def features_of(predictor: Predictor, pictures: Pictures, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The features (N, D) and labels (N,) of all pictures, gathered from all processes; `text` names them."""
    found = []
    for batch in pictures.batches(pictures.own, text):
        features = predictor.image_features([pictures.image(number) for number in batch])
        found += [
            (number, pictures.items[number].label, row.numpy()) for number, row in zip(batch, features, strict=True)
        ]
    _, labels, features = transposed(pictures.gather(found))
    return np.stack(features), np.array(labels)


def linear_probe(predictor: Predictor, pictures: Pictures) -> Outcome:
    """Linear probe: logistic regression on the features of the frozen image tower (see `probes`)."""
    test, test_labels = features_of(predictor, pictures, "images")
    train, labels = features_of(predictor, pictures.train, "training images")
    if pictures.validation is not None:
        other, other_labels = features_of(predictor, pictures.validation, "validation images")
        strength = probes.choose_strength((train, labels), (other, other_labels))
        train, labels = np.concatenate([train, other]), np.concatenate([labels, other_labels])
    else:
        kept, off = probes.split_off(labels, probes.VALIDATION_SHARE, pictures.arguments.seed)
        strength = probes.choose_strength((train[kept], labels[kept]), (train[off], labels[off]))
    scores = torch.from_numpy(probes.scores_of(probes.fit(train, labels, strength), test, len(pictures.names)))
    ranked = best(scores, torch.from_numpy(test_labels)[:, None] == torch.arange(len(pictures.names)))
    return classified(pictures, ranked, test_labels.tolist(), "linear_probe")


def few_shot(predictor: Predictor, pictures: Pictures) -> Outcome:
    """Few-shot linear probe: a few random training pictures of each class, averaged over draws (see `probes`)."""
    arguments, statistics = pictures.arguments, {}
    test, test_labels = features_of(predictor, pictures, "images")
    train, labels = features_of(predictor, pictures.train, "training images")
    for shots in dict.fromkeys(int(word) for word in arguments.shots.split(",")):
        hits = np.zeros(len(test))
        for draw in range(arguments.few_shot_draws):
            chosen, others = probes.draw_shots(labels, shots, arguments.seed + draw)
            strength = probes.choose_strength((train[chosen], labels[chosen]), (train[others], labels[others]))
            classifier = probes.fit(train[chosen], labels[chosen], strength)
            hits += (classifier.predict(test) == test_labels) / arguments.few_shot_draws
        statistics[f"few_shot_top1_{shots}"] = mean(hits.tolist())
    return Outcome(estimate(statistics, len(test), **bootstrap(arguments)))


def embed_classes(predictor: Predictor, pictures: Pictures) -> Tensor:
    """Embed the classes as (K, E): the normalised mean of each class's prompts (openai/CLIP, notebooks)."""
    prompts = [text for texts in prompts_for(pictures.names, pictures.arguments.templates) for text in texts]
    embeds = torch.cat([predictor.embed_texts(batch) for batch in pictures.batches(prompts, "classes")])
    return F.normalize(embeds.view(len(pictures.names), -1, embeds.shape[-1]).mean(dim=1), dim=-1)


def by_group(pictures: Pictures, metric: str, rows: list[int], scores: list[float]) -> dict[str, dict]:
    """The mean score and the number of rows for each value of `group_column`; empty if it is not set.

    Args:
        pictures: the data.
        metric: name of the mean.
        rows: the row of each score.
        scores: from 0 to 1.
    """
    column, groups = pictures.arguments.group_column, {}
    if not column:
        return {}
    values = list(pictures.table[column])
    for row, score in zip(rows, scores, strict=True):
        groups.setdefault(str(values[row]), []).append(score)
    return {name: {metric: sum(found) / len(found), "rows": len(found)} for name, found in sorted(groups.items())}


def best(scores: Tensor, correct: Tensor) -> list[list[int]]:
    """The best targets of each query, at most DEPTH. Among equal scores, wrong targets come first.

    Args:
        scores: (Q, N).
        correct: (Q, N) bool, True for right targets.

    Returns:
        Target indices of each query, best first.
    """
    first = correct.int().argsort(dim=1, stable=True)  # wrong targets before right ones
    order = scores.gather(1, first).argsort(dim=1, descending=True, stable=True)
    return first.gather(1, order)[:, :DEPTH].tolist()


# --- retrieval and matching -------------------------------------------------------------------------------------------


@dataclass
class Embedded:
    """The similarities of all pictures and texts, gathered from all processes.

    Attributes:
        similarity: (I, T) cosines.
        owner: (T,) the index of each text's picture.
        texts: all texts.
        states: (this process's pictures, M, D) image states for matching; None if they were not requested.
    """

    similarity: Tensor
    owner: Tensor
    texts: list[str]
    states: Tensor | None = None


def embed(predictor: Predictor, pictures: Pictures, states: bool) -> Embedded:
    """Embed all pictures and texts, divided among the processes.

    Args:
        predictor: the model.
        pictures: the data.
        states: whether to keep the image states for matching.
    """
    images, texts, own_states = [], [], []
    for batch in pictures.batches(pictures.own, "images"):
        loaded = [pictures.image(number) for number in batch]
        images += zip(batch, predictor.embed_images(loaded), strict=True)
        if states:
            own_states.append(predictor.encode_images(loaded))
    for batch in pictures.batches(pictures.own_texts, "texts"):
        embeds = predictor.embed_texts([pictures.text_of(key) for key in batch])
        texts += zip(batch, embeds, strict=True)
    _, image_embeds = transposed(pictures.gather(images))
    text_keys, text_embeds = transposed(pictures.gather(texts))
    return Embedded(
        similarity=predictor.similarity(torch.stack(image_embeds), torch.stack(text_embeds)),
        owner=torch.tensor([number for number, _ in text_keys]),
        texts=[pictures.text_of(key) for key in text_keys],
        states=torch.cat(own_states) if own_states else None,
    )


def retrieval(predictor: Predictor, pictures: Pictures) -> Outcome:
    """Retrieval: recall of images for texts and of texts for images; also after re-ranking, if requested."""
    found = embed(predictor, pictures, states=pictures.arguments.rerank_top_k > 0)
    metrics = recalls(found, found.similarity, found.similarity.T, "", pictures)
    if pictures.arguments.rerank_top_k:
        for name in dict.fromkeys(pictures.arguments.rerank_by.split(",")):
            to_texts, to_images = rerank_pairs(predictor, pictures, found, name)
            metrics |= recalls(found, to_texts, to_images, RERANKERS[name], pictures)
    return Outcome(metrics)


def recalls(found: Embedded, to_texts: Tensor, to_images: Tensor, prefix: str, pictures: Pictures) -> dict:
    """Compute recalls.

    Args:
        found: the embedded data.
        to_texts: (I, T) scores of the texts for each image.
        to_images: (T, I) scores of the images for each text.
        prefix: prefix of the metrics' names.
        pictures: the data.

    Returns:
        The recalls, with intervals.
    """
    metric, result = load_metric("recall_at_k"), {}
    right = found.owner == torch.arange(len(to_texts))[:, None]  # (I, T)
    of_image = [row.nonzero()[:, 0].tolist() for row in right]
    for name, scores, correct, references, groups in (
        ("text_to_image", to_images, right.T, found.owner[:, None].tolist(), found.owner.tolist()),
        ("image_to_text", to_texts, right, of_image, list(range(len(of_image)))),
    ):
        ranked = [row for start in range(0, len(scores), 1024)
                  for row in best(scores[start : start + 1024], correct[start : start + 1024])]  # fmt: skip
        values = metric.compute(
            predictions=ranked, references=references, groups=groups, **bootstrap(pictures.arguments)
        )
        result |= {f"{prefix}{name}_{key}": value for key, value in values.items()}
    return result


def rerank_pairs(
    predictor: Predictor, pictures: Pictures, found: Embedded, name: str = "matching"
) -> tuple[Tensor, Tensor]:
    """Re-rank each query's best candidates by matching or captioning (see `modeling_vlp.ranking`).

    Each pair is matched once, in the process that has the image.

    Args:
        predictor: the model.
        pictures: the data.
        found: the embedded data, with image states.
        name: one of RERANKERS.

    Returns:
        Scores (I, T) of the texts for each image and (T, I) of the images for each text.
    """
    similarity, arguments, own = found.similarity, pictures.arguments, pictures.own
    texts, images = (candidates_of(each, arguments.rerank_top_k) for each in (similarity, similarity.T))
    pairs = (texts | images.T)[own].nonzero().tolist()  # (position among own images, text)
    posterior = name == "captioning" or arguments.rerank_posterior
    if name == "captioning":
        values = score_pairs(predictor.caption_log_probabilities, pictures, found, pairs)
    else:
        values = matching_scores(score_pairs(predictor.match, pictures, found, pairs).reshape(len(pairs), 2), posterior)
    scores = torch.zeros(similarity.shape)
    for (image, text), value in pictures.gather(
        [((own[position], text), value) for (position, text), value in zip(pairs, values.tolist(), strict=True)]
    ):
        scores[image, text] = value
    temperature = predictor.temperature if posterior else None
    return (
        combine(similarity, texts, scores, temperature),
        combine(similarity.T, images, scores.T, temperature),
    )


def score_pairs(score: Callable, pictures: Pictures, found: Embedded, pairs: list) -> Tensor:
    """Score pairs of images and texts.

    Args:
        score: `match` or `caption_log_probabilities` of a predictor.
        pictures: the data.
        found: the embedded data, with image states.
        pairs: (position among this process's images, index of the text) of each pair.

    Returns:
        (P, 2) logits of ITM, or (P,) log-probabilities; empty without pairs.
    """
    scores = []
    for batch in pictures.batches(pairs, "pairs"):
        images, index = torch.tensor([image for image, _ in batch]).unique(return_inverse=True)
        scores.append(score(found.states[images], index, [found.texts[number] for _, number in batch]))
    return torch.cat(scores) if scores else torch.zeros(0)


def itm(predictor: Predictor, pictures: Pictures) -> Outcome:
    """ITM: classify every pair, and every picture with its hardest wrong text, which is the most similar one."""
    found, own = embed(predictor, pictures, states=True), pictures.own
    right = found.owner == torch.arange(len(found.similarity))[:, None]  # (I, T)
    hardest = found.similarity.masked_fill(right, float("-inf")).argmax(dim=1)
    pairs = []
    for position, image in enumerate(own):
        pairs += [(position, text, 1) for text in right[image].nonzero()[:, 0].tolist()]
        if not right[image].all():
            pairs.append((position, int(hardest[image]), 0))
    logits = score_pairs(predictor.match, pictures, found, [pair[:2] for pair in pairs]).reshape(len(pairs), 2)
    predicted = [
        ((own[position], text), prediction, label)
        for (position, text, label), prediction in zip(pairs, logits.argmax(dim=1).tolist(), strict=True)
    ]
    keys, predictions, labels = transposed(pictures.gather(predicted))
    return Outcome(
        load_metric("itm_accuracy").compute(
            predictions=predictions, references=labels, groups=[image for image, _ in keys],
            **bootstrap(pictures.arguments),
        )
    )  # fmt: skip


def composition(predictor: Predictor, pictures: Pictures) -> Outcome:
    """Composition: whether the true caption of a picture fits it better than a false one, by similarity and by ITM.

    The first caption of each row is compared with the first text of `wrong_column`.
    """
    arguments, found = pictures.arguments, []
    matches = isinstance(predictor, VlpPredictor) and "match" in architecture_of(predictor.model).uses
    for batch in pictures.batches(pictures.own_texts, "captions"):
        rows = [pictures.table[pictures.row_of(key)] for key in batch]
        images = [pictures.image(number) for number, _ in batch]
        texts = [text for key, row in zip(batch, rows, strict=True)
                 for text in (pictures.text_of(key), captions_of(row, arguments.wrong_column)[0])]  # fmt: skip
        similarity = predictor.similarity(predictor.embed_images(images), predictor.embed_texts(texts))  # (B, 2 B)
        index = torch.arange(len(texts))
        scores = [similarity[index // 2, index].view(-1, 2)]
        if matches:
            logits = predictor.match(predictor.encode_images(images), index // 2, texts)
            scores.append((logits[:, 1] - logits[:, 0]).view(-1, 2))
        found += zip(batch, torch.stack(scores, dim=1).tolist(), strict=True)
    keys, scores = transposed(pictures.gather(found))
    metric, metrics, groups = load_metric("composition_accuracy"), {}, {}
    for number, suffix in enumerate(("", "_itm")[: len(scores[0])]):
        true, false = transposed([each[number] for each in scores])
        values = metric.compute(predictions=true, references=false, groups=[image for image, _ in keys],
                                **bootstrap(arguments))  # fmt: skip
        metrics |= {name.replace("accuracy", f"accuracy{suffix}"): value for name, value in values.items()}
        hits, rows = preferences(true, false), [pictures.row_of(key) for key in keys]
        for group, values in by_group(pictures, f"composition_accuracy{suffix}", rows, hits).items():
            groups.setdefault(group, {}).update(values)
    return Outcome(metrics, groups=groups)


# --- generation -------------------------------------------------------------------------------------------------------


def captioning(predictor: Predictor, pictures: Pictures) -> Outcome:
    """Captioning: score generated captions against all captions of each picture."""
    arguments, found = pictures.arguments, []
    for batch in pictures.batches(pictures.own, "captions"):
        captions = predictor.caption([pictures.image(number) for number in batch], arguments.prompt or "",
                                     num_beams=arguments.num_beams, max_length=arguments.max_length)  # fmt: skip
        found += zip(batch, captions, strict=True)
    numbers, captions = transposed(pictures.gather(found))
    references = [pictures.items[number].texts for number in numbers]
    ids = ids_of(pictures, "image_id", [pictures.items[number].rows[0] for number in numbers])
    return Outcome(
        load_metric("caption_scores").compute(predictions=captions, references=references, **bootstrap(arguments)),
        predictions=[{"image_id": key, "caption": text} for key, text in zip(ids, captions, strict=True)],
    )


def ids_of(pictures: Pictures, column: str, rows: list[int]) -> list:
    """The ids of rows, for their predictions: those of a column, as numbers if they are, or the row numbers."""
    if not pictures.arguments.save_predictions:
        return [None] * len(rows)
    if column not in pictures.table.column_names:
        return rows
    values = list(pictures.table[column])
    return [int(each) if str(each).isdecimal() and str(int(each)) == str(each) else each
            for each in (values[row] for row in rows)]  # fmt: skip


def vqa(predictor: Predictor, pictures: Pictures) -> Outcome:
    """VQA: accuracy of generated answers and, if there are candidates, of the best-ranked candidate."""
    arguments, found = pictures.arguments, []
    for batch in pictures.batches(pictures.own_texts, "answers"):
        images = [pictures.image(number) for number, _ in batch]
        questions = [pictures.text_of(key) for key in batch]
        answers = predictor.answer(images, questions, num_beams=arguments.num_beams, max_length=arguments.max_length)
        ranked = answers
        if pictures.answers:
            ranked = predictor.rank_answers(images, questions, pictures.answers, arguments.answer_top_k)
        given = [answers_of(pictures.table[pictures.row_of(key)], arguments.answer_column) for key in batch]
        found += zip(batch, answers, ranked, given, strict=True)
    keys, answers, ranked, given = transposed(pictures.gather(found))
    groups, metric = [number for number, _ in keys], load_metric("vqa_accuracy")

    def score(predictions: list[str]) -> dict:
        return metric.compute(predictions=predictions, references=given, groups=groups, **bootstrap(arguments))

    metrics = score(answers)
    if pictures.answers:
        metrics |= {name.replace("accuracy", "accuracy_ranked"): value for name, value in score(ranked).items()}
    rows = [pictures.row_of(key) for key in keys]
    ids = ids_of(pictures, "question_id", rows)
    return Outcome(
        metrics,
        groups=by_group(pictures, "vqa_accuracy", rows, answer_scores(answers, given)),
        predictions=[{"question_id": key, "answer": text} for key, text in zip(ids, answers, strict=True)],
    )


def nlvr(predictor: Predictor, pictures: Pictures) -> Outcome:
    """NLVR2: accuracy of predicting whether each sentence is true of its two pictures."""
    arguments, found = pictures.arguments, []
    for batch in pictures.batches(pictures.own_texts, "pairs"):
        rows = [pictures.table[pictures.row_of(key)] for key in batch]
        left, right = transposed([pictures.pair(key) for key in batch])
        texts = [pictures.text_of(key) for key in batch]
        predictions = predictor.reason(left, right, texts).argmax(dim=1).tolist()
        found += zip(batch, predictions, [label_of(row, arguments.label_column) for row in rows], strict=True)
    keys, predictions, labels = transposed(pictures.gather(found))
    metrics = load_metric("nlvr_accuracy").compute(
        predictions=predictions, references=labels, groups=[number for number, _ in keys], **bootstrap(arguments)
    )
    hits = [float(prediction == label) for prediction, label in zip(predictions, labels, strict=True)]
    rows = [pictures.row_of(key) for key in keys]
    return Outcome(metrics, groups=by_group(pictures, "nlvr_accuracy", rows, hits))


TASKS = {
    "zero-shot": Task("embed", zero_shot),
    "linear-probe": Task("embed", linear_probe),
    "few-shot": Task("embed", few_shot),
    "retrieval": Task("embed", retrieval),
    "itm": Task("match", itm),
    "composition": Task("embed", composition),
    "captioning": Task("caption", captioning),
    "vqa": Task("answer", vqa),
    "nlvr": Task("reason", nlvr),
}
