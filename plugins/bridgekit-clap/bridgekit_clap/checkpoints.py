"""Finding a LAION-CLAP checkpoint on disk, in the hub cache or on the hub, and reading its tensors without running code."""

from __future__ import annotations

import difflib
import pickle
import re
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bridgekit.errors import PluginError, one_line
from bridgekit.hub import PATIENCE, check_download
from bridgekit.storage.bounded import check_stored

#: The hub repository of the published checkpoints.
HUB = "lukewys/laion_clap"
#: Published checkpoints without fusion. The HTSAT size is detected from the weights: tiny for the first two, base for the rest.
PUBLISHED = (
    "630k-best.pt",
    "630k-audioset-best.pt",
    "music_audioset_epoch_15_esc_90.14.pt",
    "music_speech_epoch_15_esc_89.25.pt",
    "music_speech_audioset_epoch_15_esc_89.98.pt",
)
#: Published checkpoints that are not supported: see `FUSION_REFUSED`.
PUBLISHED_WITH_FUSION = ("630k-fusion-best.pt", "630k-audioset-fusion-best.pt")

FUSION_REFUSED = (
    "bridgekit-clap does not support fusion checkpoints: they use random crops of long clips, "
    "so vectors would not be deterministic"
)
FUSION_REMEDY = "use a checkpoint without fusion: 630k-audioset-best.pt or 630k-best.pt"

_loading = threading.Lock()  # torch's safe globals are process-wide


def find_checkpoint(name: str) -> Path:
    """The file of a checkpoint: a local path, or a published one, downloaded if it is not cached.

    Raises:
        PluginError: there is no such file or published checkpoint, it has fusion, or it cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path.absolute()
    if name in PUBLISHED_WITH_FUSION:
        raise PluginError(FUSION_REFUSED, where=name, remedy=FUSION_REMEDY)
    if name in PUBLISHED:
        return _download(name)
    near = difflib.get_close_matches(name, PUBLISHED, n=1)
    files = f"give the path of a .pt or .safetensors file, or one of {', '.join(PUBLISHED)}"
    raise PluginError(
        "bridgekit-clap found no such file, and no checkpoint is published under this name",
        where=name or "clap:",
        remedy=f"did you mean {near[0]}?" if near else files,
    )


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(HUB, name)
    if isinstance(cached, str):
        return Path(cached)
    check_download(name, f"hf download {HUB} {name}", plugin="bridgekit-clap")
    try:
        HfApi().model_info(HUB, timeout=PATIENCE)  # fails quickly without a network; the download would retry for minutes
        return Path(hf_hub_download(HUB, name, etag_timeout=PATIENCE))
    except Exception as error:  # the HTTP library, and so its exceptions, differ between versions of the hub client
        raise PluginError(
            f"bridgekit-clap cannot download this checkpoint from the hub ({type(error).__name__}: {one_line(error)})",
            where=name,
            remedy=f"connect to a network, or give the path of a local copy (from huggingface.co/{HUB})",
        ) from error


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of both towers by their names in laion_clap's model, on the CPU, without optimizer state.

    The file cannot run code: a `.pt` is read with torch's `weights_only`, which builds only tensors and plain values.

    Raises:
        PluginError: the file is damaged, truncated or not a checkpoint, contains code, or has fusion.
    """
    try:
        loaded: Any = load_file(checkpoint) if checkpoint.suffix == ".safetensors" else _load_tensors(checkpoint)
    except Exception as error:  # torch may raise anything for damaged or malicious files
        more = re.search(r"(?:GLOBAL|class) ([A-Za-z_][\w.]*)", str(error))
        if isinstance(error, pickle.UnpicklingError) and more:
            what = f"bridgekit-clap rejected this checkpoint: it contains {more[1]}, not just weights (no code was run)"
            raise PluginError(what, where=str(checkpoint), remedy="get it from a source that you trust") from None
        raise PluginError(
            "bridgekit-clap cannot read this file: it is truncated, damaged, or not a checkpoint",
            where=str(checkpoint),
            remedy="download it again, and compare its size with the original",
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    weights = {
        # Multi-GPU training adds the prefix `module.`. Position ids are constants, not weights.
        name.removeprefix("module."): value
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(name, str) and isinstance(value, Tensor) and not name.endswith("position_ids")
    }
    if any(".fusion_model." in name or ".mel_conv" in name for name in weights):
        raise PluginError(FUSION_REFUSED, where=str(checkpoint), remedy=FUSION_REMEDY)
    return weights


def _load_tensors(checkpoint: Path) -> Any:
    check_stored(checkpoint)
    # Memory-mapped if possible, so that the optimizer state, which training also saves, is not read.
    mapped = zipfile.is_zipfile(checkpoint)
    with _loading, torch.serialization.safe_globals(_number_types()):
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)


def _number_types() -> list[Any]:
    """The globals of pickled numpy scalars, before and since numpy 2: checkpoints may contain a loss value."""
    scalar = np.float64(0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))]
