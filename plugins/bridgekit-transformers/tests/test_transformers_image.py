from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor

from bridgekit.errors import BridgekitError, PluginError
from bridgekit.media import read_image
from bridgekit.plugins import load_encoder
from bridgekit.testing import check_encoder

Tiny = Callable[..., Path]


def vectors(name: str, pictures: list[Path]) -> Tensor:
    encoder = load_encoder(f"transformers:{name}", "cpu")
    return encoder.encode([encoder.prepare(picture) for picture in pictures])


def outputs(folder: Path, picture: Path, model: str = "AutoModel", **arguments: Any) -> Any:
    """transformers' own preprocessing, resized by Pillow, and call for one picture alone."""
    pixels = torch.from_numpy(preprocessed(folder, picture))[None]
    with torch.inference_mode():
        return getattr(transformers, model).from_pretrained(folder)(pixel_values=pixels, **arguments)


def preprocessed(folder: Path, picture: Path) -> Any:
    """What every one of the small models' preprocessors does, written out: to 32 x 32, to 0..1, normalised by channel."""
    import numpy as np
    from PIL import Image

    asked = tiny_models.read_json(folder / "preprocessor_config.json")
    image = read_image(picture).resize((32, 32), Image.Resampling(asked["resample"]))
    pixels = np.asarray(image, dtype=np.float32) / 255
    mean, deviation = np.float32(asked["image_mean"]), np.float32(asked["image_std"])
    return ((pixels - mean) / deviation).transpose(2, 0, 1)


def assert_same(found: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "dinov2-registers"])
def test_a_vision_transformer_gives_its_class_token(tiny: Tiny, pictures: list[Path], kind: str) -> None:
    expected = [outputs(tiny(kind), picture).last_hidden_state[0, 0] for picture in pictures]
    assert_same(vectors(str(tiny(kind)), pictures), expected)


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_a_convolutional_model_gives_its_pooled_map(tiny: Tiny, pictures: list[Path], kind: str) -> None:
    expected = [outputs(tiny(kind), picture).pooler_output[0].flatten() for picture in pictures]
    assert_same(vectors(str(tiny(kind)), pictures), expected)


@pytest.mark.parametrize(("kind", "before"), [("vit", 1), ("deit", 2), ("dinov2-registers", 4)])
def test_the_mean_is_over_the_patches_alone(tiny: Tiny, pictures: list[Path], kind: str, before: int) -> None:
    states = outputs(tiny(kind), pictures[0]).last_hidden_state[0]
    assert len(states) == before + 16
    assert_same(vectors(f"{tiny(kind)},pooling=mean", pictures[:1]), [states[before:].mean(0)])


def test_the_mean_of_a_map_is_over_its_height_and_width(tiny: Tiny, pictures: list[Path]) -> None:
    states = outputs(tiny("resnet"), pictures[0]).last_hidden_state[0]
    assert_same(vectors(f"{tiny('resnet')},pooling=mean", pictures[:1]), [states.mean((1, 2))])


@pytest.mark.parametrize(
    ("kind", "before"), [("vit", 1), ("deit", 2), ("dinov2", 1), ("dinov2-registers", 4), ("convnext", 0), ("resnet", 0)]
)
def test_an_earlier_layer_is_averaged_over_its_patches_or_its_map_beside_the_last(
    tiny: Tiny, pictures: list[Path], kind: str, before: int
) -> None:
    expected = []
    for picture, last in zip(pictures, vectors(str(tiny(kind)), pictures), strict=True):
        states = outputs(tiny(kind), picture, output_hidden_states=True).hidden_states[1][0]
        expected.append(torch.cat([states.mean((1, 2)) if states.ndim == 3 else states[before:].mean(0), last]))
    assert_same(vectors(f"{tiny(kind)},layers=1+last", pictures), expected)


def test_the_last_layer_is_pooled_as_asked_beside_an_earlier_one(tiny: Tiny, pictures: list[Path]) -> None:
    found = outputs(tiny("vit"), pictures[0], output_hidden_states=True)
    expected = torch.cat([found.pooler_output[0], found.hidden_states[1][0, 1:].mean(0)])
    assert_same(vectors(f"{tiny('vit')},pooling=pooler,layers=2+1", pictures[:1]), [expected])


def test_the_last_layer_alone_is_the_model_without_the_option(tiny: Tiny) -> None:
    revisions = {load_encoder(f"transformers:{tiny('vit')}{options}", "cpu").revision for options in ("", ",layers=last")}
    assert len(revisions | {load_encoder(f"transformers:{tiny('vit')},layers=2", "cpu").revision}) == 1
    others = {load_encoder(f"transformers:{tiny('vit')},layers={asked}", "cpu").revision for asked in ("1", "1+2", "2+1")}
    assert len(revisions | others) == 4


def test_layers_that_the_model_lacks_are_refused(tiny: Tiny) -> None:
    with pytest.raises(BridgekitError, match=r"the model has no layers 5\+last") as caught:
        load_encoder(f"transformers:{tiny('resnet')},layers=5+last", "cpu")
    assert caught.value.remedy == "give distinct numbers from 1 to 4, or last, joined by +, as in layers=2+last"


def test_a_model_that_gives_no_hidden_states_is_one_message(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = transformers.ViTModel.forward

    def without(self: Any, pixel_values: Tensor, output_hidden_states: bool = False) -> Any:
        return forward(self, pixel_values)

    monkeypatch.setattr(transformers.ViTModel, "forward", without)
    assert load_encoder(f"transformers:{tiny('vit')}", "cpu").dim == 32
    with pytest.raises(PluginError, match="gets no earlier layers of models of type vit") as caught:
        load_encoder(f"transformers:{tiny('vit')},layers=1+last", "cpu")
    assert caught.value.remedy == "omit layers="


def test_the_pooler_can_be_chosen(tiny: Tiny, pictures: list[Path]) -> None:
    assert_same(vectors(f"{tiny('vit')},pooling=pooler", pictures[:1]), [outputs(tiny("vit"), pictures[0]).pooler_output[0]])


def test_a_pooling_that_the_family_lacks_is_refused_with_those_it_has(tiny: Tiny) -> None:
    with pytest.raises(BridgekitError, match="pooling=projection") as caught:
        load_encoder(f"transformers:{tiny('vit')},pooling=projection", "cpu")
    assert caught.value.remedy == "choose one of: cls, mean, pooler"


def test_dinov3_is_preprocessed_with_torchvision(tiny: Tiny, pictures: list[Path]) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    if not hasattr(transformers, "DINOv3ViTModel"):
        pytest.skip("this version of transformers has no DINOv3")
    folder = tiny("dinov3")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.DINOv3ViTModel.from_pretrained(folder)
    pixels = processor(images=read_image(pictures[3]), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        states = model(pixels).last_hidden_state[0]
    assert_same(vectors(str(folder), pictures[3:]), [states[0]])
    assert_same(vectors(f"{folder},pooling=mean", pictures[3:]), [states[5:].mean(0)])
    with torch.inference_mode():
        earlier = model(pixels, output_hidden_states=True).hidden_states[1][0, 5:]
    assert_same(vectors(f"{folder},layers=1+last", pictures[3:]), [torch.cat([earlier.mean(0), states[0]])])
    assert "torchvision" in load_encoder(f"transformers:{folder}", "cpu").revision


def test_a_pooler_that_was_never_trained_is_refused_where_it_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in tiny("vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_encoder(f"transformers:{tmp_path}", "cpu").dim == 32
    with pytest.raises(PluginError, match=r"no weights for 2 of the model's tensors, among them pooler\.dense\.bias"):
        load_encoder(f"transformers:{tmp_path},pooling=pooler", "cpu")


def test_an_image_model_keeps_the_contract(
    tiny: Tiny, pictures: list[Path], not_a_file_of_the_kind: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.png").touch()
    bad = [not_a_file_of_the_kind, tmp_path / "empty.png", tmp_path / "missing.png"]
    for options in ("", ",layers=1+last"):
        changed = f"transformers:{tiny('dinov2', seed=1)}{options}"
        check_encoder(f"transformers:{tiny('dinov2')}{options}", pictures, bad, changed=changed)
