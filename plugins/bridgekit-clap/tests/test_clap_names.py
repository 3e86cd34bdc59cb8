"""Names, options and the messages about wrong ones: needs no laion_clap."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bridgekit_clap import EXAMPLES, encoder_providers, open_encoder
from bridgekit_clap.checkpoints import HUB, PUBLISHED, find_checkpoint
from bridgekit_clap.text import find_tokenizer, open_tokenizer

from bridgekit.errors import BridgekitError, PluginError


def test_listing_the_plugins_imports_neither_laion_clap_nor_transformers() -> None:
    code = (
        "import sys; from bridgekit.plugins import installed_plugins\n"
        "clap = [plugin for plugin in installed_plugins() if plugin.name == 'clap']\n"
        "print(clap[0].providers[0].name, clap[0].problem, 'laion_clap' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["clap", "None", "False", "False"]


def test_it_encodes_audio_and_text_and_is_the_default_of_neither() -> None:
    (provider,) = encoder_providers()
    assert provider.name == "clap"
    assert provider.modalities == ("audio", "text")
    assert not provider.defaults
    assert provider.models() == EXAMPLES


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("weights.pt,modality=video", "does not support modality 'video'"),
        ("weights.pt,tokenizer=roberta-base", "only for text"),
        ("missing/weights.pt", "found no such file"),
        ("missing/weights.pt,modality=text", "found no such file"),
        ("630k-audioset-best", "did you mean 630k-audioset-best.pt?"),
        ("", "one of 630k-best.pt"),
        ("630k-audioset-fusion-best.pt", "does not support fusion checkpoints"),
        ("630k-audioset-best.pt", "huggingface.co/lukewys/laion_clap"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_message_that_names_the_plugin(
    model: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PluginError) as caught:
        open_encoder(model, "cpu")
    assert said in str(caught.value)
    assert caught.value.what.startswith("bridgekit-clap")
    assert len(str(caught.value).splitlines()) <= 3


def test_an_option_of_another_name_is_refused() -> None:
    with pytest.raises(BridgekitError, match="unknown option 'fusion'"):
        open_encoder("weights.pt,fusion=yes", "cpu")


def in_the_hubs_cache(cache: Path, repository: str, files: dict[str, bytes]) -> Path:
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd", encoding="ascii")
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def test_a_published_checkpoint_is_found_in_the_hubs_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = in_the_hubs_cache(tmp_path, HUB, {PUBLISHED[1]: b"weights"})
    assert find_checkpoint(PUBLISHED[1]) == snapshot / PUBLISHED[1]
    with pytest.raises(PluginError, match="cannot download"):
        find_checkpoint(PUBLISHED[0])


def test_a_file_in_the_working_folder_comes_before_a_published_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(PUBLISHED[0]).write_bytes(b"weights")
    assert find_checkpoint(PUBLISHED[0]) == tmp_path / PUBLISHED[0]


@pytest.mark.parametrize("repository", ["roberta-base", "FacebookAI/roberta-base"])
def test_the_tokenizer_is_found_in_the_hubs_cache_under_its_old_and_its_new_name(
    repository: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = {file.name: file.read_bytes() for file in tokenizer_folder.iterdir()}
    snapshot = in_the_hubs_cache(tmp_path, repository, files)
    assert find_tokenizer(None) == snapshot


def test_without_a_tokenizer_the_text_tower_says_what_it_needs_where_it_is_and_how_to_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "weights.pt").write_bytes(b"not read before the tokenizer is found")
    with pytest.raises(PluginError) as caught:
        open_encoder(f"{tmp_path / 'weights.pt'},modality=text", "cpu")
    message = str(caught.value)
    assert "bridgekit-clap needs roberta-base's tokenizer" in message
    assert "hf download FacebookAI/roberta-base vocab.json merges.txt" in message
    assert ",tokenizer=roberta-base" in message
    assert len(message.splitlines()) <= 3


def test_a_folder_without_the_tokenizers_files_or_with_another_tokenizer_is_refused(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(PluginError, match=r"lacks vocab\.json and merges\.txt"):
        find_tokenizer(str(tmp_path))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "</s>": 2, "<s>": 3, "<unk>": 4}', encoding="utf-8")
    with pytest.raises(PluginError, match="has different tokens"):
        open_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("cut sho", encoding="utf-8")
    with pytest.raises(PluginError, match="cannot be read"):
        open_tokenizer(tmp_path)


def test_the_environment_of_these_tests_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
