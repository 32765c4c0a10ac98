"""Examples for the model card: predictions for some pictures, retrieval galleries, and heat maps."""

from pathlib import Path

import torch
from datasets.utils.py_utils import iter_batched
from PIL import Image

from ...inference import BlipPredictor, Predictor, predictor_of
from ...model_cards.plots import plot_heatmaps, plot_retrieval
from ...modeling_vlp.blip import VlpBlipForPreTraining, VlpBlipMatcher
from ...modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from ...modeling_vlp.heatmaps import attention_maps, matching_maps
from ...processing.pictures import to_rgb
from ..data.rows import answers_of, label_of
from .pictures import Pictures
from .scores import plain_answer, words
from .tasks import embed_classes, use_of

COUNT = 12  # pictures with predictions
QUERIES, RETRIEVED, MAPPED = 4, 6, 4  # queries in the gallery, images per query, images with heat maps
SEARCHED = 2000  # images that the queries are compared with

Example = dict  # {"image", "label", "predictions": [(text, probability or None, whether it is right), ...]}


def make_examples(model, processor, evaluations: list[Pictures], prompts: list[str], seed: int = 0) -> list[Example]:
    """Make predictions for some random pictures.

    Args:
        model: the model, in evaluation mode.
        processor: its processor.
        evaluations: the data of each task that the model was evaluated on.
        prompts: captioning: one caption is generated for each prompt.
        seed: seed of the choice of pictures.

    Returns:
        The examples; empty if none of the tasks has examples.
    """
    by_task = {pictures.arguments.task: pictures for pictures in reversed(evaluations)}
    for task, make in EXAMPLES.items():
        if task in by_task:
            predictor = predictor_of(model, processor, use_of(by_task[task].arguments))
            return make(predictor, by_task[task], by_task[task].draw(COUNT, seed), prompts)
    return []


def caption_examples(predictor, pictures: Pictures, chosen: list[int], prompts: list[str]) -> list[Example]:
    """The first caption of each picture, and the caption generated for each prompt."""
    images, arguments = [pictures.image(number) for number in chosen], pictures.arguments
    options = dict(num_beams=arguments.num_beams, max_length=arguments.max_length)
    captions = [predictor.caption(images, prompt, **options) for prompt in prompts]
    examples = []
    for number, image, generated in zip(chosen, images, zip(*captions, strict=True), strict=True):
        texts = pictures.items[number].texts
        references = [words(text) for text in texts]
        examples.append(example(image, texts[0], [(text, None, words(text) in references) for text in generated]))
    return examples


def answer_examples(predictor, pictures: Pictures, chosen: list[int], prompts: list[str]) -> list[Example]:
    """A question of each picture with its first human answer, and the generated answer.

    It is the first question of the first picture, the second of the second one, and so on, because questions about
    pictures often come in the same order.
    """
    images, arguments = [pictures.image(number) for number in chosen], pictures.arguments
    keys = [(number, place % len(pictures.items[number].texts)) for place, number in enumerate(chosen)]
    questions = [pictures.text_of(key) for key in keys]
    answers = predictor.answer(images, questions, num_beams=arguments.num_beams, max_length=arguments.max_length)
    examples = []
    for key, image, question, answer in zip(keys, images, questions, answers, strict=True):
        given = answers_of(pictures.table[pictures.row_of(key)], arguments.answer_column)
        right = plain_answer(answer) in [plain_answer(text) for text in given]
        examples.append(example(image, f"{question} {given[0]}", [(answer, None, right)]))
    return examples


def class_examples(predictor: Predictor, pictures: Pictures, chosen: list[int], prompts: list[str]) -> list[Example]:
    """The class of each picture, and the three most probable classes."""
    images, classes = [pictures.image(number) for number in chosen], embed_classes(predictor, pictures)
    scores = predictor.similarity(predictor.embed_images(images), classes) / predictor.temperature
    top, examples = scores.softmax(dim=1).topk(min(3, len(pictures.names))), []
    for number, image, values, indices in zip(chosen, images, top.values, top.indices, strict=True):
        label = pictures.items[number].label
        guesses = [(pictures.names[k], p, k == label) for p, k in zip(values.tolist(), indices.tolist(), strict=True)]
        examples.append(example(image, pictures.names[label], guesses))
    return examples


def match_examples(predictor, pictures: Pictures, chosen: list[int], prompts: list[str]) -> list[Example]:
    """The first text of each picture, and the three candidates by similarity that match it best (ITM)."""
    images = [pictures.image(number) for number in chosen]
    texts = [text for picture in pictures.items for text in picture.texts]
    embeds = torch.cat([predictor.embed_texts(batch) for batch in iter_batched(texts, 64)])
    similarity = predictor.similarity(predictor.embed_images(images), embeds)
    candidates = similarity.topk(min(max(3, pictures.arguments.rerank_top_k), len(texts)), dim=1)
    states, examples = predictor.encode_images(images), []
    for index, (number, image) in enumerate(zip(chosen, images, strict=True)):
        listed = [texts[k] for k in candidates.indices[index].tolist()]
        logits = predictor.match(states[index : index + 1], torch.zeros(len(listed), dtype=torch.long), listed)
        order = (candidates.values[index] + logits[:, 1]).argsort(descending=True)[:3].tolist()
        own = pictures.items[number].texts
        examples.append(example(image, own[0], [(listed[k], None, listed[k] in own) for k in order]))
    return examples


def reason_examples(predictor, pictures: Pictures, chosen: list[int], prompts: list[str]) -> list[Example]:
    """The two images side by side with the first sentence about them, and the more probable of true and false."""
    arguments, examples = pictures.arguments, []
    for number in chosen:
        key = number, 0
        pair, sentence = [to_rgb(image) for image in pictures.pair(key)], pictures.text_of(key)
        probability, predicted = predictor.reason(pair[:1], pair[1:], [sentence]).softmax(dim=1)[0].max(dim=0)
        right = predicted.item() == label_of(pictures.table[pictures.row_of(key)], arguments.label_column)
        prediction = (str(bool(predicted)).lower(), probability.item(), right)
        examples.append(example(side_by_side(*pair), sentence, [prediction]))
    return examples


def side_by_side(left: Image.Image, right: Image.Image, gap: int = 8) -> Image.Image:
    """Two pictures in one, with `gap` white pixels between them."""
    both = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + gap, 0))
    return both


EXAMPLES = {
    "captioning": caption_examples,
    "vqa": answer_examples,
    "nlvr": reason_examples,
    "zero-shot": class_examples,
    "itm": match_examples,
}


def example(image: Image.Image, label: str, predictions: list[tuple]) -> Example:
    return {"image": to_rgb(image), "label": label, "predictions": predictions}


# --- galleries and heat maps ------------------------------------------------------------------------------------------


def draw_galleries(model, processor, evaluations: list[Pictures], folder: Path, seed: int = 0) -> None:
    """Draw the galleries that the model supports: retrieval.png, matching.png and attention.png.

    Args:
        model: the model, in evaluation mode.
        processor: its processor.
        evaluations: the data of each task; nothing is drawn if none of the tasks has captions.
        folder: where the files are written.
        seed: seed of the choice of pictures.
    """
    pictures = next((each for each in evaluations if each.arguments.task in ("retrieval", "captioning", "itm")), None)
    if pictures is None:
        return
    numbers = pictures.draw(SEARCHED, seed)
    images = [to_rgb(pictures.image(number)) for number in numbers]
    texts = [pictures.items[number].texts[0] for number in numbers]
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        draw_retrieval(predictor_of(model, processor, "embed"), images, texts, folder / "retrieval.png")
    if isinstance(model, VlpBlipMatcher):
        draw_matching(model, processor, images[:MAPPED], texts[:MAPPED], folder / "matching.png")
    if isinstance(model, (VlpBlipForPreTraining, VlpBlipForConditionalGeneration)):
        captioner = predictor_of(model, processor, "caption")
        draw_attention(captioner, images[:MAPPED], texts[:MAPPED], folder / "attention.png")


def draw_retrieval(predictor: Predictor, images: list, texts: list[str], path: Path) -> None:
    """Draw the images that the model retrieves for the first QUERIES texts, from all images."""
    embeds = torch.cat([predictor.embed_images(batch) for batch in iter_batched(images, 64)])
    scores = predictor.similarity(embeds, predictor.embed_texts(texts[:QUERIES])).T  # (QUERIES, images)
    found = scores.topk(min(RETRIEVED, len(images)), dim=1).indices.tolist()
    rows = [
        (text, [(images[n], texts[n] == text) for n in best]) for text, best in zip(texts[:QUERIES], found, strict=True)
    ]
    plot_retrieval(rows, path)


def draw_attention(predictor: BlipPredictor, images: list, texts: list[str], path: Path) -> None:
    """Draw the cross-attention of the decoder for each word that it generates."""
    rows = [
        (
            image,
            text,
            attention_maps(predictor.model, predictor.processor, predictor.prepare_images([image])["pixel_values"]),
        )
        for image, text in zip(images, texts, strict=True)
    ]
    plot_heatmaps(rows, path)


def draw_matching(model, processor, images: list, texts: list[str], path: Path) -> None:
    """Draw which regions of an image support each word of its text (Grad-CAM of ITM)."""
    predictor = predictor_of(model, processor, "match")
    rows = [
        (image, text, matching_maps(model, processor, predictor.prepare_images([image])["pixel_values"], text))
        for image, text in zip(images, texts, strict=True)
    ]
    plot_heatmaps(rows, path)
