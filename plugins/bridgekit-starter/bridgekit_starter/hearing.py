"""`starter:speech+sound`: Whisper for speech and aiSFX for other sounds, concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bridgekit.encoders import Item
from bridgekit_starter.audio import AudioEncoder, Window
from bridgekit_starter.sound import SoundEncoder


class HearingEncoder:
    """`starter:audio` and `starter:sound`, concatenated.

    Arguments:
        device: a torch device.

    Raises:
        PluginError: the weights are missing or are not the expected ones.
    """

    modality = "audio"
    dim = AudioEncoder.dim + SoundEncoder.dim

    def __init__(self, device: str = "cpu") -> None:
        self._speech, self._sound = AudioEncoder(device), SoundEncoder(device)
        self.revision = f"{self._speech.revision}+{self._sound.revision}"

    def prepare(self, item: Item) -> tuple[list[Window], Tensor]:
        """The clip as both encoders take it.

        Raises:
            ItemError: the file cannot be read as audio.
        """
        return self._speech.prepare(item), self._sound.prepare(item)

    def encode(self, batch: Sequence[tuple[list[Window], Tensor]]) -> Tensor:
        """n prepared clips into a float32 tensor of shape (n, 1536)."""
        speech, sound = zip(*batch, strict=True)
        return torch.cat([self._speech.encode(speech), self._sound.encode(sound)], 1)
