"""Copy a model's code into its folder, so that users who have only transformers can load it.

`AutoModel.from_pretrained(NAME, trust_remote_code=True)` loads files of one folder that import each other as `.name`.
The modules that a model needs are therefore copied into one flat folder: `modeling_vlp/clip.py` becomes
`modeling_vlp_clip.py`, and imports are renamed to match. The copies are generated; none are maintained by hand.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("configuration", "modeling_vlp", "processing")
IMPORT = re.compile(r"^(\s*from )(\.{1,2})([\w.]+)( import )", re.MULTILINE)

CONFIGURATIONS = {
    "vlp_clip": "configuration_clip.VlpClipConfig",
    "vlp_blip": "configuration_blip.VlpBlipConfig",
    "vlp_blip2": "configuration_blip2.VlpBlip2Config",
    "vlp_instructblip": "configuration_blip2.VlpInstructBlipConfig",
}
# The module that defines each architecture.
MODELS = {
    "VlpClipModel": "modeling_vlp_clip",
    "VlpBlipForPreTraining": "modeling_vlp_blip",
    "VlpBlipForImageTextRetrieval": "modeling_vlp_blip",
    "VlpBlipForConditionalGeneration": "modeling_vlp_blip_captioner",
    "VlpBlipForQuestionAnswering": "modeling_vlp_blip_tasks",
    "VlpBlipForVisualReasoning": "modeling_vlp_blip_tasks",
    "VlpBlip2ForPreTraining": "modeling_vlp_blip2",
    "VlpBlip2ForImageTextRetrieval": "modeling_vlp_blip2",
    "VlpBlip2ForConditionalGeneration": "modeling_vlp_blip2_generation",
    "VlpInstructBlipForConditionalGeneration": "modeling_vlp_instructblip",
}
GENERATORS = {
    "VlpBlipForPreTraining": "modeling_vlp_blip_captioner.VlpBlipForConditionalGeneration",
    "VlpBlipForConditionalGeneration": "modeling_vlp_blip_captioner.VlpBlipForConditionalGeneration",
    "VlpBlip2ForConditionalGeneration": "modeling_vlp_blip2_generation.VlpBlip2ForConditionalGeneration",
    "VlpInstructBlipForConditionalGeneration": "modeling_vlp_instructblip.VlpInstructBlipForConditionalGeneration",
}
PROCESSING = {
    "VlpClipProcessor": "processing_clip", "VlpClipImageProcessor": "processing_clip",
    "VlpNaflexImageProcessor": "processing_naflex",
    "VlpBlipProcessor": "processing_blip", "VlpBlipImageProcessor": "processing_blip",
    "VlpBlip2Processor": "processing_blip2", "VlpInstructBlipProcessor": "processing_blip2",
    "VlpClipTokenizer": "processing_tokenizer",
}  # fmt: skip


def model_map(config: dict) -> dict[str, str]:
    """The `auto_map` of a config.json.

    Args:
        config: the content of the config.json.

    Returns:
        For each Auto class, "module.Class" to load.
    """
    architecture = config["architectures"][0]
    reference = f"{MODELS[architecture]}.{architecture}"
    auto_map = {"AutoConfig": CONFIGURATIONS[config["model_type"]], "AutoModel": reference}
    if architecture == "VlpClipModel":
        auto_map["AutoModelForZeroShotImageClassification"] = reference
    if architecture in GENERATORS:
        auto_map["AutoModelForImageTextToText"] = GENERATORS[architecture]
    return auto_map


def processor_map(content: dict) -> dict[str, str]:
    """The `auto_map` of a processor_config.json or preprocessor_config.json."""
    images = content.get("image_processor", content).get("image_processor_type")
    names = {"AutoProcessor": content.get("processor_class"), "AutoImageProcessor": images}
    return {auto: f"{PROCESSING[name]}.{name}" for auto, name in names.items() if name in PROCESSING}


def tokenizer_map(content: dict) -> dict[str, list]:
    """The `auto_map` of a tokenizer_config.json; empty if the tokenizer is one of transformers' own classes."""
    name = content.get("tokenizer_class")
    return {"AutoTokenizer": [None, f"{PROCESSING[name]}.{name}"]} if name in PROCESSING else {}


MAPS = {
    "config.json": model_map,
    "processor_config.json": processor_map,
    "preprocessor_config.json": processor_map,
    "tokenizer_config.json": tokenizer_map,
}


def add_code(folder: str | Path) -> list[str]:
    """Copy the code that a saved model or processor needs into its folder, and add `auto_map` to its JSON files.

    Args:
        folder: the folder of the saved model or processor.

    Returns:
        The names of the copied files, sorted.
    """
    folder, modules = Path(folder), {}
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
        for reference in auto_map.values():
            reference = reference if isinstance(reference, str) else reference[-1]
            add_module(reference.split(".")[0], modules)
    for name, text in modules.items():
        (folder / name).write_text(text)
    return sorted(modules)


def add_module(name: str, modules: dict[str, str]) -> None:
    """Add a module and everything it imports to `modules`.

    Args:
        name: the flat name of the module, such as "modeling_vlp_clip".
        modules: for each file name, its source text; extended in place.
    """
    if f"{name}.py" in modules:
        return
    package = next(package for package in PACKAGES if name.startswith(f"{package}_"))
    imported: list[str] = []

    def rename(match: re.Match) -> str:
        flat = f"{package}_{match[3]}" if match[2] == "." else match[3].replace(".", "_")
        imported.append(flat)
        return f"{match[1]}.{flat}{match[4]}"

    text = (ROOT / package / f"{name.removeprefix(f'{package}_')}.py").read_text()
    modules[f"{name}.py"] = IMPORT.sub(rename, text)
    for other in imported:
        add_module(other, modules)
