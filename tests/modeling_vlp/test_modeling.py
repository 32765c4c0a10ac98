"""CLIP and its towers with tiny random weights."""

import copy

import pytest
import torch
from conftest import tiny_batch, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from transformers import AutoModel
from vlp.modeling_vlp.layers import quick_gelu
from vlp.modeling_vlp.linear import Linear
from vlp.modeling_vlp.resnet import ModifiedResNet

import vlp

both_towers = pytest.mark.parametrize("tower", ["vit", "resnet"])


@both_towers
def test_output_shapes_match_transformers(tower):
    model = tiny_model(tower).eval()
    batch = tiny_batch(model)
    output = model(**batch, return_loss=True, output_hidden_states=True)
    assert output.logits_per_image.shape == (4, 4)
    assert_close(output.logits_per_text, output.logits_per_image.T)
    assert_close(output.image_embeds.norm(dim=-1), torch.ones(4))
    assert output.loss.shape == ()
    text = output.text_model_output
    assert text.last_hidden_state.shape == (4, 11, 32) and text.pooler_output.shape == (4, 24)
    assert [tuple(h.shape) for h in text.hidden_states] == [(4, 11, 32)] * 4
    vision = output.vision_model_output
    if tower == "vit":
        assert [tuple(h.shape) for h in vision.hidden_states] == [(4, 17, 48)] * 4
    else:
        assert [tuple(h.shape) for h in vision.hidden_states] == [
            (4, 16, 16, 16), (4, 64, 16, 16), (4, 128, 8, 8), (4, 256, 4, 4)
        ]  # fmt: skip
    assert isinstance(model(**batch, return_dict=False), tuple)


@both_towers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_round_trip_is_bit_exact(tower, dtype, tmp_path):
    model = tiny_model(tower).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is vlp.VlpClipModel
    for name, tensor in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name


@both_towers
def test_pooled_only_gives_the_same_embeddings_and_gradients(tower):
    model = tiny_model(tower).double()
    batch = tiny_batch(model)
    losses, gradients = [], []
    for pooled_only in (False, True):
        model.zero_grad()
        loss = model(**batch, return_loss=True, pooled_only=pooled_only).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert_close(*losses)
    assert_close(*gradients)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_attention_implementations_agree(implementation):
    model = tiny_model().eval()
    batch = tiny_batch(model)
    expected = model(**batch)
    model.set_attn_implementation(implementation)
    assert model.text_model.config._attn_implementation == implementation
    output = model(**batch)
    assert_close(output.text_embeds, expected.text_embeds, rtol=1e-4, atol=1e-5)
    assert_close(output.image_embeds, expected.image_embeds, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attentions_are_returned_by_eager_and_are_causal_in_the_text_tower():
    model = tiny_model().eval()
    model.set_attn_implementation("eager")
    output = model(**tiny_batch(model), output_attentions=True)
    for weights in output.text_model_output.attentions:
        assert weights.shape == (4, 4, 11, 11)
        assert_close(weights.triu(1), torch.zeros_like(weights))
        assert_close(weights.sum(-1), torch.ones(4, 4, 11))
    assert [w.shape for w in output.vision_model_output.attentions] == [(4, 4, 17, 17)] * 3


@both_towers
def test_gradient_checkpointing_gives_the_same_gradients_and_statistics(tower):
    plain = tiny_model(tower).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())
    batch = tiny_batch(plain)
    for model in (plain, checkpointed):
        model(**batch, return_loss=True).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert_close(a.grad, b.grad, msg=name)
    assert_close(dict(plain.named_buffers()), dict(checkpointed.named_buffers()))


@both_towers
@torch.no_grad()
def test_batch_of_one_equals_batch_of_many(tower):
    model = tiny_model(tower).eval()
    batch = tiny_batch(model)
    together = model(**batch)
    for row in range(4):
        single = model(input_ids=batch["input_ids"][row : row + 1], pixel_values=batch["pixel_values"][row : row + 1])
        assert_close(single.image_embeds[0], together.image_embeds[row], rtol=1e-4, atol=1e-5)
        assert_close(single.text_embeds[0], together.text_embeds[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooled_only", [False, True])
@torch.no_grad()
def test_padding_does_not_change_results(pooled_only):
    model = tiny_model().eval()
    batch = tiny_batch(model)
    expected = model.get_text_features(batch["input_ids"], pooled_only=pooled_only).pooler_output
    wider = torch.nn.functional.pad(batch["input_ids"], (0, 5), value=7)
    assert_close(model.get_text_features(wider, pooled_only=pooled_only).pooler_output, expected, rtol=1e-4, atol=1e-5)
    row = batch["input_ids"][:1]
    end = int((row == model.config.text_config.eos_token_id).int().argmax()) + 1
    trimmed = model.get_text_features(row[:, :end], pooled_only=pooled_only).pooler_output
    assert_close(trimmed, expected[:1], rtol=1e-4, atol=1e-5)


@both_towers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(tower, dtype):
    model = tiny_model(tower)
    batch = tiny_batch(model)
    expected = model(**batch, return_loss=True)
    model = model.to(dtype)
    output = model(**batch | {"pixel_values": batch["pixel_values"].to(dtype)}, return_loss=True)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert_close(output.image_embeds.float(), expected.image_embeds, rtol=0.1, atol=0.05)


@both_towers
@torch.no_grad()
def test_other_resolutions(tower):
    model = tiny_model(tower).eval()
    side = model.config.vision_config.image_size
    images = torch.randn(2, 3, 2 * side, side)
    with pytest.raises(ValueError, match=rf"{2 * side} x {side} pixels.*interpolate_pos_encoding"):
        model.get_image_features(images)
    assert model.get_image_features(images, interpolate_pos_encoding=True).pooler_output.shape == (2, 24)
    same = torch.randn(2, 3, side, side)
    assert_close(
        model.get_image_features(same, interpolate_pos_encoding=True).pooler_output,
        model.get_image_features(same).pooler_output,
    )
    with pytest.raises(ValueError, match="multiples of"):
        model.get_image_features(torch.randn(1, 3, side + 1, side), interpolate_pos_encoding=True)


def test_overlong_captions_are_rejected():
    model = tiny_model()
    with pytest.raises(ValueError, match="21 tokens, but the model supports at most 20"):
        model.get_text_features(torch.zeros(1, 21, dtype=torch.long))


def test_resize_token_embeddings():
    model = tiny_model()
    before = model.text_model.embeddings.token_embedding.weight.clone()
    model.resize_token_embeddings(610)
    assert model.config.text_config.vocab_size == 610
    assert_close(model.get_input_embeddings().weight[:600], before)
    model.get_text_features(torch.tensor([[598, 605, 599]]))


@both_towers
@pytest.mark.slow
def test_compiles_without_graph_breaks(tower):
    model = tiny_model(tower).eval()
    batch = tiny_batch(model)
    expected = model(**batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**batch).logits_per_image, expected.logits_per_image, rtol=1e-4, atol=1e-4)
    model.train()
    compiled(**batch, return_loss=True, pooled_only=True).loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_gives_the_same_results_without_computing_padding(checkpointing):
    model, rows = tiny_model().double().train(), []
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fc1 = model.text_model.encoder.layers[0].mlp.fc1
    fc1.register_forward_hook(lambda module, inputs, output: rows.append(output.flatten(0, -2).shape[0]))
    ids = tiny_batch(model)["input_ids"]
    results = []
    for pack in (False, True):
        model.zero_grad()
        features = model.get_text_features(ids, pooled_only=True, pack=pack).pooler_output
        features.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.text_model.named_parameters()}
        results.append((features.detach(), gradients))
    real = int((ids != model.config.text_config.eos_token_id).sum()) + len(ids)  # plus one end token per text
    assert rows[0] == ids.numel() and rows[-1] == real < ids.numel()
    assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_quick_gelu_matches_its_definition():
    x = torch.linspace(-30, 30, 601, dtype=torch.double, requires_grad=True)
    ours, definition = quick_gelu(x), x * torch.sigmoid(1.702 * x)
    assert_close(ours, definition, rtol=1e-12, atol=1e-14)
    a, b = (torch.autograd.grad(value.sum(), x)[0] for value in (ours, definition))
    assert_close(a, b, rtol=1e-12, atol=1e-14)


@both_towers
def test_forward_never_synchronises_with_the_device(tower):
    """Fake tensors have shapes but no values, so reading a value on the host raises an error."""
    model = tiny_model(tower).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        batch = {name: fake.from_tensor(tensor) for name, tensor in tiny_batch(model).items()}
        output = model(**batch, return_loss=True, pooled_only=True)
        assert output.loss.shape == ()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            output.loss.item()


def test_patch_dropout_is_active_only_in_training():
    config = tiny_config()
    config.vision_config.patch_dropout = 0.5
    model = vlp.VlpClipModel(config)
    images = torch.randn(2, 3, 32, 32)
    assert model.train().get_image_features(images).last_hidden_state.shape == (2, 9, 48)
    assert model.eval().get_image_features(images).last_hidden_state.shape == (2, 17, 48)


def test_drop_path_skips_blocks_for_random_images_in_training():
    config = tiny_config()
    config.vision_config.drop_path_rate = 0.5
    torch.manual_seed(0)
    model = vlp.VlpClipModel(config)
    blocks = model.vision_model.encoder.layers
    rates = [block.drop_path for block in blocks]
    assert rates[0] == 0.0 and rates[-1] == 0.5 and rates == sorted(rates)
    images = torch.randn(64, 3, 32, 32)
    plain = vlp.VlpClipModel(tiny_config())
    plain.load_state_dict(model.state_dict())
    assert_close(model.eval().get_image_features(images), plain.eval().get_image_features(images))
    branch = torch.ones(4000, 2, 3)
    dropped = blocks[-1].train().drop(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)
    assert blocks[0].train().drop(branch) is branch


def test_initialisation_follows_openai():
    config = vlp.VlpClipConfig(
        vision_config={"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024},
        text_config={"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
        projection_dim=256,
    )
    torch.manual_seed(0)
    model = vlp.VlpClipModel(config)

    def std(tensor, expected):
        assert tensor.std().item() == pytest.approx(expected, rel=0.03)

    text, vision = model.text_model, model.vision_model
    std(text.embeddings.token_embedding.weight, 0.02)
    std(text.embeddings.position_embedding.weight, 0.01)
    std(text.encoder.layers[1].self_attn.k_proj.weight, 256**-0.5)
    std(text.encoder.layers[1].self_attn.out_proj.weight, 256**-0.5 * 8**-0.5)
    std(text.encoder.layers[1].mlp.fc1.weight, 512**-0.5)
    std(text.encoder.layers[1].mlp.fc2.weight, 256**-0.5 * 8**-0.5)
    std(model.text_projection.weight, 256**-0.5)
    std(model.visual_projection.weight, 256**-0.5)
    std(vision.embeddings.position_embedding.weight, 256**-0.5)
    std(vision.encoder.layers[0].self_attn.q_proj.weight, (2 / (4 * 256)) ** 0.5)  # Xavier over (3 * 256, 256)
    std(vision.encoder.layers[0].mlp.fc1.weight, (3 * 256) ** -0.5)  # PyTorch's Linear
    assert vision.encoder.layers[0].self_attn.q_proj.bias.abs().max() == 0
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    resnet = tiny_model("resnet").vision_model
    assert resnet.layer2[1].bn3.weight.abs().max() == 0
    std(resnet.attnpool.v_proj.weight, 256**-0.5)


def test_logit_scale_is_clamped_between_1_and_100():
    model = tiny_model()
    for value, expected in ((9.0, 100.0), (-1.0, 1.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.exp().item() == pytest.approx(expected)


def test_siglip_model_has_a_bias_and_uses_the_sigmoid_loss():
    model = tiny_model(logit_scale_init_value=2.3, logit_bias_init_value=-10.0)
    output = model(**tiny_batch(model), return_loss=True)
    assert output.logits_per_image.mean() < 0
    output.loss.backward()
    assert model.logit_bias.grad.abs() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_linear_gives_the_same_for_few_and_many_rows(bias):
    """In any memory layout; with gradients, autocast or many rows, PyTorch's own product is used."""
    torch.manual_seed(0)
    linear = Linear(48, 80, bias=bias)
    x = torch.randn(4, 3, 48)
    wanted = torch.nn.functional.linear(x, linear.weight, linear.bias)
    with torch.no_grad():
        for rows in (x, x[:, :1], x[0, 0], x.transpose(0, 1), x[..., ::2].repeat_interleave(2, dim=-1), x[:0]):
            expected = torch.nn.functional.linear(rows, linear.weight, linear.bias)
            assert_close(linear(rows), expected, rtol=1e-5, atol=1e-6)
            assert linear(rows).shape == expected.shape
        assert_close(linear(x.repeat(9, 1, 1)), wanted.repeat(9, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
        assert linear.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert linear.float()(x).requires_grad


def test_exported_program_has_no_private_operators():
    linear = Linear(8, 8)
    with torch.no_grad():
        program = torch.export.export(linear, (torch.randn(2, 8),))
    assert "mkldnn" not in str(program.graph)


@torch.no_grad()
def test_resnet_states_can_have_positions():
    """The cells that texts attend to are those of the plain model, normalised, plus scaled position embeddings."""
    config = tiny_config("resnet").vision_config
    config.states_with_positions = True
    placed = ModifiedResNet(config).eval()
    config = tiny_config("resnet").vision_config
    plain = ModifiedResNet(config).eval()
    plain.load_state_dict(placed.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    found, wanted = placed(pixels), plain(pixels)
    width, side = wanted.last_hidden_state.shape[1:3]
    cells = wanted.last_hidden_state.permute(0, 2, 3, 1)
    cells = (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    positions = 0.5 * width**0.5 * placed.attnpool.positional_embedding[1:].view(side, side, width)
    assert_close(found.last_hidden_state, (cells + positions).permute(0, 3, 1, 2))
    assert_close(found.pooler_output, wanted.pooler_output)
