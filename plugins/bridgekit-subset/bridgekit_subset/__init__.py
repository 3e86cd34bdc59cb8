"""Choosing training pairs: `bridgekit subset`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bridgekit.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

    from bridgekit_subset.k_dpp import choose_subset as choose_subset
    from bridgekit_subset.pairs import choose_pairs as choose_pairs

_HOME = {"choose_pairs": "pairs", "choose_subset": "k_dpp"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bridgekit_subset' has no attribute {name!r}")
    return getattr(import_module(f"bridgekit_subset.{_HOME[name]}"), name)


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """`bridgekit subset`."""
    from bridgekit.cli.common import interruptible
    from bridgekit_subset import cli

    app.command("subset", help=cli.command.__doc__)(interruptible(cli.command))
