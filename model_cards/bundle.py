"""A model's own code, put into its folder, so that those who have transformers alone can load it.

`AutoModel.from_pretrained(NAME, trust_remote_code=True)` copies the files of one folder that import each other as
`.name`. So the modules of the package that a model needs are laid side by side: `modeling_vlp/clip.py` becomes
`modeling_vlp_clip.py`, and imports are renamed to match. Nothing is written twice by hand.
"""

import json
import re
from pathlib import Path

from transformers import PreTrainedConfig

ROOT = Path(__file__).parents[1]
IMPORT = re.compile(r"^(\s*from )(\.{1,2})([\w.]+)( import )", re.MULTILINE)

# Where the classes of each family are, for the Auto classes.
CLIP = {
    "config.json": {
        "AutoConfig": "configuration_clip.VlpClipConfig",
        "AutoModel": "modeling_vlp_clip.VlpClipModel",
        "AutoModelForZeroShotImageClassification": "modeling_vlp_clip.VlpClipModel",
    },
    "processor_config.json": {
        "AutoProcessor": "processing_clip.VlpClipProcessor",
        "AutoImageProcessor": "processing_clip.VlpClipImageProcessor",
    },
    "tokenizer_config.json": {"AutoTokenizer": [None, "processing_tokenizer.VlpClipTokenizer"]},
}
BLIP_MODULES = {
    "VlpBlipForPreTraining": "modeling_vlp_blip",
    "VlpBlipForImageTextRetrieval": "modeling_vlp_blip",
    "VlpBlipForConditionalGeneration": "modeling_vlp_blip_captioner",
    "VlpBlipForQuestionAnswering": "modeling_vlp_blip_tasks",
    "VlpBlipForVisualReasoning": "modeling_vlp_blip_tasks",
}


def auto_maps(config: PreTrainedConfig) -> dict[str, dict]:
    """What each of a folder's files says of where its class is."""
    architecture = config.architectures[0]
    if config.model_type == "vlp_clip":
        return CLIP
    models = {"AutoModel": f"{BLIP_MODULES[architecture]}.{architecture}"}
    if architecture in ("VlpBlipForPreTraining", "VlpBlipForConditionalGeneration"):
        models["AutoModelForImageTextToText"] = "modeling_vlp_blip_captioner.VlpBlipForConditionalGeneration"
    return {
        "config.json": {"AutoConfig": "configuration_blip.VlpBlipConfig"} | models,
        "processor_config.json": {
            "AutoProcessor": "processing_blip.VlpBlipProcessor",
            "AutoImageProcessor": "processing_blip.VlpBlipImageProcessor",
        },
    }


def add_code(folder: Path, config: PreTrainedConfig) -> list[str]:
    """Put the code that a saved model needs into its folder; returns the names of the files written."""
    maps, written = auto_maps(config), {}
    for name, auto_map in maps.items():
        path = folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
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
    room = next(room for room in ("configuration", "modeling_vlp", "processing") if name.startswith(f"{room}_"))
    found: list[str] = []

    def rename(match: re.Match) -> str:
        flat = f"{room}_{match[3]}" if match[2] == "." else match[3].replace(".", "_")
        found.append(flat)
        return f"{match[1]}.{flat}{match[4]}"

    text = (ROOT / room / f"{name.removeprefix(f'{room}_')}.py").read_text()
    written[f"{name}.py"] = IMPORT.sub(rename, text)
    for other in found:
        lay_flat(other, written)
