"""The server's limits, and its error responses: the command line's errors with an HTTP status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from bridgekit.errors import BridgekitError, ItemError, PluginError
from bridgekit.plain import without_surrogates


@dataclass(frozen=True)
class Limits:
    """Limits on what clients may use of the server's memory and time.

    Arguments:
        upload_bytes: body of one request.
        json_bytes: the same for JSON, which has only texts and options.
        upload_seconds: time for a body to arrive.
        clip_seconds: length of a clip.
        megapixels: size of an image.
        text_characters: length of a text.
        inputs: inputs per request.
        requests: concurrent requests, from their header to the start of their response.
        connections: open connections. Responses that nobody reads stay in memory, so there is a limit.
        connections_each: the same for one address. Behind loopback all share one: a browser has 6 per window and 50 programs
            have one or two each, so that this is enough for all of them, twice. Half is left for other addresses.
        header_seconds: time for a header to arrive, also for the first one of a connection to begin.
        response_seconds: time for a client to take what has been sent, for example a clip of 1.4 MB at 70 KB/s.
        encoding: items queued for encoding.
        pictures: images queued for generation.
        pictures_address: the same for one address, so that none can fill the queue, whatever its clients call themselves.
        pictures_each: the same for one client: clients at one address are told apart by the name that they give.
        picture_seconds: estimated wait above which a client that is not shown its position in the queue is refused.
        media_bytes: clips and thumbnails cached in memory.
        vectors: embeddings of recent inputs cached per bridge, so that changing only the weights of a mixture encodes nothing.
    """

    upload_bytes: int = 20_000_000
    json_bytes: int = 1_000_000
    upload_seconds: float = 60
    clip_seconds: float = 60
    megapixels: float = 25
    text_characters: int = 1_000
    inputs: int = 16
    requests: int = 128
    connections: int = 400
    connections_each: int = 200
    header_seconds: float = 10
    response_seconds: float = 20
    encoding: int = 256
    pictures: int = 20
    pictures_address: int = 16
    pictures_each: int = 4
    picture_seconds: float = 60
    media_bytes: int = 32_000_000
    vectors: int = 512


class Refusal(BridgekitError):
    """A refused request, with its HTTP status and the seconds for the header `Retry-After`."""

    def __init__(
        self, status: int, what: str, *, where: str | None = None, remedy: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.status, self.retry_after = status, retry_after


def busy(what: str, retry_after: int, *, yours: bool = False) -> Refusal:
    """The error for a full queue: 503, or 429 if the client's own requests fill it."""
    remedy = f"retry in {retry_after} second{'s' if retry_after > 1 else ''}"
    return Refusal(429 if yours else 503, f"busy: {what}", remedy=remedy, retry_after=retry_after)


def too_large(most: int, remedy: str = "send a shorter clip, a smaller image or fewer inputs") -> Refusal:
    """The error for a body of more than `most` bytes."""
    return Refusal(413, f"the request is larger than {most / 1e6:g} MB", remedy=remedy)


def to_json(content: Any) -> str:
    """JSON that UTF-8 can encode, see `without_surrogates`."""
    return without_surrogates(json.dumps(content, ensure_ascii=False, allow_nan=False))


class Answer(JSONResponse):
    """A response in JSON, by `to_json`."""

    def render(self, content: Any) -> bytes:
        """Its body."""
        return to_json(content).encode()


def answer(error: BridgekitError) -> Answer:
    """An error as a response."""
    if isinstance(error, Refusal):
        headers = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return Answer(error.as_json(), error.status, headers)
    status = 500 if isinstance(error, PluginError) else 415 if isinstance(error, ItemError) else 400
    return Answer(error.as_json(), status)
