"""BLIP's momentum teacher and the queue of its features. They are training state, never part of a published model.

Source: He et al., 2020 (MoCo, arXiv:1911.05722); salesforce/BLIP, models/blip_pretrain.py.
"""

import torch
from torch import Tensor, nn

from ...modeling_vlp.blip import VlpBlipDualEncoder, VlpBlipMatcher
from ...modeling_vlp.losses import unit_length
from ..machine.sharding import gathered

# Shapes: B pairs, K keys (the batch, then the queue), Q queue, E embedding


class Teacher(nn.Module):
    """An exponential moving average of the two towers, always in evaluation mode, with a queue of its last features.

    Only batch norm uses the statistics of the batch, as in MoCo's key encoder: running statistics lag behind the
    student's, and the features computed with them do not fit the student's. Those of a locked image tower do fit.

    Args:
        model: the student, whose weights initialise the teacher. LoRA adapters are copied, and each of their matrices
            is averaged.
        momentum: decay of the moving average (0 to 1).
        queue_size: number of pairs in the queue; need not be a multiple of the batch size.
        text_length: number of tokens of the texts that the queue also keeps, as negatives for ITM; 0: it keeps none.
    """

    def __init__(self, model: VlpBlipMatcher, momentum: float = 0.995, queue_size: int = 57600, text_length: int = 0):
        super().__init__()
        self.momentum, self.queue_size = momentum, queue_size
        self.locked = not any(parameter.requires_grad for parameter in model.vision_model.parameters())
        self.model = VlpBlipDualEncoder(model.config).to(model.dtype)
        for name, adapter in getattr(model, "peft_config", {}).items():  # the same as the student's
            self.model.add_adapter(adapter, name)
        self.model.requires_grad_(False)
        self.model.load_state_dict({name: model.state_dict()[name] for name in self.model.state_dict()})
        self.eval()
        width = model.config.image_text_hidden_size
        self.register_buffer("image_queue", torch.zeros(queue_size, width))
        self.register_buffer("text_queue", torch.zeros(queue_size, width))
        self.register_buffer("image_ids", torch.zeros(queue_size, dtype=torch.long))
        self.register_buffer("caption_ids", torch.zeros(queue_size, dtype=torch.long))
        padding = torch.full((queue_size, text_length), model.config.text_config.pad_token_id)
        self.register_buffer("texts", padding if text_length else None)  # (Q, N) token ids
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # where the next pair goes
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))  # number of pairs in the queue

    @property
    def empty(self) -> Tensor:
        """(Q,) bool: places of the queue without a pair so far."""
        return torch.arange(self.queue_size, device=self.filled.device) >= self.filled

    def train(self, mode: bool = True) -> "Teacher":
        super().train(False)
        for module in [] if self.locked else self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        return self

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Update the moving average with the student's weights. Called once per optimiser step."""
        student = dict(model.named_parameters())
        names, own = zip(*self.model.named_parameters(), strict=True)
        with gathered([student[name] for name in names]), gathered(own, changed=True):
            torch._foreach_lerp_(list(own), [student[name].detach() for name in names], 1 - self.momentum)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, input_ids: Tensor, cached: bool = False) -> tuple[Tensor, Tensor]:
        """Compute features of unit length.

        Args:
            pixel_values: (B, C, S, S), or (B, P) cached outputs of the image tower.
            input_ids: (B, N).
            cached: whether the image tower has run already.

        Returns:
            The features of the images and of the texts, (B, E) each.
        """
        if cached:
            image = self.model.vision_proj(pixel_values)
        else:
            image = self.model.get_image_features(pixel_values, pooled_only=True).pooler_output
        text = self.model.get_text_features(input_ids, pooled_only=True).pooler_output
        return unit_length(image), unit_length(text)

    @torch.no_grad()
    def enqueue(
        self, image: Tensor, text: Tensor, image_ids: Tensor, caption_ids: Tensor, texts: Tensor | None = None
    ) -> None:
        """Add the pairs of a step to the queue in place of the oldest pairs.

        Args:
            image, text: (B, E) features.
            image_ids, caption_ids: (B,) integers.
            texts: (B, N) token ids, if the queue keeps them.
        """
        values = {"image_queue": image, "text_queue": text, "image_ids": image_ids, "caption_ids": caption_ids}
        values |= {} if texts is None else {"texts": texts}
        count = min(len(image), self.queue_size)
        places = (self.position + torch.arange(count, device=self.position.device)) % self.queue_size
        for name, value in values.items():
            getattr(self, name)[places] = value[-count:].to(getattr(self, name).dtype)
        self.position.copy_((self.position + count) % self.queue_size)
        self.filled.copy_((self.filled + count).clamp(max=self.queue_size))
