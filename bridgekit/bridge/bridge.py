"""The bridge, the result of training: it embeds items of its modalities into one space, and is saved as a readable folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from bridgekit.bridge.card import model_card
from bridgekit.bridge.format import FORMAT, read_history, read_metadata, read_tensors
from bridgekit.bridge.provenance import TrainedOn
from bridgekit.bridge.trust import opening_encoder, refuse_untrusted_table
from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.fusion.adapter import Adapter, FrozenSide, FusionAdapter, project
from bridgekit.fusion.training import Preset
from bridgekit.hardware import resolve_device
from bridgekit.latents.encode import encode_items
from bridgekit.media import as_item, item_name
from bridgekit.plain import without_surrogates
from bridgekit.plugins import load_encoder
from bridgekit.progress import Report, silent
from bridgekit.retrieval import BANK_ROWS, TEMPLATES, Hit, bank_penalty, class_embeddings, nearest
from bridgekit.storage.cache import check_writable, one_writer, put_back, write_folder_atomically
from bridgekit.tables.reading import Table, open_table, read_items
from bridgekit.tables.seen import TrainingRows

#: Prefix of the name of a modality's mean among the tensors.
MEAN = "mean/"
#: Prefix of the name of a bank among the tensors.
BANK = "bank/"
#: Name of the speech classifier among the tensors.
SPEECH = "speech"


@dataclass(frozen=True)
class Side:
    """One modality of a bridge.

    Arguments:
        encoder: `provider:model`.
        revision: the encoder's exact weights and preprocessing at training time.
        dim: width of the encoder's latents.
        frozen: whether the encoder's latents are the shared space, so that it has no adapter.
    """

    encoder: str
    revision: str
    dim: int
    frozen: bool


@dataclass(frozen=True)
class Embedded:
    """Embeddings of the usable items in a list.

    Arguments:
        vectors: (n, dim) float32 at unit length, in order, without the failed items.
        failed: position in the list to error message.
    """

    vectors: Tensor
    failed: Mapping[int, str]


@dataclass(frozen=True)
class Heard:
    """What a bridge can say of an item besides its nearest texts.

    Arguments:
        sure: whether its nearest text is as near as those of known items are; None if the bridge has no threshold.
        speech: the probability that a clip is speech; None if the bridge has no classifier for it, or the item is no clip.
    """

    sure: bool | None
    speech: float | None


@dataclass(frozen=True, repr=False)
class Bridge:
    """Two or more modalities in one shared space.

    Arguments:
        sides: modality to its encoder.
        adapters: modality to its fusion adapter, in eval mode.
        preset: the hyperparameters that the adapters were trained with.
        temperature: the learned temperature.
        provenance: source of the pairs, random seed, versions, command, counts.
        metrics: recall on held-out rows, as records of `evaluation.recall.evaluate_splits`.
        history: one record per validation during training.
        device: where adapters and encoders run.
        means: modality to the mean of its training embeddings, (dim,). Their difference is the modality gap.
        banks: at `a/b`, embeddings of a in some training rows that also have b, (n, dim). By `a/b` and `b/a` hubs are known,
            see `bridgekit.retrieval.hub_penalty`. Older bridges have none.
        speech: weights and bias, (dim + 1,), of a linear classifier of audio embeddings: speech or another sound; or None.
        training_rows: hashes of the rows that it was trained on.
        folder: where it was loaded from, or None for a bridge made in this process. Paths that a loaded bridge names are
            checked before they are opened: see `bridgekit.bridge.trust`.
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
    banks: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    speech: Tensor | None = field(default=None, repr=False, compare=False)
    _encoders: dict[str, Encoder] = field(default_factory=dict, repr=False, compare=False)
    training_rows: TrainingRows = field(default_factory=TrainingRows, repr=False, compare=False)
    folder: Path | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        sides = ", ".join(f"{modality}={side.encoder!r}" for modality, side in self.sides.items())
        return f"Bridge({sides}, dim={self.dim}, temperature={self.temperature:.3g})"

    @property
    def dim(self) -> int:
        """Width of the shared space."""
        frozen = [side.dim for side in self.sides.values() if side.frozen]
        return frozen[0] if frozen else self.preset.shared_dim

    def method(self, *modalities: str) -> str:
        """The name of the method that these sides are from: of the one bound last among them, else of all that were aligned."""
        bound = [record for record in self.provenance.get("bound", ()) if record["modality"] in modalities]
        return str((bound[-1] if bound else self.provenance).get("method", "FuseMix"))

    def hub_penalty(self, query: str, to: str, candidates: Tensor) -> Tensor | None:
        """What candidates lose in a search, see `bridgekit.retrieval.hub_penalty`.

        Arguments:
            query: the modality of the queries.
            to: the modality of the candidates.
            candidates: (m, dim) embeddings at unit length.

        Returns:
            (m,), or None within one modality, and for two that were not paired with each other.
        """
        return bank_penalty(self.banks, query, to, candidates)

    @property
    def tables(self) -> list[TrainedOn]:
        """The tables that it was trained on: the first one, and one for each modality that was bound to it later."""
        return [
            TrainedOn(
                table.get("pairs", ""),
                tuple(table.get("modalities", self.sides)),
                table.get("seed", 0),
                table.get("modality"),
                table.get("columns", {}),
            )
            for table in (self.provenance, *self.provenance.get("bound", ()))
        ]

    def table_of(self, modality: str) -> str:
        """The source of the first of these tables with this modality, or an empty string."""
        return next((table.source for table in self.tables if modality in table.modalities), "")

    def trained_with(self, modality: str) -> TrainedOn:
        """The first of `tables` with this modality.

        Raises:
            BridgekitError: the bridge does not record one.
        """
        table = next((table for table in self.tables if modality in table.modalities), None)
        if table is None or not table.source:
            raise BridgekitError(
                f"the bridge does not record which {modality} it was trained on", remedy="train it again from a permanent table"
            )
        return table

    def open_own(self, table: TrainedOn, *, outside: bool = False) -> Table:
        """One of `tables`: raises what `bridgekit.bridge.trust.refuse_untrusted_table` and `open_table` raise."""
        refuse_untrusted_table(table.source, self.folder)
        with _found_again(table.source):
            return open_table(table.source, columns=table.columns, outside=outside)

    def open_other(self, pairs: Any, columns: Mapping[str, str], *, outside: bool = False) -> Table:
        """Another table, in which columns that the bridge's first table was read by are named too, where it has them."""
        table = open_table(pairs, columns=columns, outside=outside)
        own = {modality: name for modality, name in self.tables[0].columns.items() if name in table.load().names}
        return replace(table, given={**own, **columns}) if own else table

    def own_items(self, modality: str, *, outside: bool = False) -> list[Item]:
        """The distinct items of a modality in the first of `tables` that has it: raises what `open_own` raises."""
        table = self.trained_with(modality)
        refuse_untrusted_table(table.source, self.folder)
        with _found_again(table.source):
            return read_items(table.source, modality, columns=table.columns, outside=outside)

    def heard(self, modality: str, embeddings: Tensor, nearest: Sequence[Sequence[Hit]]) -> list[Heard]:
        """What the bridge can say of items besides their nearest texts.

        Arguments:
            modality: of the items.
            embeddings: (n, dim) at unit length.
            nearest: each item's nearest texts, best first.
        """
        thresholds, found = self.provenance.get("sure", {}), []
        for vector, hits in zip(embeddings, nearest, strict=True):
            speech = None
            if modality == "audio" and self.speech is not None:
                speech = float((vector @ self.speech[:-1] + self.speech[-1]).sigmoid())
            threshold = thresholds.get("speech" if speech is not None and speech > 0.5 else modality)
            found.append(Heard(None if threshold is None or not hits else hits[0].similarity >= threshold, speech))
        return found

    def weights_hash(self, modalities: Sequence[str]) -> str:
        """SHA-256 of the adapters' weights for some modalities. It changes whenever their embeddings do."""
        digest = hashlib.sha256()
        for modality in modalities:
            for name, tensor in self.adapters[modality].state_dict().items():
                digest.update(f"{modality}.{name}".encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def side(self, modality: str) -> Side:
        """The side of a modality.

        Raises:
            BridgekitError: the bridge does not have the modality.
        """
        if modality not in self.sides:
            raise BridgekitError(f"this bridge has no modality {modality!r}", remedy=f"it has {', '.join(self.sides)}")
        return self.sides[modality]

    def encoder(self, modality: str) -> Encoder:
        """The side's frozen encoder, opened on first use.

        Raises:
            BridgekitError: the installed encoder is not the one that the bridge was trained on; or as from
                `bridgekit.bridge.trust.opening_encoder`.
        """
        side = self.side(modality)
        if modality not in self._encoders:
            with opening_encoder(side.encoder, self.folder):
                encoder = load_encoder(side.encoder, self.device, side.revision)
            found = f"{encoder.revision} for {encoder.modality} with {encoder.dim} dimensions"
            expected = f"{side.revision} for {modality} with {side.dim} dimensions"
            if found != expected:
                raise BridgekitError(
                    f"{side.encoder} is not the encoder that this bridge was trained on",
                    where=f"trained on {expected}; installed is {found}",
                    remedy="install the version it was trained with, copy the bridge again, or retrain it",
                )
            self._encoders[modality] = encoder
        return self._encoders[modality]

    def project(self, modality: str, latents: Tensor) -> Tensor:
        """Map latents of a modality's encoder, (n, d), into the shared space, (n, dim) at unit length."""
        return project(self.adapters[modality], latents)

    @overload
    def embed(self, modality: str, items: Sequence[Any] | Any, *, report: Report = silent) -> Tensor: ...

    @overload
    def embed(self, *, report: Report = silent, **by_modality: Any) -> dict[str, NDArray[np.float32]]: ...

    def embed(
        self, modality: str | None = None, items: Any = (), *, report: Report = silent, **by_modality: Any
    ) -> Tensor | dict[str, NDArray[np.float32]]:
        """Embed items into the shared space: `embed("audio", ["a.wav"])`, or `embed(audio=["a.wav"], text=["a dog", "rain"])`.

        Arguments:
            modality: one of the bridge's.
            items: paths, strings for `text`, or objects in memory, see `bridgekit.media.as_item`: PIL images, arrays, pairs of
                samples and sample rate. A single item counts as a list of one.
            report: gets the progress of encoding.
            by_modality: modality to items.

        Returns:
            (n, dim) float32 at unit length, in order: a tensor, or by modality, NumPy arrays.

        Raises:
            ItemError: an item cannot be used. `embed_usable` sets such items aside instead.
            BridgekitError: an object cannot be an item of this modality. The message says what can.
        """
        if modality is None:
            return {name: np.asarray(self.embed(name, each, report=report)) for name, each in by_modality.items()}
        embedded = self.embed_usable(modality, items, report=report)
        for position, reason in embedded.failed.items():
            where = item_name(_as_items(items, modality)[position])[:200]
            raise ItemError(reason, where=where, remedy="fix this item, or leave it out")
        return embedded.vectors

    def embed_usable(self, modality: str, items: Sequence[Any] | Any, *, report: Report = silent) -> Embedded:
        """Like `embed` for one modality, but items that cannot be used are set aside."""
        encoder = self.encoder(modality)
        latents = encode_items(encoder, _as_items(items, modality), report=report)
        usable = latents.ids >= 0
        vectors = self.project(modality, latents.matrix[torch.from_numpy(latents.ids[usable])])
        finite = vectors.isfinite().all(1)
        overflowed = dict.fromkeys(np.flatnonzero(usable)[~finite.numpy()].tolist(), "its embedding is not finite")
        return Embedded(vectors[finite], {**latents.failed, **overflowed})

    def classify(
        self,
        modality: str,
        items: Sequence[Any] | Any,
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        *,
        report: Report = silent,
    ) -> NDArray[np.float32]:
        """Zero-shot classification by text prompts, as CLIP does it.

        Arguments:
            modality: of the items.
            items: as for `embed`.
            classes: class names.
            templates: prompts with `{}` in place of the class name. A class is the mean of its prompts' embeddings.
            report: gets the progress of encoding.

        Returns:
            (n, len(classes)) probabilities: the softmax of the similarities divided by the bridge's temperature.

        Raises:
            ItemError: an item cannot be used.
        """
        prompts = class_embeddings(lambda texts: self.embed(TEXT, texts, report=report), classes, templates)
        similarities = self.embed(modality, items, report=report) @ prompts.T
        penalty = self.hub_penalty(modality, TEXT, prompts)
        logits = (similarities if penalty is None else similarities - penalty) / self.temperature
        return np.asarray(logits.softmax(-1))

    def similarity(self, **items: Sequence[Item] | Item) -> Tensor:
        """Cosine similarities, for example `bridge.similarity(audio=["dog.wav"], text=["a dog", "rain"])`.

        Arguments:
            items: one or two modalities with their items. A single modality is compared with itself.

        Returns:
            (n, m): a row for each of the first modality's items, a column for each of the second's.

        Raises:
            ItemError: an item cannot be used.
        """
        if not 1 <= len(items) <= 2:
            raise TypeError("similarity() takes one or two modalities: similarity(audio=[...], text=[...])")
        embedded = [self.embed(modality, each) for modality, each in items.items()]
        return embedded[0] @ embedded[-1].T

    def expected(self, vectors: Tensor, among: Tensor, sharpness: float = 1.0) -> Tensor:
        """The expected counterpart of each embedding among embeddings of another modality, under the contrastive model.

        Arguments:
            vectors: (n, dim) at unit length.
            among: (m, dim) at unit length, for example of all captions.
            sharpness: factor on the logits, which are similarities divided by the bridge's temperature.

        Returns:
            (n, dim) at unit length: for each vector, the mean of `among` weighted by the softmax of the logits.
        """
        weights = (sharpness * vectors @ among.T / self.temperature).softmax(-1)
        return nn.functional.normalize(weights @ among, dim=-1)

    def search(
        self,
        modality: str,
        queries: Sequence[Any] | Any,
        among_modality: str,
        among: Sequence[Any],
        k: int = 10,
        *,
        through: tuple[str, Sequence[Item]] | None = None,
        report: Report = silent,
    ) -> list[list[Hit]]:
        """The k nearest items of one modality to each query of another, best first: by similarity, less a penalty for hubs.

        Arguments:
            modality: of the queries.
            queries: as the items of `embed`.
            among_modality: of the candidates.
            among: the candidates. Those that cannot be used are left out.
            k: hits per query.
            through: a third modality and items of it, for example `("text", names)`: each query is replaced by its expected
                counterpart among them (see `expected`). This helps if the two modalities were never paired with each other.
            report: gets the progress of encoding.

        Raises:
            ItemError: a query cannot be used.
            BridgekitError: no candidate can be used.
        """
        embedded = self.embed(modality, queries, report=report)
        return self.find(modality, embedded, among_modality, among, k, through=through, report=report)

    def find(
        self,
        modality: str,
        embedded: Tensor,
        among_modality: str,
        among: Sequence[Any],
        k: int = 10,
        *,
        through: tuple[str, Sequence[Item]] | None = None,
        report: Report = silent,
    ) -> list[list[Hit]]:
        """Like `search`, for queries that are embedded already: (n, dim) at unit length."""
        if through:
            between = self.embed_usable(*through, report=report).vectors
            if not len(between):
                raise BridgekitError(f"there is no usable {through[0]} to search through")
            embedded = self.expected(embedded, between)
        candidates = self.embed_usable(among_modality, among, report=report)
        items = [item for position, item in enumerate(among) if position not in candidates.failed]
        if not items:
            raise BridgekitError(f"there is no usable {among_modality} to search")
        penalty = self.hub_penalty(through[0] if through else modality, among_modality, candidates.vectors)
        return nearest(embedded, candidates.vectors, items, k, penalty)

    def save(
        self,
        path: str | Path,
        *,
        pictures: Mapping[str, bytes] | None = None,
        overwrite: bool = False,
        grown_from: Path | None = None,
    ) -> Path:
        """Write the bridge's folder atomically.

        Arguments:
            path: the folder.
            pictures: file name to PNG bytes, written into the folder.
            overwrite: whether an existing bridge may be replaced.
            grown_from: folder of the bridge that this one extends: its pictures, report and conditioners stay valid, so they
                are copied.

        Raises:
            BridgekitError: something is there that must not be replaced, or the folder cannot be written.
        """
        folder = Path(path)
        tensors = {
            f"{modality}.{name}": tensor.detach().cpu().contiguous()
            for modality, adapter in self.adapters.items()
            for name, tensor in adapter.state_dict().items()
        }
        tensors |= {f"{MEAN}{modality}": mean.contiguous() for modality, mean in self.means.items()}
        tensors |= {f"{BANK}{pair}": bank.half().contiguous() for pair, bank in self.banks.items()}
        tensors |= {} if self.speech is None else {SPEECH: self.speech.contiguous()}
        weights = save(tensors, {"format": str(FORMAT)})
        metadata = {
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
                for pattern in ("*.png", "report.html", "conditioners/[!.]*"):  # hidden conditioners are still being written
                    for file in grown_from.glob(pattern):
                        copy = aside / file.relative_to(grown_from)
                        copy.parent.mkdir(exist_ok=True)
                        shutil.copyfile(file, copy)
            for name, data in (pictures or {}).items():
                (aside / name).write_bytes(data)
            shown = sorted(file.name for file in aside.glob("*.png"))
            (aside / "README.md").write_text(model_card(metadata, folder.name, shown), encoding="utf-8")
            text = without_surrogates(json.dumps(metadata, indent=2, ensure_ascii=False))
            (aside / "bridge.json").write_text(text + "\n", encoding="utf-8")

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
                    # A single failure proves nothing: the folder may have been missing between a writer's two renames.
                    if still_there() and failed:
                        raise
                    failed = still_there()
                else:
                    if still_there():
                        return bridge
            # The folder was replaced meanwhile, so the files may belong to two bridges: read them again.

    @classmethod
    def _load(cls, path: str | Path, device: str) -> Bridge:
        folder = Path(path)
        metadata = read_metadata(folder)
        preset = Preset(**metadata["preset"])
        sides = {modality: Side(**side) for modality, side in metadata["sides"].items()}
        # Without memory for their tensors, which are then taken from the file.
        with torch.device("meta"):
            adapters: dict[str, Adapter] = {
                modality: FrozenSide(side.dim)
                if side.frozen
                else FusionAdapter(side.dim, metadata["dim"], preset.blocks, preset.expansion, preset.dropout)
                for modality, side in sides.items()
            }
        shapes = {
            f"{modality}.{name}": tuple(tensor.shape)
            for modality, adapter in adapters.items()
            for name, tensor in adapter.state_dict().items()
        }
        optional = {f"{MEAN}{modality}": (metadata["dim"],) for modality in sides} | {SPEECH: (metadata["dim"] + 1,)}
        pairs = [f"{a}/{b}" for a, b in permutations(sides, 2)]
        banks = {f"{BANK}{pair}": (BANK_ROWS, metadata["dim"]) for pair in pairs}
        tensors = read_tensors(folder, metadata["adapters_sha256"], shapes, optional, up_to=banks)
        device = resolve_device(device)
        for modality, adapter in adapters.items():
            own = {name: tensors[f"{modality}.{name}"] for name in adapter.state_dict()}
            adapter.load_state_dict(own, assign=True)
            adapter.eval().to(device)
        return cls(
            sides,
            adapters,
            preset,
            float(metadata["temperature"]),
            metadata["provenance"],
            metadata["metrics"],
            read_history(folder),
            device,
            # In the order of the sides: safetensors returns tensors in any order.
            {modality: tensors[MEAN + modality] for modality in sides if MEAN + modality in tensors},
            {pair: tensors[BANK + pair] for pair in pairs if BANK + pair in tensors},
            speech=tensors.get(SPEECH),
            training_rows=TrainingRows.load(folder),
            folder=folder,
        )


@contextmanager
def _held(folder: Path) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether the same folder is still at this path.

    The folder is kept open meanwhile, or its replacement could get its inode number, which identifies it.
    """
    descriptor = None
    with suppress(OSError):  # it is missing, or cannot be listed
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    before = _inode(folder) if descriptor is None else os.fstat(descriptor).st_ino
    try:
        yield lambda: _inode(folder) == before
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except OSError:
        return None


@contextmanager
def _found_again(source: str) -> Iterator[None]:
    """Say what to do if the table that a bridge was trained on is not here."""
    try:
        yield
    except BridgekitError as error:
        if error.what not in ("there is no such table", "there is no such shard"):
            raise
        in_memory = source.endswith(" in memory")
        raise BridgekitError(
            f"the table that the bridge was trained on {'was in memory' if in_memory else 'is not here'}",
            where=source,
            remedy=f"{'' if in_memory else 'run this in the folder where it was trained, or '}name a table yourself "
            "(eval or report --pairs, search --among, generate --captions)",
        ) from None


def _as_list(items: Sequence[Any] | Any) -> list[Any]:
    if hasattr(items, "to_list"):  # a column of a DataFrame
        return list(items.to_list())
    is_clip = isinstance(items, tuple) and len(items) == 2 and isinstance(items[1], int | float)
    return list(items) if isinstance(items, Sequence) and not isinstance(items, str | bytes) and not is_clip else [items]


def _as_items(items: Sequence[Any] | Any, modality: str) -> list[Item]:
    return [as_item(item, modality, f"{modality} {number}") for number, item in enumerate(_as_list(items), 1)]


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise BridgekitError unless a bridge may be written at `folder`."""
    put_back(folder)
    if not folder.exists():
        check_writable(folder.parent)
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "bridge.json").exists()):
        raise BridgekitError("there is something here that is not a bridge", where=str(folder), remedy="choose another --out")
    if (folder / "bridge.json").exists() and not overwrite:
        raise BridgekitError(
            "there is already a bridge here, trained on other pairs or with other settings",
            where=str(folder),
            remedy="choose another --out, or replace it with --overwrite",
        )
