"""Render the model card from the stored facts of a run and its evaluations."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from ..architectures import Card, architecture
from ..configuration.blip import VlpBlipConfig
from ..configuration.blip2 import VlpBlip2Config
from ..configuration.clip import VlpClipConfig
from ..configuration.towers import VlpTextTowerConfig, VlpVisionTowerConfig
from ..configuration.vision import VlpModifiedResNetConfig
from ..errors import ArgumentError, printable
from ..loading import read_config
from ..processing.blip2 import QUESTION
from .plots import plot_examples, plot_history, plot_metrics

TEMPLATE = Path(__file__).with_name("template.md")
RESULTS = "results.json"
PREDICTIONS = ".predictions.json"  # the end of the names of files with what a model generated in an evaluation

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.csv)(?<!\.tsv)(?<!\.json)(?<!\.jsonl)(?<!\.tar)")

METRIC_NAMES = {
    "zero_shot_top1": "Zero-shot top-1 accuracy",
    "zero_shot_top5": "Zero-shot top-5 accuracy",
    "zero_shot_mean_per_class": "Zero-shot accuracy, mean over classes",
    "linear_probe_top1": "Linear probe, top-1 accuracy",
    "linear_probe_top5": "Linear probe, top-5 accuracy",
    "linear_probe_mean_per_class": "Linear probe, accuracy, mean over classes",
    "few_shot_top1_1": "Linear probe with 1 picture per class, top-1 accuracy",
    "few_shot_top1_2": "Linear probe with 2 pictures per class, top-1 accuracy",
    "few_shot_top1_4": "Linear probe with 4 pictures per class, top-1 accuracy",
    "few_shot_top1_8": "Linear probe with 8 pictures per class, top-1 accuracy",
    "few_shot_top1_16": "Linear probe with 16 pictures per class, top-1 accuracy",
    "text_to_image_recall_at_1": "Text to image, R@1",
    "text_to_image_recall_at_5": "Text to image, R@5",
    "text_to_image_recall_at_10": "Text to image, R@10",
    "image_to_text_recall_at_1": "Image to text, R@1",
    "image_to_text_recall_at_5": "Image to text, R@5",
    "image_to_text_recall_at_10": "Image to text, R@10",
    "reranked_text_to_image_recall_at_1": "Text to image, R@1, re-ranked by ITM",
    "reranked_text_to_image_recall_at_5": "Text to image, R@5, re-ranked by ITM",
    "reranked_text_to_image_recall_at_10": "Text to image, R@10, re-ranked by ITM",
    "reranked_image_to_text_recall_at_1": "Image to text, R@1, re-ranked by ITM",
    "reranked_image_to_text_recall_at_5": "Image to text, R@5, re-ranked by ITM",
    "reranked_image_to_text_recall_at_10": "Image to text, R@10, re-ranked by ITM",
    "reranked_lm_text_to_image_recall_at_1": "Text to image, R@1, re-ranked by captioning",
    "reranked_lm_text_to_image_recall_at_5": "Text to image, R@5, re-ranked by captioning",
    "reranked_lm_text_to_image_recall_at_10": "Text to image, R@10, re-ranked by captioning",
    "reranked_lm_image_to_text_recall_at_1": "Image to text, R@1, re-ranked by captioning",
    "reranked_lm_image_to_text_recall_at_5": "Image to text, R@5, re-ranked by captioning",
    "reranked_lm_image_to_text_recall_at_10": "Image to text, R@10, re-ranked by captioning",
    "itm_accuracy": "ITM accuracy on pairs and hardest wrong captions",
    "itm_accuracy_matched": "ITM accuracy on pairs",
    "itm_accuracy_unmatched": "ITM accuracy on hardest wrong captions",
    "vqa_accuracy": "VQA accuracy, answers generated",
    "vqa_accuracy_ranked": "VQA accuracy, answers ranked",
    "nlvr_accuracy": "NLVR accuracy",
    "composition_accuracy": "Composition: true caption above false one, by similarity",
    "composition_accuracy_itm": "Composition: true caption above false one, by ITM",
    "caption_exact": "Captions, exact matches",
    "bleu_1": "Captions, BLEU-1",
    "bleu_2": "Captions, BLEU-2",
    "bleu_3": "Captions, BLEU-3",
    "bleu_4": "Captions, BLEU-4",
    "rouge_l": "Captions, ROUGE-L",
    "cider": "Captions, CIDEr",
}


def metric_name(name: str) -> str:
    """The display name of a metric. METRIC@COLUMN was measured on a further column."""
    metric, _, column = name.partition("@")
    return METRIC_NAMES.get(metric, plain(metric)) + (f" ({code(column)})" if column else "")


def usage(name: str, folder: str, prompt: str = "", adapters: bool = False) -> str:
    """Python code that uses a model.

    Args:
        name: name of the model class.
        folder: folder or hub name of the model.
        prompt: prompt for captions.
        adapters: whether the folder has adapters for a base model in another folder, which are merged before use.
    """
    if adapters:
        command = printable(f"vlp convert {shlex.quote(folder)} merged")
        return f"# First merge the adapters with their base model: {command}\n" + usage(name, "merged", prompt)
    # As between the quotes of a Python string: JSON's codes for quotes, line breaks and the like are Python's too.
    folder, prompt = (json.dumps(text, ensure_ascii=not text.isprintable())[1:-1] for text in (folder, prompt))
    return architecture(name).card.usage.format(folder=folder, prompt=prompt.strip() or "a picture of")


def plain(text: object) -> str:
    """A caption, name or option for Markdown: it is shown as it is, and cannot act as HTML, a link or a heading."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", printable(text)).replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`\[\]|])", r"\\\1", text)


def code(text: object) -> str:
    """A name as a code span."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"


def in_its_language(lines: str, language: str) -> str:
    """Translate the example texts in usage code if the language is "vi"."""
    if language != "vi":
        return lines
    lines = lines.replace(
        '["a cat", "a dog", "a rocket"])', '["con mèo", "con chó", "tên lửa"], hypothesis_template="{}")'
    )
    return lines.replace('["a cat", "a dog", "a rocket"]', '["con mèo", "con chó", "tên lửa"]')


def task_of(metric: str) -> tuple[str, str, str]:
    """The Hub's task type of a metric, the name of the task, and the metric type."""
    if metric.startswith(("linear_probe", "few_shot")):
        return "image-classification", "Image classification by a linear probe", "accuracy"
    if metric.startswith("zero_shot"):
        return "zero-shot-image-classification", "Zero-shot image classification", "accuracy"
    captioning = {"caption_exact": "exact_match", "rouge_l": "rouge", "cider": "cider"}
    if metric.startswith("bleu") or metric in captioning:
        return "image-to-text", "Image captioning", captioning.get(metric, "bleu")
    if metric.startswith(("vqa", "nlvr")):
        return "visual-question-answering", "Visual question answering and reasoning", "accuracy"
    if metric.startswith("itm"):
        return "zero-shot-image-classification", "Image-text matching", "accuracy"
    return "zero-shot-image-classification", "Image-text retrieval", "recall"


def shown(metric: str, value: float) -> str:
    """Format a metric as papers report it: in per cent; CIDEr times 100."""
    return f"{100 * value:.2f}" if metric == "cider" else f"{100 * value:.2f} %"


def reranking(arguments: dict) -> str:
    """How an evaluation re-ranked, for its description."""
    if arguments["task"] != "retrieval" or not arguments.get("rerank_top_k"):
        return ""
    names = arguments.get("rerank_by", "matching").split(",")
    itm = "ITM (ITC probability times ITM odds)" if arguments.get("rerank_posterior") else "ITM (cosine plus ITM logit)"
    how = [text for name, text in (("matching", itm), ("captioning", "captioning")) if name in names]
    return f", the best {plain(arguments['rerank_top_k'])} candidates of each query re-ranked by {' and by '.join(how)}"


def evaluation_table(results: dict) -> str:
    """Render the results of an evaluation as Markdown: a sentence about the data, and a table of metrics.

    Args:
        results: the stored results of `training.evaluation.results.results_of`.
    """
    arguments, classes = results["arguments"], results["classes"]
    zero_shot, captioning = arguments["task"] == "zero-shot", arguments["task"] == "captioning"
    short = arguments.get("embedding_size")
    has_classes = arguments["task"] in ("zero-shot", "linear-probe", "few-shot")
    column = arguments["class_column"] if has_classes else arguments["caption_column"]
    pictures = results.get("pictures", results["rows"])
    rows = "" if pictures == results["rows"] else f" ({results['rows']:,} rows)"
    lines = [
        f"Task {arguments['task']} on {pictures:,} pictures{rows} of {plain(arguments['dataset'])}, "
        + split_name(arguments)
        + (f", column {code(column)}" if column else "")
        + (f", {classes:,} classes" if classes else "")
        + (f", templates {code(arguments['templates'])}" if zero_shot else "")
        + (f", first {arguments['embedding_size']} dimensions of the embeddings" if short else "")
        + (f", prompt {code(arguments['prompt'])}" if captioning and arguments.get("prompt") else "")
        + reranking(arguments)
        + ".",
        "",
        "| metric | value | 95 % interval |",
        "| --- | --- | --- |",
    ]
    for name, value in results["metrics"].items():
        bounds = results["intervals"].get(name)
        interval = f"{shown(name, bounds[0])} – {shown(name, bounds[1])}" if bounds else ""
        lines.append(f"| {metric_name(name)} | {shown(name, value)} | {interval} |")
    return "\n".join(lines) + "\n"


def split_name(arguments: dict) -> str:
    """Describe the split, or the rows that were held out."""
    split = arguments["split"]
    if split.endswith("%"):
        return f"a random {plain(split)} of the pictures"
    return f"rows with {plain(split)}" if "=" in split else f"split {code(split)}"


def failures(evaluations: list[dict]) -> list[str]:
    """Describe known failures: accuracy of each group, and the most confused classes of zero-shot classification."""
    lines = []
    for results in evaluations:
        groups = results.get("groups") or {}
        for metric in [name for name in next(iter(groups.values()), {}) if name != "rows"]:
            worst_first = sorted(groups.items(), key=lambda item: item[1][metric])
            accuracies = ", ".join(
                f"{plain(name)} {100 * each[metric]:.0f} % (of {each['rows']})" for name, each in worst_first
            )
            column = results["arguments"]["class_column"] or results["arguments"]["caption_column"]
            group = results["arguments"]["group_column"]
            lines.append(f"{metric_name(metric)} ({code(column)}) by {plain(group)}: {accuracies}.")
        pairs = [
            f"“{plain(right)}” for “{plain(predicted)}”" for right, predicted, _ in results.get("most_confused", [])[:8]
        ]
        if pairs:
            lines.append(f"It mistakes, for example, {', '.join(pairs)}.")
    return lines


# Facts about the embedded data. For other data, they come from the options.
KNOWN_DATA = {
    "emoji": {
        "title": "Emoji captions, five designs",
        "license": "Noto (Apache-2.0), OpenMoji (CC BY-SA 4.0), Fluent Emoji (MIT); names from Unicode CLDR "
        "(Unicode licence); evaluation on Twemoji (CC BY 4.0)",
        "weights": (
            "cc-by-sa-4.0",
            "CC BY-SA 4.0, because the licence of OpenMoji, a part of the training data, is share-alike. "
            "The pictures in this card are from Twemoji (CC BY 4.0)",
        ),
        "limits": "It was trained only on drawings of emoji, 64 pixels wide, on white. It is not suitable for "
        "photographs, text or scenes. Emoji show people in few ways; do not use it to judge people.",
    },
    "scenes": {
        "title": "Scenes, pictures of a few objects drawn by a program",
        "license": "drawn by vlp (Apache-2.0)",
        "weights": ("apache-2.0", "Apache-2.0"),
        "limits": "It was trained only on drawings of two or three objects, of 7 shapes and 7 colours, and knows no "
        "other words. It shows what the method learns; it is not suitable for photographs.",
    },
}


def known_data(name: str) -> dict:
    """The facts about a data set; empty if it is not an included one. `scenes:5000` is `scenes`."""
    return KNOWN_DATA.get(name.partition(":")[0], {})


def write_card(folder: Path, results: dict, examples: list[dict], config: PreTrainedConfig | None = None) -> None:
    """Write README.md, its pictures and results.json into a folder.

    Args:
        folder: a folder with a saved model and its `evaluations`.
        results: the facts of the run, from `training.publish.collect_results`.
        examples: dicts with "image", "label" and "predictions", a list of (text, probability or None, whether it is
            right).
        config: the configuration of the model; None to read it from the folder.
    """
    results = results | {"examples": [{k: v for k, v in example.items() if k != "image"} for example in examples]}
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    if results["history"]:
        plot_history(results["history"], results["losses"], folder / "loss.png")
    if len(results["evaluations"]) > 1:
        plot_metrics(results["evaluations"], metric_name, folder / "metrics.png")
    if examples:
        plot_examples(examples, folder / "examples.png")
    render_card(folder, config).save(folder / "README.md")


def render_card(folder: Path, config: PreTrainedConfig | None = None) -> ModelCard:
    """Render the card of a folder from its results.json, config.json and evaluations.

    Args:
        folder: the folder of a published model.
        config: the configuration of the model; None to read it from the folder.

    Returns:
        The card.
    """
    results = read_json(folder / RESULTS)
    config, arguments, evaluations = config or read_config(folder), results["arguments"], folder / "evaluations"
    name = config.architectures[0]
    kind = architecture(name).card
    paths = [path for path in sorted(evaluations.glob("*.json")) if not path.name.endswith(PREDICTIONS)]
    found = [read_json(path) for path in paths]
    data = known_data(arguments["dataset_name"])
    bases = results.get("base_models") or []
    chosen = arguments.get("license")  # which earlier runs did not have
    weights_license, weights = (chosen, plain(chosen)) if chosen else data.get("weights") or licence_from(bases)
    title = data.get("title") or plain(data_name(arguments["dataset_name"]))
    # The metadata has one value for each metric, that of whole embeddings.
    whole = [each for each in found if not each["arguments"].get("embedding_size")]
    metrics = [eval_result(each, metric, value) for each in whole for metric, value in each["metrics"].items()]
    card_data = ModelCardData(
        language=arguments["language"].split(",") if "," in arguments["language"] else arguments["language"],
        license=weights_license,
        base_model=[base["name"] for base in bases if not base.get("local", "/" not in base["name"])] or None,
        library_name="transformers",
        pipeline_tag=kind.pipeline_tag,
        tags=["vlp", kind.tag],
        datasets=[arguments["dataset_name"]] if data_name(arguments["dataset_name"]).count("/") else None,
        model_name=printable(name_of(arguments)),
        eval_results=metrics or None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=plain(name_of(arguments)),
        kind=dataclasses.replace(kind, text=kind_of(kind, config), examples=examples_of(kind, arguments)),
        usage=in_its_language(
            usage(
                name,
                arguments["hub_model_id"] or arguments["output_dir"],
                prompt_for_use(arguments),
                has_local_base(arguments),
            ),  # fmt: skip
            arguments["language"],
        ),
        architecture=describe_architecture(config),
        data_title=title,
        weights=weights,
        failures=failures(found),
        data_license=plain(arguments["data_license"]) if arguments["data_license"] else data.get("license"),
        limits=data.get("limits"),
        unseen=unseen_part(arguments),
        seen=seen_parts(arguments, found),
        options={k: plain(v) for k, v in arguments.items() if k in results["shown_options"] and (v or k == "seed")},
        evaluations=[evaluation_table(each) for each in found],
        confusions=[f"evaluations/{quote(path.name)}" for path in sorted(evaluations.glob("*.png"))],
        pictures=[(name, text) for name, text in PICTURES.items() if (folder / name).exists()],
        has_loss=(folder / "loss.png").exists(),
        has_metrics=(folder / "metrics.png").exists(),
        has_examples=(folder / "examples.png").exists(),
        results=results,
    )


def unseen_part(arguments: dict) -> str:
    """The part of the data that a run kept for its evaluation."""
    held_out, other = arguments["hold_out"], arguments.get("eval_dataset_name")
    part = f"the rows {plain(held_out)}" if held_out else f"the split {code(arguments['eval_split'])}"
    if held_out and "=" not in held_out:
        part = f"a random {plain(held_out)} of the pictures"
    return f"{part} of {plain(data_name(other))}" if other else part


def seen_parts(arguments: dict, evaluations: list[dict]) -> str:
    """What a model was trained on, of the data that it was evaluated on.

    Args:
        arguments: the options of the run.
        evaluations: the results of evaluations.
    """
    data, split = arguments["dataset_name"], arguments.get("train_split") or "train"
    evaluated = {(each["arguments"]["dataset"], each["arguments"]["split"]) for each in evaluations}
    if not arguments["hold_out"] and (data, split) in evaluated:
        return (
            f"The model was trained on the split {code(split)} of {plain(data_name(data))}: its figures there say "
            "little about other pictures."
        )
    if not arguments["hold_out"] and not arguments["eval_split"]:
        return "The run kept no data for its evaluation: whether the model was trained on the data below is not known."
    return f"The model was not trained on {unseen_part(arguments)}."


def read_json(path: Path) -> dict:
    """Read the results of a run or an evaluation. Raises ArgumentError if the file holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["arguments"], dict) or not isinstance(content["metrics"], dict):
            raise TypeError("arguments and metrics must be objects")
        return content
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = printable(repr(error), 100)
        raise ArgumentError(f"{printable(path, 200)} does not hold results of vlp ({reason}): move it away.") from error


def licence_from(bases: list[dict]) -> tuple[str | None, str]:
    """The licence of weights, from those of the models that training started from.

    Args:
        bases: the models, as dicts with "name" and "license", which is None if it is not known.

    Returns:
        The identifier of the licence for the hub, None if there is none, and a sentence part for the card.
    """
    if not bases:
        return None, "no licence was chosen: all rights are reserved"
    licences = {base["license"] for base in bases}
    names = ", ".join(plain(base["name"]) for base in bases)
    if len(licences) == 1 and None not in licences:
        licence = licences.pop()
        return licence, f"{plain(licence)}, as of {names}, from which training started"
    known = ", ".join(f"{plain(base['name'])} ({plain(base['license'] or 'unknown')})" for base in bases)
    return "other", f"the licences of the models from which training started apply: {known}"


def prompt_for_use(arguments: dict) -> str:
    """The prompt of a run, for a line of code that uses its model: its common prompt, or that of a question."""
    return QUESTION.format("what is it?") if arguments.get("prompt_column") else arguments.get("prompt", "")


def kind_of(kind: Card, config: PreTrainedConfig) -> str:
    """What the model is."""
    if getattr(config, "logit_bias_init_value", None) is None:
        return kind.text
    return kind.text.replace("A CLIP model", "A SigLIP, a CLIP whose scores are independent sigmoids")


def examples_of(kind: Card, arguments: dict) -> str:
    """The legend of the figure with examples: those of a model of questions are questions with their answers."""
    if arguments.get("prompt_column"):
        return architecture("VlpBlipForQuestionAnswering").card.examples
    return kind.examples.format(prompts=after_prompts(arguments))


def after_prompts(arguments: dict) -> str:
    """The prompts of the captions in the figure with examples, as words for its legend; empty if there are none."""
    prompts = (arguments.get("example_prompts") or arguments.get("prompt") or "").split("|")
    return f" after {' and '.join(f'“{plain(prompt.strip())}”' for prompt in prompts)}" if any(prompts) else ""


def has_local_base(arguments: dict) -> bool:
    """Whether a run trained adapters for a model in another folder, rather than on the hub."""
    return bool(arguments.get("lora_rank")) and not HUB_NAME.fullmatch(str(arguments.get("model_name_or_path")))


PICTURES = {
    "retrieval.png": "Pictures retrieved for a text, from data not used in training. Correct ones have a green frame.",
    "attention.png": "Cross-attention (mean over layers and heads) for each word of the generated caption.",
    "matching.png": "Image regions that support each word of the caption: Grad-CAM of the matching head (ITM).",
}


def eval_result(results: dict, metric: str, value: float) -> EvalResult:
    """Describe a metric for the metadata of the card.

    Args:
        results: the stored results of an evaluation.
        metric: name of the metric.
        value: its value.
    """
    arguments = results["arguments"]
    task_type, task_name, metric_type = task_of(metric)
    column = arguments["class_column"] or arguments["caption_column"]
    return EvalResult(
        task_type=task_type,
        task_name=task_name,
        dataset_type=arguments["dataset"],
        dataset_name=known_data(arguments["dataset"]).get("title", arguments["dataset"]),
        dataset_config=None if column == "caption" else column,
        dataset_split=arguments["split"],
        metric_type=metric_type,
        metric_name=metric_name(metric),
        metric_value=round(value, 4),
    )


def data_name(name: str) -> str:
    """The name of a data set for publishing: a hub name, or the last part of a path."""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else Path(name).name


def name_of(arguments: dict) -> str:
    """The name of the model: the last part of its hub name or folder."""
    return (arguments["hub_model_id"] or arguments["output_dir"]).rstrip("/").split("/")[-1]


def layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def describe_architecture(config: PreTrainedConfig) -> list[tuple[str, str]]:
    """Describe the parts of a model as (part, description) rows."""
    vision = config.vision_config
    if isinstance(vision, VlpModifiedResNetConfig):
        tower = f"ModifiedResNet, {'-'.join(map(str, vision.depths))} blocks, stem {vision.embedding_size}, "
        tower += f"last stage {vision.hidden_size}, attention pooling"
    elif isinstance(vision, VlpVisionTowerConfig):
        tower = f"{kind_of_tower(vision)}, {vision.hidden_size} features, pooling: {vision.pooling}"
    else:
        tower = f"ViT, {layers(vision.num_hidden_layers)} of {vision.hidden_size}, {vision.num_attention_heads} heads, "
        tower += f"patches of {vision.patch_size} px, {vision.hidden_act}"
    patches = getattr(vision, "max_num_patches", None)
    square = f"images of {vision.image_size} x {vision.image_size} px"
    tower += f", images of any shape with at most {patches} patches" if patches else f", {square}"
    if isinstance(config, VlpBlip2Config):
        return [("Image tower", f"{tower}{', frozen' if config.freeze_vision else ''}"), *describe_qformer(config)]
    text = config.text_config
    if isinstance(text, VlpTextTowerConfig):
        words = f"{kind_of_tower(text)}, {text.hidden_size} features, pooling: {text.pooling}, "
        words += f"{text.vocab_size} tokens, at most {text.max_position_embeddings} per caption"
        return [("Image tower", tower), ("Text tower", words), shared_space(config)]
    size = f"{layers(text.num_hidden_layers)} of {text.hidden_size}, {text.num_attention_heads} heads, "
    size += f"{text.hidden_act}, {text.vocab_size} tokens, at most {text.max_position_embeddings} per caption"
    if isinstance(config, VlpBlipConfig):
        kind, width = "Mixture of encoder and decoder (MED)", config.image_text_hidden_size
    else:
        causal = not text.model_type == "vlp_siglip_text"
        kind, width = "Causal Transformer" if causal else "Bidirectional Transformer", config.projection_dim
    space = shared_space(config) if isinstance(config, VlpClipConfig) else ("Shared space", f"{width} dimensions")
    rows = [("Image tower", tower), ("Text tower", f"{kind}, {size}"), space]
    if getattr(config, "itm_pooling", "cls") == "mean":
        rows.append(("Matching (ITM)", "reads the mean over the text's states, not [Encode] alone as in the paper"))
    return rows


def kind_of_tower(config: VlpVisionTowerConfig | VlpTextTowerConfig) -> str:
    """What a tower of transformers is: its model type, or timm's name of it."""
    return getattr(config.tower, "architecture", None) or config.tower.model_type


def shared_space(config: VlpClipConfig) -> tuple[str, str]:
    """The row for the shared space of a CLIP."""
    parts = [f"{config.projection_dim} dimensions"]
    for each in ("visual", "text"):
        if hidden := getattr(config, f"{each}_projection_hidden_size"):
            parts.append(f"a hidden layer of {hidden} in the {each} projection")
    return "Shared space", ", ".join(parts)


def describe_qformer(config: VlpBlip2Config) -> list[tuple[str, str]]:
    """Describe the Q-Former, and the language model or the shared space, as (part, description) rows."""
    qformer, text = config.qformer_config, config.text_config
    size = f"{config.num_query_tokens} queries, {layers(qformer.num_hidden_layers)} of {qformer.hidden_size}, "
    size += f"{qformer.num_attention_heads} heads, cross-attention frequency {qformer.cross_attention_frequency}"
    if text is None:
        return [("Q-Former", size), ("Shared space", f"{config.image_text_hidden_size} dimensions")]
    name = config.language_model_name_or_path
    where = "in this checkpoint" if config.store_language_model or not name else data_name(name)
    model = f"{where} ({text.model_type}, {layers(text.num_hidden_layers)} of {text.hidden_size}), frozen"
    prefix = f"{config.num_query_tokens} vectors"
    if config.num_prefix_words:
        prefix = f"{config.num_query_tokens} words, chosen among {config.num_prefix_words:,} of the language model"
    if config.num_prefix_repeats > 1:
        prefix += f", read {config.num_prefix_repeats} times"
    return [("Q-Former", size), ("Prefix", prefix), ("Language model", model)]
