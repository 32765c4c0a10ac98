"""`vlp-onnx FOLDER TARGET`: export the parts of a trained CLIP or BLIP to ONNX, for runtimes without PyTorch.

    image.onnx   pixel_values (B, 3, S, S) -> image_embeds (B, E), not normalised; for BLIP also states (B, M, D);
                 for images of variable shape pixel_values (B, N, P * P * 3) and spatial_shapes (B, 2) as the processor
                 gives them
    text.onnx    input_ids (B, N) -> text_embeds (B, E), not normalised
    match.onnx   BLIP: input_ids (B, N), states (B, M, D) -> itm_logits (B, 2)
    write.onnx   BLIP: input_ids (B, N) that begin with [DEC], states (B, M, D) -> logits (B, N, V) of each next token

B and the number of tokens N are dynamic. Requires `pip install "vlp[onnx]"`.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import vlp

from ..errors import ArgumentError, CommandParser, UnsupportedModelError, printable, reported_errors
from ..files import check_output, usable_path, write_whole
from ..loading import load_model, read_config, row_of
from ..modeling_vlp.blip import VlpBlipDualEncoder
from ..modeling_vlp.med import decode

EXPORTED = (
    "VlpClipModel", "VlpBlipForPreTraining", "VlpBlipForImageTextRetrieval", "VlpBlipForConditionalGeneration",
)  # fmt: skip


class Part(nn.Module):
    """Wraps a function of a model as a module, as `torch.onnx.export` requires.

    Args:
        model: the model.
        function: called with the model and the inputs; returns the outputs.
    """

    def __init__(self, model: nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor):
        return self.function(self.model, *inputs)


def image_embeds(model, pixel_values: Tensor, spatial_shapes: Tensor | None = None) -> Tensor:
    return model.get_image_features(pixel_values, spatial_shapes=spatial_shapes, pooled_only=True).pooler_output


def image_embeds_and_states(model, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    output = model.get_image_features(pixel_values)
    return output.pooler_output, output.last_hidden_state


def image_states(model, pixel_values: Tensor) -> Tensor:
    return model.encode_image(pixel_values).last_hidden_state


def text_embeds(model, input_ids: Tensor) -> Tensor:
    return model.get_text_features(input_ids).pooler_output


def match(model, input_ids: Tensor, states: Tensor) -> Tensor:
    return model.match(input_ids, None, model.text_model.memory_of(states), pack=False)


def next_token_logits(model, input_ids: Tensor, states: Tensor) -> Tensor:
    return decode(model, input_ids, None, model.text_model.memory_of(states)).logits


def parts_of(model) -> dict[str, tuple[Callable, list[str], list[str]]]:
    """The parts of a model to export.

    Args:
        model: a CLIP or BLIP.

    Returns:
        For each file, without its extension: the function that it computes, and the names of its inputs and outputs.
    """
    if isinstance(model, vlp.VlpClipModel):
        shapes = ["spatial_shapes"] if most_patches(model) else []
        return {
            "image": (image_embeds, ["pixel_values", *shapes], ["image_embeds"]),
            "text": (text_embeds, ["input_ids"], ["text_embeds"]),
        }
    parts = {"image": (image_states, ["pixel_values"], ["states"])}
    if isinstance(model, VlpBlipDualEncoder):
        parts["image"] = (image_embeds_and_states, ["pixel_values"], ["image_embeds", "states"])
        parts["text"] = (text_embeds, ["input_ids"], ["text_embeds"])
        parts["match"] = (match, ["input_ids", "states"], ["itm_logits"])
    if hasattr(model, "lm_head"):
        parts["write"] = (next_token_logits, ["input_ids", "states"], ["logits"])
    return parts


def most_patches(model) -> int | None:
    """The number of patches of a model that reads images of variable shape; None if it reads squares."""
    return getattr(model.config.vision_config, "max_num_patches", None)


def example_images(model) -> dict[str, Tensor]:
    """Two images as a model reads them: squares, or patches and their shapes."""
    vision, most = model.config.vision_config, most_patches(model)
    channels = getattr(getattr(vision, "tower", vision), "num_channels", 3)
    if most is None:
        return {"pixel_values": torch.zeros(2, channels, vision.image_size, vision.image_size)}
    patches = torch.zeros(2, most, channels * vision.patch_size**2)
    return {"pixel_values": patches, "spatial_shapes": torch.tensor([[1, most], [1, 1]])}


def example_texts(config) -> Tensor:
    """Token ids (2, 5) of texts without padding, for a text model with this configuration."""
    if hasattr(config, "tower"):  # an encoder of transformers: any tokens but the padding
        ids = [number for number in range(config.vocab_size) if number != config.pad_token_id][:5]
        return torch.tensor([ids, ids])
    ids = torch.full((2, 5), config.eos_token_id)
    ids[:, 0] = config.bos_token_id
    return ids


def export(model, target: Path) -> list[str]:
    """Export the parts of a model to a folder, completely or not at all.

    Args:
        model: a CLIP or BLIP; it is put into evaluation mode.
        target: the folder to write.

    Returns:
        The names of the files, sorted.

    Raises:
        ArgumentError: if the target contains other files.
    """
    check_output(target, "TARGET")
    model = model.eval()
    examples = example_images(model) | {"input_ids": example_texts(model.config.text_config)}
    parts, dynamic = parts_of(model), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        if not isinstance(model, vlp.VlpClipModel):
            examples["states"] = model.encode_image(examples["pixel_values"]).last_hidden_state
        programs = {}
        for name, (function, inputs, outputs) in parts.items():
            shapes = tuple({0: dynamic, 1: dynamic} if i == "input_ids" else {0: dynamic} for i in inputs)
            programs[name] = torch.onnx.export(
                Part(model, function), tuple(examples[i] for i in inputs), dynamo=True, verbose=False,
                input_names=inputs, output_names=outputs, dynamic_shapes=(shapes,),
            )  # fmt: skip

    def save(fresh: Path) -> None:
        for name, program in programs.items():
            program.save(fresh / f"{name}.onnx")

    write_whole(target, save)
    return sorted(f"{name}.onnx" for name in programs)


def main() -> None:
    """The command `vlp-onnx`."""
    parser = CommandParser(prog="vlp-onnx", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", help="folder or hub name of a model")
    parser.add_argument("target", help="folder for the ONNX files")
    options = parser.parse_args()
    with reported_errors():
        if importlib.util.find_spec("onnxscript") is None:
            raise ArgumentError('vlp-onnx requires onnxscript: pip install "vlp[onnx]".')
        check_output(options.target, "TARGET", [options.folder])
        config = read_config(options.folder)
        row = row_of(options.folder, config)
        if row.model.__name__ not in EXPORTED:
            raise UnsupportedModelError(
                f"{options.folder} is a {row.model.__name__}, which vlp-onnx does not export; it exports "
                f"{', '.join(EXPORTED)}."
            )
        files = export(load_model(row.model, options.folder), usable_path(options.target, "TARGET"))
        print(f"Wrote to {printable(options.target)}: {', '.join(files)}")


if __name__ == "__main__":
    main()
