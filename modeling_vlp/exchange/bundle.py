"""A model's own code, put into its folder, so that those who have transformers alone can load it.

`AutoModel.from_pretrained(NAME, trust_remote_code=True)` copies the files of one folder that import each other as
`.name`. So the modules of the package that a model needs are laid side by side: `modeling_vlp/clip.py` becomes
`modeling_vlp_clip.py`, and imports are renamed to match. Nothing is written twice by hand.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("configuration", "modeling_vlp", "processing")
IMPORT = re.compile(r"^(\s*from )(\.{1,2})([\w.]+)( import )", re.MULTILINE)

CONFIGURATIONS = {
    "vlp_clip": "configuration_clip.VlpClipConfig",
    "vlp_blip": "configuration_blip.VlpBlipConfig",
    "vlp_blip2": "configuration_blip2.VlpBlip2Config",
}
# The modules of the architectures.
MODELS = {
    "VlpClipModel": "modeling_vlp_clip",
    "VlpBlipForPreTraining": "modeling_vlp_blip",
    "VlpBlipForImageTextRetrieval": "modeling_vlp_blip",
    "VlpBlipForConditionalGeneration": "modeling_vlp_blip_captioner",
    "VlpBlipForQuestionAnswering": "modeling_vlp_blip_tasks",
    "VlpBlipForVisualReasoning": "modeling_vlp_blip_tasks",
    "VlpBlip2ForPreTraining": "modeling_vlp_blip2",
    "VlpBlip2ForImageTextRetrieval": "modeling_vlp_blip2",
    "VlpBlip2ForConditionalGeneration": "modeling_vlp_blip2_writer",
}
WRITERS = {
    "VlpBlipForPreTraining": "modeling_vlp_blip_captioner.VlpBlipForConditionalGeneration",
    "VlpBlipForConditionalGeneration": "modeling_vlp_blip_captioner.VlpBlipForConditionalGeneration",
    "VlpBlip2ForConditionalGeneration": "modeling_vlp_blip2_writer.VlpBlip2ForConditionalGeneration",
}
PROCESSING = {
    "VlpClipProcessor": "processing_clip", "VlpClipImageProcessor": "processing_clip",
    "VlpBlipProcessor": "processing_blip", "VlpBlipImageProcessor": "processing_blip",
    "VlpBlip2Processor": "processing_blip2", "VlpClipTokenizer": "processing_tokenizer",
}  # fmt: skip


def model_map(config: dict) -> dict[str, str]:
    """Where the classes are that a config.json needs, for the Auto classes."""
    architecture = config["architectures"][0]
    place = f"{MODELS[architecture]}.{architecture}"
    places = {"AutoConfig": CONFIGURATIONS[config["model_type"]], "AutoModel": place}
    if architecture == "VlpClipModel":
        places["AutoModelForZeroShotImageClassification"] = place
    if architecture in WRITERS:
        places["AutoModelForImageTextToText"] = WRITERS[architecture]
    return places


def processor_map(content: dict) -> dict[str, str]:
    """The same of a processor_config.json (or a preprocessor_config.json)."""
    images = content.get("image_processor", content).get("image_processor_type")
    names = {"AutoProcessor": content.get("processor_class"), "AutoImageProcessor": images}
    return {auto: f"{PROCESSING[name]}.{name}" for auto, name in names.items() if name in PROCESSING}


def tokenizer_map(content: dict) -> dict[str, list]:
    """The same of a tokenizer_config.json; a tokenizer of transformers' own classes needs none."""
    name = content.get("tokenizer_class")
    return {"AutoTokenizer": [None, f"{PROCESSING[name]}.{name}"]} if name in PROCESSING else {}


MAPS = {
    "config.json": model_map,
    "processor_config.json": processor_map,
    "preprocessor_config.json": processor_map,
    "tokenizer_config.json": tokenizer_map,
}


def add_code(folder: str | Path) -> list[str]:
    """Put the code that a saved model, or its processor, needs into its folder; returns the names of the files."""
    folder, written = Path(folder), {}
    for name, auto_map_of in MAPS.items():
        path = folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
        auto_map = auto_map_of(content)
        if not auto_map:
            continue
        content["auto_map"] = auto_map
        if "image_processor" in content:
            content["image_processor"]["auto_map"] = auto_map
        path.write_text(json.dumps(content, indent=2) + "\n")
        for place in auto_map.values():
            place = place if isinstance(place, str) else place[-1]
            lay_flat(place.split(".")[0], written)
    for name, text in written.items():
        (folder / name).write_text(text)
    return sorted(written)


def lay_flat(name: str, written: dict[str, str]) -> None:
    """Add a module under its flat name, and those that it imports."""
    if f"{name}.py" in written:
        return
    room = next(room for room in ROOMS if name.startswith(f"{room}_"))
    found: list[str] = []

    def rename(match: re.Match) -> str:
        flat = f"{room}_{match[3]}" if match[2] == "." else match[3].replace(".", "_")
        found.append(flat)
        return f"{match[1]}.{flat}{match[4]}"

    text = (ROOT / room / f"{name.removeprefix(f'{room}_')}.py").read_text()
    written[f"{name}.py"] = IMPORT.sub(rename, text)
    for other in found:
        lay_flat(other, written)
