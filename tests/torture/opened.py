"""Imported by the process that attacks are forked from: the command line, and the starter's encoders, kept open."""

from __future__ import annotations

import functools

import torch
from bridgekit_starter import image, text

import bridgekit.cli  # noqa: F401
import tests.torture.attacks  # noqa: F401

torch.set_num_threads(1)  # a fork has none of its parent's threads
text.TextEncoder = functools.cache(text.TextEncoder)  # type: ignore[assignment,misc]
image.ImageEncoder = functools.cache(image.ImageEncoder)  # type: ignore[assignment,misc]
text.TextEncoder("cpu")
image.ImageEncoder("cpu")
