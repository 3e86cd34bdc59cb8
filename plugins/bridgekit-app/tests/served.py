"""A running server for tests, in this process and on a port of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from bridgekit_app.app import create_app
from bridgekit_app.connections import configure
from bridgekit_app.limits import Limits
from bridgekit_app.state import AppState

from tests.spoken_words import SpokenWords

SMALL = Limits(upload_bytes=400_000, clip_seconds=5, megapixels=0.5, text_characters=50, inputs=4)


@dataclass(frozen=True)
class Served:
    """A running server."""

    address: str
    state: AppState
    folder: Path
    client: httpx.Client
    connections: Collection[Any]


@contextlib.contextmanager
def served_bridges(bridges: Path, limits: Limits = SMALL, *, warm: bool = False) -> Iterator[Served]:
    """A server of the bridges in a folder. The galleries of the default one are filled."""
    guard = create_app(limits=limits, bridges=bridges, warm=warm)
    server = uvicorn.Server(configure(guard, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            app_state = guard.app.state  # type: ignore[attr-defined]
            opened = app_state.bridgekit.open()
            for modality in opened.bridge.sides:
                assert opened.galleries.find(modality, 600)
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=address, timeout=600) as client:
                yield Served(address, app_state.bridgekit, app_state.folder, client, server.server_state.connections)
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def served(words: SpokenWords, limits: Limits = SMALL, *, warm: bool = False) -> Iterator[Served]:
    """A server of the spoken words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGEKIT_HOME", str(words.home))
        patch.setenv("BRIDGEKIT_OUTSIDE", "yes")  # the bridge is one's own, and its table lies elsewhere
        with served_bridges(words.bridges, limits, warm=warm) as running:
            yield running
