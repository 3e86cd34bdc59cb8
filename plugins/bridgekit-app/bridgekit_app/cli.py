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
        typer.Argument(help="A bridge's folder, in addition to those in ./bridges. [dim]default: the newest of these[/dim]"),
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
    """Serve a page where you speak and see, and an API for programs, on this machine.

    Example: [b]bridgekit app bridges/audio-text[/b]
    """
    import uvicorn

    from bridgekit.bridge.bridge import Bridge
    from bridgekit.cli.common import find_bridge
    from bridgekit_app.app import create_app

    Bridge.load(find_bridge(bridge), "cpu")  # whatever is wrong with it is reported here, not in a browser
    with _listen(host, port) as listener:
        config = uvicorn.Config(
            create_app(bridge, model=model, host=host, device=device),
            log_level="warning",
            access_log=False,
            lifespan="on",
            ws="none",
            # There is no trusted proxy in front of this server that could report a client's address.
            proxy_headers=False,
            server_header=False,
            # A picture that is being drawn is cancelled at its next step; streams to clients are cut off after this.
            timeout_graceful_shutdown=1,
            # Longer than programs wait between two requests: a connection that closes just then would lose the second one.
            timeout_keep_alive=75,
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(f"bridgekit app: {address} (the API: {address}/docs; Ctrl-C ends it)", flush=True)
        if not _is_loopback(host):
            print("Anyone who can reach this machine can use it: there is no password.", file=sys.stderr, flush=True)
        if open_:
            typer.launch(address)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print("\nbridgekit app: stopped.", file=sys.stderr)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BridgekitError(
            f"the server cannot listen there: {reason}",
            where=f"{host}, port {port}",
            remedy="stop what listens there, or choose another --port (0 takes any free one)",
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
