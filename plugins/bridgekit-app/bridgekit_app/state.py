"""The server's state: its bridges and models, opened when first requested, and the work done with them."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.bridge.provenance import installed_version
from bridgekit.diffusion.conditioner import close_gap
from bridgekit.diffusion.models import DrawOptions, open_model
from bridgekit.diffusion.painter import Painter, mix, open_painter, paint
from bridgekit.diffusion.sheets import png
from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.image_models import ImageModel
from bridgekit.media import content_hash
from bridgekit.plugins import INSTALL, installed_plugins
from bridgekit.progress import Report
from bridgekit_app.batching import Batcher
from bridgekit_app.galleries import OPENING, Galleries, Gallery, open_encoder
from bridgekit_app.jobs import Emit, Queue
from bridgekit_app.limits import Limits, Refusal, busy
from bridgekit_app.media import Media
from bridgekit_app.previews import preview
from bridgekit_app.uploads import Input, prepare

#: Bridges that are kept open, with their encoders.
OPEN_BRIDGES = 3
#: Unfinished pictures that are shown of each.
PREVIEWS = 5
#: Seconds that a search waits for a gallery to be filled.
PATIENCE = 10
#: Seconds between two progress events of one kind of work.
REPORT_SECONDS = 0.2


@dataclass(frozen=True, eq=False)
class Opened:
    """A bridge in use.

    Arguments:
        name: what clients call it.
        folder: where it is.
        stamp: when it was written; a bridge that was trained again is opened again.
        bridge: the bridge.
        galleries: its own items.
    """

    name: str
    folder: Path
    stamp: int
    bridge: Bridge
    galleries: Galleries


class AppState:
    """Bridges, models, encoders and pictures of one server.

    Arguments:
        limits: the server's bounds.
        bridges: the folder whose bridges are offered.
        named: one more bridge, which then is the default.
        model: a model in addition to the plugins', which then is the default.
        device: a torch device, or `auto`.
    """

    def __init__(
        self, limits: Limits, bridges: Path, named: Path | None = None, model: str | None = None, device: str = "auto"
    ) -> None:
        self.limits = limits
        self.batcher = Batcher(limits.encoding)
        self.pictures = Queue("pictures", limits.pictures, limits.pictures_each)
        self.media = Media(limits.media_bytes)
        self._bridges, self._named, self._model, self._device = bridges, named, model, device
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        self._opening = threading.Lock()
        self._descriptions: dict[tuple[Path, int], dict[str, Any]] = {}
        self._vectors: OrderedDict[tuple[Opened, str, bytes], Tensor] = OrderedDict()
        self._models: dict[str, ImageModel] = {}
        self._painters: dict[tuple[Opened, str], Painter] = {}
        # Made here, where there may be no event loop yet. As many inputs are decoded at the same time as there are cores.
        self._decoders = anyio.CapacityLimiter(os.cpu_count() or 1)

    # ---- what there is

    def bridges(self) -> dict[str, Path]:
        """The bridges that clients may name, the default one first: the named one, or else the newest."""
        found = {file.parent.name: file.parent for file in self._bridges.glob("*/bridge.json")}
        newest = sorted(found, key=lambda name: _stamp(found[name]), reverse=True)
        named = {self._named.resolve().name: self._named} if self._named else {}
        return named | {name: found[name] for name in newest if name not in named}

    def models(self) -> list[str]:
        """The text-to-image models that clients may name, the default one first."""
        brought = [generator.name for plugin in installed_plugins() for generator in plugin.generators]
        return list(dict.fromkeys([self._model, *brought] if self._model else brought))

    def model(self, name: str | None) -> str:
        """The model of that name, or the default one.

        Raises:
            Refusal: there is none.
        """
        known = self.models()
        if not known:
            remedy = f"{INSTALL.format('starter')}; or start the server with --model"
            raise Refusal(404, "there is no text-to-image model", remedy=remedy)
        if name is not None and name not in known:
            # Not whatever a client names: to load a model is to download it and to run what its author wrote.
            remedy = f"use {' or '.join(known)}, or start the server with --model"
            raise Refusal(404, "this server does not offer that model", where=name[:100], remedy=remedy)
        return name or known[0]

    def open(self, name: str | None = None) -> Opened:
        """The bridge of that name, or the default one. Blocks while it is opened.

        Raises:
            Refusal: there is none, or it cannot be opened.
        """
        known = self.bridges()
        if not known:
            remedy = "train one (bridgekit align --a audio --b text), or start the server with a bridge's folder"
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
                self._forget(self._opened.pop(name))
            try:
                bridge = Bridge.load(known[name], self._device)
            except BridgekitError as error:
                raise Refusal(404, error.what, where=name, remedy=error.remedy) from error
            opened = self._opened[name] = Opened(name, known[name], stamp, bridge, Galleries(bridge))
            if len(self._opened) > OPEN_BRIDGES:
                self._forget(self._opened.popitem(last=False)[1])
            return opened

    def _forget(self, opened: Opened) -> None:
        opened.galleries.close()
        for key in [key for key in self._vectors if key[0] is opened]:
            self._vectors.pop(key, None)
        for painted in [key for key in self._painters if key[0] is opened]:
            self._painters.pop(painted, None)

    def describe(self) -> dict[str, Any]:
        """The bridges and models, for `GET /bridge`. Blocks while the default bridge is opened."""
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
        """The description of a bridge, opened or not. Its file is read once for each time that it was written."""
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

    # ---- what is done

    async def embed(self, opened: Opened, inputs: Sequence[Input]) -> Tensor:
        """Inputs into a bridge's space: (n, dim) at unit length, in their order.

        Raises:
            BridgekitError: one of them cannot be used; the message names it. Or the server is busy.
        """
        for each in inputs:
            _check_input(opened, each)
        keys = [(opened, each.modality, content_hash(each.item)) for each in inputs]
        missing = {key: each for key, each in zip(keys, inputs, strict=True) if key not in self._vectors}
        vectors = {key: self._vectors[key] for key in keys if key in self._vectors}
        ready: dict[str, list[Any]] = {}
        for (_, modality, _), each in missing.items():
            encoder = await anyio.to_thread.run_sync(open_encoder, opened.bridge, modality)
            prepared = await anyio.to_thread.run_sync(prepare, encoder, each, self.limits, limiter=self._decoders)
            ready.setdefault(modality, []).append(prepared)
        encoded = await asyncio.gather(*(self.batcher.embed(opened.bridge, *each) for each in ready.items()))
        for modality, rows in zip(ready, encoded, strict=True):
            vectors |= zip([key for key in missing if key[1] == modality], unbind(rows), strict=True)
        for key in keys:
            self._vectors[key] = vectors[key]
            self._vectors.move_to_end(key)
        while len(self._vectors) > self.limits.vectors:
            self._vectors.popitem(last=False)
        return torch.cat([vectors[key] for key in keys])

    def gallery(self, opened: Opened, modality: str) -> Gallery:
        """A bridge's own items of one modality. Blocks for up to `PATIENCE` seconds while they are being read.

        Raises:
            Refusal: they cannot be read, or not yet.
        """
        opened.bridge.side(modality)
        try:
            return opened.galleries.find(modality, PATIENCE)
        except TimeoutError:
            state = opened.galleries.state(modality)
            done, total = state.get("encoded", 0), state["items"]
            raise busy(f"the bridge's own {modality} is being read ({done} of {total})", 2) from None
        except Exception as error:
            what = f"the bridge's own {modality} cannot be searched: {getattr(error, 'what', error)}"
            remedy = getattr(error, "remedy", None) or "start the server where the table is"
            raise Refusal(404, what, where=getattr(error, "where", None), remedy=remedy) from error

    def between(self, opened: Opened, modality: str, target: str) -> str | None:
        """What a search should go through where two modalities never had pairs: the one that both had pairs with, or None."""
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
        """Draw one picture of embedded inputs. Runs in the pictures' thread.

        Arguments:
            opened: the bridge.
            model: the name of the text-to-image model.
            inputs: n inputs, mixed by their weights.
            vectors: (n, dim), their embeddings.
            options: how to draw it.
            seed: random seed of the noise.
            previews: whether to emit the unfinished picture. Each preview costs a tenth of the picture's time.
            emit: receives `progress` and `preview`.

        Returns:
            what `/generate` answers; the picture as base64.
        """
        started = time.monotonic()
        report = _throttled(emit)
        painter = self._painter(opened, model, report)
        weights = [each.weight for each in inputs]
        moved = [
            close_gap(opened.bridge, painter.conditioner, each.modality, vector, options.gap)
            for each, vector in zip(inputs, unbind(vectors), strict=True)
        ]

        def watch(done: int, total: int, latents: Tensor) -> None:
            due = previews and done < total and done % max(1, total // PREVIEWS) == 0
            if due and (picture := preview(painter.model, latents)):
                emit("preview", {"step": done, "of": total, "picture": _base64(_jpeg(picture))})

        [picture] = paint(painter, mix(moved, weights), options, seeds=seed, report=report, watch=watch)
        [nearest] = painter.conditioner.nearest(mix(unbind(vectors), weights))
        # Where the conditioner was fitted on pictures, their paths are not for clients.
        texts = painter.conditioner.made_of == TEXT
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
        }
        data = png(picture, {**metadata, "bridgekit": installed_version()})
        seconds = round(time.monotonic() - started, 3)
        return {**metadata, "width": picture.width, "height": picture.height, "seconds": seconds, "picture": _base64(data)}

    def warm_up(self, emit: Emit) -> None:
        """Open the default bridge with its encoders and the default model, so that the first client does not wait for them."""
        opened = self.open()
        for modality in opened.bridge.sides:
            open_encoder(opened.bridge, modality)
        self._painter(opened, self.model(None), _throttled(emit))

    def _painter(self, opened: Opened, name: str, report: Report) -> Painter:
        key = (opened, name)
        if key not in self._painters:
            if name not in self._models:
                report("loading model", 0, 1)
                self._models.clear()  # one at a time: a large one may fill the memory
                for other in [key for key in self._painters if key[1] != name]:
                    del self._painters[other]
                with OPENING:
                    self._models[name] = open_model(name, self._device)
            self._painters[key] = open_painter(opened.bridge, self._models[name], opened.folder, report=report)
        return self._painters[key]

    def close(self) -> None:
        """Stop filling galleries and drawing."""
        for opened in self._opened.values():
            opened.galleries.close()
        self.pictures.close()


def unbind(vectors: Tensor) -> list[Tensor]:
    """(n, dim) as n of (1, dim)."""
    return list(vectors[:, None])


def _check_input(opened: Opened, sent: Input) -> None:
    """Refuse an input of a modality that the bridge lacks, a file that came as text, and a text that came as a file."""
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
    """When a bridge was last written; 0 if it is gone."""
    with suppress(OSError):
        return (folder / "bridge.json").stat().st_mtime_ns
    return 0


def _throttled(emit: Emit) -> Report:
    """Progress as events: every call may cancel the work, but only a few a second are passed on."""
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
    """A small JPEG of a picture that is seen for a moment."""
    picture.thumbnail((512, 512))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
