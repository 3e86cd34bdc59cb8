"""What goes into an index: the items of a table, which is opened once."""

from __future__ import annotations

from pathlib import Path

from bridgekit_index.listing import list_items, listed_modalities, open_listed

from tests.test_tables import opened_once, table  # noqa: F401  (a fixture)


def test_a_table_is_opened_once_for_all_its_modalities(table: Path) -> None:  # noqa: F811
    with opened_once(table):
        listed = open_listed(table)
        for modality in listed_modalities(listed, ("audio", "text")):
            assert list_items(listed, modality).items
