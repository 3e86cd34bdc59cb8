"""`align` from a table to a bridge: it learns, is reproducible, resumes, and drops no good row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridgekit import PRESETS, Bridge, BridgekitError, Preset, align
from bridgekit.recipes.align import AlignOptions, run_alignment
from tests.toys import NAMES, tone_table

pytestmark = pytest.mark.usefixtures("toy")
QUICK = replace(PRESETS["default"], epochs=8, batch_size=32, shared_dim=32)


def adapters(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def test_clips_find_their_names_and_the_bridge_records_its_metrics(tmp_path: Path) -> None:
    bridge = align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=QUICK, progress=False)
    figures = {(record["method"], record["direction"]): record for record in bridge.metrics if record["among"] == "split"}
    assert list(dict.fromkeys(method for method, _ in figures)) == ["random", "ridge", "closed form", "FuseMix"]
    assert figures["FuseMix", "audio → text"]["recall@1"] > 0.8
    assert figures["random", "audio → text"]["recall@1"] < 0.4
    assert bridge.provenance["rows"] == {"train": 96, "val": 12, "test": 12}
    names = {path.name for path in (tmp_path / "bridge").iterdir()}
    assert names == {
        "bridge.json",
        "adapters.safetensors",
        "training_rows.safetensors",
        "history.jsonl",
        "README.md",
        "training.png",
        "similarity-audio-text.png",
    }


def test_without_a_closed_form_start_it_is_training_that_finds_them(tmp_path: Path) -> None:
    preset = replace(QUICK, epochs=40, warm_start=0.0)
    bridge = align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=preset, progress=False)
    asked = [record for record in bridge.metrics if (record["direction"], record["among"]) == ("audio → text", "split")]
    found = {record["method"]: record["recall@1"] for record in asked}
    assert found["FuseMix"] > 0.8
    assert found["random"] < 0.4


def test_the_closed_form_start_is_what_training_starts_from_and_random_is_not(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    still = replace(QUICK, lr=0.0, min_lr=0.0, epochs=1)  # ends where it starts

    def measured(preset: Preset) -> dict[str, dict[tuple[str, ...], float]]:
        bridge = align(pairs=table, out=tmp_path / "bridge", preset=preset, overwrite=True, progress=False, write_report=False)
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for record in bridge.metrics:
            key = (record["split"], record["direction"], record["among"])
            found.setdefault(record["method"], {})[key] = (record["recall@1"], record["recall@5"], record["median_rank"])
        return found

    warm = measured(still)
    assert warm["closed form"] == warm["FuseMix"] != warm["random"]
    cold = measured(replace(still, warm_start=0.0))
    assert list(cold) == ["random", "ridge", "closed form", "FuseMix"], "the closed form is a method of its own"
    assert cold["random"] == cold["FuseMix"]


def test_the_saved_bridge_embeds_compares_and_searches(tmp_path: Path) -> None:
    trained = align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=QUICK, progress=False)
    bridge = Bridge.load(tmp_path / "bridge")
    clip = tmp_path / "clips" / "owl 0.wav"
    assert torch.equal(bridge.embed("audio", clip), trained.embed("audio", [clip]))
    torch.testing.assert_close(bridge.embed("audio", clip).norm(dim=1), torch.ones(1))
    assert bridge.similarity(audio=[clip], text=NAMES).shape == (1, len(NAMES))
    assert bridge.search("audio", clip, "text", NAMES, 3)[0][0].item == "owl"
    assert bridge.dim == 32


def test_the_same_call_gives_the_same_bytes_and_another_seed_different_ones(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    for name, seed in {"one": 0, "two": 0, "other": 1}.items():
        align(pairs=table, out=tmp_path / name, preset=QUICK, seed=seed, progress=False)
    assert adapters(tmp_path / "one") == adapters(tmp_path / "two")
    assert adapters(tmp_path / "one") != adapters(tmp_path / "other")


def test_half_precision_learns_the_same_and_is_another_run(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    whole = align(pairs=table, out=tmp_path / "whole", preset=QUICK, progress=False)
    half = align(pairs=table, out=tmp_path / "half", preset=QUICK, half=True, progress=False)
    assert (half.provenance["half"], whole.provenance.get("half")) == (True, None)
    assert half.provenance["fingerprint"] != whole.provenance["fingerprint"]
    assert adapters(tmp_path / "half") != adapters(tmp_path / "whole")
    assert all(tensor.dtype == torch.float32 for each in half.adapters.values() for tensor in each.state_dict().values())
    for one, other in zip(whole.metrics, half.metrics, strict=True):
        if one["method"] != "random":
            assert abs(one["recall@1"] - other["recall@1"]) < 0.1, one
    again = run_alignment(AlignOptions(pairs=table, out=tmp_path / "half", preset=QUICK, half=True, progress=False))
    assert again.reused
    frozen = align(pairs=table, out=tmp_path / "frozen", preset=QUICK, half=True, frozen="text", progress=False)
    assert frozen.metrics


def test_a_finished_bridge_of_the_same_call_is_reused_and_another_is_not_overwritten(tmp_path: Path) -> None:
    table, out = tone_table(tmp_path), tmp_path / "bridge"
    assert not run_alignment(AlignOptions("audio", "text", table, out=out, preset=QUICK, progress=False)).reused
    assert run_alignment(AlignOptions("audio", "text", table, out=out, preset=QUICK, progress=False)).reused
    before = adapters(out)
    with pytest.raises(BridgekitError, match="--overwrite"):
        align(pairs=table, out=out, preset=QUICK, seed=1, progress=False)
    assert adapters(out) == before
    align(pairs=table, out=out, preset=QUICK, seed=1, overwrite=True, progress=False)
    assert adapters(out) != before


def test_a_folder_that_is_not_a_bridge_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BridgekitError, match="not a bridge"):
        align(pairs=tone_table(tmp_path), out=tmp_path / "mine", preset=QUICK, overwrite=True, progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_frozen_side_keeps_its_own_latents(tmp_path: Path) -> None:
    bridge = align(pairs=tone_table(tmp_path), out=tmp_path / "bridge", preset=QUICK, frozen="text", progress=False)
    raw = bridge.encoder("text").encode([bridge.encoder("text").prepare("owl")])
    torch.testing.assert_close(bridge.embed("text", "owl"), torch.nn.functional.normalize(raw, dim=-1))
    assert bridge.dim == 48
    assert Bridge.load(tmp_path / "bridge").dim == 48


def test_bad_rows_are_set_aside_and_counted_and_strict_refuses_them(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    (tmp_path / "clips" / "note.wav").write_text("not audio")
    with table.open("a") as file:
        file.write("clips/absent.wav,owl\nclips/note.wav,owl\n,owl\nclips/owl 0.wav,\n")
    done = run_alignment(AlignOptions("audio", "text", table, out=tmp_path / "bridge", preset=QUICK, progress=False))
    assert sorted(row.row for row in done.set_aside) == [122, 123, 124, 125]
    assert done.bridge.provenance["set_aside"] == 4
    with pytest.raises(BridgekitError, match="4 of 124 rows"):
        align(pairs=table, out=tmp_path / "strict", preset=QUICK, strict=True, progress=False)
    assert not (tmp_path / "strict").exists()


def test_two_rows_are_too_few(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    table.write_text("\n".join(table.read_text().splitlines()[:3]))
    with pytest.raises(BridgekitError, match="too few"):
        align(pairs=table, out=tmp_path / "bridge", preset=QUICK, progress=False)


def test_a_table_with_the_same_text_in_every_row_is_refused(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    table.write_text("audio,text\n" + "".join(f"clips/{name} {k}.wav,sound\n" for name in NAMES for k in range(3)))
    with pytest.raises(BridgekitError, match="same text"):
        align(pairs=table, out=tmp_path / "bridge", preset=QUICK, progress=False)


def test_the_splits_of_the_table_are_honoured(tmp_path: Path) -> None:
    table = tone_table(tmp_path)
    rows = table.read_text().splitlines()
    splits = ["split"] + ["later" if "owl" in row else "val" if " 5.wav" in row else "train" for row in rows[1:]]
    table.write_text("\n".join(f"{row},{split}" for row, split in zip(rows, splits, strict=True)))
    bridge = align(pairs=table, out=tmp_path / "bridge", preset=QUICK, progress=False)
    assert bridge.provenance["rows"] == {"train": 95, "val": 19, "later": 6}
    asked = [record for record in bridge.metrics if record["method"] == "FuseMix" and record["direction"] == "audio → text"]
    assert {(record["split"], record["among"], record["candidates"]) for record in asked} == {
        ("later", "split", 1),
        ("later", "all", 20),
    }
