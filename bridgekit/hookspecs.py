"""The plugin contract: implement any of these hooks under the entry point group `bridgekit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
        open: `open(model, device)` returns the encoder. Import heavy packages inside it, not at the top of the plugin.
        models: returns a few model names as examples.
        defaults: modality to model, where this provider offers the modality's default encoder.
        renamed: revision to model, for encoders that older bridges record by a name that now means another one.
    """

    name: str
    modalities: tuple[str, ...]
    open: Callable[[str, str], Encoder]
    models: Callable[[], Sequence[str]]
    defaults: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSource:
    """A named table of pairs, usable wherever a path to a table is: `--pairs starter:openmoji`.

    Arguments:
        name: `provider:source`.
        description: one line: what it contains, how many pairs, the licence.
        modalities: its columns.
        build: returns the pairs. It may write files, once, under `bridgekit.storage.cache.cache_folder()`.
        default: use this table if the user names none for exactly these modalities. If no source sets this, the only source
            for its modalities is the default.
    """

    name: str
    description: str
    modalities: tuple[str, ...]
    build: Callable[[], Pairs]
    default: bool = False


@dataclass(frozen=True)
class PairProvider:
    """Opens tables of pairs by name, usable wherever a path to a table is: `--pairs provider:name`.

    Arguments:
        name: the part before the colon, for example `datasets`.
        description: one line: what it opens, with an example.
        open: `open(name)` returns the table of that name: `Pairs`, or anything else that `bridgekit.tables.reading.open_table`
            takes. Its columns may have any names. Files are `Blob`s, or paths below a folder that the user named. Import heavy
            packages inside it.
    """

    name: str
    description: str
    open: Callable[[str], Any]


@dataclass(frozen=True)
class ImageGenerator:
    """A named text-to-image model with its conditioning, usable as `--model provider:model`.

    Arguments:
        name: `provider:model`.
        description: one line: what it draws, the image size, the licence.
        open: `open(device)` returns the model. Import heavy packages inside it.
    """

    name: str
    description: str
    open: Callable[[str], ImageModel]


@dataclass(frozen=True)
class Approximate:
    """An approximate index of one modality.

    Arguments:
        kind: the kind of index.
        rows: how many rows it was built from.
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
    """The result of searching an index.

    Arguments:
        hits: each query's hits, best first.
        candidates: how many rows were searched: all rows of the modality that pass the filter.
        approximate: the approximate index that was used, or None if the search was exact.
    """

    hits: Sequence[Sequence[Hit]]
    candidates: int
    approximate: Approximate | None


class SearchIndex(Protocol):
    """An index of embeddings, as `bridgekit search --index` uses it."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities in the index."""

    @property
    def bridge_path(self) -> str | None:
        """The folder of the bridge that it was made with, if known."""

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
        """The k rows of modality `to` nearest to each query, which a `bridgekit.Bridge` embeds.

        `where` filters the rows by their columns. `exact` forces an exact search.
        """


@hookspec
def encoder_providers() -> Sequence[EncoderProvider]:  # type: ignore[empty-body]
    """Return this plugin's encoder providers."""


@hookspec
def pair_sources() -> Sequence[PairSource]:  # type: ignore[empty-body]
    """Return this plugin's named tables of pairs."""


@hookspec
def pair_providers() -> Sequence[PairProvider]:  # type: ignore[empty-body]
    """Return this plugin's providers of tables of pairs."""


@hookspec
def image_generators() -> Sequence[ImageGenerator]:  # type: ignore[empty-body]
    """Return this plugin's named text-to-image models."""


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add this plugin's commands to the `bridgekit` command line."""


@hookspec(firstresult=True)
def open_index(path: str) -> SearchIndex | None:
    """Open the index at a path or URL for `bridgekit search --index`, or return None if it is not one of this plugin's."""


@hookspec(firstresult=True)
def bundled_bridge() -> Path | None:
    """Return the folder of a bridge that comes with this plugin: it is used where no bridge is named and ./bridges has none."""
