"""How an item stands on the page: a text, a thumbnail, a player, or a name alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bridgekit.encoders import TEXT, Item
from bridgekit.report.markup import Html, joined, tag
from bridgekit.report.previews import Preview


class Media:
    """The previews on a page, each of which is embedded once, and what stands for an item in a text."""

    def __init__(self, previews: Mapping[tuple[str, Item], Preview]) -> None:
        self.previews = previews
        self.number = {key: number for number, key in enumerate(previews)}

    def as_json(self) -> list[dict[str, object]]:
        """For the page's script, which puts them in their places."""
        return [preview.as_json() for preview in self.previews.values()]

    def show(self, modality: str, item: Item) -> Html:
        """An item: a text, a thumbnail with its name, a player with its name, or a name alone."""
        named = name_of(item)
        number = self.number.get((modality, item))
        if number is None:
            return tag("p", tag("bdi", named), class_="text" if modality == TEXT else "file")
        caption = tag("p", tag("bdi", named), class_="file")
        if self.previews[modality, item].kind == "image":
            return joined(tag("img", data_media=number, alt=named, width=64, height=64), caption)
        return joined(tag("button", type="button", class_="play", data_media=number, aria_label=f"Play {named}"), caption)


def name_of(item: Item) -> str:
    """A file's folder and name, or the beginning of a text."""
    if isinstance(item, Path):
        return f"{item.parent.name}/{item.name}"
    text = " ".join(str(item).split())
    return text if len(text) <= 240 else text[:239] + "…"
