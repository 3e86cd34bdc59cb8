"""Audio encoders of raw waveforms (wav2vec 2.0, HuBERT, WavLM) or fixed-length spectrograms (AST, CLAP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from bridgekit.encoders import Item
from bridgekit.media import read_audio
from bridgekit_transformers.batching import equal_windows, groups
from bridgekit_transformers.layers import chosen_layers, join_layers, layers_setting
from bridgekit_transformers.loading import Source, load_model, load_part, output_of, vector_width

#: Maximum window of a waveform model in seconds; attention memory grows quadratically.
LONGEST = 30
#: Maximum seconds of audio per forward pass, padding included.
SECONDS_AT_ONCE = 60
#: Maximum number of spectrograms per forward pass.
SPECTROGRAMS_AT_ONCE = 8
#: Families whose padding can be masked everywhere.
_MASKABLE = ("wav2vec2", "hubert", "wavlm")


@dataclass(frozen=True)
class Clip:
    """A prepared clip.

    Arguments:
        windows: the model's arguments for each window.
        samples: length of each window.
    """

    windows: tuple[dict[str, Tensor], ...]
    samples: tuple[int, ...]


class WaveEncoder:
    """Waveform models: the states after one or more layers, averaged over a clip's frames and concatenated.

    Clips longer than 30 s are split into equal windows, each encoded on its own.

    Arguments:
        source: a model of the kind `waves`.

    Raises:
        PluginError: files are missing or damaged.
        BridgekitError: the model does not support an option's value.
    """

    modality = "audio"

    def __init__(self, source: Source) -> None:
        self._source, self.pinned = source, source.pinned
        # The embedding of masked frames, used only in training.
        self._model = load_model(source, "AutoModel", unused=("masked_spec_embed",))
        self._extractor = load_part(source, "AutoFeatureExtractor")
        self._rate = int(self._extractor.sampling_rate)
        config = self._model.config
        self._strides = tuple(zip(config.conv_kernel, config.conv_stride, strict=True))
        self._mixed = _takes_mixed_lengths(config)
        self._count = int(config.num_hidden_layers)
        self._layers = chosen_layers(source, self._count)
        states, _ = self._states([self._clip(torch.zeros(1)).windows[0]["input_values"]])
        self.dim = int(states.shape[-1])
        self.revision = source.revision(layers_setting(self._layers, self._count), f"{LONGEST}s")

    def prepare(self, item: Item) -> Clip:
        """The clip's samples at the model's rate, normalised by the repository's preprocessor, in windows of at most 30 s.

        Raises:
            ItemError: the file cannot be read as audio.
        """
        return self._clip(torch.from_numpy(read_audio(item, self._rate)))

    def _clip(self, wave: Tensor) -> Clip:
        # The first frame needs 25 ms: very short clips are padded with silence to 0.1 s.
        wave = pad(wave, (0, max(0, self._rate // 10 - len(wave))))
        windows = [
            {"input_values": _features(self._extractor, piece, padding=False)["input_values"][0]}
            for piece in equal_windows(wave, LONGEST * self._rate)
        ]
        return Clip(tuple(windows), tuple(len(window["input_values"]) for window in windows))

    @torch.inference_mode()
    def encode(self, batch: Sequence[Clip]) -> Tensor:
        """n prepared clips to a float32 tensor of shape (n, dim)."""
        windows = [window["input_values"] for clip in batch for window in clip.windows]
        lengths = [samples for clip in batch for samples in clip.samples]
        owners = [place for place, clip in enumerate(batch) for _ in clip.windows]
        sums, frames = torch.zeros(len(batch), self.dim), torch.zeros(len(batch), 1)
        for group in groups(lengths, SECONDS_AT_ONCE * self._rate, mixed=self._mixed):
            states, counts = self._states([windows[place] for place in group])
            for place, state, own in zip(group, states, counts, strict=True):
                sums[owners[place]] += state[:own].sum(0).cpu()
                frames[owners[place]] += own
        return sums / frames

    @torch.inference_mode()
    def _states(self, waves: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """b windows to states of shape (b, t, dim), and the number of each window's frames that are not padding."""
        lengths = [len(wave) for wave in waves]
        longest = max(lengths)
        values = torch.stack([pad(wave, (0, longest - len(wave))) for wave in waves]).to(self._source.device)
        arguments: dict[str, Any] = {}
        if min(lengths) < longest:
            own = torch.arange(longest) < torch.tensor(lengths)[:, None]
            arguments["attention_mask"] = own.long().to(self._source.device)
        last_only = self._layers == (self._count,)
        outputs = self._model(values, output_hidden_states=not last_only, **arguments)
        last = output_of(self._source, outputs, "last_hidden_state")
        states = join_layers(self._layers, self._count, last, lambda layer: outputs.hidden_states[layer])
        counts = [self._frames(length) for length in lengths] if arguments else [last.shape[1]] * len(lengths)
        return states, counts

    def _frames(self, samples: int) -> int:
        """The number of frames that the convolutions compute from this many samples."""
        for kernel, stride in self._strides:
            samples = (samples - kernel) // stride + 1
        return samples


def _takes_mixed_lengths(config: Any) -> bool:
    """Whether clips of different lengths may share a batch.

    If a norm over time follows the first convolution (`feat_extract_norm: group`), padding affects it and cannot be masked.
    Padding also leaks through a batch norm before the positional convolution, and through an adapter after the model.
    """
    return (
        config.model_type in _MASKABLE
        and config.feat_extract_norm == "layer"
        and not getattr(config, "conv_pos_batch_norm", False)
        and not getattr(config, "add_adapter", False)
    )


class SpectrogramEncoder:
    """Models of fixed-length spectrograms (AST: 10.24 s, CLAP: 10 s): the mean of one vector per window.

    Shorter clips are padded as by the repository's preprocessor: with silence (AST), or by repetition (CLAP). Longer clips are
    split into equal windows, without random crops or CLAP's fusion of them, so the vector is deterministic.

    Arguments:
        source: a model of the kind `spectrograms`.

    Raises:
        PluginError: files are missing or damaged.
        BridgekitError: the model does not support this `pooling`.
    """

    modality = "audio"

    def __init__(self, source: Source) -> None:
        self._source, self.pinned = source, source.pinned
        pooling, self._head = source.head()
        self._model = load_model(source, self._head.model)
        self._extractor = load_part(source, "AutoFeatureExtractor")
        self._rate = int(self._extractor.sampling_rate)
        self._longest = _longest(self._extractor)
        self.dim = vector_width(source, self._vectors(self._clip(torch.zeros(1)).windows))
        self.revision = source.revision(pooling, *(["unit"] if self._head.unit else []))

    def prepare(self, item: Item) -> Clip:
        """The clip as spectrograms of equal windows.

        Raises:
            ItemError: the file cannot be read as audio.
        """
        return self._clip(torch.from_numpy(read_audio(item, self._rate)))

    def _clip(self, wave: Tensor) -> Clip:
        # A spectrogram needs a full Fourier window: very short clips are padded with silence to 0.1 s.
        wave = pad(wave, (0, max(0, self._rate // 10 - len(wave))))
        pieces = equal_windows(wave, self._longest)
        windows = tuple(self._window(piece) for piece in pieces)
        return Clip(windows, tuple(len(piece) for piece in pieces))

    def _window(self, piece: Tensor) -> dict[str, Tensor]:
        features = _features(self._extractor, piece)
        if "input_values" in features:
            return {"input_values": features["input_values"][0]}
        # CLAP's preprocessor marks a random clip as longer than the model's window. None is.
        return {"input_features": features["input_features"][0], "is_longer": torch.zeros(1, dtype=torch.bool)}

    @torch.inference_mode()
    def encode(self, batch: Sequence[Clip]) -> Tensor:
        """n prepared clips to a float32 tensor of shape (n, dim)."""
        windows = [window for clip in batch for window in clip.windows]
        vectors = [
            self._vectors(windows[start : start + SPECTROGRAMS_AT_ONCE]).cpu()
            for start in range(0, len(windows), SPECTROGRAMS_AT_ONCE)
        ]
        if not vectors:
            return torch.zeros(0, self.dim)
        by_clip = torch.split(torch.cat(vectors), [len(clip.windows) for clip in batch])
        means = torch.stack([of_clip.mean(0) for of_clip in by_clip])
        return normalize(means, dim=-1) if self._head.unit else means

    @torch.inference_mode()
    def _vectors(self, windows: Sequence[dict[str, Tensor]]) -> Tensor:
        inputs = {name: torch.stack([window[name] for window in windows]).to(self._source.device) for name in windows[0]}
        outputs = self._model(**inputs)
        if self._head.output == "cls":
            return output_of(self._source, outputs, "last_hidden_state")[:, 0]
        vectors = output_of(self._source, outputs, self._head.output)
        return normalize(vectors, dim=-1) if self._head.unit else vectors


def _features(extractor: Any, piece: Tensor, **arguments: Any) -> Any:
    return extractor(np.asarray(piece), sampling_rate=extractor.sampling_rate, return_tensors="pt", **arguments)


def _longest(extractor: Any) -> int:
    """Maximum samples per spectrogram: stated by CLAP's preprocessor; AST has frames of 25 ms every 10 ms."""
    samples = getattr(extractor, "nb_max_samples", None)
    return int(samples) if samples else int(extractor.sampling_rate) * int(extractor.max_length) // 100
