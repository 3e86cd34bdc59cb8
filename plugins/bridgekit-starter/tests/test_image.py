import os

os.environ["HF_HUB_OFFLINE"] = "1"

import io
from pathlib import Path

import pytest
import timm
import torch
from bridgekit_starter.image import AT_ONCE, ImageEncoder
from bridgekit_starter.weights import EFFICIENTNET_WEIGHTS
from PIL import Image
from sklearn.datasets import load_sample_images

from bridgekit.errors import ItemError
from bridgekit.latents.batches import agreement

DAISY = 985
PALACE = 698  # china.jpg shows the Summer Palace in Beijing


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return ImageEncoder("cpu")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("photographs")
    samples = load_sample_images()
    paths = {}
    for name, pixels in zip(samples.filenames, samples.images, strict=True):
        paths[Path(name).stem] = folder / f"{Path(name).stem}.png"
        Image.fromarray(pixels).save(paths[Path(name).stem])
    return paths


@pytest.mark.parametrize(("name", "label"), [("flower", DAISY), ("china", PALACE)])
def test_the_classifier_on_top_names_what_a_photograph_shows(
    encoder: ImageEncoder, photographs: dict[str, Path], name: str, label: int
) -> None:
    probabilities = encoder.classify([encoder.prepare(photographs[name])])[0]
    assert int(probabilities.argmax()) == label
    assert probabilities[label] > 0.25


@pytest.mark.parametrize(("last_only", "dim"), [(False, 2024), (True, 1280)])
def test_vectors_are_float32_of_the_stated_width_and_the_last_1280_not_negative(
    last_only: bool, dim: int, photographs: dict[str, Path]
) -> None:
    encoder = ImageEncoder("cpu", last_only)
    found = encoder.encode([encoder.prepare(path) for path in photographs.values()])
    assert found.shape == (2, encoder.dim) == (2, dim)
    assert encoder.encode([]).shape == (0, dim)
    assert found.dtype == torch.float32
    assert (found[:, -1280:] >= 0).all()  # means over what a ReLU6 let through


def test_a_picture_has_the_same_vector_alone_and_in_a_batch(encoder: ImageEncoder, photographs: dict[str, Path]) -> None:
    prepared = [encoder.prepare(path) for path in photographs.values()]
    torch.testing.assert_close(encoder.encode(prepared[:1]), encoder.encode(prepared * 5)[:1], atol=1e-5, rtol=1e-5)


def test_vectors_are_those_of_timms_own_model_in_any_number(encoder: ImageEncoder, photographs: dict[str, Path]) -> None:
    maps: list[torch.Tensor] = []
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    stored = torch.load(io.BytesIO(EFFICIENTNET_WEIGHTS.read()), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    for block in model.blocks[2:]:
        block.register_forward_hook(lambda module, inputs, output: maps.append(output))
    prepared = [encoder.prepare(path).roll(shift, dims=2) for path in photographs.values() for shift in (0, 30, 60, 90, 120)]
    with torch.inference_mode():
        last = model.eval().forward_head(model.forward_features(torch.stack(prepared)), pre_logits=True)
    expected = torch.cat([*(each.flatten(2).mean(2) for each in maps), last], 1)
    alone = ImageEncoder("cpu", last_only=True)
    for count in (1, AT_ONCE, AT_ONCE + 1, len(prepared)):
        torch.testing.assert_close(encoder.encode(prepared[:count]), expected[:count], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(alone.encode(prepared[:count]), last[:count], atol=1e-4, rtol=1e-5)
    assert agreement(expected, encoder.encode(prepared)) > 1 - 1e-9
    assert agreement(last, alone.encode(prepared)) > 1 - 1e-9


def test_the_middle_square_of_a_picture_is_what_counts(
    encoder: ImageEncoder, photographs: dict[str, Path], tmp_path: Path
) -> None:
    wide = Image.open(photographs["china"])
    left = (wide.width - wide.height) // 2
    wide.crop((left, 0, left + wide.height, wide.height)).save(tmp_path / "square.png")
    both = encoder.encode([encoder.prepare(photographs["china"]), encoder.prepare(tmp_path / "square.png")])
    assert torch.cosine_similarity(both[0], both[1], dim=0) > 0.98


@pytest.mark.parametrize("size", [(8, 8), (2000, 20), (33, 700)])
def test_pictures_of_any_size_and_shape_are_prepared(encoder: ImageEncoder, size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, "orange").save(tmp_path / "plain.png")
    prepared = encoder.prepare(tmp_path / "plain.png")
    assert prepared.shape == (3, 224, 224)
    assert prepared.abs().max() <= 1
    assert encoder.encode([prepared]).isfinite().all()


def test_a_file_that_is_not_an_image_fails_alone(encoder: ImageEncoder, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(ItemError):
        encoder.prepare(tmp_path / "notes.png")
