"""CLIP's objective with a teacher: the student also learns the similarities that a trained model finds in a batch."""

import functools

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ...inference import VlpPredictor
from ...modeling_vlp.losses import distillation_loss, unit_length
from .clip import ClipObjective
from .distributed import JoinedBatch

KNOWN_TEXTS = 250_000

# Shapes: B pairs of this process, T distinct texts, E embedding of the teacher, C channels, S image side


class DistillationTeacher:
    """A frozen model that embeds the images and texts of a batch.

    It is no module of the objective, so that it is neither sharded, averaged nor saved with the training state.

    Args:
        predictor: the teacher.
        image_mean, image_std: the statistics by which the student's images are normalised.
    """

    def __init__(self, predictor: VlpPredictor, image_mean: list[float], image_std: list[float]):
        self.model, self.predictor = predictor.model.requires_grad_(False), predictor
        own, images = (image_mean, image_std), predictor.processor.image_processor
        theirs = (images.image_mean, images.image_std)
        self.statistics = torch.tensor([[*own], [*theirs]])[..., None, None]  # (2, 2, C, 1, 1)
        self.side = predictor.model.config.vision_config.image_size

    @property
    def scale(self) -> Tensor:
        """The number by which its cosines are multiplied before a softmax."""
        scale = getattr(self.model, "logit_scale", None)
        return 1 / self.model.temp if scale is None else scale.exp()

    def move_to(self, device: torch.device) -> None:
        """Move the model to the device of the student, unless it is there already."""
        if self.statistics.device != device:
            self.model.to(device)
            self.statistics = self.statistics.to(device)

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Embed images as the student sees them, at the teacher's size.

        Args:
            pixel_values: (B, C, S, S), augmented and normalised for the student.

        Returns:
            (B, E), of unit length.
        """
        self.move_to(pixel_values.device)
        (own_mean, own_std), (mean, std) = self.statistics
        pixels = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32)) * own_std + own_mean
        if pixels.shape[-1] != self.side:
            pixels = tv.resize(pixels, [self.side, self.side], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        pixels = ((pixels - mean) / std).to(self.model.dtype)
        return unit_length(self.model.get_image_features(pixels, pooled_only=True).pooler_output)

    def embed_texts(self, input_ids: Tensor) -> Tensor:
        """Embed texts (T, N), of the teacher's tokens, as (T, E) of unit length."""
        self.move_to(input_ids.device)
        return unit_length(self.model.get_text_features(input_ids, pooled_only=True).pooler_output)


class TeacherTokens:
    """Turn texts into the tokens (T, N) of a teacher."""

    def __init__(self, predictor: VlpPredictor):
        self.processor = predictor.processor
        self.length = predictor.model.config.text_config.max_position_embeddings

    def __call__(self, texts: list[str]) -> Tensor:
        return self.processor.tokenize(texts, self.length)["input_ids"]


class TeacherEmbeddings:
    """Turn texts into the embeddings (T, E) of a teacher, which remembers the last KNOWN_TEXTS of them.

    Each text is embedded alone: in a batch, the last digits of its embedding would depend on the other texts, and a
    resumed run on where it was resumed.
    """

    def __init__(self, predictor: VlpPredictor):
        self.embed = functools.lru_cache(KNOWN_TEXTS)(lambda text: predictor.embed_texts([text])[0])

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.stack([self.embed(text) for text in texts])


class DistilledClipObjective(ClipObjective):
    """The contrastive loss, and the cross entropy between the teacher's similarities and the student's.

    Sources: open_clip, loss.py, DistillClipLoss; TinyCLIP (arXiv:2309.12314), affinity mimicking; MobileCLIP
    (arXiv:2311.17049), whose Kullback-Leibler divergence differs by a constant. Teacher and student may have
    embeddings, images and tokens of different sizes, because only similarities are compared.

    Args:
        model: the student.
        teacher: the teacher.
        weight: factor of the distillation loss.
        options: those of `ClipObjective`.
    """

    def __init__(self, model, teacher: DistillationTeacher, weight: float = 1.0, **options):
        super().__init__(model, **options)
        self.teacher, self.weight = teacher, weight

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        text_index: Tensor,
        caption_ids: Tensor,
        image_ids: Tensor,
        teacher_texts: Tensor,
        teacher_images: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            pixel_values, input_ids, text_index, caption_ids, image_ids, spatial_shapes: as in `ClipObjective.forward`.
            teacher_texts: the texts of `input_ids` in the teacher's tokens (T, N), or as its embeddings (T, E).
            teacher_images: its embeddings of the images (B, E); computed from `pixel_values`, which must be square, if
                None.

        Returns:
            The losses of `ClipObjective.forward`, and {"distillation": the loss times its weight}.
        """
        image, text = self.embed(pixel_values, input_ids, text_index, spatial_shapes)
        batch = JoinedBatch.of(text_index, self.even_batches)
        losses = self.contrast(image, text, batch, caption_ids, image_ids)
        with torch.no_grad():
            if teacher_images is None:
                teacher_images = self.in_parts(self.teacher.embed_images, pixel_values, most=batch.counts[batch.rank])
            if not teacher_texts.is_floating_point():
                teacher_texts = self.in_parts(self.teacher.embed_texts, teacher_texts, most=batch.counts[batch.rank])
            teacher_texts = teacher_texts[text_index]
        with torch.autocast(image.device.type, enabled=False):
            loss = distillation_loss(
                similarities(image, text, self.model.logit_scale.to(image.dtype).exp(), batch),
                similarities(
                    teacher_images.to(image.dtype),
                    teacher_texts.to(image.dtype),
                    self.teacher.scale.to(image.dtype),
                    batch,
                ),
            )
        return losses | {"distillation": self.weight * batch.weigh(loss)}


def similarities(image: Tensor, text: Tensor, scale: Tensor, batch: JoinedBatch) -> tuple[Tensor, Tensor]:
    """The scaled cosines of this process's images with all texts, and of its texts with all images, (B, all) each."""
    return scale * image @ batch.gather(text).T, scale * text @ batch.gather(image).T
