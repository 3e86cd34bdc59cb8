"""Checks that a plugin's encoder keeps its contract, in one line of a test: `check_encoder("demo:v1", paths)`."""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any, cast

import torch
from torch import Tensor

from bridgekit.encoders import Encoder, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.hardware import resolve_device
from bridgekit.hookspecs import EncoderProvider
from bridgekit.latents.encode import encode_items
from bridgekit.media import content_hash, size_hint
from bridgekit.plugins import Plugin, encoder_name, installed_plugins, load_encoder, recorded_name

#: How far apart two vectors of one item may be, as a part of their length. 1 % is a cosine of 0.99995.
IN_ANY_BATCH = 0.01
#: 4 % is a cosine of 0.9992: other devices compute in another order, some with fewer bits.
ON_ANY_DEVICE = 0.04
#: Threads that prepare at the same time.
THREADS = 4
#: Bytes of resident memory by which a few rounds may grow each time: allocators keep some in hand.
RESIDENT = 2 << 20


def check_encoder(
    name: str, items: Sequence[Item], bad: Sequence[Item] = (), *, changed: str | None = None, device: str = "cpu"
) -> None:
    """Check all that `bridgekit.encoders.Encoder` asks of an encoder, and that its plugin is found.

    Arguments:
        name: `provider:model`, of an installed plugin.
        items: at least three different items, best of different lengths, that the encoder must take.
        bad: items that it must refuse: for example an empty file, a file cut short, a file of another kind.
        changed: the name of the same model with other weights, which must have another revision.
        device: the torch device to check on. What it gives is compared with each other kind that this machine has.

    Raises:
        AssertionError: the encoder breaks rules of its contract. The message has a sentence for each.
        ValueError: `items` holds fewer than three different items.
    """
    if len({content_hash(item) for item in items}) < 3:
        raise ValueError("check_encoder needs at least three different items")
    device = resolve_device(device)
    try:
        subject, broken = _find(name, items, bad, changed, device)
    except BridgekitError as error:
        problems = [_has_a_problem(plugin) for plugin in installed_plugins() if plugin.problem]
        raise AssertionError(_told(name, [_one_line(error), *problems])) from error
    broken += [*_naming(subject), *_revision(subject), *_bad_items(subject)]
    usable, refused = _usable_items(subject)
    broken += refused
    if usable.items:
        try:
            unfit = list(_output(usable))
            broken += unfit
            # A vector that is wrong by itself would be told again by every comparison.
            if not unfit:
                for rule in (_batches, _threads, _table, _devices):
                    broken += rule(usable)
            broken += _memory(usable)
        except _Unusable as error:
            broken.append(str(error))
    if broken:
        raise AssertionError(_told(f"{subject.name} (plugin {subject.plugin.package})", broken))


@dataclass(frozen=True)
class _Subject:
    name: str
    plugin: Plugin
    provider: EncoderProvider
    encoder: Encoder
    items: Sequence[Item]
    bad: Sequence[Item]
    changed: str | None
    device: str


class _Unusable(Exception):
    """The encoder gave nothing that the other rules could be asked of. The message is the broken rule."""


# ---- the rules: each gives a sentence for whatever is broken


def _find(
    name: str, items: Sequence[Item], bad: Sequence[Item], changed: str | None, device: str
) -> tuple[_Subject, list[str]]:
    encoder = load_encoder(name, device)
    full = encoder_name(name)
    wanted = full.split(":", 1)[0]
    owners = ((plugin, provider) for plugin in installed_plugins() for provider in plugin.providers)
    plugin, provider = next(pair for pair in owners if pair[1].name == wanted)
    broken = [_has_a_problem(plugin)] if plugin.problem else []
    return _Subject(full, plugin, provider, encoder, tuple(items), tuple(bad), changed, device), broken


def _naming(subject: _Subject) -> Iterator[str]:
    provider = subject.provider
    if subject.encoder.modality not in provider.modalities:
        yield f"its modality {subject.encoder.modality!r} is not among its provider's modalities {provider.modalities}"
    try:
        models = list(provider.models())
    except Exception as error:  # a stranger's code
        yield f"its provider's models() fails: {_one_line(error)}"
    else:
        if not all(isinstance(model, str) for model in models):
            yield f"its provider's models() must give names, and gives {models}"
    for modality in provider.defaults:
        if modality not in provider.modalities:
            yield f"its provider has a default for {modality!r}, which is not among its modalities {provider.modalities}"


def _revision(subject: _Subject) -> Iterator[str]:
    revision = subject.encoder.revision
    again = _revision_of(subject.name, subject.device)
    if isinstance(again, BridgekitError):
        yield f"it cannot be opened a second time: {_one_line(again)}"
    elif again != revision:
        yield f"its revision changes from {revision!r} to {again!r} when it is opened again: no latents would be found again"
    if (pinned := recorded_name(subject.name, subject.encoder)) != subject.name:
        found = _revision_of(pinned, subject.device)
        if found != revision:
            gives = _one_line(found) if isinstance(found, BridgekitError) else found
            yield f"its pinned name {pinned} does not open the same weights: {gives}"
    if subject.changed is None:
        return
    other = _revision_of(subject.changed, subject.device)
    if isinstance(other, BridgekitError):
        yield f"{subject.changed}, which has other weights, cannot be opened: {_one_line(other)}"
    elif other == revision:
        yield f"its revision {revision!r} is also that of {subject.changed}, which has other weights"


def _bad_items(subject: _Subject) -> Iterator[str]:
    for item in subject.bad:
        try:
            subject.encoder.prepare(item)
        except ItemError:
            continue
        except Exception as error:
            yield f"prepare must raise an ItemError for the bad item {_called(item)}, and raises {_one_line(error)}"
        else:
            yield f"prepare must raise an ItemError for the bad item {_called(item)}, and takes it"


def _usable_items(subject: _Subject) -> tuple[_Subject, list[str]]:
    usable: list[Item] = []
    refused: list[str] = []
    for item in subject.items:
        try:
            subject.encoder.prepare(item)
            usable.append(item)
        except Exception as error:
            refused.append(f"prepare refuses the good item {_called(item)}: {_one_line(error)}")
    return replace(subject, items=usable), refused


def _output(subject: _Subject) -> Iterator[str]:
    """What one batch gives. Gradients are enabled, as they are for whoever forgets to disable them."""
    with torch.enable_grad():
        raw = _encode_raw(subject.encoder, subject.items)
    if raw.requires_grad:
        yield "encode keeps a gradient: run the model under torch.inference_mode() or torch.no_grad()"
    if raw.dtype != torch.float32:
        yield f"encode must give float32, and gives {str(raw.dtype).removeprefix('torch.')}"
    if raw.isnan().any() or raw.isinf().any():
        yield "encode gives vectors that are not finite numbers"
        return
    first = raw.detach().float().cpu()
    worst = _apart(_encode(subject.encoder, subject.items), first).max().item()
    if worst > IN_ANY_BATCH:
        yield f"the same batch gives other vectors the second time ({worst:.0%} apart): is dropout on?"
    elif len(subject.items) > 1 and _apart(first, first[:1]).max().item() < 1e-6:
        yield "all items, though different, have the same vector"


def _batches(subject: _Subject) -> Iterator[str]:
    alone = torch.cat([_encode(subject.encoder, [item]) for item in subject.items])
    n = len(subject.items)
    worst, worst_item = 0.0, 0
    for order in ([*range(n)], [*reversed(range(n))], [0, n - 1, *range(n), 0]):
        found = _encode(subject.encoder, [subject.items[place] for place in order])
        for row, place in enumerate(order):
            apart = _apart(alone, found[row])
            own, nearest = apart[place].item(), int(apart.argmin())
            # Judged by ratio, since the vectors of some encoders are all near to one another.
            if apart[nearest] <= IN_ANY_BATCH and own > 10 * apart[nearest].item() + 1e-4:
                yield (
                    f"encode does not keep the order of its batch: where {_called(subject.items[place])} was, "
                    f"the vector of {_called(subject.items[nearest])} comes back"
                )
                return
            if own > worst:
                worst, worst_item = own, place
    if worst > IN_ANY_BATCH:
        yield (
            f"the vector of {_called(subject.items[worst_item])} depends on its batch: it is {worst:.0%} away from the one "
            "that the item has alone (padding that is not masked? batch norm in training mode?)"
        )


def _threads(subject: _Subject) -> Iterator[str]:
    # As many tasks as threads, each waiting once: were there more, those cancelled after a failure would never arrive.
    together = Barrier(THREADS)
    n = len(subject.items)

    def prepare(number: int) -> list[list[Any]]:
        together.wait()
        rounds = []
        for _ in range(2):
            order = [(number + step) % n for step in range(n)]  # each thread is at another item
            prepared = {place: _prepare(subject.encoder, subject.items[place]) for place in order}
            rounds.append([prepared[place] for place in range(n)])
        return rounds

    expected = _encode(subject.encoder, subject.items)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads interrupt each other in the middle
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            batches = [batch for rounds in pool.map(prepare, range(THREADS)) for batch in rounds]
    except _Unusable as error:
        yield f"prepare is not safe in threads: {error}"
        return
    finally:
        sys.setswitchinterval(interval)
    for batch in batches:
        with torch.inference_mode():
            found = _fit(subject.encoder, _call(subject.encoder, batch), n)
        apart = _apart(found, expected)
        if apart.max() > IN_ANY_BATCH:
            item = subject.items[int(apart.argmax())]
            yield f"prepare is not safe in threads: several at once give another result for {_called(item)}"
            return


def _table(subject: _Subject) -> Iterator[str]:
    """Good and bad items as rows of one table, the way that `align` meets them."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            latents = encode_items(subject.encoder, [*subject.items, *subject.bad], folder=Path(folder))
        except BridgekitError as error:
            yield f"a table of {'good and bad' if subject.bad else 'good'} items cannot be encoded: {_one_line(error)}"
            return
    for place, item in enumerate(subject.items):
        if place in latents.failed:
            yield f"the good item {_called(item)} fails in a table of good and bad items: {latents.failed[place]}"


def _devices(subject: _Subject) -> Iterator[str]:
    expected = _encode(subject.encoder, subject.items)
    for device in _other_devices(subject.device):
        try:
            found = _encode(load_encoder(subject.name, device), subject.items)
        except (BridgekitError, _Unusable) as error:
            yield f"it does not work on the device {device!r}: {_one_line(error)}"
            continue
        worst = _apart(found, expected).max().item()
        if worst > ON_ANY_DEVICE:
            yield f"its vectors on the device {device!r} are {worst:.0%} away from those on {subject.device!r}"


def _memory(subject: _Subject) -> Iterator[str]:
    items = sorted(subject.items, key=size_hint)[:2]

    def used() -> tuple[int, int]:
        for _ in range(2):
            _encode(subject.encoder, items)
        return _tensor_bytes(), _resident_bytes()

    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise([used() for _ in range(4)])]
    tensors, resident = (min(step) for step in zip(*steps, strict=True))  # a leak grows each time, a cache does not
    if tensors > 0:
        yield f"memory grows: each two batches leave {tensors:,} more bytes of tensors alive"
    elif resident > RESIDENT:
        yield f"memory grows: each two batches take {resident:,} more bytes and keep them"


# ---- asking the encoder


def _prepare(encoder: Encoder, item: Item) -> Any:
    try:
        return encoder.prepare(item)
    except Exception as error:
        raise _Unusable(f"prepare fails for the good item {_called(item)}: {_one_line(error)}") from error


def _call(encoder: Encoder, batch: Sequence[Any]) -> object:
    try:
        return encoder.encode(batch)
    except Exception as error:
        raise _Unusable(f"encode fails: {_one_line(error)}") from error


def _fit(encoder: Encoder, latents: object, n: int) -> Tensor:
    if not isinstance(latents, Tensor) or latents.shape != (n, encoder.dim):
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise _Unusable(f"encode must give a tensor of shape {(n, encoder.dim)} for {n} items, and gives {shape}")
    return latents.detach().float().cpu()


def _encode_raw(encoder: Encoder, items: Sequence[Item]) -> Tensor:
    latents = _call(encoder, [_prepare(encoder, item) for item in items])
    _fit(encoder, latents, len(items))
    return cast(Tensor, latents)


def _encode(encoder: Encoder, items: Sequence[Item]) -> Tensor:
    """Vectors of shape (len(items), dim), prepared anew: `encode` may use its input up."""
    with torch.inference_mode():
        return _fit(encoder, _encode_raw(encoder, items), len(items))


def _revision_of(name: str, device: str) -> str | BridgekitError:
    try:
        return load_encoder(name, device).revision
    except BridgekitError as error:
        return error


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """The distance between rows, as a part of the longer one's length; b may be one row."""
    length = torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).clamp(min=1e-30)
    apart: Tensor = (a - b).norm(dim=-1) / length
    return apart


def _other_devices(device: str) -> list[str]:
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds.append("cuda")
    if torch.backends.mps.is_available():
        kinds.append("mps")
    return [kind for kind in kinds if kind != torch.device(device).type]


def _tensor_bytes() -> int:
    gc.collect()
    # `type`, not isinstance: that would wake other libraries' lazy objects.
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _resident_bytes() -> int:
    """Memory of this process that is in use, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()


# ---- the message


def _has_a_problem(plugin: Plugin) -> str:
    return f"the plugin {plugin.package} has a problem: {plugin.problem}"


def _told(who: str, broken: Sequence[str]) -> str:
    rules = "a rule" if len(broken) == 1 else f"{len(broken)} rules"
    return "\n".join([f"{who} breaks {rules} of the encoder contract:", *(f"- {sentence}" for sentence in broken)])


def _called(item: Item) -> str:
    return item.name if isinstance(item, Path) else repr(item[:40])


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, _Unusable) else f"{type(error).__name__}: {text}"
