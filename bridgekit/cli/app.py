"""`bridgekit app`."""

from __future__ import annotations

import ipaddress
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from bridgekit.errors import BridgekitError

#: What the extra `app` brings, as it is imported.
NEEDED = ("fastapi", "uvicorn", "multipart")


def command(
    bridge: Annotated[
        Path | None,
        typer.Argument(help="A bridge's folder, beside those in ./bridges. [dim]default: the newest of these[/dim]"),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 7860,
    host: Annotated[str, typer.Option(help="The address to listen on. 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="A plugin's model, a diffusers folder or a hub id. [dim]default: starter:openmoji-64[/dim]"),
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
) -> None:
    """A page where you speak and see, and an API for programs, on this machine.

    Example: [b]bridgekit app bridges/audio-text[/b]
    """
    if any(find_spec(name) is None for name in NEEDED):
        raise BridgekitError(
            "the page needs fastapi, uvicorn and python-multipart", remedy="in bridgekit's own folder: pip install '.[app]'"
        )
    from bridgekit.bridge.bridge import Bridge
    from bridgekit.cli.common import find_bridge

    Bridge.load(find_bridge(bridge), "cpu")  # whatever is wrong with it is said here, not in a browser
    from bridgekit.server.serving import serve

    def listening(address: str) -> None:
        print(f"bridgekit app: {address} (the API: {address}/docs; Ctrl-C ends it)", flush=True)
        if not _is_loopback(host):
            print("Whoever can reach this machine can use it: there is no password.", file=sys.stderr, flush=True)
        if open_:
            typer.launch(address)

    try:
        serve(bridge, model=model, host=host, port=port, device=device, listening=listening)
    except KeyboardInterrupt:
        print("\nbridgekit app: stopped.", file=sys.stderr)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
