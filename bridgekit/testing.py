"""Checks that a plugin's encoder keeps its contract, in one line of a test: `check_encoder("demo:v1", paths)`."""

from __future__ import annotations

import gc
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from bridgekit.encoders import Encoder, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.hardware import resolve_device
from bridgekit.hookspecs import EncoderProvider
from bridgekit.latents.encode import encode_items
from bridgekit.media import content_hash, size_hint
from bridgekit.plugins import Plugin, encoder_name, installed_plugins, load_encoder, recorded_name

#: Largest distance between two vectors of one item, relative to their length. 1 % is a cosine of 0.99995.
IN_ANY_BATCH = 0.01
#: 4 % is a cosine of 0.9992: devices differ in the order of operations, and some in precision.
ON_ANY_DEVICE = 0.04
#: Threads that prepare at the same time.
THREADS = 4
#: Bytes of resident memory that a round may add every time: allocators keep some in reserve.
RESIDENT = 2 << 20


def check_encoder(
    name: str, items: Sequence[Item], bad: Sequence[Item] = (), *, changed: str | None = None, device: str = "cpu"
) -> None:
    """Check an encoder against the whole contract of `bridgekit.encoders.Encoder`, and that its plugin is found.

    Arguments:
        name: `provider:model`, of an installed plugin.
        items: at least three different items, preferably of different lengths, that the encoder must accept.
        bad: items that it must refuse, for example an empty file, a truncated file, a file of another kind.
        changed: the name of the same model with other weights, which must have another revision.
        device: the torch device to check on. The vectors are compared with those of every other kind of device here.

    Raises:
        AssertionError: the encoder breaks rules of its contract. The message has one sentence for each.
        ValueError: `items` has fewer than three different items.
    """
    if len({content_hash(item) for item in items}) < 3:
        raise ValueError("check_encoder needs at least three different items")
    device = resolve_device(device)
    try:
        subject = _find(name, items, bad, changed, device)
    except BridgekitError as error:
        problems = [_problem(plugin) for plugin in installed_plugins() if plugin.problem]
        raise AssertionError(_report(name, [_line(error), *problems])) from error
    broken = [*_provider(subject), *_revision(subject), *_bad_items(subject)]
    usable = replace(subject, items=[])
    for item in items:
        try:
            _prepare(subject.encoder, [item])
            usable.items.append(item)
        except _Failed as error:
            broken.append(str(error))
    try:
        if usable.items:
            unfit = list(_output(usable))
            broken += unfit
            # Every comparison would report again a vector that is wrong by itself.
            for rule in (_memory,) if unfit else (_batches, _threads, _table, _devices, _memory):
                broken += rule(usable)
    except _Failed as error:
        broken.append(str(error))
    if broken:
        raise AssertionError(_report(f"{subject.name} (plugin {subject.plugin.package})", broken))


@dataclass(frozen=True)
class _Subject:
    name: str
    plugin: Plugin
    provider: EncoderProvider
    encoder: Encoder
    items: list[Item]
    bad: Sequence[Item]
    changed: str | None
    device: str


class _Failed(Exception):
    """The encoder returned nothing that further rules could be checked on. The message is the broken rule."""


def _find(name: str, items: Sequence[Item], bad: Sequence[Item], changed: str | None, device: str) -> _Subject:
    encoder, full = load_encoder(name, device), encoder_name(name)
    owners = ((plugin, provider) for plugin in installed_plugins() for provider in plugin.providers)
    plugin, provider = next(pair for pair in owners if pair[1].name == full.split(":", 1)[0])
    return _Subject(full, plugin, provider, encoder, [*items], bad, changed, device)


# ---- the rules: each yields a sentence for whatever is broken


def _provider(subject: _Subject) -> Iterator[str]:
    provider, modalities = subject.provider, subject.provider.modalities
    if subject.plugin.problem:
        yield _problem(subject.plugin)
    if subject.encoder.modality not in modalities:
        yield f"its modality {subject.encoder.modality!r} is not among its provider's modalities {modalities}"
    try:
        models = list(provider.models())
    except Exception as error:  # a stranger's code
        yield f"its provider's models() fails: {_line(error)}"
    else:
        if not all(isinstance(model, str) for model in models):
            yield f"its provider's models() must return names, but returns {models}"
    for modality in provider.defaults:
        if modality not in modalities:
            yield f"its provider has a default for {modality!r}, which is not among its modalities {modalities}"


def _revision(subject: _Subject) -> Iterator[str]:
    revision = subject.encoder.revision
    again, error = _reopened(subject.name, subject.device)
    if error:
        yield f"it cannot be opened a second time: {error}"
    elif again != revision:
        yield f"its revision changes from {revision!r} to {again!r} when it is opened again, so cached latents are never found"
    if (pinned := recorded_name(subject.name, subject.encoder)) != subject.name:
        found, error = _reopened(pinned, subject.device)
        if found != revision:
            yield f"its pinned name {pinned} does not open the same weights: {error or found}"
    if subject.changed:
        other, error = _reopened(subject.changed, subject.device)
        if error:
            yield f"{subject.changed}, which has other weights, cannot be opened: {error}"
        elif other == revision:
            yield f"its revision {revision!r} is also that of {subject.changed}, which has other weights"


def _reopened(name: str, device: str) -> tuple[str, str]:
    """An encoder's revision, and why it cannot be opened; one of them is empty."""
    try:
        return load_encoder(name, device).revision, ""
    except BridgekitError as error:
        return "", _line(error)


def _bad_items(subject: _Subject) -> Iterator[str]:
    for item in subject.bad:
        try:
            subject.encoder.prepare(item)
        except ItemError:
            continue
        except Exception as error:
            yield f"prepare must raise ItemError for the bad item {_shown(item)}, but raises {_line(error)}"
        else:
            yield f"prepare must raise ItemError for the bad item {_shown(item)}, but accepts it"


def _output(subject: _Subject) -> Iterator[str]:
    """One batch by itself. Gradients are enabled, as they are for a caller who forgets to disable them."""
    with torch.enable_grad():
        raw = _encode(subject.encoder, _prepare(subject.encoder, subject.items))
    if raw.requires_grad:
        yield "encode keeps gradients: run the model under torch.inference_mode() or torch.no_grad()"
    if raw.dtype != torch.float32:
        yield f"encode must return float32, but returns {str(raw.dtype).removeprefix('torch.')}"
    if raw.isnan().any() or raw.isinf().any():
        yield "encode returns values that are not finite"
        return
    first = raw.detach().float().cpu()
    worst = _distance(_vectors(subject), first).max().item()
    if worst > IN_ANY_BATCH:
        yield f"encoding the same batch twice gives different vectors ({worst:.0%} apart): is dropout on?"
    elif len(first) > 1 and _distance(first, first[:1]).max().item() < 1e-6:
        yield "different items all have the same vector"


def _batches(subject: _Subject) -> Iterator[str]:
    items, n = subject.items, len(subject.items)
    alone = torch.cat([_vectors(subject, [item]) for item in items])
    worst, worst_item = 0.0, 0
    for order in ([*range(n)], [*reversed(range(n))], [0, n - 1, *range(n), 0]):
        found = _vectors(subject, [items[place] for place in order])
        for vector, place in zip(found, order, strict=True):
            distances = _distance(alone, vector)
            own, nearest = distances[place].item(), int(distances.argmin())
            # By ratio, since the vectors of some encoders are all close to one another.
            if distances[nearest] <= IN_ANY_BATCH and own > 10 * distances[nearest].item() + 1e-4:
                yield (
                    "encode does not keep the order of its batch: "
                    f"it returns the vector of {_shown(items[nearest])} in place of that of {_shown(items[place])}"
                )
                return
            if own > worst:
                worst, worst_item = own, place
    if worst > IN_ANY_BATCH:
        yield (
            f"the vector of {_shown(items[worst_item])} depends on its batch: it differs by {worst:.0%} from the item's vector "
            "alone (padding that is not masked? batch norm in training mode?)"
        )


def _threads(subject: _Subject) -> Iterator[str]:
    together, n = Barrier(THREADS), len(subject.items)

    def prepare(start: int) -> list[Any]:
        together.wait()
        order = [(start + step) % n for step in range(n)]  # each thread is at another item
        prepared = dict(zip(order, _prepare(subject.encoder, [subject.items[place] for place in order]), strict=True))
        return [prepared[place] for place in range(n)]

    expected = _vectors(subject)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads interrupt each other in mid-call
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            batches = [batch for _ in range(2) for batch in pool.map(prepare, range(THREADS))]
    except _Failed as error:
        yield f"prepare is not thread-safe: {error}"
        return
    finally:
        sys.setswitchinterval(interval)
    for batch in batches:
        distances = _distance(_vectors(subject, prepared=batch), expected)
        if distances.max() > IN_ANY_BATCH:
            item = subject.items[int(distances.argmax())]
            yield f"prepare is not thread-safe: in several threads at once, its result for {_shown(item)} is different"
            return


def _table(subject: _Subject) -> Iterator[str]:
    """Good and bad items as rows of one table, as `align` encodes them."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            latents = encode_items(subject.encoder, [*subject.items, *subject.bad], folder=Path(folder))
        except BridgekitError as error:
            yield f"a table of {'good and bad' if subject.bad else 'good'} items cannot be encoded: {_line(error)}"
            return
    for place, item in enumerate(subject.items):
        if place in latents.failed:
            yield f"the good item {_shown(item)} fails in a table of good and bad items: {latents.failed[place]}"


def _devices(subject: _Subject) -> Iterator[str]:
    expected = _vectors(subject)
    for device in _other_devices(subject.device):
        try:
            found = _vectors(replace(subject, encoder=load_encoder(subject.name, device)))
        except (BridgekitError, _Failed) as error:
            yield f"it does not work on the device {device!r}: {_line(error)}"
            continue
        worst = _distance(found, expected).max().item()
        if worst > ON_ANY_DEVICE:
            yield f"its vectors on the device {device!r} differ by {worst:.0%} from those on {subject.device!r}"


def _other_devices(device: str) -> list[str]:
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [kind for kind, here in present.items() if here and kind != torch.device(device).type]


def _memory(subject: _Subject) -> Iterator[str]:
    items = sorted(subject.items, key=size_hint)[:2]

    def used() -> tuple[int, int]:
        for _ in range(2):
            _vectors(subject, items)
        return _tensor_bytes(), _resident_bytes()

    growth = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise([used() for _ in range(4)])]
    tensors, resident = (min(each) for each in zip(*growth, strict=True))  # a leak grows every time, a cache does not
    if tensors > 0:
        yield f"memory leaks: every two batches leave {tensors:,} more bytes of tensors alive"
    elif resident > RESIDENT:
        yield f"memory leaks: every two batches take {resident:,} more bytes and keep them"


def _tensor_bytes() -> int:
    gc.collect()
    # `type`, not isinstance, which would trigger other libraries' lazy objects.
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _resident_bytes() -> int:
    """Resident memory of this process, or 0 on a system without `/proc`."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if statm.exists() else 0


# ---- calling the encoder


def _prepare(encoder: Encoder, items: Sequence[Item]) -> list[Any]:
    return [_call(f"prepare fails for the good item {_shown(item)}", encoder.prepare, item) for item in items]


def _encode(encoder: Encoder, batch: Sequence[Any]) -> Tensor:
    latents, shape = _call("encode fails", encoder.encode, batch), (len(batch), encoder.dim)
    if not isinstance(latents, Tensor) or latents.shape != shape:
        found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise _Failed(f"encode must return a tensor of shape {shape} for {len(batch)} items, but returns {found}")
    return latents


def _call(failure: str, function: Callable[[Any], object], argument: object) -> object:
    try:
        return function(argument)
    except Exception as error:  # a stranger's code
        raise _Failed(f"{failure}: {_line(error)}") from error


def _vectors(subject: _Subject, items: Sequence[Item] | None = None, prepared: Sequence[Any] | None = None) -> Tensor:
    """Vectors of items, by default all, (n, dim) on the CPU. They are prepared each time, as `encode` may use up its input."""
    batch = _prepare(subject.encoder, items or subject.items) if prepared is None else prepared
    with torch.inference_mode():
        return _encode(subject.encoder, batch).detach().float().cpu()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """The distance between rows, relative to the longer one's length; b may be one row."""
    length = torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).clamp(min=1e-30)
    distance: Tensor = (a - b).norm(dim=-1) / length
    return distance


# ---- the message


def _problem(plugin: Plugin) -> str:
    return f"the plugin {plugin.package} has a problem: {plugin.problem}"


def _report(name: str, broken: Sequence[str]) -> str:
    rules = "a rule" if len(broken) == 1 else f"{len(broken)} rules"
    return "\n".join([f"{name} breaks {rules} of the encoder contract:", *(f"- {sentence}" for sentence in broken)])


def _shown(item: Item) -> str:
    return item.name if isinstance(item, Path) else repr(item[:40])


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, _Failed) else f"{type(error).__name__}: {text}"
