"""The model card, rendered from the stored facts of a run; a fact that is missing drops its section."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

from ..configuration.blip import VlpBlipConfig
from ..configuration.blip2 import VlpBlip2Config
from ..configuration.vision import VlpModifiedResNetConfig
from .plots import plot_examples, plot_history, plot_metrics

TEMPLATE = Path(__file__).with_name("template.md")
RESULTS = "results.json"

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.csv)(?<!\.tsv)(?<!\.json)(?<!\.jsonl)(?<!\.tar)")

METRIC_NAMES = {
    "zero_shot_top1": "Zero-shot top-1 accuracy",
    "zero_shot_top5": "Zero-shot top-5 accuracy",
    "zero_shot_mean_per_class": "Zero-shot accuracy, mean over classes",
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
    "itm_accuracy": "ITM accuracy on pairs and their hardest wrong captions",
    "itm_accuracy_matched": "ITM accuracy on pairs",
    "itm_accuracy_unmatched": "ITM accuracy on images with their hardest wrong captions",
    "vqa_accuracy": "VQA accuracy",
    "vqa_accuracy_ranked": "VQA accuracy, answers ranked",
    "vqa_accuracy_generated": "VQA accuracy, answers written",
    "nlvr_accuracy": "NLVR accuracy",
    "caption_exact": "Captions that are exactly the name",
    "bleu_1": "Captions, BLEU-1",
    "bleu_2": "Captions, BLEU-2",
    "bleu_3": "Captions, BLEU-3",
    "bleu_4": "Captions, BLEU-4",
    "rouge_l": "Captions, ROUGE-L",
    "cider": "Captions, CIDEr",
}


@dataclass(frozen=True)
class Kind:
    """What a card says of every model of an architecture.

    Attributes:
        text: what it is. usage: how to use it, {folder} to be filled in. examples: what the picture of examples shows.
        pipeline_tag: the Hub's task. tag: the family, for the Hub.
    """

    text: str
    usage: str
    pipeline_tag: str
    tag: str
    examples: str = ""


def load_and_prepare(architecture: str, prepare: str, use: str) -> str:
    """Lines that load a BLIP with its processor, prepare a picture and use the model."""
    return f"""\
from PIL import Image
from vlp import {architecture}, VlpBlipProcessor

processor = VlpBlipProcessor.from_pretrained("{{folder}}")
model = {architecture}.from_pretrained("{{folder}}")
inputs = processor({prepare}, return_tensors="pt")
{use}
"""


WRITES = load_and_prepare(
    "VlpBlipForConditionalGeneration",
    'images=Image.open("picture.png")',
    "print(processor.write(model.generate(**inputs, num_beams=3)))",
)
CAPTIONS = "with their names, and below them the captions that the model writes; green where they are the same"

KINDS = {
    "VlpClipModel": Kind(
        text="A CLIP model (image tower and text tower in one embedding space)",
        usage="""\
import vlp
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{folder}")
classify("picture.png", candidate_labels=["a cat", "a dog", "a rocket"])
""",
        examples="with the model's three best names; green where the first is right",
        pipeline_tag="zero-shot-image-classification",
        tag="clip",
    ),
    "VlpBlipForPreTraining": Kind(
        text="A BLIP model (it compares images and texts, matches them, and writes captions)",
        usage=WRITES,
        examples=CAPTIONS,
        pipeline_tag="image-to-text",
        tag="blip",
    ),
    "VlpBlipForConditionalGeneration": Kind(
        text="A BLIP model that writes captions of images",
        usage=WRITES,
        examples=CAPTIONS,
        pipeline_tag="image-to-text",
        tag="blip",
    ),
    "VlpBlipForImageTextRetrieval": Kind(
        text="A BLIP model that finds images for texts and texts for images, by comparing (ITC) and matching (ITM)",
        usage=load_and_prepare(
            "VlpBlipForImageTextRetrieval",
            'images=[Image.open("picture.png")], text=["a cat", "a dog", "a rocket"]',
            "print(model(**inputs).itm_logits.softmax(dim=-1)[:, 1])  # how likely each text is the picture's",
        ),
        pipeline_tag="zero-shot-image-classification",
        tag="blip",
    ),
    "VlpBlipForQuestionAnswering": Kind(
        text="A BLIP model that answers questions about images",
        usage=load_and_prepare(
            "VlpBlipForQuestionAnswering",
            'images=Image.open("picture.png"), text="what colour is it?"',
            "print(processor.write(model.generate(**inputs, num_beams=3)))",
        ),
        examples="with a given answer, and below it the one that the model writes; green where they are the same",
        pipeline_tag="visual-question-answering",
        tag="blip",
    ),
    "VlpBlipForVisualReasoning": Kind(
        text="A BLIP model that tells whether a sentence is true of two images",
        usage=load_and_prepare(
            "VlpBlipForVisualReasoning",
            'images=[Image.open("left.png"), Image.open("right.png")], text=["both are red"]',
            """\
pair = inputs["pixel_values"][None]  # one sentence, its two images
print(model(inputs["input_ids"], pair).logits.softmax(dim=-1)[:, 1])  # how likely it is true""",
        ),
        pipeline_tag="visual-question-answering",
        tag="blip",
    ),
}


FINDS = """\
from PIL import Image
from vlp import {architecture}, VlpBlipProcessor

processor = VlpBlipProcessor.from_pretrained("{{folder}}")
model = {architecture}.from_pretrained("{{folder}}")
inputs = processor(images=[Image.open("picture.png")], text=["a cat", "a dog", "a rocket"], return_tensors="pt")
print(model(**inputs).itm_logits.softmax(dim=-1)[:, 1])  # how likely each text is the picture's
"""
FOUND = "with their names, and below them the three that the model finds for them; green where they are the same"

KINDS |= {
    "VlpBlip2ForPreTraining": Kind(
        text="A BLIP-2 model after stage 1 (its Q-Former reads a frozen image tower, and compares and matches texts)",
        usage=FINDS.format(architecture="VlpBlip2ForImageTextRetrieval"),
        examples=FOUND,
        pipeline_tag="zero-shot-image-classification",
        tag="blip-2",
    ),
    "VlpBlip2ForImageTextRetrieval": Kind(
        text="A BLIP-2 model that finds images for texts and texts for images, by comparing (ITC) and matching (ITM)",
        usage=FINDS.format(architecture="VlpBlip2ForImageTextRetrieval"),
        examples=FOUND,
        pipeline_tag="zero-shot-image-classification",
        tag="blip-2",
    ),
    "VlpBlip2ForConditionalGeneration": Kind(
        text="A BLIP-2 model (a frozen language model writes about what a Q-Former reads of a frozen image tower)",
        usage="""\
from PIL import Image
from vlp import VlpBlip2ForConditionalGeneration, VlpBlip2Processor

processor = VlpBlip2Processor.from_pretrained("{folder}")
model = VlpBlip2ForConditionalGeneration.from_pretrained("{folder}")
inputs = processor(images=Image.open("picture.png"), text="{prompt}", return_tensors="pt")
print(processor.write(model.generate(**inputs, max_new_tokens=20)))
""",
        examples="with their names, and below them what the model writes{prompts}; green where they are the same",
        pipeline_tag="image-text-to-text",
        tag="blip-2",
    ),
}


def usage(architecture: str, folder: str, prompt: str = "") -> str:
    """A few lines of Python that use a model in a folder; `prompt` is what a language model's captions begin with."""
    return KINDS[architecture].usage.format(folder=folder, prompt=prompt or "a picture of")


def in_its_language(lines: str, language: str) -> str:
    """Lines of use whose texts are of the language that a model reads."""
    if language != "vi":
        return lines
    lines = lines.replace(
        '["a cat", "a dog", "a rocket"])', '["con mèo", "con chó", "tên lửa"], hypothesis_template="{}")'
    )
    return lines.replace('["a cat", "a dog", "a rocket"]', '["con mèo", "con chó", "tên lửa"]')


def task_of(metric: str) -> tuple[str, str, str]:
    """A metric's task on the Hub, that task's name, and the kind of the metric."""
    if metric.startswith("zero_shot"):
        return "zero-shot-image-classification", "Zero-shot image classification", "accuracy"
    if metric in ("caption_exact", "bleu_4", "cider"):
        kind = {"caption_exact": "exact_match", "bleu_4": "bleu", "cider": "cider"}[metric]
        return "image-to-text", "Image captioning", kind
    if metric.startswith(("vqa", "nlvr")):
        return "visual-question-answering", "Visual question answering and reasoning", "accuracy"
    return ("zero-shot-image-classification", "Image-text retrieval",
            "accuracy" if metric == "itm_accuracy" else "recall")  # fmt: skip


def shown(metric: str, value: float) -> str:
    """A metric as papers give it: in per cent, CIDEr as 100 times its value."""
    return f"{100 * value:.2f}" if metric == "cider" else f"{100 * value:.2f} %"


def evaluation_table(results: dict) -> str:
    """What `vlp.training.evaluate` found, in Markdown: a line of what was measured, and the metrics with intervals."""
    arguments = results["arguments"]
    column = arguments["class_column"] if arguments["task"] == "zero-shot" else arguments["caption_column"]
    lines = [
        f"{arguments['task']} on {results['rows']:,} rows of {arguments['dataset']}, split `{arguments['split']}`"
        + (f", column `{column}`" if column else "")
        + (f", over {results['classes']:,} names" if results["classes"] else "")
        + (f"; templates `{arguments['templates']}`" if arguments["task"] == "zero-shot" else "")
        + ".",
        "",
        "| metric | value | 95 % interval |",
        "| --- | --- | --- |",
    ]
    for name, value in results["metrics"].items():
        bounds = results["intervals"].get(name)
        interval = f"{shown(name, bounds[0])} – {shown(name, bounds[1])}" if bounds else ""
        lines.append(f"| {METRIC_NAMES[name]} | {shown(name, value)} | {interval} |")
    return "\n".join(lines) + "\n"


def failures(evaluations: list[dict]) -> list[str]:
    """What is known to go wrong, by the evaluations of zero-shot classification."""
    lines = []
    for results in evaluations:
        groups = results.get("groups") or {}
        if groups:
            worst_first = sorted(groups.items(), key=lambda item: item[1]["zero_shot_top1"])
            told = ", ".join(f"{name} {each['zero_shot_top1']:.0%} (of {each['rows']})" for name, each in worst_first)
            told = told.replace("%", " %")
            column = results["arguments"]["class_column"] or results["arguments"]["caption_column"]
            group = results["arguments"]["group_column"]
            lines.append(f"The right name (`{column}`) first, by {group}: {told}.")
        pairs = [f"“{right}” for “{said}”" for right, said, _ in results.get("most_confused", [])[:8]]
        if pairs:
            lines.append(f"Among what it takes for something else: {', '.join(pairs)}.")
    return lines


# Facts about the data that the package embeds; other data brings them through its options.
KNOWN_DATA = {
    "emoji": {
        "title": "Emoji captions, five designs",
        "license": "Noto (Apache-2.0), OpenMoji (CC BY-SA 4.0), Fluent Emoji (MIT); names from Unicode CLDR "
        "(Unicode licence); evaluation on Twemoji (CC BY 4.0)",
        "weights": (
            "cc-by-sa-4.0",
            "CC BY-SA 4.0, because OpenMoji's drawings, a part of what they are made from, ask "
            "to be shared alike. The pictures in this card are Twemoji's, CC BY 4.0",
        ),
        "limits": "It has seen drawings of emoji, 64 pixels wide on white, and nothing else: photographs, text and "
        "scenes are outside of what it knows. Emoji show people in few ways; do not use it to judge people.",
    }
}


def write_card(folder: Path, results: dict, examples: list[dict]) -> None:
    """Write README.md, its pictures and results.json into a folder that holds a saved model.

    Args:
        results: the facts that `training.run.publish` collects.
        examples: {"image", "label", "predictions": [(name, probability), ...]} each.
    """
    results = results | {"examples": [{k: v for k, v in example.items() if k != "image"} for example in examples]}
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    if results["history"]:
        plot_history(results["history"], results["losses"], folder / "loss.png")
    if len(results["evaluations"]) > 1:
        plot_metrics(results["evaluations"], METRIC_NAMES, folder / "metrics.png")
    if examples:
        plot_examples(examples, folder / "examples.png")
    render_card(folder).save(folder / "README.md")


def render_card(folder: Path) -> ModelCard:
    """The card of a folder, from its results.json and config.json alone."""
    results = json.loads((folder / RESULTS).read_text())
    config, arguments, evaluations = config_of(folder), results["arguments"], folder / "evaluations"
    architecture = config.architectures[0]
    kind = KINDS[architecture]
    found = [json.loads(path.read_text()) for path in sorted(evaluations.glob("*.json"))]
    data = KNOWN_DATA.get(arguments["dataset_name"], {})
    weights_license, weights = data.get("weights", ("apache-2.0", "Apache-2.0"))
    title = data.get("title") or data_name(arguments["dataset_name"])
    metrics = [
        EvalResult(
            task_type=task_of(name)[0],
            task_name=task_of(name)[1],
            dataset_type=data_name(arguments["eval_dataset_name"] or arguments["dataset_name"]),
            dataset_name=title,
            dataset_split=arguments["hold_out"] or arguments["eval_split"],
            metric_type=task_of(name)[2],
            metric_name=METRIC_NAMES[name],
            metric_value=round(value, 4),
        )
        for name, value in results["metrics"].items()
    ]
    card_data = ModelCardData(
        language=arguments["language"].split(",") if "," in arguments["language"] else arguments["language"],
        license=weights_license,
        library_name="transformers",
        pipeline_tag=kind.pipeline_tag,
        tags=["vlp", kind.tag],
        datasets=[arguments["dataset_name"]] if data_name(arguments["dataset_name"]).count("/") else None,
        model_name=name_of(arguments),
        eval_results=metrics or None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name_of(arguments),
        kind=dataclasses.replace(kind, examples=kind.examples.format(prompts=after_prompts(arguments))),
        usage=in_its_language(
            usage(architecture, arguments["hub_model_id"] or arguments["output_dir"], arguments.get("prompt", "")),
            arguments["language"],
        ),
        architecture=describe_architecture(config),
        metric_rows=[(METRIC_NAMES[name], shown(name, value)) for name, value in results["metrics"].items()],
        data_title=title,
        weights=weights,
        failures=failures(found),
        data_license=arguments["data_license"] or data.get("license"),
        limits=data.get("limits"),
        unseen=f"the rows {arguments['hold_out']}"
        if arguments["hold_out"]
        else f"the split `{arguments['eval_split']}`",
        options={k: v for k, v in arguments.items() if k in SHOWN_OPTIONS and (v or k == "seed")},
        evaluations=[evaluation_table(each) for each in found],
        confusions=[f"evaluations/{path.name}" for path in sorted(evaluations.glob("*.png"))],
        pictures=[(name, text) for name, text in PICTURES.items() if (folder / name).exists()],
        has_loss=(folder / "loss.png").exists(),
        has_metrics=(folder / "metrics.png").exists(),
        has_examples=(folder / "examples.png").exists(),
        results=results,
    )


def after_prompts(arguments: dict) -> str:
    """After which prompts a language model wrote the lines below the pictures of examples."""
    prompts = (arguments.get("example_prompts") or arguments.get("prompt") or "").split("|")
    return f" after {' and '.join(f'“{prompt.strip()}”' for prompt in prompts)}" if any(prompts) else ""


def config_of(folder: Path) -> PreTrainedConfig:
    """The configuration of the model in a folder, or of the base of the adapters in it."""
    adapters = folder / "adapter_config.json"
    base = json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.is_file() else folder
    return AutoConfig.from_pretrained(base)


PICTURES = {
    "retrieval.png": "What it finds for a text among pictures that training never saw; its own has a green frame.",
    "attention.png": "Where it looks (cross-attention, the mean over layers and heads) for each word that it writes.",
    "matching.png": "What of a picture speaks for each word of its caption: Grad-CAM of the matching head (ITM).",
}

SHOWN_OPTIONS = (
    "augmentation", "templates", "template_share", "tag_share", "group_captions", "per_device_train_batch_size",
    "micro_batch_size", "gradient_accumulation_steps", "loss", "exclude_duplicates", "learning_rate", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "layer_decay", "warmup_steps", "max_train_steps", "max_train_minutes",
    "max_grad_norm", "ema_decay", "momentum", "queue_size", "alpha", "alpha_epochs", "global_negatives",
    "contrastive_share", "label_smoothing", "stage", "prompt", "lora_rank",
    "lock_image_tower", "lock_text_tower", "patch_dropout", "seed",
)  # fmt: skip


def data_name(name: str) -> str:
    """A data set's name as it may be published: a hub name, or the last part of a path."""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else Path(name).name


def name_of(arguments: dict) -> str:
    return (arguments["hub_model_id"] or arguments["output_dir"]).rstrip("/").split("/")[-1]


def describe_architecture(config: PreTrainedConfig) -> list[tuple[str, str]]:
    vision = config.vision_config
    if isinstance(vision, VlpModifiedResNetConfig):
        tower = f"ModifiedResNet, {'-'.join(map(str, vision.depths))} blocks, stem {vision.embedding_size}, "
        tower += f"last stage {vision.hidden_size}, attention pooling"
    else:
        tower = f"ViT, {vision.num_hidden_layers} layers of {vision.hidden_size}, {vision.num_attention_heads} heads, "
        tower += f"patches of {vision.patch_size} px, {vision.hidden_act}"
    tower += f", images of {vision.image_size} x {vision.image_size} px"
    if isinstance(config, VlpBlip2Config):
        return [("Image tower", f"{tower}{', frozen' if config.freeze_vision else ''}"), *describe_qformer(config)]
    text = config.text_config
    size = f"{text.num_hidden_layers} layers of {text.hidden_size}, {text.num_attention_heads} heads, "
    size += f"{text.hidden_act}, {text.vocab_size} tokens, at most {text.max_position_embeddings} in a caption"
    if isinstance(config, VlpBlipConfig):
        kind, width = "Mixture of encoder and decoder (MED)", config.image_text_hidden_size
    else:
        kind, width = "causal Transformer", config.projection_dim
    return [
        ("Image tower", tower),
        ("Text tower", f"{kind}, {size}"),
        ("Shared space", f"{width} dimensions"),
    ]


def describe_qformer(config: VlpBlip2Config) -> list[tuple[str, str]]:
    qformer, text = config.qformer_config, config.text_config
    size = f"{config.num_query_tokens} queries, {qformer.num_hidden_layers} layers of {qformer.hidden_size}, "
    size += f"{qformer.num_attention_heads} heads, reading the image in every {qformer.cross_attention_frequency}."
    if text is None:
        return [("Q-Former", size), ("Shared space", f"{config.image_text_hidden_size} dimensions")]
    name = config.language_model_name_or_path
    where = "in this checkpoint" if config.store_language_model or not name else data_name(name)
    writer = f"{where} ({text.model_type}, "
    writer += f"{text.num_hidden_layers} layers of {text.hidden_size}), frozen"
    return [("Q-Former", size), ("Language model", writer)]
