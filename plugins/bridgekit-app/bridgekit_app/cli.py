"""`bridgekit app`."""

from __future__ import annotations

import ipaddress
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from bridgekit.errors import BridgekitError


def command(
    bridge: Annotated[
        Path | None,
        typer.Argument(help="A bridge folder, in addition to those in ./bridges. [dim]default: the newest of these[/dim]"),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="A plugin's model, a diffusers folder or a Hub ID. [dim]default: starter:openmoji-64[/dim]"),
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
) -> None:
    """Serve a web page for search and image generation, and an HTTP API, on this machine.

    Example: [b]bridgekit app bridges/audio-text[/b]
    """
    import uvicorn

    from bridgekit.bridge.bridge import Bridge
    from bridgekit.cli.common import find_bridge
    from bridgekit_app.app import create_app
    from bridgekit_app.connections import configure

    Bridge.load(find_bridge(bridge), "cpu")  # so that a bad bridge is reported here, not in the browser
    with _listen(host, port) as listener:
        config = configure(create_app(bridge, model=model, host=host, device=device), log_level="warning")
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(f"bridgekit app: {address} (API: {address}/docs; stop with Ctrl-C)", flush=True)
        if not _is_loopback(host):
            print("There is no password: anyone who can reach this machine can use it.", file=sys.stderr, flush=True)
        if open_:
            typer.launch(address)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print("\nbridgekit app: stopped.", file=sys.stderr)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256)
    except OSError as error:
        raise BridgekitError(
            f"cannot listen on this address: {error.strerror or error}",
            where=f"{host}, port {port}",
            remedy="stop the program that uses the port, or choose another --port (0 picks a free one)",
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
