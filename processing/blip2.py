"""Preprocessing for BLIP-2 in stage 2, with a language model's tokenizer. Stage 1 uses BLIP's (`blip.py`).

Source: salesforce/LAVIS, models/blip2_models/blip2_opt.py.
"""

from transformers import PreTrainedTokenizerBase

from .blip import VlpBlipProcessor
from .clip import VlpClipProcessor, VlpClipProcessorKwargs


class VlpBlip2ProcessorKwargs(VlpClipProcessorKwargs, total=False):
    """The options of `VlpBlip2Processor`."""

    _defaults = VlpClipProcessorKwargs._defaults  # typed dictionaries do not inherit attributes


class VlpBlip2Processor(VlpClipProcessor):
    """Prepares images and prompts in one call, with a language model's tokenizer; prompts are padded on the left."""

    valid_processor_kwargs = VlpBlip2ProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template)
        prepare_tokenizer(tokenizer)

    def tokenize(self, texts: list[str], max_length: int):
        """Tokenize training texts. Each ends with the end token, and they are padded on the right.

        Args:
            texts: T texts.
            max_length: maximum number of tokens per text, including the end token.

        Returns:
            Token ids and attention mask (T, N).
        """
        tokenizer = self.tokenizer
        rows = [
            ids[: max_length - 1] + [tokenizer.eos_token_id]
            for ids in tokenizer([self.clean(text) for text in texts])["input_ids"]
        ]
        return tokenizer.pad({"input_ids": rows}, padding=True, padding_side="right", return_tensors="pt")

    def clean(self, text: str) -> str:
        """Collapse white space."""
        return " ".join(text.split())

    decode_texts = VlpBlipProcessor.decode_texts


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set up a language model's tokenizer in place: padding on the left, with the end token if it has no padding token.

    Raises:
        ValueError: if it has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The language model's tokenizer has no end token, but texts must end with one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
