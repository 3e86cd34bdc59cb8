import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_timm_models import BuildFolder, random_model
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from bridgekit.encoders import Encoder
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.media import read_image
from bridgekit.plugins import load_encoder
from bridgekit.testing import check_encoder

DAISY = 985
PALACE = 698  # china.jpg shows the Summer Palace in Beijing
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def efficientnet(lite0: Path) -> Encoder:
    return load_encoder(f"timm:tf_efficientnet_lite0,checkpoint={lite0}", "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, Path]) -> list[Path]:
    """The two photographs in other sizes, shapes, formats and kinds of pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for stem, photograph in photographs.items():
        picture = Image.open(photograph)
        for name, size in [("a.png", (640, 427)), ("b.jpg", (200, 400)), ("c.png", (1201, 333)), ("d.jpg", (100, 75))]:
            paths.append(folder / f"{stem}-{name}")
            picture.resize(size).save(paths[-1])
        for name, mode in [("cmyk.jpg", "CMYK"), ("grey.png", "L"), ("palette.png", "P")]:
            paths.append(folder / f"{stem}-{name}")
            picture.convert(mode).save(paths[-1])
    return paths


def vectors(encoder: Encoder, paths: list[Path]) -> Tensor:
    return encoder.encode([encoder.prepare(path) for path in paths])


# ---- the contract


def test_a_real_model_keeps_the_encoder_contract(
    lite0: Path, photographs: dict[str, Path], pictures: list[Path], unusable: list[Path], tmp_path: Path
) -> None:
    tensors = torch.load(lite0, weights_only=True)
    tensors["_conv_stem.weight"] *= 1.01
    torch.save(tensors, tmp_path / "other.pth")
    check_encoder(
        f"timm:tf_efficientnet_lite0,checkpoint={lite0}",
        [*photographs.values(), pictures[2]],
        unusable,
        changed=f"timm:tf_efficientnet_lite0,checkpoint={tmp_path / 'other.pth'}",
    )


def test_a_vision_transformer_with_random_weights_keeps_the_encoder_contract(
    build_folder: BuildFolder, pictures: list[Path], unusable: list[Path]
) -> None:
    name, changed = build_folder(), build_folder("changed", seed=1)
    check_encoder(f"timm:{name}", [*pictures[:3], *pictures[-3:]], unusable, changed=f"timm:{changed}")


def test_no_pictures_give_a_matrix_without_rows(efficientnet: Encoder) -> None:
    assert efficientnet.encode([]).shape == (0, efficientnet.dim)


# ---- real weights


def test_the_same_weights_give_the_starters_vectors(efficientnet: Encoder, pictures: list[Path]) -> None:
    pytest.importorskip("bridgekit_starter")
    starter = load_encoder("starter:image-last", "cpu")
    cosine = torch.cosine_similarity(vectors(efficientnet, pictures), vectors(starter, pictures))
    assert cosine.min() > 0.9999


@pytest.mark.parametrize(("name", "label"), [("flower", DAISY), ("china", PALACE)])
def test_the_classifier_on_top_names_what_a_photograph_shows(
    efficientnet: Any, photographs: dict[str, Path], name: str, label: int
) -> None:
    scores = efficientnet._model.get_classifier()(vectors(efficientnet, [photographs[name]]))
    assert int(scores.argmax()) == label


# ---- pictures


def test_a_picture_is_prepared_as_the_models_config_says(build_folder: BuildFolder, photographs: dict[str, Path]) -> None:
    config = {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 0.6, 0.7),
        "interpolation": "bilinear",
        "crop_pct": 0.8,
        "crop_mode": "squash",
    }
    encoder = load_encoder(f"timm:{build_folder(**config)}", "cpu")
    transform = create_transform(**resolve_data_config({}, pretrained_cfg={"input_size": (3, 160, 160), **config}))
    assert torch.equal(encoder.prepare(photographs["china"]), transform(read_image(photographs["china"])))


@pytest.mark.parametrize("kind", ["cmyk.jpg", "turned.jpg", "grey16.png", "palette.png"])
def test_pictures_of_all_kinds_have_nearly_the_vector_of_the_plain_one(
    kind: str, efficientnet: Encoder, photographs: dict[str, Path], tmp_path: Path
) -> None:
    plain = Image.open(photographs["china"])
    path = tmp_path / kind
    if kind == "cmyk.jpg":
        plain.convert("CMYK").save(path, quality=95)
    elif kind == "turned.jpg":
        exif = Image.Exif()
        exif[ORIENTATION] = 6  # the camera lay on its side: turn it by a quarter, clockwise
        plain.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    elif kind == "grey16.png":
        plain = plain.convert("L")
        plain.convert("I;16").point(lambda level: level * 257).save(path)
    else:
        plain = plain.quantize(256)
        plain.save(path, transparency=0)
        plain = read_image(path)  # white where it was transparent
    plain.convert("RGB").save(tmp_path / "plain.png")
    both = vectors(efficientnet, [path, tmp_path / "plain.png"])
    assert torch.cosine_similarity(both[0], both[1], dim=0) > 0.98


@pytest.mark.parametrize("size", [(8, 8), (9000, 60), (60, 9000), (100_000, 8)])
def test_pictures_of_any_size_and_shape_are_prepared(size: tuple[int, int], efficientnet: Encoder, tmp_path: Path) -> None:
    Image.new("RGB", size, "orange").save(tmp_path / "plain.png")
    prepared = efficientnet.prepare(tmp_path / "plain.png")
    assert prepared.shape == (3, 224, 224)
    assert efficientnet.encode([prepared]).isfinite().all()


def test_a_very_wide_picture_is_prepared_as_timm_would_in_more_memory(
    efficientnet: Any, photographs: dict[str, Path], tmp_path: Path
) -> None:
    Image.open(photographs["china"]).resize((3000, 128)).save(tmp_path / "wide.png")
    whole = efficientnet._transform(read_image(tmp_path / "wide.png"))
    assert (efficientnet.prepare(tmp_path / "wide.png") - whole).abs().max() < 0.05


# ---- options


def pooled(pooling: str, features: Tensor) -> Tensor:
    return {"cls": features[:, 0], "avg": features[:, 1:].mean(dim=1), "max": features[:, 1:].amax(dim=1)}[pooling]


@pytest.mark.parametrize("pooling", ["cls", "avg", "max"])
def test_a_transformers_tokens_are_pooled_as_requested(pooling: str, build_folder: BuildFolder) -> None:
    pixels = torch.rand(2, 3, 160, 160)
    encoder = load_encoder(f"timm:{build_folder()},pooling={pooling}", "cpu")
    with torch.inference_mode():
        expected = pooled(pooling, random_model().forward_features(pixels))
    torch.testing.assert_close(encoder.encode(list(pixels)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "axes"), [("test_resnet", (2, 3)), ("test_mambaout", (1, 2))])
def test_a_feature_map_is_pooled_as_requested_wherever_its_channels_are(
    architecture: str, axes: tuple[int, int], build_folder: BuildFolder
) -> None:
    pixels = torch.rand(2, 3, 160, 160)
    encoder = load_encoder(f"timm:{build_folder(architecture=architecture)},pooling=max", "cpu")
    with torch.inference_mode():
        expected = random_model(architecture).forward_features(pixels).amax(dim=axes)
    torch.testing.assert_close(encoder.encode(list(pixels)), expected, atol=1e-5, rtol=1e-5)


# ---- layers


def states(model: Any, modules: list[Any], pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """What these modules give in a forward pass, and the classifier's input."""
    found: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda module, inputs, output: found.append(output)) for module in modules]
    with torch.inference_mode():
        last = model.forward_head(model.forward_features(pixels), pre_logits=True)
    for hook in hooks:
        hook.remove()
    return found, last


def test_the_blocks_of_a_transformer_are_averaged_over_its_patches_beside_the_last(build_folder: BuildFolder) -> None:
    pixels, model = torch.rand(2, 3, 160, 160), random_model()
    (second, fourth), last = states(model, [model.blocks[1], model.blocks[3]], pixels)
    assert second.shape[1] == 101  # 100 patches behind the class token
    expected = torch.cat([second[:, 1:].mean(1), fourth[:, 1:].mean(1), last], 1)
    encoder = load_encoder(f"timm:{build_folder()},layers=2+4+last", "cpu")
    assert encoder.dim == 192
    torch.testing.assert_close(encoder.encode(list(pixels)), expected, atol=1e-5, rtol=1e-5)


def test_layers_are_concatenated_as_they_are_named_and_the_last_is_pooled_as_requested(build_folder: BuildFolder) -> None:
    pixels, model = torch.rand(2, 3, 160, 160), random_model()
    (first, second, final), _ = states(model, [model.blocks[0], model.blocks[1], model.norm], pixels)
    expected = torch.cat([final[:, 0], second[:, 1:].mean(1), first[:, 1:].mean(1)], 1)
    encoder = load_encoder(f"timm:{build_folder()},pooling=cls,layers=6+2+1", "cpu")
    torch.testing.assert_close(encoder.encode(list(pixels)), expected, atol=1e-5, rtol=1e-5)


def test_the_stages_of_a_convolutional_network_are_averaged_over_their_maps(build_folder: BuildFolder) -> None:
    pixels, model = torch.rand(2, 3, 160, 160), random_model("test_resnet")
    (stem, third), last = states(model, [model.act1, model.layer3], pixels)
    encoder = load_encoder(f"timm:{build_folder(architecture='test_resnet')},layers=1+4+last", "cpu")
    expected = torch.cat([stem.mean((2, 3)), third.mean((2, 3)), last], 1)
    torch.testing.assert_close(encoder.encode(list(pixels)), expected, atol=1e-5, rtol=1e-5)


def test_a_real_models_earlier_layers_are_those_of_the_starter(lite0: Path, pictures: list[Path]) -> None:
    pytest.importorskip("bridgekit_starter")
    starter = vectors(load_encoder("starter:image", "cpu"), pictures)
    found = vectors(load_encoder(f"timm:tf_efficientnet_lite0,checkpoint={lite0},layers=4+last", "cpu"), pictures)
    assert found.shape == (len(pictures), 112 + 1280)
    for own, theirs in ((found[:, :112], starter[:, 120:232]), (found[:, 112:], starter[:, -1280:])):
        assert torch.cosine_similarity(own, theirs).min() > 0.999


def test_the_last_layer_alone_is_the_model_without_the_option(build_folder: BuildFolder) -> None:
    folder, pixels = build_folder(), list(torch.rand(2, 3, 160, 160))
    plain = load_encoder(f"timm:{folder}", "cpu")
    for layer in ("last", "6"):
        encoder = load_encoder(f"timm:{folder},layers={layer}", "cpu")
        assert encoder.revision == plain.revision
        assert torch.equal(encoder.encode(pixels), plain.encode(pixels))


@pytest.mark.parametrize("asked", ["0", "7", "first", "1+1", "6+last", ""])
def test_layers_that_the_model_lacks_are_refused(asked: str, build_folder: BuildFolder) -> None:
    with pytest.raises(BridgekitError, match="the model has no layers") as caught:
        load_encoder(f"timm:{build_folder()},layers={asked}", "cpu")
    assert "from 1 to 6" in str(caught.value.remedy)


def test_a_model_whose_earlier_layers_timm_does_not_give_is_one_message(
    build_folder: BuildFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(random_model()), "forward_intermediates")
    folder = build_folder()
    assert load_encoder(f"timm:{folder}", "cpu").dim == 64
    with pytest.raises(PluginError, match="does not give the earlier layers") as caught:
        load_encoder(f"timm:{folder},layers=2+last", "cpu")
    assert caught.value.remedy == "omit layers="


def test_a_model_with_layers_keeps_the_encoder_contract(
    build_folder: BuildFolder, pictures: list[Path], unusable: list[Path]
) -> None:
    name, changed = build_folder(), build_folder("changed", seed=1)
    check_encoder(f"timm:{name},layers=2+last", pictures[:3], unusable, changed=f"timm:{changed},layers=2+last")


def test_a_model_without_a_class_token_says_so(build_folder: BuildFolder) -> None:
    with pytest.raises(PluginError, match="no class token"):
        load_encoder(f"timm:{build_folder(architecture='test_resnet')},pooling=cls", "cpu")


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_a_model_can_be_asked_for_another_size(
    architecture: str, build_folder: BuildFolder, photographs: dict[str, Path]
) -> None:
    encoder = load_encoder(f"timm:{build_folder(architecture=architecture)},size=96", "cpu")
    prepared = encoder.prepare(photographs["china"])
    assert prepared.shape == (3, 96, 96)
    assert encoder.encode([prepared]).shape == (1, encoder.dim)


def test_a_checkpoint_can_be_asked_for_another_size(tmp_path: Path) -> None:
    save_file(random_model().state_dict(), tmp_path / "mine.safetensors")
    encoder = load_encoder(f"timm:test_vit,checkpoint={tmp_path / 'mine.safetensors'},size=96", "cpu")
    assert encoder.encode([torch.rand(3, 96, 96)]).shape == (1, 64)


def test_a_size_that_a_model_does_not_support_is_one_message(build_folder: BuildFolder) -> None:
    with pytest.raises(PluginError, match="size="):
        load_encoder(f"timm:{build_folder()},size=3", "cpu")


def test_a_model_of_grey_pictures_is_refused(build_folder: BuildFolder) -> None:
    folder = build_folder(architecture="test_resnet")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = {"in_chans": 1}
    config["pretrained_cfg"]["input_size"] = [1, 160, 160]
    (folder / "config.json").write_text(json.dumps(config))
    model = random_model("test_resnet", in_chans=1)
    save_file(model.state_dict(), folder / "model.safetensors")
    with pytest.raises(PluginError, match="takes 1 channels"):
        load_encoder(f"timm:{folder}", "cpu")


# ---- the revision


def test_the_revision_is_that_of_weights_and_settings_wherever_they_lie(build_folder: BuildFolder) -> None:
    folders = [build_folder("here"), build_folder("there")]
    here, there = (load_encoder(f"timm:{folder}", "cpu").revision for folder in folders)
    assert here == there
    assert here.startswith("timm:test_vit@")
    assert here.endswith("-v1")


def test_the_revision_changes_with_weights_pooling_size_layers_and_preprocessing(build_folder: BuildFolder) -> None:
    folder = build_folder()
    names = [
        f"{folder}",
        f"{folder},pooling=avg",
        f"{folder},pooling=max",
        f"{folder},size=96",
        f"{folder},layers=2+last",
        f"{folder},layers=last+2",
        f"{folder},layers=2",
        f"{build_folder('darker', mean=(0.4, 0.5, 0.5))}",
        f"{build_folder('closer', crop_pct=0.5)}",
        f"{build_folder('trained', seed=1)}",
    ]
    assert len({load_encoder(f"timm:{name}", "cpu").revision for name in names}) == len(names)
