"""Request options and responses of the API."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bridgekit.diffusion.conditioner import GAPS

#: Weights of one request.
MOST_WEIGHTS = 64


def _numbers(value: Any) -> Any:
    """Accept `2,1`, as on the command line, or a list. What follows after `MOST_WEIGHTS` commas is not split, and no number."""
    parts = value if isinstance(value, list) else [value]
    return [piece for part in parts for piece in (part.split(",", MOST_WEIGHTS) if isinstance(part, str) else [part])]


Weights = Annotated[
    list[Annotated[float, Field(gt=0, le=1000)]],
    BeforeValidator(_numbers),
    Field(description="Weights of the inputs in a mixture, in order.", max_length=MOST_WEIGHTS, examples=[[2, 1]]),
]


class Options(BaseModel):
    """Options of every request."""

    model_config = ConfigDict(extra="forbid")
    bridge: str | None = Field(None, description="Name of a bridge. Default: the first one in `GET /bridge`.")


class SearchOptions(Options):
    """Options of a search."""

    to: list[str] = Field(
        [], description="Modalities to search. Default: text; for a text query, the first other one.", max_length=8
    )
    k: int = Field(5, ge=1, le=50, description="Number of results per query.")
    weights: Weights | None = Field(None, description="Mix the inputs into one query with these weights.")
    through: str | None = Field(
        None,
        description="A third modality that links two modalities trained without common pairs. `none` disables this. Default: "
        "chosen automatically if needed.",
    )


class GenerateOptions(Options):
    """Options of image generation, as for `bridgekit generate`."""

    model: str | None = Field(None, description="Name of a text-to-image model. Default: the first one in `GET /bridge`.")
    weights: Weights | None = None
    prompt: str | None = Field(None, max_length=500, description="Text prompt for the model, e.g. a style.")
    prompt_weight: float = Field(0.3, ge=0, le=1, description="Weight of the prompt relative to the inputs.")
    gap: str = Field(GAPS[0], pattern=f"^({'|'.join(GAPS)})$", description="How the modality gap is closed.")
    seed: int = Field(0, ge=0, le=2**53, description="Random seed of the noise.")
    steps: int | None = Field(None, ge=1, le=100, description="Denoising steps. Default: the model's.")
    guidance: float | None = Field(None, ge=0, le=50, description="Guidance scale; 1 is no guidance.")
    size: int | None = Field(None, ge=64, le=1024, description="Width and height in pixels. Default: the model's.")


class Embedding(BaseModel):
    """The embedding of one input."""

    item: str
    modality: str
    embedding: list[float] = Field(description="Unit length: dot products are cosine similarities.")


class EmbedAnswer(BaseModel):
    """Response of `/embed`."""

    bridge: str
    dim: int
    embeddings: list[Embedding]


class Near(BaseModel):
    """An item and its similarity to the query."""

    item: str = Field(description="A text or a file name.")
    similarity: float = Field(description="Cosine similarity, from -1 to 1.")


class Found(Near):
    """A search result."""

    share: float = Field(
        description="Softmax of similarity / temperature over all items searched: the bridge's confidence, assuming that one "
        "of them is correct."
    )
    media: str | None = Field(description="Path of the clip (WAV) or image (PNG) on this server.")
    captions: list[str] = Field(description="The texts that the bridge's table pairs with this clip or image, at most 5.")
    columns: dict[str, str] = Field(description="The other columns of its first row in the table, at most 8, without paths.")


SURE = Field(description="False: the query is unlike what the bridge was trained on. null: the bridge cannot tell.")
SPEECH = Field(description="The probability that a clip is of speech. null: the bridge cannot tell.")


class Result(BaseModel):
    """The results of one query in one modality."""

    query: str
    modality: str = Field(description="Modality of the query; `mixture` if the inputs have several.")
    to: str
    through: str | None
    among: int = Field(description="Number of items searched.")
    sure: bool | None = SURE
    speech: float | None = SPEECH
    found: list[Found]


class SearchAnswer(BaseModel):
    """Response of `/search`."""

    bridge: str
    temperature: float
    results: list[Result]


class PictureAnswer(BaseModel):
    """Response of `/generate`."""

    bridge: str
    model: str
    prompt: str | None
    gap: str
    seed: int
    inputs: list[str]
    weights: list[float]
    nearest: list[Near] = Field(description="The captions (or images) nearest to the mixture of the inputs.")
    sure: bool | None = SURE
    speech: float | None = SPEECH
    width: int
    height: int
    seconds: float
    picture: str = Field(description="A base64-encoded PNG. Its metadata records how it was generated.")


class Problem(BaseModel):
    """An error, as in the command line's `--json` output."""

    what: str
    where: str | None
    fix: str | None


class ErrorAnswer(BaseModel):
    """Body of every error response."""

    error: Problem


_WHY = {
    400: "The request is malformed, or an option or text is invalid.",
    403: "The request came from another site's page.",
    404: "No such bridge, model, clip or image.",
    413: "Too large: the request, a clip, an image, a text, or the number of inputs.",
    415: "A file is damaged or has the wrong type.",
    422: "A text in JSON has characters that UTF-8 cannot encode.",
    429: "This client has too many requests queued. Retry-After gives the seconds to wait.",
    503: "Busy. Retry-After gives the seconds to wait.",
}
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer, "description": why} for status, why in _WHY.items()}

OUTSIDE: dict[str, Any] = {"model": ErrorAnswer, "description": "Nothing of the file is in the range."}


def request_body(options: type[BaseModel], example: dict[str, Any], curl: str) -> dict[str, Any]:
    """OpenAPI schema of a route's body, which FastAPI cannot derive: a form with files, or JSON with texts, both with options.

    Arguments:
        options: the route's options.
        example: a JSON body.
        curl: a command that sends a form.
    """
    fields = options.model_json_schema()["properties"]
    text = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "One or several texts.",
    }
    file = {"type": "string", "format": "binary"}
    files = {
        "audio": {"type": "array", "items": file, "description": "Audio files: WAV, FLAC, Ogg, MP3."},
        "image": {"type": "array", "items": file, "description": "Image files: PNG, JPEG, WebP and others."},
    }
    form = {"text": text, **files, **fields}
    content = {
        "application/json": {
            "schema": {"type": "object", "properties": {"text": text, **fields}, "required": ["text"]},
            "example": example,
        },
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {name: _unfilled(field) for name, field in form.items()}},
        },
    }
    description = f"A form with files, or JSON. For example:\n\n    {curl}"
    return {"requestBody": {"required": True, "description": description, "content": content}}


def _unfilled(field: dict[str, Any]) -> dict[str, Any]:
    """A form's field with an empty example, unless it has a default: Swagger UI would fill it with words such as "string"."""
    if field.get("default") is not None:
        return field
    parts = field.get("anyOf", [field])
    others = {name: value for name, value in field.items() if name not in ("default", "examples")}
    if "anyOf" in field:
        others["anyOf"] = [{name: value for name, value in part.items() if name != "examples"} for part in parts]
    return {**others, "example": [] if parts[0].get("type") == "array" else ""}
