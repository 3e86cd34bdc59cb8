"""An index grows, says how it searches, keeps one row per item whatever happens, and trusts nothing that it reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
import torch
from bridgekit_index import index as module
from bridgekit_index.filters import MAX_LENGTH
from bridges import pictures, real_bridge, toy_bridge, words
from PIL import Image

from bridgekit import Bridge, BridgekitError, Index, Listing, list_items


def contents(path: Path, modality: str = "text") -> dict[str, tuple[Any, ...]]:
    """Each row by its key, vectors bit by bit."""
    table = lancedb.connect(str(path)).open_table(modality).to_arrow()
    keys = table["content"].to_pylist()
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    others = [table[name].to_pylist() for name in table.column_names if name not in ("content", "vector")]
    rows = {key: (vector.tobytes(), *row) for key, vector, *row in zip(keys, vectors, *others, strict=True)}
    assert len(rows) == len(keys), "no row is there twice"
    return rows


def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*arguments: object, **options: object) -> None:
        raise AssertionError("what is there is not embedded again")

    monkeypatch.setattr(module, "encode_items", again)


# ---- what a search finds


def test_exact_hits_are_those_of_the_plain_search_any_modality_by_any(tmp_path: Path) -> None:
    bridge, table = real_bridge(), pictures(tmp_path)
    index = Index.create(tmp_path / "shapes.index")
    for modality in ("image", "text"):
        assert index.add(bridge, list_items(table, modality)).new == 24
    index.finish()
    assert set(index.modalities) == {"image", "text"}
    picture = tmp_path / "pictures" / "red circle.png"
    for source, queries, target in (
        ("text", ["a red circle", "something blue"], "image"),
        ("image", [picture], "text"),
        ("image", [picture], "image"),
        ("text", ["a line"], "text"),
    ):
        plain = bridge.search(source, queries, target, list_items(table, target).items, 5)
        found = index.find(bridge, source, queries, target, 5)
        assert [[hit.item for hit in hits] for hits in found.hits] == [[str(hit.item) for hit in hits] for hits in plain]
        for hits, expected in zip(found.hits, plain, strict=True):
            assert [hit.similarity for hit in hits] == pytest.approx([hit.similarity for hit in expected], abs=1e-5)
        assert found.candidates == 24
        assert found.approximate is None


def test_vectors_are_unit_length_float32_and_a_hit_tells_its_row(tmp_path: Path) -> None:
    bridge = real_bridge()
    index = Index.create(tmp_path / "i")
    index.add(bridge, list_items(pictures(tmp_path), "text"))
    stored = lancedb.connect(str(tmp_path / "i")).open_table("text").to_arrow()["vector"]
    assert str(stored.type.value_type) == "float"
    assert np.linalg.norm(stored.to_pylist(), axis=1) == pytest.approx(1, abs=1e-5)
    ((hit,),) = index.find(bridge, "text", "a red square", "text", 1).hits
    assert (hit.item, hit.columns["Year"], hit.columns["split"], hit.columns["code"]) == ("a red square", 1991, "train", "001")


def test_a_query_needs_the_encoder_of_its_own_modality_alone(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "i")
    index.add(real_bridge(), list_items(pictures(tmp_path), "image"))
    fresh = replace(real_bridge(), _encoders={"text": real_bridge().encoder("text")})
    assert Index.open(tmp_path / "i").find(fresh, "text", "a red circle", "image", 3).hits[0]
    assert set(fresh._encoders) == {"text"}


def test_filters_take_columns_of_the_table_in_any_case(tmp_path: Path) -> None:
    bridge = real_bridge()
    index = Index.create(tmp_path / "i")
    index.add(bridge, list_items(pictures(tmp_path), "text"))
    for where, count in {
        "split = 'test'": 6,
        "SPLIT = 'test' AND year >= 2000": 3,
        "year between 1990 and 1993 or year in (2000, 2001)": 6,
        "text like '%red%' and not split = 'test'": 3,
        "code = '001'": 1,
        "(Year < 1992.5)": 3,
        "`Year` > -1 and item is not null": 24,
        "split = 'te''st'": 0,
    }.items():
        found = index.find(bridge, "text", ["a line", "red"], "text", 100, where=where)
        assert found.candidates == count, where
        assert [len(hits) for hits in found.hits] == [count, count], where


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("spilt = 'test'", "no column `spilt`; did you mean split?"),
        ("split = test", "no column `test`"),
        ("vector = 1", "no column `vector`"),
        ("year = 'x'", "does not fit the columns"),
        ("split =", "does not fit the columns"),
        ("split = 'x", "syntax error"),
        ("", "empty"),
        ("year = 1; drop table text", "syntax error"),
        ("repeat(item, 1000000000) = 'x'", "not allowed in a filter: repeat()"),
        ("year in (select year from text)", "no column `select`"),
        ("item = 'a' -- year", "does not fit the columns"),
        ('"split" = 1', "syntax error"),
        ("(" * 900 + "year = 1" + ")" * 900, "does not fit the columns"),
        ("year = 1 or " * 200 + "year = 2", f"at most {MAX_LENGTH:,}"),
    ],
)
def test_a_filter_that_is_none_is_one_message_that_names_the_columns(tmp_path: Path, where: str, told: str) -> None:
    index = Index.create(tmp_path / "i")
    index.add(toy_bridge(), Listing("text", ["ant", "bee"], cells={"split": ["a", "b"], "year": ["1", "2"]}))
    with pytest.raises(BridgekitError) as caught:
        index.search(torch.eye(2, 8), "text", where=where)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    if len(where) < MAX_LENGTH:
        assert "split (text), year (numbers)" in str(caught.value)


# ---- growing


def test_what_is_there_is_neither_embedded_nor_added_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = real_bridge()
    index = Index.create(tmp_path / "i")
    assert index.add(bridge, Listing("text", words(20))).new == 20
    before = contents(tmp_path / "i")
    with monkeypatch.context() as patched:
        no_encoding(patched)
        again = Index.create(tmp_path / "i").add(bridge, Listing("text", [*words(20), " red circle number 0 "]))
    assert (again.new, again.changed, again.unchanged) == (0, 0, 20)
    assert contents(tmp_path / "i") == before
    more = index.add(bridge, Listing("text", words(30)))
    assert (more.new, more.unchanged, index.rows("text")) == (10, 20, 30)
    assert contents(tmp_path / "i").items() >= before.items()


def test_a_file_that_moved_is_the_same_row_under_its_new_name(tmp_path: Path) -> None:
    bridge, table = real_bridge(), pictures(tmp_path)
    index = Index.create(tmp_path / "i")
    index.add(bridge, list_items(table, "image"))
    (tmp_path / "pictures" / "red circle.png").rename(tmp_path / "pictures" / "moved.png")
    table.write_text(table.read_text().replace("red circle.png", "moved.png"))
    added = index.add(bridge, list_items(table, "image"))
    assert (added.new, added.changed, added.unchanged, added.gone) == (0, 1, 23, 0)
    hits = index.find(bridge, "image", tmp_path / "pictures" / "moved.png", "image", 30).hits[0]
    assert Path(hits[0].item).name == "moved.png"
    assert len(hits) == 24


def test_a_file_that_was_written_anew_answers_by_what_it_holds_now(tmp_path: Path) -> None:
    bridge, table = real_bridge(), pictures(tmp_path)
    index = Index.create(tmp_path / "i")
    index.add(bridge, list_items(table, "image"))
    other, name = tmp_path / "pictures" / "red circle.png", "red circle.png"
    Image.new("RGB", (64, 64), "green").save(other)
    added = index.add(bridge, list_items(table, "image"))
    assert (added.new, added.gone, added.removed, index.rows("image")) == (1, 0, 1, 24)
    hits = index.find(bridge, "image", other, "image", 30).hits[0]
    assert (Path(hits[0].item).name, [Path(hit.item).name for hit in hits].count(name)) == (name, 1)
    other.write_bytes(b"broken")
    added = index.add(bridge, list_items(table, "image"))
    assert (added.gone, added.removed, index.rows("image")) == (1, 0, 24)  # kept until it can be read


def test_what_vanished_is_told_and_pruned_from_its_own_source_only(tmp_path: Path) -> None:
    bridge = toy_bridge()
    index = Index.create(tmp_path / "i")
    index.add(bridge, Listing("text", words(10), "a"))
    index.add(bridge, Listing("text", words(5, 100), "b"))
    added = index.add(bridge, Listing("text", words(4), "a"))
    assert (added.gone, added.removed, index.rows("text")) == (6, 0, 15)
    added = index.add(bridge, Listing("text", words(4), "a"), prune=True)
    assert (added.gone, added.removed, index.rows("text")) == (0, 6, 9)


def test_what_a_table_says_otherwise_now_changes_in_the_index(tmp_path: Path) -> None:
    bridge = toy_bridge()
    index = Index.create(tmp_path / "i")
    index.add(bridge, Listing("text", ["ant", "bee"], cells={"legs": ["6", "5"]}))
    added = index.add(bridge, Listing("text", ["ant", "bee"], cells={"legs": ["6", "6"], "wings": ["", "yes"]}))
    assert (added.new, added.changed, added.unchanged) == (0, 1, 1)
    assert index.columns("text")["wings"] == "text"
    found = index.search(torch.eye(1, 8), "text", where="legs = 6 and wings = 'yes'")
    assert [hit.item for hit in found.hits[0]] == ["bee"]


def test_columns_keep_their_kind_and_get_out_of_the_way(tmp_path: Path) -> None:
    bridge = toy_bridge()
    index = Index.create(tmp_path / "i")
    cells = {"source": ["web", "book"], "a.b": ["1", "2.5"], "_distance": ["x", "y"], "Vector": ["1", ""], "code": ["007", "8"]}
    index.add(bridge, Listing("text", ["ant", "bee"], cells={**cells, "empty": ["", ""]}))
    columns = index.columns("text")
    assert columns == {
        "content": "text",
        "item": "text",
        "source": "text",
        "source_": "text",
        "a_b": "numbers",
        "distance_": "text",
        "Vector_": "numbers",
        "code": "text",
    }
    with pytest.raises(BridgekitError, match="`a_b` contains numbers in the index but text here"):
        index.add(bridge, Listing("text", ["cat"], cells={"a.b": ["many"]}))
    assert index.add(bridge, Listing("text", ["cat"], cells={"code": ["9"]})).new == 1


def test_bad_items_are_set_aside_and_strict_refuses_them(tmp_path: Path) -> None:
    bridge, table = real_bridge(), pictures(tmp_path)
    (tmp_path / "pictures" / "red circle.png").write_text("no picture")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, "gone.png,gone,,,", ",a hole,,,", lines[2]]) + "\n")
    index = Index.create(tmp_path / "i")
    with pytest.raises(BridgekitError, match="items cannot be used"):
        index.add(bridge, list_items(table, "image"), strict=True)
    added = index.add(bridge, list_items(table, "image"))
    assert {(row.row, Path(row.item).name) for row in added.set_aside} == {(26, "gone.png"), (2, "red circle.png")}
    assert added.new == 23


def test_a_file_whose_name_is_not_utf_8_costs_its_row_alone(tmp_path: Path) -> None:
    bridge = real_bridge()
    pictures(tmp_path)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pictures/b\xe4r.png"))
    shutil.copy(tmp_path / "pictures" / "red circle.png", odd)
    added = Index.create(tmp_path / "i").add(bridge, list_items(tmp_path / "pictures", "image"))
    assert added.new == 24
    assert ["not in UTF-8" in row.reason for row in added.set_aside] in ([True], [])


# ---- large tables


def test_a_large_table_is_searched_approximately_with_recall_told_and_a_small_choice_of_it_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "APPROXIMATE_FROM", 600)
    bridge = toy_bridge()
    index = Index.create(tmp_path / "i")
    listing = Listing("text", words(800), cells={"number": [str(n) for n in range(800)]})
    index.add(bridge, listing)
    queries = bridge.embed("text", words(20))
    assert index.search(queries, "text").approximate is None, "not built yet: exact"
    index.finish()
    found = Index.open(tmp_path / "i").search(queries, "text", 10)
    assert found.approximate is not None
    assert found.approximate.rows == 800
    told = found.approximate.recall["text"]
    assert 0.5 < told <= 1
    exact = index.search(queries, "text", 10, exact=True)
    assert exact.approximate is None
    seen = [
        hit.similarity >= best[-1].similarity - 1e-5 for got, best in zip(found.hits, exact.hits, strict=True) for hit in got
    ]
    assert np.mean(seen) == pytest.approx(told, abs=0.2)
    few = index.search(queries, "text", 10, where="number < 500")
    assert (few.candidates, few.approximate) == (500, None)
    assert all(hit.columns["number"] < 500 for hits in few.hits for hit in hits)  # type: ignore[operator]


def test_what_is_added_after_an_approximate_index_was_built_is_found_and_it_is_built_again_when_outgrown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "APPROXIMATE_FROM", 300)
    bridge = toy_bridge()
    index = Index.create(tmp_path / "i")
    index.add(bridge, Listing("text", words(400)))
    index.finish()
    index.add(bridge, Listing("text", ["a lone zebra"]))
    for _ in range(2):
        assert index.find(bridge, "text", "a lone zebra", "text", 1).hits[0][0].item == "a lone zebra"
        index.finish()
    built = index.approximate("text")
    assert built is not None
    assert built.rows == 400
    index.add(bridge, Listing("text", words(1_000)))
    index.finish()
    assert index.approximate("text").rows == 1_001  # type: ignore[union-attr]


# ---- whose it is, and whether it can be trusted


def test_an_index_of_another_bridge_is_refused_with_the_remedy(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "i", "bridges/mine")
    index.add(toy_bridge(), Listing("text", words(3)))
    other = toy_bridge(seed=1)
    for attempt in (
        lambda: Index.open(tmp_path / "i").find(other, "text", "ant", "text"),
        lambda: Index.create(tmp_path / "i").add(other, Listing("text", ["ant"])),
    ):
        with pytest.raises(BridgekitError) as caught:
            attempt()
        assert "another bridge" in str(caught.value)
        assert f"--bridge ({Path('bridges/mine').absolute()})" in str(caught.value)
    only_audio = replace(other, sides={"audio": other.sides["audio"]})
    with pytest.raises(BridgekitError, match="another bridge"):
        index.check(only_audio)
    revised = replace(toy_bridge(), sides={"text": replace(other.sides["text"], revision="toy:letters@2")})
    with pytest.raises(BridgekitError, match="another bridge"):
        index.check(revised)
    assert index.rows("text") == 3


def test_a_bridge_that_has_grown_a_modality_is_still_the_same(tmp_path: Path) -> None:
    whole = toy_bridge()
    young = replace(whole, sides={"text": whole.sides["text"]}, adapters={"text": whole.adapters["text"]})
    index = Index.create(tmp_path / "i")
    index.add(young, Listing("text", words(3)))
    index.check(whole)
    assert len(index.find(whole, "text", "red", "text").hits[0]) == 3


def test_there_is_no_index_or_something_else(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BridgekitError, match="there is no"):
            Index.open(path)
    (tmp_path / "bridge.json").write_text("{}")
    with pytest.raises(BridgekitError, match="not an index"):
        Index.create(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bridge.json"]
    index = Index.create(tmp_path / "i")
    index.add(toy_bridge(), Listing("text", ["ant"]))
    with pytest.raises(BridgekitError, match="it contains text"):
        index.search(torch.eye(1, 8), "audio")


def test_a_table_that_names_models_to_run_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    index = Index.create(tmp_path / "i")
    index.add(toy_bridge(), Listing("text", ["ant"]))
    table = lancedb.connect(str(tmp_path / "i")).open_table("text").to_arrow()
    facts = dict(table.schema.metadata)

    def written(metadata: dict[bytes, bytes], extra: Any = None) -> Path:
        made = table if extra is None else table.append_column("extra", extra)
        shutil.rmtree(tmp_path / "evil", ignore_errors=True)
        lancedb.connect(str(tmp_path / "evil")).create_table("text", made.replace_schema_metadata(metadata))
        return tmp_path / "evil"

    assert Index.open(written(facts)).rows("text") == 1
    model = {"name": "sentence-transformers", "model": {"name": "x", "trust_remote_code": True}}
    entry = json.dumps([{**model, "vector_column": "vector", "source_column": "item"}]).encode()
    for bad in (
        lambda: written({**facts, b"embedding_functions": entry}),
        lambda: written({b"who": b"knows"}),
        lambda: written({**facts, b"bridgekit": b"99"}),
        lambda: written(facts, pa.array([{"a": 1}])),
        lambda: written(facts, pa.array([b"bytes"])),
    ):
        with pytest.raises(BridgekitError) as caught:
            Index.open(bad())
        assert len(str(caught.value).splitlines()) <= 3


def test_a_damaged_index_is_one_message(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "i")
    index.add(toy_bridge(), Listing("text", words(50)))
    files = [file for file in (tmp_path / "i").rglob("*") if file.suffix in (".lance", ".manifest") and file.is_file()]
    assert len(files) >= 2
    for number, file in enumerate(files):
        for damage in (
            lambda data: data[: len(data) // 2],
            lambda data: b"\0" * len(data),
            lambda data: b"\x80\x04." + data[3:],
        ):
            copy = tmp_path / f"copy {number}"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(tmp_path / "i", copy)
            broken = copy / file.relative_to(tmp_path / "i")
            broken.write_bytes(damage(file.read_bytes()))
            told, hits = None, []
            try:
                hits = Index.open(copy).search(torch.eye(1, 8), "text", 60).hits[0]
            except BridgekitError as error:
                told = str(error)
            # Where nothing is told, what is damaged was not needed, or held nothing that a search reads.
            assert len(hits) in (0, 50) if told is None else len(told.splitlines()) <= 3


def test_any_name_of_a_folder_and_of_a_modality_will_do(tmp_path: Path) -> None:
    whole = toy_bridge()
    odd = replace(
        whole,
        sides={"heat map ü": whole.sides["audio"], "text": whole.sides["text"]},
        adapters={"heat map ü": whole.adapters["audio"], "text": whole.adapters["text"]},
        _encoders={"heat map ü": whole.encoder("audio"), "text": whole.encoder("text")},
    )
    from tests.conftest import tone

    clip = tone(tmp_path / "clips ö" / "ä 100%.wav", 440)
    place = tmp_path / "été #1, 50% 日本"
    Index.create(place).add(odd, Listing("heat map ü", [clip]))
    Index.create(place).add(odd, Listing("text", ["größe"]))
    index = Index.open(place)
    assert set(index.modalities) == {"heat map ü", "text"}
    assert index.find(odd, "text", "größe", "heat map ü").hits[0][0].item == str(clip)


# ---- whatever happens


RUNNER = """
import sys
from bridgekit_index import index
index.BLOCK, index.COMMIT_SECONDS = {"text": 16}, 0.0
sys.argv = ["bridgekit", *sys.argv[1:]]
from bridgekit.cli import main
main()
"""


@pytest.fixture
def indexing(tmp_path: Path) -> Any:
    """Start `bridgekit index` on 192 lines in a process of its own, in blocks of 16 and with a store of its own."""
    real_bridge().save(tmp_path / "bridge")
    (tmp_path / "lines.txt").write_text("\n".join(words(192)), encoding="utf-8")
    started: list[subprocess.Popen[str]] = []

    def start(out: str, home: str) -> subprocess.Popen[str]:
        arguments = ["index", tmp_path / "lines.txt", "--bridge", tmp_path / "bridge", "--out", tmp_path / out]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", RUNNER, *map(str, arguments)],
                env={**os.environ, "BRIDGEKIT_HOME": str(tmp_path / home), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_rows(path: Path, least: int, process: subprocess.Popen[str]) -> int:
    while process.poll() is None:
        if any(path.glob("*.lance")) and (index := Index.open(path)).modalities and (rows := index.rows("text")) >= least:
            return rows
        time.sleep(0.02)
    raise AssertionError(f"the process ended: {process.communicate()}")


def test_a_run_that_is_killed_goes_on_and_ends_with_the_rows_of_one_that_was_not(tmp_path: Path, indexing: Any) -> None:
    undisturbed = indexing("whole", "home 1")
    assert undisturbed.wait() == 0, undisturbed.communicate()
    for least in (16, 80):
        process = indexing("killed", "home 2")
        rows = wait_for_rows(tmp_path / "killed", least, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert rows < 192, "it was killed in the middle"
        assert len(contents(tmp_path / "killed")) < 192
        assert len(Index.open(tmp_path / "killed").search(torch.eye(1, 64), "text", 5).hits[0]) == 5, "it can be searched"
    last = indexing("killed", "home 2")
    out, _ = last.communicate()
    assert last.returncode == 0
    assert 0 < int(re.search(r"(\d+) new", out).group(1)) < 192  # type: ignore[union-attr]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_ctrl_c_leaves_an_index_that_can_be_read(tmp_path: Path, indexing: Any) -> None:
    process = indexing("stopped", "home 1")
    wait_for_rows(tmp_path / "stopped", 16, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Nothing is lost" in err
    assert "Traceback" not in err
    assert 16 <= len(contents(tmp_path / "stopped")) < 192


def test_two_processes_at_once_add_no_row_twice(tmp_path: Path, indexing: Any) -> None:
    processes = [indexing("shared", "home 1"), indexing("shared", "home 2")]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert len(contents(tmp_path / "shared")) == 192


def test_writers_that_add_the_same_rows_at_the_same_moment_add_them_once(tmp_path: Path) -> None:
    """The race itself: many handles of one table, each adding the same rows in its own thread."""
    from threading import Barrier, Thread

    Index.create(tmp_path / "i").add(toy_bridge(), Listing("text", ["ant"]))
    barrier = Barrier(4)
    errors: list[BaseException] = []

    def add(bridge: Bridge, index: Index) -> None:
        try:
            for round_ in range(5):
                barrier.wait(timeout=60)
                index.add(bridge, Listing("text", words(20, 20 * round_)))
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=add, args=(toy_bridge(), Index.open(tmp_path / "i"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(contents(tmp_path / "i")) == 101
