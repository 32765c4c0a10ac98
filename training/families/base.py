"""What the families share: the checks of the options that describe a model."""

import dataclasses
import difflib

from transformers import AutoConfig

from ...errors import ArgumentError


def check_fields(given: dict, kind: type) -> None:
    """Raise ArgumentError, with the nearest name, for a field that a configuration does not have."""
    known = [item.name for item in dataclasses.fields(kind)] + ["model_type"]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ArgumentError(f"--model: {kind.__name__} has no field {name!r}{f'; {near[0]}?' if near else '.'}")


def require_model_type(name: str, model_type: str) -> None:
    """Raise ArgumentError where a folder or hub name holds another kind of model."""
    kind = AutoConfig.from_pretrained(name).model_type
    if kind != model_type:
        raise ArgumentError(f"{name} is a {kind}, not a {model_type}.")
