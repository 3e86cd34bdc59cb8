"""Whisper's encoder, at a clip's own length or padded to 30 s as in training. The decoder is not used."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, pad

from bridgekit.encoders import Item
from bridgekit.media import read_audio
from bridgekit_transformers.batching import equal_windows, groups
from bridgekit_transformers.layers import chosen_layers, layers_setting
from bridgekit_transformers.loading import Source, load_model, load_part

#: Maximum 20 ms frames per forward pass, padding included: one window of 30 s.
FRAMES_AT_ONCE = 1_500


@dataclass(frozen=True)
class Window:
    """A prepared window of a clip.

    Arguments:
        mel: log-mel spectrogram, float32 of shape (bands, hops), with an even number of hops.
        frames: how many of its hops // 2 frames are not padding.
    """

    mel: Tensor
    frames: int


class WhisperEncoder:
    """The states after one or more layers, averaged over a clip's frames and concatenated.

    Clips longer than 30 s are split into equal windows, each encoded on its own; the mean is over all their frames.

    Arguments:
        source: a model of the kind `whisper`. `window=own`, the default, encodes a clip at its own length, with as many
            position embeddings as it has frames; `window=30s` pads it to 30 s, so its frames also attend to the silence.

    Raises:
        PluginError: files are missing or damaged.
        BridgekitError: the model does not support an option's value.
    """

    modality = "audio"

    def __init__(self, source: Source) -> None:
        self._padded = source.choose("window", ("own", "30s")) == "30s"
        self._device, self.pinned = source.device, source.pinned
        # The only class that loads just the encoder from any Whisper checkpoint. Its head is not used.
        whole = load_model(source, "WhisperForAudioClassification", unused=("projector.", "classifier.", "layer_weights"))
        self._model = whole.encoder
        self._extractor = load_part(source, "WhisperFeatureExtractor")
        # Older versions of transformers require a mask of attention heads.
        older = "layer_head_mask" in inspect.signature(type(self._model.layers[0]).forward).parameters
        self._arguments = {"layer_head_mask": None} if older else {}
        count = len(self._model.layers)
        self._layers = chosen_layers(source, count)
        self.dim = int(self._model.config.d_model) * len(self._layers)
        self.revision = source.revision(layers_setting(self._layers, count), "30s" if self._padded else "own-length")

    def prepare(self, item: Item) -> list[Window]:
        """The clip as log-mel spectrograms of equal windows.

        Raises:
            ItemError: the file cannot be read as audio.
        """
        rate = int(self._extractor.sampling_rate)
        wave = torch.from_numpy(read_audio(item, rate))
        return [self._window(piece) for piece in equal_windows(wave, int(self._extractor.n_samples))]

    def _window(self, piece: Tensor) -> Window:
        frame = 2 * int(self._extractor.hop_length)  # the second convolution has a stride of 2
        own = math.ceil(len(piece) / frame)
        # The Fourier transform needs half a window of samples: very short clips are padded with silence to 0.1 s.
        shortest = int(self._extractor.sampling_rate) // 10
        size = int(self._extractor.n_samples) if self._padded else max(shortest, own * frame)
        features = self._extractor(
            np.asarray(pad(piece, (0, size - len(piece)))),
            sampling_rate=self._extractor.sampling_rate,
            padding=False,
            return_tensors="pt",
        )
        return Window(features["input_features"][0], own)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Sequence[Window]]) -> Tensor:
        """n prepared clips to a float32 tensor of shape (n, dim)."""
        windows = [window for clip in batch for window in clip]
        owners = [place for place, clip in enumerate(batch) for _ in clip]
        sums, frames = torch.zeros(len(batch), self.dim), torch.zeros(len(batch), 1)
        for group in groups([window.mel.shape[1] // 2 for window in windows], FRAMES_AT_ONCE):
            states = self._states([windows[place].mel for place in group])
            for place, state in zip(group, states, strict=True):
                own = windows[place].frames
                sums[owners[place]] += state[:own].sum(0).cpu()
                frames[owners[place]] += own
        return sums / frames

    def _states(self, mels: Sequence[Tensor]) -> Tensor:
        """b spectrograms to states of shape (b, t, dim), where t is half the maximum hops. States of padding are meaningless.

        This is the forward pass of transformers' WhisperEncoder, for any number of hops and with padding masked.
        """
        hops = torch.tensor([mel.shape[1] for mel in mels], device=self._device)
        longest = int(hops.max())
        own = torch.arange(longest, device=self._device) < hops[:, None]
        x = torch.stack([pad(mel, (0, longest - mel.shape[1])) for mel in mels]).to(self._device)
        # Zero the padding, so that the convolutions see the end of a shorter window like the end of the input.
        x = gelu(self._model.conv1(x)) * own[:, None]
        x = gelu(self._model.conv2(x)).transpose(1, 2)
        x = x + self._model.embed_positions.weight[: x.shape[1]]
        mask = None
        if not own.all():
            mask = torch.zeros(own.shape, device=self._device).masked_fill(~own, -math.inf)[:, None, None, ::2]
        states = {}
        for place, layer in enumerate(self._model.layers, start=1):
            x = layer(x, attention_mask=mask, **self._arguments)
            x = x[0] if isinstance(x, tuple) else x
            states[place] = x
        states[len(states)] = self._model.layer_norm(x)
        return torch.cat([states[layer] for layer in self._layers], dim=-1)
