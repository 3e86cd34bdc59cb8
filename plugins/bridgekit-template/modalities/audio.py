"""A bridgekit plugin in one module: an audio encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridgekit.encoders import Encoder, Item
from bridgekit.errors import PluginError
from bridgekit.hookspecs import EncoderProvider, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

RATE = 16_000  # Hz
WINDOW = 512  # samples per spectrum
BANDS = 48  # equally wide in mel, from 0 Hz to RATE / 2


class StatisticsEncoder:
    """Mean, standard deviation and mean change of the log power in mel bands.

    Arguments:
        device: the torch device to compute on.
    """

    # Yours: the width of the vectors, and an identifier of exactly these vectors. Change `revision` whenever the vectors do;
    # for a model with weights, use `bridgekit.hub.content_revision(files)`.
    modality = "audio"
    dim = 3 * BANDS
    revision = "template:statistics@1"

    def __init__(self, device: str) -> None:
        self.device = device
        self._filters = mel_filters().to(device)

    def prepare(self, item: Item) -> Tensor:
        """Read a clip: mono samples at `RATE`, (n,). Yours: return any input for `encode`.

        Raises:
            ItemError: from `read_audio`, with the reason: the file is not audio, is cut short, is empty, ...
        """
        import torch

        from bridgekit.media import read_audio  # imports numpy, which `bridgekit --help` does not need

        return torch.from_numpy(read_audio(item, RATE))

    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n clips to vectors, (n, dim). Yours: run the model here, under `torch.inference_mode()`."""
        import torch

        return torch.stack([describe(samples.to(self.device), self._filters) for samples in batch])


def describe(samples: Tensor, filters: Tensor) -> Tensor:
    """A clip of shape (n,) of any length to one vector of shape (dim,)."""
    import torch

    padded = torch.nn.functional.pad(samples, (0, max(0, 2 * WINDOW - len(samples))))
    windows = padded.unfold(0, WINDOW, WINDOW // 2) * torch.hann_window(WINDOW, device=samples.device)
    power = torch.fft.rfft(windows).abs().square()  # (windows, WINDOW / 2 + 1)
    level = (power @ filters + 1e-6).log()  # (windows, BANDS)
    return torch.cat([level.mean(0), level.std(0, correction=0), level.diff(dim=0).abs().mean(0)])


def mel_filters() -> Tensor:
    """Triangular filters of shape (WINDOW / 2 + 1, BANDS)."""
    import torch

    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2) / 2595) - 1)
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


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
    """Yours: users write `name:model`, as in `--a template:statistics`."""
    return [EncoderProvider(name="template", modalities=("audio",), open=open_encoder, models=lambda: ["statistics"])]
