"""The server's state: bridges and models, opened on first use, and the operations on them."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import TimeoutError
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.bridge.provenance import installed_version
from bridgekit.decoding.isolation import retire_idle
from bridgekit.diffusion.conditioner import close_gap
from bridgekit.diffusion.models import DrawOptions, open_model
from bridgekit.diffusion.painter import Painter, mix, open_painter, paint
from bridgekit.diffusion.sheets import png
from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.image_models import ImageModel
from bridgekit.media import content_hash
from bridgekit.plain import plain
from bridgekit.plugins import INSTALL, bundled_bridge, installed_plugins
from bridgekit.progress import Report
from bridgekit_app.batching import Batcher
from bridgekit_app.galleries import OPENING, Galleries, Gallery, open_encoder
from bridgekit_app.jobs import Emit, Queue
from bridgekit_app.limits import Limits, Refusal, busy
from bridgekit_app.media import Media
from bridgekit_app.previews import preview
from bridgekit_app.uploads import Input, prepare

#: Bridges kept open, with their encoders.
OPEN_BRIDGES = 3
#: Previews per image.
PREVIEWS = 5
#: Seconds a search waits for a gallery.
PATIENCE = 10
#: Minimum seconds between progress events of one kind.
REPORT_SECONDS = 0.2
#: Seconds after which a decoder process that has nothing to do ends: each takes about 40 MB, and starts in a second.
IDLE_SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Opened:
    """An open bridge.

    Arguments:
        stamp: the time it was written, to notice that it was trained again.
        vectors: embeddings of recent inputs, by modality and content. Only the event loop uses it.
        painters: by model. Only the thread of `AppState.pictures` uses it.
    """

    name: str
    folder: Path
    stamp: int
    bridge: Bridge
    galleries: Galleries
    vectors: OrderedDict[tuple[str, bytes], Tensor]
    painters: dict[str, Painter]


class AppState:
    """Bridges, models, encoders and queues of one server. Arguments as for `create_app`, whose `bridge` is `named` here."""

    def __init__(
        self,
        limits: Limits,
        bridges: Path,
        named: Path | None = None,
        model: str | None = None,
        device: str = "auto",
        warm: bool = True,
    ) -> None:
        self.limits = limits
        self.batcher = Batcher(limits.encoding)
        self.media = Media(limits.media_bytes)
        self._bridges, self._named, self._model, self._device = bridges, named, model, device
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        self._opening = threading.Lock()
        self._descriptions: dict[tuple[Path, int], dict[str, Any]] = {}
        self._models: dict[str, ImageModel] = {}
        self._decoders = anyio.CapacityLimiter(os.cpu_count() or 1)
        first = self.warm_up if warm else None
        self.pictures = Queue("pictures", limits.pictures, limits.pictures_each, first, limits.pictures_address)

    # ---- bridges and models

    def bridges(self) -> dict[str, Path]:
        """The bridges, the default first: the one given at start, or else the newest; last, one that comes with a plugin."""
        found = {plain(file.parent.name): file.parent for file in self._bridges.glob("*/bridge.json")}
        newest = sorted(found, key=lambda name: _stamp(found[name]), reverse=True)
        named = {plain(self._named.resolve().name): self._named} if self._named else {}
        bundled = bundled_bridge()
        own = named | {name: found[name] for name in newest if name not in named}
        return own if bundled is None or bundled.name in own else own | {bundled.name: bundled}

    def models(self) -> list[str]:
        """The available text-to-image models, the default first."""
        installed = [generator.name for plugin in installed_plugins() for generator in plugin.generators]
        return list(dict.fromkeys([self._model, *installed] if self._model else installed))

    def model(self, name: str | None) -> str:
        """The name of the requested model, or of the default.

        Raises:
            Refusal: it is not available.
        """
        known = self.models()
        if not known:
            remedy = f"{INSTALL.format('starter')}; or start the server with --model"
            raise Refusal(404, "there is no text-to-image model", remedy=remedy)
        if name is not None and name not in known:
            # Clients cannot load arbitrary models: that would download them and run their authors' code.
            remedy = f"use {' or '.join(known)}, or start the server with --model"
            raise Refusal(404, "this server does not offer that model", where=name[:100], remedy=remedy)
        return name or known[0]

    def open(self, name: str | None = None) -> Opened:
        """The requested bridge, or the default. Blocks while it is being opened.

        Raises:
            Refusal: it does not exist or cannot be opened.
        """
        known = self.bridges()
        if not known:
            remedy = "train one (bridgekit align --a audio --b text), or start the server with a bridge folder"
            raise Refusal(404, f"there is no bridge in {self._bridges}", remedy=remedy)
        if name is not None and name not in known:
            remedy = f"its bridges are {', '.join(known)}"[:500]
            raise Refusal(404, "this server has no such bridge", where=name[:100], remedy=remedy)
        name = name or next(iter(known))
        with self._opening:
            stamp = _stamp(known[name])
            held = self._opened.get(name)
            if held and (held.stamp, held.folder) == (stamp, known[name]):
                self._opened.move_to_end(name)
                return held
            if held:
                self._opened.pop(name).galleries.close()
            try:
                bridge = Bridge.load(known[name], self._device)
            except BridgekitError as error:
                raise Refusal(404, error.what, where=name, remedy=error.remedy) from error
            opened = self._opened[name] = Opened(name, known[name], stamp, bridge, Galleries(bridge), OrderedDict(), {})
            if len(self._opened) > OPEN_BRIDGES:
                self._opened.popitem(last=False)[1].galleries.close()
            return opened

    def describe(self) -> dict[str, Any]:
        """The bridges and models, for `GET /bridge`. Blocks while the default bridge is being opened."""
        found = []
        for number, (name, folder) in enumerate(self.bridges().items()):
            about = self._about(folder)
            if (number == 0 or name in self._opened) and not about["problem"]:
                galleries = self.open(name).galleries
                about["modalities"] = {
                    modality: side | galleries.state(modality) for modality, side in about["modalities"].items()
                }
            found.append({"name": name, **about})
        return {"bridges": found, "models": self.models()}

    def _about(self, folder: Path) -> dict[str, Any]:
        """The description of a bridge, cached until its file changes."""
        key = (folder, _stamp(folder))
        if key not in self._descriptions:
            try:
                bridge = Bridge.load(folder, "cpu")
            except BridgekitError as error:
                self._descriptions[key] = {"problem": error.what, "modalities": {}}
            else:
                unread = {"items": None, "ready": False, "problem": None}
                self._descriptions[key] = {
                    "problem": None,
                    "dim": bridge.dim,
                    "temperature": bridge.temperature,
                    "modalities": {modality: {"encoder": side.encoder, **unread} for modality, side in bridge.sides.items()},
                    "pairs": [list(table.modalities) for table in bridge.tables],
                }
        return dict(self._descriptions[key])

    # ---- embedding, searching, generating

    async def embed(self, opened: Opened, inputs: Sequence[Input]) -> Tensor:
        """Embeddings of n inputs in order: (n, dim), unit length.

        Raises:
            BridgekitError: an input cannot be used, or the server is busy.
        """
        for each in inputs:
            _check_input(opened, each)
        keys = [(each.modality, content_hash(each.item)) for each in inputs]
        missing = {key: each for key, each in zip(keys, inputs, strict=True) if key not in opened.vectors}
        vectors = {key: opened.vectors[key] for key in keys if key in opened.vectors}
        ready: dict[str, list[Any]] = {}
        for (modality, _), each in missing.items():
            encoder = await anyio.to_thread.run_sync(open_encoder, opened.bridge, modality)
            prepared = await anyio.to_thread.run_sync(prepare, encoder, each, self.limits, limiter=self._decoders)
            ready.setdefault(modality, []).append(prepared)
        encoded = await asyncio.gather(*(self.batcher.embed(opened.bridge, *each) for each in ready.items()))
        for modality, rows in zip(ready, encoded, strict=True):
            vectors |= zip([key for key in missing if key[0] == modality], torch.split(rows, 1), strict=True)
        for key in keys:
            opened.vectors[key] = vectors[key]
            opened.vectors.move_to_end(key)
        while len(opened.vectors) > self.limits.vectors:
            opened.vectors.popitem(last=False)
        return torch.cat([vectors[key] for key in keys])

    async def found(self, name: str) -> tuple[str, bytes] | None:
        """`Media.read` in a thread. Decoding shares its threads with that of inputs, and so its decoder processes."""
        return await anyio.to_thread.run_sync(self.media.read, name, limiter=self._decoders)

    async def retire_decoders(self) -> None:
        """End decoder processes that idle, for ever."""
        while True:
            await asyncio.sleep(IDLE_SECONDS / 2)
            await anyio.to_thread.run_sync(retire_idle, IDLE_SECONDS)

    def gallery(self, opened: Opened, modality: str) -> Gallery:
        """A bridge's own items of one modality. Waits up to `PATIENCE` seconds for them to be encoded.

        Raises:
            Refusal: they cannot be read, or are not ready.
        """
        opened.bridge.side(modality)
        try:
            return opened.galleries.find(modality, PATIENCE)
        except TimeoutError:
            state = opened.galleries.state(modality)
            done, total = state.get("encoded", 0), state["items"]
            raise busy(f"the bridge's own {modality} is being encoded ({done} of {total})", 2) from None
        except Exception as error:
            what = f"the bridge's own {modality} cannot be searched: {getattr(error, 'what', error)}"
            remedy = getattr(error, "remedy", None) or "start the server in a folder from which the table can be found"
            raise Refusal(404, what, where=getattr(error, "where", None), remedy=remedy) from error

    def between(self, opened: Opened, modality: str, target: str) -> str | None:
        """The modality to search through if two modalities had no common pairs: one that had pairs with both, or None."""
        tables = [set(table.modalities) for table in opened.bridge.tables]
        if modality == target or any({modality, target} <= table for table in tables):
            return None
        for other in sorted(opened.bridge.sides, key=lambda name: name != TEXT):
            if all(any({other, side} <= table for table in tables) for side in (modality, target)):
                return other
        return None

    def draw(
        self,
        opened: Opened,
        model: str,
        inputs: Sequence[Input],
        vectors: Tensor,
        options: DrawOptions,
        *,
        seed: int,
        previews: bool,
        emit: Emit,
    ) -> dict[str, Any]:
        """Generate an image from the weighted mixture of n inputs. Runs in the thread of `pictures`.

        Arguments as for `/generate`, whose response it returns, and:
            vectors: (n, dim), the embeddings of the inputs.
            previews: emit previews; each adds a tenth to the generation time.
            emit: receives `progress` and `preview`.
        """
        started = time.monotonic()
        report = _throttled(emit)
        painter = self._painter(opened, model, report)
        weights = [each.weight for each in inputs]
        moved = [
            close_gap(opened.bridge, painter.conditioner, each.modality, vector, options.gap)
            for each, vector in zip(inputs, torch.split(vectors, 1), strict=True)
        ]

        def watch(done: int, total: int, latents: Tensor) -> None:
            due = previews and done < total and done % max(1, total // PREVIEWS) == 0
            if due and (picture := preview(painter.model, latents)):
                emit("preview", {"step": done, "of": total, "picture": _base64(_jpeg(picture))})

        [picture] = paint(painter, mix(moved, weights), options, seeds=seed, report=report, watch=watch)
        mixed = mix(torch.split(vectors, 1), weights)
        [nearest] = painter.conditioner.nearest(mixed)
        # If the conditioner was fitted on images, clients must not see their paths.
        texts = painter.conditioner.made_of == TEXT
        alone = inputs[0].modality if len(inputs) == 1 else ""
        [heard] = opened.bridge.heard(alone, mixed, [nearest if texts else ()])
        metadata = {
            "bridge": opened.name,
            "model": model,
            "prompt": options.prompt,
            "gap": options.gap,
            "seed": seed,
            "inputs": [each.name for each in inputs],
            "weights": weights,
            "nearest": [
                {"item": hit.item if texts else Path(hit.item).name, "similarity": round(hit.similarity, 6)} for hit in nearest
            ],
            **asdict(heard),
        }
        data = png(picture, {**metadata, "bridgekit": installed_version()})
        seconds = round(time.monotonic() - started, 3)
        return {**metadata, "width": picture.width, "height": picture.height, "seconds": seconds, "picture": _base64(data)}

    def warm_up(self, emit: Emit) -> None:
        """Open the default bridge, its encoders and the default model, and fit its conditioner, before the first request."""
        opened = self.open()
        for modality in opened.bridge.sides:
            open_encoder(opened.bridge, modality)
        self._painter(opened, self.model(None), _throttled(emit))

    def _painter(self, opened: Opened, name: str, report: Report) -> Painter:
        if name not in opened.painters:
            if name not in self._models:
                report("loading model", 0, 1)
                self._models.clear()  # keep one at a time: two large models may not fit into memory
                with self._opening:
                    for other in self._opened.values():
                        other.painters.clear()
                with OPENING:
                    self._models[name] = open_model(name, self._device)
            opened.painters[name] = open_painter(opened.bridge, self._models[name], opened.folder, report=report)
        return opened.painters[name]

    def close(self) -> None:
        """Stop background work."""
        for opened in self._opened.values():
            opened.galleries.close()
        self.pictures.close()


def _check_input(opened: Opened, sent: Input) -> None:
    """Refuse a modality that the bridge lacks, text where a file is required, and a file where text is required."""
    if sent.modality not in opened.bridge.sides:
        known = ", ".join(opened.bridge.sides)
        what, remedy = f"the bridge {opened.name} has no side for {sent.modality!r}", f"its modalities are {known}"
    elif (sent.modality == TEXT) != isinstance(sent.item, str):
        what = f"{sent.modality} must be sent {'as text, not as a file' if sent.modality == TEXT else 'as a file'}"
        remedy = "with curl: -F audio=@clip.wav, -F 'text=a dog'"
    else:
        return
    raise Refusal(400, what, where=sent.name[:100], remedy=remedy)


def _stamp(folder: Path) -> int:
    """When a bridge was last written; 0 if it no longer exists."""
    with suppress(OSError):
        return (folder / "bridge.json").stat().st_mtime_ns
    return 0


def _throttled(emit: Emit) -> Report:
    """Progress as events, a few per second at most; every call checks for cancellation."""
    last: dict[str, float] = {}

    def report(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - last.get(what, 0.0) >= REPORT_SECONDS or done == total:
            last[what] = now
            emit("progress", {"what": what, "done": done, "of": total})
        else:
            emit("", None)

    return report


def _jpeg(picture: Any) -> bytes:
    """A preview as a small JPEG."""
    picture.thumbnail((512, 512))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
