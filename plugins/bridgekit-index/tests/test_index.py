"""An index grows, reports how it searches, keeps one row per item even if killed, and trusts nothing that it reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked
import lancedb
import numpy as np
import pytest
import torch
from bridgekit_index import index as module
from bridgekit_index.filters import MAX_LENGTH
from bridges import pictures, real_bridge, toy_bridge, words
from PIL import Image

from bridgekit import Bridge, BridgekitError, Index, Listing, list_items
from tests.shared import PATIENCE, wait_until


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


def test_vectors_are_unit_length_float32_and_a_hit_has_its_rows_columns(tmp_path: Path) -> None:
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
def test_an_invalid_filter_is_one_message_that_names_the_columns(tmp_path: Path, where: str, told: str) -> None:
    index = Index.create(tmp_path / "i")
    index.add(toy_bridge(), Listing("text", ["ant", "bee"], cells={"split": ["a", "b"], "year": ["1", "2"]}))
    with pytest.raises(BridgekitError) as caught:
        index.search(torch.eye(2, 8), "text", where=where)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    if len(where) < MAX_LENGTH:
        assert "split (text), year (numbers)" in str(caught.value)


# ---- growing


def test_existing_items_are_neither_embedded_nor_added_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_rewritten_file_is_found_by_its_new_content(tmp_path: Path) -> None:
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


def test_vanished_items_are_reported_and_pruned_from_their_own_source_only(tmp_path: Path) -> None:
    bridge = toy_bridge()
    index = Index.create(tmp_path / "i")
    index.add(bridge, Listing("text", words(10), "a"))
    index.add(bridge, Listing("text", words(5, 100), "b"))
    added = index.add(bridge, Listing("text", words(4), "a"))
    assert (added.gone, added.removed, index.rows("text")) == (6, 0, 15)
    added = index.add(bridge, Listing("text", words(4), "a"), prune=True)
    assert (added.gone, added.removed, index.rows("text")) == (0, 6, 9)


def test_changed_cells_of_a_table_are_updated_in_the_index(tmp_path: Path) -> None:
    bridge = toy_bridge()
    index = Index.create(tmp_path / "i")
    index.add(bridge, Listing("text", ["ant", "bee"], cells={"legs": ["6", "5"]}))
    added = index.add(bridge, Listing("text", ["ant", "bee"], cells={"legs": ["6", "6"], "wings": ["", "yes"]}))
    assert (added.new, added.changed, added.unchanged) == (0, 1, 1)
    assert index.columns("text")["wings"] == "text"
    found = index.search(torch.eye(1, 8), "text", where="legs = 6 and wings = 'yes'")
    assert [hit.item for hit in found.hits[0]] == ["bee"]


def test_columns_keep_their_type_and_reserved_names_are_renamed(tmp_path: Path) -> None:
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


def test_a_file_whose_name_is_not_utf_8_fails_only_its_row(tmp_path: Path) -> None:
    bridge = real_bridge()
    pictures(tmp_path)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pictures/b\xe4r.png"))
    shutil.copy(tmp_path / "pictures" / "red circle.png", odd)
    added = Index.create(tmp_path / "i").add(bridge, list_items(tmp_path / "pictures", "image"))
    assert added.new == 24
    assert ["not in UTF-8" in row.reason for row in added.set_aside] in ([True], [])


# ---- large tables


def test_a_large_table_is_searched_approximately_with_known_recall_and_a_small_selection_exactly(
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


def test_rows_added_after_an_approximate_index_was_built_are_found_and_it_is_rebuilt_when_outgrown(
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


# ---- which bridge it belongs to, and whether it can be trusted


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


def test_a_missing_index_and_another_kind_of_folder_are_refused(tmp_path: Path) -> None:
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
        lambda: written({**facts, b"modality": b"te[/red]xt"}),
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


def test_any_folder_name_and_modality_name_works(tmp_path: Path) -> None:
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


# ---- kills, interrupts and races


class Indexing:
    """`bridgekit index` on 192 lines in processes of their own, each with a latent store of its own.

    Arguments:
        folder: for the lines, the bridge and the indexes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = words(192)
        self.started: list[BaseProcess] = []
        toy_bridge().save(folder / "bridge")
        (folder / "lines.txt").write_text("\n".join(self.lines), encoding="utf-8")

    def start(self, out: str, home: str, *, whole: bool = True) -> BaseProcess:
        """One that adds all lines, or one that goes on to the last sixteen and waits there to be killed."""
        arguments = ("index", self.folder / "lines.txt", "--bridge", self.folder / "bridge", "--out", self.folder / out)
        before = None if whole else self.lines[-1]
        self.started.append(forked.start(arguments, self.folder / home, self.folder / f"{out} {home}.log", before))
        return self.started[-1]

    def run(self, out: str, home: str) -> str:
        """Let one run to its end; gives what it printed."""
        return self.end(self.start(out, home), out, home)

    def end(self, process: BaseProcess, out: str, home: str, code: int = 0) -> str:
        """Wait for one to end; gives what was printed."""
        process.join()
        printed = (self.folder / f"{out} {home}.log").read_text(encoding="utf-8")
        assert process.exitcode == code, printed
        return printed

    def wait_for_rows(self, out: str, least: int, process: BaseProcess) -> None:
        """Wait until an index that is being made has so many rows."""
        path = self.folder / out

        def enough() -> bool:
            assert process.is_alive()
            return any(path.glob("*.lance")) and bool((index := Index.open(path)).modalities) and index.rows("text") >= least

        wait_until(enough)


@pytest.fixture(scope="module", autouse=True)
def forking() -> Iterator[None]:
    yield
    forked.stop_forking()


@pytest.fixture
def indexing(tmp_path: Path) -> Iterator[Indexing]:
    made = Indexing(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.join()


def test_a_killed_run_resumes_and_ends_with_the_rows_of_an_undisturbed_one(tmp_path: Path, indexing: Indexing) -> None:
    indexing.run("whole", "home 1")
    for least in (16, 80):
        process = indexing.start("killed", "home 2", whole=False)
        indexing.wait_for_rows("killed", least, process)
        process.kill()
        process.join()
        assert least <= len(contents(tmp_path / "killed")) < 192
        assert len(Index.open(tmp_path / "killed").search(torch.eye(1, 8), "text", 5).hits[0]) == 5, "it can be searched"
    printed = indexing.run("killed", "home 2")
    assert 0 < int(re.search(r"(\d+) new", printed).group(1)) < 192  # type: ignore[union-attr]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_ctrl_c_leaves_an_index_that_can_be_read(tmp_path: Path, indexing: Indexing) -> None:
    process = indexing.start("stopped", "home", whole=False)
    indexing.wait_for_rows("stopped", 16, process)
    os.kill(process.pid or 0, signal.SIGINT)
    printed = indexing.end(process, "stopped", "home", 130)
    assert "Nothing is lost" in printed
    assert "Traceback" not in printed
    assert 16 <= len(contents(tmp_path / "stopped")) < 192


def test_two_processes_at_once_add_no_row_twice(tmp_path: Path, indexing: Indexing) -> None:
    processes = {home: indexing.start("shared", home) for home in ("home 1", "home 2")}
    for home, process in processes.items():
        indexing.end(process, "shared", home)
    assert len(contents(tmp_path / "shared")) == 192


def test_writers_that_compact_at_the_same_moment_do_not_fail(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    bridge, barrier = toy_bridge(), Barrier(4)
    Index.create(tmp_path / "i").add(bridge, Listing("text", ["ant"]))

    def write(writer: int) -> None:
        index = Index.open(tmp_path / "i")
        for round_ in range(5):
            index.add(bridge, Listing("text", words(5, 100 * writer + 5 * round_)))
            barrier.wait(timeout=PATIENCE)
            try:
                index.finish()
            except BridgekitError:
                barrier.abort()
                raise

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(1, 5))) == [None] * 4
    assert len(contents(tmp_path / "i")) == 101


def test_writers_that_add_the_same_rows_at_the_same_moment_add_them_once(tmp_path: Path) -> None:
    """The race itself: many handles of one table, each adding the same rows in its own thread."""
    from threading import Barrier, Thread

    Index.create(tmp_path / "i").add(toy_bridge(), Listing("text", ["ant"]))
    barrier = Barrier(4)
    errors: list[BaseException] = []

    def add(bridge: Bridge, index: Index) -> None:
        try:
            for round_ in range(5):
                barrier.wait(timeout=PATIENCE)
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
