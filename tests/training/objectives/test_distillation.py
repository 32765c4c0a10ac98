"""Tests of distillation: the loss is open_clip's, and the teacher sees the same images and texts as on its own."""

import pytest
import torch
from conftest import tiny_batch, tiny_model, tiny_pair, tiny_processor
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close
from vlp.training.objectives.distillation import (
    DistillationTeacher,
    DistilledClipObjective,
    TeacherEmbeddings,
    TeacherTokens,
)

from vlp.inference import VlpPredictor

STATISTICS = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]  # of the student


def make_teacher() -> DistillationTeacher:
    return DistillationTeacher(VlpPredictor(tiny_model("resnet"), tiny_processor(64)), *STATISTICS)


def normalised(pixels: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_losses_are_those_of_open_clip(micro_batch_size):
    loss = pytest.importorskip("open_clip.loss")
    model, teacher = tiny_model(), make_teacher()
    objective = DistilledClipObjective(
        model, teacher, weight=1.0, micro_batch_size=micro_batch_size, exclude_duplicates=False
    ).train()
    batch, index = tiny_batch(model, 6), torch.tensor([0, 1, 2, 3, 3, 5])
    ids = batch["input_ids"]
    losses = objective(batch["pixel_values"], ids, index, torch.arange(6), torch.arange(6), teacher_texts=ids)
    image = F.normalize(model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(ids).pooler_output, dim=-1)[index]
    theirs = teacher.embed_images(batch["pixel_values"]), teacher.embed_texts(ids)[index]
    scale, their_scale = model.logit_scale.exp(), teacher.predictor.model.logit_scale.exp()
    wanted = loss.DistillClipLoss()(image, text, scale, *theirs, their_scale, output_dict=True)
    assert_close(losses["contrastive"], wanted["contrastive_loss"], rtol=1e-5, atol=1e-6)
    assert_close(losses["distillation"], wanted["distill_loss"], rtol=1e-5, atol=1e-6)
    for value in (losses, wanted):
        value["gradients"] = torch.autograd.grad(sum(value.values()), list(model.parameters()))
    for gradient, expected in zip(losses["gradients"], wanted["gradients"], strict=True):
        assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_weight_scales_the_distillation_loss_alone():
    model, teacher = tiny_model(), make_teacher()
    batch = tiny_batch(model, 4)
    inputs = (batch["pixel_values"], batch["input_ids"], torch.arange(4), torch.arange(4), torch.arange(4))
    once, twice = (
        DistilledClipObjective(model, teacher, weight)(*inputs, teacher_texts=batch["input_ids"])
        for weight in (1.0, 2.0)
    )
    assert_close(twice["distillation"], 2 * once["distillation"])
    assert_close(twice["contrastive"], once["contrastive"])


@pytest.mark.parametrize("side", [64, 128])
def test_teacher_sees_the_images_as_its_processor_prepares_them(side):
    """The student's normalisation is undone; a larger picture is resized as the teacher's processor resizes it."""
    teacher = make_teacher()
    own_size = teacher.side
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, side, side, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(each.numpy()) for each in pixels]
    seen = teacher.embed_images(normalised(pixels.permute(0, 3, 1, 2) / 255, *STATISTICS))
    # The processor rounds resized pixels to 8 bits.
    tolerance = 1e-5 if side == own_size else 1e-2
    assert_close(seen, teacher.predictor.embed_images(images), rtol=0, atol=tolerance)


def test_texts_are_embedded_once():
    predictor = VlpPredictor(*tiny_pair())
    tokens, embeddings = TeacherTokens(predictor), TeacherEmbeddings(predictor)
    calls = []
    predictor.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    texts = ["a cat", "a dog", "a cat"]
    found = embeddings(texts)
    assert torch.equal(embeddings(["a dog", "a cat"]), found[1:])
    assert len(calls) == 2  # each text alone
    assert torch.equal(found[0], embeddings(["a bird", "a cat", "a house by the sea"])[1])
    teacher = DistillationTeacher(predictor, *STATISTICS)
    assert_close(teacher.embed_texts(tokens(texts)), found, rtol=1e-5, atol=1e-6)


def test_teacher_is_no_part_of_the_training_state():
    objective = DistilledClipObjective(tiny_model(), make_teacher())
    assert {name.split(".")[0] for name in objective.state_dict()} == {"model"}
    assert all(name.startswith("model.") for name, _ in objective.named_parameters())
