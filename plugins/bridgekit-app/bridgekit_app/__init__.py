"""`bridgekit app`: a web page for search and image generation, and an HTTP API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridgekit.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """`bridgekit app`."""
    from bridgekit.cli.common import interruptible
    from bridgekit_app import cli

    app.command("app", help=cli.command.__doc__)(interruptible(cli.command))
