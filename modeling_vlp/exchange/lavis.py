"""LAVIS' BLIP-2 (models/blip2_models/). LAVIS' BLIP uses the names of salesforce/BLIP (`salesforce.py`).

LAVIS' checkpoints omit the frozen parts: the image tower, which has a separate file, and the language model.
"""

import re

import torch

from ...configuration.blip2 import VlpBlip2Config
from ...configuration.vision import VlpBlipViTConfig, VlpViTConfig
from ..exchange import openai, salesforce
from .places import ExchangeError, Rule, State, count, heads_of, require


def qformer(home: str, self_name: str, embeddings: str, layer_norm: str) -> tuple[Rule, ...]:
    """The rules of a Q-Former.

    Args:
        home: their prefix of the Q-Former.
        self_name: their name of the module with the query, key and value projections.
        embeddings: their prefix of the word and position embeddings.
        layer_norm: their name of the LayerNorm after the embeddings.
    """
    layer, theirs = r"qformer\.layers\.(\d+)", rf"{home}.encoder.layer.\1"

    def attention(name: str, place: str) -> tuple[Rule, ...]:
        projections = zip("qkv", ("query", "key", "value"), strict=True)
        return (
            *(
                Rule(rf"{layer}\.{name}\.attention\.{own}_proj\.(weight|bias)",
                     rf"{theirs}.{place}.{self_name}.{other}.\2")
                for own, other in projections
            ),
            Rule(rf"{layer}\.{name}\.attention\.out_proj\.(weight|bias)", rf"{theirs}.{place}.output.dense.\2"),
            Rule(rf"{layer}\.{name}\.layer_norm\.(weight|bias)", rf"{theirs}.{place}.output.LayerNorm.\2"),
        )  # fmt: skip

    def mlp(name: str, suffix: str) -> tuple[Rule, ...]:
        return (
            Rule(rf"{layer}\.{name}\.mlp\.fc1\.(weight|bias)", rf"{theirs}.intermediate{suffix}.dense.\2"),
            Rule(rf"{layer}\.{name}\.mlp\.fc2\.(weight|bias)", rf"{theirs}.output{suffix}.dense.\2"),
            Rule(rf"{layer}\.{name}\.layer_norm\.(weight|bias)", rf"{theirs}.output{suffix}.LayerNorm.\2"),
        )

    return (
        Rule(r"qformer\.embeddings\.layer_norm\.(weight|bias)", rf"{layer_norm}.\1"),
        Rule(r"qformer\.embeddings\.(\S+)", rf"{embeddings}.\1"),
        *attention("self_attention", "attention"),
        *attention("cross_attention", "crossattention"),
        *mlp("query_mlp", "_query"),
        *mlp("text_mlp", ""),
    )


BERT = "Qformer.bert"
COMMON = (
    Rule("query_tokens", "query_tokens"),
    Rule(r"vision_norm\.(weight|bias)", r"ln_vision.\1"),
    Rule(r"((?:vision_proj|text_proj|itm_head)\.\S+|temp)", r"\1"),
    *qformer(BERT, "self", f"{BERT}.embeddings", f"{BERT}.embeddings.LayerNorm"),
    *salesforce.lm_head(there="Qformer.cls.predictions"),
)
# A CLIP image tower: OpenAI's names, with the prefix "visual_encoder." instead of "visual.".
CLIP_TOWER = tuple(
    Rule(rule.ours, rule.theirs.replace("visual.", "visual_encoder.", 1), rule.transposed, rule.leading)
    for rule in openai.VISION
    if isinstance(rule.theirs, str) and "attnpool" not in rule.ours
)


def rules_of(config: VlpBlip2Config) -> tuple[Rule, ...]:
    """The rules of a BLIP-2, including its image tower.

    Raises:
        ExchangeError: if the image tower is a ModifiedResNet.
    """
    if type(config.vision_config) not in (VlpBlipViTConfig, VlpViTConfig):
        raise ExchangeError("LAVIS' BLIP-2 has no ModifiedResNet.")
    tower = CLIP_TOWER if type(config.vision_config) is VlpViTConfig else salesforce.VISION
    projection = "opt_proj"
    if config.text_config is not None and config.text_config.is_encoder_decoder:
        projection = "t5_proj"
    return (*COMMON, Rule(r"language_projection\.(weight|bias)", rf"{projection}.\1"), *tower)


IGNORED = r".*\.position_ids|(opt_model|t5_model)\..*"


def is_blip2(state: State) -> bool:
    """Whether a state dict is a BLIP-2 of LAVIS."""
    return "query_tokens" in state and any(name.startswith(f"{BERT}.") for name in state)


def architecture_of(state: State) -> str:
    """The name of our model class for a state dict.

    Raises:
        ExchangeError: if it is an InstructBLIP.
    """
    has_projection = any(f"{name}_proj.weight" in state for name in ("llm", "opt", "t5"))
    if has_projection and f"{BERT}.embeddings.word_embeddings.weight" in state:
        raise ExchangeError(
            "This is an InstructBLIP of LAVIS. Convert transformers' copy of it, such as "
            "Salesforce/instructblip-flan-t5-xl."
        )
    if "opt_proj.weight" in state or "t5_proj.weight" in state:
        return "VlpBlip2ForConditionalGeneration"
    return "VlpBlip2ForPreTraining" if "Qformer.cls.predictions.bias" in state else "VlpBlip2ForImageTextRetrieval"


def config_from(state: State, vision: dict, text_config=None, text_heads: int | None = None) -> VlpBlip2Config:
    """Infer the configuration from the tensor shapes.

    Args:
        state: LAVIS' state dict, with the image tower.
        vision: configuration of the image tower (`vision_config_from`).
        text_config: configuration of the language model; None for stage 1.
        text_heads: attention heads of the Q-Former; None for heads of width 64.

    Raises:
        ExchangeError: if a tensor that is needed is missing.
    """
    layer = f"{BERT}.encoder.layer"
    require(state, "query_tokens", "ln_vision.weight", f"{layer}.0.crossattention.self.key.weight")
    crossing = {int(match[1]) for name in state if (match := re.match(rf"{layer}\.(\d+)\.crossattention\.", name))}
    width = state["query_tokens"].shape[2]
    fields = {
        "hidden_size": width,
        "intermediate_size": state[f"{layer}.0.intermediate_query.dense.weight"].shape[0],
        "num_hidden_layers": count(state, rf"{layer}\.(\d+)\."),
        "num_attention_heads": text_heads or heads_of(width),
        "cross_attention_frequency": min(crossing - {0}, default=count(state, rf"{layer}\.(\d+)\.")),
    }
    words = state.get(f"{BERT}.embeddings.word_embeddings.weight")
    if words is not None:
        fields |= {"vocab_size": len(words), "bos_token_id": len(words) - 1}  # [DEC] is the last token
        fields["max_position_embeddings"] = len(state[f"{BERT}.embeddings.position_embeddings.weight"])
        fields["eos_token_id"] = min(102, len(words) - 1)
    shared = {}
    if "vision_proj.weight" in state:
        shared["image_text_hidden_size"] = state["vision_proj.weight"].shape[0]
    return VlpBlip2Config(
        vision_config=vision, qformer_config=fields, text_config=text_config,
        num_query_tokens=state["query_tokens"].shape[1], **shared,
    )  # fmt: skip


def vision_config_from(state: State, heads: int | None = None) -> dict:
    """Infer the configuration of the image tower, EVA-CLIP's or CLIP's, from the tensor shapes.

    Args:
        state: LAVIS' state dict; the tower's names begin with "visual_encoder.".
        heads: attention heads; None for those of BLIP-2's towers: 16 heads of width 88 in EVA-CLIP ViT-g, heads of
            width 64 in all others.

    Returns:
        The fields of a vision configuration, with its `model_type`.
    """
    if "visual_encoder.conv1.weight" in state:
        native = {name.replace("visual_encoder.", "visual.", 1): value for name, value in state.items()}
        native["visual.proj"] = torch.empty(0)  # LAVIS' tower has no projection; only its presence is checked
        config = openai.vision_config_from(native, "quick_gelu", heads)
        return config | {"model_type": "vlp_vit", "final_norm": "visual_encoder.ln_post.weight" in state}
    require(state, "visual_encoder.pos_embed", "visual_encoder.patch_embed.proj.weight")
    width, channels, patch, _ = state["visual_encoder.patch_embed.proj.weight"].shape
    return {
        "model_type": "vlp_blip_vit",
        "hidden_size": width,
        "intermediate_size": state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(state, r"visual_encoder\.blocks\.(\d+)\."),
        "num_attention_heads": heads or (16 if width == 1408 else heads_of(width)),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5),
        "final_norm": "visual_encoder.norm.weight" in state,
    }


def with_joint_bias(state: State) -> State:
    """Join EVA-CLIP's biases of queries and values to one of queries, keys and values.

    EVA-CLIP's keys have no bias, so theirs is zero.
    """
    result = dict(state)
    for name in state:
        if name.endswith(".attn.q_bias"):
            q, v = result.pop(name), result.pop(name.replace("q_bias", "v_bias"))
            result[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return result


def with_separate_bias(state: State) -> State:
    """The inverse of `with_joint_bias`.

    Dropping the bias of the keys does not change the output: it adds the same value to all attention scores of a query.
    """
    result = dict(state)
    for name in state:
        if name.endswith(".attn.qkv.bias"):
            q, _, v = result.pop(name).chunk(3)
            result[name.replace("qkv.bias", "q_bias")], result[name.replace("qkv.bias", "v_bias")] = q, v
    return result


def tower_from(state: State) -> State:
    """Convert the file of an image tower (eva_vit_g.pth, clip_vit_L.pth) to the names of LAVIS' BLIP-2.

    As in LAVIS, the last block and everything after it are dropped.

    Args:
        state: the state dict in the file.

    Returns:
        The tower's tensors, with the prefix "visual_encoder.".

    Raises:
        ExchangeError: if the file contains no vision transformer.
    """
    blocks = r"(blocks|transformer\.resblocks)\.(\d+)\."
    last = max((int(match[2]) for name in state if (match := re.match(blocks, name))), default=None)
    if last is None:
        raise ExchangeError(
            "--image_tower contains no vision transformer: no tensor is named blocks.* or transformer.resblocks.*."
        )
    after = re.compile(rf"(blocks|transformer\.resblocks)\.{last}\.|(norm|fc_norm|head|ln_post)\.|proj$|.*rel_pos")
    return {f"visual_encoder.{name}": value for name, value in state.items() if not after.match(name)}
