"""BLIP's own checkpoints (salesforce/BLIP; those of LAVIS have the same names): pre-trained and of each task."""

import re

import torch

from ...configuration.blip import VlpBlipConfig
from ..blip import VlpBlipDualEncoder
from .places import Rule, State, count, heads_of, read, require

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
    """The rules of a MED whose shared tensors stand in each of `homes` ("text_encoder", "text_decoder.bert")."""
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
    return (
        Rule(rf"{ours}\.dense\.(weight|bias)", rf"{there}.transform.dense.\1"),
        Rule(rf"{ours}\.layer_norm\.(weight|bias)", rf"{there}.transform.LayerNorm.\1"),
        Rule(rf"{ours}\.decoder\.weight", f"{there}.decoder.weight"),
        Rule(rf"{ours}\.decoder\.bias", (f"{there}.bias", f"{there}.decoder.bias")),
    )


# NLVR2 reads two images: each has projections of its own.
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

# What a checkpoint holds beside the model: positions counted up, and the state of its training.
IGNORED = r".*\.position_ids"
TEACHER = r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*|(image|text|idx)_queue|queue_ptr|ptr_queue"


def architecture_of(state: State) -> str:
    """Which of our models holds what a file does."""
    if any(".crossattention.self0." in name for name in state):
        return "VlpBlipForVisualReasoning"
    writes = any(name.startswith("text_decoder.") for name in state)
    if "itm_head.weight" in state:
        return "VlpBlipForPreTraining" if writes else "VlpBlipForImageTextRetrieval"
    if any(name.startswith("text_encoder.") for name in state):
        return "VlpBlipForQuestionAnswering"
    return "VlpBlipForConditionalGeneration"


def config_from(state: State, vision_heads: int | None = None, text_heads: int | None = None, **text) -> VlpBlipConfig:
    """The configuration, from the shapes of the tensors.

    Args:
        vision_heads, text_heads: where heads are not 64 wide.
        text: fields of the text configuration that shapes do not show; BERT's and BLIP's where not given.
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
        "bos_token_id": vocabulary - 2,  # [DEC] and [ENC] stand at the end
        "enc_token_id": vocabulary - 1,
    }
    shared = {}
    if "vision_proj.weight" in state:
        shared["image_text_hidden_size"] = state["vision_proj.weight"].shape[0]
    return VlpBlipConfig(vision_config=vision, text_config=fields | text, **shared)


def teacher_from(state: State, config: VlpBlipConfig) -> State:
    """The momentum towers and the queue, as `training.momentum.Teacher` is saved; empty where there are none.

    Whose pairs the features in the queue are is not known: they get numbers of their own, which no pair has.
    """
    if "image_queue" not in state:
        return {}
    online = {re.sub(r"_m\.", ".", name, count=1): value for name, value in state.items() if re.match(r"\w+_m\.", name)}
    with torch.device("meta"):
        wanted = VlpBlipDualEncoder(config).state_dict()
    tensors = read(online, wanted, (*VISION, *HEADS, *text((ENCODER,))), rf"{IGNORED}|.*\.crossattention\..*")
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
