"""Finds a LAION-CLAP checkpoint on disk, in the hub's cache or on the hub, and reads tensors, and nothing else, out of it."""

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

from bridgekit.errors import PluginError
from bridgekit.hub import PATIENCE
from bridgekit.storage.bounded import check_stored

#: The hub repository of the published checkpoints.
HUB = "lukewys/laion_clap"
#: Those that can be asked for by name. Which HTSAT one holds is read from its weights: tiny in the first two, base in the rest.
PUBLISHED = (
    "630k-best.pt",
    "630k-audioset-best.pt",
    "music_audioset_epoch_15_esc_90.14.pt",
    "music_speech_epoch_15_esc_89.25.pt",
    "music_speech_audioset_epoch_15_esc_89.98.pt",
)
#: Published too, and refused: see `FUSION_REFUSED`.
PUBLISHED_WITH_FUSION = ("630k-fusion-best.pt", "630k-audioset-fusion-best.pt")

FUSION_REFUSED = (
    "bridgekit-clap does not take fusion checkpoints: laion_clap gives them random parts of a long clip, "
    "so that a clip would not always have the same vector"
)
FUSION_REMEDY = "use the checkpoint without fusion: 630k-audioset-best.pt or 630k-best.pt"

_loading = threading.Lock()  # torch's list of harmless globals is one for the whole process


def find_checkpoint(name: str) -> Path:
    """The file of a checkpoint: that of a path, or a published one, which is fetched only if the hub's cache lacks it.

    Raises:
        PluginError: there is no such file and none is published under this name, it has fusion, or it cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path.absolute()
    if name in PUBLISHED_WITH_FUSION:
        raise PluginError(FUSION_REFUSED, where=name, remedy=FUSION_REMEDY)
    if name in PUBLISHED:
        return _fetched(name)
    near = difflib.get_close_matches(name, PUBLISHED, n=1)
    files = f"give the path of a .pt or .safetensors file, or one of {', '.join(PUBLISHED)}"
    raise PluginError(
        "bridgekit-clap finds no checkpoint file here, and none is published under this name",
        where=name or "clap:",
        remedy=f"did you mean {near[0]}?" if near else files,
    )


def _fetched(name: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(HUB, name)
    if isinstance(cached, str):
        return Path(cached)
    try:
        HfApi().model_info(HUB, timeout=PATIENCE)  # without a network this fails soon; the download would try for minutes
        return Path(hf_hub_download(HUB, name, etag_timeout=PATIENCE))
    except Exception as error:  # each version of the hub's client has another HTTP library's errors
        raise PluginError(
            f"bridgekit-clap cannot fetch this checkpoint from the hub ({type(error).__name__}: {_one_line(error)})",
            where=name,
            remedy=f"connect to a network, or give the path of a local copy (from huggingface.co/{HUB})",
        ) from error


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of both towers by the names of `laion_clap`'s model, on the CPU, and no others (training leaves more).

    No code of the file runs: a `.pt` is read with torch's `weights_only`, which builds tensors and plain values.

    Raises:
        PluginError: the file is damaged, cut short or something else, would run code, or has fusion.
    """
    try:
        loaded: Any = load_file(checkpoint) if checkpoint.suffix == ".safetensors" else _load_tensors(checkpoint)
    except Exception as error:  # whatever a damaged or hostile file brings torch to
        more = re.search(r"(?:GLOBAL|class) ([A-Za-z_][\w.]*)", str(error))
        if isinstance(error, pickle.UnpicklingError) and more:
            what = f"bridgekit-clap refuses this checkpoint: it holds {more[1]}, which is no weight (no code of it was run)"
            raise PluginError(what, where=str(checkpoint), remedy="get it from a source that you trust") from None
        raise PluginError(
            "bridgekit-clap cannot read this file: it is cut short, damaged, or no checkpoint",
            where=str(checkpoint),
            remedy="download it again, and compare its size with the source's",
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    weights = {
        # Training on several GPUs puts `module.` before each name. Position ids are counted, not learned.
        name.removeprefix("module."): value
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(name, str) and isinstance(value, Tensor) and not name.endswith("position_ids")
    }
    if any(".fusion_model." in name or ".mel_conv" in name for name in weights):
        raise PluginError(FUSION_REFUSED, where=str(checkpoint), remedy=FUSION_REMEDY)
    return weights


def _load_tensors(checkpoint: Path) -> Any:
    check_stored(checkpoint)
    # Mapped into memory where the format allows it: training also saves the optimizer's state, which is then not read.
    mapped = zipfile.is_zipfile(checkpoint)
    with _loading, torch.serialization.safe_globals(_number_types()):
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)


def _number_types() -> list[Any]:
    """What a numpy number is pickled with, by its names before and since numpy 2: a checkpoint may note a loss so."""
    scalar = np.float64(0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
