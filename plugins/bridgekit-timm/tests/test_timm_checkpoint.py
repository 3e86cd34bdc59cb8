import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_timm_models import BuildFolder, random_model

from bridgekit.errors import PluginError
from bridgekit.plugins import load_encoder

PIXELS = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def latents(name: str) -> torch.Tensor:
    return load_encoder(name, "cpu").encode(list(PIXELS))


def expected(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        features: torch.Tensor = model.forward_head(model.forward_features(PIXELS), pre_logits=True)
        return features


def the_message(name: str) -> str:
    with pytest.raises(PluginError) as caught:
        load_encoder(name, "cpu")
    return str(caught.value)


def wrapped(key: str) -> Callable[[dict[str, torch.Tensor]], dict[str, Any]]:
    return lambda tensors: {"epoch": 3, key: {f"module.{name}": tensor for name, tensor in tensors.items()}}


# ---- what is taken


def test_a_safetensors_checkpoint_is_taken_by_name_whatever_its_order(tmp_path: Path) -> None:
    model = random_model("test_resnet")
    save_file(dict(reversed(model.state_dict().items())), tmp_path / "mine.safetensors")
    found = latents(f"timm:test_resnet,checkpoint={tmp_path / 'mine.safetensors'}")
    torch.testing.assert_close(found, expected(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrap", [dict, wrapped("state_dict"), wrapped("model"), wrapped("model_ema")])
def test_a_pth_checkpoint_is_taken_in_and_out_of_the_usual_wrappers(wrap: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model("test_resnet")
    torch.save(wrap(model.state_dict()), tmp_path / "mine.pth")
    found = latents(f"timm:test_resnet,checkpoint={tmp_path / 'mine.pth'}")
    torch.testing.assert_close(found, expected(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_classifier_of_another_size_or_none_does_not_matter(
    architecture: str, classes: int, renamed: bool, tmp_path: Path
) -> None:
    model = random_model(architecture, num_classes=classes)
    tensors = {f"net.{name}" if renamed else name: tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors, tmp_path / "mine.pth")
    found = latents(f"timm:{architecture},checkpoint={tmp_path / 'mine.pth'}")
    torch.testing.assert_close(found, expected(model), atol=1e-5, rtol=1e-5)


def test_tensors_of_other_names_are_taken_by_position(tmp_path: Path) -> None:
    model = random_model("test_resnet")
    tensors = model.state_dict()
    other = {f"part{number}.{name.rpartition('.')[2]}": tensor for number, (name, tensor) in enumerate(tensors.items())}
    torch.save(other, tmp_path / "mine.bin")
    found = latents(f"timm:test_resnet,checkpoint={tmp_path / 'mine.bin'}")
    torch.testing.assert_close(found, expected(model), atol=1e-5, rtol=1e-5)


def test_batch_norms_counters_may_be_missing(tmp_path: Path) -> None:
    model = random_model("test_resnet")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    save_file(tensors, tmp_path / "mine.safetensors")
    found = latents(f"timm:test_resnet,checkpoint={tmp_path / 'mine.safetensors'}")
    torch.testing.assert_close(found, expected(model), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_in_another_librarys_form_goes_through_timms_conversion(tmp_path: Path) -> None:
    model = random_model("test_vit")
    tensors = model.state_dict() | {"mask_token": torch.zeros(1, 64)}
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].flatten(1)  # a linear layer's, not a convolution's
    save_file(tensors, tmp_path / "mine.safetensors")
    found = latents(f"timm:test_vit,checkpoint={tmp_path / 'mine.safetensors'}")
    torch.testing.assert_close(found, expected(model), atol=1e-5, rtol=1e-5)


def test_the_tag_says_how_pictures_are_prepared_and_the_checkpoint_holds_the_weights(tmp_path: Path) -> None:
    save_file(random_model("test_vit").state_dict(), tmp_path / "mine.safetensors")
    name = f"test_vit.r160_in1k,checkpoint={tmp_path / 'mine.safetensors'}"
    assert load_encoder(f"timm:{name}", "cpu").dim == 64


# ---- what is refused


def test_another_architectures_checkpoint_is_refused_with_the_first_mismatch(tmp_path: Path) -> None:
    torch.save(random_model("test_vit").state_dict(), tmp_path / "vit.pth")
    message = the_message(f"timm:test_resnet,checkpoint={tmp_path / 'vit.pth'}")
    assert "where the model has conv1.0.weight (16, 3, 3, 3), it has cls_token (1, 1, 64)" in message
    assert f"in: {tmp_path / 'vit.pth'}" in message


def test_another_architectures_safetensors_file_is_refused_with_the_first_mismatch(tmp_path: Path) -> None:
    save_file(random_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    message = the_message(f"timm:test_resnet,checkpoint={tmp_path / 'vit.safetensors'}")
    assert "it has no conv1.0.weight (16, 3, 3, 3)" in message


def test_a_safetensors_file_is_never_taken_by_position(tmp_path: Path) -> None:
    save_file(
        {f"net.{name}": tensor for name, tensor in random_model("test_resnet").state_dict().items()}, tmp_path / "a.safetensors"
    )
    assert "it has no conv1.0.weight" in the_message(f"timm:test_resnet,checkpoint={tmp_path / 'a.safetensors'}")


def test_a_sister_models_checkpoint_is_refused_with_the_first_tensor_that_differs(tmp_path: Path) -> None:
    tensors = random_model("test_resnet").state_dict()
    tensors["layer1.0.conv2.weight"] = torch.zeros(5, 5, 3, 3)
    save_file(tensors, tmp_path / "sister.safetensors")
    assert "its layer1.0.conv2.weight (5, 5, 3, 3) should be (" in the_message(
        f"timm:test_resnet,checkpoint={tmp_path / 'sister.safetensors'}"
    )


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    tensors = random_model("test_resnet").state_dict()
    del tensors["layer2.0.conv1.weight"]
    torch.save(tensors, tmp_path / "part.pth")
    assert "it has no layer2.0.conv1.weight" in the_message(f"timm:test_resnet,checkpoint={tmp_path / 'part.pth'}")


@pytest.mark.parametrize(
    ("change", "reason"), [(-5, "it has no counterpart of the model's layer4"), (1, "no counterpart of its net.more")]
)
def test_too_few_or_too_many_tensors_are_not_taken_by_position(change: int, reason: str, tmp_path: Path) -> None:
    tensors = [(f"net.{name}", tensor) for name, tensor in random_model("test_resnet").state_dict().items()]
    torch.save(dict(tensors[:change] if change < 0 else [*tensors, ("net.more", torch.zeros(2))]), tmp_path / "odd.pth")
    assert reason in the_message(f"timm:test_resnet,checkpoint={tmp_path / 'odd.pth'}")


def test_a_tensor_that_the_model_has_no_place_for_is_named(tmp_path: Path) -> None:
    tensors = random_model("test_resnet").state_dict() | {"layer9.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "more.safetensors")
    assert "the model has no layer9.weight (2,)" in the_message(f"timm:test_resnet,checkpoint={tmp_path / 'more.safetensors'}")


def test_equal_shapes_of_other_kinds_are_not_taken_by_position(tmp_path: Path) -> None:
    names = [*random_model("test_resnet").state_dict()]
    tensors = [*random_model("test_resnet").state_dict().values()]
    weight = names.index("conv1.1.weight")
    names[weight], names[weight + 1] = names[weight + 1], names[weight]  # a norm's weight and bias, of one shape
    torch.save({f"net.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}, tmp_path / "odd.pth")
    assert "conv1.1.weight (16,), it has net.conv1.1.bias (16,)" in the_message(
        f"timm:test_resnet,checkpoint={tmp_path / 'odd.pth'}"
    )


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Code()}, tmp_path / "bad.pth")
    assert "cannot be read as a checkpoint" in the_message(f"timm:test_resnet,checkpoint={tmp_path / 'bad.pth'}")
    assert not (tmp_path / "ran").exists()


def test_weights_with_code_in_a_folder_are_refused_and_not_run(
    build_folder: BuildFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = build_folder(safe=False)
    torch.save({"state_dict": _Code()}, folder / "pytorch_model.bin")
    assert "weights_only" in the_message(f"timm:{folder}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
def test_a_file_that_is_not_a_checkpoint_is_one_message(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("not a checkpoint")
    assert "cannot be read as a checkpoint" in the_message(f"timm:test_resnet,checkpoint={tmp_path / name}")


def test_a_missing_checkpoint_is_one_message(tmp_path: Path) -> None:
    assert "there is no such checkpoint" in the_message(f"timm:test_resnet,checkpoint={tmp_path / 'lost.pth'}")


def test_a_checkpoint_for_a_folder_is_one_message(build_folder: BuildFolder) -> None:
    assert "checkpoint= requires the name of an architecture" in the_message(f"timm:{build_folder()},checkpoint=mine.pth")
