"""What goes into an index: the items of a table, which is opened once."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from bridgekit_index.listing import list_items, listed_modalities, open_listed

from bridgekit import read_pairs
from tests.test_tables import opened_once, table  # noqa: F401  (a fixture)


def test_a_table_is_opened_once_for_all_its_modalities(table: Path) -> None:  # noqa: F811
    with opened_once(table):
        listed = open_listed(table)
        for modality in listed_modalities(listed, ("audio", "text")):
            assert list_items(listed, modality).items


def test_clips_inside_a_table_are_listed_with_its_columns(table: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = read_pairs(table, ("audio", "text"))
    (tmp_path / "shards").mkdir()
    for number in range(2):
        clips = [Path(str(item)).read_bytes() for item in rows.columns["audio"][number * 60 : number * 60 + 60]]
        part = pa.table(
            {"audio": clips, "text": list(rows.columns["text"][number * 60 : number * 60 + 60]), "year": [1990] * 60}
        )
        pq.write_table(part, tmp_path / "shards" / f"train-{number}.parquet")
    listed = open_listed(tmp_path / "shards")
    assert listed_modalities(listed, ("audio", "text")) == ["audio", "text"]
    found = list_items(listed, "audio")
    assert len(found) == 120
    assert set(found.cells["year"]) == {"1990"}
    assert str(found.items[61]) == f"{tmp_path / 'shards' / 'train-1.parquet'}, row 2, column audio"
