"""OpenAI's ModifiedResNet. Source: openai/CLIP, clip/model.py, ModifiedResNet and AttentionPool2d."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration.vision import VlpModifiedResNetConfig
from .attention import attention
from .base import VlpPreTrainedModel
from .layers import interpolate_grid, require_image_size, resample_table
from .outputs import ResNetOutput

# Shapes: B batch, C channels, S image side, G cells along a side of the last stage, D last width, E embedding


def is_recomputing() -> bool:
    """Whether gradient checkpointing is recomputing a block, within the backward pass."""
    return torch._C._current_graph_task_id() != -1


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that does not update its running statistics when gradient checkpointing recomputes a block."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not torch.compiler.is_compiling() and is_recomputing():
            mean, var = self.running_mean.clone(), self.running_var.clone()
            return nn.functional.batch_norm(
                x, mean, var, self.weight, self.bias, training=True, momentum=self.momentum, eps=self.eps
            )
        return super().forward(x)


class Bottleneck(GradientCheckpointingLayer):
    """A residual block that strides by average pooling, before the last convolution and in the shortcut."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__()
        width = planes * self.expansion
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, width, 1, bias=False)
        self.bn3 = BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or channels != width:
            pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
            # Indices "0" and "1" are OpenAI's names; "-1" is theirs for the pool, which holds no weights.
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", pool)
            self.downsample.add_module("0", nn.Conv2d(channels, width, 1, bias=False))
            self.downsample.add_module("1", BatchNorm2d(width))

    def initialize(self) -> None:
        init.zeros_(self.bn3.weight)  # at first, each block is only its shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).relu_()
        out = self.bn3(self.conv3(self.avgpool(out)))
        return (out + (x if self.downsample is None else self.downsample(x))).relu_()


class AttentionPool2d(nn.Module):
    """Attention pooling: one query, the mean of all cells, attends to itself and the cells."""

    def __init__(self, config: VlpModifiedResNetConfig):
        super().__init__()
        grid, width = config.image_size // config.stride, config.hidden_size
        self.num_heads = config.num_attention_heads
        self.positional_embedding = nn.Parameter(torch.empty(grid * grid + 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, config.projection_dim)

    def initialize(self) -> None:
        std = self.positional_embedding.shape[1] ** -0.5
        init.normal_(self.positional_embedding, std=std)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            init.normal_(linear.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        position = interpolate_grid(self.positional_embedding, *x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)  # (B, D, G, G) -> (B, G * G, D)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + position.to(x.dtype)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        return attention(query, key, value).transpose(1, 2).flatten(1)  # (B, D)

    def project(self, attended: Tensor) -> Tensor:
        return self.c_proj(attended)  # (B, D) -> (B, E)


class ModifiedResNet(VlpPreTrainedModel):
    """Residual network with attention pooling; its output is already projected to the shared embedding space."""

    config_class = VlpModifiedResNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["Bottleneck", "AttentionPool2d"]

    def __init__(self, config: VlpModifiedResNetConfig):
        super().__init__(config)
        half, width = config.embedding_size // 2, config.embedding_size
        self.conv1 = nn.Conv2d(config.num_channels, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for stage, depth in enumerate(config.depths):
            planes = width * 2**stage
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(channels, planes, stride=2 if stage and not block else 1))
                channels = planes * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool2d(config)
        self.post_init()

    @staticmethod
    def use_channels_last(model: nn.Module) -> None:
        """Store the convolutions of every ModifiedResNet in a model with channels last, which is faster."""
        for module in model.modules():
            if isinstance(module, ModifiedResNet):
                module.to(memory_format=torch.channels_last)

    def stem(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu_()
        return self.avgpool(x)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ResNetOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, S, S).
            interpolate_pos_encoding: resample the position embeddings for images of another size.
            pooled_only: return no `last_hidden_state`.
            output_hidden_states: also return the outputs of the stem and of every stage.
            output_attentions: ignored; there are no attention maps.

        Returns:
            `last_hidden_state` (B, D, G, G), `pooler_output` (B, E) and `attended` (B, D).

        Raises:
            ValueError: if the images do not have the required size.
        """
        require_image_size(pixel_values, self.config.image_size, self.config.stride, interpolate_pos_encoding)
        x = pixel_values.to(self.conv1.weight.dtype, memory_format=torch.channels_last)
        hidden_states = (x := self.stem(x),)
        for stage in range(len(self.config.depths)):
            x = getattr(self, f"layer{stage + 1}")(x)
            hidden_states += (x,)
        attended = self.attnpool(x)
        if self.config.states_with_positions and not pooled_only:
            x = self.with_positions(x)
        return ResNetOutput(
            last_hidden_state=None if pooled_only else x,
            pooler_output=self.attnpool.project(attended),
            attended=attended,
            hidden_states=hidden_states if output_hidden_states else None,
        )

    def with_positions(self, x: Tensor) -> Tensor:
        """Normalise cells (B, D, G, G) and add the pooling's position embeddings, scaled to a deviation of 0.5."""
        cells = interpolate_grid(self.attnpool.positional_embedding, *x.shape[-2:])[1:]  # (G * G, D), deviation D**-0.5
        cells = (cells * 0.5 * x.shape[1] ** 0.5).T.unflatten(1, x.shape[-2:])
        normal = nn.functional.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)
        return normal + cells.to(normal.dtype)

    def resize_images(self, image_size: int) -> None:
        """Adapt the model to images of another size, in pixels, by resampling its position embeddings."""
        pool = self.attnpool
        pool.positional_embedding = resample_table(pool.positional_embedding, image_size // self.config.stride)
        self.config.image_size = image_size
