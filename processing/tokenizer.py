"""CLIP's byte-pair tokenizer, with OpenAI's vocabulary or a smaller one trained on your own captions."""

import gzip
import html
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import ftfy
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
OPENAI_MERGES = 48_894
# Source: openai/CLIP, clip/simple_tokenizer.py. Each digit is a word; so is each run of letters or other symbols.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
END_OF_WORD = "</w>"


def clean_caption(text: str) -> str:
    """Clean a caption as OpenAI does: repair Unicode, unescape HTML (twice), collapse white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()


class VlpClipTokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE with a start and an end token, padded on the right.

    Args:
        clean_text: whether to repair Unicode and HTML as OpenAI's tokenizer does (`clean_caption`). White space and
            letter case are always normalised.
    """

    model_input_names = ["input_ids", "attention_mask"]

    # No `__init__`: if a class has one, transformers rebuilds its backend from the vocabulary only.
    @property
    def clean_text(self) -> bool:
        return self.init_kwargs.get("clean_text", False)

    def _encode_plus(self, text, text_pair=None, **kwargs):
        if self.clean_text:
            text, text_pair = clean_nested(text), clean_nested(text_pair)
        return super()._encode_plus(text, text_pair, **kwargs)

    @classmethod
    def from_openai_merges(cls, path: str | Path, max_length: int = 77) -> "VlpClipTokenizer":
        """Load OpenAI's tokenizer. Ids and cleaning are the same as theirs, except for padding.

        Args:
            path: OpenAI's file bpe_simple_vocab_16e6.txt.gz.
            max_length: the tokenizer's `model_max_length`, in tokens.

        Raises:
            ValueError: if the file does not hold pairs of word pieces.
        """
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : OPENAI_MERGES + 1]
        merges = [tuple(line.split()) for line in lines if line]
        if len(merges) < 2 or any(len(pair) != 2 for pair in merges):
            raise ValueError("it must hold one pair of word pieces per line, after a line with the version")
        return _wrap(cls, _byte_pair_tokenizer(merges, [START, END]), max_length, clean_text=True, pad_token=END)

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, max_length: int = 77, clean_text: bool = False
    ) -> "VlpClipTokenizer":
        """Train a tokenizer on captions.

        Args:
            captions: the texts to train on.
            vocab_size: size of the vocabulary, at least 515 (512 bytes, start, end, pad). It is smaller if the captions
                have fewer pairs to merge.
            max_length: the tokenizer's `model_max_length`, in tokens.
            clean_text: whether to repair Unicode and HTML, in training and in use (`clean_caption`).

        Raises:
            ValueError: if `vocab_size` is below 515.
        """
        base = 2 * len(pre_tokenizers.ByteLevel.alphabet()) + 3
        if vocab_size < base:
            raise ValueError(f"vocab_size must be at least {base} (bytes and special tokens), got {vocab_size}.")
        learner = _byte_pair_tokenizer([], [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 3,
            # Without this list, bytes that end a word would get ids in the order in which the trainer meets them. That
            # order differs between processes, and it decides which of two equally frequent pairs is merged first.
            special_tokens=[byte + END_OF_WORD for byte in _openai_alphabet()],
            end_of_word_suffix=END_OF_WORD,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = (clean_caption(text) if clean_text else text for text in captions)
        learner.train_from_iterator(texts, trainer)
        merges = _merges_of(learner)[: vocab_size - base]
        # The end token comes last, as in OpenAI's vocabulary, where the model locates it as the largest id.
        return _wrap(cls, _byte_pair_tokenizer(merges, [PAD, START, END]), max_length, clean_text, pad_token=PAD)


def clean_nested(text, clean: Callable[[str], str] = clean_caption):
    """Apply `clean` to a string or to nested lists of strings; None stays None."""
    if isinstance(text, str):
        return clean(text)
    return text if text is None else [clean_nested(part, clean) for part in text]


def _byte_pair_tokenizer(merges: list[tuple[str, str]], special: list[str]) -> Tokenizer:
    """A tokenizer with the vocabulary in OpenAI's order: bytes, bytes that end a word, merged pairs, special tokens."""
    alphabet = _openai_alphabet()
    entries = alphabet + [byte + END_OF_WORD for byte in alphabet] + ["".join(pair) for pair in merges] + special
    vocabulary = {}
    for entry in entries:
        vocabulary.setdefault(entry, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(END_OF_WORD, " "), decoders.Strip(" ", 0, 1)]
    )
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}",
            pair=f"{START} $A $B {END}",
            special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])],
        )
    return tokenizer


def _openai_alphabet() -> list[str]:
    """The 256 characters that represent bytes, in the order of openai/CLIP's `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(256 - len(printable))
    return [chr(code) for code in printable] + [chr(256 + code) for code in others]


def _merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _wrap(cls, tokenizer: Tokenizer, max_length: int, clean_text: bool, pad_token: str) -> VlpClipTokenizer:
    return cls(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=pad_token,
        model_max_length=max_length,
        padding_side="right",
        truncation_side="right",
        clean_text=clean_text,
    )
