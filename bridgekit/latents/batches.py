"""Batches of items through an encoder: planned by length, prepared ahead, and in bfloat16 where that agrees with float32."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from bridgekit.encoders import Encoder, Item
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.hardware import VARIABLE, product_dtype, threads
from bridgekit.plugins import plugin_of

T = TypeVar("T")

#: Items in one batch.
BATCH_SIZE = 32
#: So many small ones: one forward pass over a few words each would leave the cores waiting for the next.
MOST = 256
#: Characters of text, or bytes of files, in a batch of more than `BATCH_SIZE` items, each counted as long as the longest.
SMALL = 16_384
#: Batches whose items are decoded ahead of the encoder.
AHEAD = 4

#: Items that are encoded both ways, to see whether bfloat16 will do.
CHECKED = 32
#: Fewer items than this are encoded in float32 without a check, which would take longer than it saves.
WORTH_CHECKING = 256
#: The least cosine to float32 that latents in bfloat16 must have.
AGREEMENT = 0.999


@dataclass(frozen=True)
class Batch:
    """Items that go through an encoder together.

    Arguments:
        number: which batch of the run it is.
        items: paths or texts.
        reduced: whether products are to be in bfloat16.
    """

    number: int
    items: Sequence[Item]
    reduced: bool = False


@dataclass(frozen=True)
class Encoded:
    """What became of a batch.

    Arguments:
        number: the batch's.
        kept: positions in the batch of the items that have latents.
        latents: (len(kept), d) float32, on the CPU.
        reasons: position to the reason, for the other items.
    """

    number: int
    kept: Sequence[int]
    latents: Tensor
    reasons: Mapping[int, str]


@dataclass(frozen=True)
class Precision:
    """What latents were computed in.

    Arguments:
        products: `float32` or `bfloat16`.
        agreement: the least cosine between bfloat16 and float32 that a check found; None where none was made.
    """

    products: str = "float32"
    agreement: float | None = None


FLOAT32 = Precision()

#: Encodes batches, in any order: here, or on other machines.
Run = Callable[[Sequence[Batch]], Generator[Encoded, None, None]]


def plan_batches(sizes: Mapping[T, int]) -> list[list[T]]:
    """Batches of like size, so that little is padded: `BATCH_SIZE` items, of small ones up to `MOST`.

    Arguments:
        sizes: item, in the order of its size, to the size in characters or bytes.
    """
    batches: list[list[T]] = []
    for item, size in sizes.items():
        count = len(batches[-1]) if batches else MOST
        if count < BATCH_SIZE or (count < MOST and (count + 1) * size <= SMALL):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def encode_batches(encoder: Encoder, batches: Sequence[Batch]) -> Generator[Encoded, None, None]:
    """Encode batches on this machine, in order. While one is encoded, threads prepare the next.

    Raises:
        PluginError: the encoder fails, or does not keep its contract.
    """
    for batch, prepared in _prepare_ahead(encoder, batches):
        reasons = {at: _reason(value, encoder) for at, value in enumerate(prepared) if isinstance(value, Exception)}
        good = [at for at in range(len(prepared)) if at not in reasons]
        latents = encode_batch(encoder, [prepared[at] for at in good], batch.reduced) if good else torch.zeros(0, encoder.dim)
        finite = latents.isfinite().all(1)
        for at, fine in zip(good, finite.tolist(), strict=True):
            if not fine:
                reasons[at] = f"its latents are not finite numbers ({plugin_of(encoder)} gave NaN or infinity)"
        yield Encoded(batch.number, [at for at in good if at not in reasons], latents[finite], reasons)


def encode_batch(encoder: Encoder, inputs: Sequence[Any], reduced: bool = False) -> Tensor:
    """(n, dim) latents of n prepared items, float32 and on the CPU. They need not be finite.

    Arguments:
        encoder: the encoder.
        inputs: what its `prepare` returned.
        reduced: whether products are to be in bfloat16.

    Raises:
        PluginError: the encoder fails, or gives something of another shape.
    """
    try:
        with torch.inference_mode(), _products(encoder, reduced):
            latents = encoder.encode(inputs)
    except BridgekitError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"{plugin_of(encoder)} failed to encode: {reason}",
            where=encoder.revision,
            remedy="report it to the plugin's author",
        ) from error
    if not isinstance(latents, Tensor) or latents.shape != (len(inputs), encoder.dim):
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise PluginError(
            f"{plugin_of(encoder)} returned {shape} for {len(inputs)} items; its contract is {(len(inputs), encoder.dim)}",
            where=encoder.revision,
            remedy="report it to the plugin's author",
        )
    return latents.detach().float().cpu()


def bfloat16_is_fast(encoder: Encoder) -> bool:
    """Whether bfloat16 products are faster where an encoder runs, or `$BRIDGEKIT_PRECISION` says so."""
    return product_dtype(_kind_of_device(encoder)) == torch.bfloat16


def bfloat16_is_refused() -> bool:
    """Whether `$BRIDGEKIT_PRECISION` rules bfloat16 out, wherever the encoder runs."""
    return os.environ.get(VARIABLE) == "float32"


def check_precision(run: Run, items: Sequence[Item]) -> Precision:
    """Encode some items both ways and see whether bfloat16 is near enough to float32.

    The cosine counts as latents are and after the items' mean is subtracted, whichever is lower. An encoder's latents may
    have most of their length in common (97 % for `starter:audio`), and then their cosine says little of what tells them
    apart, which is all that adapters look at: 0.9995 as they are was 0.996 around the mean, for spoken words.

    Arguments:
        run: encodes batches.
        items: what the run is about, in the order of their sizes; `CHECKED` of them, evenly spread, are looked at.
    """
    sample = [items[place * len(items) // CHECKED] for place in range(CHECKED)]
    try:
        full, reduced = sorted(run([Batch(0, sample), Batch(1, sample, reduced=True)]), key=lambda encoded: encoded.number)
    except PluginError:
        return FLOAT32  # what fails in float32 too will fail again, in the run
    # Where nothing changes, nothing is gained: the encoder computes elsewhere than in torch, or turns it off itself.
    if full.kept != reduced.kept or not full.kept or torch.equal(full.latents, reduced.latents):
        return FLOAT32
    found = agreement(full.latents, reduced.latents)
    return Precision("bfloat16" if found >= AGREEMENT else "float32", found)


def agreement(expected: Tensor, found: Tensor) -> float:
    """The least cosine of rows to those expected, both (n, d), as they are and around the expected rows' mean."""
    expected, found = expected.double(), found.double()
    mean = expected.mean(0)
    return torch.cat([cosine_similarity(expected, found), cosine_similarity(expected - mean, found - mean)]).min().item()


def _prepare_ahead(encoder: Encoder, batches: Sequence[Batch]) -> Iterator[tuple[Batch, list[Any]]]:
    """Each batch with its prepared items, or the exception an item raised, while the next batches are being prepared."""

    def prepare(items: Sequence[Item]) -> list[Any]:
        return [attempt(item) for item in items]

    def attempt(item: Item) -> Any:
        try:
            return encoder.prepare(item)
        except Exception as error:  # a decoder may raise anything; it costs one item
            return error

    workers = threads()
    with ThreadPoolExecutor(workers) as pool:

        def submit(batch: Batch) -> tuple[Batch, list[Future[list[Any]]]]:
            # A few items a task: handing over a short text takes longer than preparing it.
            size = math.ceil(len(batch.items) / (2 * workers))
            starts = range(0, len(batch.items), size)
            return batch, [pool.submit(prepare, batch.items[start : start + size]) for start in starts]

        remaining = iter(batches)
        waiting = [submit(batch) for batch in islice(remaining, AHEAD)]
        try:
            while waiting:
                batch, futures = waiting.pop(0)
                values = [value for future in futures for value in future.result()]
                waiting += [submit(following) for following in islice(remaining, 1)]
                yield batch, values
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _products(encoder: Encoder, reduced: bool) -> AbstractContextManager[None]:
    # Weights stay as they are and are cast on the way: they would have to be kept twice, for the check and for float32 queries.
    return torch.autocast(_kind_of_device(encoder), torch.bfloat16) if reduced else nullcontext()


def _kind_of_device(encoder: Encoder) -> str:
    """Where the encoder's model is. The contract does not ask for it; an encoder without a model in torch has no use for it."""
    modules = [value for value in getattr(encoder, "__dict__", {}).values() if isinstance(value, nn.Module)]
    return next((parameter.device.type for module in modules for parameter in module.parameters()), "cpu")


def _reason(error: Exception, encoder: Encoder) -> str:
    """Why an item cannot be used. What is no error of the family is the plugin's own mistake, not the item's."""
    if isinstance(error, BridgekitError):
        return error.reason
    return f"{plugin_of(encoder)} failed on it: {type(error).__name__}: {error}"
