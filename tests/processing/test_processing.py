"""Image and caption preprocessing matches OpenAI's reference package."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, tiny_processor
from PIL import Image
from torch.testing import assert_close
from transformers import AutoProcessor, AutoTokenizer
from vlp.processing.augmentation import (
    PerImage,
    ToPixelValues,
    blur,
    move,
    outline,
    random_box,
    sharpen,
    strong_augmentation,
    thicken,
    thin,
)
from vlp.processing.blip import train_tokenizer
from vlp.processing.pictures import read_picture
from vlp.processing.prompts import CLASS_NAMES, TEMPLATES, prompts_for
from vlp.processing.tokenizer import clean_caption

import vlp


def blip_processor(captions: list[str]) -> vlp.VlpBlipProcessor:
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    return vlp.VlpBlipProcessor(images, train_tokenizer(captions, 120, max_length=20))


clip = pytest.importorskip("clip", reason="OpenAI's reference package")
MERGES = Path(clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")


def odd_images() -> list[Image.Image]:
    """A hundred pictures: every mode, odd sizes, one pixel wide, transparent, palette, EXIF rotated."""
    rng = np.random.default_rng(0)
    sizes = [(1, 50), (50, 1), (1, 1), (7, 300), (300, 7), (223, 224), (224, 225), (225, 224), (301, 200), (640, 427)]
    images = []
    for number in range(100):
        width, height = sizes[number % 10] if number < 60 else tuple(rng.integers(2, 400, 2))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
        mode = ("RGB", "RGBA", "L", "P", "LA", "1", "CMYK", "PA", "I;16", "RGB")[number // 10]
        if mode == "P":
            image = image.convert("RGB").quantize(16)
            image.info["transparency"] = 3
        elif mode == "PA":
            image = image.convert("RGB").convert("P").convert("PA")
        elif mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
        elif mode != "RGBA":
            image = image.convert("RGB").convert(mode)
        if number >= 90:
            exif = image.getexif()
            exif[0x0112] = 1 + number % 8
            image.info["exif"] = exif.tobytes()
        images.append(image)
    return images


@pytest.mark.parametrize("side", [224, 97])
def test_preprocessing_is_bit_identical_to_openai(side):
    """Both get the output of `read_picture`, which leaves opaque, upright eight-bit pictures unchanged."""
    reference = clip.clip._transform(side)
    processor = vlp.VlpClipImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    same = 0
    for number, image in enumerate(odd_images()):
        picture = read_picture(image)
        same += picture.mode == image.mode and picture.tobytes() == image.tobytes()
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, reference(picture)), f"image {number}, {image.mode} {image.size}"
    assert same >= 45  # pictures that `read_picture` leaves unchanged


def test_arrays_and_tensors_of_any_layout():
    processor = vlp.VlpClipImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array), array.astype(np.float32)):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)
    scaled = processor(array / 255, do_rescale=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(scaled, expected)
    with pytest.raises(ValueError, match="shape"):
        processor.process_image(np.zeros(5))


def odd_texts() -> list[str]:
    texts = [
        "", " ", "a photo of a cat", "A PHOTO  of\ta\n cat", "it's", "don't won't I'll we've they'd you're I'm", "rock'n'roll",
        "l'été à la plage", "naïve café", "Ünïcödé", "ﬁne ligature", "caf\u0065\u0301", "&lt;b&gt;bold&lt;/b&gt;", "&amp;amp;",
        "&eacute;t&eacute;", "fish &amp;amp; chips", "100%", "3.14159", "1,000,000", "2024-01-31", "a1b2c3", "🙂", "👩‍👩‍👧‍👦 family",
        "🇻🇳 flag", "👍🏽", "xin chào các bạn", "Đường phố Hà Nội", "日本語のテキスト", "한국어", "العربية", "עברית", "Привет мир",
        "ελληνικά", "हिन्दी", "ไทย", "'quoted'", '"double"', "“curly”", "it’s", "—dash—", "…", "a...b", "!!!", "#hash @at",
        "https://example.com/?a=b&c=d", "user@example.com", "C:\\path\\file", "<|startoftext|>", "a <|endoftext|> b",
        "word " * 200, "x" * 500, "supercalifragilisticexpialidocious", "ＦＵＬＬ width", "ﷺ", "\u00a0nbsp\u00a0", "zero\u200bwidth",
        "tab\tnew\nline\r\n", "Ã©tÃ© mojibake", "â€œquotesâ€\x9d", "İstanbul", "ß STRASSE", "Ǆ ǅ ǆ", "½ ⅓ ²", "Ⅷ Ⅻ", "①②③", "̈combining",
        "a\u0308", "'s", "''s", "S'S", "'tis", "o'clock", "l l l", "__under__score", "snake_case", "kebab-case", "CamelCase",
        "$9.99", "€5", "50°C", "x²+y²=z²", "A/B", "50/50", "(parens)", "[brackets]", "{braces}", "a*b", "~tilde~", "`tick`",
        "^caret", "|pipe|", "\\n", "null\u0000byte", "\ufeffbom", "�", "emoji😀in😀word", "T-Rex's", "the dogs' toys", "1st 2nd 3rd",
        "mp3s", "r&b", "AT&T", "q&amp;a",
    ]  # fmt: skip
    return texts


def test_tokens_match_openai():
    tokenizer = vlp.VlpClipTokenizer.from_openai_merges(MERGES)
    assert len(tokenizer) == 49408
    texts = odd_texts()
    assert len(texts) >= 100
    expected = clip.tokenize(texts, truncate=True)
    for text, row in zip(texts, expected, strict=True):
        ids = tokenizer(text, truncation=True)["input_ids"]
        assert ids == row.tolist()[: int(row.ne(0).nonzero().max()) + 1], repr(text)


def test_openai_tokenizer_round_trips_through_a_folder(tmp_path):
    tokenizer = vlp.VlpClipTokenizer.from_openai_merges(MERGES)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is vlp.VlpClipTokenizer and loaded.clean_text
    text = "fish &amp;amp; chips"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded("A cat's café")["input_ids"], skip_special_tokens=True) == "a cat 's café"


def test_cleaning_matches_openai():
    from clip.simple_tokenizer import basic_clean, whitespace_clean

    for text in odd_texts():
        assert clean_caption(text) == whitespace_clean(basic_clean(text)).lower()


def test_trained_tokenizer_encodes_any_text_in_few_tokens():
    tokenizer = vlp.VlpClipTokenizer.train(CAPTIONS * 3, 600, max_length=20)
    assert len(tokenizer) <= 600
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # the largest id, as in OpenAI's vocabulary
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer("square")["input_ids"]) < len("square") + 2
    for text in ("zebra ☺ déjà vu", "xin chào"):  # unseen text is encoded as bytes
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    long = tokenizer("word " * 100, truncation=True)["input_ids"]
    assert len(long) == 20 and long[-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="at least 515.*got 100"):
        vlp.VlpClipTokenizer.train(CAPTIONS, 100)


def test_processor_pads_to_the_longest_and_round_trips(tmp_path, images):
    processor = tiny_processor()
    batch = processor(images=images, text=["a cat", "two yellow triangles", "dog"], return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["input_ids"].shape[1] == int(batch["attention_mask"].sum(1).max())
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is vlp.VlpClipProcessor
    again = loaded(images=images, text=["a cat", "two yellow triangles", "dog"], return_tensors="pt")
    for name, tensor in batch.items():
        assert torch.equal(again[name], tensor)


def test_random_crops_follow_the_paper():
    rng = random.Random(0)
    for _ in range(200):
        left, top, width, height = random_box(200, 150, rng)
        assert 0 <= left <= 200 - width and 0 <= top <= 150 - height
        assert 0.88 <= width * height / (200 * 150) <= 1.0
        assert 0.73 <= width / height <= 1.36
    crop = PerImage(32, "random")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    assert crop(picture, random.Random(1)).tobytes() == crop(picture, random.Random(1)).tobytes()
    assert crop(picture, random.Random(1)).tobytes() != crop(picture, random.Random(2)).tobytes()
    assert crop(Image.new("P", (1, 500)), random.Random(0)).size == (32, 32)


def test_strong_augmentation_is_per_image_and_stays_in_range():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).repeat(4, 1, 1, 1)
    output = strong_augmentation(images / 255)
    assert output.shape == (4, 3, 32, 32) and output.min() >= 0 and output.max() <= 1
    assert all((output[i] - output[j]).abs().mean() > 0.01 for i in range(4) for j in range(i))
    white = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
    moved = move(white.float() / 255)
    assert_close(moved, torch.ones_like(moved))  # pixels from outside the image are white


def test_no_augmentation_equals_evaluation_preprocessing():
    processor = vlp.VlpClipImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(PerImage(32, "middle")(picture, random.Random(0)))).permute(2, 0, 1)[None]
    to_pixel_values = ToPixelValues(processor.image_mean, processor.image_std)
    assert torch.equal(to_pixel_values(pixels), processor(picture, return_tensors="pt")["pixel_values"])


def test_restyling_darkens_and_lightens_lines():
    image = torch.ones(1, 3, 9, 9)
    image[..., 4] = 0  # a dark line
    assert thicken(image)[0, 0, 4].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert thin(image).min() == 1
    assert outline(image)[0, 0, 4, 3] < 1 and outline(image)[0, 0, 4, 0] == 1
    assert sharpen(image)[0, 0, 4, 3] > 1 > blur(image)[0, 0, 4, 3]


def test_templates_match_the_paper():
    open_clip = pytest.importorskip("open_clip")
    assert {template("X") for template in open_clip.OPENAI_IMAGENET_TEMPLATES} == {
        template.format("X") for template in TEMPLATES["imagenet"]
    }
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)
    assert len(CLASS_NAMES["cifar10"]) == len(CLASS_NAMES["fashion_mnist"]) == len(CLASS_NAMES["mnist"]) == 10


def test_prompts():
    assert prompts_for(["cat", "dog"], ("a {}", "the {}")) == [["a cat", "the cat"], ["a dog", "the dog"]]
    with pytest.raises(ValueError, match="'nothing'"):
        prompts_for(["cat"], "nothing")
    with pytest.raises(ValueError, match="a cat"):
        prompts_for(["cat"], ("a cat",))


WORDS = [f"{a}{b} {b}{c}{a}" for a in "abcdefg" for b in "hijklmn" for c in "opqrs"]


def vocabularies() -> list[str]:
    """What both kinds of tokenizers learn, each trained twice."""
    return [str(sorted(train(WORDS, 700).get_vocab().items()))
            for train in (vlp.VlpClipTokenizer.train, train_tokenizer) for _ in range(2)]  # fmt: skip


def test_tokenizer_training_is_the_same_in_every_process():
    """Resumed runs and the processes of one run each train the tokenizer again, with different string hashes."""
    code = "import test_processing\nprint(*test_processing.vocabularies(), sep='\\n')"
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{places}",
    }
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.splitlines() == vocabularies()
    assert len(set(vocabularies())) == 2 and "'a'" in vocabularies()[0]


def test_processor_takes_nested_options(images):
    processor = tiny_processor()
    texts = ["a cat", "two yellow triangles", "dog"]
    flat = processor(images=images, text=texts, padding="max_length", return_tensors="pt")
    nested = processor(images=images, text=texts, text_kwargs={"padding": "max_length"}, return_tensors="pt")
    assert torch.equal(flat["input_ids"], nested["input_ids"]) and flat["input_ids"].shape[1] == 20


@pytest.mark.parametrize("make", [tiny_processor, lambda: blip_processor(["a red square", "two dogs"])])
def test_nested_and_plain_options_of_processors_agree(make, images):
    """sentence-transformers passes nested options."""
    processor, texts = make(), ["a red square", "two"]
    nested = processor(
        images=images[:2], text=texts, text_kwargs={"padding": "max_length", "max_length": 12},
        images_kwargs={"do_normalize": False}, common_kwargs={"return_tensors": "pt"},
    )  # fmt: skip
    plain = processor(images=images[:2], text=texts, padding="max_length", max_length=12, do_normalize=False,
                      return_tensors="pt")  # fmt: skip
    assert nested["input_ids"].shape == (2, 12)
    for name, value in plain.items():
        assert torch.equal(nested[name], value)
    assert processor(text=texts, return_tensors="pt")["input_ids"].shape[0] == 2  # padded by default


@pytest.mark.parametrize("make", [tiny_processor, lambda: blip_processor(CAPTIONS)])
def test_saved_processors_cut_texts_to_what_the_model_reads(make, tmp_path):
    processor = make()
    processor.tokenize(["a red square"], 512)  # a call with another length, as in evaluation
    processor.save_pretrained(tmp_path)
    for again in (AutoProcessor.from_pretrained(tmp_path), type(processor).from_pretrained(tmp_path)):
        assert again(text=["red square " * 40], return_tensors="pt")["input_ids"].shape == (1, 20)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(["red square " * 40], truncation=True, return_tensors="pt")["input_ids"].shape == (1, 20)


def test_chat_templates_and_their_processor_are_saved(tmp_path):
    processor = vlp.VlpClipProcessor(
        tiny_processor().image_processor, tiny_processor().tokenizer, chat_template="{{ messages }}"
    )
    processor.save_pretrained(tmp_path)
    assert vlp.VlpClipProcessor.from_pretrained(tmp_path).chat_template == "{{ messages }}"
