"""`starter:audio`: Whisper for speech and YAMNet for other sounds, concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bridgekit.encoders import Item
from bridgekit.media import read_audio
from bridgekit_starter.sound import SAMPLE_RATE, SoundEncoder
from bridgekit_starter.speech import SpeechEncoder, Window


class AudioEncoder:
    """`starter:speech` and `starter:sound`, concatenated.

    Arguments:
        device: a torch device.

    Raises:
        PluginError: the weights are missing or are not the expected ones.
    """

    modality = "audio"
    dim = SpeechEncoder.dim + SoundEncoder.dim

    def __init__(self, device: str = "cpu") -> None:
        self._speech, self._sound = SpeechEncoder(device), SoundEncoder(device)
        self.revision = f"{self._speech.revision}+{self._sound.revision}"

    def prepare(self, item: Item) -> tuple[list[Window], Tensor]:
        """The clip as both encoders take it.

        Raises:
            ItemError: the file cannot be read as audio.
        """
        wave = torch.from_numpy(read_audio(item, SAMPLE_RATE))  # both take 16 kHz
        return self._speech.windows(wave), self._sound.windows(wave)

    @torch.inference_mode()
    def encode(self, batch: Sequence[tuple[list[Window], Tensor]]) -> Tensor:
        """n prepared clips into a float32 tensor of shape (n, 2048)."""
        speech, sound = zip(*batch, strict=True)
        return torch.cat([self._speech.encode(speech), self._sound.encode(sound)], 1)
