"""Write bridgekit_starter/aisfx.safetensors from the checkpoint in PyPI's aisfx 0.1.2 (CC BY 4.0).

    python plugins/bridgekit-starter/training/convert_aisfx.py

The package itself cannot be a dependency: it pins numpy 1.23. The wheel is downloaded and checked by SHA-256, its checkpoint is
read without running code, and the embedding network is kept in half precision, with batch normalisation folded into the
convolutions.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy._core import multiarray
from safetensors.torch import save

WHEEL, CHECKPOINT = "aisfx-0.1.2-py2.py3-none-any.whl", "aisfx/models/checkpoint.pth"
SHA256 = "499ea75909c932a2f94c35fa722fa4fabc5bcb7e84917209cc5f7402627b7eb5"
OUT = Path(__file__).parents[1] / "bridgekit_starter" / "aisfx.safetensors"
ABOUT = {
    "title": "aiSFX, embedding network of X-Sequential-CE, batch normalisation folded in, half precision",
    "authors": "Alison B. Ma and Alexander Lerch, ISMIR 2022",
    "source": f"{WHEEL}: {CHECKPOINT}, SHA-256 {SHA256}",
    "licence": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
}


def main() -> None:
    """Convert the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "aisfx==0.1.2"], check=True)
        content = zipfile.ZipFile(Path(folder) / WHEEL).read(CHECKPOINT)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit("the checkpoint is not the expected one")
    allowed = [(multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Int64DType]
    with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
        stored, _ = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    tensors = {}
    for number in range(8):
        block, own = f"embedding_net.conv_block{number // 2 + 1}", number % 2 + 1
        norm = f"{block}.bn{own}"
        scale = stored[f"{norm}.weight"] / (stored[f"{norm}.running_var"] + 1e-5).sqrt()
        tensors[f"convolutions.{number}.weight"] = (stored[f"{block}.conv{own}.weight"] * scale[:, None, None, None]).half()
        tensors[f"convolutions.{number}.bias"] = (stored[f"{norm}.bias"] - stored[f"{norm}.running_mean"] * scale).half()
    OUT.write_bytes(save(tensors, ABOUT))
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, SHA-256 {hashlib.sha256(OUT.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
