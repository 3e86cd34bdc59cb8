"""The server behind `bridgekit app`: what it answers, what it refuses, and what it leaves behind, tested over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bridgekit_app
import httpx
import numpy as np
import pytest
import soundfile
import soxr
import torch
from bridgekit_app import state, uploads
from bridgekit_app.batching import Batcher
from bridgekit_app.jobs import Cancelled, Emit, Job, Queue
from bridgekit_app.limits import Limits, Refusal
from PIL import Image
from served import SMALL, Served, served

from bridgekit import Bridge
from bridgekit.decoding import isolation
from bridgekit.storage.bounded import parse_json
from tests.conftest import Run, tone
from tests.shared import PATIENCE, compressed, wait_until
from tests.spoken_words import WORDS, SpokenWords, say
from tests.torture.bombs import bombs
from tests.torture.command import peak


@pytest.fixture(scope="module")
def server(spoken_words: SpokenWords) -> Iterator[Served]:
    with served(spoken_words) as running:
        yield running


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A spoken word in a voice that the bridge never heard."""
    folder = tmp_path_factory.mktemp("clips")
    return lambda word: say(word, folder / f"{word.replace(' ', '_')}.wav")


def error_of(answer: httpx.Response) -> dict[str, Any]:
    told = answer.json()
    assert set(told) == {"error"}
    assert set(told["error"]) == {"what", "where", "fix"}
    return told["error"]  # type: ignore[no-any-return]


# ---- what it answers


def test_embeddings_are_those_of_the_bridge_in_the_order_of_the_inputs(
    server: Served, spoken_words: SpokenWords, clip: Callable[[str], Path]
) -> None:
    bridge = Bridge.load(spoken_words.bridge)
    texts = server.client.post("/embed", json={"text": ["a cat", "a red apple"]}).json()
    assert texts["dim"] == bridge.dim
    found = torch.tensor([each["embedding"] for each in texts["embeddings"]])
    torch.testing.assert_close(found, bridge.embed("text", ["a cat", "a red apple"]), atol=1e-4, rtol=0)
    picture = spoken_words.home / "starter"
    picture = next(picture.rglob("penguin.png"))
    with clip("cat").open("rb") as sound, picture.open("rb") as image:
        parts: list[Any] = [("image", ("p.png", image)), ("text", (None, "a cat")), ("audio", ("c.wav", sound))]
        mixed = server.client.post("/embed", files=parts).json()
    told = [(each["item"], each["modality"]) for each in mixed["embeddings"]]
    assert told == [("p.png", "image"), ("a cat", "text"), ("c.wav", "audio")]
    found = torch.tensor([each["embedding"] for each in mixed["embeddings"]])
    expected = [bridge.embed("image", [picture]), bridge.embed("text", ["a cat"]), bridge.embed("audio", [clip("cat")])]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=0)


def test_a_clip_in_a_voice_never_heard_finds_its_word_and_its_picture(server: Served, clip: Callable[[str], Path]) -> None:
    right = 0
    for word in WORDS[:8]:
        files = {"audio": clip(word).read_bytes()}
        told = server.client.post("/search", files=files, data={"to": ["text", "image"], "k": 3}).json()
        texts, images = told["results"]
        assert (texts["to"], images["to"], texts["among"]) == ("text", "image", len(WORDS))
        assert len(texts["found"]) == 3
        right += word in [found["item"] for found in texts["found"]]
        picture = server.client.get(images["found"][0]["media"])
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
        assert Image.open(io.BytesIO(picture.content)).size == (224, 224)
    assert right >= 7


@pytest.mark.parametrize(("name", "codec"), [("voice.m4a", "aac"), ("voice.webm", "libopus")])
def test_what_a_phone_or_a_browser_records_is_heard(
    server: Served, clip: Callable[[str], Path], tmp_path: Path, name: str, codec: str
) -> None:
    pytest.importorskip("av")
    samples = soxr.resample(
        soundfile.read(clip("penguin"), dtype="float32")[0], soundfile.info(clip("penguin")).samplerate, 48_000
    )
    with compressed(tmp_path / name, codec, samples[None], 48_000).open("rb") as file:
        told = server.client.post("/search", files={"audio": (name, file)}, data={"to": "text", "k": 3}).json()
    assert "penguin" in [found["item"] for found in told["results"][0]["found"]]


def test_the_confidence_is_the_softmax_at_the_bridges_temperature(
    server: Served, spoken_words: SpokenWords, clip: Callable[[str], Path]
) -> None:
    files = {"audio": clip("trumpet").read_bytes()}
    told = server.client.post("/search", files=files, data={"to": "text", "k": 50}).json()
    found = told["results"][0]["found"]
    assert sum(each["share"] for each in found) == pytest.approx(1, abs=1e-3)
    similarities = torch.tensor([each["similarity"] for each in found])
    shares = (similarities / Bridge.load(spoken_words.bridge).temperature).softmax(0)
    assert [each["share"] for each in found] == pytest.approx(shares.tolist(), abs=1e-3)


def test_text_finds_clips_that_can_be_played_and_seeked(server: Served) -> None:
    told = server.client.post("/search", json={"text": "guitar", "to": ["audio"], "k": 3}).json()
    [result] = told["results"]
    assert [found["item"] for found in result["found"]] == ["guitar.flac"] * 3
    address = result["found"][0]["media"]
    whole = server.client.get(address)
    samples, rate = soundfile.read(io.BytesIO(whole.content))
    assert rate == 24_000
    assert np.abs(samples).max() > 0.05
    part = server.client.get(address, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    assert server.client.get(address, headers={"range": "bytes=-7"}).content == whole.content[-7:]
    assert server.client.get(address, headers={"range": "bytes=nonsense"}).status_code == 200
    many = "9" * 5_000
    for span in ("2-1", "0-1,3-4", f"-{many}", f"0-{many}"):  # not valid, several, or all that there is
        assert server.client.get(address, headers={"range": f"bytes={span}"}).content == whole.content, span
    for span in ("-0", f"{many}-", f"{len(whole.content)}-", f"{many}-{many}"):
        outside = server.client.get(address, headers={"range": f"bytes={span}"})
        assert (outside.status_code, error_of(outside)["what"].startswith("the range is outside")) == (416, True), span
        assert outside.headers["content-range"] == f"bytes */{len(whole.content)}"


def test_two_inputs_are_mixed_by_their_weights(server: Served, clip: Callable[[str], Path]) -> None:
    heard = []
    for weights in ("20,1", "1,20"):
        files = {"audio": clip("snail").read_bytes()}
        told = server.client.post("/search", files=files, data={"text": "violin", "weights": weights, "to": "text"}).json()
        [result] = told["results"]
        assert result["modality"] == "mixture"
        heard.append(result["found"][0]["item"])
    assert sorted(heard) == ["snail", "violin"]
    assert error_of(server.client.post("/search", json={"text": ["a", "b"], "weights": [1]}))["what"].startswith("1 weights")


def test_a_clip_becomes_a_picture_that_records_how_it_was_made(server: Served, clip: Callable[[str], Path]) -> None:
    files = {"audio": ("penguin.wav", clip("penguin").read_bytes())}
    told = server.client.post("/generate", files=files, data={"seed": 3}).json()
    assert "penguin" in [near["item"] for near in told["nearest"]]
    picture = Image.open(io.BytesIO(base64.b64decode(told["picture"])))
    assert picture.size == (told["width"], told["height"]) == (64, 64)
    assert np.asarray(picture).std() > 10
    story = json.loads(picture.info["bridgekit"])
    assert (story["bridge"], story["inputs"], story["seed"]) == ("spoken-words", ["penguin.wav"], 3)
    png = server.client.post("/generate", files=files, data={"seed": 3}, headers={"accept": "image/png"})
    assert png.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png.content))), np.asarray(picture))


def events(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    kind = ""
    for line in answer.iter_lines():
        name, _, rest = line.partition(": ")
        if name == "event":
            kind = rest
        elif name == "data":
            yield kind, json.loads(rest)


def test_a_picture_is_seen_while_it_forms(server: Served) -> None:
    asked = {"text": "rocket", "steps": 10}
    with server.client.stream("POST", "/generate", json=asked, headers={"accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = list(events(answer))
    kinds = [kind for kind, _ in told]
    assert kinds[0] == "queued"
    assert kinds[-1] == "done"
    assert kinds.count("preview") == 4
    shots = [what["picture"] for kind, what in told if kind == "preview"]
    assert len(set(shots)) == 4
    assert all(Image.open(io.BytesIO(base64.b64decode(shot))).size == (64, 64) for shot in shots)
    steps = [what["done"] for kind, what in told if kind == "progress" and what["what"] == "drawing"]
    assert steps[-1] == 10


def test_the_server_lists_its_bridges_and_models(server: Served) -> None:
    told = server.client.get("/bridge").json()
    found, brought = told["bridges"]
    assert (found["name"], found["problem"], set(found["modalities"])) == ("spoken-words", None, {"audio", "text", "image"})
    assert (brought["name"], brought["problem"]) == ("hearing", None), "the one that comes with the starter is last"
    assert [side["items"] for side in found["modalities"].values()] == [3 * len(WORDS), len(WORDS), len(WORDS)]
    assert told["models"][0] == "starter:openmoji-64"
    assert server.client.get("/healthz").json()["status"] == "ok"


def test_a_damaged_bridge_is_reported_and_a_retrained_one_is_reopened(spoken_words: SpokenWords, tmp_path: Path) -> None:
    words = replace(spoken_words, bridges=tmp_path / "bridges")
    shutil.copytree(spoken_words.bridge, words.bridge)
    shutil.copytree(spoken_words.bridge, words.bridges / "damaged")
    os.utime(words.bridges / "damaged" / "bridge.json", (1, 1))  # the older one, so not the default
    (words.bridges / "damaged" / "adapters.safetensors").write_bytes(b"no")
    with served(words) as running:
        problems = {found["name"]: found["problem"] for found in running.client.get("/bridge").json()["bridges"]}
        assert problems["spoken-words"] is None
        assert "damaged" in problems["damaged"]
        answer = running.client.post("/search", json={"text": "cat", "bridge": "damaged"})
        assert (answer.status_code, "damaged" in error_of(answer)["what"]) == (404, True)
        before = running.state.open()
        assert running.state.open() is before
        os.utime(words.bridge / "bridge.json", (2_000_000_000, 2_000_000_000))
        assert running.state.open() is not before


# ---- what it refuses


def wav_of(seconds: float, rate: int = 8_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(int(seconds * rate)), rate, format="WAV", subtype="PCM_U8")
    return buffer.getvalue()


def ogg_of(seconds: float) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 8_000, 1, format="OGG", subtype="VORBIS") as file:
        for _ in range(int(seconds)):  # libsndfile's Vorbis encoder overflows its stack on much at once
            file.write(np.zeros(8_000))
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({"json": {}}, 400, "there is no input"),
    "no JSON": ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "not JSON"),
    "JSON in JSON": (
        {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}},
        400,
        "not JSON",
    ),
    "half a surrogate pair": (
        {"content": rb'{"text": "\ud800"}', "headers": {"content-type": "application/json"}},
        422,
        "a broken character",
    ),
    "half a pair in an option": (
        {"content": rb'{"text": "a", "\udfff": 1}', "headers": {"content-type": "application/json"}},
        422,
        "a broken character",
    ),
    "half a pair in another encoding": (
        {
            "content": b'--x\r\ncontent-disposition: form-data; name="text"\r\n\r\n+2AA-\r\n--x--\r\n',
            "headers": {"content-type": "multipart/form-data; boundary=x; charset=utf-8; charset=utf-7"},
        },
        415,
        "not in UTF-8",
    ),
    "a number for a text": ({"json": {"text": 5}}, 400, "not strings"),
    "another type": ({"content": b"<a/>", "headers": {"content-type": "text/xml"}}, 415, "neither a form nor JSON"),
    "a broken form": (
        {"content": b"--x\r\nno", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        400,
        "",
    ),
    "an empty text": ({"json": {"text": "  "}}, 400, "the text is empty"),
    "a long text": ({"json": {"text": "a" * 51}}, 413, "longer than 50 characters"),
    "many texts": ({"json": {"text": ["a"] * 5}}, 413, "more than 4 inputs"),
    "an option of no name": ({"json": {"text": "a", "colour": "red"}}, 400, "there is no option 'colour'"),
    "a bridge of no name": ({"json": {"text": "a", "bridge": "../../etc"}}, 404, "no such bridge"),
    "an unknown modality": ({"files": {"smell": b"x"}}, 400, "no side for 'smell'"),
    "a text for a clip": ({"data": {"audio": "dog.wav"}}, 400, ""),
    "a file for a text": ({"files": {"text": ("a.txt", b"a dog")}}, 400, "text must be sent as text"),
    "a text called clip": ({"files": {"audio": ("note.wav", b"not a sound at all")}}, 415, "not audio"),
    "an empty clip": ({"files": {"audio": ("e.wav", b"")}}, 415, "empty"),
    "a cut clip": ({"files": {"audio": ("cut.wav", wav_of(1)[:4_000])}}, 415, "cut short"),
    "a long clip": ({"files": {"audio": ("long.wav", wav_of(6))}}, 413, "longer than 5 s"),
    "hours in a few bytes": ({"files": {"audio": ("h.ogg", ogg_of(600))}}, 413, "longer than 5 s"),
    "a text called picture": ({"files": {"image": ("a.png", b"not a picture")}}, 415, "not a picture"),
    "a large picture": ({"files": {"image": ("l.png", png_of(1_000, 1_000))}}, 413, "over 0.5 megapixels"),
    "a bomb": ({"files": {"image": ("b.png", png_of(30_000, 10_000))}}, 413, "over 0.5 megapixels"),
    "a small picture": ({"files": {"image": ("s.png", png_of(2, 2))}}, 415, "too few"),
    "a large file": ({"files": {"audio": b"x" * 500_000}}, 413, "larger than 0.4 MB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_messages_of_the_command_line(server: Served, case: str) -> None:
    request, status, words = REFUSED[case]
    answer = server.client.post("/embed", **request)
    error = error_of(answer)
    assert (answer.status_code, words in error["what"]) == (status, True), error
    assert str(server.folder) not in answer.text
    assert "row" not in str(error["fix"])
    assert not list(server.folder.iterdir())
    assert server.client.post("/embed", json={"text": "cat"}).status_code == 200


def test_options_out_of_bounds_are_refused(server: Served) -> None:
    for route, option, value in [
        ("/search", "k", 0),
        ("/search", "k", 51),
        ("/search", "to", ["smell"]),
        ("/search", "through", "text"),
        ("/search", "weights", [0]),
        ("/generate", "steps", 101),
        ("/generate", "steps", "many"),
        ("/generate", "gap", "wide"),
        ("/generate", "size", 100_000),
        ("/generate", "weights", [1, 2]),
        ("/generate", "guidance", "nan"),
    ]:
        answer = server.client.post(route, json={"text": "cat", option: value})
        assert (answer.status_code, bool(error_of(answer)["fix"])) == (400, True), (option, value)
    answer = server.client.post("/generate", json={"text": "cat", "model": "stranger/model"})
    assert (answer.status_code, error_of(answer)["where"]) == (404, "stranger/model")
    for path in ("/nothing", "/search/", "/static/", "/media/"):
        assert error_of(server.client.get(path, follow_redirects=True))["what"]
    assert server.client.get("/search").status_code == 405


def test_only_its_own_pages_and_local_programs_get_answers(server: Served) -> None:
    port = server.address.rpartition(":")[2]
    ask = {"json": {"text": "cat"}}
    for headers, status in [
        ({}, 200),
        ({"host": f"localhost:{port}"}, 200),
        ({"host": "[::1]:9"}, 200),
        ({"host": f"127.0.0.1:{port}", "origin": f"http://127.0.0.1:{port}", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": f"http://127.0.0.1:{int(port) + 1}"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
    ]:
        answer = server.client.post("/embed", headers=headers, **ask)
        assert answer.status_code == status, headers
        if status == 403:
            assert error_of(answer)["where"]
    for headers in ({"host": "[::1"}, {"host": "127.0.0.1[]"}, {"origin": "http://["}, {"origin": "http://[x]"}):
        answer = server.client.post("/embed", headers=headers, **ask)
        assert (answer.status_code, error_of(answer)["what"].endswith("no valid address")) == (400, True), headers
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert server.client.get("/", headers=link).status_code == 200
    assert (
        server.client.get("/bridge", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}).status_code == 403
    )


def raw(server: Served, request: bytes, *, wait: float = PATIENCE) -> bytes:
    """What a server answers to raw bytes, which no client normalises."""
    with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=wait) as line:
        line.sendall(request)
        answer = b""
        with contextlib.suppress(TimeoutError):
            while block := line.recv(65_536):
                answer += block
        return answer


def test_no_path_leads_to_a_file(server: Served) -> None:
    secret = Path(bridgekit_app.__file__).with_name("limits.py")
    assert b"class Limits" in secret.read_bytes()
    for path in [
        "/static/../limits.py",
        "/static/%2e%2e/limits.py",
        "/static/..%2flimits.py",
        "/static/....//limits.py",
        "/../limits.py",
        "//etc/passwd",
        "/media/..%2f..%2f..%2fetc%2fpasswd",
        "/media/%2fetc%2fpasswd",
        f"/media/{secret}",
        "/static/app.js%00.py",
        "/static",
        "/static/",
        "/media/",
        "/limits.py",
    ]:
        answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        assert b"class Limits" not in answer, path
        assert b"root:" not in answer, path
        assert answer.split(b" ")[1] in (b"404", b"307", b"400"), path


def test_only_search_results_can_be_fetched_and_their_urls_reveal_nothing(server: Served, spoken_words: SpokenWords) -> None:
    told = server.client.post("/search", json={"text": "crown", "to": ["image", "audio"], "k": 2})
    assert str(spoken_words.home) not in told.text
    names = [found["media"] for result in told.json()["results"] for found in result["found"]]
    assert all(re.fullmatch(r"/media/[0-9a-f]{32}", name) for name in names)
    assert len(set(names)) == 4
    assert server.client.get("/media/" + "0" * 32).status_code == 404
    assert server.client.get(names[0].upper().replace("MEDIA", "media")).status_code == 404


def test_every_response_has_the_security_headers(server: Served) -> None:
    answers = [
        server.client.get(path)
        for path in ("/", "/static/app.js", "/static/swagger-ui-bundle.js", "/docs", "/bridge", "/nothing")
    ]
    answers.append(server.client.get("/openapi.json"))
    answers.append(server.client.post("/embed", headers={"host": "evil.example"}))
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in answer.headers or "uvicorn" in answer.headers["server"]


def test_pages_load_nothing_from_elsewhere(server: Served) -> None:
    own = ("app.js", "docs.css", "docs.js", "recorder.js", "style.css", "swagger-ui.css")
    for path in ("/", "/docs", *(f"/static/{name}" for name in own)):
        text = server.client.get(path).text
        assert not re.findall(r"""(?:src|href|url|import|from)\s*[=(]?\s*["'(]?\s*(?:https?:)?//""", text), path


def test_the_api_is_described(server: Served) -> None:
    api = server.client.get("/openapi.json").json()
    for path in ("/embed", "/search", "/generate"):
        route = api["paths"][path]["post"]
        assert set(route["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
        assert {"200", "400", "403", "404", "413", "415", "429", "503"} <= set(route["responses"])
        example = route["requestBody"]["content"]["application/json"]["example"]
        assert server.client.post(path, json=example).status_code == 200
    told = json.dumps(api)
    assert all(word in told for word in ("/generate", "curl -F audio=@dog.wav", "Retry-After", "prompt_weight"))
    assert "swagger-ui-bundle.js" in server.client.get("/docs").text


def test_fields_of_a_form_that_were_left_empty_are_as_if_not_sent(server: Served, clip: Callable[[str], Path]) -> None:
    files = {"audio": clip("cat").read_bytes()}
    answer = server.client.post("/search", files=files, data={"text": "", "bridge": "", "to": ["", "text"], "weights": ""})
    assert answer.status_code == 200
    assert [result["to"] for result in answer.json()["results"]] == ["text"]
    answer = server.client.post("/search", data={"text": ""})
    assert (answer.status_code, error_of(answer)["what"]) == (400, "there is no input")


def test_bodies_with_a_false_length_or_no_end_are_abandoned(spoken_words: SpokenWords) -> None:
    head = "POST /embed HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with served(spoken_words, replace(SMALL, upload_seconds=0.5)) as running:
        slow = raw(running, f'{head}Content-Length: 100\r\n\r\n{{"text"'.encode())
        assert b" 408 " in slow.splitlines()[0]
        chunk = b"%x\r\n%s\r\n" % (100_000, b"x" * 100_000)
        endless = raw(running, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 5 + b"0\r\n\r\n")
        assert b" 413 " in endless.splitlines()[0]
        assert running.client.get("/healthz").json()["status"] == "ok"
        assert not list(running.folder.iterdir())


def test_json_is_bounded_before_it_is_parsed_and_parsed_beside_other_requests(
    spoken_words: SpokenWords, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []

    def parse(body: bytes, **options: Any) -> Any:
        parsed.append(threading.current_thread().name)
        return parse_json(body, **options)

    monkeypatch.setattr(uploads, "parse_json", parse)
    keys = ",".join(f'"{number}":0' for number in range(70_000))
    refused = {
        '{"text": [' + '"a",' * 4_500_000 + '"a"]}': (413, "the request is larger than 1 MB"),
        '{"text": "' + "a" * 1_000_000 + '"}': (413, "the request is larger than 1 MB"),
        '{"text": [' + '"a",' * 240_000 + '"a"]}': (413, "the request has over 16,200 commas"),
        '{"text": "a", ' + keys + "}": (413, "the request has over 16,200 commas"),
        '{"text": "a", "weights": [' + "1," * 16_000 + "1]}": (400, "invalid value for the option 'weights'"),
        '{"text": "a", "weights": "' + "1," * 16_000 + '1"}': (400, "invalid value for the option 'weights"),
        '{"text": "a", "": 1}': (400, "there is no option ''"),
        '{"text": "' + "a" * 999_000 + '"}': (413, "a text is longer than 1,000 characters"),
    }
    with served(spoken_words, Limits()) as running:
        head = {"content-type": "application/json"}
        for body, (status, what) in refused.items():
            answer = running.client.post("/search", content=body, headers=head)
            assert (answer.status_code, error_of(answer)["what"][: len(what)]) == (status, what), body[:30]
        most = {"text": [f"{number}{',' * 998}" for number in range(10, 26)]}
        assert running.client.post("/embed", json=most).status_code == 200
    assert len(parsed) == 5
    assert all("worker thread" in name for name in parsed), "not in the event loop's thread"


def test_uploaded_pictures_are_opened_by_a_decoder_process_and_only_in_named_formats(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: dict[str, tuple[bytes, int, str]] = {"a.png": (png_of(100, 100), 200, ""), "l.png": (png_of(1_000, 600), 413, "")}
    for name, kind in (("a.tif", "TIFF"), ("a.ico", "ICO"), ("a.eps", "EPS"), ("a.tga", "TGA"), ("a.pcx", "PCX")):
        buffer = io.BytesIO()
        Image.new("RGB", (100, 100)).save(buffer, kind)
        pictures[name] = (buffer.getvalue(), 200 if kind == "TIFF" else 415, "" if kind == "TIFF" else "not a picture")

    def here(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("opened in the server's own process")

    monkeypatch.setattr(Image, "open", here)
    for name, (data, status, what) in pictures.items():
        answer = server.client.post("/embed", files={"image": (name, data)})
        assert answer.status_code == status, (name, answer.text)
        assert what in answer.text, name


def test_bombs_go_through_the_upload_path_as_through_the_decoders(server: Served) -> None:
    """Each is answered, refused or with an embedding of the small picture that it is, and the server stays small."""
    before = peak()
    for name, data in bombs().items():
        modality = "image" if Path(name).suffix in (".png", ".gif", ".jpg", ".webp", ".ico", ".tif") else "audio"
        answer = server.client.post("/embed", files={modality: (name, data)})
        assert answer.status_code in (200, 413, 415), (name, answer.text)
        if answer.status_code != 200:
            assert error_of(answer)["what"], name
    assert server.client.get("/healthz").status_code == 200
    assert peak() - before < 500_000_000


def test_media_are_decoded_by_few_processes_which_do_not_stay(
    spoken_words: SpokenWords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "IDLE_SECONDS", 0.5)
    isolation._pool.close()
    with served(spoken_words, replace(Limits(), media_bytes=0)) as running:
        told = running.client.post("/search", json={"text": "crown", "to": ["image", "audio"], "k": 20}).json()
        names = [found["media"] for result in told["results"] for found in result["found"]]
        counts = set[int]()
        with ThreadPoolExecutor(len(names)) as pool:
            answers = [pool.submit(httpx.get, running.address + name, timeout=PATIENCE) for name in names]
            while not all(answer.done() for answer in answers):
                counts.add(len(isolation.decoder_ids()))
                time.sleep(0.02)
        assert {answer.result().status_code for answer in answers} == {200}
        assert 1 <= max(counts) <= (os.cpu_count() or 1)
        wait_until(lambda: not isolation.decoder_ids())


# ---- what it leaves


def test_uploads_go_to_a_private_folder_and_do_not_stay(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.folder.stat().st_mode & 0o777 == 0o700
    seen: list[str] = []

    def prepare(*arguments: Any) -> Any:
        seen.extend(path.name for path in server.folder.rglob("*.wav"))
        return uploads.prepare(*arguments)

    monkeypatch.setattr(state, "prepare", prepare)
    for number in range(3):
        files = {"audio": ("../../escape.wav", tone(tmp_path / f"{number}.wav", 300 + number).read_bytes())}
        assert server.client.post("/embed", files=files).json()["embeddings"][0]["item"] == "escape.wav"
    assert seen == ["0.wav"] * 3
    assert not list(server.folder.iterdir())


def test_inputs_of_requests_are_not_kept_in_the_latent_store(server: Served, spoken_words: SpokenWords) -> None:
    def shards() -> list[tuple[str, int]]:
        return sorted((path.name, path.stat().st_size) for path in (spoken_words.home / "latents").rglob("*.safetensors"))

    before = shards()
    assert server.client.post("/embed", json={"text": "a text that nobody ever sent"}).status_code == 200
    assert shards() == before


# ---- many at once


def test_simultaneous_requests_are_encoded_together_and_none_gets_anothers_answer(
    server: Served, spoken_words: SpokenWords
) -> None:
    texts = [f"{word} number {number}" for number, word in enumerate(WORDS)] * 2
    before = (server.state.batcher.items, server.state.batcher.batches)
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda text: httpx.post(f"{server.address}/embed", json={"text": text}, timeout=600), texts))
    assert {answer.status_code for answer in answers} == {200}
    items, batches = server.state.batcher.items - before[0], server.state.batcher.batches - before[1]
    assert items >= len(WORDS)
    assert batches < items / 2
    found = torch.tensor([answer.json()["embeddings"][0]["embedding"] for answer in answers])
    expected = Bridge.load(spoken_words.bridge).embed("text", texts)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_ten_people_at_once_all_see_their_own_picture_form(spoken_words: SpokenWords, clip: Callable[[str], Path]) -> None:
    sounds = {word: clip(word).read_bytes() for word in WORDS[:10]}

    def person(word: str) -> tuple[list[str], list[str], dict[str, Any]]:
        headers = {"x-bridgekit-client": f"the page of {word}", "accept": "text/event-stream"}
        with httpx.Client(base_url=running.address, timeout=300) as page:
            found = page.post("/search", files={"audio": sounds[word]}, data={"to": "text", "k": 3}).json()["results"][0]
            with page.stream("POST", "/generate", json={"text": word}, headers=headers) as answer:
                told = list(events(answer))
        return [near["item"] for near in found["found"]], [kind for kind, _ in told], told[-1][1]

    with served(spoken_words, Limits()) as running, ThreadPoolExecutor(10) as pool:
        saw = dict(zip(sounds, pool.map(person, sounds), strict=True))
    assert all(kinds[-1] == "done" and "preview" in kinds for _, kinds, _ in saw.values())
    assert all(made["inputs"] == [word] and made["nearest"][0]["item"] == word for word, (_, _, made) in saw.items())
    assert sum(word in heard for word, (heard, _, _) in saw.items()) >= 9


def test_pictures_beyond_the_queues_limits_are_told_to_retry(spoken_words: SpokenWords) -> None:
    with served(spoken_words, replace(SMALL, pictures=3, pictures_each=2)) as running, ThreadPoolExecutor(4) as pool:
        draw, gate = running.state.draw, threading.Event()
        running.state.draw = lambda *arguments, **named: (gate.wait(), draw(*arguments, **named))[1]  # type: ignore[method-assign]

        def draw_for(client: str) -> httpx.Response:
            headers = {"x-bridgekit-client": client}
            return httpx.post(f"{running.address}/generate", json={"text": "cat"}, headers=headers, timeout=300)

        def waiting(count: int) -> None:
            while (running.state.pictures.waiting(), running.state.pictures.busy()) != (count, True):
                time.sleep(0.01)

        served_later = []
        for count, client in enumerate(["one", "one", "one", "two"]):
            served_later.append(pool.submit(draw_for, client))
            waiting(count)
        for client, status in (("one", 429), ("three", 503)):
            answer = draw_for(client)
            assert answer.status_code == status
            assert error_of(answer)["what"].startswith("busy: ")
            assert int(answer.headers["retry-after"]) >= 1
        gate.set()
        assert [later.result().status_code for later in served_later] == [200] * 4
        assert draw_for("three").status_code == 200


def test_requests_beyond_the_limit_are_told_to_retry(spoken_words: SpokenWords) -> None:
    with served(spoken_words, replace(SMALL, requests=2)) as running:
        body = {"text": "cat", "steps": 20}
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: httpx.post(f"{running.address}/generate", json=body, timeout=600), range(6)))
        assert {answer.status_code for answer in answers} == {200, 503}


def test_an_encoder_with_a_full_queue_says_busy(spoken_words: SpokenWords) -> None:
    with pytest.raises(Refusal, match="busy") as refused:
        asyncio.run(Batcher(most=3).embed(Bridge.load(spoken_words.bridge), "text", [[1]] * 4))
    assert (refused.value.status, refused.value.retry_after) == (503, 1)


def test_an_encoder_that_fails_answers_everyone_in_the_batch_and_goes_on() -> None:
    class Encoder:
        revision, dim = "toy@1", 1

        def encode(self, batch: list[int]) -> torch.Tensor:
            if 0 in batch:
                raise ValueError("zero")
            return torch.tensor(batch, dtype=torch.float32)[:, None]

    bridge: Any = SimpleNamespace(encoder=lambda modality: Encoder(), project=lambda modality, latents: latents)

    async def main() -> None:
        batcher = Batcher(most=8)
        failed = await asyncio.gather(*(batcher.embed(bridge, "text", [n]) for n in (0, 1)), return_exceptions=True)
        assert all("ValueError: zero" in str(error) for error in failed)
        left = asyncio.create_task(batcher.embed(bridge, "text", [0]))
        await asyncio.sleep(0)
        left.cancel()  # a request that is cancelled while it waits is not encoded
        rows = await asyncio.gather(batcher.embed(bridge, "text", [2, 3]), batcher.embed(bridge, "text", [4]))
        assert [row.flatten().tolist() for row in rows] == [[2, 3], [4]]
        assert (batcher.batches, batcher.items, batcher.waiting()) == (1, 3, 0)

    asyncio.run(main())


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
def test_a_client_that_hangs_up_cancels_its_drawing(server: Served, monkeypatch: pytest.MonkeyPatch, accept: str) -> None:
    began, ends = threading.Event(), list[str]()
    draw = server.state.draw

    def watched(*arguments: Any, **named: Any) -> Any:
        began.set()
        try:
            made = draw(*arguments, **named)
        except BaseException as error:
            ends.append(type(error).__name__)
            raise
        ends.append("drawn")
        return made

    monkeypatch.setattr(server.state, "draw", watched)
    line = http.client.HTTPConnection("127.0.0.1", int(server.address.rpartition(":")[2]))
    body = json.dumps({"text": "cat", "steps": 100})
    line.request("POST", "/generate", body, {"content-type": "application/json", "accept": accept})
    began.wait()
    line.close()
    while not ends:
        time.sleep(0.05)
    assert ends == ["Cancelled"]
    assert server.client.post("/generate", json={"text": "cat"}).status_code == 200


# ---- the queue by itself


async def outcome(job: Job) -> Any:
    async def here() -> bool:
        return False

    async for kind, what in job.events(here):
        if kind == "done":
            return what
    return None


def test_clients_take_turns_however_many_jobs_one_of_them_has() -> None:
    async def main() -> list[str]:
        queue, order, began, gate = Queue("jobs", 10, 5), list[str](), threading.Event(), threading.Event()

        def work(name: str) -> Callable[[Emit], Any]:
            return lambda _: (began.set(), gate.wait(), order.append(name))

        jobs = [queue.submit("a", work("a1"))]
        began.wait()
        jobs += [queue.submit(name[0], work(name)) for name in ("a2", "a3", "a4", "b1", "c1", "b2")]
        jobs[5].cancelled.set()
        gate.set()
        for job in jobs[:5] + jobs[6:]:
            await outcome(job)
        queue.close()
        return order

    assert asyncio.run(main()) == ["a1", "a2", "b1", "a3", "b2", "a4"]


def test_an_address_gets_no_more_turns_and_places_for_the_names_it_makes_up() -> None:
    async def main() -> list[str]:
        queue, order, began, gate = Queue("jobs", 10, 5, most_address=6), list[str](), threading.Event(), threading.Event()

        def work(name: str) -> Callable[[Emit], Any]:
            return lambda _: (began.set(), gate.wait(), order.append(name))

        jobs = [queue.submit("made up 0", work("bad 0"), address="bad")]
        began.wait()
        jobs += [queue.submit(f"made up {number}", work(f"bad {number}"), address="bad") for number in range(1, 7)]
        with pytest.raises(Refusal, match="6 jobs of your address are already queued") as refused:
            queue.submit("made up 7", work("bad 7"), address="bad")
        assert refused.value.status == 429
        jobs += [queue.submit(name[:1], work(name), address="good") for name in ("a1", "a2", "b1")]
        gate.set()
        for job in jobs:
            await outcome(job)
        queue.close()
        return order

    assert asyncio.run(main())[:7] == ["bad 0", "bad 1", "a1", "bad 2", "b1", "bad 3", "a2"]


def test_work_that_would_wait_longer_than_its_client_is_refused() -> None:
    async def main() -> None:
        queue, gate = Queue("jobs", 10, 5), threading.Event()
        assert await outcome(queue.submit("a", lambda _: time.sleep(0.2))) is None
        began = threading.Event()
        running = queue.submit("a", lambda _: began.set() or gate.wait())
        await asyncio.to_thread(began.wait)
        first = queue.submit("b", lambda _: "first", patience=0.1)  # nobody waits before it
        with pytest.raises(Refusal, match="busy: 1 jobs are already queued"):
            queue.submit("c", lambda _: "second", patience=0.1)
        second = queue.submit("c", lambda _: "second")
        gate.set()
        assert [await outcome(job) for job in (running, first, second)] == [True, "first", "second"]
        queue.close()

    asyncio.run(main())


def test_what_comes_before_the_first_job_is_told_and_is_not_counted_as_a_job_ahead() -> None:
    async def main() -> list[tuple[str, Any]]:
        gate = threading.Event()

        def first(tell: Emit) -> None:
            tell("progress", {"what": "fitting", "done": 1, "of": 2})
            gate.wait()
            raise ValueError("is met by each job itself")

        queue = Queue("jobs", 10, 5, first)
        while queue.preparing["what"] != "fitting":
            await asyncio.sleep(0.01)
        job, told = queue.submit("a", lambda _: "made", patience=0.1), []

        async def here() -> bool:
            return False

        async for event in job.events(here):
            told.append(event)
            gate.set()
        assert queue.preparing is None
        queue.close()
        return told

    fitting = ("preparing", {"what": "fitting", "done": 1, "of": 2})
    assert asyncio.run(main()) == [("queued", 0), fitting, ("started", None), ("done", "made")]


def test_failed_work_is_reported_to_its_client_and_the_next_is_done() -> None:
    async def main() -> None:
        queue = Queue("jobs", 10, 5)

        def fails(_: Emit) -> None:
            raise ValueError("no")

        bad, good = queue.submit("a", fails), queue.submit("a", lambda _: "yes")
        with pytest.raises(ValueError, match="no"):
            await outcome(bad)
        assert await outcome(good) == "yes"
        queue.close()

    asyncio.run(main())


def test_work_whose_client_has_gone_is_cancelled_when_it_next_reports_progress() -> None:
    async def main() -> list[str]:
        queue, ends = Queue("jobs", 10, 5), list[str]()

        def work(tell: Emit) -> None:
            try:
                while True:
                    tell("progress", 1)
                    time.sleep(0.01)
            except Cancelled:
                ends.append("cancelled")
                raise

        job = queue.submit("a", work)

        async def here() -> bool:
            return False

        async for kind, _ in job.events(here):
            if kind == "progress":
                break
        job.cancelled.set()
        assert await outcome(queue.submit("b", lambda _: "next")) == "next"
        queue.close()
        return ends

    assert asyncio.run(main()) == ["cancelled"]


# ---- the command


def start(words: SpokenWords, folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`bridgekit app` in a process of its own, and the address that it prints."""
    environment = {
        **os.environ,
        "BRIDGEKIT_HOME": str(words.home),
        "BRIDGEKIT_OUTSIDE": "yes",
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "bridgekit", "app", str(words.bridge), "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, (line, process.stderr.read() if process.stderr else "")
    return process, found.group(0)


def test_ctrl_c_stops_the_server_in_the_middle_of_a_picture_and_leaves_nothing_behind(
    spoken_words: SpokenWords, tmp_path: Path
) -> None:
    process, address = start(spoken_words, tmp_path)
    try:
        assert address.startswith("http://127.0.0.1:")
        assert httpx.get(address, timeout=600).status_code == 200
        body = {"text": "cat", "steps": 100}
        with httpx.stream(
            "POST", f"{address}/generate", json=body, headers={"accept": "text/event-stream"}, timeout=600
        ) as answer:
            next(kind for kind, _ in events(answer) if kind == "preview")
            assert list(tmp_path.glob("bridgekit-app-*"))
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "stopped" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("bridgekit-app-*"))


def test_what_cannot_be_served_is_reported_at_once(
    run: Run, spoken_words: SpokenWords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridgekit.plugins.bundled_bridge", lambda: None)
    code, _, err = run("app")
    assert (code, "there is no bridge" in err) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run("app", spoken_words.bridge, "--port", taken.getsockname()[1])
    assert (code, "cannot listen" in err, "--port" in err) == (2, True, True)
    code, _, err = run("app", spoken_words.bridge, "--host", "203.0.113.7", "--port", 0)
    assert (code, "203.0.113.7" in err) == (2, True)


def test_the_temporary_folder_goes_with_the_server(spoken_words: SpokenWords) -> None:
    with served(spoken_words) as running:
        folder = running.folder
        assert folder.is_dir()
        assert folder.parent == Path(tempfile.gettempdir())
    assert not folder.exists()
