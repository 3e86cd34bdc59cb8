import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from bridgekit_starter.export import export_whisper
from bridgekit_starter.voice import speak
from bridgekit_starter.weights import WHISPER_PARTS
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from typer.testing import CliRunner

from bridgekit.cli import program
from bridgekit.errors import BridgekitError

START = [50258, 50259, 50359, 50363]  # start of transcript, English, transcribe, no timestamps
END = 50257


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_whisper(tmp_path_factory.mktemp("models") / "whisper-base")


def test_the_folder_has_all_of_the_model_and_transformers_makes_nothing_up(folder: Path) -> None:
    _, told = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not list(told["missing_keys"])
    assert not list(told["unexpected_keys"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_the_exported_model_writes_down_what_is_said(folder: Path) -> None:
    samples, rate = speak("Good morning, how are you today", "en-us")
    wave = soxr.resample(samples.astype(np.float32) / 32768, rate, 16_000)
    mel = WhisperFeatureExtractor.from_pretrained(folder)(wave, sampling_rate=16_000, return_tensors="pt").input_features
    model = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True).float().eval()
    tokens = list(START)
    with torch.inference_mode():
        heard = model.model.encoder(mel)
        while len(tokens) < 20 and tokens[-1] != END:
            scores = model(encoder_outputs=heard, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(scores.argmax()))
    tokenizer = Tokenizer.from_file(str(WHISPER_PARTS[0].locate().with_name("tokenizer.json")))
    assert tokenizer.decode(tokens).strip(" .?!").lower() == "good morning, how are you today"


def test_the_folder_carries_the_licence(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "Copyright (c) 2022 OpenAI" in card
    assert "license: mit" in card
    assert json.loads((folder / "config.json").read_text())["model_type"] == "whisper"


def test_an_existing_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(BridgekitError, match="already"):
        export_whisper(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_behind_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stored: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("bridgekit_starter.export.whisper_weights", fail)
    with pytest.raises(BridgekitError, match="full"):
        export_whisper(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_folder_and_says_how_to_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridgekit_starter.export.whisper_weights", lambda stored: {"a": torch.zeros(2)})
    done = CliRunner().invoke(program(), ["starter-export", "whisper-base", str(tmp_path / "models" / "new")])
    assert done.exit_code == 0, done.output
    assert f"transformers:{tmp_path / 'models' / 'new'}" in done.output.replace("\n", "")
    assert sorted(path.name for path in (tmp_path / "models" / "new").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_the_command_is_registered_without_importing_numpy_or_torch() -> None:
    code = (
        "import sys, typer, bridgekit_starter\n"
        "bridgekit_starter.register_commands(typer.Typer())\n"
        "print([name for name in ('numpy', 'torch', 'safetensors') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
