"""`vlp space MODEL TARGET`: write a Space of the hub with a page for a trained CLIP, BLIP or BLIP-2.

The folder has the page (app.py), requirements.txt, a README with the Space's header, and the model with its code, so
that vlp need not be installed. Try it with `python TARGET/app.py`, and publish it with
`hf upload OWNER/NAME TARGET --repo-type space`.
"""

import argparse
import importlib.metadata
import json
import shutil
from pathlib import Path

from huggingface_hub import SpaceCard

from ..conversion import own_copy
from ..errors import CommandParser, UnsupportedModelError, printable, reported_errors
from ..files import check_output, usable_path, write_whole
from ..loading import licence_of, load_model, load_processor, read_config, row_of

APP = Path(__file__).with_name("space_app.py")
UNSUPPORTED = ("VlpBlip2ForPreTraining", "VlpBlip2ForImageTextRetrieval")  # stage 1, which stage 2 follows
REQUIREMENTS = ("ftfy", "numpy", "pillow", "torch", "torchvision", "transformers")  # of the model's code
GRADIO = "6.31.0"  # if it is not installed here


def header(title: str, licence: str | None) -> str:
    """The README of a Space.

    Args:
        title: name of the model.
        licence: the hub's identifier of the model's licence; None if it is not known.
    """
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        version = GRADIO
    fields = {
        "title": json.dumps(title),
        "sdk": "gradio",
        "sdk_version": version,
        "app_file": "app.py",
        "license": licence,
    }
    lines = [f"{name}: {value}" for name, value in fields.items() if value]
    text = "\n".join(["---", *lines, "---", "", f"# {title}", "", "A page for a model that was trained with vlp.", ""])
    SpaceCard(text)  # raises if the header is not valid YAML
    return text


def requirements() -> str:
    """The packages that the page needs, in the versions that are installed here or newer ones of the same major one."""
    lines = []
    for name in REQUIREMENTS:
        version = importlib.metadata.version(name).partition("+")[0]
        lines.append(f"{name}>={version},<{int(version.split('.')[0]) + 1}")
    return "\n".join(lines) + "\n"


def write_space(name: str, target: str | Path) -> Path:
    """Write a Space, completely or not at all.

    Args:
        name: folder or hub name of a CLIP, BLIP or BLIP-2 of vlp, transformers or open_clip. A BLIP-2 must be one after
            stage 2; its language model is written, too.
        target: the folder to write.

    Returns:
        The folder that was written.

    Raises:
        UnsupportedModelError: if it is another model, or cannot be loaded.
        ArgumentError: if the target contains other files.
    """
    check_output(target, "TARGET", [str(name)])
    given, name = name, own_copy(name, "MODEL")
    config = read_config(name, "MODEL")
    row = row_of(name, config, "MODEL")
    if row.model.__name__ in UNSUPPORTED:
        raise UnsupportedModelError(
            f"{printable(given, 120)} is a {row.model.__name__}, a BLIP-2 after stage 1, for which there is no page; "
            "train stage 2 from it."
        )
    model, processor = load_model(row.model, name, "MODEL"), load_processor(name, "MODEL")
    if hasattr(model.config, "store_language_model"):
        model.config.store_language_model, model.config.language_model_name_or_path = True, None
    title, licence = printable(Path(given).name, 60), licence_of(name)

    def write(fresh: Path) -> None:
        for part in (model, processor):
            part.save_pretrained(fresh / "model", bundle=True)
        shutil.copyfile(APP, fresh / "app.py")
        (fresh / "README.md").write_text(header(title, licence), encoding="utf-8")
        (fresh / "requirements.txt").write_text(requirements(), encoding="utf-8")

    return write_whole(usable_path(target, "TARGET"), write)


def main() -> None:
    parser = CommandParser(
        prog="vlp space", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("model", help="folder or hub name of a CLIP, BLIP or BLIP-2")
    parser.add_argument("target", help="folder to write")
    options = parser.parse_args()
    with reported_errors():
        folder = printable(write_space(options.model, options.target))
        print(f"Wrote {folder}. To try it: pip install gradio, then python {folder}/app.py")


if __name__ == "__main__":
    main()
