"""SigLIP's SentencePiece tokenizer as one of the tokenizers library, which needs no sentencepiece."""

import string
from pathlib import Path
from types import SimpleNamespace

from tokenizers import Regex, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter

END, UNKNOWN = "</s>", "<unk>"
PUNCTUATION = "[" + "".join(f"\\{mark}" for mark in string.punctuation) + "]"


def siglip_tokenizer(file: str | Path, settings: dict) -> PreTrainedTokenizerFast:
    """Read SigLIP's tokenizer. Token ids are those of transformers' SiglipTokenizer.

    Punctuation is removed, letters are made lower case and white space is collapsed, as in google-research/big_vision.

    Args:
        file: `tokenizer.json`, or SentencePiece's `spiece.model`.
        settings: the content of `tokenizer_config.json`.
    """
    if Path(file).suffix == ".json":
        backend = Tokenizer.from_file(str(file))
    else:
        backend = SpmConverter(SimpleNamespace(vocab_file=str(file))).converted()
    canonical = [normalizers.Lowercase()] if settings.get("do_lower_case", True) else []
    canonical += [normalizers.Replace(Regex(PUNCTUATION), ""), normalizers.Replace(Regex(r"\s+"), " ")]
    canonical += [normalizers.Strip()]
    backend.normalizer = normalizers.Sequence([*canonical, *([backend.normalizer] if backend.normalizer else [])])
    end, pad, unknown = (
        token.get("content") if isinstance(token, dict) else token  # a dictionary in older folders
        for token in (
            settings.get("eos_token", END),
            settings.get("pad_token", END),
            settings.get("unk_token", UNKNOWN),
        )
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=pad, unk_token=unknown,
        model_max_length=settings.get("model_max_length", 64),
        model_input_names=["input_ids"], padding_side="right",
    )  # fmt: skip
