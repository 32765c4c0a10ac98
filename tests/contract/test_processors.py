"""ProcessorTesterMixin on every processor of vlp."""

import unittest

import archive  # noqa: F401, I001  # first: makes the package `tests` importable
from conftest import CAPTIONS
from tests.test_processing_common import ProcessorTesterMixin
from transformers import PreTrainedTokenizerFast
from vlp.processing.blip import train_tokenizer

import vlp


class ClipProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = vlp.VlpClipProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return vlp.VlpClipTokenizer.train(CAPTIONS, 600)

    @classmethod
    def _setup_image_processor(cls):
        return vlp.VlpClipImageProcessor()


class BlipProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = vlp.VlpBlipProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return train_tokenizer(CAPTIONS, 200)

    @classmethod
    def _setup_image_processor(cls):
        return vlp.VlpBlipImageProcessor()


class Blip2ProcessorTest(BlipProcessorTest):
    processor_class = vlp.VlpBlip2Processor

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = train_tokenizer(CAPTIONS, 200)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
        )
