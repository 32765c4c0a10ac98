"""Text towers."""

from transformers import PreTrainedConfig

from .checks import require_activation, require_divisible, require_fraction, require_positive


class VlpClipTextConfig(PreTrainedConfig):
    """CLIP's causal text transformer, pooled at the end token.

    Args:
        hidden_size, intermediate_size: width of the residual stream and inside the MLP.
        max_position_embeddings: most tokens in a caption, start and end token included.
        bos_token_id, eos_token_id, pad_token_id: None means the last but one, the last, and the end token, as OpenAI's.
    """

    model_type = "vlp_clip_text"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        require_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "layer_norm_eps",
        )
        require_divisible(self, "hidden_size", "num_attention_heads")
        require_fraction(self, "attention_dropout")
        require_activation(self)
        if self.bos_token_id is None:
            self.bos_token_id = self.vocab_size - 2
        if self.eos_token_id is None:
            self.eos_token_id = self.vocab_size - 1
        if self.pad_token_id is None:
            self.pad_token_id = self.eos_token_id
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"VlpClipTextConfig: {name} ({getattr(self, name)}) must be below vocab_size ({self.vocab_size})."
                )
