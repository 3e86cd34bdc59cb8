"""The plugin contract and nothing else: implement any of these hooks, under the entry point group `bridgekit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import typer

    from bridgekit.encoders import Encoder, Item
    from bridgekit.image_models import ImageModel
    from bridgekit.pairs import Pairs
    from bridgekit.progress import Report
    from bridgekit.retrieval import Hit

hookspec = pluggy.HookspecMarker("bridgekit")
hookimpl = pluggy.HookimplMarker("bridgekit")


@dataclass(frozen=True)
class EncoderProvider:
    """A family of encoders. Its models are named `name:model` on the command line.

    Arguments:
        name: the part before the colon, for example `timm`.
        modalities: the modalities that its models encode.
        open: `open(model, device)` gives the encoder. Import heavy packages inside it, not at the top of the plugin.
        models: a few model names for people to start from.
        defaults: modality to model, for those modalities whose default encoder this provider wants to be.
    """

    name: str
    modalities: tuple[str, ...]
    open: Callable[[str, str], Encoder]
    models: Callable[[], Sequence[str]]
    defaults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSource:
    """A named table of pairs, usable wherever a path to a table is: `--pairs starter:openmoji`.

    Arguments:
        name: `provider:source`.
        description: one line: what is in it, how many pairs, which licence.
        modalities: its columns.
        build: makes the pairs. It may write files, once, under `bridgekit.storage.cache.cache_folder()`.
        default: whether this is the table for exactly these modalities where the user names none. Where no source sets it, a
            source that is the only one for its modalities is their default.
    """

    name: str
    description: str
    modalities: tuple[str, ...]
    build: Callable[[], Pairs]
    default: bool = False


@dataclass(frozen=True)
class ImageGenerator:
    """A named text-to-image model with its conditioning, usable as `--model provider:model`.

    Arguments:
        name: `provider:model`.
        description: one line: what it draws, how large, which licence.
        open: `open(device)` gives the model. Import heavy packages inside it.
    """

    name: str
    description: str
    open: Callable[[str], ImageModel]


@dataclass(frozen=True)
class Approximate:
    """An approximate index of one modality.

    Arguments:
        kind: the kind of index.
        rows: how many rows it was built on.
        recall: modality of the queries to recall@10 against exact search, measured when it was built.
    """

    kind: str
    rows: int
    recall: Mapping[str, float]

    def __str__(self) -> str:
        recalls = ", ".join(f"{value:.3f} for {query} queries" for query, value in self.recall.items())
        return f"approximate ({self.kind}), recall@10 against exact: {recalls or 'not measured yet'}"

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return {"exact": False, "kind": self.kind, "recall@10": dict(self.recall)}


@dataclass(frozen=True)
class SearchResult:
    """What a search of an index found.

    Arguments:
        hits: for each query its hits, best first.
        candidates: how many rows were searched: all rows of the modality that pass the filter.
        approximate: the approximate index that was used, or None where every candidate was compared.
    """

    hits: Sequence[Sequence[Hit]]
    candidates: int
    approximate: Approximate | None


class SearchIndex(Protocol):
    """An index of embeddings, as `bridgekit search --index` uses it."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that it holds."""

    @property
    def bridge_path(self) -> str | None:
        """The folder of the bridge that it was made with, if that is known."""

    def find(
        self,
        bridge: Any,
        modality: str,
        queries: Sequence[Item],
        to: str,
        k: int,
        *,
        where: str | None,
        exact: bool,
        report: Report,
    ) -> SearchResult:
        """The k rows of modality `to` that are nearest to each query, embedded by a `bridgekit.Bridge`.

        `where` is a filter on the rows' columns. `exact` asks for every row to be compared.
        """


@hookspec
def encoder_providers() -> Sequence[EncoderProvider]:  # type: ignore[empty-body]
    """Return the encoder providers of this plugin."""


@hookspec
def pair_sources() -> Sequence[PairSource]:  # type: ignore[empty-body]
    """Return the named tables of pairs that this plugin brings."""


@hookspec
def image_generators() -> Sequence[ImageGenerator]:  # type: ignore[empty-body]
    """Return the named text-to-image models that this plugin brings."""


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands of the plugin's own to the `bridgekit` command line."""


@hookspec(firstresult=True)
def open_index(path: str) -> SearchIndex | None:
    """Open the index at a path or URL for `bridgekit search --index`, or return None where it is not one of the plugin's."""
