"""`clap:CHECKPOINT`: the audio tower of LAION-CLAP, projected into the space shared with the text tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgekit.encoders import Item
from bridgekit.hub import content_revision
from bridgekit.media import read_audio
from bridgekit_clap.checkpoints import find_checkpoint, read_weights
from bridgekit_clap.towers import build_tower, import_laion_clap

SAMPLE_RATE = 48_000
#: The tower's window: 10 s.
WINDOW = 10 * SAMPLE_RATE
#: Maximum windows per forward pass, to limit memory for long clips.
WINDOWS_AT_ONCE = 16


class AudioEncoder:
    """Encodes clips like laion_clap's `CLAP_Module.get_audio_embedding_from_filelist`: projected, of unit length.

    laion_clap takes a random 10 s of longer clips. This encoder covers all of them with the fewest evenly spaced windows of
    10 s, and normalises their mean.

    Arguments:
        checkpoint: the path of a checkpoint, or the name of a published one.
        device: a torch device.

    Raises:
        PluginError: there is no such checkpoint, it is not from LAION-CLAP, or laion_clap cannot be imported.
    """

    modality = "audio"

    def __init__(self, checkpoint: str, device: str = "cpu") -> None:
        file = find_checkpoint(checkpoint)
        model, config = build_tower("audio", read_weights(file), file)
        settings = ("audio", "int16", "repeatpad", "mean of even 10 s windows", version("laion-clap"))
        self.revision = f"clap:audio@{content_revision([file], *settings)}"
        self.dim: int = model.audio_projection[-1].out_features
        self._config = config["audio_cfg"]
        self._package = import_laion_clap().hook
        self._model = model.to(device)

    def prepare(self, item: Item) -> Tensor:
        """The clip's windows, float32 of shape (windows, 480000): mono, 48 kHz, rounded to 16 bit as in training.

        Clips shorter than 10 s are repeated as often as they fit, then padded with zeros.

        Raises:
            ItemError: the file cannot be read as audio.
        """
        package = self._package
        wave = package.int16_to_float32(package.float32_to_int16(read_audio(item, SAMPLE_RATE)))
        return torch.stack([self._filled(window) for window in split_windows(torch.from_numpy(wave))])

    def _filled(self, window: Tensor) -> Tensor:
        features = self._package.get_audio_features({}, window, WINDOW, "rand_trunc", "repeatpad", self._config)
        filled: Tensor = features["waveform"]  # at most 10 s, so there is no random crop
        return filled

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n prepared clips to a float32 tensor of shape (n, dim) with unit rows; dim is 512 in all published models."""
        if not batch:
            return torch.zeros(0, self.dim)
        windows = torch.split(torch.cat(list(batch)), WINDOWS_AT_ONCE)
        vectors = torch.cat([self._model.get_audio_embedding([{"waveform": window} for window in some]) for some in windows])
        clips = torch.split(vectors, [len(clip) for clip in batch])
        return normalize(torch.stack([clip.mean(0) for clip in clips]), dim=-1).cpu()


def split_windows(wave: Tensor) -> list[Tensor]:
    """Cover samples of shape (n,) with the fewest evenly spaced windows of 10 s; up to 10 s are returned unchanged.

    Windows overlap: a short remainder would be padded with zeros, yet count as much as 10 s of audio.
    """
    if len(wave) <= WINDOW:
        return [wave]
    count = math.ceil(len(wave) / WINDOW)
    starts = [(len(wave) - WINDOW) * number // (count - 1) for number in range(count)]
    return [wave[start : start + WINDOW] for start in starts]
