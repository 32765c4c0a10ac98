"""Images and texts for BLIP-2 in stage 2: texts are the language model's. Stage 1 reads as BLIP does (`blip.py`).

Source: salesforce/LAVIS, models/blip2_models/blip2_opt.py.
"""

from transformers import PreTrainedTokenizerBase

from .blip import VlpBlipProcessor
from .clip import VlpClipProcessor


class VlpBlip2Processor(VlpClipProcessor):
    """Images and prompts in one call, with a language model's tokenizer; prompts are padded on the left."""

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer)
        prepare_tokenizer(tokenizer)

    def read_texts(self, texts: list[str], max_length: int):
        """Texts to learn from as a batch of token ids, each with the end token, padded on the right."""
        tokenizer = self.tokenizer
        rows = [
            ids[: max_length - 1] + [tokenizer.eos_token_id]
            for ids in tokenizer([self.clean(text) for text in texts])["input_ids"]
        ]
        return tokenizer.pad({"input_ids": rows}, padding=True, padding_side="right", return_tensors="pt")

    def clean(self, text: str) -> str:
        return " ".join(text.split())

    write = VlpBlipProcessor.write


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """What a language model's tokenizer must have: an end token, and padding, on the left.

    Raises ValueError where it has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The language model's tokenizer has no end token, which texts are to end with.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
