"""What a model makes of pictures that training never saw, drawn for its card: galleries and heat maps."""

from pathlib import Path

import torch

from ...inference import ReadyBlip, ReadyClip
from ...model_cards.plots import plot_heatmaps, plot_retrieval
from ...modeling_vlp.blip import VlpBlipForPreTraining, VlpBlipMatcher
from ...modeling_vlp.blip_captioner import VlpBlipForConditionalGeneration
from ...modeling_vlp.clip import VlpClipModel
from ...modeling_vlp.heatmaps import attention_maps, matching_maps
from .base import Evaluator, batched
from .blip import captioner

QUERIES, FOUND, MAPPED = 4, 6, 4  # texts looked for, images shown of each, images whose heat maps are shown
LOOKED_THROUGH = 2000  # images that a gallery looks through


def draw_pictures(model, processor, evaluator: Evaluator, folder: Path, seed: int = 0) -> None:
    """All that the model can show, as PNG files in a folder; nothing where the evaluation data has no captions."""
    if not evaluator.captions:
        return
    numbers, images = evaluator.draw(LOOKED_THROUGH, seed)
    first = {owner: text for owner, text in reversed(list(zip(evaluator.owner, evaluator.captions, strict=True)))}
    texts = [first[number] for number in numbers]
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        draw_retrieval(model, processor, images, texts, folder / "retrieval.png")
    if isinstance(model, VlpBlipMatcher):
        draw_matching(model, processor, images[:MAPPED], texts[:MAPPED], folder / "matching.png")
    if isinstance(model, (VlpBlipForPreTraining, VlpBlipForConditionalGeneration)):
        draw_attention(captioner(model), processor, images[:MAPPED], texts[:MAPPED], folder / "attention.png")


def draw_retrieval(model, processor, images: list, texts: list[str], path: Path) -> None:
    """The images that the model finds for some of the texts, among all of them."""
    ready = (ReadyClip if isinstance(model, VlpClipModel) else ReadyBlip)(model, processor)
    embeds = torch.cat([ready.embed_images(chunk) for chunk in batched(images, 64)])
    scores = ready.similarity(embeds, ready.embed_texts(texts[:QUERIES])).T  # (QUERIES, images)
    found = scores.topk(min(FOUND, len(images)), dim=1).indices.tolist()
    rows = [
        (text, [(images[n], texts[n] == text) for n in best]) for text, best in zip(texts[:QUERIES], found, strict=True)
    ]
    plot_retrieval(rows, path)


def draw_attention(writer, processor, images: list, texts: list[str], path: Path) -> None:
    """Where the decoder looks for each word that it writes."""
    plot_heatmaps([(image, text, attention_maps(writer, processor, ReadyBlip(writer, processor).pixels([image])))
                   for image, text in zip(images, texts, strict=True)], path)  # fmt: skip


def draw_matching(matcher, processor, images: list, texts: list[str], path: Path) -> None:
    """What of an image speaks for each word of its text."""
    plot_heatmaps([(image, text, matching_maps(matcher, processor, ReadyBlip(matcher, processor).pixels([image]), text))
                   for image, text in zip(images, texts, strict=True)], path)  # fmt: skip
