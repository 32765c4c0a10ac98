"""The model families that can be trained: every `Family` defined in a module of this folder."""

import importlib
import pkgutil

from ..arguments import TrainingArguments
from .base import Family

FAMILIES: dict[str, Family] = {}
for _module in sorted(item.name for item in pkgutil.iter_modules(__path__)):
    for _value in vars(importlib.import_module(f"{__name__}.{_module}")).values():
        if isinstance(_value, Family):
            FAMILIES[_value.name] = _value


def family_of(arguments: TrainingArguments) -> Family:
    """Return the family that the options belong to. Raises KeyError if there is none."""
    return {family.arguments: family for family in FAMILIES.values()}[type(arguments)]
