"""The FastAPI application: the web page and the API it uses.

Why not Gradio: it has dozens of dependencies, loads fonts from the network, sends telemetry by default, and gives little
control over uploads, allowed origins and cancelling the work of clients that have disconnected.
"""

from __future__ import annotations

import asyncio
import base64
import math
import re
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
import torch
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from bridgekit.bridge.provenance import installed_version
from bridgekit.diffusion.models import DrawOptions
from bridgekit.diffusion.painter import mix
from bridgekit.encoders import TEXT, Blob
from bridgekit.errors import BridgekitError
from bridgekit.retrieval import Hit
from bridgekit_app.galleries import Gallery
from bridgekit_app.guard import DOCS_POLICY, POLICY, Guard
from bridgekit_app.jobs import Cancelled, Emit, Job
from bridgekit_app.limits import Answer, Limits, Refusal, answer, to_json
from bridgekit_app.schema import (
    ERRORS,
    OUTSIDE,
    EmbedAnswer,
    GenerateOptions,
    Options,
    PictureAnswer,
    SearchAnswer,
    SearchOptions,
    request_body,
)
from bridgekit_app.state import AppState, Opened
from bridgekit_app.uploads import Input, read_request

STATIC = Path(__file__).parent / "static"
#: Swagger UI. The package has its files, which FastAPI itself would load from a CDN; nothing else of it is used.
SWAGGER = Path(str(files("fastapi_offline"))) / "static"
HTML, SCRIPT, STYLE = (f"text/{kind}; charset=utf-8" for kind in ("html", "javascript", "css"))
#: The files of the pages, and the only files served by path.
PAGES = {
    "/": (STATIC / "index.html", HTML),
    "/docs": (STATIC / "docs.html", HTML),
    "/static/app.js": (STATIC / "app.js", SCRIPT),
    "/static/docs.css": (STATIC / "docs.css", STYLE),
    "/static/docs.js": (STATIC / "docs.js", SCRIPT),
    "/static/icon.svg": (STATIC / "icon.svg", "image/svg+xml"),
    "/static/recorder.js": (STATIC / "recorder.js", SCRIPT),
    "/static/style.css": (STATIC / "style.css", STYLE),
    "/static/swagger-ui-bundle.js": (SWAGGER / "swagger-ui-bundle.js", SCRIPT),
    "/static/swagger-ui.css": (SWAGGER / "swagger-ui.css", STYLE),
}
#: Where the server listens by default, for examples.
ADDRESS = "http://127.0.0.1:7860"
#: Header that distinguishes clients with the same address (several windows, or a proxy), which share that address's turns.
CLIENT = "x-bridgekit-client"
_ONE_RANGE = re.compile(r"bytes=[ \t]*(\d*)-(\d*)[ \t]*", re.ASCII | re.IGNORECASE)

routes = APIRouter()
AnyOptions = TypeVar("AnyOptions", bound=Options)


# ---- reading requests


def _state(request: Request) -> AppState:
    state: AppState = request.app.state.bridgekit
    return state


@asynccontextmanager
async def _read(request: Request, kind: type[AnyOptions]) -> AsyncIterator[tuple[Opened, list[Input], AnyOptions]]:
    """The bridge, inputs and options of a request. Uploaded files are deleted on exit."""
    state = _state(request)
    async with read_request(request, request.app.state.folder, state.limits) as (inputs, fields):
        options = _options(fields, kind)
        yield await anyio.to_thread.run_sync(state.open, options.bridge), inputs, options


def _options(fields: Mapping[str, list[Any]], kind: type[AnyOptions]) -> AnyOptions:
    values = {name: sent if name in ("to", "weights") else sent[-1] for name, sent in fields.items() if sent}
    unknown = next((name for name in values if name not in kind.model_fields), None)
    if unknown is not None:  # without validation: there may be thousands
        remedy = f"options are {', '.join(kind.model_fields)}; inputs are fields named after a modality"
        raise Refusal(400, f"there is no option {unknown[:100]!r}", remedy=remedy)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise Refusal(400, f"invalid value for the option {where!r}: {first['msg']}", remedy="see /docs") from None


def _weighted(inputs: Sequence[Input], weights: Sequence[float] | None) -> list[Input]:
    """The inputs with their weights, by default equal."""
    if weights is not None and len(weights) != len(inputs):
        raise Refusal(400, f"{len(weights)} weights for {len(inputs)} inputs", remedy="give one weight per input, e.g. 2,1")
    return [replace(each, weight=weight) for each, weight in zip(inputs, weights or [1.0] * len(inputs), strict=True)]


# ---- routes


@routes.post(
    "/embed",
    response_model=EmbedAnswer,
    responses=ERRORS,
    openapi_extra=request_body(
        Options, {"text": ["a dog barks", "rain"]}, f"curl -F audio=@dog.wav -F 'text=a dog barks' {ADDRESS}/embed"
    ),
    summary="Embed inputs",
)
async def embed(request: Request) -> Response:
    """Unit-length embeddings of the inputs. Inputs of concurrent requests are encoded as one batch."""
    async with _read(request, Options) as (opened, inputs, _):
        vectors = await _state(request).embed(opened, inputs)
    embeddings = [
        {"item": each.name, "modality": each.modality, "embedding": [round(number, 7) for number in vector]}
        for each, vector in zip(inputs, vectors.tolist(), strict=True)
    ]
    return Answer({"bridge": opened.name, "dim": opened.bridge.dim, "embeddings": embeddings})


@routes.post(
    "/search",
    response_model=SearchAnswer,
    responses=ERRORS,
    openapi_extra=request_body(
        SearchOptions, {"text": "a dog barks", "k": 3}, f"curl -F audio=@dog.wav -F to=text -F k=3 {ADDRESS}/search"
    ),
    summary="Search the bridge's own items",
)
async def search(request: Request) -> Response:
    """The items nearest to each input among those of the bridge's training tables, with the bridge's confidence in each."""
    state = _state(request)
    async with _read(request, SearchOptions) as (opened, inputs, options):
        vectors = await state.embed(opened, inputs)
    modalities = [each.modality for each in inputs]
    queries = _queries(inputs, vectors, options.weights)
    results = []
    for target in options.to or _targets(opened, modalities):
        gallery = await anyio.to_thread.run_sync(state.gallery, opened, target)
        through = _through(state, opened, options.through, modalities, target)
        between = await anyio.to_thread.run_sync(state.gallery, opened, through) if through else None
        for name, modality, vector in queries:
            query = opened.bridge.expected(vector, between.vectors) if between else vector
            penalty = gallery.penalty(opened.bridge, through or modality)
            hits = gallery.search(query, options.k, opened.bridge.temperature, penalty)
            [heard] = opened.bridge.heard(modality, vector, [[hit for hit, _ in hits if target == TEXT]])
            results.append(
                {
                    "query": name,
                    "modality": modality,
                    "to": target,
                    "through": through,
                    "among": len(gallery.items),
                    **asdict(heard),
                    "found": [_found(state, gallery, target, hit, share) for hit, share in hits],
                }
            )
    return Answer({"bridge": opened.name, "temperature": opened.bridge.temperature, "results": results})


def _queries(inputs: Sequence[Input], vectors: Tensor, weights: Sequence[float] | None) -> list[tuple[str, str, Tensor]]:
    """Name, modality and (1, dim) vector of each query: the inputs, or, if there are weights, their mixture."""
    if weights is None:
        return [(each.name, each.modality, vector) for each, vector in zip(inputs, torch.split(vectors, 1), strict=True)]
    mixed = mix(torch.split(vectors, 1), [each.weight for each in _weighted(inputs, weights)])
    modalities = {each.modality for each in inputs}
    return [(" + ".join(each.name for each in inputs), modalities.pop() if len(modalities) == 1 else "mixture", mixed)]


def _targets(opened: Opened, modalities: Sequence[str]) -> list[str]:
    """The default modality to search: text, or for text queries the first other one."""
    others = [modality for modality in opened.bridge.sides if modality not in modalities] or list(opened.bridge.sides)
    return [TEXT] if TEXT in others else others[:1]


def _through(state: AppState, opened: Opened, named: str | None, modalities: Sequence[str], target: str) -> str | None:
    """The third modality to search through: the requested one, one that is needed, or None."""
    if named == "none":
        return None
    if named:
        opened.bridge.side(named)
        if named in (*modalities, target):
            what = f"{named} cannot link {modalities[0]} and {target}"
            raise Refusal(400, what, remedy="choose a third modality, or none")
        return named
    return state.between(opened, modalities[0], target) if len(set(modalities)) == 1 else None


def _found(state: AppState, gallery: Gallery, modality: str, hit: Hit, share: float) -> dict[str, Any]:
    item = hit.item
    name = state.media.name(modality, item)
    return {
        "item": item.label if isinstance(item, Blob) else item.name if isinstance(item, Path) else item,
        "similarity": round(hit.similarity, 6),
        "share": round(share, 6),
        "media": f"/media/{name}" if name else None,
        "captions": gallery.about.captions.get(item, []),
        "columns": hit.columns,
    }


@routes.post(
    "/generate",
    response_model=PictureAnswer,
    responses={
        200: {
            "content": {
                "image/png": {},
                "text/event-stream": {
                    "schema": {"type": "string"},
                    "example": 'event: preview\ndata: {"step": 2, "of": 10, "picture": "<JPEG in base64>"}\n\n',
                },
            },
            "description": "The image as JSON; depending on the Accept header, as PNG or as a stream of events.",
        },
        **ERRORS,
    },
    openapi_extra=request_body(
        GenerateOptions,
        {"text": "penguin", "seed": 1},
        f"curl -F audio=@dog.wav -H 'Accept: image/png' -o dog.png {ADDRESS}/generate",
    ),
    summary="Generate an image",
)
async def generate(request: Request) -> Response:
    """One image from the mixture of the inputs. Images are generated one at a time, round-robin over addresses, and over the
    clients of each: name yours in the header `X-Bridgekit-Client`.

    With `Accept: text/event-stream` the response is a stream of server-sent events: `queued` (number of jobs ahead),
    `preparing` (only after the server's start: progress of fitting the default bridge to the default model), `started`,
    `progress` (loading, fitting, drawing), `preview` (base64-encoded JPEG), then `done` with the JSON response, or `error`.
    Disconnecting cancels the job.
    """
    state = _state(request)
    async with _read(request, GenerateOptions) as (opened, inputs, options):
        inputs = _weighted(inputs, options.weights)
        model = state.model(options.model)
        drawing = DrawOptions(**options.model_dump(exclude={"bridge", "model", "weights", "seed"}))
        vectors = await state.embed(opened, inputs)
    accept = request.headers.get("accept", "")
    streamed = "text/event-stream" in accept
    client, address = request.headers.get(CLIENT, "")[:64], request.client.host if request.client else ""

    def work(emit: Emit) -> dict[str, Any]:
        return state.draw(opened, model, inputs, vectors, drawing, seed=options.seed, previews=streamed, emit=emit)

    # A streaming client sees its position in the queue and can decide how long to wait; others would time out.
    patience = math.inf if streamed else state.limits.picture_seconds
    job = state.pictures.submit(client, work, patience, address=address)
    if streamed:
        return StreamingResponse(_server_sent(request, job), media_type="text/event-stream")
    async for kind, data in job.events(request.is_disconnected):
        if kind == "done":
            if "image/png" in accept:
                return Response(base64.b64decode(data["picture"]), media_type="image/png")
            return Answer(data)
    raise Cancelled


async def _server_sent(request: Request, job: Job) -> AsyncIterator[str]:
    """A job's events as server-sent events."""
    try:
        async for kind, data in job.events(request.is_disconnected):
            yield _event(kind, {"before": data} if kind == "queued" else data)
    except Cancelled:
        pass
    except BridgekitError as error:
        yield _event("error", error.as_json()["error"])
    except Exception as error:
        yield _event("error", _unexpected(error).as_json()["error"])
        raise
    finally:
        job.cancelled.set()


def _event(kind: str, data: Any) -> str:
    return f"event: {kind}\ndata: {to_json(data)}\n\n"


@routes.get("/bridge", responses=ERRORS, summary="The bridges and models of this server")
async def bridge(request: Request) -> Response:
    """The available bridges and models, defaults first, with each bridge's modalities and numbers of searchable items."""
    state = _state(request)
    names = ("upload_bytes", "clip_seconds", "megapixels", "text_characters", "inputs")
    limits = {name: getattr(state.limits, name) for name in names}
    return Answer({**await anyio.to_thread.run_sync(state.describe), "limits": limits})


@routes.get("/healthz", summary="Health check and queue lengths")
async def healthz(request: Request) -> dict[str, Any]:
    """Responds immediately, even under load. `preparing` is the progress of what images wait for after the start, or null."""
    state = _state(request)
    return {
        "status": "ok",
        "bridgekit": installed_version(),
        "preparing": state.pictures.preparing,
        "waiting": {"encoding": state.batcher.waiting(), "pictures": state.pictures.waiting()},
        "encoded": {"items": state.batcher.items, "batches": state.batcher.batches},
    }


@routes.get(
    "/media/{name}",
    responses={404: ERRORS[404], 416: OUTSIDE},
    summary="A clip or image found by a search",
    response_class=Response,
)
async def media(request: Request, name: str) -> Response:
    """The first 30 s of a clip as WAV, or an image as PNG. Names are valid until the server stops."""
    made = await _state(request).found(name)
    if made is None:
        raise Refusal(404, "there is no such clip or image", remedy="search again: names are valid until the server stops")
    kind, data = made
    headers = {"cache-control": "private, max-age=3600", "accept-ranges": "bytes", "content-security-policy": "sandbox"}
    span = _range(request.headers.get("range", ""), len(data))
    if span is None:
        return Response(data, media_type=kind, headers=headers)
    start, stop = span
    if start >= stop:
        refused = answer(Refusal(416, f"the range is outside of the file's {len(data):,} bytes", remedy="ask for another"))
        refused.headers["content-range"] = f"bytes */{len(data)}"
        return refused
    headers["content-range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Response(data[start:stop], 206, media_type=kind, headers=headers)


def _range(header: str, size: int) -> tuple[int, int] | None:
    """Start and stop of a `Range` header by RFC 9110, 14.1.2: the same number twice if the file has nothing of it.

    None for the whole file: there is no header, it is not valid, or it has several ranges.
    """
    found = _ONE_RANGE.fullmatch(header)
    first, last = found.groups() if found else ("", "")
    if not first:
        return (max(0, size - _number(last)), size) if last else None
    if last and _number(last) < _number(first):
        return None
    return _number(first), min(size, _number(last) + 1) if last else size


def _number(digits: str) -> int:
    """Digits as a number, or one that is larger than any file: Python refuses to convert thousands of digits."""
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) <= 20 else 10**20


# ---- the application


def create_app(
    bridge: Path | None = None,
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    limits: Limits | None = None,
    device: str = "auto",
    bridges: Path = Path("bridges"),
    warm: bool = True,
) -> Guard:
    """The server as an ASGI application.

    Arguments:
        bridge: a bridge folder in addition to those in `bridges`; becomes the default.
        model: a text-to-image model (a diffusers folder or Hub ID) in addition to the plugins'; becomes the default.
        host: the address the server will listen on.
        limits: the server's limits.
        device: a torch device, or `auto`.
        bridges: folder of bridges.
        warm: open the default bridge and model, and fit its conditioner, at start rather than on the first request.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Mode 700, and deleted when the server stops.
        with tempfile.TemporaryDirectory(prefix="bridgekit-app-", ignore_cleanup_errors=True) as folder:
            app.state.folder = Path(folder)
            state = app.state.bridgekit = AppState(limits, bridges, bridge, model, device, warm)
            retiring = asyncio.create_task(state.retire_decoders())
            try:
                yield
            finally:
                retiring.cancel()
                state.close()

    app = FastAPI(
        title="bridgekit",
        version=installed_version(),
        description="Embed, search and generate images from audio, images and text in one shared embedding space.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(routes)
    for path, (file, kind) in PAGES.items():
        app.add_api_route(path, _page(file, kind, DOCS_POLICY if path == "/docs" else POLICY), include_in_schema=False)
    for error in (BridgekitError, HTTPException, Cancelled, ClientDisconnect, Exception):
        app.add_exception_handler(error, _error_answer)
    return Guard(app, limits, host)


def _page(file: Path, kind: str, policy: str) -> Any:
    data = file.read_bytes()

    async def page() -> Response:
        return Response(data, media_type=kind, headers={"cache-control": "no-cache", "content-security-policy": policy})

    return page


async def _error_answer(_: Request, error: Exception) -> Response:
    """Any error as JSON."""
    if isinstance(error, Cancelled | ClientDisconnect):
        return Response(status_code=499)  # the client has disconnected
    if isinstance(error, HTTPException):
        remedy = "see /docs" if error.status_code in (404, 405) else None
        error = Refusal(error.status_code, str(error.detail)[:300], remedy=remedy)
    if not isinstance(error, BridgekitError):
        error = _unexpected(error)
    return answer(error)


def _unexpected(error: Exception) -> Refusal:
    """The error for a bug in bridgekit. The original message may contain paths, so it goes only to the server's log."""
    return Refusal(500, f"internal error ({type(error).__name__})", remedy="see the server's log, and report it")
