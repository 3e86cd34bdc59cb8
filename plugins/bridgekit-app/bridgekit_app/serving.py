"""The server as a process: it listens, reports its address, and ends cleanly on Ctrl-C."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from bridgekit.errors import BridgekitError
from bridgekit_app.app import create_app


def serve(
    bridge: Path | None,
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
    listening: Callable[[str], object] = print,
) -> None:
    """Serve the page and the API until SIGINT or SIGTERM.

    Arguments:
        bridge, model, device: as for `create_app`.
        host: the address to listen on.
        port: 0 takes any free one.
        listening: called with the address once the port is open.

    Raises:
        BridgekitError: the port is taken, or the address is not one of this machine's.
        KeyboardInterrupt: it was stopped by SIGINT, and has cleaned up.
    """
    with _listen(host, port) as listener:
        app = create_app(bridge, model=model, host=host, device=device)
        config = uvicorn.Config(
            app,
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
        name = f"[{host}]" if ":" in host else host
        listening(f"http://{name}:{listener.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listener])


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
