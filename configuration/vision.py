"""Image towers: the vision transformer and OpenAI's modified ResNet."""

from transformers import PreTrainedConfig

from .checks import config_from, require_activation, require_divisible, require_fraction, require_positive


class VlpViTConfig(PreTrainedConfig):
    """A vision transformer (Dosovitskiy et al., 2021) as CLIP uses it: a class token and a LayerNorm before the blocks.

    Args:
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP; 4 x hidden_size in the paper.
        image_size, patch_size: in pixels; the image must be a whole number of patches wide.
        hidden_act: "quick_gelu" (OpenAI's weights) or "gelu".
        patch_dropout: share of patches left out of each training image (FLIP, arXiv:2212.00794), at random.
        final_norm: whether there is a LayerNorm after the blocks; BLIP-2's towers have none, for they end before the
            last block.
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
        require_activation(self)


class VlpBlipViTConfig(VlpViTConfig):
    """The vision transformer of BLIP (timm's ViT-B/16): no LayerNorm before the blocks, one after them on every token.

    Args: as `VlpViTConfig`;
        initializer_range: standard deviation of the truncated normal that weights start from.
    """

    model_type = "vlp_blip_vit"

    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02


class VlpSiglipViTConfig(VlpViTConfig):
    """SigLIP's vision transformer (arXiv:2303.15343): no class token; a query pools the patches by attention (MAP)."""

    model_type = "vlp_siglip_vit"

    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


class VlpModifiedResNetConfig(PreTrainedConfig):
    """OpenAI's ModifiedResNet (CLIP paper 2.4): a stem of three convolutions, anti-aliased strides, attention pooling.

    Args:
        depths: bottleneck blocks in each stage; (3, 4, 6, 3) is RN50.
        embedding_size: channels after the stem; stage i is 4 * 2**i times as wide. 64 for RN50.
        num_attention_heads: of the attention pooling; the last width / 64 where not given.
        image_size: in pixels, a multiple of the total stride (32 for four stages).
    """

    model_type = "vlp_modified_resnet"
    base_config_key = "vision_config"

    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    embedding_size: int = 64
    num_attention_heads: int | None = None
    num_channels: int = 3
    image_size: int = 224
    projection_dim: int = 1024

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
        """Channels of the last stage."""
        return self.embedding_size * 4 * 2 ** (len(self.depths) - 1)

    @property
    def stride(self) -> int:
        """Pixels of the image, along one side, for each cell of the last stage."""
        return 4 * 2 ** (len(self.depths) - 1)


def vision_config_from(
    given: dict | PreTrainedConfig | None, kinds: tuple[type, ...], projection_dim: int, owner: PreTrainedConfig
) -> PreTrainedConfig:
    """The image tower's configuration from what `owner` was given for it.

    Args:
        kinds: the configurations that `owner` can hold; "model_type" tells which, the first where it is missing.
        projection_dim: width of the owner's shared space, to which a ResNet projects by itself.

    Raises ValueError for another kind, or a ResNet that projects to another width.
    """
    is_resnet = isinstance(given, dict) and given.get("model_type") == VlpModifiedResNetConfig.model_type
    more = {"projection_dim": projection_dim} if is_resnet else {}
    config = config_from(given, kinds, "vision_config", owner, **more)
    if getattr(config, "projection_dim", projection_dim) != projection_dim:
        raise ValueError(
            f"{type(owner).__name__}: the ResNet projects to {config.projection_dim} dimensions, the shared space has "
            f"{projection_dim}; they must be equal."
        )
    return config
