"""Decoding pictures: every code path gives the same pixels for every kind of file."""

import io
import random

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import tiny_pair
from PIL import Image, ImageCms, ImageDraw, features
from torchvision.transforms.v2 import functional as tv
from transformers import pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlp.processing.augmentation import PerImage
from vlp.processing.pictures import (
    PictureError,
    extensions,
    from_array,
    picture_bytes,
    read_picture,
    to_eight_bits,
    to_rgb,
)
from vlp.training.data.rows import BadRow, picture_of
from vlp.training.evaluation.arguments import EvaluationArguments
from vlp.training.evaluation.tasks import prepare_data

import vlp
from vlp.commands.index import build
from vlp.inference import VlpPredictor

ORIENTATION = 0x0112


def drawing() -> Image.Image:
    """A drawing that is neither symmetric nor square."""
    image = Image.new("RGB", (60, 44), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((4, 4, 40, 20), fill=(200, 30, 30))
    draw.ellipse((28, 16, 56, 40), fill=(20, 90, 210))
    draw.line((0, 43, 20, 22), fill=(0, 140, 60), width=3)
    return image


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def stored_turned(orientation: int) -> bytes:
    """A file that shows the drawing once its orientation is applied."""
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]  # fmt: skip
    image = drawing() if undo is None else drawing().transpose(undo)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, "PNG", exif=exif)


def transparent(under: str = "black") -> Image.Image:
    """The drawing with its white background made transparent and stored in another colour."""
    image = drawing()
    alpha = Image.fromarray((np.asarray(image).min(axis=-1) < 255).astype(np.uint8) * 255)
    hidden = Image.new("RGB", image.size, under)
    hidden.paste(image, mask=alpha)
    hidden.putalpha(alpha)
    return hidden


def zoo() -> dict[str, bytes]:
    """One file of each kind."""
    image, grey = drawing(), drawing().convert("L")
    files = {}
    for format in ("AVIF", "BLP", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "PCX", "PNG",
                   "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP"):  # fmt: skip
        if format == "AVIF" and not features.check("avif"):
            continue
        source = image.quantize(64) if format in ("BLP",) else image
        source = source.resize((64, 64)) if format in ("ICNS", "ICO") else source
        files[f"{format} file"] = encoded(source, format)
    files["FITS-like MSP file"] = encoded(image.convert("1"), "MSP")
    files["XBM file"] = encoded(image.convert("1"), "XBM")
    files["SPIDER file"] = encoded(grey.convert("F"), "SPIDER")
    files["JPEG CMYK"] = encoded(image.convert("CMYK"), "JPEG")
    files["JPEG grey"] = encoded(grey, "JPEG")
    files["JPEG progressive"] = encoded(image, "JPEG", progressive=True)
    files["PNG 1"] = encoded(image.convert("1"), "PNG")
    files["PNG L"] = encoded(grey, "PNG")
    files["PNG LA"] = encoded(transparent().convert("LA"), "PNG")
    files["PNG P"] = encoded(image.quantize(32), "PNG")
    files["PNG P, transparent index"] = encoded(image.quantize(32), "PNG", transparency=0)
    files["PNG P, unused transparent index"] = encoded(image.quantize(4), "PNG", transparency=200)
    files["PNG L, transparent value"] = encoded(grey, "PNG", transparency=255)
    files["PNG RGB, transparent colour"] = encoded(image, "PNG", transparency=(255, 255, 255))
    files["PNG RGBA"] = encoded(transparent(), "PNG")
    files["PNG RGBA, red below"] = encoded(transparent("red"), "PNG")
    half = transparent()
    half.putalpha(half.getchannel("A").point(lambda value: value // 2 + 20))
    files["PNG RGBA, half transparent"] = encoded(half, "PNG")
    opaque = image.copy()
    opaque.putalpha(255)
    files["PNG RGBA, opaque"] = encoded(opaque, "PNG")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    files["PNG I;16"] = encoded(deep, "PNG")
    files["TIFF I;16"] = encoded(deep, "TIFF")
    files["TIFF I"] = encoded(Image.fromarray(np.asarray(grey).astype(np.int32) * 257), "TIFF")
    files["TIFF F, 0 to 1"] = encoded(Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "TIFF")
    files["TIFF F, 0 to 255"] = encoded(grey.convert("F"), "TIFF")
    files["TIFF CMYK"] = encoded(image.convert("CMYK"), "TIFF")
    files["TIFF LAB"] = encoded(as_lab(image), "TIFF")
    files["TIFF YCbCr"] = encoded(image.convert("YCbCr"), "TIFF", compression="jpeg")
    files["TIFF LZW"] = encoded(image, "TIFF", compression="tiff_lzw")
    files["TIFF RGBA"] = encoded(transparent(), "TIFF")
    files["PGM, 16 bits"] = encoded(Image.fromarray(np.asarray(grey).astype(np.int32) * 257), "PPM")
    files["GIF, transparent"] = encoded(transparent(), "GIF")
    files["GIF, animated"] = encoded(image, "GIF", save_all=True, append_images=[Image.new("RGB", image.size)])
    files["WEBP, animated"] = encoded(image, "WEBP", save_all=True, append_images=[Image.new("RGB", image.size)])
    files["WEBP RGBA"] = encoded(transparent(), "WEBP", lossless=True)
    files["PNG, animated"] = encoded(image, "PNG", save_all=True, append_images=[Image.new("RGB", image.size)])
    files["MPO"] = encoded(image, "MPO", save_all=True, append_images=[Image.new("RGB", image.size)])
    files["TIFF, two pages"] = encoded(image, "TIFF", save_all=True, append_images=[Image.new("RGB", image.size)])
    for orientation in range(1, 9):
        files[f"orientation {orientation}"] = stored_turned(orientation)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    files["JPEG, orientation 6"] = encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    return files


def as_lab(image: Image.Image) -> Image.Image:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return ImageCms.applyTransform(image, to_lab)


FILES = zoo()


def test_there_are_sixty_kinds_of_files():
    assert len(FILES) >= 60


@pytest.mark.parametrize("kind", FILES)
def test_every_path_reads_the_same_pixels(kind, tmp_path, monkeypatch):
    """Evaluation, training, the processor, the pipeline and the index agree pixel for pixel."""
    path = tmp_path / "pictures/a.png"  # the content decides, not the name
    path.parent.mkdir()
    path.write_bytes(FILES[kind])
    model, processor = tiny_pair()
    predictor = VlpPredictor(model, processor)
    rows = datasets.Dataset.from_dict({"image": [str(path)], "caption": ["a"]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    pictures = prepare_data(rows, EvaluationArguments(task="retrieval"), PartialState())
    pixels = {"evaluation": predictor.prepare_images([pictures.image(0)])["pixel_values"]}
    sample = PerImage(32, "middle")(picture_of(rows[0], "image"), random.Random(0))
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    pixels["training"] = ((tv.pil_to_tensor(sample).float() / 255 - mean) / std)[None]
    with Image.open(path) as opened:
        pixels["processor"] = processor(images=opened, return_tensors="pt")["pixel_values"]
    pixels["processor, path"] = processor(images=str(path), return_tensors="pt")["pixel_values"]
    pixels["bytes"] = predictor.prepare_images([read_picture({"bytes": FILES[kind], "path": None})])["pixel_values"]
    classify = pipeline("zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
                        image_processor=processor.image_processor)  # fmt: skip
    pixels["pipeline"] = classify.preprocess(str(path), candidate_labels=["a"])["pixel_values"]
    embed, recorded = VlpPredictor.embed_images, []

    def embed_and_record(self, images):
        recorded.append(self.prepare_images(images)["pixel_values"])
        return embed(self, images)

    monkeypatch.setattr(VlpPredictor, "embed_images", embed_and_record)
    build(path.parent, tmp_path / "index", "model", predictor=predictor)
    pixels["index"] = recorded[0]
    for name, value in pixels.items():
        assert torch.equal(value, pixels["evaluation"]), name


@pytest.mark.parametrize("kind", FILES)
def test_blip_processor_matches_blip_training(kind):
    processor = vlp.VlpBlipImageProcessor(size=32)
    with Image.open(io.BytesIO(FILES[kind])) as opened:
        given = processor(opened, return_tensors="pt")["pixel_values"][0]
    sample = PerImage(32, "squeeze")(read_picture(FILES[kind]), random.Random(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    assert torch.equal(given, (tv.pil_to_tensor(sample).float() / 255 - mean) / std)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in FILES if kind.startswith("orientation")]
    + ["PNG RGBA", "PNG RGBA, red below", "TIFF RGBA", "WEBP RGBA", "PNG RGB, transparent colour", "PNG RGBA, opaque"],
)
def test_rotated_and_transparent_copies_show_the_drawing(kind):
    assert to_rgb(read_picture(FILES[kind])).tobytes() == drawing().tobytes()


@pytest.mark.parametrize(
    "kind", ["PNG I;16", "TIFF I;16", "TIFF I", "TIFF F, 0 to 1", "TIFF F, 0 to 255", "PGM, 16 bits"]
)
def test_deep_copies_show_the_grey_drawing(kind):
    assert to_rgb(read_picture(FILES[kind])).tobytes() == drawing().convert("L").convert("RGB").tobytes()


def test_lab_shows_the_drawing():
    difference = np.asarray(read_picture(FILES["TIFF LAB"])).astype(int) - np.asarray(drawing())
    assert np.abs(difference).mean() < 1 and np.abs(difference).max() <= 12  # eight-bit LAB rounds saturated colours


def test_colour_spaces_without_a_file_format():
    image = drawing().convert("HSV")
    assert np.abs(np.asarray(to_rgb(read_picture(image))).astype(int) - np.asarray(drawing())).max() <= 4
    assert to_rgb(read_picture(drawing().convert("RGBX"))).tobytes() == drawing().tobytes()


def test_reading_twice_changes_nothing():
    for kind, content in FILES.items():
        once = read_picture(content)
        twice = read_picture(once)
        assert (once.mode, once.tobytes()) == (twice.mode, twice.tobytes()), kind


def test_files_are_not_opened_by_their_extension(tmp_path, monkeypatch):
    """Opening an EPS file named .png must not start Ghostscript."""
    eps = tmp_path / "picture.png"
    drawing().save(eps, "EPS")
    from PIL import EpsImagePlugin

    def no_ghostscript(*args, **kwargs):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", no_ghostscript)
    for source in (str(eps), eps.read_bytes(), {"bytes": None, "path": str(eps)}):
        with pytest.raises(PictureError, match="not an image"):
            read_picture(source)
    with pytest.raises(PictureError, match="format EPS"), Image.open(eps) as opened:
        read_picture(opened)
    with pytest.raises(ValueError, match="not an image"):
        vlp.VlpClipImageProcessor()(str(eps))
    with pytest.raises(BadRow, match="not an image"):
        picture_of({"image": str(eps)}, "image")


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (None, "no image"), (b"", "no image"), ("", "no image"), ({"bytes": None, "path": None}, "no image"),
        (b"no picture", "not an image"), ("missing.png", "missing image file"), (".", "not an image"),
        (FILES["PNG file"][:100], "truncated or broken image"), ("https://example.com/a.png", "a URL, which is not"),
        ("s3://bucket/a.png", "a URL, which is not"), (5, "not an image but of type int"), (np.zeros(5), "shape"),
        (np.zeros((7, 4, 5)), "7 channels"), (np.full((4, 4), -1), "below 0"),
        (np.full((4, 4), 300.0), "floats from 300"),
        (np.full((4, 4), np.nan), "floats from nan"), (Image.new("RGB", (1, 2000)), "longer than 1000 times"),
        (np.zeros((0, 4, 3)), "without pixels"),
    ],
)  # fmt: skip
def test_unreadable_sources_are_reported_with_a_cause(source, cause):
    with pytest.raises(PictureError, match=cause):
        read_picture(source)


def test_too_many_pixels():
    with pytest.raises(PictureError, match="decompression bomb"):
        read_picture(FILES["PNG file"], max_pixels=60 * 44 - 1)
    assert read_picture(FILES["PNG file"], max_pixels=60 * 44).size == (60, 44)


def test_extensions_and_bytes(tmp_path):
    assert {".png", ".jpg", ".jp2", ".avif", ".mpo", ".ppm", ".webp"} <= extensions() and ".eps" not in extensions()
    (tmp_path / "a").write_bytes(b"x")
    assert picture_bytes(str(tmp_path / "a")) == picture_bytes({"bytes": b"x"}) == b"x"
    for source, cause in ((None, "no image"), (str(tmp_path / "b"), "missing")):
        with pytest.raises(PictureError, match=cause):
            picture_bytes(source)


def test_eight_bits():
    assert to_eight_bits(np.array([0, 257, 65535]), "I;16").tolist() == [0, 1, 255]
    assert to_eight_bits(np.array([0, 100, 255]), "I").tolist() == [0, 100, 255]
    assert to_eight_bits(np.array([0, 2**31 - 1]), "I").tolist() == [0, 255]
    assert to_eight_bits(np.array([0.0, 0.5, np.nan, 1.0]), "F").tolist() == [0, 128, 0, 255]


# --- options of the processors, compared with transformers ------------------------------------------------------------

ARRAY = np.asarray(drawing().resize((64, 44)))  # an even number of pixels is cropped, so both round alike


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (ARRAY, {}), (ARRAY / 255, {}), (ARRAY / 255, {"do_rescale": False}), (ARRAY.astype(np.float32), {}),
        (ARRAY.transpose(2, 0, 1), {"input_data_format": "channels_first"}), (ARRAY, {"do_rescale": False}),
        (ARRAY, {"rescale_factor": 0.5}), (ARRAY, {"do_normalize": False}), (ARRAY, {"do_resize": False}),
        (ARRAY, {"size": {"shortest_edge": 32, "longest_edge": 36}, "do_center_crop": False}),
        (ARRAY, {"size": {"height": 20, "width": 30}, "do_center_crop": False}), (ARRAY, {"crop_size": 20}),
        (ARRAY, {"image_mean": 0.5, "image_std": 0.25}), (ARRAY, {"do_center_crop": False}),
        (torch.from_numpy(ARRAY.copy()).permute(2, 0, 1), {}), (Image.fromarray(ARRAY), {"resample": 2}),
        (ARRAY[..., :1], {"input_data_format": "channels_last"}),
    ],
)  # fmt: skip
def test_options_match_transformers(image, options):
    ours = vlp.VlpClipImageProcessor(size={"shortest_edge": 32}, crop_size=32)(image, return_tensors="pt", **options)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)(image, return_tensors="pt", **options)
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"].expand_as(ours["pixel_values"]),
                               rtol=1e-5, atol=1e-6, check_dtype=False)  # fmt: skip


def test_bfloat16_tensors_match_float32():
    values = torch.from_numpy(ARRAY.copy()).permute(2, 0, 1).bfloat16() / 255
    processor = vlp.VlpClipImageProcessor(size=32, crop_size=32)
    half, whole = (processor(v, return_tensors="pt")["pixel_values"] for v in (values, values.float()))
    assert torch.equal(half, whole)
    assert from_array(values)[1] and not from_array(torch.from_numpy(ARRAY.copy()))[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"longest_edge": 32}}, "size"), ({"do_convert_rgb": False}, "do_convert_rgb=False"),
        ({"do_pad": True, "pad_size": {"height": 9, "width": 9}}, "do_pad=True"),
        ({"data_format": "channels_last"}, "channels_last"),
        ({"input_data_format": "rows"}, "input_data_format.*'rows'"),
    ],
)  # fmt: skip
def test_unsupported_options_are_rejected(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        vlp.VlpClipImageProcessor(size=32, crop_size=32)(ARRAY, return_tensors="pt", **options)


def test_blip_size_given_as_a_number_is_a_square():
    assert vlp.VlpBlipImageProcessor(size=32)(ARRAY, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    assert vlp.VlpBlipImageProcessor()(ARRAY, size=48, return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)


def test_pipeline_does_not_affect_other_models(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    classify = pipeline("zero-shot-image-classification", model=CLIPModel(config), image_processor=images,
                        tokenizer=tiny_pair()[1].tokenizer)  # fmt: skip
    given = classify.preprocess(transparent("red"), candidate_labels=["a"])["pixel_values"]
    assert torch.equal(given, images(transparent("red").convert("RGB"), return_tensors="pt")["pixel_values"])


# --- training crops ---------------------------------------------------------------------------------------------------


def shapes() -> Image.Image:
    """Smooth colours at several scales, as in a photograph."""
    rng, total = np.random.default_rng(0), np.zeros((480, 640, 3))
    for size in (4, 16, 64):
        coarse = Image.fromarray(rng.integers(0, 256, (size * 3 // 4, size, 3), np.uint8))
        total += np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), float) / (3 * size**0.25)
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def photograph(width: int, height: int, orientation: int = 1, mode: str = "RGB") -> bytes:
    """A JPEG with shapes of all sizes, upright as `width` x `height` once its EXIF orientation is applied."""
    image = shapes().resize((width, height), Image.Resampling.BICUBIC)
    if orientation == 6:  # stored turned by 90 degrees
        image = image.transpose(Image.Transpose.ROTATE_90)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.convert(mode).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(640, 480), (641, 479), (2048, 1536), (300, 300), (3000, 280)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_training_crops_of_smaller_decoded_jpegs_are_close_to_the_exact_ones(width, height, orientation):
    content, crop = photograph(width, height, orientation), PerImage(224, "random", flip=True)
    for number in range(3):
        exact = crop(read_picture(content), random.Random(number))
        fast = crop.read(content, random.Random(number))
        difference = np.abs(np.asarray(exact, float) - np.asarray(fast, float)).mean()
        assert fast.size == (224, 224) and fast.mode == "RGB" and difference < 3


def test_a_jpeg_is_decoded_smaller_only_if_the_crop_stays_large_enough():
    sizes = []
    for share in (1.0, 0.51, 0.5, 0.3, 0.25, 0.124):
        sizes.append(read_picture(photograph(640, 480), draft=lambda *size, share=share: share).size)
    assert sizes == [(640, 480), (640, 480), (320, 240), (320, 240), (160, 120), (80, 60)]
    given = []
    read_picture(photograph(640, 480, 6), draft=lambda *size: given.append(size) or 1.0)
    assert given == [(640, 480)]  # upright


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_of_jpegs(mode):
    crop = PerImage(64, "random")
    assert crop.read(photograph(640, 480, mode=mode), random.Random(0)).mode == "RGB"


def test_other_formats_are_cropped_exactly_as_before():
    file = io.BytesIO()
    shapes().save(file, "PNG")
    crop = PerImage(64, "random", random_augment=True, flip=True)
    for number in range(3):
        expected = crop(read_picture(file.getvalue()), random.Random(number))
        assert crop.read(file.getvalue(), random.Random(number)).tobytes() == expected.tobytes()


def test_heic_is_named(tmp_path):
    content = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)
    (tmp_path / "phone.jpg").write_bytes(content)
    for source in (content, tmp_path / "phone.jpg", str(tmp_path / "phone.jpg")):
        with pytest.raises(PictureError, match="HEIC, which Pillow cannot read: convert it to JPEG"):
            read_picture(source)
