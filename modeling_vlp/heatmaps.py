"""Heatmaps of what BLIP attends to in an image: for each word it generates, and for the match of a text.

Both use the cross-attention weights of the text model, which only the eager kernel returns; the model temporarily uses
that kernel. Its outputs are the same.
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
    """Attention maps of the words of a text.

    Attributes:
        words: the words.
        maps: (words, S, S), not negative; each sums to at most 1.
    """

    words: list[str]
    maps: Tensor


def attention_maps(model: VlpBlipForConditionalGeneration, processor, pixel_values: Tensor, **options) -> Heatmap:
    """Generate a caption of an image, and compute what the decoder attends to for each word.

    The map of a word is the mean cross-attention over layers, heads and the tokens of the word. The attention for a
    token is that of the position before it, which predicts it.

    Args:
        model: the captioner.
        processor: its processor.
        pixel_values: (1, C, S, S).
        options: options of `generate`; by default, 3 beams, no sampling and at most 30 tokens.

    Returns:
        A map for each word of the caption.
    """
    with torch.no_grad(), eager(model):
        memory = model.image_memory(pixel_values)
        ids = model.generate(memory=memory, **{"num_beams": 3, "do_sample": False, "max_length": 30} | options)
        output = model(input_ids=ids[:, :-1], memory=memory, output_attentions=True)
    weights = torch.stack(output.cross_attentions).mean(dim=(0, 2))[0]  # (N - 1, M)
    return by_word(processor, ids[0, 1:], to_grid(weights))


def matching_maps(model: VlpBlipMatcher, processor, pixel_values: Tensor, text: str) -> Heatmap:
    """Compute which patches of an image support its match with a text, by Grad-CAM of the ITM logit.

    Source: salesforce/ALBEF, visualization.ipynb, which uses layer 9 of 12: the attention times the positive part of
    its gradient, averaged over heads. Unlike the original, this subtracts the mean of the gradient under the attention
    first: attention weights sum to 1, so a part of the gradient that all patches share carries no information and can
    hide the rest. If ITM reads [Encode] alone, the words' states after the last layer do not affect the match, so a
    model with one layer has only the map of the whole text.

    Args:
        model: the matcher.
        processor: its processor.
        pixel_values: (1, C, S, S).
        text: the text.

    Returns:
        A map of the whole text, named "match", and one for each word.

    Raises:
        ValueError: if the model's weights are frozen, so that there is no gradient.
    """
    ids = processor.tokenize([text], model.config.text_config.max_position_embeddings)["input_ids"]
    ids = ids.to(pixel_values.device)
    layers = len(model.text_model.layers)
    last = layers - 1 if model.config.itm_pooling == "mean" else layers - 2  # in which words affect the match
    layer = max(0, min(layers * 2 // 3, last))
    with torch.enable_grad(), eager(model):
        memory = model.memory_of(model.encode_image(pixel_values).last_hidden_state)
        ids_to_match = begin_with(ids, model.config.text_config.enc_token_id)
        output = model.text_model(ids_to_match, None, memory, output_attentions=True)
        weights = output.cross_attentions[layer]  # (1, H, N, M)
        match = model.match_logits(output.last_hidden_state, torch.ones_like(ids))[0, 1]
        if not weights.requires_grad:
            raise ValueError("The model's weights are frozen, so there is no gradient: call requires_grad_(True).")
        gradient = torch.autograd.grad(match, weights)[0]
    gradient = gradient - (weights * gradient).sum(dim=-1, keepdim=True)
    maps = to_grid((weights * gradient.clamp(min=0)).mean(dim=1)[0].detach())  # (N, S, S)
    words = by_word(processor, ids[0, 1:], maps[1:]) if last >= 0 else Heatmap([], maps[:0])
    return Heatmap(["match", *words.words], torch.cat([maps.mean(dim=0, keepdim=True), words.maps]))


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Use the eager attention kernel, which returns attention weights, and evaluation mode."""
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def to_grid(weights: Tensor) -> Tensor:
    """Reshape weights of an image's tokens (N, M) to its grid of patches (N, S, S), without a class token.

    Raises:
        ValueError: if the patches do not form a square.
    """
    side = int(weights.shape[1] ** 0.5)
    if side * side not in (weights.shape[1], weights.shape[1] - 1):
        raise ValueError(f"{weights.shape[1]} image tokens do not form a square grid of patches.")
    return weights[:, weights.shape[1] - side * side :].unflatten(1, (side, side))


def by_word(processor, ids: Tensor, maps: Tensor) -> Heatmap:
    """Merge WordPiece tokens into words, and average their maps; special tokens are skipped.

    Args:
        processor: a processor with a tokenizer.
        ids: (N,) token ids.
        maps: (N, S, S), one for each token.
    """
    tokenizer, words, parts = processor.tokenizer, [], []
    for token, grid in zip(tokenizer.convert_ids_to_tokens(ids.tolist()), maps, strict=True):
        if token is None or token in tokenizer.all_special_tokens:  # None: an embedding without a token
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
