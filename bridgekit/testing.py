"""Checks that a plugin's encoder keeps the encoder contract: call `check_encoder("demo:v1", paths)` in a test."""

from __future__ import annotations

import gc
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any, cast

import torch
from torch import Tensor

from bridgekit.encoders import Blob, Encoder, Item
from bridgekit.errors import BridgekitError, ItemError, PluginError
from bridgekit.hardware import resolve_device
from bridgekit.hookspecs import EncoderProvider
from bridgekit.latents.batches import encode_batch
from bridgekit.latents.encode import encode_items
from bridgekit.media import content_hash, item_name, size_hint
from bridgekit.plugins import encoder_name, installed_plugins, load_encoder, recorded_name

#: Maximum distance between two vectors of one item, relative to their length. 1 % is a cosine of 0.99995.
IN_ANY_BATCH = 0.01
#: The same between devices, which compute in a different order, some with fewer bits. 4 % is a cosine of 0.9992.
ON_ANY_DEVICE = 0.04
#: Threads that prepare at the same time.
THREADS = 8
#: Bytes by which resident memory may grow in each of a few rounds, since allocators keep some in reserve.
RESIDENT = 2 << 20


def check_encoder(
    name: str, items: Sequence[Item], bad: Sequence[Item] = (), *, changed: str | None = None, device: str = "cpu"
) -> None:
    """Check that an encoder meets all requirements of `bridgekit.encoders.Encoder`, and that its plugin is found.

    Arguments:
        name: `provider:model`, from an installed plugin.
        items: at least three different items, ideally of different lengths, that the encoder must accept.
        bad: items that it must refuse, for example an empty file, a truncated file, a file of another kind.
        changed: the name of the same model with other weights, which must have another revision.
        device: the torch device to check on. Its vectors are compared with those of this machine's other kinds of device.

    Raises:
        AssertionError: the encoder breaks rules of the contract. The message has a sentence for each.
        ValueError: there are fewer than three different items.
    """
    if len({content_hash(item) for item in items}) < 3:
        raise ValueError("check_encoder needs at least three different items")
    device = resolve_device(device)
    plugins = installed_plugins()
    problems = {each.package: f"the plugin {each.package} has a problem: {each.problem}" for each in plugins if each.problem}
    try:
        encoder = load_encoder(name, device)
    except BridgekitError as error:
        raise AssertionError(_message(name, [_one_line(error), *problems.values()])) from error
    name = encoder_name(name)
    owners = {provider.name: (plugin, provider) for plugin in plugins for provider in plugin.providers}
    plugin, provider = owners[name.partition(":")[0]]
    broken = [problems[plugin.package]] if plugin.problem else []
    broken += [*_provider(name, provider, encoder), *_revision(name, encoder, changed, device)]
    broken += _refusals(encoder, items, bad)
    usable = [item for item in items if _failure(encoder, item) is None]
    if usable:
        wrong, works, comparable = _output(encoder, usable)
        broken += wrong
        rules: list[Iterator[str]] = []
        if works and comparable:
            rules += [_batches(works, comparable), _threads(works, comparable), _table(works, comparable, bad)]
            rules += [_bytes(works, comparable), _devices(name, works, comparable, device)]
        if works:
            rules += [_memory(works, usable)]
        for rule in rules:
            try:
                broken += rule
            except PluginError as error:  # it fails on another batch
                broken.append(error.what)
    if broken:
        raise AssertionError(_message(f"{name} (plugin {plugin.package})", list(dict.fromkeys(broken))))


# ---- the rules: each yields a sentence for every violation


def _provider(name: str, provider: EncoderProvider, encoder: Encoder) -> Iterator[str]:
    if encoder.modality not in provider.modalities:
        yield f"its modality {encoder.modality!r} is not among its provider's modalities {provider.modalities}"
    try:
        models = list(provider.models())
    except Exception as error:  # the plugin's code may raise anything
        yield f"its provider's models() fails: {_one_line(error)}"
    else:
        if not all(isinstance(model, str) for model in models):
            yield f"its provider's models() must return names, and returns {models}"
    for modality, model in provider.defaults.items():
        if modality not in provider.modalities:
            yield f"its provider has a default for {modality!r}, which is not among its modalities {provider.modalities}"
        elif name == f"{provider.name}:{model}" and encoder.modality != modality:
            yield f"it is its provider's default for {modality!r}, and its modality is {encoder.modality!r}"


def _revision(name: str, encoder: Encoder, changed: str | None, device: str) -> Iterator[str]:
    for again in dict.fromkeys((name, recorded_name(name, encoder))):
        try:
            found = load_encoder(again, device).revision
        except BridgekitError as error:
            yield f"it cannot be opened a second time, as {again}: {_one_line(error)}"
            continue
        if found != encoder.revision:
            yield f"opened again as {again}, its revision {encoder.revision!r} is {found!r}: no latents would be found again"
    if changed is not None:
        try:
            found = load_encoder(changed, device).revision
        except BridgekitError as error:
            yield f"{changed}, which has other weights, cannot be opened: {_one_line(error)}"
            return
        if found == encoder.revision:
            yield f"its revision {found!r} is also that of {changed}, which has other weights"


def _refusals(encoder: Encoder, items: Sequence[Item], bad: Sequence[Item]) -> Iterator[str]:
    for item in bad:
        failure = _failure(encoder, item)
        if not isinstance(failure, ItemError):
            does = f"raises {_one_line(failure)}" if failure else "takes it"
            yield f"prepare must raise an ItemError for the bad item {_called(item)}, and {does}"
    for item in items:
        if failure := _failure(encoder, item):
            yield f"prepare refuses the good item {_called(item)}: {_one_line(failure)}"


def _output(encoder: Encoder, items: Sequence[Item]) -> tuple[list[str], Encoder | None, list[Item]]:
    """Checks one batch.

    Returns:
        the broken rules; the encoder to check further rules of, with the `dim` that its vectors have, or None if it gives none;
        and the items to compare vectors of: those that would not fail every comparison again.
    """
    try:
        broken, first = [], _encode(encoder, items)
    except PluginError as error:  # it fails, or returns something of another shape
        broken, width = [error.what], _width(encoder, items)
        if width is None:
            return broken, None, []
        encoder = _with_dim(encoder, width)
        first = _encode(encoder, items)
    with torch.enable_grad():  # in case a caller forgets to disable them
        raw = encoder.encode([encoder.prepare(item) for item in items])
    if raw.requires_grad:
        broken.append("encode keeps a gradient: run the model under torch.inference_mode() or torch.no_grad()")
    if raw.dtype != torch.float32:
        broken.append(f"encode must return float32, and returns {str(raw.dtype).removeprefix('torch.')}")
    finite = [item for item, fine in zip(items, first.isfinite().all(1).tolist(), strict=True) if fine]
    if len(finite) < len(items):
        named = ", ".join(_called(item) for item in items if item not in finite)
        broken.append(f"encode returns vectors that are not finite, for {named}")
    if not finite:
        return broken, encoder, []
    first, again = _encode(encoder, finite), _encode(encoder, finite)
    worst = _distance(again, first).max().item()
    if worst > IN_ANY_BATCH:
        broken.append(f"encoding the same batch again gives other vectors ({worst:.0%} apart): is dropout on?")
        return broken, encoder, []
    if len(finite) > 1 and _distance(first, first[:1]).max().item() < 1e-6:
        broken.append("all items, though different, have the same vector")
    return broken, encoder, finite


def _batches(encoder: Encoder, items: Sequence[Item]) -> Iterator[str]:
    alone = torch.cat([_encode(encoder, [item]) for item in items])
    n = len(items)
    worst, worst_item = 0.0, items[0]
    for order in ([*range(n)], [*reversed(range(n))], [0, n - 1, *range(n), 0]):
        found = _encode(encoder, [items[place] for place in order])
        for row, place in enumerate(order):
            distance = _distance(alone, found[row])
            own, nearest = distance[place].item(), int(distance.argmin())
            # By ratio, since all vectors of some encoders are close together.
            if distance[nearest] <= IN_ANY_BATCH and own > 10 * distance[nearest].item() + 1e-4:
                yield (
                    "encode does not keep the order of its batch: "
                    f"instead of {_called(items[place])}, it returns the vector of {_called(items[nearest])}"
                )
                return
            if own > worst:
                worst, worst_item = own, items[place]
    if worst > IN_ANY_BATCH:
        yield (
            f"the vector of {_called(worst_item)} depends on its batch: it is {worst:.0%} away from that of the item alone "
            "(padding that is not masked? batch norm in training mode?)"
        )


def _threads(encoder: Encoder, items: Sequence[Item]) -> Iterator[str]:
    # As many tasks as threads, each waiting once: with more, tasks cancelled after a failure would never arrive.
    together = Barrier(THREADS)
    n = len(items)

    def prepare(number: int) -> list[Any]:
        together.wait()
        # Each thread starts with a different item.
        prepared = {place % n: encoder.prepare(items[place % n]) for place in range(number, number + n)}
        return [prepared[place] for place in range(n)]

    expected = _encode(encoder, items)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads interrupt each other often
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            batches = list(pool.map(prepare, range(THREADS)))
    except Exception as error:  # the plugin's code may raise anything
        yield f"prepare is not safe in threads: {_one_line(error)}"
        return
    finally:
        sys.setswitchinterval(interval)
    alone = [encoder.prepare(item) for item in items]
    for batch in batches:
        if all(isinstance(one, Tensor) and torch.equal(one, other) for one, other in zip(alone, batch, strict=True)):
            continue
        distance = _distance(encode_batch(encoder, batch), expected)
        if distance.max() > IN_ANY_BATCH:
            item = _called(items[int(distance.argmax())])
            yield f"prepare is not safe in threads: several at once give another result for {item}"
            return


def _table(encoder: Encoder, items: Sequence[Item], bad: Sequence[Item]) -> Iterator[str]:
    """Checks good and bad items in one table, as in `align`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            failed = encode_items(encoder, [*items, *bad], folder=Path(folder)).failed
        except BridgekitError as error:
            yield f"a table of {'good and bad' if bad else 'good'} items cannot be encoded: {_one_line(error)}"
            return
    for place, item in enumerate(items):
        if place in failed:
            yield f"the good item {_called(item)} fails in a table of good and bad items: {failed[place]}"


def _bytes(encoder: Encoder, items: Sequence[Item]) -> Iterator[str]:
    """Checks that bytes without a file are taken as those of a file are."""
    for path in [item for item in items if isinstance(item, Path)][:1]:
        try:
            found = _encode(encoder, [Blob(path.name, path.read_bytes)])
        except Exception as error:  # the plugin's code may raise anything
            yield f"it fails on the bytes of {path.name} without a file: read items with bridgekit.media ({_one_line(error)})"
            return
        if _distance(found, _encode(encoder, [path])).item() > IN_ANY_BATCH:
            yield f"the bytes of {path.name} without a file have another vector"


def _devices(name: str, encoder: Encoder, items: Sequence[Item], device: str) -> Iterator[str]:
    expected = _encode(encoder, items)
    for other in _other_devices(device):
        try:
            worst = _distance(_encode(_with_dim(load_encoder(name, other), encoder.dim), items), expected).max().item()
        except Exception as error:  # the plugin's code may raise anything
            yield f"it does not work on the device {other!r}: {_one_line(error)}"
            continue
        if worst > ON_ANY_DEVICE:
            yield f"its vectors on the device {other!r} are {worst:.0%} away from those on {device!r}"


def _memory(encoder: Encoder, items: Sequence[Item]) -> Iterator[str]:
    small = sorted(items, key=size_hint)[:2]

    def used() -> tuple[int, int]:
        """Bytes of live tensors, and resident bytes of this process: 0 if the system does not report them."""
        for _ in range(2):
            _encode(encoder, small)
        gc.collect()
        # `type`, not isinstance, which would load other libraries' lazy objects.
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        statm = Path("/proc/self/statm")
        resident = int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if statm.exists() else 0
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors), resident

    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise([used() for _ in range(4)])]
    tensors, resident = (min(step) for step in zip(*steps, strict=True))  # a leak grows each time, a cache does not
    if tensors > 0:
        yield f"memory grows: every two batches leave {tensors:,} more bytes of tensors alive"
    elif resident > RESIDENT:
        yield f"memory grows: every two batches take {resident:,} more bytes and keep them"


# ---- measuring


def _failure(encoder: Encoder, item: Item) -> Exception | None:
    """What `prepare` raises for an item."""
    try:
        encoder.prepare(item)
    except Exception as error:
        return error
    return None


def _encode(encoder: Encoder, items: Sequence[Item]) -> Tensor:
    """Vectors of shape (len(items), dim), prepared again: `encode` may change its input."""
    return encode_batch(encoder, [encoder.prepare(item) for item in items])


def _width(encoder: Encoder, items: Sequence[Item]) -> int | None:
    """How many numbers the vectors have that `encode` returns; None if it fails, or does not return a vector for each item."""
    try:
        with torch.inference_mode():
            raw = encoder.encode([encoder.prepare(item) for item in items])
    except Exception:  # the plugin's code may raise anything
        return None
    return int(raw.shape[1]) if isinstance(raw, Tensor) and raw.ndim == 2 and len(raw) == len(items) else None


def _with_dim(encoder: Encoder, width: int) -> Encoder:
    """The encoder as it is, but with another `dim`."""

    class Same:
        __module__ = type(encoder).__module__  # by which messages name its plugin
        dim = width

        def __getattr__(self, name: str) -> Any:
            return getattr(encoder, name)

    return cast(Encoder, Same())


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Distances between rows, relative to the longer one; b may be a single row."""
    length = torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).clamp(min=1e-30)
    distance: Tensor = (a - b).norm(dim=-1) / length
    return distance


def _other_devices(device: str) -> list[str]:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [kind for kind in there if there[kind] and kind != torch.device(device).type]


# ---- the message


def _message(who: str, broken: Sequence[str]) -> str:
    rules = "a rule" if len(broken) == 1 else f"{len(broken)} rules"
    return "\n".join([f"{who} breaks {rules} of the encoder contract:", *(f"- {sentence}" for sentence in broken)])


def _called(item: Item) -> str:
    return item.name if isinstance(item, Path) else item_name(item)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
