"""`starter:speech` and `starter:speech-30s`: the encoder of Whisper base, at a clip's own length or padded to 30 s."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad
from transformers import WhisperConfig
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from bridgekit.encoders import Item
from bridgekit.media import read_audio
from bridgekit_starter.weights import WHISPER_PARTS, WHISPER_SHA256, read_ctranslate2

SAMPLE_RATE = 16_000
FFT = 400
HOP = 160
MEL_BANDS = 80

#: Samples per encoder frame (20 ms): two hops, because the second convolution has stride 2.
FRAME = 2 * HOP
#: Whisper's training window: 30 s.
WINDOW = 30 * SAMPLE_RATE
#: Shorter clips are padded with zeros to 0.1 s. The Fourier transform needs at least 201 samples.
SHORTEST = SAMPLE_RATE // 10

#: Maximum frames per forward pass, including padding: keeps the cores busy and fits their caches.
FRAMES_AT_ONCE = 1_500

#: The layer whose states are concatenated with the last one's.
MIDDLE = 3


@dataclass(frozen=True)
class Window:
    """At most 30 s of a clip, ready to be encoded.

    Arguments:
        mel: log-mel spectrogram, float32 of shape (80, hops of 10 ms), hops even.
        frames: number of the hops // 2 encoder frames that contain the clip, not padding.
    """

    mel: Tensor
    frames: int


class SpeechEncoder:
    """Whisper base's encoder: the states after its third and its last layer, each averaged over a clip's own frames.

    Whisper was trained to transcribe speech, and its last layers discard other sounds; the third layer does not. Together they
    work better for both than the last layer alone. Accuracy in percent on standardised vectors (means over the clip's own
    frames; 400 clips of ESC-10: logistic regression, leave one fold out of five; 300 spoken names: nearest mean over 6 voices,
    or nearest clip of 1 voice, with queries in 2 other voices):

    | states         | ESC-10, own length | ESC-10, padded | names, 6 voices | names, 1 voice |
    |----------------|--------------------|----------------|-----------------|----------------|
    | last (512)     | 89.2               | 91.2           | 95.8            | 85.3           |
    | 3 (512)        | 94.5               | 94.5           | 96.3            | 76.5           |
    | 3, last (1024) | 93.0               | 93.0           | 98.7            | 88.5           |

    Adding standard deviations or a third layer changes these by less than two points. If clips are padded to 30 s, the frames
    of silence are encoded but excluded from the mean: including them costs accuracy on short words (85 % instead of 100 %;
    60 names, 3 voices).

    Arguments:
        device: a torch device.
        padded: pad each clip with silence to 30 s, as in Whisper's training.

    Raises:
        PluginError: the weights are missing or not the expected ones.
    """

    modality = "audio"
    dim = 1024

    def __init__(self, device: str = "cpu", *, padded: bool = False) -> None:
        # Named before `starter:speech` was, and part of every stored latent's key.
        self.revision = f"starter:audio@{WHISPER_SHA256[:12]}+layer-{MIDDLE}-and-last-{'30s' if padded else 'own-length'}-v1"
        self._padded = padded
        self._device = torch.device(device)
        self._model = load_whisper_encoder(self._device)
        # In bfloat16, the first attention layers attend to other frames in some short words, which changes all later layers.
        # With the first two and the convolutions in float32, the minimum centred cosine to float32 rises from 0.989 to 0.999
        # over 1,093 spoken words, and from 0.9992 to 0.9997 over 50 clips of ESC-10. It costs a tenth of the time.
        for layer in self._model.layers[:2]:
            layer.self_attn = InFloat32(layer.get_submodule("self_attn"), self._device)
        self._positions = self._model.embed_positions.weight

    def prepare(self, item: Item) -> list[Window]:
        """The clip as log-mel spectrograms of the fewest windows of equal length that are at most 30 s long.

        Raises:
            ItemError: the file cannot be read as audio.
        """
        return self.windows(torch.from_numpy(read_audio(item, SAMPLE_RATE)))

    def windows(self, wave: Tensor) -> list[Window]:
        """As `prepare`, for samples of shape (n,) at 16 kHz."""
        # Equal windows, because a short remainder after windows of 30 s could be too short to be useful.
        size = math.ceil(len(wave) / math.ceil(len(wave) / WINDOW))
        return [
            Window(log_mel(pad_wave(piece, padded=self._padded)), math.ceil(len(piece) / FRAME))
            for piece in torch.split(wave, size)
        ]

    @torch.inference_mode()
    def encode(self, batch: Sequence[Sequence[Window]]) -> Tensor:
        """n prepared clips into a float32 tensor of shape (n, 1024).

        Padding is masked, so a clip's vector does not depend on its batch, up to rounding.
        """
        windows = [(window, owner) for owner, clip in enumerate(batch) for window in clip]
        windows.sort(key=lambda pair: pair[0].mel.shape[1])
        sums = torch.zeros(len(batch), self.dim, device=self._device)
        frames = torch.tensor([[float(sum(window.frames for window in clip))] for clip in batch], device=self._device)
        for group in _groups(windows):
            states = self.states([window.mel for window, _ in group])
            lengths = torch.tensor([window.frames for window, _ in group], device=self._device)
            own = torch.arange(states.shape[1], device=self._device) < lengths[:, None]
            owners = torch.tensor([owner for _, owner in group], device=self._device)
            sums.index_add_(0, owners, (states * own[..., None]).sum(1))
        return sums / frames

    @torch.inference_mode()
    def states(self, mels: Sequence[Tensor]) -> Tensor:
        """The encoder's states for b windows, one per frame (20 ms).

        Arguments:
            mels: b log-mel spectrograms of shape (80, hops), hops even and at most 3000.

        Returns:
            The states after layer 3 and after the last layer, concatenated: float32 of shape (b, t, 1024), where t is half the
            maximum number of hops. Frames after the end of a shorter window are meaningless.
        """
        hops = torch.tensor([mel.shape[1] for mel in mels], device=self._device)
        longest = int(hops.max())
        valid = torch.arange(longest, device=self._device) < hops[:, None]
        even = bool(valid.all())
        x = torch.stack([pad(mel, (0, longest - mel.shape[1])) for mel in mels]).to(self._device)
        with in_float32(self._device):
            x = gelu(self._model.conv1(x))
            if not even:
                # The second convolution must see zeros after a window's end, as its own padding would be.
                x = x.masked_fill(~valid[:, None], 0)
            x = gelu(self._model.conv2(x)).transpose(1, 2)
        x = x + self._positions[: x.shape[1]]
        keys = valid[:, ::2]
        mask = None if even else torch.zeros(keys.shape, device=self._device).masked_fill(~keys, -math.inf)[:, None, None]
        for layer in self._model.layers[:MIDDLE]:
            x = layer(x, mask)
        middle = x
        for layer in self._model.layers[MIDDLE:]:
            x = layer(x, mask)
        return torch.cat([middle, self._model.layer_norm(x)], dim=-1)


def _groups(windows: Sequence[tuple[Window, int]]) -> Iterator[Sequence[tuple[Window, int]]]:
    """Cut windows, sorted by length, into groups of at most `FRAMES_AT_ONCE` frames; a single window may have more."""
    cuts = [0]
    for index, (window, _) in enumerate(windows):
        if index > cuts[-1] and (index + 1 - cuts[-1]) * window.mel.shape[1] // 2 > FRAMES_AT_ONCE:
            cuts.append(index)
    for start, stop in pairwise([*cuts, len(windows)]):
        yield windows[start:stop]


class InFloat32(nn.Module):
    """Runs a module in float32 even under bfloat16 autocast."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module, self._device = module, device

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The module's output."""
        with in_float32(self._device):
            return self.module(*inputs, **options)


def in_float32(device: torch.device) -> torch.autocast:
    """Disable autocast on a device."""
    return torch.autocast(device.type, enabled=False)


def pad_wave(wave: Tensor, *, padded: bool) -> Tensor:
    """A window padded with zeros to 30 s, or else to a whole number of frames and at least 0.1 s: shape (n,) to (m,)."""
    size = WINDOW if padded else max(SHORTEST, math.ceil(len(wave) / FRAME) * FRAME)
    return pad(wave, (0, size - len(wave)))


def log_mel(wave: Tensor) -> Tensor:
    """Whisper's log-mel spectrogram: samples of shape (n,) at 16 kHz into float32 of shape (80, n // 160)."""
    spectrum = torch.stft(wave, FFT, HOP, window=_HANN, return_complex=True)[:, :-1]
    power = spectrum.real.square() + spectrum.imag.square()
    log = (_MEL_FILTERS @ power).clamp(min=1e-10).log10()
    return (log.maximum(log.max() - 8) + 4) / 4


_HANN = torch.hann_window(FFT)
_MEL_FILTERS = torch.from_numpy(
    mel_filter_bank(1 + FFT // 2, MEL_BANDS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney").T
).float()


def load_whisper_encoder(device: torch.device) -> WhisperEncoder:
    """transformers' Whisper encoder with the weights of Whisper base, float32, in evaluation mode."""
    stored = read_ctranslate2(b"".join(part.read() for part in WHISPER_PARTS), prefix="encoder/")
    config = WhisperConfig(
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        num_mel_bins=MEL_BANDS,
        max_source_positions=1500,
    )
    with torch.device("meta"):  # skip random initialisation
        model = WhisperEncoder(config)
    weights = _in_transformers_names(stored, config.encoder_layers)
    model.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)
    model.train(False)
    return model


def _in_transformers_names(stored: dict[str, np.ndarray], layers: int) -> dict[str, Tensor]:
    """Rename CTranslate2's variables to transformers' parameters and split the fused query-key-value matrices."""

    def take(name: str) -> Tensor:
        return torch.from_numpy(stored[f"encoder/{name}"].astype(np.float32))

    def norm(theirs: str, ours: str) -> dict[str, Tensor]:
        return {f"{ours}.weight": take(f"{theirs}/gamma"), f"{ours}.bias": take(f"{theirs}/beta")}

    def linear(theirs: str, ours: str) -> dict[str, Tensor]:
        return {f"{ours}.weight": take(f"{theirs}/weight"), f"{ours}.bias": take(f"{theirs}/bias")}

    weights = {"embed_positions.weight": take("position_encodings/encodings")}
    weights |= linear("conv1", "conv1") | linear("conv2", "conv2") | norm("layer_norm", "layer_norm")
    for index in range(layers):
        theirs, ours = f"layer_{index}", f"layers.{index}"
        matrices = take(f"{theirs}/self_attention/linear_0/weight").chunk(3)
        biases = take(f"{theirs}/self_attention/linear_0/bias").chunk(3)
        for name, matrix, bias in zip(("q_proj", "k_proj", "v_proj"), matrices, biases, strict=True):
            weights[f"{ours}.self_attn.{name}.weight"] = matrix
            if name != "k_proj":  # Whisper's keys have no bias; CTranslate2 stores zeros
                weights[f"{ours}.self_attn.{name}.bias"] = bias
        weights |= linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
        weights |= norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
        weights |= linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1") | linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        weights |= norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    return weights
