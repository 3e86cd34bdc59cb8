"""The bridge: the trained thing. It embeds items of its modalities into one space, and is saved as a readable folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from bridgekit.bounded import homes, is_within
from bridgekit.bridge_file import FORMAT, read_history, read_story, read_tensors
from bridgekit.cache import check_writable, one_writer, put_back, write_folder_atomically
from bridgekit.card import model_card
from bridgekit.encoders import TEXT, Encoder, Item, resolve_device
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.fusion.adapter import Adapter, FrozenSide, FusionAdapter, project
from bridgekit.fusion.training import Preset
from bridgekit.latents import encode_items
from bridgekit.plugins import load_encoder
from bridgekit.progress import Report, silent
from bridgekit.retrieval import Hit, nearest
from bridgekit.training_rows import TrainingRows

#: The option of an encoder, and, after `BRIDGEKIT_`, the environment variable, by which code from a model's repository may run.
TRUST = "TRUST_REMOTE_CODE"
#: After `BRIDGEKIT_`, the environment variable by which a loaded bridge may name tables and encoders anywhere on disk.
OUTSIDE = "OUTSIDE"
#: Before a modality, the name of its mean among the tensors.
MEAN = "mean/"


@dataclass(frozen=True)
class Side:
    """One modality of a bridge.

    Arguments:
        encoder: `provider:model`.
        revision: the encoder's exact weights and preprocessing at training time.
        dim: the encoder's width.
        frozen: whether the encoder's own latents are the shared space.
    """

    encoder: str
    revision: str
    dim: int
    frozen: bool


@dataclass(frozen=True)
class TrainedOn:
    """A table that a bridge was trained on.

    Arguments:
        source: its path or name, as it was given.
        modalities: those of its columns that were used.
        seed: which its rows were split by, where it has no splits of its own.
        bound: the modality that was bound to the bridge with it, or None for the table that the bridge began with.
    """

    source: str
    modalities: tuple[str, ...]
    seed: int
    bound: str | None


@dataclass(frozen=True)
class Embedded:
    """Embeddings of those items that could be used.

    Arguments:
        vectors: (n, dim) float32 at unit length, in order, without the failed ones.
        failed: position in the list to the reason.
    """

    vectors: Tensor
    failed: Mapping[int, str]


@dataclass(frozen=True)
class Bridge:
    """Two or more modalities in one shared space.

    Arguments:
        sides: modality to its encoder.
        adapters: modality to its fusion adapter, in eval mode.
        preset: the hyperparameters that the adapters were trained with.
        temperature: the learned one.
        provenance: where the pairs came from, seed, versions, command, counts.
        metrics: what evaluation found, as `evaluation.evaluate_splits` gives it.
        history: one record per validation during training.
        device: where adapters and encoders run.
        means: modality to the mean of its training embeddings, (dim,). Their difference is the gap between modalities.
        training_rows: what it was trained on.
        folder: where it was loaded from, or None for one that was made here. Of a loaded one, paths are followed with care.
    """

    sides: Mapping[str, Side]
    adapters: Mapping[str, Adapter] = field(repr=False)
    preset: Preset
    temperature: float
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    history: Sequence[Mapping[str, float]] = field(default=(), repr=False)
    device: str = "cpu"
    means: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _encoders: dict[str, Encoder] = field(default_factory=dict, repr=False, compare=False)
    training_rows: TrainingRows = field(default_factory=TrainingRows, repr=False, compare=False)
    folder: Path | None = field(default=None, repr=False, compare=False)

    @property
    def dim(self) -> int:
        """Width of the shared space."""
        frozen = [side.dim for side in self.sides.values() if side.frozen]
        return frozen[0] if frozen else self.preset.shared_dim

    @property
    def tables(self) -> list[TrainedOn]:
        """The tables that the bridge was trained on: the first one, and one for each modality that was bound to it later."""
        return [
            TrainedOn(
                str(story.get("pairs", "")),
                tuple(story.get("modalities", self.sides)),
                int(story.get("seed", 0)),
                story.get("modality"),
            )
            for story in (self.provenance, *self.provenance.get("bound", ()))
        ]

    def table_of(self, modality: str) -> str:
        """The source of the first of these tables that has a modality."""
        return next((table.source for table in self.tables if modality in table.modalities), "")

    def followed(self, source: str) -> str:
        """A table that the bridge names, if it may be read unasked: whoever wrote the bridge chose the path.

        It may be a plugin's source, or lie, all links followed, in the folder where this runs or in the bridge's own.

        Raises:
            BridgekitError: it lies elsewhere.
        """
        named_source = ":" in source and not os.path.lexists(source)
        if source and not named_source and not self._may_follow(source):
            raise BridgekitError(
                "this bridge names a table outside this folder and its own, which is not read unasked",
                where=source,
                remedy="name it if you trust it (eval or report --pairs, search --among, generate --captions), "
                f"or set BRIDGEKIT_{OUTSIDE}=yes",
            )
        return source

    def _may_follow(self, path: str | Path) -> bool:
        """Whether a path that stands in the bridge may be followed; in one that was made here, all may."""
        if self.folder is None or os.environ.get(f"BRIDGEKIT_{OUTSIDE}") == "yes":
            return True
        try:
            return is_within(path, (*homes(Path()), *homes(self.folder)))
        except (OSError, ValueError):
            return False

    def weights_hash(self, modalities: Sequence[str]) -> str:
        """SHA-256 over the adapters of some modalities: equal where they embed alike, bit for bit."""
        whole = hashlib.sha256()
        for modality in modalities:
            for name, tensor in self.adapters[modality].state_dict().items():
                whole.update(f"{modality}.{name}".encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return whole.hexdigest()

    def side(self, modality: str) -> Side:
        """One side.

        Raises:
            BridgekitError: the bridge does not have the modality.
        """
        if modality not in self.sides:
            raise BridgekitError(
                f"this bridge has no side for {modality!r}", remedy=f"its modalities are {', '.join(self.sides)}"
            )
        return self.sides[modality]

    def encoder(self, modality: str) -> Encoder:
        """The side's frozen encoder, opened on first use.

        Raises:
            BridgekitError: the installed encoder is not the one that the bridge was trained on, or it would run code that
                comes with its weights, and the user has not said that this may be.
        """
        side = self.side(modality)
        if modality not in self._encoders:
            # A bridge may come from anyone: that its maker trusted some code does not mean that its user does.
            if TRUST.lower() + "=yes" in side.encoder and os.environ.get(f"BRIDGEKIT_{TRUST}") != "yes":
                raise BridgekitError(
                    f"this bridge's encoder for {modality} runs code that comes with its weights",
                    where=side.encoder,
                    remedy=f"if you have read that code and trust it, set BRIDGEKIT_{TRUST}=yes",
                )
            self._check_paths(side)
            encoder = load_encoder(side.encoder, self.device)
            if encoder.revision != side.revision:
                raise BridgekitError(
                    f"{side.encoder} is not the encoder that this bridge was trained on",
                    where=f"trained on {side.revision}, installed is {encoder.revision}",
                    remedy="install the version it was trained with, or train the bridge again",
                )
            if (encoder.modality, encoder.dim) != (modality, side.dim):
                raise BridgekitError(
                    f"this bridge says that {side.encoder} encodes {modality}, {side.dim} wide",
                    where=f"it encodes {encoder.modality}, {encoder.dim} wide",
                    remedy="copy the bridge again, or train it again",
                )
            self._encoders[modality] = encoder
        return self._encoders[modality]

    def _check_paths(self, side: Side) -> None:
        """Refuse an encoder whose name is, or holds, a path outside this folder and the bridge's, unless the user allows it."""
        for part in re.split("[:,=@+;|]", side.encoder):
            path = Path(os.path.expanduser(part))  # noqa: PTH111  (Path's own fails for a user who is not there)
            leads_away = path.is_absolute() or ".." in path.parts or (part != "" and os.path.lexists(path))
            if leads_away and not self._may_follow(path):
                raise BridgekitError(
                    "this bridge names an encoder on disk outside this folder and its own, which is not opened unasked",
                    where=side.encoder,
                    remedy=f"if you trust the bridge, set BRIDGEKIT_{OUTSIDE}=yes, or run this where the encoder is",
                )

    def project(self, modality: str, latents: Tensor) -> Tensor:
        """Latents of one encoder, (n, d), into the shared space, (n, dim), at unit length."""
        return project(self.adapters[modality], latents)

    def embed(self, modality: str, items: Sequence[Item] | Item, *, report: Report = silent) -> Tensor:
        """Items into the shared space.

        Arguments:
            modality: one of the bridge's.
            items: paths, or strings for `text`; a single one counts as a list of one.
            report: told how encoding goes on.

        Returns:
            (n, dim) float32 at unit length, in order.

        Raises:
            ItemError: an item cannot be used. `embed_usable` sets such items aside instead.
        """
        embedded = self.embed_usable(modality, items, report=report)
        for position, reason in embedded.failed.items():
            raise ItemError(reason, where=str(_listed(items)[position])[:200], remedy="mend or leave out this item")
        return embedded.vectors

    def embed_usable(self, modality: str, items: Sequence[Item] | Item, *, report: Report = silent) -> Embedded:
        """`embed`, with items that cannot be used left out and named."""
        typed = [item if modality == TEXT else Path(item) for item in _listed(items)]
        encoder = self.encoder(modality)
        latents = encode_items(encoder, typed, progress=lambda done, total: report(f"encoding {modality}", done, total))
        usable = latents.ids >= 0
        vectors = self.project(modality, latents.matrix[torch.from_numpy(latents.ids[usable])])
        finite = vectors.isfinite().all(1)
        beyond = dict.fromkeys(np.flatnonzero(usable)[~finite.numpy()].tolist(), "its embedding is not finite numbers")
        return Embedded(vectors[finite], {**latents.failed, **beyond})

    def similarity(self, **items: Sequence[Item] | Item) -> Tensor:
        """Cosine similarities, for example `bridge.similarity(audio=["dog.wav"], text=["a dog", "rain"])`.

        Arguments:
            items: one or two modalities with their items. One is compared with itself.

        Returns:
            (n, m), the first modality's items by the second's.

        Raises:
            ItemError: an item cannot be used.
        """
        if not 1 <= len(items) <= 2:
            raise TypeError("similarity() takes one or two modalities: similarity(audio=[...], text=[...])")
        embedded = [self.embed(modality, things) for modality, things in items.items()]
        return embedded[0] @ embedded[-1].T

    def expected(self, vectors: Tensor, among: Tensor, sharpness: float = 1.0) -> Tensor:
        """What the contrastive model expects embeddings of one modality to belong to, among embeddings of another.

        Arguments:
            vectors: (n, dim) at unit length.
            among: (m, dim) at unit length, for example of all captions.
            sharpness: multiplies the logits of the bridge's own softmax, which are similarities over its temperature.

        Returns:
            (n, dim) at unit length: for each vector the mean of the others, weighted by that softmax.
        """
        weights = (sharpness * vectors @ among.T / self.temperature).softmax(-1)
        return nn.functional.normalize(weights @ among, dim=-1)

    def search(
        self,
        modality: str,
        queries: Sequence[Item] | Item,
        among_modality: str,
        among: Sequence[Item],
        k: int = 10,
        *,
        through: tuple[str, Sequence[Item]] | None = None,
        report: Report = silent,
    ) -> list[list[Hit]]:
        """The k nearest of some items of one modality to each query of another.

        Arguments:
            modality: the queries'.
            queries: paths or texts.
            among_modality: the candidates'.
            among: the candidates. Those that cannot be used are left out.
            k: how many hits a query.
            through: a third modality and items of it, for example `("text", names)`: the query is replaced by what it is
                expected to belong to among these. Two modalities that had no pairs of their own find each other better so.
            report: told how encoding goes on.

        Raises:
            ItemError: a query cannot be used.
            BridgekitError: no candidate can be used.
        """
        embedded = self.embed(modality, queries, report=report)
        if through:
            between = self.embed_usable(*through, report=report).vectors
            if not len(between):
                raise BridgekitError(f"there is no usable {through[0]} to search through")
            embedded = self.expected(embedded, between)
        candidates = self.embed_usable(among_modality, among, report=report)
        items = [item for position, item in enumerate(among) if position not in candidates.failed]
        if not items:
            raise BridgekitError(f"there is no usable {among_modality} to search")
        return nearest(embedded, candidates.vectors, items, k)

    def save(
        self,
        path: str | Path,
        *,
        pictures: Mapping[str, bytes] | None = None,
        overwrite: bool = False,
        grown_from: Path | None = None,
    ) -> Path:
        """Write the bridge's folder whole: beside the final place first, then renamed.

        Arguments:
            path: the folder.
            pictures: file name to PNG bytes, written with it.
            overwrite: whether a bridge that is there already may be replaced.
            grown_from: the folder of the bridge that this one has grown from: its pictures, report and conditioners hold
                still, and go along.

        Raises:
            BridgekitError: something is there that must not be replaced, or the place cannot be written.
        """
        folder = Path(path)
        tensors = {
            f"{modality}.{name}": tensor.detach().cpu().contiguous()
            for modality, adapter in self.adapters.items()
            for name, tensor in adapter.state_dict().items()
        }
        tensors |= {f"{MEAN}{modality}": mean.contiguous() for modality, mean in self.means.items()}
        weights = save(tensors, {"format": str(FORMAT)})
        story = {
            "format": FORMAT,
            "sides": {modality: asdict(side) for modality, side in self.sides.items()},
            "dim": self.dim,
            "temperature": self.temperature,
            "preset": asdict(self.preset),
            "adapters_sha256": hashlib.sha256(weights).hexdigest(),
            "provenance": dict(self.provenance),
            "metrics": list(self.metrics),
        }

        def fill(aside: Path) -> None:
            (aside / "adapters.safetensors").write_bytes(weights)
            self.training_rows.save(aside)
            (aside / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.history))
            if grown_from:
                for file in (*grown_from.glob("*.png"), *grown_from.glob("report.html")):
                    shutil.copyfile(file, aside / file.name)
                if (grown_from / "conditioners").is_dir():
                    for file in (grown_from / "conditioners").glob("[!.]*"):  # one that is being written now is left out
                        (aside / "conditioners").mkdir(exist_ok=True)
                        shutil.copyfile(file, aside / "conditioners" / file.name)
            for name, data in (pictures or {}).items():
                (aside / name).write_bytes(data)
            shown = sorted(file.name for file in aside.glob("*.png"))
            (aside / "README.md").write_text(model_card(self, folder.name, shown), encoding="utf-8")
            (aside / "bridge.json").write_text(json.dumps(story, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

        with one_writer(folder):
            check_free(folder, overwrite)
            write_folder_atomically(folder, fill)
        return folder

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Bridge:
        """Open a saved bridge. Encoders are opened when first needed.

        Arguments:
            path: the bridge's folder.
            device: a torch device, or `auto`.

        Raises:
            BridgekitError: it is not a bridge, is damaged, or was written by a newer version.
        """
        failed = False
        while True:
            put_back(Path(path))
            with _held(Path(path)) as still_there:
                try:
                    bridge = cls._load(path, device)
                except BridgekitError:
                    # Once is no proof: a writer may have been between its two renames, and somebody have put it back since.
                    if still_there() and failed:
                        raise
                    failed = still_there()
                else:
                    if still_there():
                        return bridge
            # It was replaced meanwhile: these were files of two bridges.

    @classmethod
    def _load(cls, path: str | Path, device: str) -> Bridge:
        folder = Path(path)
        story = read_story(folder)
        preset = Preset(**story["preset"])
        sides = {modality: Side(**side) for modality, side in story["sides"].items()}
        # Without memory for their tensors, which are then those of the file.
        with torch.device("meta"):
            adapters: dict[str, Adapter] = {
                modality: FrozenSide(side.dim)
                if side.frozen
                else FusionAdapter(side.dim, story["dim"], preset.blocks, preset.expansion, preset.dropout)
                for modality, side in sides.items()
            }
        shapes = {
            f"{modality}.{name}": tuple(tensor.shape)
            for modality, adapter in adapters.items()
            for name, tensor in adapter.state_dict().items()
        }
        means = {f"{MEAN}{modality}": (story["dim"],) for modality in sides}
        tensors = read_tensors(folder, story["adapters_sha256"], shapes, means)
        device = resolve_device(device)
        for modality, adapter in adapters.items():
            own = {name: tensors[f"{modality}.{name}"] for name in adapter.state_dict()}
            adapter.load_state_dict(own, assign=True)
            adapter.eval().to(device)
        return cls(
            sides,
            adapters,
            preset,
            float(story["temperature"]),
            story["provenance"],
            story["metrics"],
            read_history(folder),
            device,
            # In the sides' order: safetensors gives its tensors in any.
            {modality: tensors[MEAN + modality] for modality in sides if MEAN + modality in tensors},
            training_rows=TrainingRows.load(folder),
            folder=folder,
        )


@contextmanager
def _held(folder: Path) -> Iterator[Callable[[], bool]]:
    """Gives what tells whether the same folder is still at this place.

    The folder is open meanwhile: the number of one that is removed may go to the next at once, and the two look the same.
    """
    descriptor = None
    with suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    before = _identity(folder) if descriptor is None else os.fstat(descriptor).st_ino
    try:
        yield lambda: _identity(folder) == before
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _identity(folder: Path) -> int | None:
    """Which folder is at this place now, by its number on the disk."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _listed(items: Sequence[Item] | Item) -> list[Item]:
    return [items] if isinstance(items, (str, Path)) else list(items)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise BridgekitError unless a bridge may be written at `folder`."""
    put_back(folder)
    if not folder.exists():
        check_writable(folder.parent)
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "bridge.json").exists()):
        raise BridgekitError(
            "this place holds something that is not a bridge", where=str(folder), remedy="choose another --out"
        )
    if (folder / "bridge.json").exists() and not overwrite:
        raise BridgekitError(
            "a bridge trained on other pairs or with other settings is there already",
            where=str(folder),
            remedy="choose another --out, or replace it with --overwrite",
        )
