"""BLIP's original checkpoints (salesforce/BLIP; LAVIS uses the same names), pre-trained or fine-tuned for a task."""

import re

import torch

from ...configuration.blip import VlpBlipConfig
from ..blip import VlpBlipDualEncoder
from .places import Rule, State, count, heads_of, import_state, require

VISION = (
    Rule(r"vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token", leading=2),
    Rule(r"vision_model\.embeddings\.position_embedding\.weight", "visual_encoder.pos_embed", leading=1),
    Rule(r"vision_model\.embeddings\.patch_embedding\.(weight|bias)", r"visual_encoder.patch_embed.proj.\1"),
    Rule(
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.(?P<qkv>[qkv])_proj\.(weight|bias)",
        r"visual_encoder.blocks.\1.attn.qkv.\3",
    ),
    Rule(
        r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)",
        r"visual_encoder.blocks.\1.attn.proj.\2",
    ),
    Rule(
        r"vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)", r"visual_encoder.blocks.\1.norm\2.\3"
    ),
    Rule(r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(\S+)", r"visual_encoder.blocks.\1.mlp.\2"),
    Rule(r"vision_model\.post_layernorm\.(weight|bias)", r"visual_encoder.norm.\1"),
)
HEADS = (Rule(r"((?:vision_proj|text_proj|itm_head|cls_head)\.\S+|temp)", r"\1"),)


def text(homes: tuple[str, ...], ours: str = "text_model") -> tuple[Rule, ...]:
    """The rules of a multimodal mixture of encoder and decoder (MED).

    Args:
        homes: their prefixes of the text model ("text_encoder", "text_decoder.bert"); shared tensors are stored under
            each of them.
        ours: our name of the text model, as a regular expression.
    """
    layer = rf"{ours}\.layers\.(\d+)"

    def places(theirs: str) -> tuple[str, ...]:
        return tuple(f"{home}.{theirs}" for home in homes)

    def attention(name: str, theirs: tuple[str, ...]) -> tuple[Rule, ...]:
        projections = zip("qkv", ("query", "key", "value"), strict=True)
        return (
            *(
                Rule(rf"{layer}\.{name}\.attention\.{own}_proj\.(weight|bias)",
                     tuple(rf"{place}.self.{other}.\2" for place in theirs))
                for own, other in projections
            ),
            Rule(rf"{layer}\.{name}\.attention\.out_proj\.(weight|bias)",
                 tuple(rf"{place}.output.dense.\2" for place in theirs)),
            Rule(rf"{layer}\.{name}\.layer_norm\.(weight|bias)",
                 tuple(rf"{place}.output.LayerNorm.\2" for place in theirs)),
        )  # fmt: skip

    return (
        Rule(rf"{ours}\.embeddings\.layer_norm\.(weight|bias)", places(r"embeddings.LayerNorm.\1")),
        Rule(rf"{ours}\.embeddings\.(\S+)", places(r"embeddings.\1")),
        *attention("encoder_attention", (r"text_encoder.encoder.layer.\1.attention",)),
        *attention("decoder_attention", (r"text_decoder.bert.encoder.layer.\1.attention",)),
        *attention("cross_attention", places(r"encoder.layer.\1.crossattention")),
        Rule(rf"{layer}\.mlp\.fc1\.(weight|bias)", places(r"encoder.layer.\1.intermediate.dense.\2")),
        Rule(rf"{layer}\.mlp\.fc2\.(weight|bias)", places(r"encoder.layer.\1.output.dense.\2")),
        Rule(rf"{layer}\.layer_norm\.(weight|bias)", places(r"encoder.layer.\1.output.LayerNorm.\2")),
    )


def lm_head(ours: str = "lm_head", there: str = "text_decoder.cls.predictions") -> tuple[Rule, ...]:
    """The rules of a language modelling head.

    Args:
        ours: our name of the head, as a regular expression.
        there: their name of the head.
    """
    return (
        Rule(rf"{ours}\.dense\.(weight|bias)", rf"{there}.transform.dense.\1"),
        Rule(rf"{ours}\.layer_norm\.(weight|bias)", rf"{there}.transform.LayerNorm.\1"),
        Rule(rf"{ours}\.decoder\.weight", f"{there}.decoder.weight"),
        Rule(rf"{ours}\.decoder\.bias", (f"{there}.bias", f"{there}.decoder.bias")),
    )


# NLVR2 has two input images; the cross-attention has separate projections for each.
PAIRS = (
    *(
        Rule(rf"text_model\.layers\.(\d+)\.cross_attention\.attention([01])\.{own}_proj\.(weight|bias)",
             rf"text_encoder.encoder.layer.\1.crossattention.self\2.{other}.\3")
        for own, other in zip("qkv", ("query", "key", "value"), strict=True)
    ),
    Rule(r"text_model\.layers\.(\d+)\.cross_attention\.attention([01])\.out_proj\.(weight|bias)",
         r"text_encoder.encoder.layer.\1.crossattention.output.dense\2.\3"),
    Rule(r"text_model\.layers\.(\d+)\.cross_attention\.merge\.(weight|bias)",
         r"text_encoder.encoder.layer.\1.crossattention.output.merge_layer.\2"),
)  # fmt: skip

ENCODER, DECODER = "text_encoder", "text_decoder.bert"
TEXTS = {
    "VlpBlipForPreTraining": (*text((ENCODER, DECODER)), *lm_head()),
    "VlpBlipForImageTextRetrieval": text((ENCODER,)),
    "VlpBlipForConditionalGeneration": (*text((DECODER,)), *lm_head()),
    "VlpBlipForQuestionAnswering": (
        *text((ENCODER,)),
        *text((DECODER,), r"answer_decoder\.text_model"),
        *lm_head(r"answer_decoder\.lm_head"),
    ),
    "VlpBlipForVisualReasoning": (*PAIRS, *text((ENCODER,))),
}
RULES = {architecture: (*VISION, *HEADS, *rules) for architecture, rules in TEXTS.items()}

# What a checkpoint contains beside the model: a buffer of position ids, and the training state (momentum and queue).
IGNORED = r".*\.position_ids"
TEACHER = r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*|(image|text|idx)_queue|queue_ptr|ptr_queue"


def architecture_of(state: State) -> str:
    """The name of our model class for a state dict."""
    if any(".crossattention.self0." in name for name in state):
        return "VlpBlipForVisualReasoning"
    has_decoder = any(name.startswith("text_decoder.") for name in state)
    if "itm_head.weight" in state:
        return "VlpBlipForPreTraining" if has_decoder else "VlpBlipForImageTextRetrieval"
    if any(name.startswith("text_encoder.") for name in state):
        return "VlpBlipForQuestionAnswering"
    return "VlpBlipForConditionalGeneration"


def config_from(state: State, vision_heads: int | None = None, text_heads: int | None = None, **text) -> VlpBlipConfig:
    """Infer the configuration from the tensor shapes.

    Args:
        state: BLIP's state dict.
        vision_heads: attention heads of the image tower; None for heads of width 64.
        text_heads: attention heads of the text model; None for heads of width 64.
        text: fields of the text configuration that shapes do not show; BERT's and BLIP's values if not given.

    Raises:
        ExchangeError: if a tensor that is needed is missing, or a width is not a multiple of 64.
    """
    require(state, "visual_encoder.pos_embed", "visual_encoder.patch_embed.proj.weight")
    home = DECODER if architecture_of(state) == "VlpBlipForConditionalGeneration" else ENCODER
    words, positions = f"{home}.embeddings.word_embeddings.weight", f"{home}.embeddings.position_embeddings.weight"
    require(state, words, positions, f"{home}.encoder.layer.0.intermediate.dense.weight")
    width, channels, patch, _ = state["visual_encoder.patch_embed.proj.weight"].shape
    vocabulary, hidden = state[words].shape
    vision = {
        "hidden_size": width,
        "intermediate_size": state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(state, r"visual_encoder\.blocks\.(\d+)\."),
        "num_attention_heads": vision_heads or heads_of(width),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5),
    }
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "encoder_hidden_size": width,
        "intermediate_size": state[f"{home}.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": count(state, rf"{home}\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": text_heads or heads_of(hidden),
        "max_position_embeddings": state[positions].shape[0],
        "bos_token_id": vocabulary - 2,  # [DEC] and [ENC] are the last tokens
        "enc_token_id": vocabulary - 1,
    }
    shared = {}
    if "vision_proj.weight" in state:
        shared["image_text_hidden_size"] = state["vision_proj.weight"].shape[0]
    return VlpBlipConfig(vision_config=vision, text_config=fields | text, **shared)


def teacher_from(state: State, config: VlpBlipConfig) -> State:
    """The momentum towers and the queue, with the names that `training.momentum.Teacher` saves.

    The checkpoint does not record which pairs the queued features belong to. They get unique negative ids, which no
    pair in training has.

    Args:
        state: BLIP's state dict.
        config: our configuration of the model.

    Returns:
        The teacher's state dict; empty if the checkpoint has no queue.

    Raises:
        ExchangeError: if a tensor of the momentum towers is missing, unexpected or of the wrong shape.
    """
    if "image_queue" not in state:
        return {}
    online = {re.sub(r"_m\.", ".", name, count=1): value for name, value in state.items() if re.match(r"\w+_m\.", name)}
    with torch.device("meta"):
        wanted = VlpBlipDualEncoder(config).state_dict()
    tensors = import_state(online, wanted, (*VISION, *HEADS, *text((ENCODER,))), rf"{IGNORED}|.*\.crossattention\..*")
    size = state["image_queue"].shape[1]
    pointer = state["queue_ptr"] if "queue_ptr" in state else state["ptr_queue"]
    return {f"model.{name}": value for name, value in tensors.items()} | {
        "image_queue": state["image_queue"].T.contiguous(),
        "text_queue": state["text_queue"].T.contiguous(),
        "image_ids": -1 - torch.arange(size),
        "caption_ids": -1 - torch.arange(size),
        "position": pointer.reshape(()).long(),
        "filled": torch.tensor(size),
    }
