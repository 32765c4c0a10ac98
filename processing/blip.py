"""Images and captions for BLIP. Source: salesforce/BLIP, data/utils.py, data/__init__.py, models/blip.py."""

import json
import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .clip import VlpClipImageProcessor, VlpClipProcessor
from .tokenizer import clean_nested

DECODE, ENCODE = "[DEC]", "[ENC]"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's
MAX_WORDS = 30


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """BLIP's `pre_caption`: lower case, without punctuation that ends or marks off, cut to so many words."""
    text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    return " ".join(re.sub(r"\s{2,}", " ", text).strip().split(" ")[:max_words])


class VlpBlipImageProcessor(VlpClipImageProcessor):
    """BLIP's evaluation preprocessing: the whole image, converted to RGB, then resized to a square (bicubic)."""

    size = {"height": 384, "width": 384}
    default_to_square = True
    do_center_crop = False
    rgb_before_resize = True


class VlpBlipProcessor(VlpClipProcessor):
    """Images and texts in one call; texts are cleaned as BLIP's captions are (`clean_caption`).

    A text begins with [CLS], which the models replace by [ENC] to match and by [DEC] to write.
    """

    def __call__(self, images=None, text=None, **kwargs):
        return super().__call__(images=images, text=clean_nested(text, clean_caption), **kwargs)

    def read_texts(self, texts: list[str], max_length: int):
        return super().read_texts(clean_nested(texts, clean_caption), max_length)

    def write(self, token_ids, prompt: str = "") -> list[str]:
        """Generated token ids -> texts, without special tokens and the prompt that they began with."""
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [text.removeprefix(clean_caption(prompt)).strip() for text in texts]


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Learn BERT's kind of vocabulary (WordPiece, lower case) from captions, with [DEC] and [ENC] at its end.

    Args:
        vocab_size: entries in all; fewer come out where the captions have no more, more where they have more letters.
    """
    if vocab_size < 64:
        raise ValueError(f"vocab_size must be at least 64 to hold letters and special tokens, got {vocab_size}.")
    texts = [clean_caption(text) for text in captions]
    learner = _word_piece_tokenizer({"[UNK]": 0})
    letters = sorted({letter for text in texts for letter in learner.normalizer.normalize_str(text)} - {" "})
    # Letters within a word would else be numbered as they are met, in another order in each process, and the order
    # settles which of two equally frequent pairs is merged first.
    known = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size - 2, len(known)), special_tokens=known, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    vocabulary = json.loads(learner.to_str())["model"]["vocab"]
    tokenizer = _word_piece_tokenizer(vocabulary)  # without the letters being special
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    return with_blip_tokens(tokenizer, max_length)


def _word_piece_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def load_tokenizer(name: str, max_length: int) -> PreTrainedTokenizerFast:
    """A BERT tokenizer by its hub name or folder, with BLIP's tokens.

    Raises ValueError where it has no [CLS], [SEP] or padding.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        raise ValueError(f"{name} lacks [CLS], [SEP] or [PAD]: BLIP needs a tokenizer of BERT's kind.")
    return with_blip_tokens(tokenizer, max_length)


def with_blip_tokens(tokenizer: PreTrainedTokenizerFast, max_length: int) -> PreTrainedTokenizerFast:
    """Add [DEC] as the beginning and [ENC] (salesforce/BLIP, models/blip.py, init_tokenizer); [SEP] is the end."""
    tokenizer.add_special_tokens({"bos_token": DECODE, "eos_token": tokenizer.sep_token})
    tokenizer.add_special_tokens({"additional_special_tokens": [ENCODE]})
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def token_ids(tokenizer) -> dict[str, int]:
    """The fields of `VlpBlipTextConfig` that follow from a tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "enc_token_id": tokenizer.convert_tokens_to_ids(ENCODE),
    }
