"""Text towers."""

from transformers import PreTrainedConfig

from .checks import require_activation, require_divisible, require_fraction, require_positive, require_token_ids


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
        require_token_ids(self, "bos_token_id", "eos_token_id", "pad_token_id")


class VlpSiglipTextConfig(VlpClipTextConfig):
    """SigLIP's text transformer: bidirectional, pooled at the last place of texts that are padded to their full length.

    Args: as `VlpClipTextConfig`; `pad_token_id` is what texts are padded with, and attend to, as the original does.
    """

    model_type = "vlp_siglip_text"

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    pad_token_id: int | None = 1


class VlpBlipTextConfig(PreTrainedConfig):
    """BLIP's multimodal mixture of encoder and decoder (MED; arXiv:2201.12086, section 3.1): BERT with cross-attention.

    Args:
        vocab_size: of BERT's 30,522 entries and the two that BLIP adds, [DEC] and [ENC].
        encoder_hidden_size: width of what cross-attention reads: of the image tower.
        bos_token_id, enc_token_id: [DEC], which begins what is decoded, and [ENC], which begins what is matched.
        eos_token_id: [SEP], which ends every text.
        hidden_dropout_prob, attention_probs_dropout_prob: shares left out in training.
        label_smoothing: of the language modelling loss (section 3.2).
    """

    model_type = "vlp_blip_text"
    base_config_key = "text_config"
    attribute_map = {"attention_dropout": "attention_probs_dropout_prob"}

    vocab_size: int = 30524
    hidden_size: int = 768
    encoder_hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    label_smoothing: float = 0.1
    pad_token_id: int = 0
    eos_token_id: int = 102
    bos_token_id: int = 30522
    enc_token_id: int = 30523

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        require_positive(
            self,
            "vocab_size",
            "hidden_size",
            "encoder_hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "layer_norm_eps",
            "initializer_range",
        )
        require_divisible(self, "hidden_size", "num_attention_heads")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "label_smoothing"):
            require_fraction(self, name)
        require_activation(self)
        require_token_ids(self, "pad_token_id", "eos_token_id", "bos_token_id", "enc_token_id")


class VlpQFormerConfig(PreTrainedConfig):
    """BLIP-2's querying transformer (arXiv:2301.12597, section 3.1): BERT, in which learned queries read the image.

    Args:
        vocab_size: of BERT's 30,522 entries and [DEC], which BLIP-2 adds.
        encoder_hidden_size: width of what cross-attention reads: of the image tower.
        cross_attention_frequency: every so many layers, the first among them, queries attend to the image.
        bos_token_id, eos_token_id: [DEC], which begins what is written, and [SEP], which ends every text.
        hidden_dropout_prob, attention_probs_dropout_prob: shares left out in training.
        label_smoothing: of the loss of image-grounded text generation (LAVIS, Qformer.py: 0.1).
    """

    model_type = "vlp_qformer"
    base_config_key = "qformer_config"
    attribute_map = {"attention_dropout": "attention_probs_dropout_prob"}

    vocab_size: int = 30523
    hidden_size: int = 768
    encoder_hidden_size: int = 1408
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    cross_attention_frequency: int = 2
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    label_smoothing: float = 0.1
    pad_token_id: int = 0
    eos_token_id: int = 102
    bos_token_id: int = 30522

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        require_positive(
            self,
            "vocab_size",
            "hidden_size",
            "encoder_hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "cross_attention_frequency",
            "max_position_embeddings",
            "layer_norm_eps",
            "initializer_range",
        )
        require_divisible(self, "hidden_size", "num_attention_heads")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "label_smoothing"):
            require_fraction(self, name)
        require_activation(self)
        require_token_ids(self, "pad_token_id", "eos_token_id", "bos_token_id")
