"""BLIP-2 stage 1: the Q-Former, its attention masks and the models built on it."""

import pytest
import torch
from conftest import tiny_blip2, tiny_blip2_config, tiny_blip_batch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModel, DynamicCache
from vlp.modeling_vlp.blip2 import best_query
from vlp.modeling_vlp.ranking import rank

import vlp

TOWERS = ("blip", "clip", "resnet")


def batch(model, size: int = 4) -> dict[str, torch.Tensor]:
    side = model.config.vision_config.image_size
    pixels = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(3))
    return {"input_ids": tiny_blip_batch(size=size)["input_ids"], "pixel_values": pixels}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def millions(parameters) -> float:
    return sum(parameter.numel() for parameter in parameters) / 1e6


def test_qformer_parameter_count():
    """188 M in the paper (section 3.1); 186.3 M in LAVIS, including the LM head, which is tied to the embeddings."""
    with torch.device("meta"):
        config = vlp.VlpBlip2Config(vision_config={"hidden_size": 1408, "num_hidden_layers": 1, "patch_size": 14,
                                                   "num_attention_heads": 16})  # fmt: skip
        model = vlp.VlpBlip2ForPreTraining(config)
    head = [p for name, p in model.lm_head.named_parameters() if name != "decoder.weight"]
    assert millions([*model.qformer.parameters(), *head, model.query_tokens]) == pytest.approx(186.3, abs=0.05)


@pytest.mark.parametrize(("width", "count"), [(2560, 107.1), (4096, 108.3), (2048, 106.7)])
def test_stage_2_trainable_parameter_count(width, count):
    """Table 2: 107 M with OPT-2.7B, 108 M with OPT-6.7B, 107 M with FlanT5-XL."""
    from transformers import OPTConfig

    with torch.device("meta"):
        config = vlp.VlpBlip2Config(
            vision_config={"hidden_size": 1408, "num_hidden_layers": 1, "patch_size": 14, "num_attention_heads": 16},
            text_config=OPTConfig(hidden_size=width),
        )
        model = vlp.VlpBlip2ForConditionalGeneration(config)
    assert millions(p for p in model.parameters() if p.requires_grad) == pytest.approx(count, abs=0.06)


def test_default_tower_is_the_papers():
    vision = vlp.VlpBlip2Config().vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.final_norm) == (1408, 39, 14, False)


def test_initial_weights():
    torch.manual_seed(0)
    model = vlp.VlpBlip2ForPreTraining(tiny_blip2_config())
    assert model.query_tokens.std().item() == pytest.approx(0.02, rel=0.3)
    for layer in model.qformer.layers:
        for own, other in zip(layer.query_mlp.parameters(), layer.text_mlp.parameters(), strict=True):
            assert torch.equal(own, other)
    crossing = [layer.cross_attention is not None for layer in model.qformer.layers]
    assert crossing == [True, False, True, False]
    assert model.lm_head.decoder.weight is model.qformer.embeddings.word_embeddings.weight


@pytest.mark.parametrize("tower", TOWERS)
def test_tower_is_frozen_and_in_evaluation_mode(tower):
    model = tiny_blip2(tower).train()
    assert model.training and not any(module.training for module in model.vision_model.modules())
    before = {name: value.clone() for name, value in model.vision_model.state_dict().items()}
    model(**batch(model)).loss.backward()
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.vision_model.state_dict().items())
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    states = model.encode_image(batch(model)["pixel_values"])
    given = {"input_ids": batch(model)["input_ids"], "vision_states": states}
    torch.manual_seed(5)
    first = model.eval()(**batch(model)).loss
    torch.manual_seed(5)
    assert_close(model(**given).loss, first)


def test_unfrozen_tower_is_trained():
    torch.manual_seed(0)
    model = vlp.VlpBlip2ForPreTraining(tiny_blip2_config(freeze_vision=False)).train()
    assert model.vision_model.training
    model(**batch(model)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.vision_model.parameters())


@torch.no_grad()
def test_generation_uses_the_unilm_mask():
    """Through the cache: a token depends on the image and on earlier tokens, and queries ignore the text."""
    model, given = tiny_blip2(), batch(tiny_blip2())
    ids = given["input_ids"]
    memory = model.memory_of(model.encode_image(given["pixel_values"]))

    def decode(ids: torch.Tensor, memory) -> torch.Tensor:
        cache = DynamicCache()
        model.query(memory, past_key_values=cache)
        return model.decode(ids, cache)

    states = decode(ids, memory)
    later = ids.clone()
    later[:, 5:] = 7
    changed = decode(later, memory)
    close(changed[:, :5], states[:, :5])
    assert (changed[:, 5:] - states[:, 5:]).abs().max() > 1e-2
    other = decode(ids, memory.select(torch.tensor([1, 2, 3, 0])))
    assert (other[:, 0] - states[:, 0]).abs().max() > 1e-3
    # Decode token by token, like `generate`, after the same queries.
    cache = DynamicCache()
    model.query(memory, past_key_values=cache)
    ids = torch.cat([torch.full_like(ids[:, :1], 118), ids[:, 1:]], dim=1)
    steps = [
        model.qformer(input_ids=ids[:, i : i + 1], past_key_values=cache, decode=True, start=i).last_hidden_state
        for i in range(ids.shape[1])
    ]
    close(torch.cat(steps, dim=1), states)


@torch.no_grad()
def test_matching_uses_bidirectional_attention():
    model, given = tiny_blip2(), batch(tiny_blip2())
    memory = model.memory_of(model.encode_image(given["pixel_values"]))
    logits = model.match(given["input_ids"], None, memory)
    later = given["input_ids"].clone()
    later[:, 2] = 7
    assert (model.match(later, None, memory) - logits).abs().max() > 1e-3
    assert (
        model.match(given["input_ids"], None, memory.select(torch.tensor([1, 2, 3, 0]))) - logits
    ).abs().max() > 1e-3
    queries = model.query_tokens.expand(4, -1, -1)
    mask = model.padding_mask(given["input_ids"])
    whole = model.qformer(queries, given["input_ids"], mask, memory).last_hidden_state[:, :5]
    close(logits, model.itm_head(whole).mean(dim=1))  # in the last layer, only the queries' rows are computed


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_does_not_change_results(attention):
    model = tiny_blip2()
    model.set_attn_implementation(attention)
    given = batch(model)
    ids, pixels = given["input_ids"], given["pixel_values"]
    padded = F.pad(ids, (0, 6))
    memory = model.memory_of(model.encode_image(pixels))
    close(model.match(padded, None, memory), model.match(ids, None, memory))
    text = model.get_text_features(ids)
    close(model.get_text_features(padded).pooler_output, text.pooler_output)
    close(model.get_text_features(ids, pooled_only=False).pooler_output, text.pooler_output)
    losses = []
    for texts in (ids, padded):
        cache = DynamicCache()
        model.query(memory, past_key_values=cache)
        losses.append(model.lm_loss(texts, cache))
    close(losses[1], losses[0])


@torch.no_grad()
def test_texts_share_the_memory_of_their_image():
    model, given = tiny_blip2(), batch(tiny_blip2())
    memory = model.memory_of(model.encode_image(given["pixel_values"][:2]))
    together = model.match(given["input_ids"], None, memory)  # two texts for each of two images
    for text in range(4):
        single = model.match(given["input_ids"][text : text + 1], None, memory.select(torch.tensor([text // 2])))
        close(together[text : text + 1], single)


@torch.no_grad()
def test_ranking_by_the_best_query_and_by_matching():
    model, given = tiny_blip2(), batch(tiny_blip2())
    image = F.normalize(model.get_image_features(given["pixel_values"]).pooler_output, dim=-1)
    text = F.normalize(model.get_text_features(given["input_ids"]).pooler_output, dim=-1)
    cosine = torch.stack([torch.stack([(image[b] @ text[t]).max() for t in range(4)]) for b in range(4)])
    close(best_query(image, text), cosine)
    ranking = rank(model, **given, top_k=2)
    memory = model.memory_of(model.encode_image(given["pixel_values"]))
    best = cosine.topk(2, dim=1).indices
    for b in range(4):
        for t in range(4):
            score = cosine[b, t] - 100
            if t in best[b]:
                match = model.match(given["input_ids"][t : t + 1], None, memory.select(torch.tensor([b])))
                score = cosine[b, t] + match[0, 1]
            assert ranking.image_to_text[b, t].item() == pytest.approx(score.item(), abs=1e-4)


@pytest.mark.parametrize("tower", TOWERS)
def test_save_load_round_trip(tmp_path, tower):
    model = tiny_blip2(tower)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is vlp.VlpBlip2ForPreTraining
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.lm_head.decoder.weight is again.qformer.embeddings.word_embeddings.weight
    assert not any(parameter.requires_grad for parameter in again.vision_model.parameters())
    retriever = vlp.VlpBlip2ForImageTextRetrieval.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        output = retriever(**batch(model))
        expected = model(**batch(model), return_loss=False)
    close(output.logits_per_image, expected.logits_per_image)
    assert output.itm_logits.shape == (4, 2) and output.image_embeds.shape == (4, 5, 24)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_blip2().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(7)
        model(**batch(model)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="encoder_hidden_size of the Q-Former is 10, but the image tower has width 48"):
        vlp.VlpBlip2Config(vision_config=dict(hidden_size=48, num_attention_heads=4),
                           qformer_config={"encoder_hidden_size": 10})  # fmt: skip
    with pytest.raises(ValueError, match="num_query_tokens must be positive, got 0"):
        vlp.VlpBlip2Config(num_query_tokens=0)
    with pytest.raises(ValueError, match=r"needs pixel_values \(the images\) or their vision_states"):
        tiny_blip2()(input_ids=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="50 tokens, but the model supports at most 40"):
        tiny_blip2().get_text_features(torch.ones(2, 50, dtype=torch.long))
