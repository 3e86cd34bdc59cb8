"""What the server works with: the bridges and models there are, opened when first asked for, and what is done with them."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.diffusion.conditioner import close_gap
from bridgekit.diffusion.models import DrawOptions, open_model
from bridgekit.diffusion.painter import Painter, mix, open_painter, paint
from bridgekit.diffusion.previews import preview
from bridgekit.diffusion.sheets import png
from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.image_models import ImageModel
from bridgekit.media import content_hash
from bridgekit.plugins import installed_plugins
from bridgekit.progress import Report
from bridgekit.server.batching import Batcher
from bridgekit.server.jobs import Queue, Tell
from bridgekit.server.limits import Limits, Refusal, busy
from bridgekit.server.shelves import OPENING, Media, Shelf, Shelves, open_encoder
from bridgekit.server.uploads import Given, prepare

#: Bridges that are kept open; with each come its encoders.
OPEN_BRIDGES = 3
#: Unfinished pictures that are shown of each.
PREVIEWS = 5
#: Seconds that a search waits for what it searches to be read.
PATIENCE = 10
#: Seconds between two reports of one kind of work.
REPORT_SECONDS = 0.2


@dataclass(frozen=True, eq=False)
class Opened:
    """A bridge in use.

    Arguments:
        name: what clients call it.
        folder: where it is.
        stamp: when it was written; a bridge that was trained again is opened again.
        bridge: the bridge.
        shelves: its own items.
    """

    name: str
    folder: Path
    stamp: int
    bridge: Bridge
    shelves: Shelves


@dataclass(frozen=True)
class Wish:
    """What a picture is to be like; the arguments are those of `bridgekit.generate`.

    Arguments:
        watched: whether somebody looks on while it forms. Each look costs a tenth of the picture.
    """

    model: str
    weights: Sequence[float]
    prompt: str | None
    prompt_weight: float
    gap: str
    seed: int
    steps: int | None
    guidance: float | None
    size: int | None
    watched: bool


class Studio:
    """Bridges, models, encoders and pictures of one server.

    Arguments:
        limits: see there.
        bridges: the folder whose bridges are offered.
        named: one more, which then is the default.
        model: a model beside the plugins', which then is the default.
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
        self._read: dict[tuple[Path, int], dict[str, Any]] = {}
        self._remembered: OrderedDict[tuple[Opened, str, bytes], Tensor] = OrderedDict()
        self._models: dict[str, ImageModel] = {}
        self._painters: dict[tuple[Opened, str], Painter] = {}
        # Made here, where there may be no event loop yet; it lets as many decode at a time as there are cores.
        self._decoders = anyio.CapacityLimiter(os.cpu_count() or 1)

    # ---- what there is

    def bridges(self) -> dict[str, Path]:
        """The bridges that clients may name, the default one first: the one given, or else the newest."""
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
            remedy = "in bridgekit's own folder: pip install plugins/bridgekit-starter; or start the server with --model"
            raise Refusal(404, "there is no text-to-image model", remedy=remedy)
        if name is not None and name not in known:
            # Not whatever a client names: to load a model is to fetch and run what its maker wrote.
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
            raise Refusal(
                404, "this server has no such bridge", where=name[:100], remedy=f"its bridges are {', '.join(known)}"[:500]
            )
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
            opened = self._opened[name] = Opened(name, known[name], stamp, bridge, Shelves(bridge))
            if len(self._opened) > OPEN_BRIDGES:
                self._forget(self._opened.popitem(last=False)[1])
            return opened

    def _forget(self, opened: Opened) -> None:
        opened.shelves.close()
        for key in [key for key in self._remembered if key[0] is opened]:
            self._remembered.pop(key, None)
        for painted in [key for key in self._painters if key[0] is opened]:
            self._painters.pop(painted, None)

    def describe(self) -> dict[str, Any]:
        """What there is, for `GET /bridge`. Blocks while the default bridge is opened."""
        found = []
        for number, (name, folder) in enumerate(self.bridges().items()):
            told = self._about(folder)
            if (number == 0 or name in self._opened) and not told["problem"]:
                shelves = self.open(name).shelves
                told["modalities"] = {
                    modality: told["modalities"][modality] | shelves.state(modality) for modality in told["modalities"]
                }
            found.append({"name": name, **told})
        return {"bridges": found, "models": self.models()}

    def _about(self, folder: Path) -> dict[str, Any]:
        """What a bridge is, opened or not; it is read once for each time that it was written."""
        key = (folder, _stamp(folder))
        if key not in self._read:
            try:
                bridge = Bridge.load(folder, "cpu")
            except BridgekitError as error:
                self._read[key] = {"problem": error.what, "modalities": {}}
            else:
                unread = {"items": None, "ready": False, "problem": None}
                self._read[key] = {
                    "problem": None,
                    "dim": bridge.dim,
                    "temperature": bridge.temperature,
                    "modalities": {modality: {"encoder": side.encoder, **unread} for modality, side in bridge.sides.items()},
                    "pairs": [list(table.modalities) for table in bridge.tables],
                }
        return dict(self._read[key])

    # ---- what is done

    async def embed(self, opened: Opened, inputs: Sequence[Given]) -> Tensor:
        """Inputs into a bridge's space: (n, dim) at unit length, in their order.

        Raises:
            BridgekitError: one of them cannot be used; the message names it. Or there is no room now.
        """
        for given in inputs:
            if given.modality not in opened.bridge.sides:
                known = ", ".join(opened.bridge.sides)
                raise Refusal(
                    400,
                    f"the bridge {opened.name} has no side for {given.modality!r}",
                    where=given.name[:100],
                    remedy=f"its modalities are {known}",
                )
            if (given.modality == TEXT) != isinstance(given.item, str):
                what = "text comes as text, not as a file" if given.modality == TEXT else f"{given.modality} comes as a file"
                raise Refusal(400, what, where=given.name[:100], remedy="with curl: -F audio=@clip.wav, -F 'text=a dog'")
        keys = [(opened, given.modality, content_hash(given.item)) for given in inputs]
        missing = {key: given for key, given in zip(keys, inputs, strict=True) if key not in self._remembered}
        vectors = {key: self._remembered[key] for key in keys if key in self._remembered}
        ready: dict[str, list[Any]] = {}
        for (_, modality, _), given in missing.items():
            encoder = await anyio.to_thread.run_sync(open_encoder, opened.bridge, modality)
            prepared = await anyio.to_thread.run_sync(prepare, encoder, given, self.limits, limiter=self._decoders)
            ready.setdefault(modality, []).append(prepared)
        futures = {modality: self.batcher.submit(opened.bridge, modality, items) for modality, items in ready.items()}
        for modality, future in futures.items():
            rows = await asyncio.wrap_future(future)
            vectors |= zip([key for key in missing if key[1] == modality], split(rows), strict=True)
        for key in keys:
            self._remembered[key] = vectors[key]
            self._remembered.move_to_end(key)
        while len(self._remembered) > self.limits.vectors:
            self._remembered.popitem(last=False)
        return torch.cat([vectors[key] for key in keys])

    def shelf(self, opened: Opened, modality: str) -> Shelf:
        """A bridge's own items of one modality. Blocks a while where they are still being read.

        Raises:
            Refusal: they cannot be had, or not yet.
        """
        opened.bridge.side(modality)
        try:
            found = opened.shelves.find(modality, PATIENCE)
        except Exception as error:
            what = f"the bridge's own {modality} cannot be searched: {getattr(error, 'what', error)}"
            remedy = getattr(error, "remedy", None) or "start the server where the table is"
            raise Refusal(404, what, where=getattr(error, "where", None), remedy=remedy) from error
        if found is None:
            state = opened.shelves.state(modality)
            raise busy(f"the bridge's own {modality} is being read ({state['encoded']} of {state['items']})", 2)
        return found

    def between(self, opened: Opened, modality: str, target: str) -> str | None:
        """What a search should go through where two modalities never had pairs: the one that both had pairs with, or None."""
        tables = [set(table.modalities) for table in opened.bridge.tables]
        if modality == target or any({modality, target} <= table for table in tables):
            return None
        for other in sorted(opened.bridge.sides, key=lambda name: name != TEXT):
            if all(any({other, side} <= table for table in tables) for side in (modality, target)):
                return other
        return None

    def draw(self, opened: Opened, inputs: Sequence[Given], vectors: Tensor, wish: Wish, tell: Tell) -> dict[str, Any]:
        """One picture of embedded inputs. Runs in the pictures' thread.

        Arguments:
            opened: the bridge.
            inputs: n inputs.
            vectors: (n, dim), their embeddings.
            wish: what the picture is to be like.
            tell: told `progress` and `preview`.

        Returns:
            what `/generate` answers; the picture as base64.
        """
        started = time.monotonic()
        report = _throttled(tell)
        painter = self._painter(opened, wish.model, report)
        moved = [
            close_gap(opened.bridge, painter.conditioner, given.modality, vector, wish.gap)
            for given, vector in zip(inputs, split(vectors), strict=True)
        ]

        def watch(done: int, total: int, latents: Tensor) -> None:
            if (
                wish.watched
                and done < total
                and done % max(1, total // PREVIEWS) == 0
                and (picture := preview(painter.model, latents))
            ):
                tell("preview", {"step": done, "of": total, "picture": _base64(_jpeg(picture))})

        [picture] = paint(
            painter,
            mix(moved, wish.weights),
            DrawOptions(
                prompt=wish.prompt,
                prompt_weight=wish.prompt_weight,
                steps=wish.steps,
                guidance=wish.guidance,
                size=wish.size,
            ),
            seeds=wish.seed,
            report=report,
            watch=watch,
        )
        [nearest] = painter.conditioner.nearest(mix(split(vectors), wish.weights))
        story = {
            "bridge": opened.name,
            "model": wish.model,
            "prompt": wish.prompt,
            "gap": wish.gap,
            "seed": wish.seed,
            "inputs": [given.name for given in inputs],
            "weights": list(wish.weights),
            "nearest": [
                # Where the conditioner was fitted on pictures, their paths are nobody's business but this machine's.
                {"item": item if painter.conditioner.made_of == TEXT else Path(item).name, "similarity": round(score, 6)}
                for item, score in nearest
            ],
        }
        made = png(picture, {**story, "bridgekit": version("bridgekit")})
        seconds = round(time.monotonic() - started, 3)
        return {**story, "width": picture.width, "height": picture.height, "seconds": seconds, "picture": _base64(made)}

    def warm_up(self, tell: Tell) -> None:
        """Open the default bridge with its encoders and the default model, so that the first to come does not wait for them."""
        opened = self.open()
        for modality in opened.bridge.sides:
            open_encoder(opened.bridge, modality)
        self._painter(opened, self.model(None), _throttled(tell))

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
        """Stop all work, within about a second."""
        for opened in self._opened.values():
            opened.shelves.close()
        self.pictures.close()
        self.batcher.close()


def _stamp(folder: Path) -> int:
    """When a bridge was last written; 0 where it is gone."""
    with suppress(OSError):
        return (folder / "bridge.json").stat().st_mtime_ns
    return 0


def split(vectors: Tensor) -> list[Tensor]:
    """(n, dim) as n of (1, dim)."""
    return list(vectors[:, None])


def _throttled(tell: Tell) -> Report:
    """Reports as events: every call may end the work, a few a second are passed on."""
    last: dict[str, float] = {}

    def report(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - last.get(what, 0.0) >= REPORT_SECONDS or done == total:
            last[what] = now
            tell("progress", {"what": what, "done": done, "of": total})
        else:
            tell("", None)

    return report


def _jpeg(picture: Any) -> bytes:
    """A picture that is looked at for a moment, small."""
    picture.thumbnail((512, 512))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
