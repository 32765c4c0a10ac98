"""Configurations reject invalid values and round-trip through files."""

import pytest
from conftest import tiny_config
from transformers import AutoConfig

import vlp


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vlp.VlpViTConfig(hidden_size=100, num_attention_heads=12), r"hidden_size \(100\).*heads \(12\)"),
        (lambda: vlp.VlpViTConfig(image_size=224, patch_size=15), r"image_size \(224\).*patch_size \(15\)"),
        (lambda: vlp.VlpViTConfig(num_hidden_layers=-1), "num_hidden_layers must be positive, got -1"),
        (lambda: vlp.VlpViTConfig(patch_dropout=1.0), "patch_dropout.*got 1.0"),
        (lambda: vlp.VlpViTConfig(drop_path_rate=1.0), "drop_path_rate.*got 1.0"),
        (lambda: vlp.VlpViTConfig(hidden_act="quik_gelu"), "'quik_gelu'"),
        (lambda: vlp.VlpModifiedResNetConfig(depths=[3, 0, 1]), r"depths must be positive, got \[3, 0, 1\]"),
        (lambda: vlp.VlpModifiedResNetConfig(image_size=225), r"image_size \(225\).*stride \(32\)"),
        (lambda: vlp.VlpModifiedResNetConfig(embedding_size=33), "must be even, got 33"),
        (lambda: vlp.VlpClipTextConfig(vocab_size=0), "vocab_size must be positive, got 0"),
        (lambda: vlp.VlpClipTextConfig(vocab_size=100, eos_token_id=100), r"eos_token_id \(100\).*vocab_size \(100\)"),
        (lambda: vlp.VlpClipConfig(projection_dim=-5), "projection_dim must be positive, got -5"),
        (lambda: vlp.VlpClipConfig(vision_config={"model_type": "vgg"}), "'vgg'"),
        (lambda: vlp.VlpBlipConfig(itm_pooling="max"), "itm_pooling must be one of cls, mean, got 'max'"),
    ],
)
def test_invalid_values_are_rejected(build, message):
    with pytest.raises(Exception, match=message):
        build()


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_save_load_round_trip(tower, tmp_path):
    config = tiny_config(tower)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded.vision_config) is type(config.vision_config)
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}


def test_resnet_uses_the_shared_projection_dim():
    config = vlp.VlpClipConfig(vision_config={"model_type": "vlp_modified_resnet"}, projection_dim=640)
    assert config.vision_config.projection_dim == 640
    assert config.vision_config.hidden_size == 2048 and config.vision_config.num_attention_heads == 32
