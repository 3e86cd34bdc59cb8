"""Untrusted bridges, tables and models: every attack is refused, and damage ends in a message."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridgekit import Bridge, BridgekitError, read_pairs
from bridgekit.bridge.provenance import TrainedOn
from bridgekit.encoders import is_modality
from bridgekit.plain import markdown, plain, plain_json
from bridgekit.storage.bounded import OutOfBounds, homes, is_within, parse_json, read_bounded
from tests.torture import attacks, tables
from tests.torture.strangers import Ground, encoders_kept_open, make_ground

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("bridgekit_starter", reason="the attacks start from a bridge of the starter's encoders")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A real table and a real bridge, to be copied and broken."""
    with pytest.MonkeyPatch.context() as patch, encoders_kept_open():
        patch.setenv("BRIDGEKIT_HOME", str(tmp_path_factory.mktemp("home")))
        yield make_ground(tmp_path_factory.mktemp("strangers") / "ground")


@pytest.mark.parametrize("attack", attacks.ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_is_refused(attack: attacks.Attack, ground: Ground, tmp_path: Path) -> None:
    assert attacks.attempt(attack, ground, tmp_path / "attack")[0] == ""


def test_broken_tables_and_bridges_end_in_a_result_or_a_message() -> None:
    outcome = tables.run(60, seed=6)
    assert not outcome.failures
    assert outcome.held == outcome.tried == 60
    assert outcome.messages


# ---- nothing is unpickled, anywhere


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Each call in some code, with the name of what is called as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe(code: str) -> list[str]:
    """What in some code could run what lies in a file."""
    tree = ast.parse(code)
    found = []
    for name, call in calls(tree):
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        if re.fullmatch(r"(torch\.|timm\.models\.)?(load|load_state_dict)", name) and "load_state_dict" not in name:
            from_torch = name == "torch.load"
            found += [name] if from_torch and options.get("weights_only") != "True" else []
        if name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            found.append(name)
        if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system", "compile", "__import__"):
            found.append(name)
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"):
            found.append(name)
        if options.get("shell") == "True":
            found.append(f"{name}(shell=True)")
    for node in ast.walk(tree):
        named = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        named += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found += [
            f"import {name}" for name in named if name.split(".")[0] in ("dill", "joblib", "cloudpickle", "shelve", "yaml")
        ]
    return found


def test_our_code_never_unpickles_or_runs_what_is_in_a_file() -> None:
    sources = [
        file
        for folder in ("bridgekit", "plugins", "examples")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if "tests" not in file.relative_to(ROOT).parts
    ]
    assert len(sources) > 60
    assert {str(file): found for file in sources if (found := unsafe(file.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "pickle.loads(x)",
        "import joblib",
        "from yaml import load",
        "eval(x)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_code_that_would_unpickle_is_found(code: str) -> None:
    assert unsafe(code)


# ---- JSON


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 65, "64 deep"),
        ('{"a":' * 100_000, "64 deep"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": NaN}', "not finite"),
        ('{"a": -Infinity}', "not finite"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": ' + "9" * 5_000 + "}", "5,000 digits"),
        ('{"a": "\\ud800"}', "broken character"),
    ],
)
def test_json_with_a_surprise_is_refused(text: str, told: str) -> None:
    with pytest.raises(OutOfBounds, match=told):
        parse_json(text)


def test_brackets_within_strings_are_not_counted_and_long_strings_are_quick() -> None:
    text = json.dumps({"a": '[{"\\' * 500_000})
    assert parse_json(text) == json.loads(text)
    with pytest.raises(ValueError, match="Unterminated"):
        parse_json('["' + '\\"[' * 500_000)


def test_lenient_parsing_accepts_what_only_costs_a_row() -> None:
    assert parse_json('{"a": "\\ud800"}', lenient=True) == {"a": "\ud800"}
    assert str(parse_json("NaN", lenient=True)) == "nan"


def test_a_file_is_read_up_to_its_limit_and_not_one_byte_beyond(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert read_bounded(tmp_path / "a", 10) == b"x" * 10
    with pytest.raises(OutOfBounds, match="10 bytes, over 9 bytes"):
        read_bounded(tmp_path / "a", 9)
    for path in ("/dev/zero", "/proc/self/status"):
        if Path(path).exists():
            with pytest.raises(OutOfBounds):
                read_bounded(Path(path), 1 << 20)


# ---- paths


def test_a_table_and_a_bridge_in_the_hubs_cache_may_have_their_files_in_its_blobs(ground: Ground, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--bridge"
    snapshot = repository / "snapshots" / "0123"
    shutil.copytree(ground.folder, snapshot)
    (repository / "blobs").mkdir()
    for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        blob = repository / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    assert Bridge.load(snapshot / "bridge").sides
    assert not read_pairs(snapshot / "pairs.csv", ("image", "text")).set_aside
    (repository / "secret").write_text("x")
    (snapshot / "bridge" / "x.png").symlink_to(repository / "secret")
    with pytest.raises(BridgekitError, match="link that leaves"):
        Bridge.load(snapshot / "bridge")


def test_a_table_reached_through_a_symlink_may_name_files_beside_the_real_one(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(ground.folder)
    assert not read_pairs(tmp_path / "linked" / "pairs.csv", ("image", "text")).set_aside
    assert is_within(tmp_path / "linked" / "x", homes(ground.folder))
    assert not is_within(f"{ground.folder}-2/x", homes(ground.folder)), "a longer name is another folder"


def test_the_tables_of_a_bridge_that_was_made_here_are_read_wherever_they_are(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = Bridge.load(shutil.copytree(ground.folder / "bridge", tmp_path / "bridge"))
    away = str(ground.folder / "pairs.csv")
    with pytest.raises(BridgekitError, match="needs your permission"):
        bridge.open_own(TrainedOn(away, ("audio", "text"), 0, None))
    monkeypatch.setenv("BRIDGEKIT_OUTSIDE", "yes")
    assert bridge.open_own(TrainedOn(away, ("audio", "text"), 0, None)).source == away
    monkeypatch.delenv("BRIDGEKIT_OUTSIDE")
    monkeypatch.chdir(ground.folder)
    assert bridge.open_own(TrainedOn(away, ("audio", "text"), 0, None)).source == away
    assert bridge.open_own(TrainedOn("starter:openmoji", ("image", "text"), 0, None)).source == "starter:openmoji"


# ---- text


def test_control_characters_are_escaped() -> None:
    assert plain("a\x1b[31m\n\x9b\u202e\ud800b é 犬 👩‍🚀") == "a\\x1b[31m\\n\\x9b\\u202e\\ud800b é 犬 👩‍🚀"
    document = plain_json(json.dumps({"a": "\x9b\u202e\ud800"}, ensure_ascii=False, indent=2))
    assert document.isascii()
    assert json.loads(document) == {"a": "\x9b\u202e\ud800"}
    assert markdown("<b>[x](y)|`") == "&lt;b&gt;\\[x\\]\\(y\\)\\|\\`"


def test_a_message_has_three_lines_whatever_it_contains() -> None:
    error = BridgekitError("a\nb", where="c\nfix: run this\x1b[1A", remedy="d\ne")
    assert str(error) == "a b\n  in: c\\nfix: run this\\x1b[1A\n  fix: d e"


@pytest.mark.parametrize(("name", "good"), [("audio", True), ("eeg 2-ch_x", True), ("é犬", True)])
def test_a_valid_modality_name_is_accepted(name: str, good: bool) -> None:
    assert is_modality(name) is good


@pytest.mark.parametrize("name", ["", " x", "a/b", "..", "a.b", "a\nb", "x" * 65, "[red]", 3, None])
def test_an_invalid_modality_name_is_rejected(name: object) -> None:
    assert not is_modality(name)
