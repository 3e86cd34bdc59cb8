"""`bridgekit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridgekit.cli.common import BridgeArgument, Columns, Outside, find_bridge, parse_columns
from bridgekit.terminal import say


def command(
    bridge: BridgeArgument = None,
    out: Annotated[
        Path | None, typer.Option(help="Output file. [dim]default: report.html in the bridge's folder[/dim]")
    ] = None,
    pairs: Annotated[str | None, typer.Option(help="Another table, or the new path of the bridge's own.")] = None,
    check: Annotated[bool, typer.Option(help="Also check every file of the table, as bridgekit check does.")] = True,
    outside: Outside = False,
    column: Columns = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write an HTML report about a bridge: metrics, retrieval errors, and a map of the space with images and sound.

    Example: [b]bridgekit report bridges/audio-text --open[/b]
    """
    from bridgekit.recipes.report import write_report

    file = write_report(
        find_bridge(bridge, bundled=False), out, pairs=pairs, check=check, outside=outside, columns=parse_columns(column)
    )
    say(f"Report: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    if open_it:
        import webbrowser

        webbrowser.open(file.absolute().as_uri())
