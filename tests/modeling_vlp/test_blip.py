"""BLIP: parameter counts, weight sharing, masks, shared computation, losses, saving and loading."""

import copy

import pytest
import torch
from conftest import tiny_blip, tiny_blip_batch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    BlipConfig,
    BlipForQuestionAnswering,
    Trainer,
    TrainingArguments,
)
from vlp.modeling_vlp.attention import Packing
from vlp.modeling_vlp.losses import draw_hard_negatives, matching_loss, soft_contrastive_loss, soft_targets
from vlp.modeling_vlp.med import Memory

import vlp


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- parameter counts and weight sharing ------------------------------------------------------------------------------


def test_base_model_has_the_papers_252_million_parameters():
    with torch.device("meta"):
        model = vlp.VlpBlipForPreTraining(vlp.VlpBlipConfig())

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for name, p in module.named_parameters() if name != "decoder.weight")

    self_attention = count(*(layer.encoder_attention for layer in model.text_model.layers))
    assert count(model.vision_model) == 85_798_656
    assert self_attention == count(*(layer.decoder_attention for layer in model.text_model.layers)) == 28_366_848
    assert count(model.text_model) - 2 * self_attention == 108_891_648
    whole = count(model.vision_model, model.text_model, model.lm_head)
    assert whole == 252_046_652  # Table 3, "All except SA": 252 M; the LM head reuses the text model's word embeddings


def test_encoder_and_decoder_share_all_but_self_attention():
    model, batch = tiny_blip(), tiny_blip_batch()
    memory = model.text_model.memory_of(model.encode_image(batch["pixel_values"]).last_hidden_state)
    encoder = gradients(model, model.match(batch["input_ids"], None, memory).sum())
    memory = model.text_model.memory_of(model.encode_image(batch["pixel_values"]).last_hidden_state)
    decoder = gradients(model, model.lm_loss(batch["input_ids"], memory))
    text = {name for name in encoder.keys() | decoder.keys() if name.startswith("text_model.")}
    assert {name for name in text if name not in decoder} == {n for n in text if ".encoder_attention." in n}
    assert {name for name in text if name not in encoder} == {n for n in text if ".decoder_attention." in n}
    assert model.lm_head.decoder.weight is model.text_model.embeddings.word_embeddings.weight


def test_initial_weights_match_the_paper():
    torch.manual_seed(0)
    wide = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 512}
    config = vlp.VlpBlipConfig(
        vision_config=wide | {"image_size": 32, "patch_size": 8}, text_config=wide | {"vocab_size": 40000}
    )
    model = vlp.VlpBlipForPreTraining(config)
    for weight in (
        model.vision_model.encoder.layers[0].self_attn.q_proj.weight,
        model.vision_model.encoder.layers[0].mlp.fc2.weight,
        model.vision_model.embeddings.position_embedding.weight,
        model.text_model.layers[0].cross_attention.attention.k_proj.weight,
        model.text_model.layers[0].mlp.fc1.weight,
        model.text_model.embeddings.word_embeddings.weight,
        model.lm_head.dense.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.text_model.embeddings.word_embeddings.weight[0].any()
    assert not model.lm_head.decoder.bias.any() and model.temp.item() == pytest.approx(0.07)


# --- masks and shared computation -------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_does_not_change_results():
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    ids, pad = batch["input_ids"], model.config.text_config.pad_token_id
    longer = F.pad(ids, (0, 5), value=pad)
    close(
        model.get_text_features(longer, pooled_only=True).pooler_output,
        model.get_text_features(ids, pooled_only=True).pooler_output,
    )
    memory = model.text_model.memory_of(model.encode_image(batch["pixel_values"]).last_hidden_state)
    close(model.match(longer, None, memory), model.match(ids, None, memory))
    close(model.lm_loss(longer, memory), model.lm_loss(ids, memory))


@torch.no_grad()
def test_matching_by_the_mean_over_the_text():
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    ids, text = batch["input_ids"], model.config.text_config
    memory = model.text_model.memory_of(model.encode_image(batch["pixel_values"]).last_hidden_state)
    by_first = model.match(ids, None, memory)
    model.config.itm_pooling = "mean"
    logits = model.match(ids, None, memory)
    assert not torch.allclose(logits, by_first, atol=1e-3)
    starting = torch.cat([torch.full_like(ids[:, :1], text.enc_token_id), ids[:, 1:]], dim=1)
    states = model.text_model(starting, (ids != text.pad_token_id).long(), memory).last_hidden_state
    for row, own, found in zip(ids, states, logits, strict=True):
        close(found, model.itm_head(own[row != text.pad_token_id]).mean(dim=0))
    close(model.match(F.pad(ids, (0, 5), value=text.pad_token_id), None, memory), logits)
    close(model.match(ids, None, memory, pack=False), logits)


@torch.no_grad()
def test_masked_image_tokens_are_ignored():
    """Unlike transformers' BLIP, this model does not attend to masked image tokens."""
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    states = model.encode_image(batch["pixel_values"]).last_hidden_state
    mask = torch.ones(states.shape[:2]).long()
    mask[1, 5:] = 0
    changed = states.clone()
    changed[1, 5:] = 100.0
    ids = batch["input_ids"]
    for decode in (False, True):
        outputs = [
            model.text_model(
                ids, model.padding_mask(ids), model.text_model.memory_of(x, mask), decode
            ).last_hidden_state
            for x in (states, changed)
        ]
        assert torch.equal(outputs[0], outputs[1])
    short = Memory(
        [(k[1:2, :, :5], v[1:2, :, :5]) for k, v in model.text_model.memory_of(states).key_values], states[1:2]
    )
    close(
        model.match(ids[1:2], None, short),
        model.match(ids[1:2], None, model.text_model.memory_of(states[1:2], mask[1:2])),
    )


@torch.no_grad()
def test_transformers_ignores_the_cross_attention_mask():
    """In transformers 5, padding a question changes the loss, because cross-attention ignores its mask."""
    torch.manual_seed(0)
    text = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 118, "sep_token_id": 3}  # fmt: skip
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 4}  # fmt: skip
    theirs = BlipForQuestionAnswering(BlipConfig(vision_config=vision, text_config=text)).eval()
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.5)
    ids, answer = torch.tensor([[2, 7, 8, 3]]), torch.tensor([[2, 9, 3]])
    pixels, padded = torch.randn(1, 3, 32, 32), F.pad(ids, (0, 4))
    losses = [
        theirs(input_ids=x, attention_mask=(x != 0).long(), pixel_values=pixels, labels=answer).loss.item()
        for x in (ids, padded)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3  # if this fails, transformers has fixed the bug


@pytest.mark.parametrize("decode", [False, True])
def test_packing_does_not_change_values_or_gradients(decode):
    model, batch = tiny_blip(), tiny_blip_batch()
    ids = batch["input_ids"]
    mask = model.padding_mask(ids)
    results = []
    for pack in (False, True):
        memory = model.text_model.memory_of(model.encode_image(batch["pixel_values"]).last_hidden_state)
        states = model.text_model(ids, mask, memory, decode, pack=pack).last_hidden_state * mask[..., None]
        results.append((states, gradients(model, (states**2).sum())))
    close(results[1][0], results[0][0])
    for name, value in results[0][1].items():
        assert_close(results[1][1][name], value, rtol=1e-4, atol=1e-5 * max(value.abs().max().item(), 1.0))


def test_unpack_inverts_pack():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    packing, x = Packing(mask), torch.arange(9.0).view(3, 3, 1) + 1
    packed = packing.pack(x)
    assert packed.flatten().tolist() == [1, 2, 4, 7, 8, 9] and packing.first.tolist() == [0, 2, 3]
    assert torch.equal(packing.unpack(packed), x * mask[..., None])


@torch.no_grad()
def test_pooled_only_matches_the_full_last_layer():
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    ids, mask = batch["input_ids"], model.padding_mask(batch["input_ids"])
    memory = model.text_model.memory_of(model.encode_image(batch["pixel_values"]).last_hidden_state)
    for images in (None, memory):
        whole = model.text_model(ids, mask, images).last_hidden_state[:, :1]
        for pack in (False, True):
            close(model.text_model(ids, mask, images, pooled_only=True, pack=pack).last_hidden_state, whole)


def test_shared_keys_and_values_match_repeated_images():
    """ITM's three kinds of pairs and the LM pass share one memory; the reference repeats every image."""
    model, batch = tiny_blip(), tiny_blip_batch()
    ids, mask, count = batch["input_ids"], model.padding_mask(batch["input_ids"]), len(batch["input_ids"])
    images, texts = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])
    own = torch.arange(count)
    outputs = []
    for once in (True, False):
        states = model.encode_image(batch["pixel_values"]).last_hidden_state
        if once:
            memory = model.text_model.memory_of(states)
            logits, lm = model.itm_logits(ids, mask, memory, images, texts), model.lm_loss(ids, memory)
        else:
            pairs = [(own, own), (own, images), (texts, own)]
            logits = torch.cat([model.match(ids[t], mask[t], model.text_model.memory_of(states[i])) for t, i in pairs])
            lm = model.lm_loss(ids, model.text_model.memory_of(states))
        outputs.append((logits, lm, gradients(model, logits.square().sum() + lm)))
    close(outputs[0][0], outputs[1][0])
    close(outputs[0][1], outputs[1][1])
    for name, value in outputs[1][2].items():
        assert_close(outputs[0][2][name], value, rtol=1e-4, atol=1e-5 * max(value.abs().max().item(), 1.0))


@torch.no_grad()
def test_texts_share_the_memory_of_their_image():
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    states = model.encode_image(batch["pixel_values"][:2]).last_hidden_state
    ids = batch["input_ids"]  # texts 0 and 1 with image 0, texts 2 and 3 with image 1
    shared = model.match(ids, None, model.text_model.memory_of(states))
    repeated = model.match(ids, None, model.text_model.memory_of(states.repeat_interleave(2, dim=0)))
    close(shared, repeated)


@torch.no_grad()
def test_eager_and_sdpa_agree():
    batch = tiny_blip_batch()
    outputs = []
    for kind in ("eager", "sdpa"):
        model = tiny_blip().eval()
        model.set_attn_implementation(kind)
        assert model.text_model.config._attn_implementation == model.vision_model.config._attn_implementation == kind
        memory = model.text_model.memory_of(model.encode_image(batch["pixel_values"]).last_hidden_state)
        outputs.append((model.match(batch["input_ids"], None, memory), model.lm_loss(batch["input_ids"], memory)))
    close(outputs[0][0], outputs[1][0])
    close(outputs[0][1], outputs[1][1])


def test_gradient_checkpointing_gives_the_same_gradients():
    batch = tiny_blip_batch()
    results = []
    for checkpointing in (False, True):
        model = tiny_blip().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        memory = model.text_model.memory_of(model.encode_image(batch["pixel_values"]).last_hidden_state)
        loss = model.match(batch["input_ids"], None, memory).sum() + model.lm_loss(batch["input_ids"], memory)
        results.append(gradients(model, loss))
    for name, value in results[0].items():
        close(results[1][name], value)


@torch.no_grad()
def test_shapes_of_attention_maps_and_hidden_states():
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    model.set_attn_implementation("eager")
    states = model.encode_image(batch["pixel_values"]).last_hidden_state
    ids, layers = batch["input_ids"], len(model.text_model.layers)
    output = model.text_model(ids, model.padding_mask(ids), model.text_model.memory_of(states),
                              output_hidden_states=True, output_attentions=True)  # fmt: skip
    texts, length = ids.shape
    assert [tuple(x.shape) for x in output.hidden_states] == [(texts, length, 32)] * (layers + 1)
    assert [tuple(x.shape) for x in output.attentions] == [(texts, 4, length, length)] * layers
    assert [tuple(x.shape) for x in output.cross_attentions] == [(texts, 4, length, states.shape[1])] * layers
    assert_close(output.cross_attentions[0].sum(-1), torch.ones(texts, 4, length))


@pytest.mark.parametrize("tower", ["vit", "resnet"])
@torch.no_grad()
def test_bfloat16_outputs_are_finite(tower):
    model, batch = tiny_blip(tower).eval().to(torch.bfloat16), tiny_blip_batch(tower)
    output = model(batch["input_ids"], batch["pixel_values"].to(torch.bfloat16))
    assert all(torch.isfinite(output[name]).all() for name in ("loss", "itm_logits", "logits_per_image"))


def test_overlong_texts_are_rejected():
    model, batch = tiny_blip(), tiny_blip_batch()
    with pytest.raises(ValueError, match="61 tokens, but the model supports at most 40"):
        model.get_text_features(F.pad(batch["input_ids"], (0, 61 - batch["input_ids"].shape[1]), value=5))


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_match_their_definitions():
    torch.manual_seed(0)
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    computed, original = [], model.itm_logits
    model.itm_logits = lambda *inputs: computed.append(original(*inputs)) or computed[-1]
    output = model(**batch)
    logits = F.normalize(output.image_embeds, dim=-1) @ output.text_embeds.T / model.temp
    own = torch.arange(len(logits))
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    close(output.loss_itc, expected)
    labels = torch.cat([torch.ones(4), torch.zeros(8)]).long()
    close(output.loss_itm, F.cross_entropy(computed[0], labels))
    assert torch.equal(output.itm_logits, computed[0][:4])
    assert torch.equal(model(**batch).loss, output.loss)  # evaluation draws the same negatives every time
    close(output.loss, output.loss_itc + output.loss_itm + output.loss_lm)


def test_duplicate_captions_are_not_negatives():
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    batch["input_ids"] = batch["input_ids"][:1].expand(4, -1)
    output = model(**batch)
    assert (
        output.loss_itm.item()
        == pytest.approx(  # only the matching pairs count: there are no negatives
            F.cross_entropy(output.itm_logits[:4], torch.ones(4).long()).item(), rel=1e-5
        )
    )
    labels, logits = torch.full((4, 4), 0.25), output.logits_per_image
    close(output.loss_itc, (soft_contrastive_loss(logits, labels) + soft_contrastive_loss(logits.T, labels)) / 2)


def test_hard_negatives_are_drawn_by_similarity():
    logits = torch.tensor([[5.0, 2.0, 1.0, -9.0], [0.0, 0.0, 0.0, 0.0]])
    excluded = torch.tensor([[True, False, False, False], [False, True, False, True]])
    uniform = torch.linspace(0, 0.99999, 20001)
    for row in range(2):
        rows = torch.full((len(uniform),), row)
        drawn, found = draw_hard_negatives(logits[rows], excluded[rows], uniform)
        assert found.all() and not excluded[row][drawn].any()
        weights = (logits[row].softmax(0) + 1e-4).masked_fill(excluded[row], 0)
        shares = torch.bincount(drawn, minlength=4) / len(uniform)
        assert_close(shares, weights / weights.sum(), rtol=0, atol=1e-3)


def test_several_hard_negatives_of_a_row_differ():
    logits = torch.tensor([[9.0, 8.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    excluded = torch.tensor([[True, False, False, False], [False, True, False, True]])
    first, _ = draw_hard_negatives(logits, excluded, torch.tensor([0.5, 0.9]))
    drawn, found = draw_hard_negatives(logits, excluded, torch.tensor([[0.5, 0.9], [0.5, 0.9], [0.5, 0.9]]))
    assert torch.equal(drawn[0], first)
    assert sorted(drawn[:, 0].tolist()) == [1, 2, 3] and sorted(drawn[:2, 1].tolist()) == [0, 2]
    assert found.tolist() == [[True, True], [True, True], [True, False]]


def test_rows_without_negatives_are_flagged_and_excluded():
    excluded = torch.tensor([[True, True], [True, False]])
    drawn, found = draw_hard_negatives(torch.zeros(2, 2), excluded, torch.tensor([0.5, 0.5]))
    assert drawn.tolist() == [0, 1] and found.tolist() == [False, True]
    logits = torch.randn(3, 2)
    counted = torch.tensor([True, False, True])
    matches = torch.tensor([True, False, False])
    expected = F.cross_entropy(logits[[0, 2]], torch.tensor([1, 0]))
    assert_close(matching_loss(logits, matches, counted), expected)


def test_soft_targets_are_distributions():
    positives = torch.tensor([[True, False, True], [False, True, False]])
    teacher = torch.randn(2, 3)
    targets = soft_targets(teacher, positives, 0.3)
    assert_close(targets.sum(1), torch.ones(2))
    assert_close(soft_targets(teacher, positives, 0.0), torch.tensor([[0.5, 0, 0.5], [0, 1.0, 0]]))
    assert_close(soft_targets(teacher, positives, 1.0), teacher.softmax(1))


# --- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_save_load_round_trip(tower, dtype, tmp_path):
    model = tiny_blip(tower).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is vlp.VlpBlipForPreTraining and type(AutoConfig.from_pretrained(tmp_path)) is vlp.VlpBlipConfig
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.lm_head.decoder.weight is loaded.text_model.embeddings.word_embeddings.weight


def test_task_models_load_from_a_pretrained_folder(tmp_path, caplog):
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    model.save_pretrained(tmp_path)
    matcher, info = vlp.VlpBlipForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    captioner, captioner_info = vlp.VlpBlipForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not captioner_info["missing_keys"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is vlp.VlpBlipForConditionalGeneration
    with torch.no_grad():
        output = matcher(batch["input_ids"], batch["pixel_values"])
        memory = model.text_model.memory_of(model.encode_image(batch["pixel_values"]).last_hidden_state)
        assert torch.equal(output.itm_logits, model.match(batch["input_ids"], None, memory))
        assert_close(output.logits_per_image, model(**batch, return_loss=False).logits_per_image)
        assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    assert torch.equal(captioner.text_model.layers[0].mlp.fc1.weight, model.text_model.layers[0].mlp.fc1.weight)


def test_new_tokens_can_be_added():
    model, batch = tiny_blip().eval(), tiny_blip_batch()
    model.resize_token_embeddings(130)
    assert model.lm_head.decoder.out_features == 130 and model.lm_head.decoder.bias.shape == (130,)
    assert model.lm_head.decoder.weight is model.text_model.embeddings.word_embeddings.weight
    assert torch.isfinite(model(**batch).loss)


def test_transformers_trainer_trains_the_model(tmp_path):
    model, batch = tiny_blip(), tiny_blip_batch()
    before = copy.deepcopy(model.state_dict())
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=3e-3, report_to=[],
        logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert {"temp", "itm_head.weight", "lm_head.dense.weight", "vision_proj.weight"} <= changed
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "saved").temp, model.temp.cpu())


# --- configuration ----------------------------------------------------------------------------------------------------


def test_invalid_configurations_are_rejected():
    for fields, message in (
        ({"text_config": {"hidden_size": 30, "num_attention_heads": 4}}, r"hidden_size \(30\) must be divisible"),
        ({"text_config": {"vocab_size": 100}}, r"bos_token_id \(30522\) must be below vocab_size|eos_token_id \(102\)"),
        ({"text_config": {"label_smoothing": 1.0}}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"vision_config": {"image_size": 30}}, r"image_size \(30\) must be divisible by patch_size \(16\)"),
        ({"vision_config": {"model_type": "vlp_vit"}}, "vision_config has model_type 'vlp_vit'; expected one of"),
        ({"image_text_hidden_size": 0}, "image_text_hidden_size must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            vlp.VlpBlipConfig(**fields)


def test_cross_attention_width_matches_the_image_tower():
    assert vlp.VlpBlipConfig(vision_config={"hidden_size": 96}).text_config.encoder_hidden_size == 96
