"""Tests of complete small runs of distillation, with teachers of vlp, transformers and open_clip."""

import json

import pytest
from accelerate.state import AcceleratorState
from conftest import tiny_blip, tiny_pair
from test_training import arguments, pairs  # noqa: F401  # the fixture
from vlp.training.run import train

import vlp
from vlp.conversion import convert
from vlp.errors import ArgumentError
from vlp.files import state_folder, states


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder with the same teacher in three formats."""
    folder = tmp_path_factory.mktemp("teachers")
    for part in tiny_pair():
        part.save_pretrained(folder / "vlp")
    for kind in ("transformers", "open_clip"):
        convert(folder / "vlp", folder / kind, to=kind)
    return folder


def losses_of(folder) -> list[float]:
    return [entry["distillation"] for entry in json.loads((folder / "results.json").read_text())["history"]]


@pytest.mark.parametrize("cached", [False, True])
def test_teachers_of_all_formats_teach_the_same(pairs, teachers, tmp_path, cached):  # noqa: F811
    found = {}
    for kind in ("vlp", "transformers", "open_clip"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(arguments(pairs, tmp_path / kind, teacher_name_or_path=str(teachers / kind), cache_teacher=cached,
                        max_train_steps=3))  # fmt: skip
        found[kind] = losses_of(tmp_path / kind)
    assert len(found["vlp"]) == 3 and found["vlp"][0] > 0
    assert found["transformers"] == pytest.approx(found["vlp"], rel=1e-4)
    assert found["open_clip"] == pytest.approx(found["vlp"], rel=1e-4)
    card = (tmp_path / "vlp" / "README.md").read_text()
    assert "teacher_name_or_path" in card and str(teachers) not in card
    assert str(teachers) not in (tmp_path / "vlp" / "results.json").read_text()


def test_cached_embeddings_are_those_of_images_without_augmentation(pairs, teachers, tmp_path):  # noqa: F811
    """The teacher sees what the student sees: the student's side is the teacher's."""
    options = {"teacher_name_or_path": str(teachers / "vlp"), "augmentation": "none", "image_size": 32}
    train(arguments(pairs, tmp_path / "each", **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(arguments(pairs, tmp_path / "once", cache_teacher=True, **options))
    assert losses_of(tmp_path / "once") == pytest.approx(losses_of(tmp_path / "each"), rel=1e-4)


def test_resumed_distillation_equals_one_that_was_never_stopped(pairs, teachers, tmp_path):  # noqa: F811
    options = {"teacher_name_or_path": str(teachers / "vlp"), "cache_teacher": True}
    train(arguments(pairs, tmp_path / "run", save_steps=3, save_total_limit=5, **options))
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    first = states(state_folder(tmp_path / "run"))[0]
    train(arguments(pairs, tmp_path / "run", resume_from_checkpoint=str(first), **options))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_teacher": True}, "--cache_teacher needs --teacher_name_or_path"),
        ({"teacher_name_or_path": "t", "distillation_weight": 0.0}, "--distillation_weight must be positive"),
        ({"teacher_name_or_path": "t", "cache_teacher": True, "num_workers": 1, "cache_images": False},
         "--cache_teacher needs random access"),
        ({"teacher_name_or_path": "t", "image_tower": "t", "lock_image_tower": True, "cache_features": True,
          "cache_images": False}, "--cache_features leaves no images for the teacher"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(pairs, tmp_path, options, message):  # noqa: F811
    with pytest.raises(ArgumentError, match=message):
        arguments(pairs, tmp_path / "run", **options)


def test_teacher_that_cannot_teach_is_refused(pairs, tmp_path):  # noqa: F811
    with pytest.raises(ArgumentError, match="--teacher_name_or_path.*none"):
        train(arguments(pairs, tmp_path / "run", teacher_name_or_path=str(tmp_path / "none")))


def test_teacher_without_embeddings_is_refused(pairs, tmp_path):  # noqa: F811
    for part in tiny_pair():
        part.save_pretrained(tmp_path / "teacher")
    vlp.VlpBlipForConditionalGeneration(tiny_blip().config).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ArgumentError, match="cannot embed") as caught:
        train(arguments(pairs, tmp_path / "run", teacher_name_or_path=str(tmp_path / "teacher")))
    assert str(caught.value).count("--teacher_name_or_path") == 1
