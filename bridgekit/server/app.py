"""The application: a page for people and an API for programs, on one server.

FastAPI with a small front end of its own, and not Gradio, which would have been the quick way: Gradio brings dozens of
packages, its pages ask the network for fonts, it reports its use unless told not to, and it leaves little say in what a request
may send, which origins may ask, and when work whose client has gone is dropped. Here all of that is a few hundred lines that
can be read, the page works on a train, and programs use the very routes that the page uses.
"""

from __future__ import annotations

import base64
import json
import math
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from bridgekit.diffusion.conditioner import GAPS
from bridgekit.diffusion.painter import mix
from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.server.docs import docs_page, request_body
from bridgekit.server.guard import Guard
from bridgekit.server.jobs import Cancelled, Job
from bridgekit.server.limits import Limits, Refusal, as_json, status_of
from bridgekit.server.shelves import Neighbour
from bridgekit.server.studio import Opened, Studio, Wish, split
from bridgekit.server.uploads import Given, read_request

STATIC = Path(__file__).parent / "static"
#: The files of the page. Nothing else is ever read for a path that a client names.
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/static/recorder.js": ("recorder.js", "text/javascript; charset=utf-8"),
    "/static/style.css": ("style.css", "text/css; charset=utf-8"),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
}
#: By this header, pages behind one address (a proxy's, or several windows) are told apart, so that each has its turn.
CLIENT = "x-bridgekit-client"


# ---- what is asked and answered


def _numbers(value: Any) -> Any:
    """`2,1` as the command line takes it, or a list."""
    parts = value if isinstance(value, list) else [value]
    return [piece for part in parts for piece in (part.split(",") if isinstance(part, str) else [part])]


Weights = Annotated[
    list[Annotated[float, Field(gt=0, le=1000)]],
    BeforeValidator(_numbers),
    Field(description="How much each input counts in a mixture, in their order.", examples=[[2, 1]]),
]


class Options(BaseModel):
    """What every request may say beside its inputs."""

    model_config = ConfigDict(extra="forbid")
    bridge: str | None = Field(None, description="A bridge of this server; the first that `GET /bridge` lists by default.")


class SearchOptions(Options):
    """What a search may say."""

    to: list[str] = Field([], description="Modalities to search; by default the other one, of several text.", max_length=8)
    k: int = Field(5, ge=1, le=50, description="How many to find.")
    weights: Weights | None = Field(None, description="Mix the inputs into one query, by these weights.")
    through: str | None = Field(
        None,
        description="A third modality that stands between two that had no pairs of their own. `none` forbids it; by default it "
        "is found where it is needed.",
    )


class PictureOptions(Options):
    """What a wish for a picture may say. The same as `bridgekit generate` takes."""

    model: str | None = Field(None, description="A text-to-image model of this server; the first of `GET /bridge` by default.")
    weights: Weights | None = None
    prompt: str | None = Field(None, max_length=500, description="Words for the model itself, that steer the style.")
    prompt_weight: float = Field(0.3, ge=0, le=1, description="How much they count beside the inputs.")
    gap: str = Field(GAPS[0], pattern=f"^({'|'.join(GAPS)})$", description="How the gap between modalities is closed.")
    seed: int = Field(0, ge=0, le=2**53, description="The noise's.")
    steps: int | None = Field(None, ge=1, le=100, description="Denoising steps; by default the model's.")
    guidance: float | None = Field(None, ge=0, le=50, description="Guidance scale; 1 is none.")
    size: int | None = Field(None, ge=64, le=1024, description="Side in pixels; by default the model's.")


class Embedding(BaseModel):
    """One input in the shared space."""

    item: str
    modality: str
    embedding: list[float] = Field(description="At unit length: products are cosine similarities.")


class EmbedAnswer(BaseModel):
    """What `/embed` answers."""

    bridge: str
    dim: int
    embeddings: list[Embedding]


class Found(BaseModel):
    """One item found."""

    item: str = Field(description="A text, or the file's name.")
    similarity: float = Field(description="Cosine similarity to the query, from -1 to 1.")
    share: float = Field(
        description="The bridge's own softmax (similarity over its temperature) among all that was searched: how sure it is, "
        "given that one of them is right."
    )
    media: str | None = Field(description="Where a clip (WAV) or a picture (PNG) can be fetched from this server.")


class Result(BaseModel):
    """What one query found in one modality."""

    query: str
    modality: str = Field(description="The query's; `mixture` where inputs were mixed.")
    to: str
    through: str | None
    among: int = Field(description="How many items were searched.")
    found: list[Found]


class SearchAnswer(BaseModel):
    """What `/search` answers."""

    bridge: str
    temperature: float
    results: list[Result]


class Heard(BaseModel):
    """A caption near to what was given."""

    item: str
    similarity: float


class PictureAnswer(BaseModel):
    """What `/generate` answers."""

    bridge: str
    model: str
    prompt: str | None
    gap: str
    seed: int
    inputs: list[str]
    weights: list[float]
    nearest: list[Heard] = Field(description="The captions (or pictures) nearest to the inputs' mixture: what was heard.")
    width: int
    height: int
    seconds: float
    picture: str = Field(description="A PNG in base64. Its metadata say how it was made.")


class Problem(BaseModel):
    """What is wrong, in what, and how to mend it: as the command line's `--json` gives it."""

    what: str
    where: str | None
    fix: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is no success."""

    error: Problem


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request makes no sense, or an option or text is out of bounds."},
    403: {"model": ErrorAnswer, "description": "Another site's page sent it."},
    404: {"model": ErrorAnswer, "description": "There is no such bridge, model, clip or picture."},
    413: {"model": ErrorAnswer, "description": "Too large: the request, a clip, a picture, a text, or the number of inputs."},
    415: {"model": ErrorAnswer, "description": "A file is not what it should be, or is damaged."},
    429: {"model": ErrorAnswer, "description": "Busy with this client's own requests. Retry-After says when to ask again."},
    503: {"model": ErrorAnswer, "description": "Busy. Retry-After says when to ask again."},
}

# ---- routes

routes = APIRouter()
ApiOptions = TypeVar("ApiOptions", bound=Options)


def _studio(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


@asynccontextmanager
async def _asked(request: Request, kind: type[ApiOptions]) -> AsyncIterator[tuple[Opened, list[Given], ApiOptions]]:
    """The bridge, the inputs and the options of a request. The inputs' files go when this ends."""
    studio = _studio(request)
    async with read_request(request, request.app.state.folder, studio.limits) as (inputs, fields):
        options = _options(fields, kind)
        yield await anyio.to_thread.run_sync(studio.open, options.bridge), inputs, options


def _options(fields: Mapping[str, list[Any]], kind: type[ApiOptions]) -> ApiOptions:
    told = {name: values if name in ("to", "weights") else values[-1] for name, values in fields.items() if values}
    try:
        return kind.model_validate(told)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        if first["type"] == "extra_forbidden":
            remedy = f"its options are {', '.join(kind.model_fields)}; inputs are text, or a file named by its modality"
            raise Refusal(400, f"there is no option {where!r}", remedy=remedy) from None
        raise Refusal(400, f"the option {where!r} is wrong: {first['msg']}", remedy="see /docs") from None


def _weights(given: list[float] | None, inputs: list[Given]) -> list[float]:
    if given is not None and len(given) != len(inputs):
        raise Refusal(400, f"{len(given)} weights do not fit {len(inputs)} inputs", remedy="give a number for each, as in 2,1")
    return given or [1.0] * len(inputs)


@routes.post(
    "/embed",
    response_model=EmbedAnswer,
    responses=ERRORS,
    openapi_extra=request_body(Options, {"text": ["a dog barks", "rain"]}, "-F audio=@dog.wav -F 'text=a dog barks'"),
    summary="Inputs as vectors of the shared space",
)
async def embed(request: Request) -> Response:
    """Each input's embedding, at unit length. Inputs of requests that come at the same time are encoded together."""
    async with _asked(request, Options) as (opened, inputs, _):
        vectors = await _studio(request).embed(opened, inputs)
    embeddings = [
        {"item": given.name, "modality": given.modality, "embedding": [round(number, 7) for number in vector]}
        for given, vector in zip(inputs, vectors.tolist(), strict=True)
    ]
    return JSONResponse({"bridge": opened.name, "dim": opened.bridge.dim, "embeddings": embeddings})


@routes.post(
    "/search",
    response_model=SearchAnswer,
    responses=ERRORS,
    openapi_extra=request_body(SearchOptions, {"text": "a dog barks", "k": 3}, "-F audio=@dog.wav -F to=text -F k=3"),
    summary="The nearest of the bridge's own items",
)
async def search(request: Request) -> Response:
    """The items nearest to each input, among those of the tables that the bridge was trained on, and how sure the bridge is."""
    studio = _studio(request)
    async with _asked(request, SearchOptions) as (opened, inputs, options):
        vectors = await studio.embed(opened, inputs)
    kinds = [given.modality for given in inputs]
    queries = [(given.name, given.modality, vector) for given, vector in zip(inputs, split(vectors), strict=True)]
    if options.weights is not None:
        weights = _weights(options.weights, inputs)
        name = " + ".join(given.name for given in inputs)
        queries = [(name, kinds[0] if len(set(kinds)) == 1 else "mixture", mix(split(vectors), weights))]
    results = []
    for target in options.to or _targets(opened, kinds):
        shelf = await anyio.to_thread.run_sync(studio.shelf, opened, target)
        for name, modality, vector in queries:
            through = _through(studio, opened, options.through, kinds, target)
            if through:
                vector = opened.bridge.expected(vector, (await anyio.to_thread.run_sync(studio.shelf, opened, through)).vectors)
            [found] = shelf.nearest(vector, options.k, opened.bridge.temperature)
            results.append(
                {
                    "query": name,
                    "modality": modality,
                    "to": target,
                    "through": through,
                    "among": len(shelf.items),
                    "found": [_found(studio, target, neighbour) for neighbour in found],
                }
            )
    return JSONResponse({"bridge": opened.name, "temperature": opened.bridge.temperature, "results": results})


def _targets(opened: Opened, kinds: list[str]) -> list[str]:
    others = [modality for modality in opened.bridge.sides if modality not in kinds] or list(opened.bridge.sides)
    return [TEXT] if TEXT in others else others[:1]


def _through(studio: Studio, opened: Opened, asked: str | None, kinds: list[str], target: str) -> str | None:
    if asked == "none":
        return None
    if asked:
        opened.bridge.side(asked)
        if asked in (*kinds, target):
            raise Refusal(400, f"{kinds[0]} and {target} cannot meet through {asked}", remedy="name a third modality, or none")
        return asked
    return studio.between(opened, kinds[0], target) if len(set(kinds)) == 1 else None


def _found(studio: Studio, modality: str, neighbour: Neighbour) -> dict[str, Any]:
    item = neighbour.item
    name = studio.media.name(modality, item)
    return {
        "item": item.name if isinstance(item, Path) else item,
        "similarity": round(neighbour.similarity, 6),
        "share": round(neighbour.share, 6),
        "media": f"/media/{name}" if name else None,
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
            "description": "The picture; by the Accept header also the PNG alone, or events as it forms.",
        },
        **ERRORS,
    },
    openapi_extra=request_body(
        PictureOptions, {"text": "penguin", "seed": 1}, "-F audio=@dog.wav -H 'Accept: image/png' -o dog.png"
    ),
    summary="A picture of what was given",
)
async def generate(request: Request) -> Response:
    """Inputs, mixed in the shared space, become one picture. Pictures are drawn one after the other; clients take turns.

    With `Accept: text/event-stream` the answer is a stream of server-sent events: `queued` (how many are before it),
    `started`, `progress` (of loading, fitting and drawing), `preview` (the picture as it forms, a JPEG in base64), and `done`
    with what is otherwise the whole answer, or `error`. Whoever hangs up cancels the work.
    """
    studio = _studio(request)
    async with _asked(request, PictureOptions) as (opened, inputs, options):
        weights = _weights(options.weights, inputs)
        told = options.model_dump(exclude={"bridge", "model", "weights"})
        accept = request.headers.get("accept", "")
        streamed = "text/event-stream" in accept
        wish = Wish(studio.model(options.model), weights, **told, watched=streamed)
        vectors = await studio.embed(opened, inputs)
    client = request.headers.get(CLIENT, "")[:64] or (request.client.host if request.client else "")
    # Whoever looks on sees how many are before; whoever waits blindly would give up.
    patience = math.inf if streamed else studio.limits.picture_seconds
    job = studio.pictures.submit(client, lambda tell: studio.draw(opened, inputs, vectors, wish, tell), patience)
    if streamed:
        return StreamingResponse(_told(request, job), media_type="text/event-stream")
    async for kind, what in job.events(request.is_disconnected):
        if kind == "done":
            if "image/png" in accept:
                return Response(base64.b64decode(what["picture"]), media_type="image/png")
            return JSONResponse(what)
    raise Cancelled


async def _told(request: Request, job: Job) -> AsyncIterator[str]:
    """A job's events as server-sent ones."""
    try:
        async for kind, what in job.events(request.is_disconnected):
            yield _event(kind, {"before": what} if kind == "queued" else what)
    except Cancelled:
        pass
    except BridgekitError as error:
        yield _event("error", as_json(error)["error"])
    except Exception as error:
        yield _event("error", as_json(_unexpected(error))["error"])
        raise
    finally:
        job.cancelled.set()


def _event(kind: str, what: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(what, ensure_ascii=False)}\n\n"


@routes.get("/bridge", responses=ERRORS, summary="The bridges and models of this server")
async def bridge(request: Request) -> dict[str, Any]:
    """What clients may name, the defaults first; each bridge's modalities, and how many items of each it can search."""
    studio = _studio(request)
    limits = studio.limits
    told = await anyio.to_thread.run_sync(studio.describe)
    bounds = {
        "upload_bytes": limits.upload_bytes,
        "clip_seconds": limits.clip_seconds,
        "megapixels": limits.megapixels,
        "text_characters": limits.text_characters,
        "inputs": limits.inputs,
    }
    return {**told, "limits": bounds}


@routes.get("/healthz", summary="Whether the server is up, and how much waits")
async def healthz(request: Request) -> dict[str, Any]:
    """Answers at once, whatever else goes on."""
    studio = _studio(request)
    return {
        "status": "ok",
        "bridgekit": version("bridgekit"),
        "waiting": {"encoding": studio.batcher.waiting(), "pictures": studio.pictures.waiting()},
        "encoded": {"items": studio.batcher.items, "batches": studio.batcher.batches},
    }


@routes.get("/media/{name}", responses={404: ERRORS[404]}, summary="A clip or picture that was found", response_class=Response)
async def media(request: Request, name: str) -> Response:
    """A found clip's first 30 s as WAV, or a found picture as PNG. Names are this run's own and tell nothing."""
    made = await anyio.to_thread.run_sync(_studio(request).media.read, name)
    if made is None:
        raise Refusal(404, "there is no such clip or picture", remedy="search again: names hold as long as the server runs")
    kind, data = made
    headers = {"cache-control": "private, max-age=3600", "accept-ranges": "bytes", "content-security-policy": "sandbox"}
    span = _range(request.headers.get("range", ""), len(data))
    if span is None:
        return Response(data, media_type=kind, headers=headers)
    start, stop = span
    headers["content-range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Response(data[start:stop], 206, media_type=kind, headers=headers)


def _range(asked: str, size: int) -> tuple[int, int] | None:
    """The bytes that a player asks for, from and to, or None for all of them."""
    unit, _, span = asked.partition("=")
    first, _, last = span.partition("-")
    if unit.strip() != "bytes" or not all(part == "" or (part.isascii() and part.isdigit()) for part in (first, last)):
        return None
    if not first:
        return (max(0, size - int(last)), size) if last else None
    start, stop = int(first), min(size, int(last) + 1) if last else size
    return (start, stop) if start < stop else None


@routes.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The API, for people. Made of the same description as /openapi.json, and loads nothing."""
    return HTMLResponse(docs_page(request.app.openapi()))


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
    """The server's application, an ASGI one, behind its guard.

    Arguments:
        bridge: a bridge's folder, offered first, beside those in `bridges`.
        model: a text-to-image model (a plugin's, a diffusers folder or a hub id), offered first, beside the plugins'.
        host: the address it will listen on.
        limits: what it bounds.
        device: a torch device, or `auto`.
        bridges: the folder of bridges.
        warm: open the default bridge and model before the first request asks for them.

    """
    limits = limits or Limits()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        # Private (mode 700), and gone with the server.
        with tempfile.TemporaryDirectory(prefix="bridgekit-app-", ignore_cleanup_errors=True) as folder:
            app.state.folder = Path(folder)
            studio = app.state.studio = Studio(limits, bridges, bridge, model, device)
            if warm:
                with suppress(BridgekitError):
                    studio.pictures.submit(secrets.token_hex(8), studio.warm_up)
            try:
                yield
            finally:
                studio.close()

    app = FastAPI(
        title="bridgekit",
        version=version("bridgekit"),
        description="One shared space for several modalities: embed, search it, and draw pictures of what lies in it.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(routes)
    for path, (name, kind) in PAGE.items():
        app.add_api_route(path, _page(STATIC / name, kind), include_in_schema=False)
    app.add_exception_handler(BridgekitError, _told_off)
    app.add_exception_handler(HTTPException, _told_off)
    app.add_exception_handler(Cancelled, _told_off)
    app.add_exception_handler(Exception, _told_off)
    return Guard(app, limits, host)


def _page(file: Path, kind: str) -> Any:
    data = file.read_bytes()

    async def page() -> Response:
        return Response(data, media_type=kind, headers={"cache-control": "no-cache"})

    return page


async def _told_off(_: Request, error: Exception) -> Response:
    """Any error as JSON."""
    if isinstance(error, Cancelled):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        remedy = "see /docs" if error.status_code in (404, 405) else None
        error = Refusal(error.status_code, str(error.detail)[:300], remedy=remedy)
    if not isinstance(error, BridgekitError):
        error = _unexpected(error)
    later = error.retry_after if isinstance(error, Refusal) else None
    headers = {"retry-after": str(later)} if later is not None else None
    return JSONResponse(as_json(error), status_of(error), headers)


def _unexpected(error: Exception) -> Refusal:
    """An error of our own. What it says may be anybody's path: it is for the server's log."""
    return Refusal(500, f"bridgekit failed on this ({type(error).__name__})", remedy="the server's log tells more; report it")
