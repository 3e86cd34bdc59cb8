"""A bridgekit plugin in one module. Adds the modality `motion`: accelerometer traces in CSV files, one column per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridgekit.encoders import Encoder, Item
from bridgekit.errors import ItemError, PluginError
from bridgekit.hookspecs import EncoderProvider, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

AXES = 3
WINDOW = 32  # samples per spectrum
BANDS = 8


class StatisticsEncoder:
    """Statistics and spectrum of a trace: 4 + 8 numbers for each axis and for the magnitude of the acceleration.

    Arguments:
        device: the torch device to compute on.
    """

    # Yours: the modality, the width of the vectors, and an identifier of exactly these vectors. Change `revision` whenever the
    # vectors change; for a model with weights, use `bridgekit.hub.content_revision(files)`.
    modality = "motion"
    dim = (AXES + 1) * (4 + BANDS)
    revision = "template:statistics@1"

    def __init__(self, device: str) -> None:
        self.device = device

    def prepare(self, item: Item) -> Tensor:
        """Read a file as a trace of shape (samples, AXES). Yours: return any input for `encode`.

        Raises:
            ItemError: the file is not a CSV of numbers, has the wrong number of columns, or is too short.
        """
        import torch

        return torch.tensor(read_trace(item))

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n traces to vectors, (n, dim). Yours: run the model here, under `torch.inference_mode()`."""
        import torch

        return torch.stack([describe(trace.to(self.device)) for trace in batch])


def read_trace(item: Item) -> list[list[float]]:
    """The rows of a CSV with one column per axis, with or without a header: a file, or the bytes of one.

    Raises:
        ItemError: as for `StatisticsEncoder.prepare`.
    """
    from bridgekit.media import read_text  # imports numpy, which `bridgekit --help` does not need

    rows: list[list[float]] = []
    for number, line in enumerate(read_text(item).splitlines(), 1):
        try:
            row = [float(cell) for cell in line.split(",")]
        except ValueError:
            if number == 1:  # the header
                continue
            row = [math.nan]
        if len(row) != AXES or not all(map(math.isfinite, row)):
            raise ItemError(
                f"line {number} is not {AXES} numbers: {line[:40]!r}",
                where=str(item),
                remedy=f"save it as CSV with {AXES} numeric columns",
            )
        rows.append(row)
    if len(rows) < WINDOW:
        raise ItemError(
            f"the trace has {len(rows)} samples; the minimum is {WINDOW}",
            where=str(item),
            remedy="record a longer trace",
        )
    return rows


def describe(trace: Tensor) -> Tensor:
    """A trace of shape (samples, AXES) of any length to one vector of shape (dim,)."""
    import torch

    signals = torch.cat([trace, trace.norm(dim=1, keepdim=True)], dim=1).T  # (AXES + 1, samples)
    mean, spread = signals.mean(1, keepdim=True), signals.std(1, keepdim=True) + 1e-4
    standard = (signals - mean) / spread
    statistics = [mean, spread.log(), standard.pow(3).mean(1, keepdim=True), standard.pow(4).mean(1, keepdim=True).log1p()]
    windows = signals.unfold(1, WINDOW, WINDOW // 2)  # (AXES + 1, windows, WINDOW), half overlapping
    windows = (windows - windows.mean(2, keepdim=True)) * torch.hann_window(WINDOW, device=trace.device)
    power = torch.fft.rfft(windows).abs().square().mean(1)[:, 1:]  # (AXES + 1, WINDOW / 2), without the constant
    bands = power.unflatten(1, (BANDS, -1)).mean(2)
    return torch.cat([*statistics, (bands + 1e-6).log()], dim=1).flatten()


def open_encoder(model: str, device: str) -> Encoder:
    """Open an encoder by name. Yours: import heavy packages and load weights here, not at the top of the module.

    Raises:
        PluginError: there is no such model.
    """
    if model != "statistics":
        raise PluginError(f"there is no model {model!r}", where=f"template:{model}", remedy="use template:statistics")
    return StatisticsEncoder(device)


@hookimpl
def encoder_providers() -> Sequence[EncoderProvider]:
    """Yours: users write `name:model`; a default is the model for a modality's name alone, as in `--a motion`."""
    return [
        EncoderProvider(
            name="template",
            modalities=("motion",),
            open=open_encoder,
            models=lambda: ["statistics"],
            defaults={"motion": "statistics"},
        )
    ]
