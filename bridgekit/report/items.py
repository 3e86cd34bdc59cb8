"""How an item stands on the page: a text, a thumbnail, a player, or a name alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from bridgekit.encoders import TEXT, Item
from bridgekit.report.markup import Html, joined, tag
from bridgekit.report.previews import Preview

#: Characters of a text that are shown.
LONGEST_TEXT = 240
#: Characters of a file's name with its folder, where there is little room.
SHORT_NAME = 24


class Media:
    """The previews on a page, each of which is embedded once, and what stands for an item in a text.

    Arguments:
        items: every item on the page. Where their files are all in one folder, its name is left out.
        previews: what there is to see and hear of them.
    """

    def __init__(self, items: Iterable[tuple[str, Item]], previews: Mapping[tuple[str, Item], Preview]) -> None:
        folders: dict[str, set[Path]] = {}
        for modality, item in items:
            if isinstance(item, Path):
                folders.setdefault(modality, set()).add(item.parent)
        self._many_folders = {modality for modality, found in folders.items() if len(found) > 1}
        self.previews = previews
        self.number = {key: number for number, key in enumerate(previews)}

    def as_json(self) -> list[dict[str, object]]:
        """For the page's script, which puts them in their places."""
        return [preview.as_json() for preview in self.previews.values()]

    def name(self, modality: str, item: Item) -> str:
        """A file's name, with its folder where that tells something, or the beginning of a text."""
        if isinstance(item, Path):
            return f"{item.parent.name}/{item.name}" if modality in self._many_folders else item.name
        text = " ".join(item.split())
        return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"

    def short_name(self, modality: str, item: Item) -> str:
        """`name`, without the folder where that would take much room."""
        name = self.name(modality, item)
        return item.name if isinstance(item, Path) and len(name) > SHORT_NAME else name

    def show(self, modality: str, item: Item) -> Html:
        """An item: a text, a thumbnail with its name, a player with its name, or a name alone."""
        name = self.name(modality, item)
        number = self.number.get((modality, item))
        caption = tag("p", tag("bdi", name), class_="text" if modality == TEXT else "file")
        if number is None:
            return caption
        if self.previews[modality, item].kind == "image":
            return joined(tag("img", data_media=number, alt=name, width=64, height=64), caption)
        return joined(tag("button", type="button", class_="play", data_media=number, aria_label=f"Play {name}"), caption)
