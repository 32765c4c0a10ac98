"""Images of variable resolution and shape (NaFlex): the same values as square models and as transformers' Siglip2."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model
from vlp.modeling_vlp.attention import set_packing
from vlp.modeling_vlp.exchange.places import ExchangeError
from vlp.modeling_vlp.patches import patches_of, positions_of

import vlp
from vlp.conversion import convert

SHAPES = torch.tensor([[7, 7], [3, 9], [12, 5], [1, 20], [2, 2]])


@pytest.fixture(params=[None, False], ids=["packed", "padded"])
def packing(request):
    set_packing(request.param)
    yield
    set_packing(None)


def random_images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(56, 56), (30, 90), (200, 20), (5, 5), (17, 333)]
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def padded(images: list[torch.Tensor], patch_size: int, count: int) -> dict[str, torch.Tensor]:
    """The input of a model from images (3, H, W), padded with noise, which must not matter."""
    patches = [patches_of(image, patch_size) for image in images]
    noise = torch.randn(len(images), count, patches[0].shape[1])
    for row, each in zip(noise, patches, strict=True):
        row[: len(each)] = each
    shapes = torch.tensor([[image.shape[1] // patch_size, image.shape[2] // patch_size] for image in images])
    return {"pixel_values": noise, "spatial_shapes": shapes}


def test_positions_are_interpolated_as_by_pytorch():
    table = torch.randn(49, 8)
    found = positions_of(table, SHAPES, 64)
    for row, (height, width) in enumerate(SHAPES.tolist()):
        grid = table.T.reshape(1, 8, 7, 7)
        wanted = F.interpolate(grid, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        assert_close(found[row, : height * width], wanted[0].flatten(1).T, rtol=0, atol=2e-6)
    assert torch.equal(found[0, :49], table)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("pooled_only", [False, True])
@pytest.mark.parametrize("tower", ["vit", "siglip"])
def test_squares_give_what_the_square_model_gives(tower, pooled_only, kernel, packing):
    model = tiny_model(tower).eval()
    model.set_attn_implementation(kernel)
    config = model.config.vision_config
    images = torch.randn(3, 3, config.image_size, config.image_size)
    inputs = padded(list(images), config.patch_size, (config.image_size // config.patch_size) ** 2 + 5)
    with torch.no_grad():
        wanted = model.get_image_features(images, pooled_only=pooled_only).pooler_output
        found = model.get_image_features(**inputs, pooled_only=pooled_only).pooler_output
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tower", ["vit", "siglip"])
def test_padding_and_neighbours_change_neither_outputs_nor_gradients(tower, packing):
    model = tiny_model(tower).train()
    size = model.config.vision_config.patch_size
    images = [torch.randn(3, rows * size, columns * size) for rows, columns in ((2, 3), (4, 1), (1, 1))]
    gradients = []
    for inputs in ([padded(images, size, 9)], [padded([image], size, 6) for image in images]):
        model.zero_grad()
        outputs = [model.get_image_features(**each, pooled_only=True).pooler_output for each in inputs]
        torch.cat(outputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.vision_model.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0][:2])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_patch_dropout_keeps_a_share_of_each_image():
    model = tiny_model()
    embeddings = model.vision_model.embeddings.train()
    embeddings.config.patch_dropout = 0.5
    size = embeddings.config.patch_size
    inputs = padded([torch.randn(3, rows * size, 2 * size) for rows in (4, 2, 1)], size, 8)
    tokens, mask = embeddings(**inputs)
    assert mask.sum(dim=1).tolist() == [1 + 4, 1 + 2, 1 + 1] and tokens.shape[:2] == mask.shape == (3, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spatial_shapes": None}, "need spatial_shapes"),
        ({"spatial_shapes": torch.tensor([[2, 2]])}, r"must be \(2, 2\)"),
        ({"spatial_shapes": torch.tensor([[2, 2], [5, 5]])}, "up to 25 patches"),
        ({"spatial_shapes": torch.tensor([[2, 2], [0, 5]])}, "at least 0 along a side"),
        ({"pixel_values": torch.zeros(2, 6, 7)}, "have 7 values"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    model = tiny_model().eval()
    size = model.config.vision_config.patch_size
    inputs = padded([torch.randn(3, 2 * size, 2 * size)] * 2, size, 6)
    with pytest.raises(ValueError, match=message):
        model.get_image_features(**inputs | change)


def test_other_towers_and_blip_refuse_variable_shapes():
    with pytest.raises(ValueError, match="Only a vision transformer"):
        tiny_model("resnet").get_image_features(torch.zeros(1, 4, 192), spatial_shapes=torch.tensor([[2, 2]]))
    tiny_model("resnet").get_image_features(torch.zeros(1, 3, 64, 64), spatial_shapes=torch.tensor([[2, 2]]))  # ignored
    with pytest.raises(ValueError, match="only CLIP reads images of variable shape"):
        vlp.VlpBlipConfig(vision_config={"max_num_patches": 16})
    for wrong in (0, -1, 2.5, "a"):
        with pytest.raises(ValueError, match="max_num_patches must be"):
            vlp.VlpViTConfig(max_num_patches=wrong)


# --- transformers' Siglip2 --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory):
    """A folder of transformers' Siglip2Model with random weights, and its model."""
    torch.manual_seed(0)
    special = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = Siglip2Config(
        text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         vocab_size=300, max_position_embeddings=16, projection_size=48) | special,
        vision_config=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                           patch_size=8, num_patches=49),
    )  # fmt: skip
    model = Siglip2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("siglip2") / "theirs"
    model.save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=60).save_pretrained(folder)
    return folder, model


def test_siglip2_both_ways(siglip2, tmp_path, packing):
    folder, theirs = siglip2
    convert(folder, tmp_path / "ours")
    ours = AutoModel.from_pretrained(tmp_path / "ours").eval()
    images = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(images, vlp.VlpNaflexImageProcessor) and ours.config.vision_config.max_num_patches == 60
    wanted = Siglip2ImageProcessorPil.from_pretrained(folder)(random_images(), return_tensors="pt")
    found = images(random_images(), return_tensors="pt")
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    assert torch.equal(found["spatial_shapes"], wanted["spatial_shapes"])
    ids = torch.randint(3, 300, (4, 16))
    with torch.no_grad():
        one, other = theirs(input_ids=ids, **wanted), ours(input_ids=ids, **found)
    assert_close(other.image_embeds, one.image_embeds, rtol=1e-5, atol=1e-6)
    assert_close(other.logits_per_image, one.logits_per_image, rtol=1e-5, atol=1e-5)
    convert(tmp_path / "ours", tmp_path / "back", to="transformers")
    back = AutoModel.from_pretrained(tmp_path / "back")
    assert isinstance(back, Siglip2Model)
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    again = AutoImageProcessor.from_pretrained(tmp_path / "back", backend="pil")
    assert (again.patch_size, again.max_num_patches) == (8, 60)


@pytest.mark.parametrize("to", ["open_clip", "openai"])
def test_formats_of_square_models_refuse_variable_shapes(to, siglip2, tmp_path):
    convert(siglip2[0], tmp_path / "ours")
    with pytest.raises(ExchangeError, match="square images"):
        convert(tmp_path / "ours", tmp_path / "out", to=to)


# --- the image processor ----------------------------------------------------------------------------------------------


def test_image_processor_refuses_what_it_cannot_do():
    images = vlp.VlpNaflexImageProcessor(patch_size=8, max_num_patches=12)
    picture = Image.new("RGB", (30, 20))
    for wrong in ({"max_num_patches": 0}, {"patch_size": -1}):
        with pytest.raises(ValueError, match="must be positive"):
            images(picture, return_tensors="pt", **wrong)
    with pytest.raises(ValueError, match="do_center_crop"):
        images(picture, return_tensors="pt", do_center_crop=True, crop_size={"height": 8, "width": 8})
    with pytest.raises(ValueError, match="20 x 30 pixels is not resized"):
        images(picture, return_tensors="pt", do_resize=False)
    whole = images(Image.new("RGB", (32, 16), "white"), return_tensors="pt", do_resize=False)
    assert whole["spatial_shapes"].tolist() == [[2, 4]] and whole["pixel_values"].shape == (1, 12, 192)
    assert torch.equal(whole["pixel_values"][0, :8], torch.ones(8, 192)) and not whole["pixel_values"][0, 8:].any()
