"""SigLIP's tokenizer equals transformers' SiglipTokenizer, which uses sentencepiece."""

import json
import subprocess
import sys

import pytest
from transformers import SiglipTokenizer

from vlp.errors import UnsupportedModelError
from vlp.loading import load_auto_tokenizer

TEXTS = ["A photo of a Cat!", "pink lamp, large", "  two   spaces\tand\nlines ", "Ünïcode — dashes…", "a_b-c",
         "it's (really) #1?", "", "日本 lamp", "’quote’ “x” ½ ﬁ"]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder with a small tokenizer as SigLIP's, and the tokenizer."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("siglip")
    lines = [f"a {size} {colour} {thing}" for size in ("large", "small") for colour in ("pink", "red", "blue")
             for thing in ("lamp", "photo of a cat", "quote and dashes", "really two spaces")]  # fmt: skip
    (folder / "texts.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"), model_prefix=str(folder / "spiece"), vocab_size=35, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16)
    tokenizer.save_pretrained(folder / "saved")
    return folder / "saved", tokenizer


def test_ids_are_those_of_transformers(theirs):
    folder, tokenizer = theirs
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    batch = {"padding": "max_length", "truncation": True}
    padded = tokenizer(TEXTS, **batch)["input_ids"]
    ours = load_auto_tokenizer(folder)
    assert ours.pad_token_id == tokenizer.pad_token_id and ours.model_input_names == ["input_ids"]
    assert [ours(text)["input_ids"] for text in TEXTS] == expected
    assert ours(TEXTS, **batch)["input_ids"] == padded


def test_sentencepiece_is_not_needed(theirs):
    code = """
import json, sys
import transformers.convert_slow_tokenizer as slow
sys.modules["sentencepiece"] = None
slow.is_sentencepiece_available = lambda: False
from vlp.loading import load_auto_tokenizer
tokenizer = load_auto_tokenizer(sys.argv[1])
print(json.dumps([tokenizer(text)["input_ids"] for text in json.loads(sys.argv[2])]))
"""
    words = [sys.executable, "-c", code, str(theirs[0]), json.dumps(TEXTS)]
    found = subprocess.run(words, capture_output=True, text=True, cwd="/")
    assert json.loads(found.stdout or "null") == [theirs[1](text)["input_ids"] for text in TEXTS], found.stderr


def test_it_is_saved_as_one_file(theirs, tmp_path):
    folder, tokenizer = theirs
    load_auto_tokenizer(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "spiece.model").exists()
    again = load_auto_tokenizer(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_missing_files_are_named(theirs, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text((theirs[0] / "tokenizer_config.json").read_text())
    with pytest.raises(UnsupportedModelError, match="neither a spiece.model nor a tokenizer.json"):
        load_auto_tokenizer(tmp_path)
