"""Configurations of the image towers: vision transformers and OpenAI's modified ResNet."""

from transformers import PreTrainedConfig

from .checks import config_from, require_activation, require_divisible, require_fraction, require_positive


class VlpViTConfig(PreTrainedConfig):
    """Configuration of CLIP's vision transformer, with a class token and a LayerNorm before the blocks.

    Source: Dosovitskiy et al., 2021.

    Args:
        hidden_size: width of the residual stream.
        intermediate_size: width of the hidden layer of the MLP; 4 x hidden_size in the paper.
        image_size: side of the images in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        hidden_act: "quick_gelu" (OpenAI's weights) or "gelu".
        patch_dropout: share of the patches of each training image that are dropped at random (FLIP, arXiv:2212.00794),
            at least 0 and below 1.
        drop_path_rate: probability (at least 0, below 1) with which the attention, and likewise the MLP, of the last
            block is skipped for an image in training; it grows linearly from 0 for the first block (stochastic depth,
            arXiv:1603.09382).
        max_num_patches: budget of patches of an image that keeps its resolution and shape (NaFlex), for which the model
            is trained; None: square images. A vision transformer of CLIP embeds both.
        final_norm: whether a LayerNorm follows the blocks. BLIP-2's towers have none, because they omit the last block.
    """

    model_type = "vlp_vit"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    patch_dropout: float = 0.0
    drop_path_rate: float = 0.0
    max_num_patches: int | None = None
    final_norm: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        require_positive(
            self,
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_channels",
            "image_size",
            "patch_size",
            "layer_norm_eps",
        )
        require_divisible(self, "hidden_size", "num_attention_heads")
        require_divisible(self, "image_size", "patch_size")
        require_fraction(self, "attention_dropout")
        require_fraction(self, "patch_dropout")
        require_fraction(self, "drop_path_rate")
        if self.max_num_patches is not None:
            require_positive(self, "max_num_patches")
            if not isinstance(self.max_num_patches, int):
                raise ValueError(
                    f"{type(self).__name__}: max_num_patches must be a positive integer, got {self.max_num_patches!r}."
                )
        require_activation(self)


class VlpBlipViTConfig(VlpViTConfig):
    """Configuration of BLIP's vision transformer (timm's ViT-B/16).

    It has no LayerNorm before the blocks, and one after them that is applied to every token.

    Args: as for `VlpViTConfig`, and:
        initializer_range: standard deviation of the truncated normal distribution for the initial weights.
    """

    model_type = "vlp_blip_vit"

    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02


class VlpSiglipViTConfig(VlpViTConfig):
    """Configuration of SigLIP's vision transformer (arXiv:2303.15343).

    It has no class token: a learned query pools the patches by attention (MAP). Args: as for `VlpViTConfig`.
    """

    model_type = "vlp_siglip_vit"

    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


class VlpModifiedResNetConfig(PreTrainedConfig):
    """Configuration of OpenAI's ModifiedResNet (CLIP paper, section 2.4).

    It has a stem of three convolutions, anti-aliased strides and attention pooling.

    Args:
        depths: number of bottleneck blocks in each stage; (3, 4, 6, 3) is RN50.
        embedding_size: channels after the stem, an even number; 64 for RN50. Stage i has 4 * 2**i times as many.
        num_attention_heads: heads of the attention pooling; if None, the width of the last stage / 64.
        image_size: side of the images in pixels, a multiple of the total stride (32 for four stages).
        projection_dim: width of the output of the attention pooling.
        states_with_positions: normalise the cells that texts attend to, and add the position embeddings of the
            attention pooling to them. Without these, a text learns where something is only from the zeros that
            convolutions pad the image with.
    """

    model_type = "vlp_modified_resnet"
    base_config_key = "vision_config"

    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    embedding_size: int = 64
    num_attention_heads: int | None = None
    num_channels: int = 3
    image_size: int = 224
    projection_dim: int = 1024
    states_with_positions: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.depths = list(self.depths)
        require_positive(self, "depths", "embedding_size", "num_channels", "image_size", "projection_dim")
        if self.embedding_size % 2:
            raise ValueError(f"VlpModifiedResNetConfig: embedding_size must be even, got {self.embedding_size}.")
        if self.num_attention_heads is None:
            self.num_attention_heads = max(self.hidden_size // 64, 1)
        require_positive(self, "num_attention_heads")
        require_divisible(self, "hidden_size", "num_attention_heads")
        require_divisible(self, "image_size", "stride")

    @property
    def hidden_size(self) -> int:
        """Number of channels of the last stage."""
        return self.embedding_size * 4 * 2 ** (len(self.depths) - 1)

    @property
    def stride(self) -> int:
        """Side of a cell of the last stage, in pixels of the image."""
        return 4 * 2 ** (len(self.depths) - 1)


def vision_config_from(
    given: dict | PreTrainedConfig | None, kinds: tuple[type, ...], projection_dim: int, owner: PreTrainedConfig
) -> PreTrainedConfig:
    """Build the configuration of an image tower.

    Args:
        given: a configuration, which is returned as it is; a dict of its fields; or None for the defaults.
        kinds: the allowed configuration classes. "model_type" in the dict selects one; the first is the default.
        projection_dim: width of the owner's shared space; a ResNet projects to it in its attention pooling.
        owner: the configuration that contains the tower.

    Returns:
        The configuration.

    Raises:
        ValueError: if "model_type" is not that of an allowed class, a ResNet projects to another width, or a model
            other than CLIP is to read images of variable shape.
    """
    is_resnet = isinstance(given, dict) and given.get("model_type") == VlpModifiedResNetConfig.model_type
    more = {"projection_dim": projection_dim} if is_resnet else {}
    config = config_from(given, kinds, "vision_config", owner, **more)
    if getattr(config, "max_num_patches", None) is not None and owner.model_type != "vlp_clip":
        raise ValueError(f"{type(owner).__name__}: only CLIP reads images of variable shape: omit max_num_patches.")
    if getattr(config, "projection_dim", projection_dim) != projection_dim:
        raise ValueError(
            f"{type(owner).__name__}: the ResNet projects to {config.projection_dim} dimensions, but the shared space "
            f"has {projection_dim}; they must be equal."
        )
    return config
