"""Checks that the configurations share: an impossible value is refused, and the message names it.

transformers' type validators are not used: they do not name the configuration, their messages span several lines, and
they cannot compare two fields.
"""

import math

from transformers import PreTrainedConfig

LARGEST, MOST_LAYERS = 10_000_000, 1000  # no model has larger sizes or more layers


def is_number(value) -> bool:
    """Whether a value is an integer or a finite float; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_positive(config, *names: str) -> None:
    """Check that every named field, or every number in it, is greater than 0, and an integer if its default is one.

    Args:
        config: the configuration to check.
        names: names of fields that hold a number or a sequence of numbers.

    Raises:
        ValueError: if a value is not a positive number, or is larger than that of any model.
    """
    for name in names:
        value, default = getattr(config, name), getattr(type(config), name, None)
        numbers = value if isinstance(value, (list, tuple)) else (value,)
        whole = isinstance(default, (int, list, tuple)) and not isinstance(default, bool)
        if not numbers or not all(is_number(n) and n > 0 and (not whole or isinstance(n, int)) for n in numbers):
            kind = "a positive integer" if whole and all(is_number(n) and n > 0 for n in numbers) else "positive"
            raise ValueError(f"{type(config).__name__}: {name} must be {kind}, got {shown(value)}.")
        most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
        if whole and max(numbers) > most:
            raise ValueError(f"{type(config).__name__}: {name} must be at most {most:,}, got {shown(value)}.")


def require_finite(config, name: str) -> None:
    """Check that the named field is a finite number. Raises ValueError if it is not."""
    if not is_number(getattr(config, name)):
        raise ValueError(f"{type(config).__name__}: {name} must be a number, got {shown(getattr(config, name))}.")


def shown(value) -> str:
    """A value in an error message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_fraction(config, name: str) -> None:
    """Check that the named field is at least 0 and below 1.

    Raises:
        ValueError: if it is not.
    """
    value = getattr(config, name)
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{type(config).__name__}: {name} must be at least 0 and below 1, got {shown(value)}.")


def require_choice(config, name: str, choices: tuple[str, ...]) -> None:
    """Check that the named field is one of the choices. Raises ValueError if it is not."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{type(config).__name__}: {name} must be one of {', '.join(choices)}, got {shown(value)}.")


def require_divisible(config, name: str, divisor_name: str) -> None:
    """Check that the field `name` is a multiple of the field `divisor_name`.

    Raises:
        ValueError: if it is not; the message suggests the nearest valid values.
    """
    value, divisor = getattr(config, name), getattr(config, divisor_name)
    if value % divisor:
        raise ValueError(
            f"{type(config).__name__}: {name} ({value}) must be divisible by {divisor_name} ({divisor}); "
            f"the nearest valid values are {value - value % divisor} and {value - value % divisor + divisor}."
        )


def require_width(config, part: str, encoder_hidden_size: int, width: int) -> None:
    """Check that the part of a model that cross-attends to the image tower expects the tower's width.

    Args:
        config: the configuration of the model.
        part: the part, for the error message.
        encoder_hidden_size: the width that it expects.
        width: the width of the image tower.

    Raises:
        ValueError: if the widths differ.
    """
    if encoder_hidden_size != width:
        raise ValueError(
            f"{type(config).__name__}: encoder_hidden_size of the {part} is {encoder_hidden_size}, but the image tower "
            f"has width {width}; omit encoder_hidden_size to use the tower's width."
        )


def require_token_ids(config, *names: str) -> None:
    """Check that every named token id is in the vocabulary.

    Raises:
        ValueError: if an id is negative, or not below `vocab_size`.
    """
    for name in names:
        if not isinstance(getattr(config, name), int) or not 0 <= getattr(config, name) < config.vocab_size:
            raise ValueError(
                f"{type(config).__name__}: {name} ({getattr(config, name)}) must be below vocab_size "
                f"({config.vocab_size})."
            )


def require_activation(config, name: str = "hidden_act") -> None:
    """Check that the named field is an activation function in transformers' `ACT2FN`.

    Raises:
        ValueError: if it is not.
    """
    from transformers.activations import ACT2FN

    if not isinstance(getattr(config, name), str) or getattr(config, name) not in ACT2FN:
        raise ValueError(
            f"{type(config).__name__}: {name} ({getattr(config, name)!r}) is not an activation function of "
            'transformers; CLIP uses "quick_gelu" (OpenAI) or "gelu" (LAION-2B, DataComp).'
        )


def config_from(given, kinds: tuple[type, ...], field: str, owner, defaults: dict | None = None, **more):
    """Build the configuration of a part of a model.

    Args:
        given: a configuration, which is returned as it is; a dict of its fields; or None for the defaults.
        kinds: the allowed configuration classes. "model_type" in the dict selects one; the first is the default.
        field: name of the field, for the error message.
        owner: the configuration that contains the part.
        defaults: fields that those of the dict override.
        more: further fields, which override those of the dict.

    Returns:
        The configuration.

    Raises:
        ValueError: if "model_type" is not that of an allowed class.
    """
    if isinstance(given, PreTrainedConfig):
        return given
    if not isinstance(given, dict) and given is not None:
        raise ValueError(f"{type(owner).__name__}: {field} must be a configuration or its fields, got {shown(given)}.")
    fields, known = (defaults or {}) | dict(given or {}), {kind.model_type: kind for kind in kinds}
    name = fields.pop("model_type", kinds[0].model_type)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{type(owner).__name__}: {field} has model_type {name!r}; expected one of {sorted(known)}.")
    return known[name](**(fields | more))
