"""Three modalities in one space, at once or one by one; rows may have holes, and binding leaves existing sides alone."""

from __future__ import annotations

import json
from itertools import count, permutations
from pathlib import Path

import pytest
import torch

from bridgekit import Bridge, BridgekitError, align, bind
from bridgekit.evaluation.bridges import EvalOptions, evaluate_bridge
from bridgekit.evaluation.recall import sides_of
from bridgekit.fusion.training import train
from bridgekit.recipes.align import AlignOptions, run_alignment
from bridgekit.recipes.bind import BindOptions, run_binding
from tests.conftest import Run
from tests.painting import QUICK, Workshop
from tests.test_training import SMALL, two_views
from tests.toys import NAMES

pytestmark = pytest.mark.usefixtures("picture_toys")


def three_column_table(workshop: Workshop, folder: Path) -> Path:
    """Clips with their names, names with their pictures, and never a clip with a picture but in the test rows."""
    lines = ["audio,text,image,split,group"]
    for name in NAMES:
        picture = workshop.folder / "seen" / f"{name}.png"
        lines += [f"{workshop.clip(name, copy)},{name},,{'val' if copy == 4 else 'train'},{name}" for copy in range(5)]
        lines += [f",{name},{picture},train,{name}"]
        lines += [f"{workshop.clip(name, 5)},{name},{picture},test,{name}"]
    table = folder / "three.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    return table


def recalls(bridge: Bridge, method: str = "FuseMix") -> dict[str, float]:
    return {
        record["direction"]: record["recall@1"]
        for record in bridge.metrics
        if record["method"] == method and record["among"] == "split" and record["split"] == "test"
    }


def test_a_table_with_three_columns_and_holes_joins_all_in_every_direction(workshop: Workshop, tmp_path: Path) -> None:
    done = run_alignment(
        AlignOptions(
            pairs=three_column_table(workshop, tmp_path), out=tmp_path / "bridge", preset=QUICK, outside=True, progress=False
        )
    )
    assert list(done.bridge.sides) == ["audio", "image", "text"]
    assert done.set_aside == ()
    found = recalls(done.bridge)
    assert set(found) == {f"{a} → {b}" for a, b in permutations(["audio", "image", "text"], 2)}
    # Clips and pictures had no pairs of their own: they meet through the names.
    assert found["audio → image"] > 0.7
    assert min(found.values()) > 0.7
    assert max(recalls(done.bridge, "random").values()) < 0.4
    assert set(done.bridge.provenance["modality_gap"]) == {"audio, image", "audio, text", "image, text"}
    assert set(done.bridge.provenance["pair_cosine"]) == {"audio, text"}  # the only pairs that the val rows have
    assert {"similarity-audio-image.png", "similarity-audio-text.png", "similarity-image-text.png", "training.png"} == {
        file.name for file in (tmp_path / "bridge").glob("*.png")
    }


def test_named_sides_are_taken_in_their_order_and_the_saved_bridge_evaluates_itself(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = three_column_table(workshop, tmp_path)
    trained = align("text", "audio", table, more=["image"], out=tmp_path / "bridge", preset=QUICK, outside=True, progress=False)
    loaded = Bridge.load(tmp_path / "bridge")
    assert list(loaded.sides) == ["text", "audio", "image"]
    records, _ = evaluate_bridge(loaded, EvalOptions(outside=True))
    assert records == [record for record in trained.metrics if record["method"] == trained.method(*sides_of(record))]


def test_a_frozen_side_holds_for_all_the_others(workshop: Workshop, tmp_path: Path) -> None:
    table = three_column_table(workshop, tmp_path)
    bridge = align(pairs=table, out=tmp_path / "bridge", frozen="text", preset=QUICK, outside=True, progress=False)
    assert bridge.dim == bridge.sides["text"].dim
    assert min(recalls(bridge).values()) > 0.5


def test_pairs_of_modalities_without_a_test_row_are_reported(run: Run, workshop: Workshop, tmp_path: Path) -> None:
    table = three_column_table(workshop, tmp_path)
    rows = [line.split(",") for line in table.read_text().splitlines()]
    # Test rows lose their pictures, and nothing groups them.
    kept = [[cells[0], cells[1], "" if cells[3] == "test" else cells[2], cells[3]] for cells in rows]
    table.write_text("\n".join(map(",".join, kept)))
    code, out, _ = run("align", "--pairs", "three.csv", "--outside")
    assert code == 0
    assert "No test row has both audio and image, so recall between them was not measured." in out


def test_a_table_without_a_column_that_is_a_modality_is_refused_with_its_columns(run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("words,drawing\na,b.png\n")
    code, _, err = run("align", "--pairs", "t.csv")
    assert code == 2
    assert "no column of the table is named after a modality; its columns are `words`, `drawing`" in err
    assert "--column image=NAME" in err


def test_modalities_that_no_row_joins_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    lines = ["audio,text,image,depth"] + [f"{workshop.clip(name)},{name},,x" for name in NAMES]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(BridgekitError, match="every row has the same image, or none"):
        align(pairs=tmp_path / "t.csv", out=tmp_path / "bridge", preset=QUICK, outside=True, progress=False)
    for number in range(4):
        lines.append(f"{workshop.clip(NAMES[number], 1)},,{workshop.folder / 'seen' / NAMES[number]}.png,")
    splits = ["split", *["train"] * len(NAMES), *["test"] * 4]
    table = "\n".join(f"{split},{line}" for split, line in zip(splits, lines, strict=True))
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(BridgekitError, match="no row to train on joins image with the other modalities"):
        align(pairs=tmp_path / "t.csv", out=tmp_path / "bridge", preset=QUICK, outside=True, progress=False)


def test_binding_leaves_the_other_sides_bit_for_bit_unchanged(workshop: Workshop, tmp_path: Path) -> None:
    folder = workshop.bridge(tmp_path / "bridge")
    (folder / "conditioners").mkdir()
    (folder / "conditioners" / "some.safetensors").write_bytes(b"fitted before")
    (folder / "report.html").write_text("of before")
    before = Bridge.load(folder)
    bound = bind(folder, "image", workshop.folder / "gallery.csv", progress=False)
    after = Bridge.load(folder)
    assert list(after.sides) == ["audio", "text", "image"]
    assert after.weights_hash(["audio", "text"]) == before.weights_hash(["audio", "text"])
    assert after.temperature == before.temperature
    assert after.weights_hash(["image"]) == bound.weights_hash(["image"])
    assert (folder / "conditioners" / "some.safetensors").read_bytes() == b"fitted before"
    assert (folder / "report.html").read_text() == "of before"
    assert {"training.png", "training-image.png"} <= {file.name for file in folder.glob("*.png")}
    assert list(after.metrics)[: len(before.metrics)] == list(before.metrics)
    assert {record["direction"] for record in list(after.metrics)[len(before.metrics) :]} == {"text → image", "image → text"}
    assert "bound later: image" in (folder / "README.md").read_text()


def test_binding_in_half_precision_is_another_run_and_leaves_the_other_sides(
    run: Run, workshop: Workshop, tmp_path: Path
) -> None:
    folder = workshop.bridge(tmp_path / "bridge")
    before = Bridge.load(folder).weights_hash(["audio", "text"])
    arguments = ("bind", folder, "--add", "image", "--pairs", workshop.folder / "gallery.csv")
    assert run(*arguments)[0] == 0
    whole = Bridge.load(folder)
    assert run(*arguments, "--half")[0] == 2, "bound with other settings already"
    assert run(*arguments, "--half", "--overwrite")[0] == 0
    half = Bridge.load(folder)
    assert half.weights_hash(["audio", "text"]) == before
    assert half.weights_hash(["image"]) != whole.weights_hash(["image"])
    assert half.provenance["bound"][-1]["half"] is True


def test_a_bound_modality_is_found_by_those_that_it_had_no_pairs_with(workshop: Workshop, tmp_path: Path) -> None:
    bridge = bind(workshop.bridge(tmp_path / "bridge"), "image", workshop.folder / "gallery.csv", progress=False)
    pictures = [workshop.folder / "seen" / f"{name}.png" for name in NAMES]
    found = bridge.search("audio", [workshop.clip(name) for name in NAMES], "image", pictures, 3)
    hits = sum(any(hit.item == picture for hit in hits) for hits, picture in zip(found, pictures, strict=True))
    assert hits >= 14  # of 20; by chance 3


def test_the_expected_item_is_the_softmax_weighted_mean(workshop: Workshop, tmp_path: Path) -> None:
    bridge = Bridge.load(workshop.bridge(tmp_path / "bridge"))
    queries, names = bridge.embed("audio", [workshop.clip(name) for name in NAMES[:3]]), bridge.embed("text", NAMES)
    weights = torch.exp(queries.double() @ names.double().T / bridge.temperature)
    mean = (weights / weights.sum(1, keepdim=True)) @ names.double()
    expected = (mean / mean.norm(dim=1, keepdim=True)).float()
    torch.testing.assert_close(bridge.expected(queries, names), expected, rtol=1e-4, atol=1e-5)


def test_modalities_without_pairs_of_their_own_meet_better_through_a_third(workshop: Workshop, tmp_path: Path) -> None:
    bridge = bind(workshop.bridge(tmp_path / "bridge"), "image", workshop.folder / "gallery.csv", progress=False)
    pictures = [workshop.folder / "seen" / f"{name}.png" for name in NAMES]
    clips = [workshop.clip(name, 5) for name in NAMES]
    first = [hits[0].item for hits in bridge.search("audio", clips, "image", pictures, 1, through=("text", NAMES))]
    direct = [hits[0].item for hits in bridge.search("audio", clips, "image", pictures, 1)]
    right = sum(found == picture for found, picture in zip(first, pictures, strict=True))
    assert right >= 16
    assert right >= sum(found == picture for found, picture in zip(direct, pictures, strict=True))


def test_binding_again_by_the_same_call_does_nothing_and_by_another_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    folder, table = workshop.bridge(tmp_path / "bridge"), workshop.folder / "gallery.csv"
    assert not run_binding(BindOptions(folder, "image", table, progress=False)).reused
    written = (folder / "adapters.safetensors").read_bytes()
    assert run_binding(BindOptions(folder, "image", table, progress=False)).reused
    with pytest.raises(BridgekitError, match="image was already bound to this bridge, with other pairs"):
        bind(folder, "image", table, seed=1, progress=False)
    with pytest.raises(BridgekitError, match="already has a side for audio"):
        bind(folder, "audio", workshop.folder / "pairs.csv", progress=False)
    assert (folder / "adapters.safetensors").read_bytes() == written


def test_a_bound_modality_can_be_bound_again(workshop: Workshop, tmp_path: Path) -> None:
    folder, table = workshop.bridge(tmp_path / "bridge"), workshop.folder / "gallery.csv"
    once = bind(folder, "image", table, seed=1, progress=False)
    again = bind(folder, "image", table, seed=0, overwrite=True, progress=False)
    fresh = bind(workshop.bridge(tmp_path / "other"), "image", table, seed=0, progress=False)
    assert again.weights_hash(["image"]) == fresh.weights_hash(["image"]) != once.weights_hash(["image"])
    assert again.metrics == fresh.metrics
    assert len(again.provenance["bound"]) == 1
    assert again.provenance["modality_gap"] == fresh.provenance["modality_gap"]


def test_binding_elsewhere_leaves_the_old_folder_alone(workshop: Workshop, tmp_path: Path) -> None:
    folder = workshop.bridge(tmp_path / "bridge")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    bind(folder, "image", workshop.folder / "gallery.csv", out=tmp_path / "larger", progress=False)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert "image" in Bridge.load(tmp_path / "larger").sides
    assert run_binding(
        BindOptions(folder, "image", workshop.folder / "gallery.csv", out=tmp_path / "larger", progress=False)
    ).reused
    with pytest.raises(BridgekitError, match="other settings"):
        bind(folder, "image", workshop.folder / "gallery.csv", out=tmp_path / "larger", seed=3, progress=False)


def test_a_bound_bridge_evaluates_each_side_on_the_table_that_it_came_with(workshop: Workshop, tmp_path: Path) -> None:
    folder = workshop.bridge(tmp_path / "bridge")
    bound = bind(folder, "image", workshop.folder / "gallery.csv", progress=False)
    records, _ = evaluate_bridge(Bridge.load(folder), EvalOptions())
    assert records == [record for record in bound.metrics if record["method"] == bound.method(*sides_of(record))]
    assert [set(table.modalities) for table in bound.tables] == [{"audio", "text"}, {"text", "image"}]


def test_a_table_that_shares_no_modality_with_the_bridge_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,words\na.png,b\n")
    with pytest.raises(BridgekitError, match="no column for any of the bridge's modalities"):
        bind(workshop.bridge(tmp_path / "bridge"), "image", tmp_path / "t.csv", progress=False)


def test_the_loss_counts_each_pair_of_items_once_and_ignores_holes() -> None:
    """With a third side that is a copy of the second but for holes, training sees the same things as without it."""
    latents = two_views()
    rows = {name: torch.arange(200) for name in latents}
    holes = torch.where(torch.arange(200) < 100, torch.arange(200), torch.tensor(-1))
    epochs = count()  # the later, the better: the last one's adapters are kept
    trained = train(
        {**latents, "c": latents["b"].flip(1)},
        {**rows, "c": holes},
        torch.arange(200)[:, None],
        validate=lambda adapters: {"score": float(next(epochs))},
        preset=SMALL,
    )
    x, y, z = (
        torch.nn.functional.normalize(trained.adapters[name](matrix[200:]), dim=-1)
        for name, matrix in {**latents, "c": latents["b"].flip(1)}.items()
    )
    right = torch.arange(len(x))
    assert float(((x @ y.T).argmax(1) == right).float().mean()) > 0.7
    assert float(((x @ z.T).argmax(1) == right).float().mean()) > 0.6


def test_the_command_line_joins_three_binds_and_searches_across(run: Run, workshop: Workshop, tmp_path: Path) -> None:
    three_column_table(workshop, tmp_path)
    code, out, _ = run("align", "--pairs", "three.csv", "--a", "audio", "--b", "text", "--c", "image", "--outside")
    assert code == 0
    assert "audio → image" in out
    assert "Sides: audio by toy:tone, text by toy:letters, image by patch:mean." in out
    assert "Bridge: bridges/audio-text-image" in out
    workshop.bridge(tmp_path / "bridges" / "two")
    code, out, _ = run("bind", "bridges/two", "--add", "image", "--pairs", workshop.folder / "gallery.csv", "--json")
    assert code == 0
    assert json.loads(out)["provenance"]["bound"][0]["modality"] == "image"
    code, out, _ = run("info", "bridges/two")
    assert "bound later: image\n    pairs: " in out
    code, out, _ = run("bind", "bridges/two", "--add", "image", "--pairs", workshop.folder / "gallery.csv")
    assert "Reused the bridge of an earlier run" in out
    assert "audio → text" not in out
    # A file's suffix gives its modality, and text is searched unless the user says otherwise.
    code, out, _ = run("search", workshop.folder / "seen" / "owl.png", "--bridge", "bridges/two", "-k", "1", "--json")
    assert (code, json.loads(out)[0]["found"][0]["item"]) == (0, "owl")
    code, out, _ = run("search", workshop.clip("owl"), "--bridge", "bridges/two", "--to", "image", "--json")
    assert (code, len(json.loads(out)[0]["found"])) == (0, 5)
    across = ("search", workshop.clip("owl"), "--bridge", "bridges/two", "--to", "image", "-k", "1")
    code, out, _ = run(*across, "--through", "text", "--json")
    assert (code, Path(json.loads(out)[0]["found"][0]["item"]).name) == (0, "owl.png")
    code, _, err = run(*across, "--through", "image")
    assert (code, err.splitlines()[0]) == (2, "bridgekit: audio and image cannot be connected through image")
    code, out, _ = run("eval", "bridges/two")
    assert code == 0
    assert "image → text" in out
    assert "audio → text" in out
    code, _, err = run("search", "an owl", "--bridge", "bridges/two")
    assert code == 2
    assert "several modalities to search: audio, image" in err


def test_binding_without_a_bridge_or_a_table_is_one_message(run: Run, workshop: Workshop, tmp_path: Path) -> None:
    code, _, err = run("bind", "nowhere", "--add", "image", "--pairs", "t.csv")
    assert (code, err.splitlines()[0]) == (2, "bridgekit: there is no such folder")
    workshop.bridge(tmp_path / "bridges" / "two")
    code, _, err = run("bind", "bridges/two", "--add", "image", "--pairs", "t.csv")
    assert (code, err.splitlines()[0]) == (2, "bridgekit: there is no such table")
