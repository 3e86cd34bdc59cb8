import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from bridgekit_timm import MODELS
from small_timm_models import BuildFolder, FillCache, random_model
from timm.models import get_pretrained_cfg

from bridgekit.errors import BridgekitError, PluginError
from bridgekit.plugins import installed_plugins, load_encoder

SIDE = 160  # of the small models' pictures


def the_message(name: str) -> str:
    with pytest.raises(PluginError) as caught:
        load_encoder(name, "cpu")
    return str(caught.value)


# ---- the plugin


def test_the_models_that_the_documents_name_are_in_timms_registry() -> None:
    page = Path(__file__).parents[3] / "docs" / "how-to" / "hub-model.md"
    names = {name.rstrip(".") for name in re.findall(r"timm:([a-z][\w.]+)", page.read_text(encoding="utf-8"))}
    assert len(names) >= 3
    for name in names:
        assert get_pretrained_cfg(name).hf_hub_id == f"timm/{name}"


def test_the_plugin_is_found_and_has_no_default_of_its_own() -> None:
    (plugin,) = [plugin for plugin in installed_plugins() if plugin.name == "timm"]
    assert plugin.problem is None
    (provider,) = plugin.providers
    assert (provider.name, provider.modalities, dict(provider.defaults)) == ("timm", ("image",), {})


def test_the_plugin_and_its_list_of_models_need_neither_timm_nor_torch() -> None:
    program = (
        "import sys, bridgekit_timm; bridgekit_timm.encoder_providers()[0].models(); print({'timm', 'torch'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_the_models_to_start_from_are_in_timm_with_weights_on_the_hub() -> None:
    for model in MODELS:
        name = model.split(",")[0]
        assert name in timm.list_pretrained()
        assert get_pretrained_cfg(name).hf_hub_id == f"timm/{name}"


# ---- where a model comes from


def test_a_local_folder_gives_what_the_model_gives_before_its_classifier(build_folder: BuildFolder) -> None:
    encoder = load_encoder(f"timm:{build_folder()}", "cpu")
    pixels = torch.rand(3, 3, SIDE, SIDE)
    model = random_model()
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    assert encoder.dim == 64
    torch.testing.assert_close(encoder.encode(list(pixels)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["./model", "local-dir:./model"])
def test_a_folder_may_be_named_from_where_one_is(name: str, build_folder: BuildFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(build_folder().parent)
    assert load_encoder(f"timm:{name}", "cpu").dim == 64


@pytest.mark.parametrize("name", ["someone/small-vit", "hf-hub:someone/small-vit", "someone/small-vit@main"])
def test_a_hub_model_is_opened_from_the_cache_offline(name: str, build_folder: BuildFolder, fill_cache: FillCache) -> None:
    folder = build_folder()
    fill_cache("someone/small-vit", folder)
    pixels = [torch.rand(3, SIDE, SIDE)]
    found, expected = load_encoder(f"timm:{name}", "cpu"), load_encoder(f"timm:{folder}", "cpu")
    assert torch.equal(found.encode(pixels), expected.encode(pixels))
    assert found.revision == expected.revision


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_model_is_pinned_to_its_commit_and_stays_when_the_branch_moves(
    build_folder: BuildFolder, fill_cache: FillCache
) -> None:
    snapshot = fill_cache("someone/small-vit", build_folder())
    first = load_encoder("timm:someone/small-vit,pooling=avg", "cpu")
    assert first.pinned == f"timm:someone/small-vit@{COMMIT},pooling=avg"  # type: ignore[attr-defined]
    moved = snapshot.parent / ("f" * 40)
    build_folder("other", seed=1).rename(moved)
    (snapshot.parents[1] / "refs" / "main").write_text(moved.name)
    assert load_encoder("timm:someone/small-vit,pooling=avg", "cpu").revision != first.revision
    assert load_encoder(f"timm:someone/small-vit@{COMMIT},pooling=avg", "cpu").revision == first.revision


def test_a_name_of_timm_is_pinned_to_the_commit_of_its_repository(build_folder: BuildFolder, fill_cache: FillCache) -> None:
    fill_cache("timm/test_vit.r160_in1k", build_folder())
    first = load_encoder("timm:test_vit.r160_in1k", "cpu")
    assert first.pinned == f"timm:test_vit.r160_in1k@{COMMIT}"  # type: ignore[attr-defined]
    again = load_encoder(f"timm:test_vit.r160_in1k@{COMMIT}", "cpu")
    assert again.revision == first.revision
    assert "not in the cache" in the_message(f"timm:test_vit.r160_in1k@{'f' * 40}")


def test_a_local_folder_is_not_pinned(build_folder: BuildFolder) -> None:
    folder = build_folder()
    assert load_encoder(f"timm:{folder},size=160", "cpu").pinned == f"timm:{folder},size=160"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["test_vit", "test_vit.r160_in1k"])
def test_a_name_of_timm_is_opened_from_the_repository_that_timm_names(
    name: str, build_folder: BuildFolder, fill_cache: FillCache
) -> None:
    folder = build_folder()
    fill_cache("timm/test_vit.r160_in1k", folder)
    pixels = [torch.rand(3, SIDE, SIDE)]
    expected = load_encoder(f"timm:{folder}", "cpu").encode(pixels)
    assert torch.equal(load_encoder(f"timm:{name}", "cpu").encode(pixels), expected)


def test_weights_in_pytorchs_own_format_are_read_too(build_folder: BuildFolder) -> None:
    pixels = [torch.rand(3, SIDE, SIDE)]
    old, safe = build_folder("old", safe=False), build_folder("safe")
    assert sorted(file.name for file in old.iterdir()) == ["config.json", "pytorch_model.bin"]
    found, expected = load_encoder(f"timm:{old}", "cpu"), load_encoder(f"timm:{safe}", "cpu")
    assert torch.equal(found.encode(pixels), expected.encode(pixels))


def test_a_config_of_one_level_as_timm_wrote_it_once_is_understood(build_folder: BuildFolder) -> None:
    folder = build_folder(architecture="test_resnet")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", **config["pretrained_cfg"]}))
    assert load_encoder(f"timm:{folder}", "cpu").dim == 96


# ---- what is said where there is none


def test_an_unknown_model_is_one_message_with_the_nearest_names() -> None:
    message = the_message("timm:vit_smal_patch14_dinov2")
    assert message.startswith("bridgekit-timm found no model 'vit_smal_patch14_dinov2'")
    assert "did you mean vit_small_patch14_dinov2 or " in message


def test_an_unknown_tag_is_one_message_with_the_nearest_tags() -> None:
    assert "did you mean resnet50.a1_in1k" in the_message("timm:resnet50.a1_in1kk")


def test_a_name_similar_to_no_other_is_still_one_message() -> None:
    assert "timm.list_pretrained()" in the_message("timm:###")


def test_a_missing_folder_is_one_message() -> None:
    assert "found no folder with this name, and it is not a hub id" in the_message("timm:./not-here")


@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "someone/unknown"])
def test_a_model_that_is_not_in_the_cache_is_one_message_offline(name: str, fill_cache: FillCache) -> None:
    message = the_message(f"timm:{name}")
    assert "bridgekit-timm" in message
    assert "HF_HUB_OFFLINE" in message
    assert message.count("\n") == 2


def test_a_cache_with_the_config_alone_is_not_taken_for_the_model(build_folder: BuildFolder, fill_cache: FillCache) -> None:
    folder = build_folder()
    (folder / "model.safetensors").unlink()
    fill_cache("someone/small-vit", folder)
    assert "not in the cache" in the_message("timm:someone/small-vit")


def test_a_cache_without_the_weights_that_were_not_needed_is_whole(build_folder: BuildFolder, fill_cache: FillCache) -> None:
    tree_cache = pytest.importorskip("huggingface_hub._tree_cache", reason="this client keeps no list of a repository's files")
    snapshot = fill_cache("someone/small-vit", build_folder())
    # The repository has its weights in both formats, and only one of them was fetched.
    files = ["config.json", "model.safetensors", "pytorch_model.bin"]
    entries = {file: tree_cache.TreeCacheEntry(size=1, blob_id="0" * 40) for file in files}
    tree_cache.write_tree_cache(str(snapshot.parents[1]), snapshot.name, entries)
    assert load_encoder("timm:someone/small-vit", "cpu").dim == 64


def test_weights_that_are_on_no_hub_are_one_message_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "HF_HUB_OFFLINE is set" in the_message("timm:gcvit_xxtiny")


def test_weights_that_are_on_no_hub_are_one_message_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    message = the_message("timm:gcvit_xxtiny")
    assert "bridgekit-timm cannot download https://github.com/" in message
    assert "checkpoint=FILE" in message


def test_an_architecture_without_weights_asks_for_some() -> None:
    assert "checkpoint=FILE" in the_message("timm:test_mambaout")


def test_a_model_in_another_librarys_layout_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    message = the_message(f"timm:{tmp_path}")
    assert "has no timm architecture" in message
    assert "transformers:MODEL" in message


@pytest.mark.parametrize("text", ["{", "[]", '"vit"'])
def test_a_broken_config_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path / "config.json") in the_message(f"timm:{tmp_path}")


def test_a_folder_of_an_architecture_that_timm_lacks_is_one_message(build_folder: BuildFolder) -> None:
    folder = build_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "vit_from_the_future"}))
    assert "found no model 'vit_from_the_future'" in the_message(f"timm:{folder}")


def test_a_folder_with_the_weights_of_another_model_is_one_message(build_folder: BuildFolder) -> None:
    folder, other = build_folder(), build_folder("other", "test_resnet")
    (other / "model.safetensors").replace(folder / "model.safetensors")
    message = the_message(f"timm:{folder}")
    assert "cls_token" in message
    assert message.count("\n") == 2
    assert "fix: download the model again" in message


def test_a_folder_without_weights_is_one_message(build_folder: BuildFolder) -> None:
    folder = build_folder()
    (folder / "model.safetensors").unlink()
    assert "found no weights" in the_message(f"timm:{folder}")


@pytest.mark.parametrize("option", ["pool=avg", "pooling=mean", "size=big", "size=0", "pooling=avg,pooling=max"])
def test_a_wrong_option_is_one_message(option: str) -> None:
    with pytest.raises(BridgekitError, match=r"option|pooling|size"):
        load_encoder(f"timm:resnet50,{option}", "cpu")
