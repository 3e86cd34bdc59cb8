"""Small timm models with random weights. Not in conftest.py: other plugins have one too, and a name serves one module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

BuildFolder = Callable[..., Path]
FillCache = Callable[[str, Path], Path]


def random_model(architecture: str = "test_vit", seed: int = 0, **arguments: Any) -> Any:
    """A small timm model. Its weights are random, but for nothing in it to be zero or one by default."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
