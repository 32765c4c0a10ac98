"""Conversion of InstructBLIP checkpoints from and to transformers."""

import pytest
import torch
from conftest import save_language_model, tiny_language_model
from PIL import Image
from safetensors.torch import load_file
from test_exchange_blip2 import PIXELS, QFORMER, VISION, equal, randomised, same
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BertTokenizerFast,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)
from vlp.modeling_vlp.exchange.places import ExchangeError

import vlp
from vlp.conversion import convert

PROMPT = torch.tensor([[1, 7, 9], [1, 8, 4]])
INSTRUCTIONS = torch.tensor([[5, 9, 7, 8, 3], [5, 11, 3, 0, 0]])
MASK = (INSTRUCTIONS != 0).long()


def peer(kind: str, vocab_size: int = 60) -> InstructBlipForConditionalGeneration:
    """A tiny model of transformers with random weights."""
    torch.manual_seed(0)
    text = tiny_language_model(kind, vocab_size=vocab_size)
    config = InstructBlipConfig(
        vision_config=VISION, qformer_config=QFORMER, text_config=text.config, num_query_tokens=5,
        image_token_index=vocab_size - 1,
    )  # fmt: skip
    model = InstructBlipForConditionalGeneration(config)
    model.language_model.load_state_dict(text.state_dict())
    return randomised(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_transformers_both_ways(tmp_path, kind):
    theirs = peer(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = vlp.VlpInstructBlipForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    ids = torch.cat([torch.full((2, 5), 59), PROMPT], dim=1)  # the image tokens come first
    read = dict(qformer_input_ids=INSTRUCTIONS, qformer_attention_mask=MASK)
    inputs = dict(pixel_values=PIXELS, input_ids=ids, attention_mask=torch.ones_like(ids), **read)
    if kind == "opt":
        same(ours(PIXELS, PROMPT, **read).logits, theirs(**inputs).logits[:, 5:])
    else:
        labels = torch.tensor([[7, 8, 2], [9, 4, 2]])
        output, mine = theirs(**inputs, labels=labels), ours(PIXELS, PROMPT, labels=labels, **read)
        same(mine.logits, output.logits)
        same(mine.loss, output.loss)
    # Padding is recognised without a mask, and the instruction changes the prefix.
    same(ours.prefix(PIXELS, qformer_input_ids=INSTRUCTIONS), ours.prefix(PIXELS, **read))
    assert not torch.allclose(ours.prefix(PIXELS, qformer_input_ids=INSTRUCTIONS.flip(0)), ours.prefix(PIXELS, **read))
    for options in ({"num_beams": 1}, {"num_beams": 4, "num_return_sequences": 2}):
        options |= {"max_new_tokens": 8, "min_new_tokens": 2}
        expected = theirs.generate(**inputs, **options)
        assert torch.equal(
            ours.generate(PIXELS, PROMPT, **read, **options), expected[:, 5:] if kind == "opt" else expected
        )
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    again = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert again.config.image_token_index == 60  # a new row of the embedding table
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name][: len(value)] if value.ndim else again.state_dict()[name], value)
    convert(tmp_path / "back", tmp_path / "again")
    kept = load_file(tmp_path / "again" / "model.safetensors")
    before = load_file(tmp_path / "ours" / "model.safetensors")
    equal({name: kept[name] for name in kept if "language_model" not in name},
          {name: before[name] for name in before if "language_model" not in name})  # fmt: skip


def folder_of_theirs(tmp_path):
    """A folder of transformers with an InstructBLIP and its processor."""
    save_language_model(tmp_path / "llm", ["a cat", "what is on the left of it ?"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm", pad_token="</s>")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "what", "is", "on", "left", "of", "it"]
    bert_tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    processor = InstructBlipProcessor(images, tokenizer, bert_tokenizer, num_query_tokens=5)
    model = peer("llama", vocab_size=len(tokenizer))
    assert model.config.image_token_index == tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    return model, processor


@torch.no_grad()
def test_the_processor_comes_along(tmp_path):
    theirs, their_processor = folder_of_theirs(tmp_path)
    convert(tmp_path / "theirs", tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(processor) is vlp.VlpInstructBlipProcessor
    image, text = Image.new("RGB", (20, 16), "red"), ["a cat", "what is on the left of it ?"]
    mine = processor(images=[image] * 2, text=text, return_tensors="pt")
    inputs = their_processor(images=[image] * 2, text=text, return_tensors="pt", padding=True)
    assert torch.equal(mine["qformer_input_ids"], inputs["qformer_input_ids"])
    assert torch.equal(mine["qformer_attention_mask"], inputs["qformer_attention_mask"])
    ours = vlp.VlpInstructBlipForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    written = ours.generate(**mine, max_new_tokens=6)
    one = their_processor(images=image, text=text[:1], return_tensors="pt")
    expected = theirs.generate(**one, max_new_tokens=6)
    alone = ours.generate(**processor(images=image, text=text[0], return_tensors="pt"), max_new_tokens=6)
    assert processor.decode_texts(alone) == [each.strip() for each in their_processor.batch_decode(
        expected, skip_special_tokens=True)]  # fmt: skip
    assert processor.decode_texts(written)[0] == processor.decode_texts(alone)[0]
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    again = InstructBlipProcessor.from_pretrained(tmp_path / "back")
    assert again.num_query_tokens == 5
    assert torch.equal(
        again(images=image, text=text[1], return_tensors="pt")["qformer_input_ids"],
        their_processor(images=image, text=text[1], return_tensors="pt")["qformer_input_ids"],
    )


def test_lavis_checkpoints_are_refused_by_name(tmp_path):
    names = ("query_tokens", "llm_proj.weight", "Qformer.bert.embeddings.word_embeddings.weight", "visual_encoder.x")
    torch.save({"model": {name: torch.zeros(1) for name in names}}, tmp_path / "instruct.pth")
    with pytest.raises(ExchangeError, match="an InstructBLIP of LAVIS. Convert transformers' copy"):
        convert(tmp_path / "instruct.pth", tmp_path / "ours")
