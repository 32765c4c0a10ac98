"""The world of the scenes: objects, where they are, and the combinations of attributes of each split."""

import math
import random
from dataclasses import dataclass, replace

# Lengths are shares of the side of the picture; x grows to the right, y downwards.

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
TEXTURES = ("plain", "striped", "dotted")
LOOKS = [(shape, colour, texture) for shape in SHAPES for colour in COLOURS for texture in TEXTURES]
RADII = {"small": (0.105, 0.125), "large": (0.175, 0.205)}
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above", "inside": "around",
           "around": "inside", "behind": "front", "front": "behind"}  # fmt: skip
PAIRED = ("left", "above", "inside", "behind")  # relations that a scene is built around
MOST_OBJECTS = 3
CLEAR = 1.5  # how much longer the one direction must be than the other to say "left of" or "above"
TRIES = 60

SPLITS = ("train", "validation", "test")


def split_of(shape: str, colour: str, texture: str) -> str:
    """The split that a combination of shape, colour and texture belongs to.

    Of each shape, two colours have a texture that only the test split shows, and one that only the validation split
    does; so it is for each colour. They are 14 and 7 of the 147 combinations.
    """
    row, column = SHAPES.index(shape), COLOURS.index(colour)
    kept = {0: "test", 3: "test", 5: "validation"}.get((row + 2 * column) % 7, "train")
    return kept if TEXTURES.index(texture) == (row + column) % 3 else "train"


@dataclass(frozen=True)
class Thing:
    """An object of a scene.

    Attributes:
        shape, colour, size, texture: one of SHAPES, COLOURS, RADII and TEXTURES.
        x, y: its centre.
        radius: radius of the circle around it.
    """

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> tuple[str, str]:
        """Colour and shape, which no two objects of a scene share."""
        return self.colour, self.shape

    @property
    def split(self) -> str:
        """The split that its combination of shape, colour and texture belongs to."""
        return split_of(self.shape, self.colour, self.texture)


@dataclass(frozen=True)
class Scene:
    """A scene.

    Attributes:
        things: the objects, the farthest first; each hides those before it.
        first, second: two of them, which the captions name.
        relation: of `first` to `second`, one of PAIRED.
    """

    things: tuple[Thing, ...]
    first: Thing
    second: Thing
    relation: str

    def between(self, one: Thing, other: Thing) -> str | None:
        """How `one` is placed relative to `other`, a key of INVERSE; None if that is not clear."""
        if (one, other) == (self.first, self.second):
            return self.relation
        if (one, other) == (self.second, self.first):
            return INVERSE[self.relation]
        return direction(one, other)

    def find(self, colour: str | None = None, shape: str | None = None) -> list[Thing]:
        """The objects of a colour, of a shape, or of both."""
        return [each for each in self.things if colour in (None, each.colour) and shape in (None, each.shape)]


def direction(one: Thing, other: Thing) -> str | None:
    """On which side of `other` the object `one` is; None if that is not clear."""
    dx, dy = one.x - other.x, one.y - other.y
    if abs(dx) > CLEAR * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > CLEAR * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def make_scene(split: str, rng: random.Random) -> Scene:
    """Draw a random scene.

    Args:
        split: one of SPLITS. The first object, at least, is a combination of the split; the others are combinations of
            the split or of the training split.
        rng: source of the random choices.
    """
    own = [look for look in LOOKS if split_of(*look) == split]
    shown = [look for look in LOOKS if split_of(*look) in (split, "train")]
    while True:
        chosen = [rng.choice(own)]
        wanted = rng.randint(2, MOST_OBJECTS)
        while len(chosen) < wanted:
            # Objects that share a shape or a colour with another one make questions that both are needed for.
            far = [look for look in shown if all(look[:2] != each[:2] for each in chosen)]
            near = [look for look in far if any(set(look[:2]) & set(each[:2]) for each in chosen)]
            chosen.append(rng.choice(near if near and rng.random() < 0.4 else far))
        relation = rng.choice(PAIRED)
        if (pair := place_pair(chosen[0], chosen[1], relation, rng)) is None:
            continue
        things = list(pair)
        for look in chosen[2:]:
            if (thing := place(look, things, rng)) is not None:
                things.append(thing)
        first, second = pair
        order = [second, first, *things[2:]] if relation == "inside" else things  # what is behind is drawn first
        return Scene(tuple(order), first, second, relation)


def a_thing(look: tuple, size: str, x: float, y: float, rng: random.Random, radius: float = 0.0) -> Thing:
    """An object of a shape, a colour and a texture; its radius is that of its size unless it is given."""
    return Thing(*look[:2], size, look[2], x, y, radius or rng.uniform(*RADII[size]))


def place_pair(one: tuple, other: tuple, relation: str, rng: random.Random) -> tuple[Thing, Thing] | None:
    """Place two objects in a relation; None if the random places do not fit."""
    if relation == "inside":
        radius = rng.uniform(0.27, 0.32)
        x, y = rng.uniform(0.34, 0.66), rng.uniform(0.34, 0.66)
        around = a_thing(other, "large", x, y, rng, radius)
        return a_thing(one, "small", x, y, rng), around
    first = a_thing(one, rng.choice(tuple(RADII)), 0, 0, rng)
    second = a_thing(other, rng.choice(tuple(RADII)), 0, 0, rng)
    if relation == "behind":
        first = a_thing(one, "large", 0, 0, rng)
        for _ in range(TRIES):
            first = moved(first, rng)
            angle, reach = rng.uniform(0, math.tau), first.radius + 0.2 * second.radius
            second = moved(second, rng, first.x + reach * math.cos(angle), first.y + reach * math.sin(angle))
            if is_within(second):
                return first, second
        return None
    for _ in range(TRIES):
        first, second = moved(first, rng), moved(second, rng)
        if direction(first, second) == relation and are_apart(first, second):
            return first, second
    return None


def moved(thing: Thing, rng: random.Random, x: float | None = None, y: float | None = None) -> Thing:
    """The object at a place, or at a random one."""
    room = thing.radius + 0.02
    x = rng.uniform(room, 1 - room) if x is None else x
    y = rng.uniform(room, 1 - room) if y is None else y
    return replace(thing, x=x, y=y)


def is_within(thing: Thing) -> bool:
    """Whether the picture shows the whole object."""
    return all(thing.radius <= place <= 1 - thing.radius for place in (thing.x, thing.y))


def are_apart(one: Thing, other: Thing) -> bool:
    """Whether two objects do not touch."""
    return math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius + 0.02


def place(look: tuple, things: list[Thing], rng: random.Random) -> Thing | None:
    """Place another object where it touches none; None if there is no room."""
    for size in rng.sample(tuple(RADII), 2):
        thing = a_thing(look, size, 0, 0, rng)
        for _ in range(TRIES):
            thing = moved(thing, rng)
            if all(are_apart(thing, each) for each in things):
                return thing
    return None
