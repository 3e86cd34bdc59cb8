"""Clients that stall: they keep neither a connection nor a request's place from others, and cannot fill the log."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from bridgekit_app.app import PAGES
from bridgekit_app.connections import Once
from bridgekit_app.limits import Limits
from served import Served, served

from tests.shared import wait_until
from tests.spoken_words import SpokenWords

LARGEST = max(PAGES, key=lambda path: PAGES[path][0].stat().st_size)
HEAD = b"POST /embed HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@contextlib.contextmanager
def stalled(server: Served, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Connections that send this, and then neither send nor read. Those that the server ends are left as they are."""
    address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
    with contextlib.ExitStack() as stack:
        lines = []
        for _ in range(count):
            line = stack.enter_context(socket.socket())
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            line.connect(address)
            with contextlib.suppress(OSError):
                line.sendall(sent)
            lines.append(line)
        yield lines


def assert_an_honest_client_is_served(server: Served) -> None:
    """A page's requests on a new connection, and a program's on one that it keeps."""
    for path in ("/", "/bridge", LARGEST):
        assert httpx.get(server.address + path, timeout=60).status_code == 200
    for text in ("cat", "dog"):
        assert server.client.post("/embed", json={"text": text}).status_code == 200


def test_130_clients_that_pipeline_requests_and_never_read_stop_nobody_and_are_ended(spoken_words: SpokenWords) -> None:
    get = f"GET {LARGEST} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    with served(spoken_words, replace(Limits(), response_seconds=3)) as running:
        assert_an_honest_client_is_served(running)
        with stalled(running, 130, 20 * get):
            wait_until(lambda: sum(each.flow.write_paused for each in running.connections) == 130)
            assert_an_honest_client_is_served(running)
            wait_until(lambda: len(running.connections) <= 1)
        assert_an_honest_client_is_served(running)


@pytest.mark.parametrize("last", [True, False])
def test_a_response_that_nobody_reads_does_not_outlive_its_time_though_it_is_all_handed_over(
    spoken_words: SpokenWords, last: bool
) -> None:
    get = f"GET /static/app.js HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: {'close' if last else 'keep-alive'}\r\n\r\n".encode()
    with served(spoken_words, replace(Limits(), response_seconds=2)) as running, stalled(running, 3, b"") as lines:
        wait_until(lambda: len(running.connections) == 3)
        for each in running.connections:  # or the system would take the response
            each.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        for line in lines:
            line.sendall(get)
        wait_until(lambda: all(each.cycle and each.cycle.response_complete for each in running.connections))
        assert [each.transport.is_closing() for each in running.connections] == [last] * 3
        wait_until(lambda: not running.connections)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: 127.0", HEAD + b"a" * 100 + b"GET"])
def test_unfinished_headers_have_a_time_limit(spoken_words: SpokenWords, sent: bytes) -> None:
    with served(spoken_words, replace(Limits(), header_seconds=1)) as running, stalled(running, 3, sent) as lines:
        for line in lines:
            line.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                while line.recv(65_536):
                    pass
        assert not running.connections


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: 127.0", HEAD])
def test_stalled_connections_beyond_the_limit_give_way_and_those_of_honest_clients_stay(
    spoken_words: SpokenWords, sent: bytes
) -> None:
    with served(spoken_words, replace(Limits(), connections=60, connections_each=50)) as running:
        assert_an_honest_client_is_served(running)
        with stalled(running, 200, sent):
            wait_until(lambda: len(running.connections) <= 50)
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(httpx.Client(base_url=running.address, timeout=60)) for _ in range(20)]
                for _ in range(2):  # the second time on connections that were kept
                    assert {client.get("/healthz").status_code for client in clients} == {200}
            assert_an_honest_client_is_served(running)


def test_an_address_does_not_take_the_connections_of_another(spoken_words: SpokenWords) -> None:
    with served(spoken_words, replace(Limits(), connections=30, connections_each=20)) as running:
        port = int(running.address.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            for _ in range(15):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)))
            wait_until(lambda: len(running.connections) >= 15)
            with stalled(running, 100, b"GET"):
                wait_until(lambda: len(running.connections) <= 30)
                counts = [each.client[0] for each in running.connections]
                assert (counts.count("127.0.0.1") <= 20, len(counts) <= 30) == (True, True)
                assert_an_honest_client_is_served(running)


def test_requests_whose_bodies_do_not_arrive_give_way_to_others(spoken_words: SpokenWords) -> None:
    with served(spoken_words, replace(Limits(), requests=3)) as running, stalled(running, 3, HEAD + b"{") as lines:
        busy = {httpx.get(running.address + "/healthz").status_code for _ in range(5)}
        assert busy == {503}, "until they have had their time"
        time.sleep(2.1)
        assert_an_honest_client_is_served(running)
        lines[0].settimeout(30)
        assert b" 408 " in lines[0].recv(65_536).splitlines()[0]


def test_the_log_says_a_thing_once(spoken_words: SpokenWords, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("uvicorn.error")
    with served(spoken_words) as running:
        for each in logger.filters:
            if isinstance(each, Once):
                each.last.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logger, "handlers", [caplog.handler])
            for _ in range(20):
                with stalled(running, 1, b"nonsense\r\n\r\n") as [line]:
                    line.settimeout(30)
                    assert b" 400 " in line.recv(65_536)
            for number in range(3):
                logger.warning("message %d", number)
    assert [record.getMessage() for record in caplog.records] == ["Invalid HTTP request received.", "message 0"]


def test_different_errors_are_all_logged() -> None:
    once, passed = Once(), []
    for number in range(6):
        try:
            raise [ValueError, TypeError][number % 2](str(number))
        except (ValueError, TypeError) as error:
            trace = (type(error), error, error.__traceback__)
            record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "Exception in ASGI application\n", (), trace)
            passed.append(once.filter(record))
    assert passed == [True, True, False, False, False, False]
