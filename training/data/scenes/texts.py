"""What is said about scenes, in English and Vietnamese: captions, questions with answers, and statements."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .world import COLOURS, INVERSE, SHAPES, Scene, Thing

LANGUAGES = ("en", "vi")
VIETNAMESE = {
    "circle": "hình tròn", "square": "hình vuông", "triangle": "hình tam giác", "star": "hình ngôi sao",
    "heart": "hình trái tim", "cross": "hình chữ thập", "ring": "hình vành khuyên",
    "red": "màu đỏ", "orange": "màu cam", "yellow": "màu vàng", "green": "màu xanh lá", "blue": "màu xanh dương",
    "purple": "màu tím", "pink": "màu hồng",
    "striped": "kẻ sọc", "dotted": "chấm bi", "plain": "trơn", "small": "nhỏ", "large": "to",
    "left": "bên trái", "right": "bên phải", "above": "phía trên", "below": "phía dưới", "inside": "bên trong",
    "around": "bao quanh", "behind": "phía sau", "front": "phía trước",
    "yes": "có", "no": "không", "zero": "không", "one": "một", "two": "hai", "three": "ba",
}  # fmt: skip
NUMBERS = ("zero", "one", "two", "three")
ENGLISH = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below",
           "inside": "inside", "around": "around", "behind": "behind", "front": "in front of"}  # fmt: skip
PLACES = {
    ("top", "left"): ("at the top left", "ở trên bên trái"), ("top", "middle"): ("at the top", "ở trên"),
    ("top", "right"): ("at the top right", "ở trên bên phải"), ("middle", "left"): ("on the left", "ở bên trái"),
    ("middle", "middle"): ("in the middle", "ở giữa"), ("middle", "right"): ("on the right", "ở bên phải"),
    ("bottom", "left"): ("at the bottom left", "ở dưới bên trái"), ("bottom", "middle"): ("at the bottom", "ở dưới"),
    ("bottom", "right"): ("at the bottom right", "ở dưới bên phải"),
}  # fmt: skip
# {0} and {2} are objects, {1} is the relation of the first to the second.
CAPTIONS = {
    "en": ("{0} {1} {2}", "a picture of {0} {1} {2}", "there is {0} {1} {2}", "{0} is {1} {2}", "we see {0} {1} {2}"),
    "vi": ("{0} ở {1} {2}", "bức tranh có {0} ở {1} {2}", "có {0} nằm {1} {2}", "{0} nằm {1} {2}"),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: what, colour, how many, is there, or where.
        question, answer: in English.
        question_vi, answer_vi: in Vietnamese.
    """

    kind: str
    question: str
    answer: str
    question_vi: str
    answer_vi: str


# --- captions ---------------------------------------------------------------------------------------------------------


def noun(kind: tuple[str, str], language: str, more: tuple[str, ...] = ()) -> str:
    """The words for an object, without an article.

    Args:
        kind: colour and shape.
        language: one of LANGUAGES.
        more: its size and its texture, if they are mentioned.
    """
    colour, shape = kind
    if language == "en":
        return " ".join([*more, colour, shape])
    sizes, textures = ([VIETNAMESE[word] for word in more if (word in ("small", "large")) == size] for size in (1, 0))
    return " ".join([VIETNAMESE[shape], *sizes, VIETNAMESE[colour], *textures])


def with_article(words: str, language: str) -> str:
    """Put an indefinite article in front of a noun."""
    if language == "vi":
        return f"một {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def related(relation: str, language: str) -> str:
    """The words for a relation."""
    return ENGLISH[relation] if language == "en" else VIETNAMESE[relation]


def caption(one: tuple, relation: str, other: tuple, language: str, wording: str, more: tuple = ((), ())) -> str:
    """A caption.

    Args:
        one, other: colour and shape of the two objects.
        relation: of the first to the second, a key of INVERSE.
        language: one of LANGUAGES.
        wording: one of CAPTIONS.
        more: what is mentioned of each object besides.
    """
    first, second = (with_article(noun(kind, language, words), language)
                     for kind, words in zip((one, other), more, strict=True))  # fmt: skip
    text = wording.format(first, related(relation, language), second)
    return text.replace("ở bao quanh", "bao quanh").replace("nằm bao quanh", "bao quanh")


def captions(scene: Scene, language: str, count: int, rng: random.Random) -> list[str]:
    """Captions of a scene, in different wordings, from the view of the first or of the second object."""
    found = []
    for wording in rng.sample(CAPTIONS[language], count):
        one, other, relation = scene.first, scene.second, scene.relation
        if rng.random() < 0.3:
            one, other, relation = other, one, INVERSE[relation]
        more = tuple(mentioned(each, rng) for each in (one, other))
        found.append(caption(one.kind, relation, other.kind, language, wording, more))
    return found


def description(scene: Scene, language: str, place_first: bool, rng: random.Random) -> str:
    """All objects with all that is to be said of them, each after the place where it is, or before it."""
    parts = []
    for thing in rng.sample(scene.things, len(scene.things)):
        row = "top" if thing.y < 0.4 else "bottom" if thing.y > 0.6 else "middle"
        column = "left" if thing.x < 0.4 else "right" if thing.x > 0.6 else "middle"
        place = PLACES[row, column][LANGUAGES.index(language)]
        more = (thing.size, thing.texture) if thing.texture != "plain" else (thing.size,)
        words = with_article(noun(thing.kind, language, more), language)
        parts.append(f"{place} {words}" if place_first else f"{words} {place}")
    return ", ".join(parts)


def mentioned(thing: Thing, rng: random.Random) -> tuple[str, ...]:
    """What a caption mentions of an object besides its colour and its shape."""
    words = [thing.size] if rng.random() < 0.25 else []
    return (*words, thing.texture) if thing.texture != "plain" and rng.random() < 0.3 else tuple(words)


def swapped(scene: Scene, kind: str) -> tuple[tuple, str, tuple] | None:
    """The two objects and the relation of a false caption that has the words of the true one.

    Args:
        scene: the scene.
        kind: "colours": the objects have each other's colour; "order": each has the other's place.

    Returns:
        Colour and shape of the first object, the relation, colour and shape of the second; None if the scene has no
        such caption, or it would be true.
    """
    one, other = scene.first, scene.second
    if kind == "order":
        return other.kind, scene.relation, one.kind
    false = (other.colour, one.shape), (one.colour, other.shape)
    if one.colour == other.colour or one.shape == other.shape or any(scene.find(*each) for each in false):
        return None
    return false[0], scene.relation, false[1]


# --- questions --------------------------------------------------------------------------------------------------------


def questions(scene: Scene, split: str, rng: random.Random) -> list[Question]:
    """One question of each kind that can be asked about a scene, and a second one about its relations.

    Every question names an object that is, or whose counterpart in the picture is, a combination of the split.
    """
    own = [thing for thing in scene.things if thing.split == split]
    makers = (ask_what, ask_colour, ask_how_many, ask_is_there, ask_is_there_related, ask_where)
    return [question for maker in makers if (question := maker(scene, own, rng)) is not None]


def translated(kind: str, text: str, answer: str, text_vi: str, answer_vi: str | None = None) -> Question:
    """A question whose answer is one word with a translation, unless `answer_vi` is given."""
    return Question(kind, text, answer, text_vi, VIETNAMESE[answer] if answer_vi is None else answer_vi)


def ask_what(scene: Scene, own: list[Thing], rng: random.Random) -> Question | None:
    """What is to the left of the red circle? - a combination of the split, the only object there."""
    found = []
    for other in scene.things:
        places = {each: scene.between(each, other) for each in scene.things if each is not other}
        if None in places.values():
            continue
        for each, place in places.items():
            if each in own and list(places.values()).count(place) == 1:
                found.append((each, place, other))
    if not found:
        return None
    each, place, other = rng.choice(found)
    there, there_vi = related(place, "en"), related(place, "vi")
    other_en, other_vi = noun(other.kind, "en"), noun(other.kind, "vi")
    text = rng.choice(("what is {0} the {1}?", "what do you see {0} the {1}?")).format(there, other_en)
    text_vi = rng.choice(("cái gì ở {0} {1}?", "ở {0} {1} có gì?")).format(there_vi, other_vi)
    return translated("what", text, noun(each.kind, "en"), text_vi.replace("ở bao quanh", "bao quanh"),
                      noun(each.kind, "vi"))  # fmt: skip


def ask_colour(scene: Scene, own: list[Thing], rng: random.Random) -> Question | None:
    """Which colour is the circle? - the only circle, or the only large, small, striped or dotted one."""
    found = []
    for thing in own:
        same = scene.find(shape=thing.shape)
        if len(same) == 1:
            found.append((thing, ()))
            continue
        for word in (thing.size, thing.texture):
            if word != "plain" and sum(word in (each.size, each.texture) for each in same) == 1:
                found.append((thing, (word,)))
    if not found:
        return None
    thing, more = rng.choice(found)
    words, words_vi = " ".join([*more, thing.shape]), " ".join([VIETNAMESE[w] for w in (thing.shape, *more)])
    text = rng.choice(("which colour is the {0}?", "what colour does the {0} have?")).format(words)
    return translated("colour", text, thing.colour, rng.choice(("{0} màu gì?", "{0} có màu nào?")).format(words_vi))


def ask_how_many(scene: Scene, own: list[Thing], rng: random.Random) -> Question | None:
    """How many circles, red objects or objects are there?"""
    thing = rng.choice(own)
    if rng.random() < 0.5:
        thing = max(own, key=lambda each: (len(scene.find(shape=each.shape)), len(scene.find(each.colour))))
    kinds: tuple[tuple[str, str, int], ...] = (
        (plural(thing.shape), VIETNAMESE[thing.shape], len(scene.find(shape=thing.shape))),
        (f"{thing.colour} objects", f"vật {VIETNAMESE[thing.colour]}", len(scene.find(thing.colour))),
        ("objects", "vật", len(scene.things)),
    )
    if rng.random() < 0.15:
        absent = rng.choice(SHAPES)
        kinds = ((plural(absent), VIETNAMESE[absent], len(scene.find(shape=absent))),)
    words, words_vi, count = rng.choice(kinds)
    text = rng.choice(("how many {0} are there?", "how many {0} do you see?")).format(words)
    text_vi = rng.choice(("có bao nhiêu {0}?", "trong tranh có mấy {0}?")).format(words_vi)
    return translated("how many", text, NUMBERS[count], text_vi)


def plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def ask_is_there(scene: Scene, own: list[Thing], rng: random.Random) -> Question | None:
    """Is there a red circle? - if not, there is something red, or a circle."""
    thing = rng.choice(own)
    kind, answer = thing.kind, "yes"
    if rng.random() < 0.5:
        others = [(colour, thing.shape) for colour in COLOURS] + [(thing.colour, shape) for shape in SHAPES]
        if rng.random() < 0.5:  # both are in the picture, but not together
            others = [(one.colour, other.shape) for one in scene.things for other in scene.things] + others[:1]
        others = [each for each in others if not scene.find(*each)]
        if not others:
            return None
        kind, answer = rng.choice(others), "no"
    text = rng.choice(("is there {0}?", "do you see {0}?")).format(with_article(noun(kind, "en"), "en"))
    text_vi = rng.choice(("có {0} không?", "trong tranh có {0} không?")).format(noun(kind, "vi"))
    return translated("is there", text, answer, text_vi)


def ask_is_there_related(scene: Scene, own: list[Thing], rng: random.Random) -> Question | None:
    """Is there a red circle to the left of a blue star? - if not, the places are swapped, or one is not there."""
    found = clear_places(scene, own)
    if not found:
        return None
    one, other, place = rng.choice(found)
    kinds, answer = (one.kind, other.kind), "yes"
    if rng.random() < 0.5:
        answer, way = "no", rng.random()
        if way < 0.5:
            place = INVERSE[place]
        elif way < 0.75 and (absent := other_colour(scene, one, rng)) is not None:
            kinds = absent, other.kind
        elif (absent := other_colour(scene, other, rng)) is not None:
            kinds = one.kind, absent
        else:
            place = INVERSE[place]
    words = [caption(kinds[0], place, kinds[1], language, CAPTIONS[language][0]) for language in LANGUAGES]
    text = rng.choice(("is there {0}?", "do you see {0}?")).format(words[0])
    text_vi = rng.choice(("có {0} không?", "trong tranh có {0} không?")).format(words[1].removeprefix("một "))
    return translated("is there", text, answer, text_vi)


def clear_places(scene: Scene, own: list[Thing]) -> list[tuple[Thing, Thing, str]]:
    """Pairs of objects, one of them in `own`, whose relation is clear, with the relation."""
    return [(one, other, place) for one in scene.things for other in scene.things
            if one is not other and (one in own or other in own)
            and (place := scene.between(one, other)) is not None]  # fmt: skip


def other_colour(scene: Scene, thing: Thing, rng: random.Random) -> tuple[str, str] | None:
    """An object's shape in a colour of another object, which the scene does not have; None if there is none."""
    found = [(each.colour, thing.shape) for each in scene.things if not scene.find(each.colour, thing.shape)]
    return rng.choice(found) if found else None


def ask_where(scene: Scene, own: list[Thing], rng: random.Random) -> Question | None:
    """Where is the red circle, seen from the blue star?"""
    found = clear_places(scene, own)
    if not found:
        return None
    one, other, place = rng.choice(found)
    text = rng.choice(("where is the {0}, seen from the {1}?", "where is the {0} relative to the {1}?"))
    text_vi = rng.choice(("{0} ở đâu so với {1}?", "so với {1} thì {0} ở đâu?"))
    return translated(
        "where", text.format(noun(one.kind, "en"), noun(other.kind, "en")), "in front" if place == "front" else place,
        text_vi.format(noun(one.kind, "vi"), noun(other.kind, "vi")), VIETNAMESE[place],
    )  # fmt: skip


# --- statements about two scenes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """A statement about two scenes.

    Attributes:
        text, text_vi: in English and Vietnamese.
        holds: whether it is true of the left and the right scene.
    """

    text: str
    text_vi: str
    holds: Callable[[Scene, Scene], bool]


def statement(form: Callable, left: Scene, right: Scene, split: str, rng: random.Random) -> Statement:
    """A statement of a form (one of FORMS) that is about an object of one of two scenes, a combination of the split."""
    scene = rng.choice((left, right))
    own = [thing for thing in scene.things if thing.split == split]
    return form(rng.choice(own), scene, rng)


def state_both(thing: Thing, scene: Scene, rng: random.Random) -> Statement:
    """There is a red circle in both pictures."""
    return Statement(
        f"both pictures have {with_article(noun(thing.kind, 'en'), 'en')}",
        f"cả hai bức tranh đều có {noun(thing.kind, 'vi')}",
        lambda left, right: bool(left.find(*thing.kind) and right.find(*thing.kind)),
    )


def state_both_shape(thing: Thing, scene: Scene, rng: random.Random) -> Statement:
    """There is a circle in both pictures."""
    shape = thing.shape
    return Statement(
        f"both pictures have {with_article(shape, 'en')}", f"cả hai bức tranh đều có {VIETNAMESE[shape]}",
        lambda left, right: bool(left.find(shape=shape) and right.find(shape=shape)),
    )  # fmt: skip


def state_both_colour(thing: Thing, scene: Scene, rng: random.Random) -> Statement:
    """There is something red in both pictures."""
    colour = thing.colour
    return Statement(
        f"both pictures have something {colour}", f"cả hai bức tranh đều có vật {VIETNAMESE[colour]}",
        lambda left, right: bool(left.find(colour) and right.find(colour)),
    )  # fmt: skip


def state_one(thing: Thing, scene: Scene, rng: random.Random) -> Statement:
    """One picture, and not the other, has a red circle."""
    return Statement(
        f"exactly one picture has {with_article(noun(thing.kind, 'en'), 'en')}",
        f"chỉ một bức tranh có {noun(thing.kind, 'vi')}",
        lambda left, right: bool(left.find(*thing.kind)) != bool(right.find(*thing.kind)),
    )


def state_more(thing: Thing, scene: Scene, rng: random.Random) -> Statement:
    """The left picture has more objects than the right one."""
    side = rng.choice(("left", "right"))
    other = INVERSE[side]

    def holds(left: Scene, right: Scene) -> bool:
        counts = {"left": len(left.things), "right": len(right.things)}
        return counts[side] > counts[other]

    return Statement(
        f"the {side} picture has more objects than the {other} one",
        f"bức tranh {VIETNAMESE[side]} có nhiều vật hơn bức tranh {VIETNAMESE[other]}",
        holds,
    )


def state_sum(count: int, thing: Thing, scene: Scene, rng: random.Random) -> Statement:
    """There are three circles in the two pictures together."""
    shape = thing.shape
    words = f"{'is' if count == 1 else 'are'} {NUMBERS[count]} {shape if count == 1 else plural(shape)}"
    return Statement(
        f"there {words} in the two pictures together",
        f"hai bức tranh có tất cả {VIETNAMESE[NUMBERS[count]]} {VIETNAMESE[shape]}",
        lambda left, right: len(left.find(shape=shape)) + len(right.find(shape=shape)) == count,
    )


def state_side(thing: Thing, scene: Scene, rng: random.Random) -> Statement:
    """In the left picture, a red circle is above a blue star."""
    side, others = rng.choice(("left", "right")), [each for each in scene.things if each is not thing]
    other = rng.choice(others)
    place = scene.between(thing, other) or "left"
    if rng.random() < 0.4:
        place = INVERSE[place]

    def holds(left: Scene, right: Scene) -> bool:
        shown = left if side == "left" else right
        return any(shown.between(one, two) == place for one in shown.find(*thing.kind)
                   for two in shown.find(*other.kind))  # fmt: skip

    words = [caption(thing.kind, place, other.kind, language, CAPTIONS[language][3]) for language in LANGUAGES]
    return Statement(f"in the {side} picture, {words[0]}", f"trong bức tranh {VIETNAMESE[side]}, {words[1]}", holds)


# A statement of each form is as often true as false.
FORMS = (
    state_both, state_both_shape, state_both_colour, state_one, state_more, partial(state_sum, 1),
    partial(state_sum, 2), partial(state_sum, 3), state_side, state_side,
)  # fmt: skip
