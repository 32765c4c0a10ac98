"""`vlp-onnx FOLDER TARGET`: the parts of a trained CLIP or BLIP as ONNX files, for runtimes without PyTorch.

    image.onnx   pixel_values (B, 3, S, S) -> image_embeds (B, E), not normalised; of BLIP also states (B, M, D)
    text.onnx    input_ids (B, N) -> text_embeds (B, E), not normalised
    match.onnx   BLIP: input_ids (B, N), states (B, M, D) -> itm_logits (B, 2)
    write.onnx   BLIP: input_ids (B, N) that begin with [DEC], states (B, M, D) -> logits (B, N, V) of each next token

B and N are free. Needs `pip install "vlp[onnx]"`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

import vlp

from ..files import check_output, write_whole
from ..modeling_vlp.blip import VlpBlipDualEncoder
from ..modeling_vlp.med import decode


class Part(nn.Module):
    """A model and a function of it, as the module that exporters want."""

    def __init__(self, model: nn.Module, work: Callable):
        super().__init__()
        self.model, self.work = model, work

    def forward(self, *inputs: Tensor):
        return self.work(self.model, *inputs)


def see(model, pixel_values: Tensor) -> Tensor:
    return model.get_image_features(pixel_values, pooled_only=True).pooler_output


def see_states(model, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    output = model.get_image_features(pixel_values)
    return output.pooler_output, output.last_hidden_state


def only_states(model, pixel_values: Tensor) -> Tensor:
    return model.encode_image(pixel_values).last_hidden_state


def read(model, input_ids: Tensor) -> Tensor:
    return model.get_text_features(input_ids).pooler_output


def match(model, input_ids: Tensor, states: Tensor) -> Tensor:
    return model.match(input_ids, None, model.text_model.read(states), pack=False)


def write(model, input_ids: Tensor, states: Tensor) -> Tensor:
    return decode(model, input_ids, None, model.text_model.read(states)).logits


def parts_of(model) -> dict[str, tuple[Callable, list[str], list[str]]]:
    """For each file: what it computes, and the names of its inputs and outputs."""
    if isinstance(model, vlp.VlpClipModel):
        return {"image": (see, ["pixel_values"], ["image_embeds"]), "text": (read, ["input_ids"], ["text_embeds"])}
    parts = {"image": (only_states, ["pixel_values"], ["states"])}
    if isinstance(model, VlpBlipDualEncoder):
        parts["image"] = (see_states, ["pixel_values"], ["image_embeds", "states"])
        parts["text"] = (read, ["input_ids"], ["text_embeds"])
        parts["match"] = (match, ["input_ids", "states"], ["itm_logits"])
    if hasattr(model, "lm_head"):
        parts["write"] = (write, ["input_ids", "states"], ["logits"])
    return parts


def export(model, target: Path) -> list[str]:
    """Write the parts of a model into a folder, whole or not at all; returns the names of the files."""
    model, vision, text = model.eval(), model.config.vision_config, model.config.text_config
    ids = torch.full((2, 5), text.eos_token_id)
    ids[:, 0] = text.bos_token_id
    examples = {
        "pixel_values": torch.zeros(2, vision.num_channels, vision.image_size, vision.image_size),
        "input_ids": ids,
    }
    parts, free = parts_of(model), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        if not isinstance(model, vlp.VlpClipModel):
            examples["states"] = model.encode_image(examples["pixel_values"]).last_hidden_state
        programs = {}
        for name, (work, inputs, outputs) in parts.items():
            dynamic = tuple({0: free, 1: free} if i == "input_ids" else {0: free} for i in inputs)
            programs[name] = torch.onnx.export(
                Part(model, work), tuple(examples[i] for i in inputs), dynamo=True, verbose=False,
                input_names=inputs, output_names=outputs, dynamic_shapes=(dynamic,),
            )  # fmt: skip

    def save(fresh: Path) -> None:
        for name, program in programs.items():
            program.save(fresh / f"{name}.onnx")

    check_output(str(target), "TARGET")
    write_whole(target, save)
    return sorted(f"{name}.onnx" for name in programs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="vlp-onnx", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", help="folder or hub name of a model")
    parser.add_argument("target", help="folder for the files")
    options = parser.parse_args()
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        sys.exit('error: vlp-onnx needs onnxscript: pip install "vlp[onnx]".')
    try:
        architecture = AutoConfig.from_pretrained(options.folder).architectures[0]
        if architecture not in ("VlpClipModel", "VlpBlipForPreTraining", "VlpBlipForImageTextRetrieval",
                                "VlpBlipForConditionalGeneration"):  # fmt: skip
            sys.exit(f"error: {options.folder} is a {architecture}, which vlp-onnx does not export.")
        files = export(getattr(vlp, architecture).from_pretrained(options.folder), Path(options.target))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Written to {options.target}: {', '.join(files)}")


if __name__ == "__main__":
    main()
