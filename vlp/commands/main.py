"""`vlp COMMAND ...`: all commands under one name. Only the command that is called is imported.

vlp check pairs.csv
vlp convert ViT-B-32.pt runs/clip
"""

import importlib
import sys

# Each command: the module whose `main` reads the command line, words put before the options, and what it does.
COMMANDS: dict[str, tuple[str, list[str], str]] = {
    "check": ("vlp.training.run", ["check"], "check a data set before training, and write a report with pictures"),
    "train": ("vlp.training.run", [], "train clip, blip or blip2, or write shards (as `accelerate launch training`)"),
    "evaluate": ("vlp.training.evaluate", [], "evaluate a model"),
    "convert": ("vlp.commands.convert", [], "convert checkpoints of other libraries, and back"),
    "merge": ("vlp.commands.merge", [], "average the weights of models (WiSE-FT, soups)"),
    "onnx": ("vlp.commands.onnx", [], "export a model to ONNX"),
    "index": ("vlp.commands.index", [], "index a folder of pictures, and search it"),
    "space": ("vlp.commands.space", [], "write a Space of the hub: a page for a model, with the model"),
    "demo": ("vlp.commands.demo", [], "start a local web page to try a model"),
}
USAGE = "usage: vlp COMMAND [options]\n\n" + "\n".join(f"  {name:10} {text}" for name, (_, _, text) in COMMANDS.items())
USAGE += "\n  completion bash, zsh or fish: the script that completes the options of vlp"


def main(words: list[str]) -> None:
    """Run the command that words name; `vlp_launcher` has checked them."""
    name, *rest = words
    module, before, _ = COMMANDS[name]
    sys.argv = [f"vlp {name}", *before, *rest]
    importlib.import_module(module).main()
