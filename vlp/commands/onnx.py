"""`vlp onnx FOLDER TARGET`: export a trained CLIP or BLIP to ONNX, as transformers.js and optimum expect it.

    onnx/model.onnx           input_ids (T, N), pixel_values (B, 3, S, S) -> logits_per_image (B, T),
                              logits_per_text (T, B), text_embeds (T, E), image_embeds (B, E), both of length 1
    onnx/vision_model.onnx    pixel_values -> image_embeds (B, E), not normalised
    onnx/text_model.onnx      input_ids -> text_embeds (T, E), not normalised
    onnx/encoder_model.onnx   BLIP: pixel_values -> last_hidden_state (B, M, D)
    onnx/itm_model.onnx       BLIP: input_ids (B, N), encoder_hidden_states (B, M, D) -> itm_logits (B, 2)
    onnx/decoder_model.onnx   BLIP: input_ids (B, N) that begin with [DEC], encoder_hidden_states -> logits (B, N, V)
                              of each next token
    onnx/decoder_model_merged.onnx   the same with a cache: past_key_values.L.key and .value (B, H, P, D / H) of layer
                              L, of the P tokens before these, which may be none -> also present.L.key and .value

with config.json, preprocessor_config.json, the tokenizer and, for BLIP, generation_config.json. The pipelines of
transformers.js read all of this but the ITM model. B, T and N may be any number. For images of variable shape,
pixel_values are (B, N, P * P * 3), with spatial_shapes (B, 2), as the processor gives them; transformers.js has no such
processor. Each file is also written with quantised weights, as *_quantized.onnx, which transformers.js loads in a
browser unless told otherwise. The weights of a file that would be larger than 1.9 GB are stored beside it, as
*.onnx_data.

Requires `pip install "vlp[onnx]"`.
"""

import argparse
import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from datasets.utils.py_utils import iter_batched
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import DynamicCache

import vlp

from ..conversion import own_copy, plain_tokenizer
from ..errors import ArgumentError, CommandParser, UnsupportedModelError, printable, reported_errors
from ..files import check_output, usable_path, write_whole
from ..loading import load_model, load_processor, read_config, row_of
from ..modeling_vlp.blip import VlpBlipDualEncoder
from ..modeling_vlp.med import decode
from ..processing.pictures import PictureError, read_picture
from ..training.data.rows import texts_of
from ..training.data.sources import load_rows, require_text

EXPORTED = (
    "VlpClipModel", "VlpBlipForPreTraining", "VlpBlipForImageTextRetrieval", "VlpBlipForConditionalGeneration",
)  # fmt: skip
QUANTIZED = ("MatMul", "Gemm", "Gather")  # of convolutions, accuracy would suffer: they need static quantisation
MOST_BYTES = 1.9e9  # of the weights in an ONNX file, a message of protobuf, which is limited to 2 GiB
BATCH = 16  # pictures to compare at once
DYNAMIC = torch.export.Dim.DYNAMIC
FREE = {  # the axes of each input whose length is not fixed
    "pixel_values": (0,), "spatial_shapes": (0,), "input_ids": (0, 1), "encoder_hidden_states": (0,),
    "past_key_values": (0, 2),
}  # fmt: skip


@dataclass
class Part:
    """A part of a model, for one ONNX file.

    Attributes:
        function: called with the model and the inputs, in this order; returns the outputs.
        inputs, outputs: their names.
    """

    function: Callable
    inputs: list[str]
    outputs: list[str]


class Wrapped(nn.Module):
    """A part as a module, as `torch.onnx.export` requires."""

    def __init__(self, model: nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor):
        return self.function(self.model, *inputs)


def image_embeds(model, pixel_values: Tensor, spatial_shapes: Tensor | None = None) -> Tensor:
    return model.get_image_features(pixel_values, spatial_shapes=spatial_shapes, pooled_only=True).pooler_output


def image_states(model, pixel_values: Tensor) -> Tensor:
    return model.encode_image(pixel_values).last_hidden_state


def text_embeds(model, input_ids: Tensor) -> Tensor:
    return model.get_text_features(input_ids).pooler_output


def similarities(model, input_ids: Tensor, pixel_values: Tensor, spatial_shapes: Tensor | None = None):
    images = normalize(image_embeds(model, pixel_values, spatial_shapes), dim=-1)
    texts = normalize(text_embeds(model, input_ids), dim=-1)
    if isinstance(model, VlpBlipDualEncoder):
        logits = images @ texts.T / model.temp
    else:
        logits = model.logit_scale.exp() * images @ texts.T
        logits = logits if model.logit_bias is None else logits + model.logit_bias
    return logits, logits.T, texts, images


def match(model, input_ids: Tensor, states: Tensor) -> Tensor:
    return model.match(input_ids, None, model.text_model.memory_of(states), pack=False)


def next_token_logits(model, input_ids: Tensor, states: Tensor) -> Tensor:
    return decode(model, input_ids, None, model.text_model.memory_of(states)).logits


def next_token_logits_and_cache(model, input_ids: Tensor, states: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(key, value, layer)
    logits = decode(model, input_ids, None, model.text_model.memory_of(states), past_key_values=cache).logits
    return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def cached(model, prefix: str) -> list[str]:
    """The names of the cached keys and values of a BLIP's decoder."""
    layers = range(model.config.text_config.num_hidden_layers)
    return [f"{prefix}.{layer}.{kind}" for layer in layers for kind in ("key", "value")]


def parts_of(model) -> dict[str, Part]:
    """The parts of a CLIP or BLIP to export; the keys are the names of the files, without their extension."""
    pixels = ["pixel_values", *(["spatial_shapes"] if most_patches(model) else [])]
    parts = {}
    if isinstance(model, vlp.VlpClipModel | VlpBlipDualEncoder):
        compared = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
        parts["model"] = Part(similarities, ["input_ids", *pixels], compared)
        parts["vision_model"] = Part(image_embeds, pixels, ["image_embeds"])
        parts["text_model"] = Part(text_embeds, ["input_ids"], ["text_embeds"])
    if isinstance(model, vlp.VlpClipModel):
        return parts
    attending = ["input_ids", "encoder_hidden_states"]
    parts["encoder_model"] = Part(image_states, pixels, ["last_hidden_state"])
    if isinstance(model, VlpBlipDualEncoder):
        parts["itm_model"] = Part(match, attending, ["itm_logits"])
    if hasattr(model, "lm_head"):
        past, present = cached(model, "past_key_values"), cached(model, "present")
        parts["decoder_model"] = Part(next_token_logits, attending, ["logits"])
        parts["decoder_model_merged"] = Part(next_token_logits_and_cache, attending + past, ["logits", *present])
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


def example_texts(config, texts: int = 2) -> Tensor:
    """Token ids (T, 5) of texts without padding, for a text model with this configuration."""
    if hasattr(config, "tower"):  # an encoder of transformers: any tokens but the padding
        ids = [number for number in range(config.vocab_size) if number != config.pad_token_id][:5]
        return torch.tensor([ids] * texts)
    ids = torch.full((texts, 5), config.eos_token_id)
    ids[:, 0] = config.bos_token_id
    return ids


def example_inputs(model) -> dict[str, Tensor]:
    """Inputs of all parts of a model."""
    examples = example_images(model) | {"input_ids": example_texts(model.config.text_config)}
    if not isinstance(model, vlp.VlpClipModel):
        config = model.config.text_config
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        examples["encoder_hidden_states"] = image_states(model, examples["pixel_values"])
        examples |= {name: torch.zeros(2, heads, 3, size) for name in cached(model, "past_key_values")}
    return examples


def program_of(model, name: str, part: Part, examples: dict[str, Tensor]):
    """Trace a part of a model."""
    examples = dict(examples)
    if name == "model":  # another number of texts than of images, so that the two are free of each other
        examples["input_ids"] = example_texts(model.config.text_config, texts=3)
    free = [FREE[name.partition(".")[0]] for name in part.inputs]
    return torch.onnx.export(
        Wrapped(model, part.function).eval(), tuple(examples[name] for name in part.inputs), dynamo=True, verbose=False,
        input_names=part.inputs, output_names=part.outputs,
        dynamic_shapes=(tuple({axis: DYNAMIC for axis in axes} for axes in free),),
    )  # fmt: skip


def save_onnx(model, target: Path) -> None:
    """Save an `onnx_ir.Model`; weights of more than MOST_BYTES are stored beside it, in the file that transformers.js
    and onnxruntime expect."""
    import onnx_ir

    size = sum(each.const_value.nbytes for each in model.graph.initializers.values())
    onnx_ir.save(model, target, external_data=f"{target.name}_data" if size > MOST_BYTES else None)


def external_data(folder: Path) -> dict[str, bool]:
    """The names of the ONNX files in a folder whose weights are stored beside them, as transformers.js reads them."""
    return {path.name.removesuffix("_data"): True for path in sorted(folder.glob("*.onnx_data"))}


def config_of(model) -> dict:
    """The config.json by which transformers.js and optimum choose their classes; it does not describe the layers."""
    config, text = model.config, model.config.text_config
    if isinstance(model, vlp.VlpClipModel):
        kind = "clip" if model.logit_bias is None else "siglip"  # for which transformers.js computes sigmoids
        described = {"model_type": kind, "architectures": ["CLIPModel" if kind == "clip" else "SiglipModel"]}
        return described | {"projection_dim": config.projection_dim}
    if not hasattr(model, "lm_head"):
        return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": config.image_text_hidden_size}
    return {
        "model_type": "vision-encoder-decoder",
        "architectures": ["VisionEncoderDecoderModel"],
        "is_encoder_decoder": True,
        "encoder": {"model_type": "vit", "image_size": config.vision_config.image_size},
        "decoder": {
            "model_type": "gpt2",  # which also caches self-attention alone
            "n_layer": text.num_hidden_layers,
            "n_head": text.num_attention_heads,
            "n_embd": text.hidden_size,
            "n_positions": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "add_cross_attention": True,
        },
        **special_tokens(text),
    }


def special_tokens(text) -> dict[str, int]:
    """The ids of the tokens with which a BLIP's decoder begins, ends and pads."""
    return {
        "bos_token_id": text.bos_token_id,
        "decoder_start_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
    }


def save_processor(model, processor, folder: Path) -> None:
    """Save a processor as classes of transformers, in the files that transformers.js reads."""
    images = processor.image_processor.to_dict()
    images["image_processor_type"] = "Siglip2ImageProcessor" if most_patches(model) else "CLIPImageProcessor"
    images.pop("processor_class", None)
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    plain_tokenizer(processor.tokenizer).save_pretrained(folder)


def quantize(source: Path) -> Path:
    """Quantise the weights of an ONNX file to 8 bits, with onnxruntime's tool; activations follow as it runs."""
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target = source.with_name(f"{source.stem}_quantized.onnx")
    with tempfile.TemporaryDirectory(dir=source.parent) as place:
        ready, written = Path(place) / "ready.onnx", Path(place) / "quantized.onnx"
        quant_pre_process(
            source, ready, skip_symbolic_shape=True, save_as_external_data=True, all_tensors_to_one_file=True
        )
        quantize_dynamic(
            ready, written, op_types_to_quantize=list(QUANTIZED), weight_type=QuantType.QUInt8,
            use_external_data_format=True,
        )  # fmt: skip
        save_onnx(onnx_ir.external_data.load_to_model(onnx_ir.load(written)), target)
    return target


class Sessions:
    """The ONNX files of a folder, run by onnxruntime.

    Args:
        folder: a folder that `export` wrote.
        suffix: the end of the files' names: "", or "_quantized".
    """

    def __init__(self, folder: Path, suffix: str = ""):
        self.folder, self.suffix = folder / "onnx", suffix

    def run(self, name: str, **inputs: Tensor) -> list[Tensor]:
        """Run the file of a part of a model."""
        import onnxruntime

        session = onnxruntime.InferenceSession(self.folder / f"{name}{self.suffix}.onnx")
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        return [torch.tensor(each) for each in found]


def effect_of_quantization(folder: Path, processor, rows, most: int = 256) -> str:
    """What the quantised files do otherwise.

    Args:
        folder: a folder that `export` wrote.
        processor: the model's processor.
        rows: a `datasets.Dataset` of pairs, with the columns image and caption.
        most: how many of them to compare, from the first.

    Returns:
        A sentence for the user.
    """
    pictures, captions = [], []
    for row in islice(rows, most):
        texts = texts_of(row["caption"])
        with contextlib.suppress(PictureError):
            if texts:
                pictures.append(read_picture(row["image"]))
                captions.append(texts[0])
    if not captions:
        return "The quantised model was not compared with the original: no row can be used."
    ids = processor.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    batches = [processor.image_processor(part, return_tensors="pt") for part in iter_batched(pictures, BATCH)]
    both = Sessions(folder), Sessions(folder, "_quantized")
    if (folder / "onnx" / "model.onnx").is_file():
        what = f"chooses among the {len(set(captions))} captions"
        first, second = (
            torch.cat([each.run("model", input_ids=ids, **images)[0] for images in batches]).argmax(dim=1).tolist()
            for each in both
        )
        first, second = ([captions[choice] for choice in each] for each in (first, second))
        known = f"; {percent(second, captions)} of its choices are right, {percent(first, captions)} of the original's"
    else:
        what, known = "begins a caption", ""
        first, second = (
            [token for images in batches for token in first_tokens(each, images, processor.tokenizer.bos_token_id)]
            for each in both
        )
    return (
        f"The quantised model {what} as the original does for {percent(first, second)} of {len(captions)} "
        f"pictures{known}."
    )


def first_tokens(sessions: Sessions, images: dict[str, Tensor], begin: int) -> list[int]:
    """The tokens with which the captions of images begin, after the token `begin`."""
    states = sessions.run("encoder_model", **images)[0]
    ids = torch.full((len(states), 1), begin)
    return sessions.run("decoder_model", input_ids=ids, encoder_hidden_states=states)[0][:, 0].argmax(dim=1).tolist()


def percent(first: list, second: list) -> str:
    """How many values of two lists are the same."""
    return f"{100 * sum(a == b for a, b in zip(first, second, strict=True)) / len(first):.1f} %"


def export(model, processor, target: Path, quantized: bool = True) -> Path:
    """Export a model to a folder, completely or not at all.

    Args:
        model: a CLIP or BLIP; it is put into evaluation mode.
        processor: its processor.
        target: the folder to write.
        quantized: also write each file with weights of 8 bits.

    Returns:
        The folder that was written.

    Raises:
        ArgumentError: if the target contains other files.
    """
    check_output(target, "TARGET")
    model = model.eval()
    with torch.no_grad():
        examples = example_inputs(model)
        programs = {}
        for name, part in parts_of(model).items():
            print(f"Exporting {name}.onnx", flush=True)
            programs[name] = program_of(model, name, part, examples)

    def save(fresh: Path) -> None:
        (fresh / "onnx").mkdir()
        for name, program in programs.items():
            save_onnx(program.model, fresh / "onnx" / f"{name}.onnx")
            if quantized:
                print(f"Quantising {name}.onnx", flush=True)
                quantize(fresh / "onnx" / f"{name}.onnx")
        config = config_of(model)
        if beside := external_data(fresh / "onnx"):
            config["transformers.js_config"] = {"use_external_data_format": beside}
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if hasattr(model, "lm_head"):
            settings = special_tokens(model.config.text_config) | {"max_length": processor.tokenizer.model_max_length}
            (fresh / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_processor(model, processor, fresh)

    return write_whole(target, save)


def main() -> None:
    """The command `vlp onnx`."""
    parser = CommandParser(prog="vlp onnx", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", help="folder or hub name of a model")
    parser.add_argument("target", help="folder to write")
    parser.add_argument(
        "--architecture",
        help="class of vlp to export the model as, such as VlpBlipForImageTextRetrieval for a pre-trained BLIP",
    )
    parser.add_argument(
        "--quantize", action=argparse.BooleanOptionalAction, default=True,
        help="also write each file with weights of 8 bits (default: yes)",
    )  # fmt: skip
    parser.add_argument(
        "--dataset", default="emoji",
        help="pairs on which the quantised model is compared with the original (default: the included drawings)",
    )  # fmt: skip
    parser.add_argument("--split", help="split of --dataset (default: train; of the included drawings, test)")
    options = parser.parse_args()
    with reported_errors():
        for package in ("onnxscript", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise ArgumentError(f'vlp onnx requires {package}: pip install "vlp[onnx]".')
        check_output(options.target, "TARGET", [options.folder])
        given, options.folder = options.folder, own_copy(options.folder)
        config = read_config(options.folder)
        row = row_of(options.folder, config, read_as=options.architecture)
        if row.model.__name__ not in EXPORTED:
            raise UnsupportedModelError(
                f"{printable(given, 120)} is a {row.model.__name__}, which vlp onnx does not export; it exports "
                f"{', '.join(EXPORTED)}."
            )
        rows = None
        if options.quantize:  # loaded first, so that a wrong name is told at once
            options.split = options.split or ("test" if options.dataset == "emoji" else "train")
            rows = load_rows(options.dataset, options.split, option="--dataset")
            require_text(rows, "caption", options.dataset, "--dataset")
        model, processor = load_model(row.model, options.folder), load_processor(options.folder)
        folder = export(model, processor, usable_path(options.target, "TARGET"), options.quantize)
        files = sorted(file.name for file in (folder / "onnx").iterdir())
        print(f"Wrote to {printable(folder)}/onnx: {', '.join(files)}")
        if options.quantize:
            print(f"Compared on the split {printable(options.split, 60)} of {printable(options.dataset, 120)}:")
            print(effect_of_quantization(folder, processor, rows))


if __name__ == "__main__":
    main()
