"""Prompt templates and class names for zero-shot classification."""

from pathlib import Path

# The templates and names of OpenAI's notebooks (openai/CLIP, notebooks/ and data/prompts.md).
_PHOTO_KINDS = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

TEMPLATES = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "simple": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "imagenet": _PHOTO_KINDS,
    "emoji": ("{}", "This is a photo of {}.", "an emoji of {}", "a drawing of {}"),
    "emoji_vi": ("{}", "Đây là hình {}.", "biểu tượng cảm xúc {}", "hình vẽ {}"),
}


def read_names(path: Path) -> tuple[str, ...]:
    """Read a file with one name per line; lines that begin with # are skipped."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").split("\n"))
    return tuple(line for line in lines if line and not line.startswith("#"))


CLASS_NAMES = {path.stem: read_names(path) for path in sorted((Path(__file__).parent / "class_names").glob("*.txt"))}
CLASS_NAMES |= {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "fashion_mnist": (
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    "mnist": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
}


def prompts_for(names: list[str], templates: str | tuple[str, ...] = "name") -> list[list[str]]:
    """Fill class names into prompt templates.

    Args:
        names: the class names.
        templates: a key of `TEMPLATES`, or templates that each contain "{}" once.

    Returns:
        For each name, one prompt per template.

    Raises:
        ValueError: if the key is unknown, or a template does not contain "{}" once.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise ValueError(f"There are no templates {templates!r}; choose from {sorted(TEMPLATES)}.")
        templates = TEMPLATES[templates]
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f'A template must contain "{{}}" once, for the name: {template!r}.')
    return [[template.format(name) for template in templates] for name in names]
