"""Where in an image BLIP looks: for each word that it writes, and for what makes a text match.

Both read the cross-attention of the text model, which takes the eager kernel for that long; the numbers that come out
of the model are the same.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blip import VlpBlipMatcher
from .blip_captioner import VlpBlipForConditionalGeneration
from .med import begin_with

# Shapes: N tokens of a text, M tokens of an image, H heads, S side of the grid of patches


@dataclass
class Heatmap:
    """Where each part of a text looks. `maps`: (words, S, S), not negative; each sums to at most 1 over an image."""

    words: list[str]
    maps: Tensor


def attention_maps(model: VlpBlipForConditionalGeneration, processor, pixel_values: Tensor, **options) -> Heatmap:
    """A caption of one image (1, C, S, S), and where the decoder looked when it wrote each of its words.

    The mean of the cross-attention over layers, heads and the tokens of a word; of the token before, from which a
    token is written. `options` are those of `generate`.
    """
    with torch.no_grad(), eager(model):
        memory = model.read_image(pixel_values)
        ids = model.generate(memory=memory, **{"num_beams": 3, "do_sample": False, "max_length": 30} | options)
        output = model(ids[:, :-1], memory=memory, output_attentions=True)
    weights = torch.stack(output.cross_attentions).mean(dim=(0, 2))[0]  # (N - 1, M)
    return by_word(processor, ids[0, 1:], to_grid(weights))


def matching_maps(model: VlpBlipMatcher, processor, pixel_values: Tensor, text: str) -> Heatmap:
    """What of one image (1, C, S, S) speaks for a text, as a whole ("match") and for each word: Grad-CAM of ITM.

    Source: salesforce/ALBEF, visualization.ipynb, which takes layer 9 of 12: attention times the positive part of its
    gradient, the mean over heads. Otherwise than there, the gradient is taken less its mean under the attention:
    weights sum to 1, so that what it has in common for all patches tells nothing, and can hide all else. In the last
    layer the words no longer reach what matches: of a model of one layer there is the whole alone.
    """
    ids = processor.read_texts([text], model.config.text_config.max_position_embeddings)["input_ids"]
    ids = ids.to(pixel_values.device)
    layers = len(model.text_model.layers)
    layer = max(0, min(layers * 2 // 3, layers - 2))
    with torch.enable_grad(), eager(model):
        memory = model.read(model.encode_image(pixel_values).last_hidden_state)
        asked = begin_with(ids, model.config.text_config.enc_token_id)
        output = model.text_model(asked, None, memory, output_attentions=True)
        weights = output.cross_attentions[layer]  # (1, H, N, M)
        match = model.itm_head(output.last_hidden_state[:, 0])[0, 1]
        if not weights.requires_grad:
            raise ValueError("The model's weights are frozen: nothing says what a match depends on.")
        gradient = torch.autograd.grad(match, weights)[0]
    gradient = gradient - (weights * gradient).sum(dim=-1, keepdim=True)
    maps = to_grid((weights * gradient.clamp(min=0)).mean(dim=1)[0].detach())  # (N, S, S)
    words = by_word(processor, ids[0, 1:], maps[1:]) if layers > 1 else Heatmap([], maps[:0])
    return Heatmap(["match", *words.words], torch.cat([maps.mean(dim=0, keepdim=True), words.maps]))


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Attention that tells its weights, and evaluation mode."""
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def to_grid(weights: Tensor) -> Tensor:
    """Weights of an image's tokens (N, M) -> (N, S, S): its patches, without the token before them where there is one.

    Raises ValueError where the patches make no square.
    """
    side = int(weights.shape[1] ** 0.5)
    if side * side not in (weights.shape[1], weights.shape[1] - 1):
        raise ValueError(f"{weights.shape[1]} tokens of an image make no square of patches.")
    return weights[:, weights.shape[1] - side * side :].unflatten(1, (side, side))


def by_word(processor, ids: Tensor, maps: Tensor) -> Heatmap:
    """Tokens put together to the words that they are parts of (WordPiece), special tokens left out."""
    tokenizer, words, parts = processor.tokenizer, [], []
    for token, grid in zip(tokenizer.convert_ids_to_tokens(ids.tolist()), maps, strict=True):
        if token is None or token in tokenizer.all_special_tokens:  # None: a row that no token has
            continue
        if token.startswith("##") and words:
            words[-1] += token.removeprefix("##")
            parts[-1].append(grid)
        else:
            words.append(token)
            parts.append([grid])
    if not words:
        return Heatmap([], maps[:0])
    return Heatmap(words, torch.stack([torch.stack(grids).mean(dim=0) for grids in parts]))
