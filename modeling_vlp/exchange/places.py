"""Where each tensor of a vlp model stands in another library's file: one description, for reading and for writing."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
SHOWN = 5  # names in an error message


class ExchangeError(ValueError):
    """A checkpoint that does not fit; the message names the tensors."""


@dataclass(frozen=True)
class Rule:
    r"""Our tensors' names, as a pattern that matches the whole of them, and their name there.

    Attributes:
        ours: a regular expression; where it has a group named "qkv", ours is that third of their joint projection.
        theirs: their name, in which \1 and the like stand for groups; several names where the tensor stands in several
            places, as shared ones do.
        transposed: it is the transpose of ours.
        leading: dimensions of size 1 that it has before ours.
    """

    ours: str
    theirs: str | tuple[str, ...]
    transposed: bool = False
    leading: int = 0


@dataclass(frozen=True)
class Place:
    """Where one tensor stands: under a name, perhaps as one of three parts."""

    name: str
    part: int | None
    transposed: bool
    leading: int

    def take(self, value: Tensor) -> Tensor:
        """Ours from theirs."""
        if self.part is not None:
            value = value.chunk(3)[self.part]
        if self.transposed:
            value = value.T
        return value[(0,) * self.leading].contiguous()

    def give(self, value: Tensor) -> Tensor:
        """Theirs from ours, or their part."""
        return (value.T if self.transposed else value)[(None,) * self.leading].contiguous()


def places_of(name: str, rules: Iterable[Rule]) -> list[Place]:
    """Where our tensor `name` stands, by the first rule that fits; nowhere where none does."""
    for rule in rules:
        if match := re.fullmatch(rule.ours, name):
            part = "qkv".index(match["qkv"]) if "qkv" in match.groupdict() else None
            names = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
            return [Place(match.expand(theirs), part, rule.transposed, rule.leading) for theirs in names]
    return []


def read(theirs: State, wanted: State, rules: Iterable[Rule], ignored: str = "") -> State:
    """The tensors of a vlp model from another library's.

    Args:
        wanted: our names, with tensors of the right shapes (on "meta").
        ignored: a pattern of names of theirs that hold nothing to be kept.

    Raises ExchangeError for what is missing, unexpected, of another shape, or should be shared and is not equal.
    """
    result, used, missing, wrong, unequal = {}, set(), [], [], []
    for name, like in wanted.items():
        places = places_of(name, rules)
        present = [place for place in places if place.name in theirs]
        if not present:
            missing.append(places[0].name if places else name)
            continue
        used |= {place.name for place in present}
        try:
            values = [place.take(theirs[place.name]) for place in present]
        except IndexError:
            wrong.append(f"{present[0].name} is {tuple(theirs[present[0].name].shape)}")
            continue
        if values[0].shape != like.shape:
            shape = tuple(theirs[present[0].name].shape)
            wrong.append(f"{present[0].name} is {shape}, which gives {tuple(values[0].shape)}, not {tuple(like.shape)}")
        elif any(not torch.equal(values[0], other) for other in values[1:]):
            unequal.append(" and ".join(place.name for place in present))
        result[name] = values[0]
    unexpected = [name for name in theirs if name not in used and not (ignored and re.fullmatch(ignored, name))]
    problems = [
        f"{what}: {shortened(names)}"
        for what, names in (("missing", sorted(set(missing))), ("unexpected", sorted(unexpected)),
                            ("of the wrong shape", wrong), ("shared in BLIP but not equal here", unequal))
        if names
    ]  # fmt: skip
    if problems:
        raise ExchangeError("The checkpoint does not fit: " + "; ".join(problems) + ".")
    return result


def shortened(names: list[str]) -> str:
    """Names for a message, not more than a few of them."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def write(ours: State, rules: Iterable[Rule]) -> tuple[State, list[str]]:
    """Another library's tensors from those of a vlp model, and the names of ours that have no place there."""
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
    r"""How many numbers stand where a pattern has `(\d+)`: the layers of a tower."""
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    return len(found)


def require(state: State, *names: str) -> None:
    """Raise ExchangeError unless these tensors are there, from which the architecture is inferred."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ExchangeError(f"The checkpoint does not fit: missing: {', '.join(missing)}.")


def heads_of(width: int, head_width: int = 64) -> int:
    """Attention heads, which shapes do not show: all published models have heads of 64."""
    if width % head_width:
        raise ExchangeError(
            f"A tower is {width} wide, no multiple of {head_width}: tell its heads by --vision_heads or --text_heads."
        )
    return width // head_width
