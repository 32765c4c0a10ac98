"""Initialise BLIP's text model (MED) from a BERT, as the paper does (BLIP, section 4.1)."""

import re

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ...errors import ArgumentError, printable
from ...loading import load_bert_tokenizer, load_weights, read_config
from ...modeling_vlp.blip import VlpBlipPreTrainedModel

OPTION = "--bert_name_or_path"
WORDS = "embeddings.word_embeddings.weight"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
         "hidden_act", "layer_norm_eps")  # fmt: skip
NAMES = (  # BERT's names and those of MED; the self-attention of both modes starts from the same weights
    (r"embeddings\.(word|position)_embeddings\.weight", (r"text_model.embeddings.\1_embeddings.weight",)),
    (r"embeddings\.LayerNorm\.(\w+)", (r"text_model.embeddings.layer_norm.\1",)),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(q)uery\.(\w+)", "attention"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(k)ey\.(\w+)", "attention"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(v)alue\.(\w+)", "attention"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)",
     (r"text_model.layers.\1.encoder_attention.attention.out_proj.\2",
      r"text_model.layers.\1.decoder_attention.attention.out_proj.\2")),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(\w+)",
     (r"text_model.layers.\1.encoder_attention.layer_norm.\2",
      r"text_model.layers.\1.decoder_attention.layer_norm.\2")),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", (r"text_model.layers.\1.mlp.fc1.\2",)),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", (r"text_model.layers.\1.mlp.fc2.\2",)),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(\w+)", (r"text_model.layers.\1.layer_norm.\2",)),
    (r"cls\.predictions\.transform\.dense\.(\w+)", (r"lm_head.dense.\1",)),
    (r"cls\.predictions\.transform\.LayerNorm\.(\w+)", (r"lm_head.layer_norm.\1",)),
)  # fmt: skip
SELF_ATTENTION = (r"text_model.layers.\1.encoder_attention.attention.\2_proj.\3",
                  r"text_model.layers.\1.decoder_attention.attention.\2_proj.\3")  # fmt: skip


def bert_config(name: str) -> PreTrainedConfig:
    """Read the configuration of a BERT. Raises ArgumentError if the model is another one."""
    config = read_config(name, OPTION)
    if config.model_type != "bert" or getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise ArgumentError(
            f"{OPTION} {printable(name, 120)} is a {config.model_type}; expected a BERT (model_type bert), "
            "whose layers BLIP's text model has."
        )
    return config


def text_fields(name: str) -> dict:
    """The sizes of a text model that starts from a BERT, as fields of `VlpBlipTextConfig`."""
    config = bert_config(name)
    return {field: getattr(config, field) for field in SIZES}


@torch.no_grad()
def load_bert(model: VlpBlipPreTrainedModel, name: str, tokenizer) -> None:
    """Copy a BERT into the text model; cross-attention and the tokens that BERT lacks keep their random weights.

    BERT's embedding of the first segment is added to its position embeddings, so the unimodal text encoder gives
    BERT's own states.

    Args:
        model: model to change.
        name: folder or hub name of the BERT.
        tokenizer: tokenizer of the model, which may have fewer tokens than that of the BERT, or some more at the end.

    Raises:
        ArgumentError: if it lacks weights.
    """
    tensors = {}
    for key, value in load_weights(name, OPTION).items():
        key = key.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        tensors[key] = value.float()
    segment = tensors.get("embeddings.token_type_embeddings.weight")
    if segment is not None:
        tensors["embeddings.position_embeddings.weight"] = tensors["embeddings.position_embeddings.weight"] + segment[0]
    own, state = model.state_dict(), {}
    if WORDS in tensors:
        tensors[WORDS] = with_tokens(own[f"text_model.{WORDS}"], tensors[WORDS], tokenizer, name)
    for key, value in tensors.items():
        state |= {target: value for target in targets_of(key) if target in own}
    untouched = [key for key in own if key.startswith("text_model.") and key not in state and "cross_" not in key]
    if untouched or any(state[key].shape != own[key].shape for key in state):
        wrong = (untouched or [key for key in state if state[key].shape != own[key].shape])[0]
        raise ArgumentError(f"{OPTION} {printable(name, 120)} does not fit the text model: {wrong}.")
    model.load_state_dict(state, strict=False)
    model.tie_weights()


def targets_of(key: str) -> list[str]:
    """The names in our model of a tensor of BERT; empty if it has none."""
    for pattern, targets in NAMES:
        if match := re.fullmatch(pattern, key):
            return [match.expand(target) for target in (SELF_ATTENTION if targets == "attention" else targets)]
    return []


def with_tokens(own: Tensor, theirs: Tensor, tokenizer, name: str) -> Tensor:
    """A table of word embeddings (W, D) with BERT's embeddings of the tokens that it knows, and our own of the others.

    Args:
        own: (W, D) our embeddings.
        theirs: (V, D) those of BERT.
        tokenizer: our tokenizer.
        name: folder or hub name of the BERT.
    """
    table, numbers = own.clone(), load_bert_tokenizer(name, OPTION).get_vocab()
    for token, row in tokenizer.get_vocab().items():
        if numbers.get(token, len(theirs)) < len(theirs) and theirs.shape[1:] == own.shape[1:]:
            table[row] = theirs[numbers[token]]
    return table
