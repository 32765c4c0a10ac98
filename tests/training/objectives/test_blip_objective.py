"""Tests of the BLIP objective, the momentum teacher and its queue."""

import copy

import pytest
import torch
from conftest import tiny_blip, tiny_blip_batch
from torch.nn import functional as F
from torch.testing import assert_close
from vlp.modeling_vlp.losses import clip_loss, same_pairs
from vlp.training.objectives.blip import BlipObjective
from vlp.training.objectives.distributed import JoinedBatch
from vlp.training.objectives.momentum import Teacher

import vlp


def objective_of(queue_size: int = 10, **options) -> BlipObjective:
    model = tiny_blip().double()
    return BlipObjective(model, Teacher(model, momentum=0.9, queue_size=queue_size), **options)


def batch_of(rows: slice, size: int = 8) -> dict[str, torch.Tensor]:
    whole = tiny_blip_batch(size=size)
    ids = torch.tensor([0, 1, 2, 1, 4, 5, 6, 0])[:size]  # rows 0 and 7, and rows 1 and 3, have equal captions
    count = len(ids[rows])
    return {
        "pixel_values": whole["pixel_values"][rows].double(),  # float64, to compare gradients precisely
        # like a collator, crop to the longest of these rows
        "input_ids": whole["input_ids"][rows, : int((whole["input_ids"][rows] != 0).sum(1).max())],
        "text_index": torch.arange(count),
        "caption_ids": ids[rows],
        "image_ids": torch.arange(size)[rows],
    }


def step(objective: BlipObjective, number: int, batch: dict) -> dict[str, torch.Tensor]:
    objective.before_step(number)
    losses = objective(**batch)
    objective.after_step()
    return losses


# --- teacher and queue ------------------------------------------------------------------------------------------------


def test_teacher_follows_student_without_gradients():
    model = tiny_blip("resnet")
    teacher = Teacher(model, momentum=0.9, queue_size=4)
    start = copy.deepcopy(teacher.model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    teacher.follow(model)
    for name, parameter in teacher.model.named_parameters():
        assert_close(parameter, start[name] + 0.1)
        assert not parameter.requires_grad
    training = [module for module in teacher.train().modules() if module.training]
    assert training and all(isinstance(module, torch.nn.BatchNorm2d) for module in training)


def test_teacher_contains_only_the_two_towers():
    names = {name.split(".")[0] for name, _ in Teacher(tiny_blip(), queue_size=4).model.named_parameters()}
    assert names == {"vision_model", "text_model", "vision_proj", "text_proj"}
    assert not [
        name for name in Teacher(tiny_blip(), queue_size=4).state_dict() if "cross" in name or "decoder" in name
    ]


def test_queue_size_need_not_be_a_multiple_of_batch_size():
    teacher = Teacher(tiny_blip(), queue_size=7)
    rows = torch.arange(12.0)[:, None].expand(-1, 24)
    for start in (0, 3, 6, 9):
        part = rows[start : start + 3]
        teacher.enqueue(part, -part, part[:, 0].long(), part[:, 0].long() + 100)
    assert int(teacher.filled) == 7 and int(teacher.position) == 5
    assert sorted(teacher.image_queue[:, 0].tolist()) == [5, 6, 7, 8, 9, 10, 11]
    assert torch.equal(teacher.text_queue, -teacher.image_queue)
    assert torch.equal(teacher.caption_ids, teacher.image_ids + 100)
    assert teacher.image_queue[:, 0].tolist() == teacher.image_ids.tolist()
    teacher.enqueue(rows, rows, torch.arange(12), torch.arange(12))  # larger than the queue
    assert sorted(teacher.image_ids.tolist()) == [5, 6, 7, 8, 9, 10, 11]


def test_empty_queue_slots_are_ignored():
    batch = batch_of(slice(0, 8))
    losses = [step(objective_of(queue_size=size), 0, batch)["itc"] for size in (4, 40)]
    assert_close(losses[0], losses[1])  # both queues are still empty


# --- objective --------------------------------------------------------------------------------------------------------


def test_itc_matches_its_definition():
    """Compare with a pair-by-pair computation of section 3.2 of the paper; the queue holds the previous batch."""
    objective = objective_of(alpha=0.3).eval()
    step(objective, 0, batch_of(slice(0, 8)))
    batch = batch_of(slice(0, 8))
    teacher, model = objective.teacher, objective.model
    queue = {name: getattr(teacher, name)[:8].double() for name in ("image_queue", "text_queue")}
    loss = step(objective, 1, batch)["itc"]
    image = F.normalize(model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(batch["input_ids"]).pooler_output, dim=-1)
    teacher_image, teacher_text = teacher(batch["pixel_values"], batch["input_ids"])
    sides = (
        (image, teacher_image, torch.cat([teacher_text, queue["text_queue"]])),
        (text, teacher_text, torch.cat([teacher_image, queue["image_queue"]])),
    )
    wanted = torch.zeros(())
    for queries, own, keys in sides:
        for i in range(8):
            same = batch["caption_ids"][i] == batch["caption_ids"].repeat(2)
            target = 0.3 * (keys @ own[i] / model.temp).softmax(0) + 0.7 * same / same.sum()
            wanted = wanted - (target * (keys @ queries[i] / model.temp).log_softmax(0)).sum() / 16
    assert_close(loss, wanted, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_alpha_warms_up():
    objective = objective_of(alpha=0.4, alpha_steps=10)
    grown = []
    for number in (0, 5, 10, 50):
        objective.before_step(number)
        grown.append(objective.facts()["alpha"])
    assert grown == pytest.approx([0.0, 0.2, 0.4, 0.4])


def test_temperature_is_clamped():
    objective = objective_of()
    for value, kept in ((0.9, 0.5), (1e-5, 0.001)):
        objective.model.temp.data.fill_(value)
        objective.before_step(0)
        assert objective.facts()["temperature"] == pytest.approx(kept)


def test_negatives_never_share_caption_or_image():
    objective = objective_of()
    same = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    logits = torch.where(same, 50.0, 0.0)
    for number in range(50):
        objective.before_step(number)
        (images, texts), found = objective.draw(JoinedBatch((4,)), logits, logits, same)
        assert not same[torch.arange(4), images].any() and not same[torch.arange(4), texts].any()
        assert found[0].all() and found[1].all()


def test_sampling_depends_only_on_step_and_seed():
    batch = batch_of(slice(0, 8))
    first, again, other = objective_of(seed=1), objective_of(seed=1), objective_of(seed=2)
    torch.rand(7)  # the global generator must not matter
    values = [step(objective, 3, batch)["itm"].item() for objective in (first, again, other)]
    assert values[0] == values[1] != values[2]


def test_forward_does_not_update_teacher_or_queue():
    """They are updated after a step, so that all batches accumulated in a step use the same teacher and queue."""
    objective = objective_of()
    objective.before_step(0)
    before = copy.deepcopy(objective.teacher.state_dict())
    for _ in range(2):
        objective(**batch_of(slice(0, 8)))
    for name, value in objective.teacher.state_dict().items():
        assert torch.equal(value, before[name])
    objective.after_step()
    assert int(objective.teacher.filled) == 10  # two batches of 8 fill the queue


def test_first_share_of_training_uses_only_itc():
    batch = batch_of(slice(0, 8))
    objective = objective_of(contrastive_share=0.5)
    objective.before_step(0, share_done=0.49)
    losses = objective(**batch)
    objective.after_step()
    model = objective.model
    image = F.normalize(model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(batch["input_ids"]).pooler_output, dim=-1)
    same = same_pairs(batch["caption_ids"], batch["image_ids"])
    assert list(losses) == ["itc"]
    assert_close(losses["itc"], clip_loss(image, text, 1 / model.temp, same))
    losses["itc"].backward()
    untouched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert untouched == {"itm_head", "lm_head", "text_model"}  # text_model: cross-attention and decoder
    assert int(objective.teacher.filled) == 0
    objective.before_step(1, share_done=0.5)
    assert list(objective(**batch)) == ["itc", "itm", "lm"]


@pytest.mark.parametrize("pre_training", [True, False])
def test_negatives_use_same_similarities_as_original(pre_training, monkeypatch):
    """Pre-training samples by student-teacher similarities (blip_pretrain.py), retrieval by the student's own."""
    model = tiny_blip().double()
    if not pre_training:
        model = vlp.VlpBlipForImageTextRetrieval(model.config).double()
    teacher = Teacher(model, momentum=0.9, queue_size=10)
    with torch.no_grad():
        teacher.model.text_proj.weight.normal_()
    objective = BlipObjective(model, teacher).eval()
    seen, draw = [], objective.draw
    monkeypatch.setattr(objective, "draw", lambda *args: seen.append(args) or draw(*args))
    batch = batch_of(slice(0, 8))
    objective.before_step(0)
    losses = objective(**batch)
    assert ("lm" in losses) == pre_training
    image = F.normalize(model.get_image_features(batch["pixel_values"]).pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(batch["input_ids"]).pooler_output, dim=-1)
    keys = teacher(batch["pixel_values"], batch["input_ids"])[1] if pre_training else text
    assert_close(seen[0][1][:, :8], (image @ keys.T / model.temp).detach(), check_dtype=False)


def test_duplicate_texts_are_encoded_once_with_same_losses():
    batch = batch_of(slice(0, 8))
    batch["input_ids"][3] = batch["input_ids"][1]
    shared = batch | {"input_ids": batch["input_ids"][[0, 1, 2, 4, 5, 6, 7]],
                      "text_index": torch.tensor([0, 1, 2, 1, 3, 4, 5, 6])}  # fmt: skip
    one, other = step(objective_of(), 0, batch), step(objective_of(), 0, shared)
    for name, value in one.items():
        assert_close(other[name], value)


@pytest.mark.parametrize("queued", [False, True])
def test_several_negatives_of_a_pair_give_the_loss_of_each(queued):
    objective, batch = objective_of(itm_negatives=2), batch_of(slice(0, 4))
    if queued:
        objective.teacher = Teacher(objective.model, momentum=0.9, queue_size=10, text_length=30)
    images, texts = torch.tensor([1, 2, 3, 0, 2, 3, 0, 1]), torch.tensor([2, 3, 0, 1, 3, 2, 1, 0])
    objective.before_step(0)
    loss = objective(**batch, negatives=(images, texts))["itm"]
    model, ids, own = objective.model.eval(), batch["input_ids"], torch.arange(4)
    states = model.encode_image(batch["pixel_values"]).last_hidden_state
    pairs = [(own, own), (own, images[:4]), (own, images[4:]), (texts[:4], own), (texts[4:], own)]
    logits = torch.cat([model.match(ids[t], None, model.text_model.memory_of(states[i])) for t, i in pairs])
    assert_close(loss, F.cross_entropy(logits, (torch.arange(20) < 4).long()).float(), rtol=1e-5, atol=0)
    drawn, found = objective.draw(JoinedBatch((4,)), *torch.randn(2, 4, 14), torch.eye(4, 14, dtype=torch.bool))
    assert len(drawn[0]) == len(drawn[1]) == len(found[0]) == 8 and found[0].all()
    for each in (drawn[0], drawn[1]):
        assert (each[:4] != each[4:]).all()
    # In the third of three processes, whose rows are not negatives of each other.
    same = torch.ones(2, 16, dtype=torch.bool)
    drawn, found = objective.draw(JoinedBatch((2, 2, 2), 2), *torch.randn(2, 2, 16), same)
    assert not found[0].any() and not found[1].any() and (drawn[0] == 4).all() and (drawn[1] == 4).all()


def test_negative_texts_are_drawn_from_the_queue():
    """ITM's third part has texts of the queue, which are no positives of the image, nor empty places."""
    model = tiny_blip().eval()
    teacher = Teacher(model, momentum=0.9, queue_size=12, text_length=12)
    objective = BlipObjective(model, teacher).train()
    batch = batch_of(slice(0, 4))
    objective.before_step(0)
    objective(**batch)
    objective.after_step()
    assert teacher.filled == 4 and teacher.texts.shape == (12, 12)
    assert_close(teacher.texts[:4, : batch["input_ids"].shape[1]], batch["input_ids"][batch["text_index"]])
    other = batch_of(slice(4, 8))
    drawn = []
    draw, match = objective.draw, objective.match
    objective.draw = lambda *given: drawn.append(draw(*given)) or drawn[-1]
    logits = []
    objective.match = lambda *given: logits.append(match(*given)) or logits[-1]
    for step in range(1, 30):
        objective.before_step(step)
        objective(**other)
    (images, texts), _ = drawn[0]
    places = torch.cat([negatives[1] for negatives, _ in drawn])
    assert places.max() < 8 and (places >= 4).any() and (places < 4).any()  # batch and filled places of the queue
    known = torch.cat([objective.as_queued(other["input_ids"][other["text_index"]]), teacher.texts])
    memory = model.text_model.memory_of(model.encode_image(other["pixel_values"]).last_hidden_state)
    own = torch.arange(4)
    wanted = model.match(torch.cat([known[:4], known[:4], known[texts]]), None,
                         memory.select(torch.cat([own, images, own])))  # fmt: skip
    assert_close(logits[0], wanted)
