"""Checks that the configurations share: an impossible value is refused with the value in the message."""


def require_positive(config, *names: str) -> None:
    """Raise ValueError unless every named field (a number, or a sequence of them) is above zero."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(number, (int, float)) or number <= 0:
                raise ValueError(f"{type(config).__name__}: {name} must be positive, got {value!r}.")


def require_fraction(config, name: str) -> None:
    """Raise ValueError unless the named field lies in [0, 1)."""
    value = getattr(config, name)
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{type(config).__name__}: {name} must be at least 0 and below 1, got {value}.")


def require_divisible(config, name: str, divisor_name: str) -> None:
    """Raise ValueError unless one named field is a multiple of another."""
    value, divisor = getattr(config, name), getattr(config, divisor_name)
    if value % divisor:
        raise ValueError(
            f"{type(config).__name__}: {name} ({value}) must be divisible by {divisor_name} ({divisor}); "
            f"the nearest values that fit are {value - value % divisor} and {value - value % divisor + divisor}."
        )


def require_token_ids(config, *names: str) -> None:
    """Raise ValueError unless every named token is in the vocabulary."""
    for name in names:
        if not 0 <= getattr(config, name) < config.vocab_size:
            raise ValueError(
                f"{type(config).__name__}: {name} ({getattr(config, name)}) must be below vocab_size "
                f"({config.vocab_size})."
            )


def require_activation(config, name: str = "hidden_act") -> None:
    """Raise ValueError unless the named field is an activation that transformers knows."""
    from transformers.activations import ACT2FN

    if getattr(config, name) not in ACT2FN:
        raise ValueError(
            f"{type(config).__name__}: {name} ({getattr(config, name)!r}) is not an activation of transformers; "
            'CLIP uses "quick_gelu" (OpenAI) or "gelu" (LAION-2B, DataComp).'
        )


def config_from(given, kinds: tuple[type, ...], field: str, owner, **more):
    """A part's configuration from what `owner` was given for it: one, the dict of one, or nothing.

    Args:
        kinds: the configurations that it can be; "model_type" tells which, the first where it is missing.
        more: fields to set in a dict.

    Raises ValueError for another kind.
    """
    if not isinstance(given, dict) and given is not None:
        return given
    fields, known = dict(given or {}), {kind.model_type: kind for kind in kinds}
    name = fields.pop("model_type", kinds[0].model_type)
    if name not in known:
        raise ValueError(f"{type(owner).__name__}: {field} has model_type {name!r}; expected one of {sorted(known)}.")
    return known[name](**(fields | more))
