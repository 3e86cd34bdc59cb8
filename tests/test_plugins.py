"""Plugins are found by entry point; a broken one is named and breaks nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bridgekit
from bridgekit import plugins
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.hookspecs import EncoderProvider, PairSource, hookimpl
from bridgekit.latents.encode import encode_items
from bridgekit.latents.encoded import encode_pairs
from bridgekit.pairs import Pairs
from bridgekit.plugins import default_pair_source, encoder_name, find_pair_source, known_modality, load_encoder
from bridgekit.progress import silent
from tests.conftest import Run
from tests.toys import LetterEncoder, ToneEncoder, ToyPlugin, install


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    plugins.forget_plugins()


def provider(name: str = "odd", model: object = None, **defaults: str) -> object:
    class Plugin:
        @hookimpl
        def encoder_providers(self) -> list[EncoderProvider]:
            return [EncoderProvider(name, ("text",), lambda wanted, device: model, lambda: ["x"], defaults)]  # type: ignore[arg-type, return-value]

    return Plugin()


def test_a_modality_means_its_default_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin())
    assert encoder_name("audio") == "toy:tone"
    assert encoder_name("toy:letters") == "toy:letters"
    assert isinstance(load_encoder("audio"), ToneEncoder)


@pytest.mark.parametrize("failure", [ImportError("no module named nothing"), RuntimeError("boom"), SystemExit(3)])
def test_a_plugin_that_fails_to_import_is_reported_and_the_others_work(
    monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    _, broken = install(monkeypatch, ToyPlugin(), failure)
    assert broken.problem
    assert type(failure).__name__ in broken.problem
    assert isinstance(load_encoder("text"), LetterEncoder)


def test_a_hook_that_raises_or_returns_nonsense_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Raises:
        @hookimpl
        def encoder_providers(self) -> list[EncoderProvider]:
            raise KeyError("lost")

    class Nonsense:
        @hookimpl
        def encoder_providers(self) -> list[object]:
            return ["timm"]

    good, raises, nonsense = install(monkeypatch, ToyPlugin(), Raises(), Nonsense())
    assert good.problem is None
    assert "lost" in str(raises.problem)
    assert "EncoderProvider" in str(nonsense.problem)


def test_of_two_providers_with_one_name_none_is_used_and_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = install(monkeypatch, ToyPlugin(), provider("toy"), provider("fine", LetterEncoder()))
    assert first.providers == second.providers == ()
    assert "'toy' cannot be used" in str(first.problem)
    assert "'toy' cannot be used" in str(second.problem)
    assert third.problem is None
    with pytest.raises(PluginError, match="has one with the same name") as caught:
        load_encoder("toy:letters")
    assert "uninstall it" in str(caught.value)
    assert isinstance(load_encoder("fine:x"), LetterEncoder)


def test_two_defaults_for_one_modality_ask_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin(), provider("odd", None, text="x"))
    with pytest.raises(BridgekitError, match="several plugins") as caught:
        encoder_name("text")
    assert "odd:x" in str(caught.value)


def test_an_unknown_name_suggests_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin())
    with pytest.raises(BridgekitError, match="did you mean 'audio'"):
        encoder_name("adio")
    with pytest.raises(PluginError, match="toi"):
        load_encoder("toi:tone")


def test_a_modality_is_known_before_opening_for_defaults_and_providers_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin(), provider("one"))
    names = ("audio", "toy:tone", "toy:other", "one:x", "smell", "none:x")
    assert list(map(known_modality, names)) == ["audio", "audio", None, "text", None, None]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "transformers:sentence-transformers/all-MiniLM-L6-v2"),
        ("timm/resnet50.a1_in1k", "timm:resnet50.a1_in1k"),
    ],
)
def test_a_hub_id_without_a_provider_suggests_the_whole_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, named: str
) -> None:
    (tmp_path / "pairs.csv").write_text("audio,text\na.wav,owl\n")
    install(monkeypatch, provider(named.partition(":")[0]))
    for arguments in (["align", "--a", given, "--pairs", "pairs.csv"], ["check", "pairs.csv", "--a", given, "--b", "text"]):
        code, _, err = run(*arguments)
        assert (code, err.splitlines()) == (
            2,
            [
                "bridgekit: an encoder is named provider:model, and this has no provider",
                f"  in: {given}",
                f"  fix: name it {named}",
            ],
        )
    install(monkeypatch)
    with pytest.raises(BridgekitError, match=r"pip install plugins/bridgekit-t") as caught:
        encoder_name(given)
    assert f"name it {named}, and install" in str(caught.value)


def test_nothing_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(BridgekitError, match="pip install plugins/bridgekit-starter"):
        encoder_name("audio")


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["app"], "bridgekit-app"),
        (["app", "bridges/x", "--port", 0], "bridgekit-app"),
        (["index", "photos", "--prune"], "bridgekit-index"),
        (["search", "owl", "--index", "x.index"], "bridgekit-index"),
    ],
)
def test_a_verb_of_a_plugin_that_is_not_installed_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], package: str
) -> None:
    install(monkeypatch, ToyPlugin())
    code, _, err = run(*arguments)
    assert code == 2
    assert err.splitlines() == [
        f"bridgekit: the package {package} is not installed",
        f"  fix: in bridgekit's own folder: pip install plugins/{package}",
    ]


def test_help_lists_the_verbs_of_plugins_that_are_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin())
    out = run("--help")[1]
    assert "Not installed: bridgekit app --help" in out
    code, out, _ = run("index", "--help")
    assert code == 0
    assert "pip install plugins/bridgekit-index" in " ".join(out.split())


def test_a_broken_built_in_plugin_is_named_by_its_verb(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin(), ImportError("no lancedb"), names=["toy", "index"])
    code, _, err = run("index", "photos")
    assert (code, "no lancedb" in err, "pip install" in err) == (2, True, False)


def test_the_core_names_neither_its_plugins_modules_nor_their_dependencies() -> None:
    for file in Path(bridgekit.__file__).parent.rglob("*.py"):
        named = re.search(r"(?i)lancedb|fastapi|uvicorn|bridgekit_(app|index)", file.read_text(encoding="utf-8"))
        assert not named, f"{file}: {named}"


def test_names_that_a_missing_plugin_provides_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin())
    with pytest.raises(BridgekitError, match="pip install plugins/bridgekit-index"):
        from bridgekit import Index  # noqa: F401
    index = object()
    install(monkeypatch, SimpleNamespace(Index=index), names=["index"])
    assert bridgekit.Index is index


def test_what_a_plugin_raises_while_opening_names_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin())
    with pytest.raises(PluginError, match=r"toy.*KeyError"):
        load_encoder("toy:absent")


@pytest.mark.parametrize("attribute", ["modality", "dim", "revision", "prepare", "encode"])
def test_an_encoder_without_one_part_of_the_contract_is_refused(monkeypatch: pytest.MonkeyPatch, attribute: str) -> None:
    class Partial:
        modality, dim, revision = "text", 3, "r"

        def prepare(self, item: str) -> str:
            return item

        def encode(self, batch: list[str]) -> torch.Tensor:
            return torch.zeros(len(batch), 3)

    delattr(Partial, attribute)
    install(monkeypatch, provider("odd", Partial()))
    with pytest.raises(PluginError, match=attribute):
        load_encoder("odd:x")


def test_pair_sources_are_found_by_name_and_by_modalities(monkeypatch: pytest.MonkeyPatch) -> None:
    source = PairSource("toy:pairs", "none", ("audio", "text"), lambda: None)  # type: ignore[arg-type, return-value]

    class Plugin:
        @hookimpl
        def pair_sources(self) -> list[PairSource]:
            return [source]

    install(monkeypatch, Plugin())
    assert find_pair_source("toy:pairs") is source
    assert default_pair_source(["text", "audio"]) is source
    with pytest.raises(BridgekitError, match="toy:pairs"):
        find_pair_source("toy:pair")
    with pytest.raises(BridgekitError, match="--pairs"):
        default_pair_source(["text", "image"])


def test_of_several_sources_for_the_same_modalities_the_one_marked_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def source(name: str, default: bool = False) -> PairSource:
        return PairSource(name, "none", ("audio", "text"), lambda: None, default)  # type: ignore[arg-type, return-value]

    class Plugin:
        def __init__(self, *sources: PairSource) -> None:
            self.sources = sources

        @hookimpl
        def pair_sources(self) -> list[PairSource]:
            return list(self.sources)

    install(monkeypatch, Plugin(source("toy:all"), source("toy:few", default=True)))
    assert default_pair_source(["audio", "text"]).name == "toy:few"
    for rivals in ([source("toy:all"), source("toy:few")], [source("toy:all", True), source("toy:few", True)]):
        install(monkeypatch, Plugin(*rivals))
        with pytest.raises(BridgekitError, match="toy:all, toy:few"):
            default_pair_source(["audio", "text"])


class Wrong:
    """An encoder whose latents are whatever a test says."""

    modality, dim, revision = "text", 3, "odd:wrong@1"

    def __init__(self, latents: object) -> None:
        self.latents = latents

    def prepare(self, item: str) -> str:
        return item

    def encode(self, batch: list[str]) -> object:
        if isinstance(self.latents, Exception):
            raise self.latents
        return self.latents


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(2, 5), r"the plugin tests returned \(2, 5\) for 2 items; expected \(2, 3\)"),
        ([1.0, 2.0], "the plugin tests returned list for 2 items"),
        (RuntimeError("no memory"), "the plugin tests failed to encode: RuntimeError: no memory"),
    ],
)
def test_an_encoder_that_breaks_its_contract_later_is_named(latents: object, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        encode_items(Wrong(latents), ["a", "b"])  # type: ignore[arg-type]


def test_an_exception_in_prepare_blames_the_plugin_and_not_the_item() -> None:
    class Broken(Wrong):
        def prepare(self, item: str) -> str:
            raise KeyError("weights")

    encoded = encode_items(Broken(torch.zeros(1, 3)), ["a"])  # type: ignore[arg-type]
    assert encoded.failed == {0: "the plugin tests failed on it: KeyError: 'weights'"}
    pairs = Pairs({"text": ("a", "b"), "other": ("c", "d")}, "t.csv", (2, 3))
    with pytest.raises(BridgekitError, match="report it to the plugin's author"):
        encode_pairs(pairs, {"text": Broken(0), "other": Broken(0)}, silent)  # type: ignore[dict-item]


def test_latents_that_are_nan_fail_only_their_items_and_the_plugin_is_named() -> None:
    encoded = encode_items(Wrong(torch.tensor([[1.0, 2, 3], [1, torch.nan, 3]])), ["a", "b"])  # type: ignore[arg-type]
    assert encoded.matrix.tolist() == [[1, 2, 3]]
    (reason,) = encoded.failed.values()
    assert "the plugin tests returned NaN or infinity" in reason


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("sentence-transformers:all-MiniLM-L6-v2", "transformers:sentence-transformers/all-MiniLM-L6-v2"),
        ("open_clip:ViT-B-32", "transformers:ORG/MODEL,modality=text"),
    ],
)
def test_the_name_of_another_library_is_answered_with_the_provider_of_its_models(
    monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    install(monkeypatch, ToyPlugin())
    with pytest.raises(PluginError, match="no installed plugin provides") as caught:
        load_encoder(name, "cpu")
    assert remedy in str(caught.value.remedy)
