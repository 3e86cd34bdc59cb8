"""`starter:sound`: YAMNet, a small CNN trained to recognise 521 kinds of sound in AudioSet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.functional import pad

from bridgekit.encoders import Item
from bridgekit.media import read_audio
from bridgekit_starter.weights import read_own

#: Written by training/convert_yamnet.py.
WEIGHTS = Path(__file__).parent / "yamnet.safetensors"
SHA256 = "29f944ec2b1f5eecfdc2bff7d589876cb4ad5fd896a24ef7201ae5ac2fa76dee"

SAMPLE_RATE = 16_000
#: Samples of a frame, its step and its Fourier transform.
FRAME, HOP, FFT = 400, 160, 512
#: Frames of a window (0.96 s), and the step from one to the next.
WINDOW, STEP = 96, 48
#: Added to the mel spectrogram before the logarithm.
OFFSET = 0.001
#: Strides of the 27 convolutions: one full, then 13 pairs of a depthwise and a pointwise one (MobileNet v1).
STRIDES = (2, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2, 1, *(1,) * 10, 2, 1, 1, 1)
#: Windows in one forward pass, so that memory does not grow with a clip's length.
WINDOWS_AT_ONCE = 64


class SoundEncoder:
    """YAMNet's 1,024 features before its classifier, with the maximum over the windows of a clip.

    Compared on ESC-10 (400 clips, logistic regression on standardised vectors, leave one fold out) and on 158 kinds of sounds
    in games (182 clips of 4 packages that took no part in training, linear discriminant analysis):

    | vectors                  | ESC-10 | kinds, among the first 3 |
    |--------------------------|--------|--------------------------|
    | Whisper (1024)           | 92.3 % | 35.7 % |
    | aiSFX, maximum (512)     | 95.5 % | 38.5 % |
    | YAMNet, mean (1024)      | 94.8 % | 46.7 % |
    | YAMNet, maximum (1024)   | 95.5 % | 45.6 % |
    | Whisper and aiSFX        | 96.5 % | 40.1 % |
    | Whisper and YAMNet       | 97.5 % | 51.6 % |
    | all three                | 97.5 % | 51.6 % |

    Arguments:
        device: a torch device.

    Raises:
        PluginError: the weights are missing or are not the expected ones.
    """

    modality = "audio"
    dim = 1024

    def __init__(self, device: str = "cpu") -> None:
        self.revision = f"starter:sound@{SHA256[:12]}+max-v1"
        self._device = torch.device(device)
        self._model = load_sound_model().to(self._device)

    def prepare(self, item: Item) -> Tensor:
        """The clip as windows of its log-mel spectrogram: float32 of shape (windows, 96, 64), the last one filled with silence.

        Raises:
            ItemError: the file cannot be read as audio.
        """
        return self.windows(torch.from_numpy(read_audio(item, SAMPLE_RATE)))

    def windows(self, wave: Tensor) -> Tensor:
        """As `prepare`, for samples of shape (n,) at 16 kHz."""
        frames = max(0, len(wave) - FRAME) // HOP + 1
        steps = -(-max(0, frames - WINDOW) // STEP)
        size = FRAME + HOP * (WINDOW + STEP * steps - 1)
        return log_mel(pad(wave, (0, max(0, size - len(wave))))[:size], self._model.mel).unfold(0, WINDOW, STEP).transpose(1, 2)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Tensor]) -> Tensor:
        """n prepared clips into a float32 tensor of shape (n, 1024)."""
        parts = torch.split(torch.cat(list(batch)), WINDOWS_AT_ONCE)
        features = torch.cat([self._model(part.to(self._device)) for part in parts])
        return torch.stack([own.amax(0) for own in torch.split(features, [len(clip) for clip in batch])])


def log_mel(wave: Tensor, mel: Tensor) -> Tensor:
    """YAMNet's log-mel spectrogram: samples of shape (n,) at 16 kHz into float32 of shape (frames, 64).

    Arguments:
        mel: (64, 257), the mel filters.
    """
    spectrum = torch.fft.rfft(wave.unfold(0, FRAME, HOP) * _HANN, FFT).abs()
    mels: Tensor = spectrum @ mel.T
    return (mels + OFFSET).log()


class SoundModel(nn.Module):
    """MobileNet v1 with its batch normalisation folded in, and the mean over time and frequency."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.mel = weights["mel"]  # no buffer: spectrograms are made on the CPU
        self.convolutions = nn.ModuleList()
        for number, stride in enumerate(STRIDES):
            stored, scale, bias = (weights[f"convolutions.{number}.{name}"] for name in ("weight", "scale", "bias"))
            out, own, side, _ = stored.shape
            depthwise = number % 2 == 1
            convolution = nn.Conv2d(out if depthwise else own, out, side, stride, groups=out if depthwise else 1)
            convolution.weight.data = stored.float() * scale[:, None, None, None]
            convolution.bias.data = bias  # type: ignore[union-attr]
            self.convolutions.append(convolution)

    def forward(self, frames: Tensor) -> Tensor:
        """(b, 96, 64) into (b, 1024)."""
        x = frames[:, None].contiguous(memory_format=torch.channels_last)
        for convolution in self.convolutions:
            assert isinstance(convolution, nn.Conv2d)
            x = convolution(_padded(x, convolution.kernel_size[0], convolution.stride[0])).clamp_(0, 6)
        return x.mean((2, 3))


def _padded(x: Tensor, side: int, stride: int) -> Tensor:
    """TensorFlow's padding SAME: for strides above 1, more at the end than at the beginning."""
    missing = [max((-(-size // stride) - 1) * stride + side - size, 0) for size in x.shape[2:]]
    return pad(x, [amount for lost in reversed(missing) for amount in (lost // 2, lost - lost // 2)])


def load_sound_model() -> SoundModel:
    """The model with its weights in float32.

    Raises:
        PluginError: the file is missing or is not the expected one.
    """
    model = SoundModel(load(read_own(WEIGHTS, SHA256, "the file of starter:sound")))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


_HANN = torch.hann_window(FRAME)
