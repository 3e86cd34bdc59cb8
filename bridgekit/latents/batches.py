"""Encoding in batches: grouped by length, prepared ahead, and in bfloat16 if that agrees with float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from bridgekit.encoders import Encoder, Item
from bridgekit.errors import BridgekitError, PluginError
from bridgekit.hardware import product_dtype, threads
from bridgekit.plugins import plugin_of

T = TypeVar("T")

#: Items per batch.
BATCH_SIZE = 32
#: Maximum batch size for small items: 32 short texts per forward pass would not keep the cores busy.
MOST = 256
#: Maximum size, including padding, of a batch of more than `BATCH_SIZE` items, in characters of text or bytes of files.
SMALL = 16_384
#: How many batches to decode ahead of the encoder.
AHEAD = 4

#: Items that are encoded in both precisions to compare them.
CHECKED = 32
#: Runs with fewer items use float32, as the comparison would take longer than it saves.
WORTH_CHECKING = 256
#: Minimum cosine similarity between bfloat16 and float32 latents.
AGREEMENT = 0.999


@dataclass(frozen=True)
class Batch:
    """Items to encode together: the `number`th batch of its run, in bfloat16 if `reduced`."""

    number: int
    items: Sequence[Item]
    reduced: bool = False


@dataclass(frozen=True)
class Encoded:
    """The result of encoding a batch.

    Arguments:
        number: the batch's number.
        kept: positions in the batch of the encoded items.
        latents: (len(kept), d) float32, on the CPU.
        reasons: position to error message for the other items.
    """

    number: int
    kept: Sequence[int]
    latents: Tensor
    reasons: Mapping[int, str]


@dataclass(frozen=True)
class Precision:
    """The precision latents were computed in.

    Arguments:
        products: `float32` or `bfloat16`.
        agreement: minimum cosine similarity between bfloat16 and float32 latents; None if they were not compared.
    """

    products: str = "float32"
    agreement: float | None = None


FLOAT32 = Precision()

#: Encodes batches, on this machine or others. Results may come in any order.
Run = Callable[[Sequence[Batch]], Generator[Encoded, None, None]]


def plan_batches(sizes: Mapping[T, int]) -> list[list[T]]:
    """Group items, given by ascending size, to limit padding: `BATCH_SIZE` per batch, or up to `MOST` small ones."""
    batches: list[list[T]] = []
    for item, size in sizes.items():
        count = len(batches[-1]) if batches else MOST
        if count < BATCH_SIZE or (count < MOST and (count + 1) * size <= SMALL):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def encode_batches(encoder: Encoder, batches: Sequence[Batch]) -> Generator[Encoded, None, None]:
    """Encode batches on this machine, in order, while threads prepare the next ones.

    Raises:
        PluginError: the encoder fails or violates its contract.
    """
    for batch, prepared in _prepare_ahead(encoder, batches):
        reasons = {at: _reason(value, encoder) for at, value in enumerate(prepared) if isinstance(value, Exception)}
        good = [at for at in range(len(prepared)) if at not in reasons]
        latents = encode_batch(encoder, [prepared[at] for at in good], batch.reduced) if good else torch.zeros(0, encoder.dim)
        finite = latents.isfinite().all(1)
        for at, fine in zip(good, finite.tolist(), strict=True):
            if not fine:
                reasons[at] = f"its latents are not finite ({plugin_of(encoder)} returned NaN or infinity)"
        yield Encoded(batch.number, [at for at in good if at not in reasons], latents[finite], reasons)


def encode_batch(encoder: Encoder, inputs: Sequence[Any], reduced: bool = False) -> Tensor:
    """(n, dim) latents of n prepared items, possibly not finite: float32, on the CPU. `reduced` multiplies in bfloat16.

    Raises:
        PluginError: the encoder fails, or returns something of another shape.
    """
    remedy = "report it to the plugin's author"
    # Autocast keeps float32 weights: converting them would need a second copy, for the comparison and for float32 queries.
    products = torch.autocast(_kind_of_device(encoder), torch.bfloat16) if reduced else nullcontext()
    try:
        with torch.inference_mode(), products:
            latents = encoder.encode(inputs)
    except BridgekitError:
        raise
    except (Exception, SystemExit) as error:  # plugin code can raise anything
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"{plugin_of(encoder)} failed to encode: {reason}",
            where=encoder.revision,
            remedy="report it to the plugin's author",
        ) from error
    if not isinstance(latents, Tensor) or latents.shape != (len(inputs), encoder.dim):
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        what = f"{plugin_of(encoder)} returned {shape} for {len(inputs)} items; expected {(len(inputs), encoder.dim)}"
        raise PluginError(what, where=encoder.revision, remedy=remedy)
    return latents.detach().float().cpu()


def may_reduce(encoder: Encoder, count: int, elsewhere: bool) -> bool:
    """Whether bfloat16 may pay off for so many items: it must be fast on this device, unless they are encoded elsewhere."""
    return count >= WORTH_CHECKING and (elsewhere or product_dtype(_kind_of_device(encoder)) == torch.bfloat16)


def check_precision(run: Run, items: Sequence[Item]) -> Precision:
    """Encode a sample in both precisions and check whether bfloat16 is close enough to float32.

    Uses the lower of two cosine similarities: of the latents, and of the latents minus their mean. The mean may dominate (97 %
    of the norm for `starter:speech`) and hide differences between items: for spoken words, 0.9995 became 0.996 without it.

    Arguments:
        run: encodes batches.
        items: the items of the run, sorted by size; `CHECKED` of them, evenly spaced, are compared.
    """
    sample = [items[place * len(items) // CHECKED] for place in range(CHECKED)]
    try:
        full, reduced = sorted(run([Batch(0, sample), Batch(1, sample, reduced=True)]), key=lambda encoded: encoded.number)
    except PluginError:
        return FLOAT32  # if float32 fails too, the run will report it
    # Identical results mean that the encoder does not use torch, or disables autocast, so bfloat16 gains nothing.
    if full.kept != reduced.kept or not full.kept or torch.equal(full.latents, reduced.latents):
        return FLOAT32
    found = agreement(full.latents, reduced.latents)
    return Precision("bfloat16" if found >= AGREEMENT else "float32", found)


def agreement(expected: Tensor, found: Tensor) -> float:
    """Minimum cosine similarity between the rows of two (n, d) matrices, raw and after subtracting the expected mean."""
    expected, found = expected.double(), found.double()
    mean = expected.mean(0)
    return torch.cat([cosine_similarity(expected, found), cosine_similarity(expected - mean, found - mean)]).min().item()


def _prepare_ahead(encoder: Encoder, batches: Sequence[Batch]) -> Iterator[tuple[Batch, list[Any]]]:
    """Each batch with its prepared items, or the exceptions they raised. `AHEAD` batches are prepared ahead."""

    def prepare(items: Sequence[Item]) -> list[Any]:
        return [attempt(item) for item in items]

    def attempt(item: Item) -> Any:
        try:
            return encoder.prepare(item)
        except Exception as error:  # a decoder may raise anything; only this item fails
            return error

    workers = threads()
    with ThreadPoolExecutor(workers) as pool:

        def submit(batch: Batch) -> tuple[Batch, list[Future[list[Any]]]]:
            # Several items per task: dispatching a short text takes longer than preparing it.
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


def _kind_of_device(encoder: Encoder) -> str:
    """The device type of the encoder's torch modules; `cpu` if it has none."""
    modules = [value for value in getattr(encoder, "__dict__", {}).values() if isinstance(value, nn.Module)]
    return next((parameter.device.type for module in modules for parameter in module.parameters()), "cpu")


def _reason(error: Exception, encoder: Encoder) -> str:
    """Why an item cannot be used. Anything but a BridgekitError is a bug in the plugin."""
    if isinstance(error, BridgekitError):
        return error.reason
    return f"{plugin_of(encoder)} failed on it: {type(error).__name__}: {error}"
