"""The inputs of a request: texts, and uploaded files in a temporary folder for that request."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio.to_thread
from starlette.datastructures import UploadFile
from starlette.requests import Request

from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.media import audio_seconds, image_size
from bridgekit.plugins import plugin_of
from bridgekit.storage.bounded import parse_json, why_no_json
from bridgekit_app.limits import Limits, Refusal, too_large

#: Commas in JSON beyond those that texts may have: every option has a few values.
OPTION_COMMAS = 200
# Also where it is given twice or in pieces (RFC 2231).
_CHARSET = re.compile(r'charset[*\d]*\s*=\s*"?([^;"\s]*)', re.IGNORECASE)


@dataclass(frozen=True)
class Input:
    """One input of a request.

    Arguments:
        modality: name of its form field.
        item: a text, or a file in the request's folder.
        name: the text, or the client's file name.
        weight: weight in a mixture.
    """

    modality: str
    item: Item
    name: str
    weight: float = 1.0


@asynccontextmanager
async def read_request(
    request: Request, folder: Path, limits: Limits
) -> AsyncIterator[tuple[list[Input], dict[str, list[Any]]]]:
    """The inputs of a request in order, and its other fields. Uploaded files are deleted on exit.

    In a multipart form, an input is a field `text`, or a file in a field named after its modality. JSON has only texts:
    `{"text": "a dog"}`, or a list of them.

    Files are put into a temporary folder for this request, inside `folder`.

    Raises:
        Refusal: the body is neither a form nor JSON, is malformed, exceeds a limit, or has no inputs.
    """
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            body = await _bounded_body(request, limits.json_bytes)
            inputs, fields = await anyio.to_thread.run_sync(_from_json, body, limits)
        elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            _check_charset(request.headers["content-type"])
            inputs, fields = await _from_form(request, Path(own), limits)
        else:
            raise Refusal(
                415,
                "the request is neither a form nor JSON",
                where=f"Content-Type: {kind[:100]}",
                remedy="send multipart/form-data (curl -F audio=@clip.wav) or application/json",
            )
        if not inputs:
            raise Refusal(400, "there is no input", remedy="send a text, or a file in a field named audio or image")
        for each in inputs:
            if each.modality == TEXT and len(each.name) > limits.text_characters:
                raise Refusal(413, f"a text is longer than {limits.text_characters:,} characters", where=each.name[:60])
        if len(inputs) > limits.inputs:
            raise Refusal(413, f"there are more than {limits.inputs} inputs", remedy="send several requests")
        yield inputs, fields


async def _bounded_body(request: Request, most: int) -> bytes:
    """The body of a request. All of one that is too large is read, or its client would not see the response, but not kept."""
    body, size = bytearray(), 0
    async for block in request.stream():
        size += len(block)
        if size <= most:
            body += block
    if size > most:
        raise too_large(most, "send fewer or shorter texts, and files in a form")
    return bytes(body)


def _from_json(body: bytes, limits: Limits) -> tuple[list[Input], dict[str, list[Any]]]:
    """The texts and options of a JSON request. Runs in a worker thread: parsing would hold up all other requests."""
    # No request has more values than commas, a few levels aside. In texts within the limits there are commas too.
    most = limits.inputs * limits.text_characters + OPTION_COMMAS
    if body.count(b",") > most:
        raise Refusal(
            413, f"the request has over {most:,} commas, too many for texts and options", remedy="send several requests"
        )
    remedy = 'send an object, e.g. {"text": "a dog"}'
    try:
        document = parse_json(body, lenient=True)
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        broken = f"the request has a broken character ({error.object[error.start]!a})"
        raise Refusal(422, broken, remedy="send text that UTF-8 can encode: surrogates only in pairs") from None
    except ValueError as error:
        raise Refusal(400, f"the request is not JSON that can be read: {why_no_json(error)}"[:200], remedy=remedy) from None
    texts = document.get(TEXT, []) if isinstance(document, dict) else None
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "the texts are missing or are not strings", where=TEXT, remedy=remedy)
    fields = {name: value if isinstance(value, list) else [value] for name, value in document.items() if name != TEXT}
    return [Input(TEXT, text, text) for text in texts], fields


def _check_charset(content_type: str) -> None:
    """Refuse a form in another encoding than UTF-8: its parser would decode it with any codec that Python has."""
    for charset in _CHARSET.findall(content_type):
        if charset.lower() != "utf-8":
            raise Refusal(415, "the form is not in UTF-8", where=f"charset={charset[:100]}", remedy="send it in UTF-8")


async def _from_form(request: Request, folder: Path, limits: Limits) -> tuple[list[Input], dict[str, list[Any]]]:
    inputs: list[Input] = []
    fields: dict[str, list[Any]] = {}
    async with request.form(max_files=limits.inputs, max_fields=limits.inputs + 32, max_part_size=65_536) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if not value.filename and not value.size:
                    continue  # browsers send this for an empty file field
                own = Path(re.split(r"[/\\]", value.filename or name)[-1][:200] or name)
                # Of the client's file name, only the extension is used on disk: some decoders need it.
                file = folder / f"{len(inputs)}{re.sub(r'[^.A-Za-z0-9]', '', own.suffix)[:12]}"
                with file.open("wb") as out:
                    while block := await value.read(1 << 20):
                        out.write(block)
                inputs.append(Input(name, file, own.name))
            elif not value:
                continue  # and this for a field that was left empty
            elif name == TEXT:
                inputs.append(Input(TEXT, value, value))
            else:
                fields.setdefault(name, []).append(value)
    return inputs, fields


def prepare(encoder: Encoder, sent: Input, limits: Limits) -> Any:
    """Check an input's size and run the encoder's `prepare` on it. Runs in a worker thread.

    Raises:
        Refusal: it is too long or too large.
        ItemError: it cannot be read, or the encoder cannot use it.
    """
    try:
        if sent.modality == "audio":
            _check_clip(Path(sent.item), limits)
        elif sent.modality == "image":
            _check_picture(Path(sent.item), limits)
        return encoder.prepare(sent.item)
    except Refusal as error:
        raise Refusal(error.status, error.what, where=sent.name[:100], remedy=error.remedy) from None
    except BridgekitError as error:
        kind = Refusal(400, error.what, where=sent.name[:100], remedy=error.remedy)
        raise kind if sent.modality == TEXT else ItemError(error.what, where=sent.name[:100], remedy=error.remedy) from None
    except Exception as error:  # decoders can raise anything
        reason = f"{plugin_of(encoder)} failed on it: {type(error).__name__}: {str(error)[:200]}"
        raise ItemError(reason, where=sent.name[:100]) from None


def _check_clip(path: Path, limits: Limits) -> None:
    """Refuse a clip that is too long without decoding all of it: a small file can contain hours, and headers can be wrong."""
    with suppress(ItemError):  # an unreadable clip is left to the encoder, which reports why
        if audio_seconds(path, limits.clip_seconds) > limits.clip_seconds:
            raise Refusal(413, f"the clip is longer than {limits.clip_seconds:g} s", remedy="shorten it")


def _check_picture(path: Path, limits: Limits) -> None:
    """Refuse an image whose header gives too large a size, or which is of no format that bridgekit names.

    A decoder process reads the header: a few bytes of some formats make Pillow take gigabytes.
    """
    width, height = image_size(path)
    if width * height > limits.megapixels * 1e6:
        raise Refusal(413, f"the image has over {limits.megapixels:g} megapixels", remedy="scale it down")
