"""`bridgekit app` under load: 50 concurrent clients for a minute, on the same cores as the server, and again under attack.

python benchmarks/server.py [SECONDS]
"""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import soundfile
from bridgekit_starter import openmoji, spoken
from common import table

from bridgekit import align

CLIENTS, SECONDS, SEED = 50, 60, 0
#: Frequency of each kind of request.
MIX = {"embed a text": 0.6, "search images by text": 0.24, "search text by audio": 0.12, "generate an image": 0.04}
WORDS, VOICES = 40, ("en-us+m3", "en+f4", "en-gb-x-rp+m1")
NEW_VOICE = "en-us-nyc+m6"
#: The attackers: connections that stall, each in one of these ways, and the largest JSON that the server takes.
STALLED = 200
STALLS = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-",  # an unfinished header
    b"POST /embed HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",  # and body
    20 * b"GET /static/swagger-ui-bundle.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",  # responses that are never read
)
LARGEST_JSON = 1_000_000


@dataclass
class Log:
    """The clients' measurements.

    Arguments:
        seconds: kind of request to the latencies of successful requests.
        busy: kind of request to the number of "busy" responses.
        errors: other responses.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    busy: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


def make_bridge(folder: Path) -> tuple[Path, list[bytes], list[str]]:
    """Train a bridge on 40 spoken words and their images; return it with clips in a held-out voice and the words."""
    pictures = list(openmoji.pictures())[::46][:WORDS]
    words = [picture.name for picture in pictures]
    files = dict(zip(words, openmoji._draw(pictures), strict=True))
    clips = [spoken.Clip(word, voice, "train") for word in words for voice in VOICES]
    with (folder / "words.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "text", "image"])
        for clip, path in zip(clips, spoken._speak(clips), strict=True):
            audio, image = f"{clip.voice}-{Path(path).name}", Path(files[clip.name]).name
            shutil.copyfile(path, folder / audio)
            shutil.copyfile(files[clip.name], folder / image)
            writer.writerow([audio, clip.name, image])
    align(pairs=folder / "words.csv", out=folder / "bridges" / "words", progress=False)
    queries = spoken._speak([spoken.Clip(word, NEW_VOICE, "test") for word in words])
    return folder / "bridges" / "words", [wav(path) for path in queries], words


def wav(path: Path) -> bytes:
    """A clip as WAV bytes."""
    samples, rate = soundfile.read(path, dtype="int16")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV")
    return buffer.getvalue()


def client(number: int, port: int, until: float, clips: list[bytes], words: list[str], log: Log) -> None:
    """A client: send requests one after another, and wait when the server is busy."""
    draw = random.Random(SEED * 1_000 + number)  # `number` differs in each measurement, or results would be cached
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while time.monotonic() < until:
        [kind] = draw.choices(list(MIX), list(MIX.values()))
        path, body, headers = request(kind, draw, clips, words)
        started = time.monotonic()
        try:
            line.request("POST", path, body, {**headers, "X-Bridgekit-Client": str(number)})
            answer = line.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            log.errors[type(error).__name__] += 1
            line.close()
            continue
        if answer.status == 200:
            log.seconds[kind].append(time.monotonic() - started)
        elif answer.status in (429, 503) and json.loads(body)["error"]["what"].startswith("busy: "):
            log.busy[kind] += 1
            time.sleep(min(float(answer.headers["Retry-After"]), max(0.0, until - time.monotonic())))
        else:
            log.errors[f"{answer.status} {body[:200]!r}"] += 1
    line.close()


def stall(port: int, until: float, log: Log) -> None:
    """Keep `STALLED` connections that stall, and replace those that the server ends. Counts them as `ended`."""
    lines: dict[socket.socket, None] = {}
    made = 0
    while time.monotonic() < until:
        for line in list(lines):
            if _is_ended(line):
                log.busy["connections ended"] += 1
                line.close()
                del lines[line]
        while len(lines) < STALLED and time.monotonic() < until:
            line = socket.socket()
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            line.settimeout(10)
            try:
                line.connect(("127.0.0.1", port))
                line.sendall(STALLS[made % len(STALLS)])
            except OSError:
                line.close()
            else:
                line.setblocking(False)
                lines[line] = None
                made += 1
                log.busy["connections"] += 1
        time.sleep(0.2)
    for line in lines:
        line.close()


def _is_ended(line: socket.socket) -> bool:
    """Whether the other side has closed a connection, without taking what it has sent."""
    try:
        return not line.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def post(port: int, until: float, log: Log) -> None:
    """Send the largest JSON that is allowed, one after another, with as many commas as texts may have and with none."""
    texts = json.dumps({"text": ["a," * 500] * 16})[:-2]
    bodies = [
        f'{texts}, "{"a" * (LARGEST_JSON - len(texts) - 6)}"]}}'.encode(),
        b'{"text": "%s"}' % (b"a" * (LARGEST_JSON - 12)),
    ]
    assert all(len(body) == LARGEST_JSON for body in bodies)
    while time.monotonic() < until:
        for body in bodies:
            line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            try:
                line.request("POST", "/embed", body, {"Content-Type": "application/json"})
                log.busy[f"posts answered {line.getresponse().status}"] += 1
            except (OSError, http.client.HTTPException) as error:
                log.busy[f"posts {type(error).__name__}"] += 1
            line.close()


def request(kind: str, draw: random.Random, clips: list[bytes], words: list[str]) -> tuple[str, bytes, dict[str, str]]:
    """A new request, so that no cached result applies: path, body, headers."""
    text = f"{draw.choice(words)} {draw.randrange(10**9)}"
    if kind == "search text by audio":
        clip = bytearray(draw.choice(clips))
        clip[-4:] = draw.randbytes(4)  # change two samples: a new clip for the server, but inaudible
        edge = uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="audio"; filename="clip.wav"\r\n\r\n'
        body = head.encode() + bytes(clip) + f"\r\n--{edge}--\r\n".encode()
        return "/search", body, {"Content-Type": f"multipart/form-data; boundary={edge}"}
    more: dict[str, dict[str, object]] = {
        "embed a text": {},
        "search images by text": {"to": ["image"]},
        "generate an image": {"seed": draw.randrange(10**6)},
    }
    path = {"embed a text": "/embed", "search images by text": "/search", "generate an image": "/generate"}[kind]
    return path, json.dumps({"text": text, **more[kind]}).encode(), {"Content-Type": "application/json"}


def memory(process: int) -> float:
    """The resident memory of a process and its children, the decoders, in MB."""
    children = [int(child) for file in Path(f"/proc/{process}/task").glob("*/children") for child in file.read_text().split()]
    total = 0
    for each in (process, *children):
        try:
            found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{each}/status").read_text(encoding="ascii"))
        except FileNotFoundError:  # a decoder that has just ended
            continue
        total += int(found.group(1)) if found else 0
    return total / 1e3


def processor(process: int) -> float:
    """A process's CPU seconds."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(lasting: float = SECONDS) -> str:
    """Start the server, send requests for this many seconds, and return the tables."""
    with tempfile.TemporaryDirectory() as folder:
        bridge, clips, words = make_bridge(Path(folder))
        command = [sys.executable, "-m", "bridgekit", "app", str(bridge), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as server:
            try:
                assert server.stdout
                found = re.search(r"http://\S+", server.stdout.readline())
                assert found
                port = int(urlsplit(found.group(0)).port or 0)
                client(0, port, time.monotonic() + 20, clips, words, Log())  # warm-up: open all encoders and the model
                quiet = measure(server.pid, port, clips, words, lasting)
                heading = f"While {STALLED} connections stall and another client posts the largest JSON allowed:"
                return "\n\n".join([quiet, heading, measure(server.pid, port, clips, words, lasting, attacked=True)])
            finally:
                server.terminate()


def measure(server: int, port: int, clips: list[bytes], words: list[str], lasting: float, *, attacked: bool = False) -> str:
    """Send the requests."""
    log, attack, held = Log(), Log(), []
    before, had = health(port), processor(server)
    started = time.monotonic()
    until = started + lasting
    numbers = range(1 + attacked * CLIENTS, 1 + (1 + attacked) * CLIENTS)
    threads = [threading.Thread(target=client, args=(number, port, until, clips, words, log)) for number in numbers]
    if attacked:
        threads += [threading.Thread(target=target, args=(port, until, attack)) for target in (stall, post)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        held.append(memory(server))
        time.sleep(5)
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - started
    after, had = health(port), processor(server) - had
    rows = []
    for kind in MIX:
        took = sorted(log.seconds[kind])
        rows.append(
            [
                kind,
                f"{len(took):,}",
                f"{log.busy[kind]:,}",
                f"{len(took) / seconds:.1f}",
                *(
                    f"{1000 * took[min(len(took) - 1, int(share * len(took)))]:,.0f}" if took else ""
                    for share in (0.5, 0.95, 0.99)
                ),
            ]
        )
    served = sum(map(len, log.seconds.values()))
    items, batches = (after["encoded"][name] - before["encoded"][name] for name in ("items", "batches"))
    half = len(held) // 2
    lines = [
        table(["request", "served", "busy", "per second", "median, ms", "95 %, ms", "99 %, ms"], rows),
        f"{CLIENTS} clients for {seconds:.0f} s: {served:,} requests served ({served / seconds:.1f} per second), "
        f"{sum(log.busy.values()):,} rejected as busy, {sum(log.errors.values())} errors{_listed(log.errors)}.",
        f"{items:,} inputs were encoded in {batches:,} batches, {items / max(1, batches):.1f} per batch. The server used "
        f"{had / seconds:.2f} of {os.cpu_count()} cores; the clients and other processes used the rest.",
        f"Memory of the server and its decoders: {held[0]:,.0f} MB at the start, "
        f"{statistics.mean(held[1:half]):,.0f} MB in the first half, "
        f"{statistics.mean(held[half:]):,.0f} MB in the second, {held[-1]:,.0f} MB at the end.",
    ]
    if attacked:
        lines.append(f"The attackers: {', '.join(f'{count:,} {what}' for what, count in attack.busy.items())}.")
    return "\n\n".join(lines)


def health(port: int) -> dict[str, dict[str, int]]:
    """The server's health response."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    line.request("GET", "/healthz")
    health: dict[str, dict[str, int]] = json.loads(line.getresponse().read())
    line.close()
    return health


def _listed(errors: Counter[str]) -> str:
    return "".join(f"; {what} ({count} times)" for what, count in errors.items())


if __name__ == "__main__":
    print(main(*map(float, sys.argv[1:])))
