"""What the API takes and answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bridgekit.diffusion.conditioner import GAPS


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
    """The options of every request."""

    model_config = ConfigDict(extra="forbid")
    bridge: str | None = Field(None, description="A bridge of this server; by default the first that `GET /bridge` lists.")


class SearchOptions(Options):
    """The options of a search."""

    to: list[str] = Field([], description="Modalities to search; by default the other one, of several text.", max_length=8)
    k: int = Field(5, ge=1, le=50, description="How many to find.")
    weights: Weights | None = Field(None, description="Mix the inputs into one query, by these weights.")
    through: str | None = Field(
        None,
        description="A third modality that connects two that had no pairs of their own. `none` switches this off; by default "
        "one is chosen where it is needed.",
    )


class GenerateOptions(Options):
    """The options of a picture, as `bridgekit generate` takes them."""

    model: str | None = Field(None, description="A text-to-image model of this server; by default the first of `GET /bridge`.")
    weights: Weights | None = None
    prompt: str | None = Field(None, max_length=500, description="Words for the model itself, to steer the style.")
    prompt_weight: float = Field(0.3, ge=0, le=1, description="How much the prompt counts compared with the inputs.")
    gap: str = Field(GAPS[0], pattern=f"^({'|'.join(GAPS)})$", description="How the gap between modalities is closed.")
    seed: int = Field(0, ge=0, le=2**53, description="Random seed of the noise.")
    steps: int | None = Field(None, ge=1, le=100, description="Denoising steps; by default the model's.")
    guidance: float | None = Field(None, ge=0, le=50, description="Guidance scale; 1 is no guidance.")
    size: int | None = Field(None, ge=64, le=1024, description="Width and height in pixels; by default the model's.")


class Embedding(BaseModel):
    """One input in the shared space."""

    item: str
    modality: str
    embedding: list[float] = Field(description="At unit length: dot products are cosine similarities.")


class EmbedAnswer(BaseModel):
    """What `/embed` answers."""

    bridge: str
    dim: int
    embeddings: list[Embedding]


class Near(BaseModel):
    """An item, and how similar it is."""

    item: str = Field(description="A text, or the file's name.")
    similarity: float = Field(description="Cosine similarity to the query, from -1 to 1.")


class Found(Near):
    """One item that a search found."""

    share: float = Field(
        description="The bridge's own softmax (similarity over its temperature) over everything that was searched: how "
        "confident it is, given that one of the items is right."
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


class PictureAnswer(BaseModel):
    """What `/generate` answers."""

    bridge: str
    model: str
    prompt: str | None
    gap: str
    seed: int
    inputs: list[str]
    weights: list[float]
    nearest: list[Near] = Field(description="The captions (or pictures) nearest to the mixture of the inputs.")
    width: int
    height: int
    seconds: float
    picture: str = Field(description="A PNG in base64. Its metadata say how it was made.")


class Problem(BaseModel):
    """What is wrong, where, and how to fix it: as the command line's `--json` gives it."""

    what: str
    where: str | None
    fix: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: Problem


_WHY = {
    400: "The request makes no sense, or an option or text is out of bounds.",
    403: "Another site's page sent it.",
    404: "There is no such bridge, model, clip or picture.",
    413: "Too large: the request, a clip, a picture, a text, or the number of inputs.",
    415: "A file is damaged, or not of the kind it should be.",
    429: "Busy with this client's own requests. Retry-After says when to ask again.",
    503: "Busy. Retry-After says when to ask again.",
}
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer, "description": why} for status, why in _WHY.items()}


def request_body(options: type[BaseModel], example: dict[str, Any], curl: str) -> dict[str, Any]:
    """A route's body for OpenAPI, which FastAPI cannot describe: a form with files, or JSON with texts, both with options.

    Arguments:
        options: the route's options.
        example: a body in JSON.
        curl: the arguments of a call with a form.
    """
    fields = options.model_json_schema()["properties"]
    text = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "A text, or several.",
    }
    file = {"type": "string", "format": "binary"}
    files = {
        "audio": {"type": "array", "items": file, "description": "Clips: WAV, FLAC, Ogg, MP3."},
        "image": {"type": "array", "items": file, "description": "Pictures: PNG, JPEG, WebP and others."},
    }
    content = {
        "multipart/form-data": {"schema": {"type": "object", "properties": {"text": text, **files, **fields}}},
        "application/json": {
            "schema": {"type": "object", "properties": {"text": text, **fields}, "required": ["text"]},
            "example": example,
        },
    }
    return {"requestBody": {"required": True, "content": content}, "x-curl": curl}
