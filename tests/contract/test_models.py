"""ModelTesterMixin, and GenerationTesterMixin where it is available, on every model of vlp.

A test is skipped only where the test of transformers' own class of the same architecture skips it, for the same reason.
"""

import unittest

import archive  # noqa: F401, I001  # first: makes the package `tests` importable
import torch
from conftest import BLIP_TEXT, QFORMER, RESNET, TEXT, VIT, tiny_language_model
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin

import vlp

BATCH, LENGTH = 7, 9


class Tester:
    """What the mixins ask of a model: its configuration and a batch.

    Args:
        config: the configuration.
        inputs: the names of the inputs, with their values.
    """

    is_training = True
    batch_size = BATCH
    seq_length = LENGTH
    image_size = VIT["image_size"]
    num_hidden_layers = 2

    def __init__(self, make_config, make_inputs):
        self.get_config, self.make_inputs = make_config, make_inputs

    def prepare_config_and_inputs_for_common(self):
        torch.manual_seed(0)
        config = self.get_config()
        return config, self.make_inputs(config)


def texts(first: int, last: int, vocab_size: int) -> torch.Tensor:
    ids = torch.randint(5, vocab_size - 10, (BATCH, LENGTH))
    ids[:, 0], ids[:, -1] = first, last
    return ids


def pictures(config) -> torch.Tensor:
    side = config.vision_config.image_size
    return torch.randn(BATCH, 3, side, side)


def common(ids: torch.Tensor, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


SMALL = {"num_hidden_layers": 2}
# Special tokens at the start of the vocabulary, because the tests cut its end.
MED = BLIP_TEXT | SMALL | {"bos_token_id": 4, "enc_token_id": 1, "max_position_embeddings": 64}
TOKENS = TEXT | SMALL | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Composite(ModelTesterMixin):
    """What transformers' tests of CLIP, BLIP and BLIP-2 have in common."""

    additional_model_inputs = ["pixel_values"]
    test_resize_embeddings = False
    test_attention_outputs = False
    _is_composite = True

    @unittest.skip("as in transformers: hidden states are tested in the towers")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("as in transformers: inputs_embeds is tested in the towers")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("as in transformers: gradients of hidden states are tested in the towers")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("as in transformers: the model has no input or output embeddings of its own")
    def test_model_get_set_embeddings(self):
        pass

    def test_config(self):
        config = self.model_tester.get_config()
        ConfigTester(self, config_class=type(config), has_text_modality=False).run_common_tests()


# --- CLIP -------------------------------------------------------------------------------------------------------------


def clip(vision: dict, text: dict, **fields) -> Tester:
    fields = {"projection_dim": 64} | fields

    def make_config():
        return vlp.VlpClipConfig(vision_config=dict(vision), text_config=dict(text), **fields)

    def make_inputs(config):
        tokens = config.text_config
        ids = texts(tokens.bos_token_id, tokens.eos_token_id, tokens.vocab_size)
        return common(ids, pictures(config)) | {"return_loss": True}

    return Tester(make_config, make_inputs)


class ClipTest(Composite, unittest.TestCase):
    all_model_classes = (vlp.VlpClipModel,)

    def setUp(self):
        self.model_tester = clip(VIT | SMALL, dict(TOKENS))


class SiglipTest(Composite, unittest.TestCase):
    all_model_classes = (vlp.VlpClipModel,)
    # as in transformers: the towers' pooling heads cannot be split
    test_cpu_offload = test_disk_offload_safetensors = test_disk_offload_bin = False

    def setUp(self):
        vision, text = (
            VIT | SMALL | {"model_type": "vlp_siglip_vit"},
            TOKENS | {"model_type": "vlp_siglip_text", "max_position_embeddings": LENGTH},
        )
        self.model_tester = clip(vision, text, projection_dim=48, logit_bias_init_value=-10.0)


class ResNetClipTest(Composite, unittest.TestCase):
    all_model_classes = (vlp.VlpClipModel,)
    skip_test_image_features_output_shape = True  # as in transformers: convolutions have channels first

    @unittest.skip("as in transformers' ResNet: it has no attention maps")
    def test_get_image_features_attentions(self):
        pass

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return 1 + len(RESNET["depths"])

    def setUp(self):
        self.model_tester = clip(RESNET | {"image_size": 32}, dict(TOKENS))


# --- BLIP -------------------------------------------------------------------------------------------------------------


def blip(more=lambda config, inputs: {}) -> Tester:
    def make_config():
        return vlp.VlpBlipConfig(
            vision_config=VIT | SMALL, text_config=dict(MED), image_text_hidden_size=24
        )  # fmt: skip

    def make_inputs(config):
        inputs = common(texts(2, 3, BLIP_TEXT["vocab_size"]), pictures(config))
        return inputs | more(config, inputs)

    return Tester(make_config, make_inputs)


class BlipTest(Composite, unittest.TestCase):
    all_model_classes = (vlp.VlpBlipForPreTraining,)
    test_resize_embeddings = True

    def setUp(self):
        self.model_tester = blip()


class BlipRetrievalTest(Composite, unittest.TestCase):
    all_model_classes = (vlp.VlpBlipForImageTextRetrieval,)
    test_resize_embeddings = True

    def setUp(self):
        self.model_tester = blip()
        self.model_tester.is_training = False  # retrieval computes scores, not a loss


class BlipCaptionerTest(Composite, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (vlp.VlpBlipForConditionalGeneration,)
    additional_model_inputs = ["input_ids"]
    test_resize_embeddings = True

    def setUp(self):
        self.model_tester = blip(lambda config, inputs: {"labels": inputs["input_ids"].clone()})

    @unittest.skip("as in transformers' BLIP-2: there is nothing to generate from without an image")
    def test_generate_without_input_ids(self):
        pass

    @unittest.skip("as in transformers' BLIP-2: there is no base model without a head")
    def test_model_base_model_prefix(self):
        pass


class BlipAnsweringTest(Composite, unittest.TestCase):
    all_model_classes = (vlp.VlpBlipForQuestionAnswering,)
    all_generative_model_classes = ()  # as in transformers: generation is two models in a row
    test_resize_embeddings = True

    def setUp(self):
        self.model_tester = blip(lambda config, inputs: {"labels": inputs["input_ids"].clone()})


class BlipReasoningTest(Composite, unittest.TestCase):
    all_model_classes = (vlp.VlpBlipForVisualReasoning,)
    test_resize_embeddings = True

    def setUp(self):
        self.model_tester = blip(
            lambda config, inputs: {
                "pixel_values": torch.stack([pictures(config), pictures(config)], dim=1),
                "labels": torch.arange(BATCH) % 2,
            }
        )


# --- BLIP-2 -----------------------------------------------------------------------------------------------------------


def blip2(language_model: str | None = None, more=lambda config, inputs: {}, kind=vlp.VlpBlip2Config) -> Tester:
    def make_config():
        fields = {}
        if language_model:
            fields = {"text_config": tiny_language_model(language_model).config, "store_language_model": True}
        return kind(
            vision_config=VIT | SMALL | {"model_type": "vlp_blip_vit"},
            qformer_config=QFORMER | SMALL | {"bos_token_id": 4},
            num_query_tokens=5, image_text_hidden_size=24, freeze_vision=False, **fields,
        )  # fmt: skip

    def make_inputs(config):
        inputs = common(texts(2, 3, 99 if language_model else QFORMER["vocab_size"]), pictures(config))
        return inputs | more(config, inputs)

    return Tester(make_config, make_inputs)


class Blip2Matching(Composite):
    additional_model_inputs = ["input_ids"]
    test_resize_embeddings = True

    def _text_features_prepare_config_and_inputs(self):
        """A test of text features reads `text_config`; in stage 1, the Q-Former encodes the texts."""
        config, inputs = super()._text_features_prepare_config_and_inputs()
        config.text_config = config.qformer_config
        return config, inputs


class Blip2Test(Blip2Matching, unittest.TestCase):
    all_model_classes = (vlp.VlpBlip2ForPreTraining,)

    def setUp(self):
        self.model_tester = blip2()


class Blip2RetrievalTest(Blip2Matching, unittest.TestCase):
    all_model_classes = (vlp.VlpBlip2ForImageTextRetrieval,)

    def setUp(self):
        self.model_tester = blip2()
        self.model_tester.is_training = False  # retrieval computes scores, not a loss


class Blip2Writer(Composite, GenerationTesterMixin):
    all_model_classes = (vlp.VlpBlip2ForConditionalGeneration,)
    additional_model_inputs = ["input_ids"]
    test_resize_embeddings = True

    @unittest.skip("as in transformers: BLIP-2 does not generate from no inputs")
    def test_generate_without_input_ids(self):
        pass

    @unittest.skip("as in transformers: BLIP-2 has no base model without a head")
    def test_model_base_model_prefix(self):
        pass

    def _check_generate_outputs(self, output, config, use_cache=False, num_return_sequences=1, num_beams=1):
        """As in transformers' test of BLIP-2: a causal model that generates from embeddings uses a cache."""
        self.model_tester.seq_length = LENGTH + config.num_query_tokens
        sequences = output.sequences
        if not config.is_encoder_decoder:  # the prompt in the result is without the queries
            output.sequences, use_cache = torch.nn.functional.pad(sequences, (config.num_query_tokens, 0)), True
        super()._check_generate_outputs(output, config, use_cache, num_return_sequences, num_beams)
        output.sequences, self.model_tester.seq_length = sequences, LENGTH


class Blip2OptTest(Blip2Writer, unittest.TestCase):
    def setUp(self):
        self.model_tester = blip2("opt", lambda config, inputs: {"labels": inputs["input_ids"].clone()})


class InstructBlipTest(Blip2Writer, unittest.TestCase):
    all_model_classes = (vlp.VlpInstructBlipForConditionalGeneration,)
    additional_model_inputs = ["input_ids", "qformer_input_ids"]

    def setUp(self):
        def more(config, inputs):
            return {"labels": inputs["input_ids"].clone(), "qformer_input_ids": texts(2, 3, QFORMER["vocab_size"])}

        self.model_tester = blip2("opt", more, vlp.VlpInstructBlipConfig)


class Blip2T5Test(Blip2Writer, unittest.TestCase):
    additional_model_inputs = ["input_ids", "decoder_input_ids"]

    def setUp(self):
        self.model_tester = blip2(
            "t5",
            lambda config, inputs: {
                "decoder_input_ids": inputs["input_ids"].clone(),
                "labels": inputs["input_ids"].clone(),
            },
        )
