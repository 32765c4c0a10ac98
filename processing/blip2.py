"""Preprocessing for BLIP-2 in stage 2, with a language model's tokenizer. Stage 1 uses BLIP's (`blip.py`).

Source: salesforce/LAVIS, models/blip2_models/blip2_opt.py.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .blip import VlpBlipProcessor
from .clip import VlpClipProcessor, VlpClipProcessorKwargs, forget_last_call

QUESTION = "Question: {} Short answer:"  # the prompt of a question; LAVIS, blip2_opt.py


def prompt_of(turns: Sequence[str]) -> str:
    """The prompt of a conversation, as the chat template writes it: questions and answers in turn, a question last."""
    asked = [QUESTION.format(question.strip()) for question in turns[::2]]
    answered = [*(answer.strip() for answer in turns[1::2]), ""]
    return " ".join(f"{question} {answer}" for question, answer in zip(asked, answered, strict=True)).strip()


# Messages as that prompt, turn by turn. The picture of a conversation has no place in the text: it is read before it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message["content"] is string -%}{%- set text = message["content"] -%}{%- else -%}
{%- set text = message["content"] | selectattr("type", "equalto", "text") | map(attribute="text") | join(" ") -%}
{%- endif -%}
{%- if not loop.first %} {% endif -%}
{%- if message["role"] == "user" -%}BEFORE{{ text | trim }}
{%- elif message["role"] == "assistant" -%}AFTER {{ text | trim }}
{%- else -%}{{ text | trim }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %} AFTER{% endif -%}
""".replace("BEFORE", QUESTION.partition("{}")[0]).replace("AFTER", QUESTION.partition("{} ")[2])


class VlpBlip2ProcessorKwargs(VlpClipProcessorKwargs, total=False):
    """The options of `VlpBlip2Processor`."""

    _defaults = VlpClipProcessorKwargs._defaults  # typed dictionaries do not inherit attributes


class VlpBlip2Processor(VlpClipProcessor):
    """Prepares images and prompts in one call, with a language model's tokenizer; prompts are padded on the left.

    `apply_chat_template` turns messages into prompts: questions by the user, and answers by the assistant. A
    conversation is about one picture, which the model reads before the text.
    """

    valid_processor_kwargs = VlpBlip2ProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template or CHAT_TEMPLATE)
        prepare_tokenizer(tokenizer)

    def __call__(self, images=None, text=None, **kwargs):
        """Prepare images and texts.

        Args:
            images: one image, a list of images, or a list of lists of one image each, as conversations have them.
            text: a text, or a list of texts, one for each image.
            kwargs: options of transformers' processors.

        Raises:
            ValueError: if a conversation has no picture, or several.
        """
        if isinstance(images, (list, tuple)) and images and all(isinstance(each, (list, tuple)) for each in images):
            count = next((len(each) for each in images if len(each) != 1), 1)
            if count != 1:
                raise ValueError(f"A conversation of BLIP-2 must be about one picture; this one has {count}.")
            images = [each[0] for each in images]
        return super().__call__(images=images, text=text, **kwargs)

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


class VlpInstructBlipProcessor(VlpBlip2Processor):
    """`VlpBlip2Processor` for InstructBLIP: texts are also tokenized for the Q-Former, which reads them, too.

    Args:
        image_processor, tokenizer, chat_template: as for `VlpBlip2Processor`.
        qformer_tokenizer: the tokenizer of the Q-Former, as BLIP's.
    """

    def __init__(self, image_processor=None, tokenizer=None, qformer_tokenizer=None, chat_template=None, **kwargs):
        forget_last_call(tokenizer)
        forget_last_call(qformer_tokenizer)
        ProcessorMixin.__init__(
            self, image_processor, tokenizer, qformer_tokenizer, chat_template=chat_template or CHAT_TEMPLATE
        )
        prepare_tokenizer(tokenizer)

    def __call__(self, images=None, text=None, **kwargs):
        """Prepare images and instructions. Without a text, the instructions are empty.

        Args, and what it raises: as for `VlpBlip2Processor`.

        Returns:
            `VlpBlip2Processor`'s, `qformer_input_ids` and `qformer_attention_mask`, (B, N') each.
        """
        inputs = super().__call__(images=images, text=text, **kwargs)
        texts = [""] * len(inputs["pixel_values"]) if text is None else [text] if isinstance(text, str) else list(text)
        return BatchFeature(inputs | self.instructions(texts))

    def instructions(self, texts: list[str]) -> dict[str, Tensor]:
        """Tokenize texts for the Q-Former, truncated to what it can read and padded on the right to the longest.

        Args:
            texts: T texts.

        Returns:
            `qformer_input_ids` and `qformer_attention_mask`, (T, N) each.
        """
        tokens = self.qformer_tokenizer(
            [self.clean(text) for text in texts], padding=True, truncation=True, return_tensors="pt"
        )
        return {"qformer_input_ids": tokens["input_ids"], "qformer_attention_mask": tokens["attention_mask"]}

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as `VlpBlip2Processor` does, with the Q-Former's tokenizer in a folder of its own."""
        forget_last_call(self.qformer_tokenizer)
        return super().save_pretrained(save_directory, *args, **kwargs)


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
