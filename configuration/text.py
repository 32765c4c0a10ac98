"""Configurations of the text models: CLIP's, SigLIP's, BLIP's MED and BLIP-2's Q-Former."""

from transformers import PreTrainedConfig

from .checks import require_activation, require_divisible, require_fraction, require_positive, require_token_ids


class VlpClipTextConfig(PreTrainedConfig):
    """Configuration of CLIP's causal text transformer, which is pooled at the end token.

    Args:
        hidden_size: width of the residual stream.
        intermediate_size: width of the hidden layer of the MLP.
        max_position_embeddings: maximum number of tokens in a caption, including the start and end tokens.
        bos_token_id: start token; if None, `vocab_size - 2`, as in OpenAI's CLIP.
        eos_token_id: end token; if None, `vocab_size - 1`, as in OpenAI's CLIP.
        pad_token_id: padding token; if None, the end token, as in OpenAI's CLIP.
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
    """Configuration of SigLIP's bidirectional text transformer.

    Texts are padded to their full length and pooled at the last position.

    Args: as for `VlpClipTextConfig`, except:
        pad_token_id: padding token. Texts attend to padding, as in the original.
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
    """Configuration of BLIP's multimodal mixture of encoder and decoder (MED): BERT with cross-attention.

    Source: arXiv:2201.12086, section 3.1.

    Args:
        vocab_size: BERT's 30,522 entries and the two that BLIP adds, [DEC] and [ENC].
        encoder_hidden_size: width of the states that cross-attention attends to, i.e. of the image tower.
        hidden_dropout_prob: dropout probability of embeddings, attention outputs and MLP outputs.
        attention_probs_dropout_prob: dropout probability of attention weights.
        label_smoothing: label smoothing of the language modelling loss (section 3.2).
        eos_token_id: [SEP], the last token of every text.
        bos_token_id: [DEC], the first token of a text to decode; if None, `vocab_size - 2`, as in BLIP.
        enc_token_id: [ENC], the first token of a text to match with an image; if None, `vocab_size - 1`, as in BLIP.
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
    bos_token_id: int | None = None
    enc_token_id: int | None = None

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
        if self.bos_token_id is None:
            self.bos_token_id = self.vocab_size - 2
        if self.enc_token_id is None:
            self.enc_token_id = self.vocab_size - 1
        require_token_ids(self, "pad_token_id", "eos_token_id", "bos_token_id", "enc_token_id")


class VlpQFormerConfig(PreTrainedConfig):
    """Configuration of BLIP-2's Q-Former: BERT with learned queries that cross-attend to the image.

    Source: arXiv:2301.12597, section 3.1.

    Args:
        vocab_size: BERT's 30,522 entries and [DEC], which BLIP-2 adds.
        encoder_hidden_size: width of the states that cross-attention attends to, i.e. of the image tower.
        cross_attention_frequency: every how many layers the queries attend to the image, starting with the first layer.
        hidden_dropout_prob: dropout probability of embeddings, attention outputs and MLP outputs.
        attention_probs_dropout_prob: dropout probability of attention weights.
        label_smoothing: label smoothing of the image-grounded text generation loss (LAVIS, Qformer.py: 0.1).
        eos_token_id: [SEP], the last token of every text.
        bos_token_id: [DEC], the first token of a text to decode; if None, `vocab_size - 1`, as in BLIP-2.
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
    bos_token_id: int | None = None

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
        if self.bos_token_id is None:
            self.bos_token_id = self.vocab_size - 1
        require_token_ids(self, "pad_token_id", "eos_token_id", "bos_token_id")
