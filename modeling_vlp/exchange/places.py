"""Map tensor names of vlp models to those of other libraries: one set of rules for import and export."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
SHOWN = 5  # at most this many names in an error message


class ExchangeError(ValueError):
    """A checkpoint that cannot be read or converted; the message says why."""


@dataclass(frozen=True)
class Rule:
    r"""Maps names of our tensors to names in another library.

    Attributes:
        ours: regular expression that matches our whole name. If it has a group named "qkv", our tensor is that third of
            the other library's joint query-key-value projection.
        theirs: template of the other library's name, with \1, \2, ... for the groups of `ours`; several templates if
            the other library stores the tensor several times, as it does for shared tensors.
        transposed: whether their tensor is the transpose of ours.
        leading: number of leading dimensions of size 1 that their tensor has in addition to ours.
        channels: C if ours is the kernel of a convolution (D, C, P, P) and theirs a matrix (D, P * P * C) for patches;
            else 0.
    """

    ours: str
    theirs: str | tuple[str, ...]
    transposed: bool = False
    leading: int = 0
    channels: int = 0


@dataclass(frozen=True)
class Place:
    """Where another library stores one of our tensors.

    Attributes:
        name: their name.
        part: 0, 1 or 2 if our tensor is that third of theirs (query, key, value); None if it is the whole tensor.
        transposed: whether their tensor is the transpose of ours.
        leading, channels: as for `Rule`.
    """

    name: str
    part: int | None
    transposed: bool
    leading: int
    channels: int = 0

    def take(self, value: Tensor) -> Tensor:
        """Our tensor, from theirs."""
        if self.part is not None:
            value = value.chunk(3)[self.part]
        if self.transposed:
            value = value.T
        if self.channels:
            side = round((value.shape[-1] / self.channels) ** 0.5)
            value = value.unflatten(-1, (side, side, self.channels)).permute(0, 3, 1, 2)
        return value[(0,) * self.leading].contiguous()

    def give(self, value: Tensor) -> Tensor:
        """Their tensor (or the third of it that is ours), from ours."""
        if self.channels:
            value = value.permute(0, 2, 3, 1).flatten(1)
        return (value.T if self.transposed else value)[(None,) * self.leading].contiguous()


def places_of(name: str, rules: Iterable[Rule]) -> list[Place]:
    """The places of our tensor `name`, by the first rule that matches; an empty list if none does."""
    for rule in rules:
        if match := re.fullmatch(rule.ours, name):
            part = "qkv".index(match["qkv"]) if "qkv" in match.groupdict() else None
            names = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
            return [Place(match.expand(theirs), part, rule.transposed, rule.leading, rule.channels) for theirs in names]
    return []


def import_state(theirs: State, wanted: State, rules: Iterable[Rule], ignored: str = "") -> State:
    """Convert another library's tensors to those of a vlp model.

    Args:
        theirs: the other library's state dict.
        wanted: our names, with tensors of the expected shapes (on the "meta" device).
        rules: how names map; for each name, the first rule that matches is used.
        ignored: regular expression for names in `theirs` that are not needed; "" for none.

    Returns:
        Our state dict, with the names of `wanted`.

    Raises:
        ExchangeError: if tensors are missing, unexpected or of the wrong shape, or if tensors that should be shared
            differ.
    """
    result, used, missing, wrong, unequal = {}, set(), [], [], []
    for name, expected in wanted.items():
        places = places_of(name, rules)
        present = [place for place in places if place.name in theirs]
        if not present:
            missing.append(places[0].name if places else name)
            continue
        used |= {place.name for place in present}
        try:
            values = [place.take(theirs[place.name]) for place in present]
        except (IndexError, RuntimeError):  # another number of dimensions, or no patches of that shape
            wrong.append(f"{present[0].name} is {tuple(theirs[present[0].name].shape)}")
            continue
        if values[0].shape != expected.shape:
            shape, converted = tuple(theirs[present[0].name].shape), tuple(values[0].shape)
            wrong.append(f"{present[0].name} is {shape} (converted: {converted}, expected: {tuple(expected.shape)})")
        elif any(not torch.equal(values[0], other) for other in values[1:]):
            unequal.append(" and ".join(place.name for place in present))
        result[name] = values[0]
    unexpected = [name for name in theirs if name not in used and not (ignored and re.fullmatch(ignored, name))]
    problems = [
        f"{what}: {shortened(names)}"
        for what, names in (("missing", sorted(set(missing))), ("unexpected", sorted(unexpected)),
                            ("of the wrong shape", wrong), ("shared in BLIP but different here", unequal))
        if names
    ]  # fmt: skip
    if problems:
        raise ExchangeError("The checkpoint does not fit: " + "; ".join(problems) + ".")
    return result


def shortened(names: list[str]) -> str:
    """Names for a message, at most SHOWN of them."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def export_state(ours: State, rules: Iterable[Rule]) -> tuple[State, list[str]]:
    """Convert the tensors of a vlp model to another library's.

    Args:
        ours: our state dict.
        rules: how names map; for each name, the first rule that matches is used.

    Returns:
        The other library's state dict, and the names of our tensors that it cannot store.
    """
    result, parts, left_out = {}, {}, []
    for name, value in ours.items():
        places = places_of(name, rules)
        if not places:
            left_out.append(name)
        for place in places:
            if place.part is None:
                result[place.name] = place.give(value)
            else:
                parts.setdefault(place.name, {})[place.part] = place.give(value)
    for name, three in parts.items():
        result[name] = torch.cat([three[part] for part in range(3)])
    return result, left_out


def count(state: State, pattern: str) -> int:
    r"""Count the distinct numbers that `(\d+)` in a pattern matches, such as the layers of a tower."""
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    return len(found)


def require(state: State, *names: str) -> None:
    """Raise ExchangeError if any of these tensors, from which the architecture is inferred, is missing."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ExchangeError(f"The checkpoint does not fit: missing: {', '.join(missing)}.")


def heads_of(width: int, head_width: int = 64) -> int:
    """The number of attention heads of a tower, assuming heads of width 64 as in all published models.

    The number of heads cannot be inferred from tensor shapes.

    Args:
        width: hidden size of the tower.
        head_width: width of a head.

    Raises:
        ExchangeError: if the width is not a multiple of the head width.
    """
    if width % head_width:
        raise ExchangeError(
            f"A tower is {width} wide, which is not a multiple of {head_width}: pass --vision_heads or --text_heads."
        )
    return width // head_width
