"""A bridge is saved and loaded exactly, and a damaged one is refused with the reason."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import operator
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from bridgekit import PRESETS, Bridge, BridgekitError, ItemError
from bridgekit.bridge.bridge import Heard, Side
from bridgekit.fusion.adapter import FusionAdapter
from bridgekit.retrieval import Hit
from tests.conftest import tone
from tests.toys import install

pytestmark = pytest.mark.usefixtures("toy")


def untrained() -> Bridge:
    torch.manual_seed(0)
    preset = replace(PRESETS["default"], shared_dim=8, blocks=1)
    sides = {"audio": Side("toy:tone", "toy:tone@1", 64, False), "text": Side("toy:letters", "toy:letters@1", 48, False)}
    adapters = {name: FusionAdapter(side.dim, 8, 1, preset.expansion, preset.dropout).eval() for name, side in sides.items()}
    return Bridge(sides, adapters, preset, 0.07, {"seed": 1}, (), [{"epoch": 1, "loss": 2.0, "score": 0.5}])


def test_a_saved_bridge_loads_unchanged(tmp_path: Path) -> None:
    saved = untrained()
    saved.save(tmp_path / "a bridge ü")
    read = Bridge.load(tmp_path / "a bridge ü")
    assert torch.equal(saved.embed("text", ["dog"]), read.embed("text", ["dog"]))
    assert (read.sides, read.preset, read.temperature, read.provenance) == (
        saved.sides,
        saved.preset,
        saved.temperature,
        saved.provenance,
    )
    assert list(read.history) == list(saved.history)
    assert [path.name for path in tmp_path.iterdir()] == ["a bridge ü"], "nothing is left beside it"


def test_a_bridge_without_a_threshold_or_a_classifier_does_not_say_what_it_cannot_know() -> None:
    assert untrained().heard("audio", torch.eye(8)[:1], [[Hit("owl", 0.9)]]) == [Heard(None, None)]


def test_a_threshold_and_a_classifier_of_speech_are_saved_with_the_bridge(tmp_path: Path) -> None:
    speech = torch.tensor([2.0, 0, 0, 0, 0, 0, 0, 0, -1])
    known = replace(untrained(), provenance={"sure": {"audio": 0.4, "speech": 0.2}}, speech=speech)
    read = Bridge.load(known.save(tmp_path / "bridge"))
    hits = [[Hit("owl", 0.3)], [Hit("owl", 0.39)], [Hit("owl", 0.4)], []]
    heard = read.heard("audio", torch.eye(8)[[0, 1, 1, 1]], hits)
    assert [each.sure for each in heard] == [True, False, True, None], "speech has a threshold of its own"
    assert [each.speech for each in heard] == pytest.approx([1 / (1 + math.exp(-1)), *[1 / (1 + math.exp(1))] * 3])
    assert read.heard("text", torch.eye(8)[:1], [[Hit("owl", 0.1)]]) == [Heard(None, None)]


def test_adapters_in_half_precision_are_read(tmp_path: Path) -> None:
    folder = untrained().save(tmp_path / "bridge")
    tensors = {name: tensor.half() for name, tensor in load((folder / "adapters.safetensors").read_bytes()).items()}
    (folder / "adapters.safetensors").write_bytes(save(tensors))
    metadata = json.loads((folder / "bridge.json").read_text())
    metadata["adapters_sha256"] = hashlib.sha256((folder / "adapters.safetensors").read_bytes()).hexdigest()
    (folder / "bridge.json").write_text(json.dumps(metadata))
    vector = Bridge.load(folder).embed("text", ["dog"])
    assert vector.dtype == torch.float32
    torch.testing.assert_close(vector, untrained().embed("text", ["dog"]), atol=2e-3, rtol=0)


def test_a_bad_item_is_named(tmp_path: Path) -> None:
    good = tone(tmp_path / "a.wav", 300)
    with pytest.raises(ItemError, match=r"absent\.wav"):
        untrained().embed("audio", [good, tmp_path / "absent.wav"])
    usable = untrained().embed_usable("audio", [good, tmp_path / "absent.wav"])
    assert usable.vectors.shape == (1, 8)
    assert list(usable.failed) == [1]


def test_no_items_give_no_rows() -> None:
    assert untrained().embed("text", []).shape == (0, 8)


def test_code_trusted_by_the_bridges_author_does_not_run_unless_the_user_trusts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = untrained()
    named = replace(made.sides["text"], encoder="toy:letters,trust_remote_code=yes")
    strange = replace(made, sides={**made.sides, "text": named})
    with pytest.raises(BridgekitError, match="BRIDGEKIT_TRUST_REMOTE_CODE=yes"):
        strange.embed("text", ["dog"])
    monkeypatch.setenv("BRIDGEKIT_TRUST_REMOTE_CODE", "yes")
    with pytest.raises(BridgekitError, match="cannot open"):  # it went on to the plugin, which has no such model
        strange.embed("text", ["dog"])


def test_an_unknown_modality_is_refused() -> None:
    with pytest.raises(BridgekitError, match="audio, text"):
        untrained().embed("image", ["x.png"])
    with pytest.raises(TypeError):
        untrained().similarity()


def test_other_weights_than_it_was_trained_on_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = untrained()
    changed = replace(
        bridge, sides={**bridge.sides, "text": replace(bridge.sides["text"], revision="toy:letters@0")}, _encoders={}
    )
    with pytest.raises(BridgekitError, match="toy:letters@0"):
        changed.embed("text", ["dog"])


def test_a_missing_plugin_is_named_and_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained().save(tmp_path / "b")
    install(monkeypatch)
    bridge = Bridge.load(tmp_path / "b")
    with pytest.raises(BridgekitError, match="no installed plugin provides 'toy'"):
        bridge.embed("text", ["dog"])


def test_every_kind_of_damage_is_one_clear_message(tmp_path: Path) -> None:
    untrained().save(tmp_path / "b")
    metadata = (tmp_path / "b" / "bridge.json").read_text()
    weights = (tmp_path / "b" / "adapters.safetensors").read_bytes()
    flipped = bytearray(weights)
    flipped[-5] ^= 1
    newer = json.dumps({**json.loads(metadata), "format": 99})
    damages: list[tuple[str, bytes, str]] = [
        ("bridge.json", b"", "damaged"),
        ("bridge.json", metadata[:100].encode(), "damaged"),
        ("bridge.json", b"[1, 2]", "damaged"),
        ("bridge.json", newer.encode(), "format 99"),
        ("bridge.json", json.dumps({"format": 1}).encode(), "damaged"),
        ("bridge.json", metadata.replace('"dim": 8', '"dim": 9').encode(), "damaged"),
        ("bridge.json", b"\xff\xfe" + metadata.encode("utf-16-le"), "damaged"),
        ("adapters.safetensors", weights[:-1], "damaged"),
        ("adapters.safetensors", bytes(flipped), "damaged"),
        ("history.jsonl", b"{", "damaged"),
    ]
    for name, content, expected in damages:
        whole = (tmp_path / "b" / name).read_bytes()
        (tmp_path / "b" / name).write_bytes(content)
        with pytest.raises(BridgekitError, match=expected):
            Bridge.load(tmp_path / "b")
        (tmp_path / "b" / name).write_bytes(whole)
    Bridge.load(tmp_path / "b")
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BridgekitError, match="there is no"):
            Bridge.load(place)


def test_a_bridge_whose_preset_has_fields_of_earlier_versions_opens_with_the_same_numbers(tmp_path: Path) -> None:
    untrained().save(tmp_path / "b")
    file = tmp_path / "b" / "bridge.json"
    metadata = json.loads(file.read_text())
    metadata["preset"] |= {"alpha_end": 1.0, "patience": 0, "keep_best": True}
    del metadata["preset"]["learn_temperature"]  # a field that earlier versions did not have
    file.write_text(json.dumps(metadata))
    old = Bridge.load(tmp_path / "b")
    assert torch.equal(old.embed("text", ["dog", "cup"]), untrained().embed("text", ["dog", "cup"]))
    assert old.temperature == untrained().temperature
    old.save(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "bridge.json").read_text())["preset"]
    assert not {"alpha_end", "patience", "keep_best"} & set(written)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("dim", 9, "`dim` must be 8, the width of `preset.shared_dim`"),
        ("dim", True, "`dim` must be an integer from 1 to 65,536"),
        ("temperature", "warm", "`temperature` must be a number from 0.00099 to 0.505"),
        ("adapters_sha256", "A" * 64, "`adapters_sha256` must be a SHA-256"),
        ("metrics", {}, "`metrics` must be a list"),
        ("metrics", [{"split": "test"}], "`metrics[0].among` is missing"),
        ("sides", {"a/b": {}}, "`sides` must be an object of 1 to 32 sides"),
        ("sides.audio", {}, "`sides.audio.encoder` is missing"),
        ("sides.audio.encoder", "x\x1b[31m:y", "`sides.audio.encoder` must be a name like provider:model"),
        ("sides.audio.wings", 2, "`sides.audio.wings` must be left out"),
        ("preset.epochs", 0, "`preset.epochs` must be an integer from 1 to 1,000,000,000"),
        ("preset.pairing", "thirds", "`preset.pairing` must be one of halves, permutation"),
        ("preset.wings", 2, "`preset.wings` must be left out"),
        ("preset.lr?", 0.1, "`preset.lr?` must be left out"),
        ("provenance.seed", -1, "`provenance.seed` must be an integer from 0"),
        ("provenance.rows", {"train": "many"}, "`provenance.rows.train` must be a number"),
        ("provenance.modalities", ["audio", ["text"]], "`provenance.modalities[1]` must be one of audio, text"),
        ("provenance.bound", [{"fingerprint": ""}], "`provenance.bound[0].modality` is missing"),
        (
            "provenance.bound",
            [{"modality": "text", "fingerprint": "", "bound": []}],
            "`provenance.bound[0].bound` must be left",
        ),
    ],
)
def test_a_wrong_field_of_bridge_json_is_named_with_what_it_must_be(
    tmp_path: Path, place: str, value: object, message: str
) -> None:
    untrained().save(tmp_path / "b")
    file = tmp_path / "b" / "bridge.json"
    metadata = json.loads(file.read_text())
    *way, name = place.split(".")
    functools.reduce(operator.getitem, way, metadata)[name] = value
    file.write_text(json.dumps(metadata))
    with pytest.raises(BridgekitError, match=re.escape(f"this bridge is damaged: in bridge.json, {message}")):
        Bridge.load(tmp_path / "b")


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    untrained().save(tmp_path / "b")
    (tmp_path / "b" / "conditioners").mkdir()
    with pytest.raises(BridgekitError, match="--overwrite"):
        untrained().save(tmp_path / "b")
    replace(untrained(), temperature=0.05).save(tmp_path / "b", overwrite=True)
    assert Bridge.load(tmp_path / "b").temperature == 0.05
    assert not (tmp_path / "b" / "conditioners").exists()


def test_the_model_card_says_what_the_bridge_is_and_how_to_use_it(tmp_path: Path) -> None:
    untrained().save(tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "`toy:tone`" in card
    assert 'Bridge.load("b")' in card


def test_a_folder_whose_name_is_not_utf_8_holds_a_bridge(tmp_path: Path) -> None:
    named = replace(untrained(), provenance={"command": "bridgekit align --out caf\udce9", "pairs": r"a\udce9"})
    folder = named.save(tmp_path / "caf\udce9")
    read = Bridge.load(folder).provenance
    assert (read["command"], read["pairs"]) == (r"bridgekit align --out caf\udce9", r"a\udce9")
