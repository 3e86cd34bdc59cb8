"""What the server bounds, and how it refuses: with the command line's errors, and the HTTP status that fits."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import JSONResponse

from bridgekit.errors import BridgekitError, ItemError, PluginError


@dataclass(frozen=True)
class Limits:
    """Bounds of one server, so that neither a mistake nor malice exhausts its memory or time.

    Arguments:
        upload_bytes: in the body of one request.
        upload_seconds: within which a body must arrive.
        clip_seconds: the length of a clip.
        megapixels: the size of a picture.
        text_characters: the length of a text.
        inputs: in one request.
        requests: answered at the same time.
        encoding: items that wait for an encoder.
        pictures: that wait to be drawn.
        pictures_each: of those, how many one client may have.
        picture_seconds: how long a client that does not see its place in the queue may have to wait.
        media_bytes: of clips and thumbnails that are kept in memory.
        vectors: embeddings of recent inputs that are kept, so that a new mixture of them encodes nothing.
    """

    upload_bytes: int = 20_000_000
    upload_seconds: float = 60
    clip_seconds: float = 60
    megapixels: float = 25
    text_characters: int = 1_000
    inputs: int = 16
    requests: int = 128
    encoding: int = 256
    pictures: int = 16
    pictures_each: int = 4
    picture_seconds: float = 60
    media_bytes: int = 32_000_000
    vectors: int = 512


class Refusal(BridgekitError):
    """A request that is not served.

    Arguments:
        status: the HTTP status.
        what, where, remedy: as for `BridgekitError`.
        retry_after: seconds after which another try is worth it.
    """

    def __init__(
        self,
        status: int,
        what: str,
        *,
        where: str | None = None,
        remedy: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.status, self.retry_after = status, retry_after


def busy(what: str, retry_after: int, *, yours: bool = False) -> Refusal:
    """The answer to a request for which there is no room: 503, or 429 where it is the client's own requests that fill it."""
    remedy = f"ask again in {retry_after} second{'s' if retry_after > 1 else ''}"
    return Refusal(429 if yours else 503, f"busy: {what}", remedy=remedy, retry_after=retry_after)


def answer(error: BridgekitError) -> JSONResponse:
    """An error as the answer to a request."""
    if isinstance(error, Refusal):
        headers = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return JSONResponse(error.as_json(), error.status, headers)
    status = 500 if isinstance(error, PluginError) else 415 if isinstance(error, ItemError) else 400
    return JSONResponse(error.as_json(), status)
