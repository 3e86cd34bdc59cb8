"""Opening a timm model with weights from timm's registry, the hub, a local folder or a local checkpoint."""

from __future__ import annotations

import difflib
import re
import socket
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from timm.models import get_pretrained_cfg

from bridgekit.errors import PluginError, one_line
from bridgekit.hub import PATIENCE, check_download, model_folder, pinned
from bridgekit.storage.bounded import read_json
from bridgekit_timm.checkpoint import load_checkpoint

PLUGIN = "bridgekit-timm"

MAX_CONFIG = 16 << 20  # bytes of a config.json
#: Weight files of a timm repository or folder, best first.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Model:
    """A timm model with loaded weights, and everything its vectors depend on.

    Arguments:
        model: the torch module.
        architecture: timm's name without a tag.
        weights: the file with the weights.
        arguments: non-default arguments of the architecture.
        pinned: the name that opens the same weights on every machine.
    """

    model: Any
    architecture: str
    weights: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    pinned: str = ""


def open_model(name: str, *, checkpoint: str | None = None, size: int | None = None) -> Model:
    """Open a timm model.

    Arguments:
        name: a name in timm's registry, with an optional tag and `@revision` of its repository; `org/model`,
            `org/model@revision` or `hf-hub:org/model`; or the path of a folder with a `config.json` written by timm.
        checkpoint: the path of a file with other weights for a model of the registry.
        size: side of the input images in pixels, if not the default.

    Raises:
        PluginError: there is no such model, or its weights cannot be found, downloaded or loaded.
    """
    name = name.removeprefix("hf-hub:").removeprefix("local-dir:")
    where = f"timm:{name}"
    if "/" in name or (Path(name).is_dir() and not timm.is_model(name)):
        if checkpoint is not None:
            raise PluginError(
                "checkpoint= requires the name of an architecture, not a folder or hub model",
                where=where,
                remedy=f"for example timm:resnet50,checkpoint={checkpoint}",
            )
        folder = model_folder(name, ("config.json", *WEIGHTS), plugin=PLUGIN)
        return replace(_from_folder(folder, where, size), pinned=pinned(name, folder))
    name, _, revision = name.partition("@")
    config = _registered(name)
    arguments = _size_arguments(config, size)
    architecture = name.partition(".")[0]
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        model = _create(name, where, pretrained=False, **arguments)
        load_checkpoint(model, path, config.get("classifier"), where=where)
    else:
        path = _published_weights(config, where, revision)
        model = _create(name, where, pretrained=True, pretrained_cfg_overlay=_read_from(path), **arguments)
    return Model(model, architecture, path, arguments, name if checkpoint is not None else pinned(name, path.parent))


def _from_folder(folder: Path, where: str, size: int | None) -> Model:
    try:
        config = read_json(folder / "config.json", MAX_CONFIG)
    except FileNotFoundError:
        raise PluginError(
            f"{PLUGIN} found no config.json in this model's folder",
            where=str(folder),
            remedy="give a folder written by timm, with config.json and model.safetensors",
        ) from None
    except (OSError, ValueError) as error:
        raise PluginError(
            f"the config.json cannot be read: {one_line(error)}",
            where=str(folder / "config.json"),
            remedy="download the model again",
        ) from None
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise PluginError(
            "the config.json has no timm architecture",
            where=str(folder / "config.json"),
            remedy="use a folder or hub model written by timm; for a transformers model use transformers:MODEL",
        )
    if not timm.is_model(architecture):
        raise _unknown(architecture, str(folder / "config.json"))
    # Older models have a flat config.
    arguments = _size_arguments(config.get("pretrained_cfg", config), size)
    weights = _weights_in(folder)
    model = _create(f"local-dir:{folder}", where, pretrained=True, pretrained_cfg_overlay=_read_from(weights), **arguments)
    return Model(model, architecture, weights, {**config.get("model_args", {}), **arguments})


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    for ending in ("safetensors", "bin", "pth", "pt"):
        if found := sorted(file for file in folder.glob(f"*.{ending}") if file.is_file()):
            if len(found) == 1:
                return found[0]
            raise PluginError(
                f"{PLUGIN} cannot tell which of {len(found)} files has the weights",
                where=str(folder),
                remedy=f"name it {WEIGHTS[0]}",
            )
    raise PluginError(f"{PLUGIN} found no weights in this model's folder", where=str(folder), remedy=f"it needs {WEIGHTS[0]}")


def _registered(name: str) -> dict[str, Any]:
    """The registry's configuration of a model: where its weights are, and its input format."""
    if not timm.is_model(name):
        raise _unknown(name, f"timm:{name}")
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError:  # the tag is unknown
        raise _unknown(name, f"timm:{name}") from None
    return asdict(config) if config else {}


def _unknown(name: str, where: str) -> PluginError:
    architecture = name.partition(".")[0]
    known = timm.list_pretrained(f"{architecture}.*") if timm.is_model(architecture) else timm.list_models()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[: 3 if timm.is_model(architecture) else 0]
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_pretrained() lists all names"
    return PluginError(f"{PLUGIN} found no model {name!r} in timm {timm.__version__}", where=where, remedy=hint)


def _size_arguments(config: dict[str, Any], size: int | None) -> dict[str, Any]:
    """Arguments to build an architecture for another image size; most accept any size and need none."""
    return {"img_size": size} if size and config.get("fixed_input_size") else {}


def _published_weights(config: dict[str, Any], where: str, revision: str) -> Path:
    """The file with the weights that timm's registry refers to, downloaded if necessary."""
    if hub_id := config.get("hf_hub_id"):
        other = config.get("hf_hub_filename")
        names = (str(Path(other).with_suffix(".safetensors")), other) if other else WEIGHTS
        folder = model_folder(f"{hub_id}@{revision}" if revision else hub_id, names, plugin=PLUGIN)
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise PluginError(f"{PLUGIN} found no weights of this model in {hub_id}", where=where)
    if url := config.get("url"):
        return _download(url, where)
    raise PluginError("timm has no pre-trained weights for this architecture", where=where, remedy="add checkpoint=FILE")


def _download(url: str, where: str) -> Path:
    """A weight file that is not on the hub, stored where timm itself would store it."""
    from huggingface_hub import constants

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if path.is_file():
        return path
    check_download(url, plugin=PLUGIN)
    remedy = "connect to a network, or give the file with checkpoint=FILE"
    if constants.HF_HUB_OFFLINE:
        raise PluginError(f"HF_HUB_OFFLINE is set and the weights are not cached: {url}", where=where, remedy=remedy)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)  # of the file's SHA-256, as is usual for torch.hub
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torch sets no timeout
    try:
        torch.hub.download_url_to_file(url, str(path), prefix and prefix[1], progress=False)
    except (OSError, RuntimeError) as error:
        raise PluginError(f"{PLUGIN} cannot download {url} ({one_line(error)})", where=where, remedy=remedy) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _read_from(weights: Path) -> dict[str, Any]:
    """Configuration that makes timm read this file. NumPy archives are read by the model's own loader."""
    return {"file": str(weights), "source": None, "custom_load": weights.suffix == ".npz"}


def _create(name: str, where: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # from timm, torch, safetensors or the architecture itself
        file = arguments.get("pretrained_cfg_overlay", {}).get("file")
        remedy = "change or omit size=" if "img_size" in arguments else "download the model again, or choose another one"
        raise PluginError(
            f"timm cannot build or load this model: {one_line(error)}", where=file or where, remedy=remedy
        ) from error
