"""`bridgekit plugins new` writes a plugin that works under its own name; `bridgekit plugins` lists what is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

from bridgekit import cli, load_encoder, plugins
from bridgekit.errors import BridgekitError
from bridgekit.hookspecs import EncoderProvider, hookimpl
from bridgekit.recipes.new_plugin import MODALITIES, create_plugin, sources
from tests.toys import ToyPlugin, install

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "plugins" / "bridgekit-template"
TEMPLATE_FILES = sorted({source for modality in (None, *MODALITIES) for source in sources(modality).values()})
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    plugins.forget_plugins()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in an empty folder, in this process; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bridgekit", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _needs_setuptools() -> None:
    try:
        if int(version("setuptools").split(".")[0]) < 77:
            pytest.skip("building needs setuptools 77 or newer, and it is older here")
    except PackageNotFoundError:
        pytest.skip("building needs setuptools, and it is not here")


# ---- a new plugin


def test_a_new_plugin_works_and_passes_its_own_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_plugin("heart-rate", tmp_path)
    folder = tmp_path / "bridgekit-heart-rate"
    (plugin,) = install(monkeypatch, imported(folder / "bridgekit_heart_rate.py"))
    assert plugin.problem is None
    assert load_encoder("motion", "cpu").revision == "heart-rate:statistics@1"
    own = imported(folder / "tests" / "test_heart_rate.py")
    files = tmp_path / "files"
    files.mkdir()
    for name in [name for name in vars(own) if name.startswith("test_")]:
        getattr(own, name)(files)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_new_plugin_for_a_modality_is_installed_and_passes_its_own_tests(run: Run, tmp_path: Path, modality: str) -> None:
    _needs_setuptools()
    code, out, _ = run("plugins", "new", "my-own", "--modality", modality)
    assert code == 0
    assert "pytest bridgekit-my-own" in out
    folder, place = tmp_path / "bridgekit-my-own", tmp_path / "installed"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index")
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", place, folder], check=True)
    paths = {"PYTHONPATH": os.pathsep.join([str(place), *filter(None, sys.path)]), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    tests = subprocess.run(command, env={**os.environ, **paths}, cwd=tmp_path, capture_output=True, text=True)
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "2 passed" in tests.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "bridgekit", "plugins"],
        env={**os.environ, **paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"my-own (bridgekit-my-own 0.1.0)\n  encoders for {modality}:\n    my-own:statistics\n" in listed.stdout


def test_a_modality_without_a_template_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("plugins", "new", "demo", "--modality", "video")
    assert code == 2
    assert err == (
        "bridgekit: there is no template for the modality 'video'\n"
        "  fix: choose audio, image, text; or leave it out, for a plugin with a modality of its own\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("modality", [None, *MODALITIES])
def test_every_file_of_a_new_plugin_uses_its_name(tmp_path: Path, modality: str | None) -> None:
    written = create_plugin("bridgekit-demo", tmp_path, modality)
    folder = tmp_path / "bridgekit-demo"
    assert {str(path.relative_to(folder)) for path in written} == {
        "README.md",
        "pyproject.toml",
        "bridgekit_demo.py",
        "tests/test_demo.py",
    }
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(written)
    for path in written:
        assert not re.search("template|MODALITY", path.read_text(encoding="utf-8"))
    project = (folder / "pyproject.toml").read_text(encoding="utf-8")
    assert 'name = "bridgekit-demo"' in project
    assert 'demo = "bridgekit_demo"' in project


def test_the_prefix_of_a_name_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    short, long = create_plugin("demo", tmp_path / "short"), create_plugin("bridgekit-demo", tmp_path)
    assert [path.read_bytes() for path in short] == [path.read_bytes() for path in long]
    assert short[0].parent.name == "bridgekit-demo"


def test_a_name_with_the_word_template_in_it_is_kept_whole(tmp_path: Path) -> None:
    create_plugin("my-template", tmp_path)
    module = (tmp_path / "bridgekit-my-template" / "bridgekit_my_template.py").read_text(encoding="utf-8")
    assert 'name="my-template"' in module
    assert "my-my" not in module


@pytest.mark.parametrize(
    "name", ["", "bridgekit", "bridgekit-", "Demo", "my_demo", "a--b", "demo-", "1d", "../demo", "a b", "dé"]
)
def test_a_name_that_is_not_a_valid_package_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BridgekitError, match="is not a valid plugin name"):
        create_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*plugins.OURS, "bridgekit-starter"])
def test_the_name_of_a_built_in_plugin_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BridgekitError, match="bridgekit's own"):
        create_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "bridgekit-demo").mkdir()
    (tmp_path / "bridgekit-other").write_text("mine", encoding="utf-8")
    for name in ("demo", "other"):
        with pytest.raises(BridgekitError, match="the path already exists"):
            create_plugin(name, tmp_path)
    assert list((tmp_path / "bridgekit-demo").iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BridgekitError, match="cannot be written"):
        create_plugin("demo", tmp_path / "missing")


# ---- the template


def test_all_of_the_template_is_copied() -> None:
    ignored = re.compile(r"(^|/)(build|__pycache__|\.[a-z_]+|[^/]+\.egg-info)/")
    there = (path.relative_to(TEMPLATE).as_posix() for path in TEMPLATE.rglob("*") if path.is_file())
    assert sorted(path for path in there if not ignored.search(path)) == TEMPLATE_FILES


def test_a_wheel_of_bridgekit_carries_the_template_and_nothing_else_of_it(tmp_path: Path) -> None:
    _needs_setuptools()
    for name in ("bridgekit", "plugins/bridgekit-template"):  # a copy, since building leaves files behind
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    stray = tmp_path / "plugins" / "bridgekit-template" / "build" / "lib" / "bridgekit_template.py"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_text("", encoding="utf-8")
    build = "from setuptools import build_meta; build_meta.build_wheel('wheels')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with ZipFile(wheel) as file:
        carried = [name for name in file.namelist() if name.startswith("bridgekit/template/")]
        assert sorted(carried) == sorted(f"bridgekit/template/{name}" for name in TEMPLATE_FILES)
        for name in TEMPLATE_FILES:
            assert file.read(f"bridgekit/template/{name}") == (TEMPLATE / name).read_bytes()


# ---- the verbs


def test_plugins_new_writes_here_and_says_what_to_do_next(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("plugins", "new", "demo")
    assert code == 0
    assert (tmp_path / "bridgekit-demo" / "bridgekit_demo.py").is_file()
    assert "pip install -e ./bridgekit-demo" in out
    assert "pytest bridgekit-demo" in out
    code, _, err = run("plugins", "new", "demo")
    assert code == 2
    assert err == "bridgekit: the path already exists\n  in: bridgekit-demo\n  fix: choose another name\n"


def test_plugins_new_has_help_with_an_example(run: Run) -> None:
    assert "Example: bridgekit plugins new bridgekit-demo" in run("plugins", "new", "--help")[1]
    assert "new" in run("plugins", "--help")[1]


def test_plugins_alone_lists_what_is_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ToyPlugin())
    code, out, _ = run("plugins")
    assert code == 0
    assert "toy:tone  (default for audio)" in out
    assert "PROBLEM" not in out
    (listed,) = json.loads(run("plugins", "--json")[1])
    assert listed["encoders"][0] == {"model": "toy:tone", "modalities": ["audio", "text"]}
    assert listed["problem"] is None


def test_a_plugin_whose_models_fails_is_reported_and_the_others_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[str]:
        raise OSError("the hub is away")

    class Away:
        @hookimpl
        def encoder_providers(self) -> list[EncoderProvider]:
            return [EncoderProvider("away", ("text",), lambda model, device: None, fails)]  # type: ignore[arg-type, return-value]

    install(monkeypatch, Away(), ToyPlugin())
    code, out, _ = run("plugins")
    assert code == 0
    assert "PROBLEM: models() of 'away' failed: OSError: the hub is away" in out
    assert "toy:tone" in out
    away, toy = json.loads(run("plugins", "--json")[1])
    assert away["encoders"] == []
    assert "the hub is away" in away["problem"]
    assert toy["problem"] is None
