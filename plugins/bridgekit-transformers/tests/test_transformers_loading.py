import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from bridgekit import PRESETS, Bridge
from bridgekit.bridge.bridge import Side
from bridgekit.cli import main
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.fusion.adapter import FrozenSide
from bridgekit.plugins import installed_plugins, load_encoder

Tiny = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: A model whose code lies in its repository: the sum of its tokens' embeddings at every position.
CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class OwnConfig(PretrainedConfig):
    model_type = "of-its-own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(100, 8)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return BaseModelOutput(last_hidden_state=self.words(input_ids))
"""


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    """A repository with a model of its own code."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    auto = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    tiny_models.write_json(
        folder / "config.json", {"model_type": "of-its-own", "auto_map": auto, "architectures": ["OwnModel"]}
    )
    save_file({"words.weight": torch.randn(100, 8)}, folder / "model.safetensors", {"format": "pt"})
    tiny_models.save_tokenizer(folder)
    return folder


def test_the_plugin_is_found_and_has_names_to_start_from_for_each_modality() -> None:
    (provider,) = (p for plugin in installed_plugins() for p in plugin.providers if p.name == "transformers")
    assert set(provider.modalities) == {"text", "audio", "image"}
    assert not provider.defaults
    for name in ("all-MiniLM", "whisper", "wav2vec2", "dinov2", "clip", "siglip", "clap", "e5"):
        assert any(name in model for model in provider.models())


def test_the_plugins_hooks_do_not_import_torch() -> None:
    code = (
        "import sys, bridgekit_transformers as plugin\n"
        "assert list(plugin.encoder_providers()[0].models())\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_model_in_the_hubs_cache_is_opened_by_its_id_without_a_network(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--small-bge"
    copied(tiny("bge"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    encoder = load_encoder("transformers:someone/small-bge", "cpu")
    assert encoder.revision == load_encoder(f"transformers:{tiny('bge')}", "cpu").revision
    assert load_encoder(f"transformers:someone/small-bge@{COMMIT}", "cpu").revision == encoder.revision


def test_a_hub_model_is_pinned_to_its_commit_and_stays_when_the_branch_moves(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--small"
    copied(tiny("e5"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    first = load_encoder("transformers:someone/small,pooling=cls", "cpu")
    assert first.pinned == f"transformers:someone/small@{COMMIT},pooling=cls"  # type: ignore[attr-defined]
    copied(tiny("e5", 1), repository / "snapshots" / ("f" * 40))
    (repository / "refs" / "main").write_text("f" * 40)
    assert load_encoder("transformers:someone/small,pooling=cls", "cpu").revision != first.revision
    assert load_encoder(f"transformers:someone/small@{COMMIT},pooling=cls", "cpu").revision == first.revision


def test_a_saved_bridge_has_its_encoder_downloaded_only_if_the_user_allows_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    snapshot = hub / "models--someone--small" / "snapshots" / COMMIT
    downloaded: list[str] = []
    from_cache = huggingface_hub.snapshot_download

    def download(name: str, *, local_files_only: bool = False, **options: Any) -> str:
        if not local_files_only:
            downloaded.append(f"{name}@{options['revision']}")
            copied(tiny("e5"), snapshot)
        return from_cache(name, local_files_only=True, **options)

    files = [SimpleNamespace(rfilename=path.name) for path in tiny("e5").iterdir()]
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    name = f"transformers:someone/small@{COMMIT}"
    encoder = load_encoder(name, "cpu")
    assert downloaded == [f"someone/small@{COMMIT}"], "the user named this one"
    sides = {modality: Side(name, encoder.revision, encoder.dim, True) for modality in ("text", "other")}
    made = Bridge(sides, {modality: FrozenSide(encoder.dim) for modality in sides}, PRESETS["default"], 0.07)
    folder = made.save(tmp_path / "bridge")
    assert Bridge.load(folder, "cpu").embed("text", ["a dog"]).shape == (1, encoder.dim)

    shutil.rmtree(snapshot)
    with pytest.raises(PluginError, match="needs your permission") as caught:
        Bridge.load(folder, "cpu").embed("text", ["a dog"])
    assert f"hf download someone/small --revision {COMMIT}" in str(caught.value.remedy)
    assert len(downloaded) == 1, "it was downloaded without asking"
    with monkeypatch.context() as patch:
        patch.setenv("BRIDGEKIT_OUTSIDE", "yes")
        Bridge.load(folder, "cpu").embed("text", ["a dog"])
    assert len(downloaded) == 2
    Bridge.load(folder, "cpu").embed("text", ["a dog"])
    assert len(downloaded) == 2, "what is in the cache needs no permission"


def test_every_kind_of_encoder_is_pinned(tiny: Tiny) -> None:
    for kind in ("bert", "whisper", "hubert", "ast", "vit"):
        assert load_encoder(f"transformers:{tiny(kind)}", "cpu").pinned == f"transformers:{tiny(kind)}"  # type: ignore[attr-defined]


def test_weights_listed_outside_the_models_folder_are_not_followed(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny("bert"), tmp_path / "copy")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    weights = {"weight_map": {"embeddings.word_embeddings.weight": "../elsewhere.safetensors"}}
    tiny_models.write_json(folder / "model.safetensors.index.json", weights)
    with pytest.raises(PluginError, match="outside the model's folder"):
        load_encoder(f"transformers:{folder}", "cpu")


def test_a_model_that_does_not_exist_is_one_error_that_names_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/no-such-model", "no-such-folder", str(tmp_path / "gone")):
        with pytest.raises(PluginError, match="bridgekit-transformers"):
            load_encoder(f"transformers:{name}", "cpu")


def test_the_revision_names_content_and_settings_and_not_the_place(tiny: Tiny, tmp_path: Path) -> None:
    def revision(name: str) -> str:
        return load_encoder(f"transformers:{name}", "cpu").revision

    first = revision(str(tiny("e5")))
    copy = copied(tiny("e5"), tmp_path / "copy")
    (copy / "README.md").write_text("a card")
    assert revision(str(copy)) == first
    others = [revision(f"{copy},pooling=cls"), revision(f"{copy},prompt=query"), revision(f"{copy},prompt=")]
    tokenizer = tiny_models.read_json(copy / "tokenizer.json")
    tokenizer["normalizer"]["lowercase"] = False
    tiny_models.write_json(copy / "tokenizer.json", tokenizer)
    others.append(revision(str(copy)))
    assert len({first, *others}) == 5
    assert first.startswith("transformers:bert@")
    assert first.endswith("-v1")


@pytest.mark.parametrize("missing", ["encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"])
def test_weights_that_are_missing_are_never_made_up(tiny: Tiny, tmp_path: Path, missing: str) -> None:
    folder = copied(tiny("bert"), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights[missing]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PluginError, match=f"no weights for 1 of the model's tensors, among them {missing}"):
        load_encoder(f"transformers:{folder}", "cpu")


def test_weights_of_another_shape_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny("bert"), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PluginError, match="bridgekit-transformers cannot load this model"):
        load_encoder(f"transformers:{folder}", "cpu")


def test_a_folder_without_weights_or_with_a_shard_missing_says_so(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny("bert"), tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PluginError, match=r"no weights \(model\.safetensors or pytorch_model\.bin\)"):
        load_encoder(f"transformers:{folder}", "cpu")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    tiny_models.write_json(folder / "model.safetensors.index.json", {"weight_map": shards})
    save_file({"a": torch.zeros(1)}, folder / shards["a"])
    with pytest.raises(PluginError, match=r"found no file model-00002-of-00002\.safetensors"):
        load_encoder(f"transformers:{folder}", "cpu")


def test_weights_that_are_pickled_are_opened_where_there_are_no_others_and_run_no_code(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny("bert"), tmp_path / "copy")
    text = "a dog"
    expected = load_encoder(f"transformers:{folder}", "cpu")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert load_encoder(f"transformers:{folder}", "cpu").revision == expected.revision  # safetensors first
    (folder / "model.safetensors").unlink()
    found = load_encoder(f"transformers:{folder}", "cpu")
    torch.testing.assert_close(found.encode([found.prepare(text)]), expected.encode([expected.prepare(text)]))
    torch.save({"embeddings.word_embeddings.weight": Path("an object")}, folder / "pytorch_model.bin")
    with pytest.raises(PluginError, match="cannot load this model"):
        load_encoder(f"transformers:{folder}", "cpu")


def test_weights_of_half_precision_are_computed_with_in_float32(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny("bert"), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight.half() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = tiny_models.read_json(folder / "config.json") | {"dtype": "float16", "torch_dtype": "float16"}
    tiny_models.write_json(folder / "config.json", config)
    encoder = load_encoder(f"transformers:{folder}", "cpu")
    exact = {name: weight.half().float() for name, weight in weights.items()}
    save_file(exact, folder / "model.safetensors", {"format": "pt"})
    other = load_encoder(f"transformers:{folder}", "cpu")
    torch.testing.assert_close(encoder.encode([encoder.prepare("a")]), other.encode([other.prepare("a")]))


@pytest.mark.parametrize("kind", ["detr", "bart"])
def test_an_unsupported_kind_of_model_is_one_error_that_names_the_plugin(tiny: Tiny, kind: str) -> None:
    with pytest.raises(PluginError, match=f"bridgekit-transformers does not support .*models .*{kind}"):
        load_encoder(f"transformers:{tiny(kind)}", "cpu")


def test_a_type_that_transformers_does_not_know_is_one_error(tmp_path: Path) -> None:
    tiny_models.write_json(tmp_path / "config.json", {"model_type": "from-the-future"})
    with pytest.raises(PluginError, match="from-the-future") as caught:
        load_encoder(f"transformers:{tmp_path}", "cpu")
    assert "pip install --upgrade transformers" in str(caught.value.remedy)


@pytest.mark.parametrize("content", [None, "{}", "[]", "{not json"])
def test_a_folder_without_a_config_is_one_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(PluginError, match="bridgekit-transformers"):
        load_encoder(f"transformers:{tmp_path}", "cpu")


@pytest.mark.parametrize(
    ("kind", "option", "match"),
    [
        ("bert", "window=own", "no option 'window' for text"),
        ("ast", "layers=1", "no option 'layers' for audio"),
        ("whisper", "pooling=mean", "no option 'pooling' for audio"),
        ("whisper", "window=10s", "window=10s"),
        ("bert", "pooling=median", "pooling=median"),
        ("bert", "modality=image", "encodes text, not image"),
        ("bert", "colour=red", "'colour'"),
        ("bert", "trust_remote_code=maybe", "must be yes or no"),
    ],
)
def test_an_option_that_a_model_does_not_have_is_refused(tiny: Tiny, kind: str, option: str, match: str) -> None:
    with pytest.raises(BridgekitError, match=match):
        load_encoder(f"transformers:{tiny(kind)},{option}", "cpu")


def test_a_model_with_code_of_its_own_is_opened_only_where_the_user_trusts_it(
    own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PluginError, match="does not run this model's own code") as caught:
        load_encoder(f"transformers:{own_code}", "cpu")
    assert "trust_remote_code=yes" in str(caught.value.remedy)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    encoder = load_encoder(f"transformers:{own_code},trust_remote_code=yes", "cpu")
    assert "remote-code" in encoder.revision
    words = load_file(own_code / "model.safetensors")["words.weight"]
    found = encoder.encode([encoder.prepare("ab c")])[0]
    torch.testing.assert_close(found, words[torch.tensor(encoder.prepare("ab c"))].mean(0))
    (own_code / "own.py").write_text(CODE + "# changed\n")
    assert load_encoder(f"transformers:{own_code},trust_remote_code=yes", "cpu").revision != encoder.revision


def test_opening_a_model_prints_nothing_and_leaves_the_settings_of_the_process_alone(tiny: Tiny) -> None:
    code = (
        "import transformers; from bridgekit.plugins import load_encoder\n"
        "log = transformers.utils.logging; before = log.get_verbosity(), log.is_progress_bar_enabled()\n"
        f"load_encoder('transformers:{tiny('clip')},modality=image', 'cpu')\n"
        "assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_the_command_line_reports_an_error_in_a_few_lines(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.csv").write_text("text,other\na,b\n")
    sides = ["--a", f"transformers:{tiny('clip')}", "--b", f"transformers:{tiny('bert')}"]
    monkeypatch.setattr(sys, "argv", ["bridgekit", "align", *sides, "--pairs", str(tmp_path / "texts.csv")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "two towers" in printed
    assert "Traceback" not in printed
