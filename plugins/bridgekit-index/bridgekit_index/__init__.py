"""A LanceDB index of embeddings: `bridgekit index` and `bridgekit search --index`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bridgekit.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

    from bridgekit_index.index import Index as Index
    from bridgekit_index.listing import Listing as Listing
    from bridgekit_index.listing import list_items as list_items

_HOME = {"Index": "index", "Listing": "listing", "list_items": "listing"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bridgekit_index' has no attribute {name!r}")
    return getattr(import_module(f"bridgekit_index.{_HOME[name]}"), name)


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """`bridgekit index`."""
    from bridgekit.cli.common import interruptible
    from bridgekit_index import cli

    app.command("index", help=cli.command.__doc__)(interruptible(cli.command))


@hookimpl
def open_index(path: str) -> Index:
    """The index at a path or URL."""
    from bridgekit_index.index import Index

    return Index.open(path)
